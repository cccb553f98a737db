"""Measure emergencies at every store of a source while a routine backlog is written and drains."""

import collections
import contextlib
import subprocess
import sys
import threading
import time

import psycopg

RATE = 30  # A second.
AT_LEAST = 200  # Of those that are committed while a backlog drains.
_POLL_S = 0.002
_LOST_S = 120
PHASES = ("is written", "is read", "drains")
_SENT = """SELECT coalesce(bool_and(r.sent_lsn >= %s::pg_lsn), false) FROM pg_stat_replication r
JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE s.database = current_database()
    AND s.slot_name LIKE 'campus_sync_%%'"""
_WRITE = """
import sys, psycopg
dsn, statement = sys.argv[1:3]
first, rows, end = map(int, sys.argv[3:])
with psycopg.connect(dsn, autocommit=True) as connection:
    for low in range(first, first + rows, 1000):
        connection.execute(statement.format(low=low, high=low + 999))
    connection.execute(statement.format(low=end, high=end))
"""


class _Eye:
    """Looks at one store for what was committed, until it is seen."""

    def __init__(self, dsn: str, campus: str):
        self._dsn, self._campus = dsn, campus
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[float, str]] = {}
        self._stopping = threading.Event()
        self.lags: dict[str, list[float]] = collections.defaultdict(list)
        self.seen: set[int] = set()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "_Eye":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def expect(self, row: int, committed: float, phase: str) -> None:
        with self._lock:
            self._waiting[str(row)] = committed, phase

    @property
    def waits(self) -> bool:
        with self._lock:
            return bool(self._waiting)

    def _look(self) -> None:
        query = "SELECT record_id FROM consult.lab_result WHERE record_id = ANY(%s) AND campus = %s"
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stopping.wait(_POLL_S):
                with self._lock:
                    ids = list(self._waiting)
                found = connection.execute(query, (ids, self._campus)).fetchall() if ids else ()
                now = time.monotonic()
                with self._lock:
                    for (row,) in found:
                        committed, phase = self._waiting.pop(row)
                        self.lags[phase].append((now - committed) * 1000)
                        self.seen.add(int(row))


def under_backlog(bench, side, rows: int, routine: str, urgent: str) -> dict[str, list[float]]:
    """Returns lags in ms of emergencies committed one by one, by store and what went on meanwhile.

    First `rows` routine rows are written as fast as the source can, by a program that takes a
    processor of the same machine (`is written`); then what of them the links have not read yet is
    read (`is read`); then what waits in the routine lane drains, until the last store has it
    (`drains`). Goes on with another backlog until enough were met by that.

    Args:
      bench: hands out ids. side: runs. routine, urgent: statements that insert `low` to `high`.
    """
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        eyes = {
            name: stack.enter_context(_Eye(dsn, side.campus)) for name, dsn in side.dsns.items()
        }
        while min(len(eye.lags["drains"]) for eye in eyes.values()) < AT_LEAST:
            _one_backlog(bench, eyes, rows, routine, urgent)
        for phase in PHASES:
            for name, eye in eyes.items():
                if eye.lags[phase]:
                    found[f"{phase}, {name}"] = eye.lags[phase]
    return found


class _Left:
    """Tells whether all that the writer wrote has been sent to whoever reads the log."""

    def __init__(self):
        self._end: str | None = None
        self._read = False

    def phase(self, connection: psycopg.Connection) -> str:
        if self._end is None:
            (self._end,) = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        if not self._read:
            (self._read,) = connection.execute(_SENT, [self._end]).fetchone()
        return "drains" if self._read else "is read"


def _one_backlog(bench, eyes: dict[str, _Eye], rows: int, routine: str, urgent: str) -> None:
    first, end = bench.take_ids(rows), bench.take_marker()
    arguments = [bench.dsn, routine, *map(str, (first, rows, end))]
    writer = subprocess.Popen([sys.executable, "-c", _WRITE, *arguments])
    for eye in eyes.values():
        eye.expect(end, time.monotonic(), "end")
    left = _Left()
    with psycopg.connect(bench.dsn, autocommit=True) as connection:
        due = time.monotonic()
        while not all(end in eye.seen for eye in eyes.values()):
            row = bench.take_ids(1)
            phase = "is written" if writer.poll() is None else left.phase(connection)
            connection.execute(urgent.format(low=row, high=row))
            for eye in eyes.values():
                eye.expect(row, time.monotonic(), phase)
            due = max(due + 1 / RATE, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
    writer.wait()
    deadline = time.monotonic() + _LOST_S
    while any(eye.waits for eye in eyes.values()):
        if time.monotonic() > deadline:
            raise SystemExit(f"emergencies were not seen within {_LOST_S} s")
        time.sleep(_POLL_S)
