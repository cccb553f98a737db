"""Campus C: an Oracle's tables, kept in a PostgreSQL and told to Kafka as its redo log would be."""

import collections.abc
import time

import psycopg

from runners.embedded.campus_c import SCHEMA, OracleDialect
from runners.embedded.campus_source import Row, Told, TrafficError, Uploaded
from runners.embedded.charts import Clock, Visit, time_of
from runners.embedded.connector import Connector, ConnectorError
from runners.embedded.dialect import RowChange, plain
from runners.embedded.dialect_campus import DialectCampus, by_table
from runners.embedded.ids import Ids
from runners.embedded.postgresql_campus import connect, copy_rows, last_key, writers_dsn
from transforms.capture.debezium.topic import place_of

_PATIENCE_S = 60.0
_NUMBER, _VISIT, _LINE, _REPORT = ("{}",), ("V{:017d}", "T{:017d}"), ("R{:017d}",), ("T{}",)
_IDS = (
    *(("PAT_VISIT", "VISIT_NO", _VISIT), ("ORDERS", "ORDER_NO", _NUMBER)),
    *(("VITAL_SIGNS_REC", "REC_NO", _NUMBER), ("DIAGNOSIS", "DIAGNOSIS_NO", _NUMBER)),
    *(("DRUG_PRESC_DETAIL", "PRESC_NO", _LINE), ("LAB_TEST_MASTER", "TEST_NO", _REPORT)),
    *(("MR_FILE_INDEX", "FILE_NO", _NUMBER), ("CONSULT_APPLY", "APPLY_NO", _NUMBER)),
    ("PAT_ALERGY", "ALERGY_NO", _NUMBER),
)


class OracleCampus(DialectCampus):
    """`CampusSource` of campus C: writes its tables, and sends each commit to its topic.

    Args:
      name, dsn, mapping: of campuses.yaml; `dsn` is the topic's. seed, clock: see `CampusSource`.
      content: connection string of the database that holds the tables.
      writer: role that owns them.
    """

    lost = (psycopg.OperationalError,)
    twice = psycopg.errors.UniqueViolation
    error = psycopg.Error
    script = "campus_c.sql"
    patients = "PAT_MASTER_INDEX"

    def __init__(
        self, name: str, dsn: str, content: str, mapping: str, seed: int, clock: Clock, writer: str
    ):
        self._dsn = writers_dsn(content, writer)
        self._connector = Connector(self._dsn, *place_of(dsn))
        self._loading = False
        super().__init__(name, mapping, seed, clock, OracleDialect())

    def close(self) -> None:
        super().close()
        self._connector.close()

    def preload(self, patients: int, progress: Told) -> int:
        """Writes history as `CampusSource.preload`; the connector's snapshot follows, once."""
        self._loading = True
        try:
            rows = super().preload(patients, progress)
        finally:
            self._loading = False
        self._sent()
        return rows

    def _sent(self) -> int:
        """Sends what is committed, again for a minute where the broker is away."""
        until = time.monotonic() + _PATIENCE_S
        while not self._loading:
            try:
                return self._connector.send()
            except (ConnectorError, psycopg.OperationalError) as error:
                if time.monotonic() > until:
                    raise TrafficError(f"source {self.name}: {error}") from error
                time.sleep(0.2)
        return 0

    def _connect(self) -> psycopg.Connection:
        return connect(self._dsn)

    def _insert(
        self, connection: psycopg.Connection, chunks: collections.abc.Iterable[list[RowChange]]
    ) -> None:
        with connection.transaction():
            for lines in chunks:
                for table, rows in by_table(lines):
                    copy_rows(connection, f"{SCHEMA}.{table}", rows)

    def _validate(self, connection: psycopg.Connection, uploaded: Uploaded) -> None:
        now = plain(time_of(self._clock()))
        ends = [f"T{uploaded.first}", f"T{uploaded.last}"]
        with connection.transaction():
            for table in ("LAB_TEST_MASTER", "LAB_RESULT"):
                connection.execute(
                    f'UPDATE "{SCHEMA}"."{table}" SET "RESULT_STATUS" = %s,'
                    ' "UPDATE_DATE_TIME" = %s WHERE "TEST_NO" BETWEEN %s AND %s'
                    """ AND "RESULT_STATUS" = '3'""",
                    ["4", now, *ends],
                )

    def _store(self, connection: psycopg.Connection, table: str, rows: list[Row]) -> None:
        copy_rows(connection, f"{SCHEMA}.{table}", rows)

    def _wrong(
        self, visit: Visit, number: collections.abc.Callable[[], int]
    ) -> dict[str, tuple[str, Row]]:
        now = plain(time_of(self._clock()))
        whose = {"PATIENT_ID": visit.mrn, "VISIT_ID": self._dialect.number_of(visit.visit_no)}
        visit_no = f"V{number():017d}"
        return {
            "spo2_above_100": (
                "VITAL_SIGNS_REC",
                {"REC_NO": number(), **whose, "SPO2": 250, "TIME_POINT": now},
            ),
            "triage_level_9": (
                "PAT_VISIT",
                {
                    "PATIENT_ID": visit.mrn,
                    "VISIT_ID": 99,
                    "VISIT_NO": visit_no,
                    "VISIT_TYPE": "O",
                    "TRIAGE_LEVEL": 9,
                    "UPDATE_DATE_TIME": now,
                },
            ),
        }

    def _last_ids(self, ids: Ids, last: int) -> collections.abc.Iterator[str]:
        for table, column, forms in _IDS:
            for form in forms:
                ends = [form.format(number) for number in (ids.first, last)]
                yield from last_key(self._connected(), f"{SCHEMA}.{table}", column, ends)

    def _staffed(self) -> bool:
        query = f'SELECT FROM "{SCHEMA}"."DEPT_DICT" LIMIT 1'
        return self._connected().execute(query).fetchone() is not None

    def _connected(self) -> psycopg.Connection:
        if self._connection is not None and self._connection.closed:
            self._connection = None
        return super()._connected()
