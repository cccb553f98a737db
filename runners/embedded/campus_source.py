"""One campus's database as its own programs write it: ids, open stories, uploads, history."""

import abc
import collections.abc
import time
import typing

import numpy as np

from runners.embedded.campus import campus
from runners.embedded.changes import Step
from runners.embedded.charts import MINUTE_US, Clock, Visit, time_of
from runners.embedded.clinic import EMERGENCY_ROWS, ROUTINE_ROWS, Clinic, Steps, Upload
from runners.embedded.ids import PER_SEED, Ids
from runners.embedded.knowledge import HOURS
from runners.embedded.staffing import staffing
from schemas.errors import CampusSyncError

ALARM_ROWS = 12  # Of the story that a critical value begins.
_POOL = 120  # Calm visits that are open at least, for the laboratory's machines.
_STORIES = 8  # Told at the same time.
_PATIENCE_S = 60.0  # How long a HIS waits for its database to come back.
CHUNK_ROWS = 20_000
_HOUR_US = 60 * MINUTE_US
_HISTORY_DAYS = 30

Row = dict[str, object]
Tables = dict[str, dict[tuple, Row]]
Told = collections.abc.Callable[[int], None]


class TrafficError(CampusSyncError):
    """A source cannot be written; the text names it and the remedy."""


class HeldClock:
    """The live clock, unless held at a time of the past."""

    def __init__(self, live: Clock):
        self._live = live
        self.held_us: int | None = None

    def __call__(self) -> int:
        return self._live() if self.held_us is None else self.held_us


class Uploaded(typing.NamedTuple):
    """A laboratory's upload that waits for its validation: its ids, and its rows."""

    first: int
    last: int
    rows: int


class CampusSource(abc.ABC):
    """Writes to one source; all content but the times comes from the seed.

    Run again with the same seed on the same database, it goes on behind the last id. A
    connection that breaks is made again, for a minute, and the transaction repeated: its
    ids make it happen once. For one thread at a time.

    A subclass knows one kind of database and its campus's tables. It sets what it needs to
    connect before it calls this class's `__init__`, which asks the database for ids.

    Args:
      name, mapping: of campuses.yaml.
      seed: 0 .. 999,999.
      clock: microseconds since 1970; the times in rows come from it.

    Attributes:
      rows, transactions, rolled_back: committed by this object, or given up.

    Raises:
      TrafficError: the database is not there or is not a hospital's.
    """

    lost: typing.ClassVar[tuple[type[Exception], ...]]  # Raised where a connection broke.
    twice: typing.ClassVar[type[Exception]]  # Raised where a key is there already.
    error: typing.ClassVar[type[Exception]]  # The base of all that the database says.
    script: typing.ClassVar[str]  # Which file has the campus's tables.
    patients: typing.ClassVar[str]  # The table of those who may come again.

    def __init__(self, name: str, mapping: str, seed: int, clock: Clock):
        self.name = name
        self.rows = self.transactions = self.rolled_back = 0
        self._clock = HeldClock(clock)
        self._connection: typing.Any = None
        habits = campus(name, mapping)
        used = self._used(Ids(seed, habits))
        self._ids = Ids(seed, habits, used)
        # What exists already is part of the seed: a second run brings other people.
        self._rng = np.random.default_rng([seed, habits.digest, used])
        self._clinic = Clinic(habits, self._rng, self._ids, self._clock, allergies=True)
        self._stories: list[Steps] = []
        self._planned = self._planned_emergency = 0
        self._unvalidated: Uploaded | None = None

    def close(self) -> None:
        """Closes the connection; the next use opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def perform(self, step: Step) -> int:
        """Runs a transaction; returns the row changes that others see of it."""
        work, rows = self._transaction(step)
        self._durably(work)
        self.rolled_back += step.rolled_back
        return self._committed(rows)

    def story_step(self, emergency_share: float) -> int:
        """Runs the next transaction of one of the stories, which begin as others end.

        Args:
          emergency_share: of all row changes, the laboratory's uploads included.
        """
        while True:
            while len(self._stories) < _STORIES:
                if self._planned_emergency < emergency_share * (self._planned + EMERGENCY_ROWS):
                    self._stories.append(self._clinic.emergency())
                    self._plan(EMERGENCY_ROWS, emergency=True)
                else:
                    self._stories.append(self._clinic.routine())
                    self._plan(ROUTINE_ROWS)
            place = int(self._rng.integers(len(self._stories)))
            step = next(self._stories[place], None)
            if step is not None:
                return self.perform(step)
            del self._stories[place]

    def finish_stories(self) -> int:
        """Runs every open story to its end, sign-off included; returns the row changes."""
        rows = 0
        while self._stories:
            for step in self._stories.pop(0):
                rows += self.perform(step)
        return rows

    def bulk(self, count: int) -> int:
        """Runs a transaction of the laboratory; returns its row changes.

        It is an upload of `count` results, or, every other time, the validation of the last
        upload. Visits are opened before where there are too few for so many specimens.
        """
        if self._unvalidated is not None:
            uploaded, self._unvalidated = self._unvalidated, None
            self._durably(lambda connection: self._validate(connection, uploaded))
            return self._committed(uploaded.rows)
        opened = self._open_visits()
        first, lines, alarm = self._upload(count, "preliminary")
        self._durably(lambda connection: self._insert(connection, [lines]))
        if alarm is not None:
            self._stories.append(alarm)
        self._unvalidated = Uploaded(first, first + count - 1, len(lines))
        self._plan(2 * count)
        return opened + self._committed(len(lines))

    def upload_size(self, low: int, high: int) -> int:
        """Returns the size of a next upload, `low` to `high`."""
        return int(self._rng.integers(low, high + 1))

    def bulk_transaction(self, rows: int, progress: Told) -> None:
        """Inserts `rows` results in one transaction; not repeated if the connection breaks.

        Raises:
          the database's own error: nothing of it was committed, or all.
        """
        self._open_visits()
        written = 0

        def chunks() -> collections.abc.Iterator[list]:
            nonlocal written
            for count in _chunks(rows, CHUNK_ROWS):
                lines = self._upload(count, "final", calm=True)[1]
                yield lines
                written += len(lines)
                progress(count)

        self._insert(self._connected(), chunks())
        self._sent()
        self._committed(written)

    def backlog(self, rows: int, tx_rows: int, progress: Told) -> None:
        """Inserts `rows` results in transactions of `tx_rows`, as fast as it goes."""
        self._open_visits()
        lines: list = []
        for count in _chunks(rows, tx_rows):
            while len(lines) < count:
                lines += self._upload(max(CHUNK_ROWS, count), "final", calm=True)[1]
            part, lines = lines[:count], lines[count:]
            self._insert(self._connected(), [part])
            self._committed(count)
            progress(count)
        self._sent()

    def preload(self, patients: int, progress: Told) -> int:
        """Writes the last month of `patients` patients, finished visits, and opens today's.

        Returns the rows. The rows are there as they ended: not how they came about.
        """
        tables: Tables = {}
        rows, begun = self._staff(), 0
        while begun < patients:
            emergency = self._rng.random() < 0.08
            story = self._clinic.emergency() if emergency else self._clinic.routine()
            self._clock.held_us = self._some_morning()
            for step in story:
                begun += any(c.op == "insert" and c.table == "his.patient" for c in step.changes)
                self._apply(tables, step)
                self._clock.held_us += int(self._rng.integers(1, 15)) * MINUTE_US
            if sum(map(len, tables.values())) >= CHUNK_ROWS:
                # Patients may still come again: all else is finished.
                kept = tables.pop(self.patients, {})
                rows += self._store_all(tables, progress)
                tables = {self.patients: kept}
        rows += self._store_all(tables, progress)
        self._clock.held_us = None
        return rows + self._open_visits()

    def wrong(self) -> dict[str, int]:
        """Writes rows that the database accepts and the sync must refuse, each in its own
        transaction. Returns how many, by what is wrong with them."""
        self._open_visits()
        rows = self._wrong(self._clinic.open_visits[0], self._ids.take)
        for table, values in rows.values():
            self._durably(self._one_row(table, values))
            self._committed(1)
        return dict.fromkeys(rows, 1)

    # What a kind of database and its campus's tables decide.

    @abc.abstractmethod
    def _connect(self) -> typing.Any:
        """Returns a new connection in autocommit."""

    @abc.abstractmethod
    def _transaction(self, step: Step) -> tuple[collections.abc.Callable, int]:
        """Returns what runs a transaction on a connection, and its row changes."""

    @abc.abstractmethod
    def _lines(self, upload: Upload, first: int, status: str) -> list:
        """Returns an upload, whose ids begin with `first`, as rows to be inserted."""

    @abc.abstractmethod
    def _insert(self, connection: typing.Any, chunks: collections.abc.Iterable[list]) -> None:
        """Inserts rows of `_lines` in one transaction."""

    @abc.abstractmethod
    def _validate(self, connection: typing.Any, uploaded: Uploaded) -> None:
        """Makes an upload's preliminary results final, in one transaction."""

    @abc.abstractmethod
    def _apply(self, tables: Tables, step: Step) -> None:
        """Does to rows in memory, by table and key, what a transaction does to the database."""

    @abc.abstractmethod
    def _store(self, connection: typing.Any, table: str, rows: list[Row]) -> None:
        """Inserts whole rows, all of the same columns, in one transaction."""

    @abc.abstractmethod
    def _wrong(
        self, visit: Visit, number: collections.abc.Callable[[], int]
    ) -> dict[str, tuple[str, Row]]:
        """Returns rows that must be refused, as table and columns, by what is wrong.

        Args:
          visit: an open one. number: takes a new id.
        """

    @abc.abstractmethod
    def _one_row(self, table: str, values: Row) -> collections.abc.Callable:
        """Returns what inserts a row on a connection."""

    @abc.abstractmethod
    def _last_ids(self, ids: Ids, last: int) -> collections.abc.Iterator[str | int]:
        """Yields the greatest id of this seed (`ids.first` to `last`) in each of the tables."""

    @abc.abstractmethod
    def _staffed(self) -> bool:
        """Whether departments and people are there already."""

    def _sent(self) -> int:
        """Called behind each commit: sends the log on where that is not the database's own work.

        Returns the changes that were sent.
        """
        return 0

    # Below: plumbing.

    def _plan(self, rows: int, emergency: bool = False) -> None:
        self._planned += rows
        self._planned_emergency += rows if emergency else 0

    def _committed(self, rows: int) -> int:
        self.rows += rows
        self.transactions += rows > 0
        return rows

    def _open_visits(self) -> int:
        missing = _POOL - len(self._clinic.open_visits)
        if missing <= _POOL // 2:
            return 0
        return self.perform(self._clinic.registrations(missing))

    def _upload(
        self, count: int, status: str, calm: bool = False
    ) -> tuple[int, list, Steps | None]:
        """Returns the first id of `count` results, their rows, and the story of the one that is
        critical."""
        upload = self._clinic.upload(count, calm)
        first = self._ids.take(count)
        lines = self._lines(upload, first, status)
        if upload.alarmed is None:
            return first, lines, None
        self._plan(ALARM_ROWS, emergency=True)
        return first, lines, self._clinic.alarm(upload.alarmed)

    def _staff(self) -> int:
        """Writes who works here, unless a run before this one has; returns the rows."""
        if self._staffed():
            return 0
        return sum(map(self.perform, staffing(time_of(self._clock()))))

    def _some_morning(self) -> int:
        """A time in the last month, hours as the laboratory is busy, twelve hours ago at least."""
        self._clock.held_us = None
        shares = np.array(HOURS) / sum(HOURS)
        day = int(self._rng.integers(1, _HISTORY_DAYS + 1))
        local = int(self._rng.choice(24, p=shares)) * 60 + int(self._rng.integers(60))
        today = (self._clock() + 8 * _HOUR_US) // (24 * _HOUR_US) * (24 * _HOUR_US) - 8 * _HOUR_US
        past = today - day * 24 * _HOUR_US + local * MINUTE_US
        return min(past, self._clock() - 12 * _HOUR_US)

    def _store_all(self, tables: Tables, progress: Told) -> int:
        rows = 0
        for table, some in tables.items():
            if some:
                self._store(self._connected(), table, list(some.values()))
                rows += self._committed(len(some))
                progress(len(some))
        return rows

    def _durably(self, action: collections.abc.Callable[[typing.Any], object]) -> None:
        """Does it, again after a broken connection; keys make a repetition show itself."""
        until, again = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                action(self._connected())
                break
            except self.twice:
                if not again:
                    raise
                self._connected().rollback()  # It had been committed when the answer was lost.
                break
            except self.lost as error:
                self.close()
                if time.monotonic() > until:
                    raise TrafficError(
                        f"source {self.name}: its database has been away for {_PATIENCE_S:.0f} s "
                        f"({type(error).__name__}). Remedy: start it; see `world status`."
                    ) from error
                again = True
                time.sleep(0.1)
        self._sent()

    def _connected(self) -> typing.Any:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _used(self, ids: Ids) -> int:
        """How many of the seed's ids exist already, counted by the last one."""
        found = [ids.first - 1]
        try:
            found += map(ids.number, map(str, self._last_ids(ids, ids.first + PER_SEED - 1)))
        except self.error as error:
            raise TrafficError(
                f"source {self.name}: cannot be written ({type(error).__name__}). Remedy: "
                f"start it, and check that it has the tables of {self.script} and that the "
                "traffic's role may write them."
            ) from error
        return max(found) + 1 - ids.first


def result_rows(
    upload: Upload, uuids: collections.abc.Iterable[str], status: str, now_us: int
) -> collections.abc.Iterator[Row]:
    """Yields an upload as rows of `lis.result`; eight racks of specimens, drawn at intervals."""
    now = time_of(now_us)
    racks = [time_of(now_us - (30 + 7 * rack) * MINUTE_US) for rack in range(8)]
    parts = zip(uuids, upload.results.rows(), upload.whose, strict=True)
    for i, (uuid, result, whose) in enumerate(parts):
        visit = upload.visits[whose]
        times = {"collected_at": racks[i & 7], "result_at": now, "updated_at": now}
        head = {"result_id": uuid, "mrn": visit.mrn, "visit_no": visit.visit_no}
        yield {**head, **result, "status": status, **times}


def _chunks(total: int, size: int) -> collections.abc.Iterator[int]:
    for done in range(0, total, size):
        yield min(size, total - done)
