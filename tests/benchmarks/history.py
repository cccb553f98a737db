"""Load a year of history from two unlike campuses while they work, and kill the job meanwhile.

`python -m tests.benchmarks.history --rows 2000000 --kills 6 --seed 1`: so many rows in a PostgreSQL
and as many in a GBK MariaDB, both read by `campus-sync run` on Flink into one store, with traffic
that changes the very rows that are being read. Worker, JVM or the whole job are killed at seeded
moments. Prints what it took, and whether the store is equal to the sources by content.
"""

import argparse
import collections.abc
import contextlib
import dataclasses
import pathlib
import random
import re
import sys
import tempfile
import threading
import time

import numpy as np
import psycopg
import pymysql
import yaml

from pipelines.compare import compare
from pipelines.sla_report import Observer
from pipelines.source_clocks import log_end
from runners.embedded import world
from runners.embedded.traffic import Traffic
from runners.run import prepare_stores
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.positions import Position
from tests.faults.test_kill import Job
from transforms.seal_dead_letters import make_key

SERVERS = ("source-main", "source-east", "store-primary")
FIRST = 7_000_000_000_000_000  # Keys that no traffic uses.
MOVED = 1_000_000_000_000  # What a key is changed by.
NULL = "\\N"  # As COPY has it.
CHUNK = 50_000
YEAR_S = 31_536_000
END = np.datetime64("2026-11-01T00:00:00")
NAMES = ("王", "李", "张", "欧阳", "赵", "陈", "令狐", "刘")
GIVEN = ("伟", "芳", "秀英", "敏", "静", "强", "磊", "洋")
ITEMS = (
    ("2823-3", "钾", "mmol/L", 3.0, 5.0, "KAL"),
    ("2951-2", "钠", "mmol/L", 130.0, 150.0, "NAT"),
    ("718-7", "血红蛋白", "g/L", 90.0, 160.0, "HGB"),
    ("777-3", "血小板", "10^9/L", 100.0, 300.0, "PLT"),
)
LONG = 2000  # One result in so many has a text that is kept out of line.
KILLS = {
    "worker": lambda job: job.kill_part("runners.workers work"),
    "jvm": lambda job: job.kill_part("FlinkJobServerDriver"),
    "job": lambda job: (job.kill(), job.start()),
}
DEADLINE_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run showed; rates and times by campus."""

    rows: dict[str, int]
    rows_s: dict[str, float]
    seconds: dict[str, float]
    resumes: dict[str, int]
    kills: tuple[str, ...]
    changes: int
    worker_rss_bytes: int
    letters: int
    equal: bool
    sound: bool
    compared: int

    def lines(self) -> collections.abc.Iterator[str]:
        for campus, rows in self.rows.items():
            yield (
                f"{campus}: {rows:,} rows read in {self.seconds[campus]:.0f} s from first to last,"
                f" {self.rows_s[campus]:,.0f} rows/s since gone on with for the last time,"
                f" gone on with {self.resumes[campus]} times"
            )
        yield f"killed: {', '.join(self.kills) or 'nothing'}"
        yield f"{self.changes:,} transactions changed rows of the history meanwhile"
        yield f"largest worker: {self.worker_rss_bytes / 2**20:.0f} MiB resident"
        yield f"dead letters: {self.letters}; law, manifests and stores sound: {self.sound}"
        yield f"contents equal: {self.equal}, {self.compared:,} rows compared"


class History:
    """Rows of a year at both campuses, from a seed: patients, vital signs and results."""

    def __init__(self, rows: int, seed: int):
        self.patients = max(10, rows // 100)
        self.vitals = rows * 3 // 10
        self.results = rows - self.patients - self.vitals
        self._seed = seed

    def _parts(self, count: int, kind: int) -> collections.abc.Iterator[tuple]:
        """Yields, of so many rows at once, their numbers, four chances and their times."""
        rng = np.random.default_rng((self._seed, kind))
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            at = END - rng.integers(0, YEAR_S, size).astype("timedelta64[s]")
            yield (
                range(FIRST + first, FIRST + first + size),
                rng.random((4, size)).tolist(),
                np.datetime_as_string(at, "s").tolist(),
            )

    def fill_postgresql(self, connection: psycopg.Connection) -> None:
        for statement, parts in (
            (
                "his.patient (pid, mrn, name, sex_code, birth_date, phone, updated_at)",
                self._people(),
            ),
            (
                "his.vital_sign (vital_id, mrn, temp_c, pulse, sbp, dbp, spo2, measured_at)",
                self._vital_lines(),
            ),
            (
                "lis.result (result_id, mrn, loinc, item_name, val_num, val_txt, unit, abn_flag,"
                " status, result_at, updated_at)",
                self._result_lines(),
            ),
        ):
            for lines in parts:
                with (
                    connection.cursor() as cursor,
                    cursor.copy(f"COPY {statement} FROM STDIN") as c,
                ):
                    c.write("".join(lines))

    def _people(self) -> collections.abc.Iterator[list[str]]:
        for ids, (a, b, c, d), times in self._parts(self.patients, 0):
            yield [
                f"{i}\tH{i}\t{name(x, y)}\t{1 + (y < 0.5)}\t{1930 + int(z * 90)}"
                f"-0{1 + int(w * 9)}-11\t138{int(w * 1e8):08d}\t{t}+08\n"
                for i, x, y, z, w, t in zip(ids, a, b, c, d, times, strict=True)
            ]

    def _vital_lines(self) -> collections.abc.Iterator[list[str]]:
        for ids, (a, b, c, d), times in self._parts(self.vitals, 1):
            yield [
                f"{i}\tH{FIRST + int(x * self.patients)}\t{36 + y:.1f}\t{60 + int(z * 30)}"
                f"\t{110 + int(w * 20)}\t{70 + int(y * 10)}\t{95 + int(z * 5)}\t{t}+08\n"
                for i, x, y, z, w, t in zip(ids, a, b, c, d, times, strict=True)
            ]

    def _result_lines(self) -> collections.abc.Iterator[list[str]]:
        rng = random.Random(self._seed)
        long = rng.randbytes(4000).hex()
        for ids, (a, b, c, _), times in self._parts(self.results, 2):
            yield [
                f"{uuid(i)}\tH{FIRST + int(x * self.patients)}\t{item[0]}\t{item[1]}"
                f"\t{item[3] + z * (item[4] - item[3]):.2f}\t{NULL if i % LONG else long}"
                f"\t{item[2]}\tN\tfinal\t{t}+08\t{t}+08\n"
                for i, x, item, z, t in zip(
                    *(ids, a, (ITEMS[int(y * len(ITEMS))] for y in b), c, times), strict=True
                )
            ]

    def fill_mariadb(self, connection: pymysql.Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION sql_log_bin = 0")  # History is older than the log.
            for into, parts in (
                ("MS_BRDA (BRID, MZHM, BRXM, BRXB, CSNY, JTDH, XGSJ)", self._people_b()),
                ("HL_SMTZ (CJXH, BRID, TW, MB, SSY, SZY, XYBH, CLSJ)", self._vitals_b()),
                ("JYJG (JYXH, BRID, XMDM, XMMC, JG, DW, TS, JGZT, BGSJ, XGSJ)", self._results_b()),
            ):
                for rows in parts:
                    for first in range(0, len(rows), 5000):
                        values = ",".join(rows[first : first + 5000])
                        cursor.execute(f"INSERT INTO his.{into} VALUES {values}")
                    connection.commit()

    def _people_b(self) -> collections.abc.Iterator[list[str]]:
        for ids, (a, b, c, d), times in self._parts(self.patients, 0):
            yield [
                f"({i},'H{i}','{name(x, y)}','{'男女'[y < 0.5]}','{1930 + int(z * 90)}"
                f".{1 + int(w * 9)}.11','138{int(w * 1e8):08d}','{t}')"
                for i, x, y, z, w, t in zip(ids, a, b, c, d, times, strict=True)
            ]

    def _vitals_b(self) -> collections.abc.Iterator[list[str]]:
        for ids, (a, b, c, d), times in self._parts(self.vitals, 1):
            yield [
                f"({i},{FIRST + int(x * self.patients)},'{36 + y:.1f}','{60 + int(z * 30)}',"
                f"'{110 + int(w * 20)}','{70 + int(y * 10)}','{95 + int(z * 5)}','{digits(t)}')"
                for i, x, y, z, w, t in zip(ids, a, b, c, d, times, strict=True)
            ]

    def _results_b(self) -> collections.abc.Iterator[list[str]]:
        for ids, (a, b, c, _), times in self._parts(self.results, 2):
            yield [
                f"({i},{FIRST + int(x * self.patients)},'{item[5]}','{item[1]}',"
                f"'{item[3] + z * (item[4] - item[3]):.2f}','{item[2]}','正常',1,"
                f"'{digits(t)}','{t}')"
                for i, x, item, z, t in zip(
                    *(ids, a, (ITEMS[int(y * len(ITEMS))] for y in b), c, times), strict=True
                )
            ]


def name(x: float, y: float) -> str:
    return NAMES[int(x * len(NAMES))] + GIVEN[int(y * len(GIVEN))]


def uuid(number: int) -> str:
    digest = f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"  # In no order.
    return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:]}"


def digits(moment: str) -> str:
    return re.sub(r"\D", "", moment)


class Meddler:
    """Changes random rows of the history at both campuses, until it is stopped."""

    def __init__(self, history: History, main, east, seed: int, pause_s: float = 0.02):
        self._history, self._pause_s = history, pause_s
        self._stop = threading.Event()
        self.changes, self.errors = 0, []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(connect, change, random.Random(seed + n)))
            for n, (connect, change) in enumerate(((main, self._at_main), (east, self._at_east)))
        ]

    def __enter__(self) -> "Meddler":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _work(self, connect, change, chance: random.Random) -> None:
        try:
            with contextlib.closing(connect()) as connection, connection.cursor() as cursor:
                while not self._stop.wait(self._pause_s * 2 * chance.random()):
                    change(cursor, chance)
                    with self._lock:
                        self.changes += 1
        except (psycopg.Error, pymysql.Error) as error:
            self.errors.append(error)

    def _at_main(self, cursor: psycopg.Cursor, chance: random.Random) -> None:
        result, vital = (
            self._some(chance, self._history.results),
            self._some(chance, self._history.vitals),
        )
        what = chance.random()
        if what < 0.45:
            # The long text stays as it is, and is not in the log.
            ids = [uuid(result), uuid(FIRST + chance.randrange(0, self._history.results, LONG))]
            cursor.execute(
                "UPDATE lis.result SET val_num = val_num + 0.01, updated_at = now()"
                " WHERE result_id = ANY (%s::uuid[])",
                [ids],
            )
        elif what < 0.6:
            long = FIRST + chance.randrange(0, self._history.results, LONG)
            cursor.execute(
                "DELETE FROM lis.result WHERE result_id = ANY (%s::uuid[])",
                [[uuid(result), uuid(long)] if chance.random() < 0.2 else [uuid(result)]],
            )
        elif what < 0.75:
            cursor.execute(
                "UPDATE his.vital_sign SET vital_id = vital_id + %s WHERE vital_id = %s"
                " AND NOT EXISTS (SELECT FROM his.vital_sign WHERE vital_id = %s)",
                [MOVED, vital, vital + MOVED],
            )
        elif what < 0.9:
            cursor.execute(
                "INSERT INTO his.vital_sign (vital_id, mrn, pulse, measured_at)"
                " VALUES (%s, %s, 71, now()) ON CONFLICT DO NOTHING",
                [vital + 2 * MOVED, f"H{FIRST + 1}"],
            )
        else:
            cursor.execute(
                "UPDATE his.patient SET phone = %s, updated_at = now() WHERE pid = %s",
                [f"139{chance.randrange(10**8):08d}", self._some(chance, self._history.patients)],
            )

    def _at_east(self, cursor: pymysql.cursors.Cursor, chance: random.Random) -> None:
        result, vital = (
            self._some(chance, self._history.results),
            self._some(chance, self._history.vitals),
        )
        what = chance.random()
        if what < 0.4:
            cursor.execute(
                "UPDATE JYJG SET JG = %s, XGSJ = now() WHERE JYXH = %s", ("4.44", result)
            )
        elif what < 0.5:
            cursor.execute("UPDATE JYJG SET ZFPB = 1 WHERE JYXH = %s", (result,))
        elif what < 0.6:
            cursor.execute("DELETE FROM JYJG WHERE JYXH = %s", (result,))
        elif what < 0.75:
            cursor.execute(
                "UPDATE IGNORE HL_SMTZ SET CJXH = CJXH + %s WHERE CJXH = %s", (MOVED, vital)
            )
        elif what < 0.9:
            cursor.execute(
                "INSERT IGNORE INTO HL_SMTZ (CJXH, BRID, MB, CLSJ) VALUES (%s, %s, '72', %s)",
                (vital + 2 * MOVED, FIRST + 1, "20261101080000"),
            )
        else:
            cursor.execute(
                "UPDATE MS_BRDA SET JTDH = %s, XGSJ = now() WHERE BRID = %s",
                (f"139{chance.randrange(10**8):08d}", self._some(chance, self._history.patients)),
            )

    @staticmethod
    def _some(chance: random.Random, count: int) -> int:
        return FIRST + chance.randrange(count)


class Place:
    """Two campuses and one store, filled, with their configuration."""

    def __init__(self, folder: pathlib.Path, rows: int, seed: int, limits: dict[str, float]):
        self.folder, self.path = folder, folder / "campuses.yaml"
        known = world.servers(folder, durable=False)
        self.servers = {server: known[server] for server in SERVERS}
        world._each(self.servers, world._prepare, lambda _: None, "ready")
        self.history = History(rows, seed)
        with self.main() as connection:
            self.history.fill_postgresql(connection)
            connection.execute("ANALYZE")
        with contextlib.closing(self.servers["source-east"].connect("his")) as connection:
            self.history.fill_mariadb(connection)
        content = {
            "version": 1,
            "sources": {
                "main": {
                    "kind": "postgresql",
                    "dsn": self.servers["source-main"].dsn("his", world.READER),
                    "mapping": "postgresql_his",
                },
                "east": {
                    "kind": "mariadb",
                    "dsn": self.servers["source-east"].dsn("his", world.READER),
                    "mapping": "mariadb_his_gbk",
                },
            },
            "stores": {"primary": {"dsn": self.servers["store-primary"].dsn("consult", "sync")}},
            "dead_letter_key": "file:key",
            "limits": limits,
        }
        make_key(folder / "key")
        self.path.write_text(yaml.safe_dump(content), encoding="utf-8")
        self.config: Config = load(self.path)
        prepare_stores(self.config)

    def close(self) -> None:
        world._each(self.servers, world._stop, lambda _: None, "stopped")
        world.remove(self.folder, lambda _: None)

    def main(self) -> psycopg.Connection:
        return self.servers["source-main"].connect("his", world.WRITER)

    def east(self) -> pymysql.Connection:
        return self.servers["source-east"].connect("his", world.WRITER)

    def ask(self, query: str) -> list[tuple]:
        with psycopg.connect(self.config.stores["primary"].dsn) as connection:
            return connection.execute(query).fetchall()

    def snapshots(self) -> dict[str, tuple]:
        """State, rows read and how often it was gone on with, by campus."""
        rows = self.ask("SELECT link, state, rows_read, resumes FROM sync.snapshot ORDER BY lsn")
        return {link.partition(">")[0]: rest for link, *rest in rows}

    def reading(self) -> bool:
        found = self.snapshots().values()
        return any(state == "running" and rows for state, rows, _ in found)

    def loaded(self) -> bool:
        found = self.snapshots()
        return len(found) == 2 and all(state == "done" for state, *_ in found.values())

    def drained(self) -> bool:
        ends = {name: log_end(source).lsn for name, source in self.config.sources.items()}
        rows = self.ask("SELECT link, lsn, seq FROM sync.progress WHERE lane = 'routine'")
        at = {link.partition(">")[0]: Position(*place) for link, *place in rows}
        there = all(c in at and at[c].acknowledgeable_lsn >= end for c, end in ends.items())
        return there and self.loaded() and not self.ask("SELECT FROM sync.island")


class Memory(threading.Thread):
    """Watches the largest worker of a job."""

    def __init__(self, job: Job):
        super().__init__(daemon=True)
        self._job, self.peak, self.stop = job, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            for process in self._job.family():
                with contextlib.suppress(OSError):
                    place = pathlib.Path(f"/proc/{process.pid}")
                    if b"runners.workers" in (place / "cmdline").read_bytes():
                        found = re.search(r"VmHWM:\s+(\d+)", (place / "status").read_text())
                        self.peak = max(self.peak, int(found[1]) * 1024 if found else 0)


def run(
    place: Place,
    kills: int,
    seed: int,
    pause_s: tuple[float, float] = (5.0, 25.0),
    tell: collections.abc.Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Loads the history of a place while it works, with so many kills, and compares."""
    chance, killed = random.Random(seed), []
    with contextlib.ExitStack() as stack:
        meddler = Meddler(place.history, place.main, place.east, seed)
        traffic = stack.enter_context(Traffic(place.config, seed % 1_000_000))
        traffic.preload(5)
        stop = threading.Event()
        job = Job(place)
        stack.callback(job.kill)
        memory = Memory(job)
        memory.start()
        writing = threading.Thread(target=lambda: traffic.run(20, DEADLINE_S, stop=stop))
        with meddler:
            writing.start()
            try:
                _kill(place, job, kills, chance, pause_s, killed, tell)
                _until(place.loaded, "the snapshots' end", job)
                tell("all of the history is in the store")
            finally:
                stop.set()
                writing.join()
        _until(place.drained, "the log's end", job)
        memory.stop.set()
        assert job.stop() == 0, job.tail()
    comparison = compare(place.config)
    with Observer(place.config) as observer:
        report = observer.report(wall_clock_us(), comparison=comparison)
    found = {part.link.partition(">")[0]: part for part in report.snapshots}
    unlike = [match for match in comparison.tables if not match.equal]
    for match in unlike:
        tell(str(match))
    return Outcome(
        rows={campus: part.rows_read for campus, part in found.items()},
        rows_s={campus: part.rows_per_s for campus, part in found.items()},
        seconds={c: ((p.finished_us or 0) - p.started_us) / 1e6 for c, p in found.items()},
        resumes={campus: part.resumes for campus, part in found.items()},
        kills=tuple(killed),
        changes=meddler.changes,
        worker_rss_bytes=memory.peak,
        letters=sum(part.open for part in report.refused),
        equal=comparison.equal,
        sound=report.law_holds and report.complete and report.sound,
        compared=comparison.rows,
    )


def _kill(place, job, kills, chance, pause_s, killed, tell) -> None:
    """Kills one part after another while history is being read; stops when it has been read."""
    order: list[str] = []
    while len(killed) < kills:
        _until(lambda: place.reading() or place.loaded(), "some rows", job)
        time.sleep(chance.uniform(*pause_s))
        before = place.snapshots()
        if place.loaded():
            return
        order = order or chance.sample(sorted(KILLS), len(KILLS))
        kind = order.pop()
        _until(lambda kind=kind: KILLS[kind](job) is not False, f"a {kind}", job)
        killed.append(kind)
        tell(f"killed {kind} at {before}")
        _until(lambda before=before: place.loaded() or _goes_on(place, before), "reading", job)


def _goes_on(place: Place, before: dict[str, tuple]) -> bool:
    """Whether the history of every campus is being read again, or has been read."""
    now = place.snapshots()
    known = {campus: resumes for campus, (_, _, resumes) in before.items()}
    return all(now[campus][0] == "done" or now[campus][2] > known.get(campus, -1) for campus in now)


def _until(condition, what: str, job: Job) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert job.alive, job.tail()
        assert time.monotonic() < deadline, f"no {what}{job.tail()}"
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000, help="at each campus")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1000 % 1_000_000)
    parser.add_argument("--rows_s", type=int, default=0, help="throttle; 0: none")
    options = parser.parse_args()
    say = lambda text: print(text, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        path = pathlib.Path(folder)
        path.chmod(0o755)
        began = time.monotonic()
        place = Place(path, options.rows, options.seed, {"snapshot_rows_s": options.rows_s})
        say(f"seed {options.seed}; history made in {time.monotonic() - began:.0f} s")
        try:
            outcome = run(place, options.kills, options.seed, tell=say)
        finally:
            place.close()
    for line in outcome.lines():
        say(line)
    return 0 if outcome.equal and outcome.sound else 1


if __name__ == "__main__":
    sys.exit(main())
