"""Kills with sources of two kinds and two stores: every part, under traffic at both campuses."""

import contextlib
import pathlib
import time

import psycopg
import pytest
import yaml

from pipelines.source_clocks import log_end
from runners.embedded import world
from runners.embedded.traffic import Traffic
from runners.run import prepare_stores
from schemas.config import load
from schemas.positions import Position
from tests.faults.harness import prove, seed_of_this_run, until
from tests.faults.history import History
from tests.faults.test_kill import KILLS, RECOVERY_S, Job, Killer, steady
from transforms.seal_dead_letters import make_key

COUNT = max(4, KILLS * 2 // 3)
STORES = ("primary", "east")
SERVERS = ("source-main", "source-east", *(f"store-{name}" for name in STORES))
FIRST = ("run", "worker, twice", "run, work_dir lost", "source")


class Campuses:
    """A PostgreSQL and a GBK MariaDB that feed the platform's store and one campus's own."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.path = folder, folder / "campuses.yaml"
        known = world.servers(folder, durable=False)
        self._servers = {name: known[name] for name in SERVERS}
        self.source_servers = {c: known[f"source-{c}"] for c in ("main", "east")}
        self.store_servers = {name: known[f"store-{name}"] for name in STORES}

    def __enter__(self) -> "Campuses":
        world._each(self._servers, world._prepare, lambda _: None, "ready")
        main, east = (
            server.dsn(world.SOURCE_DATABASE, world.READER)
            for server in self.source_servers.values()
        )
        content = {
            "version": 1,
            "sources": {
                "main": {"kind": "postgresql", "dsn": main, "mapping": "postgresql_his"},
                "east": {"kind": "mariadb", "dsn": east, "mapping": "mariadb_his_gbk"},
            },
            "stores": {
                name: {"dsn": server.dsn(world.STORE_DATABASE, world.READER)}
                for name, server in self.store_servers.items()
            },
            "dead_letter_key": "file:key",
            "limits": {"heartbeat_s": 0.5},
        }
        make_key(self.folder / "key")
        self.path.write_text(yaml.safe_dump(content), encoding="utf-8")
        self.config = load(self.path)
        prepare_stores(self.config)
        return self

    def __exit__(self, *_) -> None:
        world._each(self._servers, world._stop, lambda _: None, "stopped")
        world.remove(self.folder, lambda _: None)

    def hospital(self) -> psycopg.Connection:
        return self.source_servers["main"].connect(world.SOURCE_DATABASE, world.WRITER)

    def store(self, name: str) -> psycopg.Connection:
        return self.store_servers[name].connect(world.STORE_DATABASE, world.READER)

    def log_end(self) -> dict[str, int]:
        """Returns the end of every source's log."""
        return {name: log_end(source).lsn for name, source in self.config.sources.items()}

    def drained(self, end: dict[str, int], store: str) -> bool:
        """Whether a store has all that was committed at every source before `end`."""
        with self.store(store) as connection:
            rows = connection.execute(
                "SELECT link, lsn, seq FROM sync.progress WHERE lane = 'routine'"
            ).fetchall()
            running = "SELECT FROM sync.snapshot WHERE state = 'running'"
            apart = connection.execute(f"SELECT FROM sync.island UNION ALL {running}").rowcount
        at = {link.partition(">")[0]: Position(*place) for link, *place in rows}
        there = all(c in at and at[c].acknowledgeable_lsn >= lsn for c, lsn in end.items())
        return there and not apart

    def drain(self) -> None:
        end = self.log_end()
        for store in STORES:
            until(
                lambda store=store: self.drained(end, store),
                RECOVERY_S,
                lambda store=store: f"{store} at {end}: {self.facts(store)}",
            )

    def facts(self, store: str) -> dict:
        """Returns what a store knows of its links, for a failure's text."""
        with self.store(store) as connection:
            connection.row_factory = psycopg.rows.dict_row
            return {
                table: connection.execute(f"SELECT * FROM sync.{table}").fetchall()
                for table in ("progress", "island", "snapshot", "hold", "sweep")
            }

    def snapshots(self, store: str) -> list[tuple[str, str, str]]:
        """Returns link, reason and state of every snapshot."""
        with self.store(store) as connection:
            query = "SELECT link, reason, state FROM sync.snapshot ORDER BY link, lsn"
            return connection.execute(query).fetchall()


@pytest.fixture
def campuses(tmp_path):
    tmp_path.chmod(0o755)
    with Campuses(tmp_path) as campuses:
        yield campuses


@pytest.mark.xdist_group("flink")
def test_kills_with_unlike_sources_lose_nothing(campuses):
    seed, began = seed_of_this_run(), time.monotonic()
    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic(campuses.config, seed))
        traffic.preload(20)
        job = Job(campuses)
        stack.callback(job.kill)
        killer = Killer(campuses, job, seed, FIRST)
        stores = {name: lambda name=name: campuses.store(name) for name in STORES}
        history = History(campuses.hospital, stores, seed, killer.crashes.__getitem__)
        history.start()
        stack.callback(history.close)
        with steady(traffic, 60.0 * (COUNT + 5)) as written:
            until(
                lambda: all(len(campuses.snapshots(name)) == 2 for name in STORES),
                120,
                lambda: job.tail(),
            )
            killer.harm(COUNT)
        assert written, "the traffic gave up"
        history.finish_writing()
        campuses.drain()
        faults = history.finish()
        assert job.stop() == 0, job.tail()
        assert job.orphans() == []
    assert faults == []
    print(
        f"{COUNT} kills in {time.monotonic() - began:.0f} s; traffic {written[0].by_source},"
        f" {history.appends} appends, {history.looks} looks"
    )
    for kind, seconds in sorted(killer.recoveries.items()):
        print(f"{len(seconds):3} {kind}: {', '.join(f'{s:.1f}' for s in seconds)} s")
    for name in STORES:
        found = campuses.snapshots(name)
        assert found == [(f"{c}>{name}", "first", "done") for c in ("east", "main")]
    slots = {campuses.config.settings(link).slot for link in campuses.config.links()}
    with campuses.source_servers["main"].connect() as source:
        active = source.execute("SELECT slot_name, active FROM pg_replication_slots").fetchall()
    assert all(name in slots and not busy for name, busy in active), active
    prove(campuses.config)
