"""The exchange killed at any moment, and servers with it: every edit arrives, and stores agree."""

import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import psycopg

from runners.exchange import Exchange
from tests.edited_stores import PLAN, EditedStore, agree, config_of
from tests.faults.harness import seed_of_this_run, until

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 6
SERVE = """\
import sys, time
from runners.exchange import Exchange
from schemas.config import load
with Exchange(load(sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


class Clients:
    """A client at each store, who adds to lists, one edit after the other, whatever happens."""

    def __init__(self, stores: list[EditedStore]):
        self.committed: dict[str, set[str]] = {f"p{i}": set() for i in range(4)}
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._edit, args=[store]) for store in stores]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _edit(self, store: EditedStore) -> None:
        number = 0
        with psycopg.connect(store.dsn, autocommit=True) as conn:
            conn.execute("SET campus_sync.role = 'attending'")
            while not self._stopping.is_set():
                number += 1
                name, added = f"p{number % 4}", f"{store.name}{number}"
                lane = "emergency" if number % 5 == 0 else "routine"
                conn.execute("SELECT set_config('campus_sync.lane', %s, false)", (lane,))
                conn.execute(
                    f"UPDATE consult.{PLAN} SET"
                    " participants = concat_ws(',', participants, %s::text) WHERE record_id = %s",
                    (added, name),
                )
                self.committed[name].add(added)
                time.sleep(0.02)


def serve(config: pathlib.Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, config], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    return process


def test_kill_9_of_the_exchange_at_random_points(postgres_server, tmp_path):
    rng = random.Random(seed_of_this_run())
    dsns = {
        name: postgres_server.create_database(f"kill_{name}")
        for name in ("primary", "main", "east")
    }
    stores = [EditedStore(name, dsn) for name, dsn in dsns.items()]
    config_of(tmp_path, dsns)
    path = tmp_path / "campuses.yaml"
    for i in range(4):
        stores[0].insert(f"p{i}", title="t")
    process = serve(path)
    until(lambda: all(s.row("p3", "1") for s in stores), 60, "rows everywhere")
    with Clients(stores) as clients:
        for _ in range(KILLS):
            time.sleep(rng.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = serve(path)
    edits = sum(map(len, clients.committed.values()))
    try:
        until(lambda: agree(stores) and not waiting(stores), 60, "agreement")
    finally:
        process.kill()
        process.wait()
    for store in stores:
        for name, added in clients.committed.items():
            shown = set(store.row(name, "participants")[0].split(","))
            assert shown == added, f"{store.name}: lost {added - shown}, made up {shown - added}"
        lanes = store.own.execute("SELECT DISTINCT lane FROM sync.exchange").fetchall()
        assert len(lanes) == 2
        met = "SELECT count(*) FROM sync.version WHERE edit -> 'wrote' ? 'participants'"
        assert store.own.execute(met).fetchone()[0] > edits / 4
    print(f"{edits} edits at 3 stores, {KILLS} kills: none lost")
    for store in stores:
        store.close()


def waiting(stores: list[EditedStore]) -> int:
    count = "SELECT count(*) FROM sync.edit"
    return sum(store.own.execute(count).fetchone()[0] for store in stores)


def test_kill_9_of_a_store_under_the_exchange(make_server, tmp_path):
    """It comes back as another incarnation: what it asked and was asked for goes on."""
    servers = {name: make_server(name) for name in ("primary", "main")}
    dsns = {name: server.create_database("consult") for name, server in servers.items()}
    stores = {name: EditedStore(name, dsn) for name, dsn in dsns.items()}
    stores["primary"].insert("p0", title="t")
    with Exchange(config_of(tmp_path, dsns)):
        until(lambda: stores["main"].row("p0", "1"), 30, "the first row")
        for round_, (name, other) in enumerate((("main", "primary"), ("primary", "main"))):
            stores[name].update("p0", follow_up=f"before {round_}")
            stores[name].close()
            servers[name].kill()
            stores[other].update("p0", participants=f"meanwhile {round_}")
            servers[name].start()
            stores[name] = EditedStore(name, servers[name].dsn("consult"))
            stores[name].insert(f"after {round_}", title="t")
            until(lambda: agree(list(stores.values())), 30, "agreement")
            assert not waiting(list(stores.values()))
    for store in stores.values():
        assert store.row("p0", "follow_up", "participants") == (
            "before 1",
            "meanwhile 0,meanwhile 1",
        )
        assert store.row("after 0", "1") and store.row("after 1", "1")
        actors = store.record("p0").seen
        assert len({actor.partition(".")[0] for actor in actors}) == 2
        store.close()
