"""One campus's database as its own programs write it: connection, ids and open stories."""

import collections.abc
import time

import numpy as np
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runners.embedded.campus import campus
from runners.embedded.changes import KEYS, Step, apply, insert, perform
from runners.embedded.charts import MINUTE_US, Clock, time_of
from runners.embedded.clinic import EMERGENCY_ROWS, ROUTINE_ROWS, Clinic, Steps
from runners.embedded.ids import PER_SEED, Ids
from runners.embedded.knowledge import HOURS
from runners.embedded.staffing import staffing
from schemas.errors import CampusSyncError

ALARM_ROWS = 12  # Of the story that a critical value begins.
_POOL = 120  # Calm visits that are open at least, for the laboratory's machines.
_STORIES = 8  # Told at the same time.
_PATIENCE_S = 60.0  # How long a HIS waits for its database to come back.
_CHUNK_ROWS = 20_000
_HOUR_US = 60 * MINUTE_US
_HISTORY_DAYS = 30
_RESULTS = (
    "result_id, mrn, visit_no, loinc, item_name, val_num, val_txt, unit, ref_low, ref_high,"
    " abn_flag, critical, status, collected_at, result_at, updated_at"
)


_COPY_RESULTS = f"COPY lis.result ({_RESULTS}) FROM STDIN"
_NULL = "\\N"  # As COPY writes it.
# Keys that hold a number within a text, by how they are written.
_KEY_FORMS = {"his.visit": ("V{:017d}", "T{:017d}"), "his.prescription": ("R{:017d}",)}


class TrafficError(CampusSyncError):
    """A source cannot be written; the text names it and the remedy."""


class HeldClock:
    """The live clock, unless held at a time of the past."""

    def __init__(self, live: Clock):
        self._live = live
        self.held_us: int | None = None

    def __call__(self) -> int:
        return self._live() if self.held_us is None else self.held_us


class CampusSource:
    """Writes to one source; all content but the times comes from the seed.

    Run again with the same seed on the same database, it goes on behind the last id. A
    connection that breaks is made again, for a minute, and the transaction repeated: its
    ids make it happen once. For one thread at a time.

    Args:
      name, dsn, mapping: of campuses.yaml.
      seed: 0 .. 999,999.
      clock: microseconds since 1970; the times in rows come from it.
      writer: role that may write the tables.

    Attributes:
      rows, transactions, rolled_back: committed by this object, or given up.

    Raises:
      TrafficError: the database is not there or is not a hospital's.
    """

    def __init__(self, name: str, dsn: str, mapping: str, seed: int, clock: Clock, writer: str):
        self.name = name
        self.rows = self.transactions = self.rolled_back = 0
        self._clock = HeldClock(clock)
        self._dsn = make_conninfo(dsn, user=writer, application_name="campus-sync-traffic")
        self._connection: psycopg.Connection | None = None
        habits = campus(name, mapping)
        used = self._used(Ids(seed, habits))
        self._ids = Ids(seed, habits, used)
        # What exists already is part of the seed: a second run brings other people.
        self._rng = np.random.default_rng([seed, habits.digest, used])
        self._clinic = Clinic(habits, self._rng, self._ids, self._clock, allergies=True)
        self._stories: list[Steps] = []
        self._planned = self._planned_emergency = 0
        self._unvalidated: tuple[str, str, int] | None = None

    def close(self) -> None:
        """Closes the connection; the next use opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def perform(self, step: Step) -> int:
        """Runs a transaction; returns the row changes that others see of it."""
        self._durably(lambda connection: perform(connection, step))
        self.rolled_back += step.rolled_back
        return self._committed(step.rows)

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
            (first, last, rows), self._unvalidated = self._unvalidated, None
            now = time_of(self._clock())
            statement = (
                "UPDATE lis.result SET status = 'final', updated_at = %s"
                " WHERE result_id BETWEEN %s::uuid AND %s::uuid AND status = 'preliminary'"
            )
            self._durably(lambda connection: connection.execute(statement, [now, first, last]))
            return self._committed(rows)
        opened = self._open_visits()
        lines, alarm = self._upload(count, "preliminary")
        self._durably(lambda connection: _copy(connection, lines))
        if alarm is not None:
            self._stories.append(alarm)
        self._unvalidated = (lines[0].split("\t")[0], lines[-1].split("\t")[0], count)
        self._plan(2 * count)
        return opened + self._committed(count)

    def upload_size(self, low: int, high: int) -> int:
        """Returns the size of a next upload, `low` to `high`."""
        return int(self._rng.integers(low, high + 1))

    def bulk_transaction(self, rows: int, progress: collections.abc.Callable[[int], None]) -> None:
        """Inserts `rows` results in one transaction; not repeated if the connection breaks."""
        self._open_visits()
        with self._connected().cursor() as cursor, cursor.copy(_COPY_RESULTS) as copy:
            for count in _chunks(rows, _CHUNK_ROWS):
                copy.write("".join(self._upload(count, "final", calm=True)[0]))
                progress(count)
        self._committed(rows)

    def backlog(
        self, rows: int, tx_rows: int, progress: collections.abc.Callable[[int], None]
    ) -> None:
        """Inserts `rows` results in transactions of `tx_rows`, as fast as it goes."""
        self._open_visits()
        self._connected().execute("SET synchronous_commit = off")
        lines: list[str] = []
        for count in _chunks(rows, tx_rows):
            while len(lines) < count:
                lines += self._upload(max(_CHUNK_ROWS, count), "final", calm=True)[0]
            part, lines = lines[:count], lines[count:]
            _copy(self._connected(), part)
            self._committed(count)
            progress(count)
        self._connected().execute("RESET synchronous_commit")

    def preload(self, patients: int, progress: collections.abc.Callable[[int], None]) -> int:
        """Writes the last month of `patients` patients, finished visits, and opens today's.

        Returns the rows. The rows are there as they ended: not how they came about.
        """
        tables: dict[str, dict[tuple, dict]] = {}
        rows, begun = self._staff(), 0
        while begun < patients:
            emergency = self._rng.random() < 0.08
            story = self._clinic.emergency() if emergency else self._clinic.routine()
            self._clock.held_us = self._some_morning()
            for step in story:
                begun += any(c.op == "insert" and c.table == "his.patient" for c in step.changes)
                apply(tables, step)
                self._clock.held_us += int(self._rng.integers(1, 15)) * MINUTE_US
            if sum(map(len, tables.values())) >= _CHUNK_ROWS:
                # Patients may still come again: all else is finished.
                kept = tables.pop("his.patient", {})
                rows += self._store(tables, progress)
                tables = {"his.patient": kept}
        rows += self._store(tables, progress)
        self._clock.held_us = None
        return rows + self._open_visits()

    def wrong(self) -> dict[str, int]:
        """Writes rows that the database accepts and the sync must refuse, each in its own
        transaction. Returns how many, by what is wrong with them."""
        self._open_visits()
        visit = self._clinic.open_visits[0]
        head = {"mrn": visit.mrn, "visit_no": visit.visit_no}
        now = {"updated_at": time_of(self._clock())}
        number = self._ids.take
        visit_no, uuid = f"V{number():017d}", self._ids.uuid(number())
        rows = {
            "spo2_above_100": ("his.vital_sign", {"vital_id": number(), **head, "spo2": 250}),
            "triage_level_9": (
                "his.visit",
                {"visit_no": visit_no, "mrn": visit.mrn, "triage_level": 9, **now},
            ),
            "value_nan": (
                "lis.result",
                {"result_id": uuid, **head, "loinc": "2823-3", "val_num": "NaN", **now},
            ),
            "time_infinite": (
                "his.diagnosis",
                {"diagnosis_id": number(), **head, "diagnosed_at": "infinity", **now},
            ),
            "date_year_294000": (
                "his.patient",
                {"pid": number(), "mrn": f"X{number()}", "birth_date": "294000-01-01", **now},
            ),
        }
        for table, values in rows.values():
            self.perform(Step((insert(table, values),)))
        return dict.fromkeys(rows, 1)

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
    ) -> tuple[list[str], Steps | None]:
        """Returns results as lines of COPY, and the story of the one that is critical."""
        upload = self._clinic.upload(count, calm)
        results, now = upload.results, self._clock()
        first = self._ids.take(count)
        whose = [f"{visit.mrn}\t{visit.visit_no}" for visit in upload.visits]
        ready = time_of(now).isoformat()
        # Eight racks of specimens, drawn at intervals.
        ends = [
            f"{status}\t{time_of(now - (30 + 7 * rack) * MINUTE_US).isoformat()}\t{ready}\t{ready}"
            for rack in range(8)
        ]
        uuid = self._ids.uuid
        columns = zip(
            *(results.code, results.name, results.value, results.text, results.unit),
            *(results.low, results.high, results.flag, results.critical, upload.whose),
            strict=True,
        )
        lines = [
            f"{uuid(first + i)}\t{whose[who]}\t{code}\t{name}\t{value or _NULL}\t{text or _NULL}"
            f"\t{unit or _NULL}\t{low or _NULL}\t{high or _NULL}\t{flag or _NULL}\t{critical}"
            f"\t{ends[i & 7]}\n"
            for i, (code, name, value, text, unit, low, high, flag, critical, who) in enumerate(
                columns
            )
        ]
        if upload.alarmed is None:
            return lines, None
        self._plan(ALARM_ROWS, emergency=True)
        return lines, self._clinic.alarm(upload.alarmed)

    def _staff(self) -> int:
        """Writes who works here, unless a run before this one has; returns the rows."""
        known = self._connected().execute("SELECT FROM his.department LIMIT 1").fetchone()
        if known is not None:
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

    def _store(
        self,
        tables: dict[str, dict[tuple, dict]],
        progress: collections.abc.Callable[[int], None],
    ) -> int:
        rows = 0
        for table, some in tables.items():
            if not some:
                continue
            names = tuple(next(iter(some.values())))
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
                sql.Identifier(*table.split(".")), sql.SQL(", ").join(map(sql.Identifier, names))
            )
            with self._connected().cursor() as cursor, cursor.copy(statement) as copy:
                for row in some.values():
                    copy.write_row([row[name] for name in names])
            rows += self._committed(len(some))
            progress(len(some))
        return rows

    def _durably(self, action: collections.abc.Callable[[psycopg.Connection], object]) -> None:
        """Does it, again after a broken connection; keys make a repetition show itself."""
        until, again = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                action(self._connected())
                return
            except psycopg.errors.UniqueViolation:
                if not again:
                    raise
                self._connected().rollback()  # It had been committed when the answer was lost.
                return
            except psycopg.OperationalError as error:
                self.close()
                if time.monotonic() > until:
                    raise TrafficError(
                        f"source {self.name}: its database has been away for {_PATIENCE_S:.0f} s "
                        f"({type(error).__name__}). Remedy: start it; see `world status`."
                    ) from error
                again = True
                time.sleep(0.1)

    def _connected(self) -> psycopg.Connection:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=10)
            # Which NULLs a row has makes another statement of it: there are hundreds.
            self._connection.prepared_max = None
        return self._connection

    def _used(self, ids: Ids) -> int:
        """How many of the seed's ids exist already, counted by the last one."""
        last = ids.first + PER_SEED - 1
        found = [ids.first - 1]
        try:
            for table, (key, *_) in KEYS.items():
                for form in _KEY_FORMS.get(table, ("{}",)):
                    ends = [form.format(number) for number in (ids.first, last)]
                    if table == "lis.result":
                        ends = [ids.uuid(number) for number in (ids.first, last)]
                    query = sql.SQL("SELECT {k}::text FROM {t} WHERE {k} BETWEEN %s AND %s").format(
                        k=sql.Identifier(key), t=sql.Identifier(*table.split("."))
                    ) + sql.SQL(" ORDER BY {} DESC LIMIT 1").format(sql.Identifier(key))
                    row = self._connected().execute(query, ends).fetchone()
                    if row is not None:
                        found.append(ids.number(row[0]))
        except psycopg.Error as error:
            raise TrafficError(
                f"source {self.name}: cannot be written ({type(error).__name__}). Remedy: "
                "start it, and check that it has the tables of hospital.sql and that the "
                "traffic's role may write them."
            ) from error
        return max(found) + 1 - ids.first


def _copy(connection: psycopg.Connection, lines: list[str]) -> None:
    with connection.cursor() as cursor, cursor.copy(_COPY_RESULTS) as copy:
        copy.write("".join(lines))


def _chunks(total: int, size: int) -> collections.abc.Iterator[int]:
    for done in range(0, total, size):
        yield min(size, total - done)
