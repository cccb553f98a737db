"""A source, its stores and a link in one process, over a network that loses and reorders."""

import collections
import dataclasses
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable, Mapping

import psycopg
import yaml

import runners.embedded
from pipelines.compare import compare
from pipelines.sla_report import Observer
from runners.embedded.postgres import PostgresServer
from runners.embedded.world import READER, WRITER
from runners.run import prepare_stores
from schemas.batches import ChangeBatch, Lane
from schemas.clocks import wall_clock_us
from schemas.config import PRIMARY, Config, load
from schemas.errors import StoreUnavailable
from schemas.links import LinkSettings
from schemas.positions import Position, lsn_in
from schemas.reports import Comparison
from transforms.capture.link_reader import LinkReader, live_reader
from transforms.capture.postgresql import slots
from transforms.deliver.store import Store
from transforms.seal_dead_letters import Sealer, make_key

CAMPUS = "main"
SEED_VARIABLE = "CAMPUS_SYNC_SEED"
# Patience that fits a test: what is lost is sent again within a second.
QUICK = {
    "gather_s": 0.02,
    "heartbeat_s": 0.2,
    "resend_emergency_s": 0.5,
    "resend_routine_s": 1.0,
    "batch_rows": 500,
    "in_flight_rows": 5000,
}
SOURCE_SETTINGS = {
    "timezone": "Asia/Shanghai",
    "wal_sender_timeout": "10s",
    "max_wal_size": "512MB",
}
# Rows of the campus's own: the first and the last number.
VITAL = (
    "INSERT INTO his.vital_sign (vital_id, mrn, pulse, measured_at)"
    " SELECT g, 'P' || g %% 50, 70, now() FROM generate_series(%s::int, %s::int) g"
)
# Of as many patients, of whom nobody else writes.
CRITICAL = (
    "INSERT INTO lis.result (result_id, mrn, loinc, val_num, unit, status, result_at, updated_at)"
    " SELECT gen_random_uuid(), %s || g, '2823-3', 8.1, 'mmol/L', 'final', now(), now()"
    " FROM generate_series(1, %s::int) g"
)
_SQL = pathlib.Path(runners.embedded.__file__).parent
_ROLES = {READER: "LOGIN REPLICATION", WRITER: "LOGIN"}


def seed_of_this_run() -> int:
    """Returns a new seed, or the environment's; prints it, so that a failure can be repeated."""
    seed = int(os.environ.get(SEED_VARIABLE, time.time_ns() // 1000 % 1_000_000))
    print(f"{SEED_VARIABLE}={seed}")
    return seed


def until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]):
    """Returns the first true value of `condition`; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() >= deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:.0f} s: {text}")
        time.sleep(0.05)
    return found


def wait_until_free(dsn: str, slot: str, seconds: float) -> None:
    """Returns once a slot's last reader has left."""
    until(lambda: not slots.state(dsn, slot).active, seconds, "the reader's leave")


def drop_slot(dsn: str, slot: str, seconds: float) -> None:
    """Drops a slot once its last reader has left."""
    wait_until_free(dsn, slot, seconds)
    slots.drop(dsn, slot)


def drop_slots(connection: psycopg.Connection) -> None:
    """Drops every slot of the connection's database once its last reader has left."""
    names = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
    active = f"{names} AND active"
    until(lambda: not connection.execute(active).rowcount, 15, "the readers' leave")
    connection.execute(f"SELECT pg_drop_replication_slot(slot_name) FROM ({names}) AS s")


class Site:
    """One campus's source, the stores that it feeds and their configuration.

    Args:
      folder: for campuses.yaml and the key. source, stores: running servers.
      name: of the databases; several sites may share the servers under different names.
      limits: of campuses.yaml.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        source: PostgresServer,
        stores: Mapping[str, PostgresServer],
        name: str = "",
        limits: Mapping[str, float] | None = None,
    ):
        self.folder, self.name = folder, name
        self.source_server, self.store_servers = source, dict(stores)
        self.source_servers = {CAMPUS: source}
        self._make_source()
        for server in self.store_servers.values():
            with server.connect() as connection:
                _make_roles(connection)
                connection.execute(f"CREATE DATABASE consult{name} OWNER {READER}")
        make_key(folder / "key")
        self.write_config(limits=dict(limits or QUICK))
        prepare_stores(self.config)

    def _make_source(self) -> None:
        with self.source_server.connect() as connection:
            _make_roles(connection)
            connection.execute(f"CREATE DATABASE his{self.name} OWNER {WRITER}")
        with self.hospital(autocommit=False) as connection:
            for script in ("hospital.sql", "publish.sql"):
                connection.execute((_SQL / script).read_text(encoding="utf-8"))

    def write_config(self, mapping: str = "postgresql_his", **more) -> Config:
        """Writes campuses.yaml and returns it read; `limits` stay unless they are given, and so
        does what `source` adds to the source."""
        self._source = more.pop("source", getattr(self, "_source", {}))
        self._limits = more.pop("limits", getattr(self, "_limits", None))
        content = {
            "version": 1,
            "sources": {
                CAMPUS: {
                    "kind": "postgresql",
                    "dsn": self.source_server.dsn(f"his{self.name}", READER),
                    "mapping": mapping,
                    **self._source,
                }
            },
            "stores": {
                name: {"dsn": server.dsn(f"consult{self.name}", READER)}
                for name, server in self.store_servers.items()
            },
            "dead_letter_key": "file:key",
            "limits": self._limits,
            **more,
        }
        self.path = self.folder / "campuses.yaml"
        self.path.write_text(yaml.safe_dump(content))
        self.config = load(self.path)
        return self.config

    def settings(self, store: str = PRIMARY) -> LinkSettings:
        """Returns a link's settings; its slot is the site's own on a shared server."""
        link = next(link for link in self.config.links() if link.store == store)
        settings = self.config.settings(link)
        return dataclasses.replace(settings, slot=settings.slot + self.name)

    def hospital(self, **arguments) -> psycopg.Connection:
        """Returns a connection to the source as the hospital's own programs have it."""
        return self.source_server.connect(f"his{self.name}", WRITER, **arguments)

    def administrator(self) -> psycopg.Connection:
        return self.source_server.connect(f"his{self.name}")

    def store(self, name: str = PRIMARY) -> psycopg.Connection:
        return self.store_servers[name].connect(f"consult{self.name}", READER)

    def log_end(self) -> int:
        """Returns the end of the source's log."""
        with self.administrator() as connection:
            query = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
            (end,) = connection.execute(query).fetchone()
        return lsn_in(self.config.sources[CAMPUS].generation, end)

    def progress(self, store: str = PRIMARY, lane: Lane = Lane.ROUTINE) -> Position | None:
        """Returns a lane's ledger, None before its first delivery."""
        with self.store(store) as connection:
            row = connection.execute(
                "SELECT lsn, seq FROM sync.progress WHERE link = %s AND lane = %s",
                (f"{CAMPUS}>{store}", lane.value),
            ).fetchone()
        return Position(*row) if row else None

    def drained(self, end: int, store: str = PRIMARY) -> bool:
        """Whether a store has all that was committed before `end`, and nothing is apart."""
        reached = self.progress(store)
        if reached is None or reached.acknowledgeable_lsn < end:
            return False
        with self.store(store) as connection:
            running = "SELECT FROM sync.snapshot WHERE state = 'running'"
            apart = connection.execute(f"SELECT FROM sync.island UNION ALL {running}")
            return apart.rowcount == 0

    def drain(self, seconds: float = 60) -> None:
        """Returns when every store has all that is committed now."""
        end = self.log_end()
        for store in self.store_servers:
            until(
                lambda store=store: self.drained(end, store),
                seconds,
                lambda store=store: f"{store} at {end}: {self.facts(store)}",
            )

    def facts(self, store: str = PRIMARY) -> dict:
        """Returns what a store knows of its links, for a failure's text and for assertions."""
        tables = ("progress", "island", "snapshot", "hold", "sweep")
        with self.store(store) as connection:
            connection.row_factory = psycopg.rows.dict_row
            return {
                table: connection.execute(f"SELECT * FROM sync.{table}").fetchall()
                for table in tables
            }

    def snapshots(self, store: str = PRIMARY) -> list[tuple[str, str]]:
        """Returns reason and state of every snapshot, oldest first."""
        with self.store(store) as connection:
            query = "SELECT reason, state FROM sync.snapshot ORDER BY lsn"
            return connection.execute(query).fetchall()

    def open_letters(self, store: str = PRIMARY) -> list[str]:
        """Returns the reasons of the dead letters that are open."""
        query = "SELECT reason FROM sync.dead_letter WHERE state = 'open' ORDER BY lsn, seq"
        with self.store(store) as connection:
            return [reason for (reason,) in connection.execute(query)]

    def captured(self, store: str = PRIMARY) -> int:
        """Returns how many changes the routine lane has accounted for."""
        (row,) = (r for r in self.facts(store)["progress"] if r["lane"] == Lane.ROUTINE.value)
        return row["captured"]

    def prove(self) -> Comparison:
        """Asserts the law, whole manifests and equal contents; returns the comparison."""
        return prove(self.config)


def prove(config: Config) -> Comparison:
    """Asserts the law, whole manifests and equal contents of drained stores."""
    comparison = compare(config, show_keys=True)
    with Observer(config) as observer:
        report = observer.report(wall_clock_us(), comparison=comparison)
    unlike = [match for match in comparison.tables if not match.equal]
    unlike += [match for match in comparison.stores if not match.equal]
    assert comparison.equal, unlike
    assert report.law_holds
    assert report.complete, report.gaps
    assert report.sound, report.unreachable
    assert comparison.rows > 0
    return comparison


def _make_roles(connection: psycopg.Connection) -> None:
    for name, options in _ROLES.items():
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount:
            connection.execute(f"CREATE ROLE {name} {options}")


@dataclasses.dataclass(frozen=True)
class Network:
    """What stands between reader and store: shares of batches that are lost and repeated, and
    how many wait to overtake one another."""

    seed: int = 0
    lost: float = 0.0
    repeated: float = 0.0
    waiting: int = 0


class Link:
    """One link as a worker runs it, without an engine: reader, network, and a store a lane.

    A batch that the store refuses is dropped, as in `Deliver`. Use as a context; leaving it
    is the end of a worker: whatever it held is gone.
    """

    def __init__(self, settings: LinkSettings, network: Network = Network(), store_dsn: str = ""):
        self._settings = settings
        self._network = network
        self._store_dsn = store_dsn or settings.store_dsn
        self._stopping = threading.Event()
        self._held: set[Lane] = set()
        self._boxes = {lane: collections.deque() for lane in Lane}
        self._changed = threading.Condition()
        self.errors: list[BaseException] = []
        self.sent = collections.Counter()
        self.dropped = 0
        self._threads = [threading.Thread(target=self._guard, args=[self._pump])]
        for number, lane in enumerate(Lane):
            work = [self._apply, lane, random.Random(network.seed * 2 + number)]
            self._threads.append(threading.Thread(target=self._guard, args=work))

    def __enter__(self) -> "Link":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.reader.close()
        if self.errors:
            raise self.errors[0]

    @property
    def reader(self) -> LinkReader:
        """The link's reader; another one after it gave up."""
        return live_reader(self._settings)

    def hold(self, lane: Lane) -> None:
        """Lets nothing more of a lane reach the store."""
        self._held.add(lane)

    def release(self, lane: Lane) -> None:
        with self._changed:
            self._held.discard(lane)
            self._changed.notify_all()

    def waiting(self, lane: Lane) -> int:
        """How many batches of a lane are on their way."""
        return len(self._boxes[lane])

    def lose_next(self, lane: Lane) -> None:
        """Loses the oldest batch that is on its way."""
        with self._changed:
            self._boxes[lane].popleft()

    def _guard(self, work: Callable, *arguments) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self.errors.append(error)
            self._stopping.set()
            raise

    def _pump(self) -> None:
        chance = random.Random(self._network.seed)
        while not self._stopping.is_set():
            batch = self.reader.next(0.05)
            if batch is None:
                continue
            self.sent[batch.lane] += 1
            if chance.random() < self._network.lost:
                continue
            copies = 2 if chance.random() < self._network.repeated else 1
            with self._changed:
                self._boxes[batch.lane].extend([batch] * copies)
                self._changed.notify_all()

    def _apply(self, lane: Lane, chance: random.Random) -> None:
        store = Store(
            self._store_dsn,
            self._settings.name,
            self._settings.source,
            Sealer(self._settings.key_ref),
            wall_clock_us,
        )
        while not self._stopping.is_set():
            batches = self._arrived(lane, chance)
            if not batches:
                continue
            try:
                store.apply(batches, lane)
            except StoreUnavailable:
                self.dropped += len(batches)
        store.close()

    def _arrived(self, lane: Lane, chance: random.Random) -> list[ChangeBatch]:
        """Returns one to three batches, not always the oldest; none after a while."""
        box = self._boxes[lane]
        with self._changed:
            self._changed.wait_for(lambda: self._stopping.is_set() or self._ready(lane), 0.1)
            if self._stopping.is_set() or not self._ready(lane):
                return []
            found = []
            for _ in range(min(len(box), chance.randint(1, 3))):
                place = chance.randrange(min(len(box), self._network.waiting + 1))
                found.append(box[place])
                del box[place]
            return found

    def _ready(self, lane: Lane) -> bool:
        return bool(self._boxes[lane]) and lane not in self._held
