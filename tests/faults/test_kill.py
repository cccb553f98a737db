"""Kill every part at seeded moments under steady traffic: nothing lost, nothing done twice."""

import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Sequence

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from runners.embedded.process_tree import ProcessId, children_of, send
from runners.embedded.traffic import Traffic
from tests.faults.harness import (
    CAMPUS,
    SOURCE_SETTINGS,
    Link,
    Network,
    Site,
    seed_of_this_run,
    until,
)
from tests.faults.history import History
from tests.faults.severing import SeveringProxy

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("CAMPUS_SYNC_KILLS", "6"))
STORES = ("primary", CAMPUS)
WORKER = "runners.workers work"
# To be alive again, not fast: two busy cores start a JVM and two Pythons in a minute.
RECOVERY_S = 300.0
RATE = 120
SEVERED = 8  # Connections on either side of a commit.
AT_ONCE = 0.25  # Share of kills that meet a system still recovering from the last one.


class Job:
    """`campus-sync run` as a process of its own, which an operator starts again when it ends."""

    def __init__(self, site: Site):
        self._command = [sys.executable, "-m", "runners.cli", "run", "--no-check"]
        # An operator who has killed it so often would not want it to give up.
        self._command += ["--config", str(site.path), "--restarts_max=1000"]
        self.work_dir = site.folder / "job"
        self.log = site.folder / "run.log"
        self.seen: set[ProcessId] = set()
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[ProcessId]:
        """Returns its living descendants, and remembers them."""
        found, todo = [], [self.process.pid]
        while todo:
            children = children_of(todo.pop())
            found += children
            todo += [child.pid for child in children]
        self.seen |= set(found)
        return found

    def part(self, word: str) -> ProcessId | None:
        """Returns a descendant whose command has `word`."""
        for process in self.family():
            with contextlib.suppress(OSError):
                command = pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
                if word in command.replace("\0", " "):
                    return process
        return None

    def kill_part(self, word: str) -> bool:
        """Kills the descendant whose command has `word`; False if there is none just now."""
        process = self.part(word)
        return process is not None and send(process, signal.SIGKILL)

    def kill(self) -> None:
        self.family()
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.family()
        self.process.terminate()
        return self.process.wait(60)

    def orphans(self) -> list[ProcessId]:
        return [process for process in self.seen if process.alive]

    def tail(self) -> str:
        text = ""
        for log in (self.log, self.work_dir / "worker.log"):
            with contextlib.suppress(OSError):
                text += f"\n== {log.name}\n{log.read_text(errors='replace')[-3000:]}"
        return text


class Harmed(typing.Protocol):
    """What a killer does harm to: running servers, and what tells whether stores are behind."""

    source_servers: dict[str, PostgresServer | MariaDbServer]
    store_servers: dict[str, PostgresServer]

    def log_end(self) -> object: ...

    def drained(self, end: object, store: str) -> bool: ...

    def facts(self, store: str) -> dict: ...


class Killer:
    """Does one seeded kind of harm at a time and waits until the system has caught up.

    Args:
      first: kinds to begin with; then all kinds come in turn, each time in another order.
    """

    def __init__(self, site: Harmed, job: Job, seed: int, first: Sequence[str] = ()):
        self._site, self._job = site, job
        self._first = list(first)
        self._stores = sorted(site.store_servers)
        self._chance = random.Random(seed)
        self.crashes = collections.Counter()
        self.recoveries: dict[str, list[float]] = collections.defaultdict(list)
        self._kinds = {
            "worker": lambda: self._job.kill_part(WORKER),
            "worker, twice": self._kill_worker_and_next,
            "jvm": lambda: self._job.kill_part("FlinkJobServerDriver"),
            "pool": lambda: self._job.kill_part("runners.workers pool"),
            "run": lambda: self._kill_run(False),
            "run, work_dir lost": lambda: self._kill_run(True),
            "source": self._kill_source,
            "store": self._kill_store,
            "store frozen": self._freeze_store,
            "worker, store frozen": lambda: self._freeze_store(WORKER),
            "source frozen": self._freeze_source,
        }

    def harm(self, count: int) -> None:
        order = self._first[::-1]
        for number in range(count):
            if not order:
                order = sorted(self._kinds)
                self._chance.shuffle(order)
            kind = order.pop()
            time.sleep(self._chance.uniform(0.2, 4.0))
            self._strike(kind)
            began = time.monotonic()
            if number + 1 < count and self._chance.random() < AT_ONCE:
                self.recoveries[kind].append(float("nan"))
                continue
            self._caught_up()
            self.recoveries[kind].append(time.monotonic() - began)
            print(f"{number + 1}: {kind}, {self.recoveries[kind][-1]:.1f} s", flush=True)

    def _strike(self, kind: str) -> None:
        until(
            lambda: self._alive() and self._kinds[kind]() is not False,
            RECOVERY_S,
            lambda: f"a {kind} to kill{self._job.tail()}",
        )

    def _alive(self) -> bool:
        assert self._job.alive, self._job.tail()
        return True

    def _caught_up(self) -> None:
        end = self._site.log_end()
        for store in self._stores:
            until(
                lambda store=store: self._alive() and self._has(end, store),
                RECOVERY_S,
                lambda store=store: f"{store}: {self._site.facts(store)}{self._job.tail()}",
            )

    def _has(self, end: int, store: str) -> bool:
        try:
            return self._site.drained(end, store)
        except psycopg.Error:
            return False

    def _kill_run(self, lose_work_dir: bool) -> None:
        self._job.kill()
        if lose_work_dir:
            shutil.rmtree(self._job.work_dir, ignore_errors=True)
        self._job.start()

    def _kill_worker_and_next(self) -> bool:
        """Kills a worker, and the next one within moments of its start."""
        first = self._job.part(WORKER)
        if first is None or not send(first, signal.SIGKILL):
            return False
        until(
            lambda: self._alive() and self._job.part(WORKER) not in (None, first),
            RECOVERY_S,
            lambda: f"the next worker{self._job.tail()}",
        )
        time.sleep(self._chance.uniform(0, 3))
        self._job.kill_part(WORKER)
        return True

    def _some_source(self) -> PostgresServer | MariaDbServer:
        return self._site.source_servers[self._chance.choice(sorted(self._site.source_servers))]

    def _kill_source(self) -> None:
        server = self._some_source()
        server.kill()
        time.sleep(self._chance.uniform(0, 4))
        server.start()

    def _kill_store(self) -> None:
        name = self._chance.choice(self._stores)
        self._site.store_servers[name].kill()
        self.crashes[name] += 1
        time.sleep(self._chance.uniform(0, 8))
        self._site.store_servers[name].start()

    def _freeze_store(self, word: str = "") -> bool:
        server = self._site.store_servers[self._chance.choice(self._stores)]
        try:
            server.freeze()
            time.sleep(self._chance.uniform(0.5, 3))
            done = not word or self._job.kill_part(word)
            time.sleep(self._chance.uniform(0.5, 5))
        finally:
            server.thaw()
        return done

    def _freeze_source(self) -> None:
        server = self._some_source()
        try:
            server.freeze()
            time.sleep(self._chance.uniform(1, 6))
        finally:
            server.thaw()


@pytest.fixture
def site(tmp_path):
    tmp_path.chmod(0o755)
    names = ("source", *STORES)
    with contextlib.ExitStack() as stack:
        servers = {
            name: PostgresServer(tmp_path / name, settings=SOURCE_SETTINGS, durable=False)
            for name in names
        }
        for server in servers.values():
            stack.enter_context(server)
        stores = {name: servers[name] for name in STORES}
        yield Site(tmp_path, servers["source"], stores, limits={"heartbeat_s": 0.5})
    for server in servers.values():
        shutil.rmtree(server.data, ignore_errors=True)


@contextlib.contextmanager
def steady(traffic: Traffic, seconds: float):
    """Writes traffic in the background; yields the list that its summary will be in."""
    stop, written = threading.Event(), []

    def write() -> None:
        written.append(traffic.run(RATE, seconds, emergency_share=0.2, stop=stop))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield written
    finally:
        stop.set()
        writer.join()


@pytest.mark.xdist_group("flink")
def test_kills_lose_nothing_and_double_nothing(site):
    seed, began = seed_of_this_run(), time.monotonic()
    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic(site.config, seed))
        traffic.preload(30)
        job = Job(site)
        stack.callback(job.kill)
        killer = Killer(site, job, seed)
        stores = {name: lambda name=name: site.store(name) for name in STORES}
        history = History(site.hospital, stores, seed, killer.crashes.__getitem__)
        history.start()
        stack.callback(history.close)
        with steady(traffic, 60.0 * (KILLS + 5)) as written:
            until(
                lambda: all(site.snapshots(name)[-1:] for name in STORES), 120, lambda: job.tail()
            )
            killer.harm(KILLS)
        assert written, "the traffic gave up"
        history.finish_writing()
        site.drain(RECOVERY_S)
        faults = history.finish()
        assert job.stop() == 0, job.tail()
        assert job.orphans() == []
    assert faults == []
    captured = {store: site.captured(store) for store in STORES}
    print(
        f"{KILLS} kills in {time.monotonic() - began:.0f} s; {written[0].rows} rows of traffic,"
        f" {history.appends} appends, {history.looks} looks; captured {captured};"
        f" snapshots {[site.snapshots(store) for store in STORES]}"
    )
    for kind, seconds in sorted(killer.recoveries.items()):
        print(f"{len(seconds):3} {kind}: {', '.join(f'{s:.1f}' for s in seconds)} s")
    with site.administrator() as source:
        slots = source.execute("SELECT slot_name, active FROM pg_replication_slots ORDER BY 1")
        expected = sorted((site.settings(store).slot, False) for store in STORES)
        assert slots.fetchall() == expected
    site.prove()


def test_a_connection_that_breaks_around_a_commit(tmp_path):
    """The store has committed and nobody heard of it, or it has not and nobody knows."""
    seed = seed_of_this_run()
    with contextlib.ExitStack() as stack:
        source, store = (
            stack.enter_context(
                PostgresServer(tmp_path / name, settings=SOURCE_SETTINGS, durable=False)
            )
            for name in ("source", "primary")
        )
        site = Site(tmp_path, source, {"primary": store})
        traffic = stack.enter_context(Traffic(site.config, seed))
        traffic.preload(20)
        proxy = stack.enter_context(SeveringProxy(store.port, seed, share=0.3))
        history = History(site.hospital, {"primary": site.store}, seed)
        severed = make_conninfo(
            site.settings().store_dsn, port=proxy.port, sslmode="disable", gssencmode="disable"
        )
        with Link(site.settings(), Network(seed, 0.05, 0.05, 4), severed) as link:
            until(lambda: site.snapshots()[-1:], 60, "a snapshot")
            history.start()
            stack.callback(history.close)
            deadline = time.monotonic() + 60
            while min(proxy.before, proxy.after) < SEVERED and time.monotonic() < deadline:
                traffic.run(rate=200, seconds=1, emergency_share=0.2)
            history.finish_writing()
            proxy.stop_severing()
            site.drain()
            assert history.finish() == []
            site.drain()  # That took seconds, in which a heartbeat may have been lost.
        print(
            f"{proxy.commits} commits, broken before {proxy.before}, after {proxy.after};"
            f" dropped {link.dropped};"
            f" {history.appends} appends, {history.looks} looks"
        )
        assert min(proxy.before, proxy.after) >= SEVERED
        site.prove()
