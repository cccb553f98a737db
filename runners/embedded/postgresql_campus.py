"""The main campus's kind of database: PostgreSQL with the tables of hospital.sql."""

import collections.abc

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runners.embedded.campus_source import CampusSource, Row, Tables, Told, Uploaded
from runners.embedded.changes import KEYS, Step, apply, insert, perform
from runners.embedded.charts import MINUTE_US, Clock, Visit, time_of
from runners.embedded.clinic import Upload
from runners.embedded.ids import Ids

_RESULTS = (
    "result_id, mrn, visit_no, loinc, item_name, val_num, val_txt, unit, ref_low, ref_high,"
    " abn_flag, critical, status, collected_at, result_at, updated_at"
)
_COPY_RESULTS = f"COPY lis.result ({_RESULTS}) FROM STDIN"
_NULL = "\\N"  # As COPY writes it.
# Keys that hold a number within a text, by how they are written.
_KEY_FORMS = {"his.visit": ("V{:017d}", "T{:017d}"), "his.prescription": ("R{:017d}",)}


class PostgresqlCampus(CampusSource):
    """`CampusSource` of a PostgreSQL.

    Args:
      name, dsn, mapping: of campuses.yaml. seed, clock: see `CampusSource`.
      writer: role that may write the tables.
    """

    lost = (psycopg.OperationalError,)
    twice = psycopg.errors.UniqueViolation
    error = psycopg.Error
    script = "hospital.sql"
    patients = "his.patient"

    def __init__(self, name: str, dsn: str, mapping: str, seed: int, clock: Clock, writer: str):
        self._dsn = writers_dsn(dsn, writer)
        super().__init__(name, mapping, seed, clock)

    def backlog(self, rows: int, tx_rows: int, progress: Told) -> None:
        """Inserts `rows` results in transactions of `tx_rows`, without waiting for the disk."""
        self._connected().execute("SET synchronous_commit = off")
        super().backlog(rows, tx_rows, progress)
        self._connected().execute("RESET synchronous_commit")

    def _connect(self) -> psycopg.Connection:
        return connect(self._dsn)

    def _transaction(self, step: Step) -> tuple[collections.abc.Callable, int]:
        return lambda connection: perform(connection, step), step.rows

    def _lines(self, upload: Upload, first: int, status: str) -> list[str]:
        """Returns the results as lines of COPY."""
        results, now = upload.results, self._clock()
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
        return [
            f"{uuid(first + i)}\t{whose[who]}\t{code}\t{name}\t{value or _NULL}\t{text or _NULL}"
            f"\t{unit or _NULL}\t{low or _NULL}\t{high or _NULL}\t{flag or _NULL}\t{critical}"
            f"\t{ends[i & 7]}\n"
            for i, (code, name, value, text, unit, low, high, flag, critical, who) in enumerate(
                columns
            )
        ]

    def _insert(
        self, connection: psycopg.Connection, chunks: collections.abc.Iterable[list[str]]
    ) -> None:
        with connection.cursor() as cursor, cursor.copy(_COPY_RESULTS) as copy:
            for lines in chunks:
                copy.write("".join(lines))

    def _validate(self, connection: psycopg.Connection, uploaded: Uploaded) -> None:
        statement = (
            "UPDATE lis.result SET status = 'final', updated_at = %s"
            " WHERE result_id BETWEEN %s::uuid AND %s::uuid AND status = 'preliminary'"
        )
        ends = map(self._ids.uuid, (uploaded.first, uploaded.last))
        connection.execute(statement, [time_of(self._clock()), *ends])

    def _apply(self, tables: Tables, step: Step) -> None:
        apply(tables, step)

    def _store(self, connection: psycopg.Connection, table: str, rows: list[Row]) -> None:
        copy_rows(connection, table, rows)

    def _wrong(
        self, visit: Visit, number: collections.abc.Callable[[], int]
    ) -> dict[str, tuple[str, Row]]:
        head = {"mrn": visit.mrn, "visit_no": visit.visit_no}
        now = {"updated_at": time_of(self._clock())}
        visit_no, uuid = f"V{number():017d}", self._ids.uuid(number())
        born = {"birth_date": "294000-01-01"}
        return {
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
                {"pid": number(), "mrn": f"X{number()}", **born, **now},
            ),
        }

    def _one_row(self, table: str, values: Row) -> collections.abc.Callable:
        return lambda connection: perform(connection, Step((insert(table, values),)))

    def _last_ids(self, ids: Ids, last: int) -> collections.abc.Iterator[str]:
        for table, (key, *_) in KEYS.items():
            for form in _KEY_FORMS.get(table, ("{}",)):
                ends = [form.format(number) for number in (ids.first, last)]
                if table == "lis.result":
                    ends = [ids.uuid(number) for number in (ids.first, last)]
                yield from last_key(self._connected(), table, key, ends)

    def _staffed(self) -> bool:
        query = "SELECT FROM his.department LIMIT 1"
        return self._connected().execute(query).fetchone() is not None

    def _connected(self) -> psycopg.Connection:
        if self._connection is not None and self._connection.closed:
            self._connection = None
        return super()._connected()


def writers_dsn(dsn: str, writer: str) -> str:
    """Returns a connection string with the role that writes in it."""
    return make_conninfo(dsn, user=writer, application_name="campus-sync-traffic")


def connect(dsn: str) -> psycopg.Connection:
    """Returns a new connection in autocommit, for hundreds of different statements."""
    connection = psycopg.connect(dsn, autocommit=True, connect_timeout=10)
    # Which NULLs a row has makes another statement of it: there are hundreds.
    connection.prepared_max = None
    return connection


def copy_rows(connection: psycopg.Connection, table: str, rows: list[Row]) -> None:
    """Inserts whole rows of `schema.table`, all of the same columns."""
    names = tuple(rows[0])
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(*table.split(".")), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row([row[name] for name in names])


def last_key(
    connection: psycopg.Connection, table: str, key: str, ends: list
) -> collections.abc.Iterator[str]:
    """Yields the greatest key between two, as text, if there is one."""
    query = sql.SQL(
        "SELECT {k}::text FROM {t} WHERE {k} BETWEEN %s AND %s ORDER BY {k} DESC LIMIT 1"
    ).format(k=sql.Identifier(key), t=sql.Identifier(*table.split(".")))
    row = connection.execute(query, ends).fetchone()
    if row is not None:
        yield row[0]
