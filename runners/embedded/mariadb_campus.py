"""The GBK campus's kind of database: MariaDB with the tables of campus_b.sql."""

import collections.abc

import pymysql

from runners.embedded.campus_b import DATABASE, MariaDbDialect
from runners.embedded.campus_source import Row, Uploaded
from runners.embedded.charts import Clock, Visit, time_of
from runners.embedded.dialect import RowChange, plain
from runners.embedded.dialect_campus import DialectCampus, by_table
from runners.embedded.ids import Ids
from transforms.capture.mariadb.dsn import parse_dsn

# Where ids are, and how their numbers are written.
_NUMBER, _VISIT, _LINE = ("{}",), ("V{:017d}", "T{:017d}"), ("R{:017d}",)
_IDS = (
    *(("MS_BRDA", "BRID", _NUMBER), ("MS_GHMX", "JZHM", _VISIT), ("ZY_BRRY", "ZYHM", _VISIT)),
    *(("MS_GHMX", "SBXH", _NUMBER), ("ZY_BRRY", "ZYH", _NUMBER), ("YS_YZ", "YZXH", _NUMBER)),
    *(("HL_SMTZ", "CJXH", _NUMBER), ("MS_BRZD", "JLXH", _NUMBER), ("MS_CFMX", "CFHM", _LINE)),
    *(("JYJG", "JYXH", _NUMBER), ("BL_WS", "WSXH", _NUMBER), ("GY_GMJL", "JLXH", _NUMBER)),
    *(("YS_ZY_HZSQ", "SQXH", _NUMBER), ("YS_MZ_HZSQ", "SQXH", _NUMBER)),
)


class MariadbCampus(DialectCampus):
    """`CampusSource` of campus B: its programs speak GBK to its server.

    Args:
      name, dsn, mapping: of campuses.yaml. seed, clock: see `CampusSource`.
      writer: account that may write the tables.
    """

    lost = (pymysql.err.OperationalError, pymysql.err.InterfaceError)
    twice = pymysql.err.IntegrityError
    error = pymysql.err.Error
    script = "campus_b.sql"
    patients = "MS_BRDA"

    def __init__(self, name: str, dsn: str, mapping: str, seed: int, clock: Clock, writer: str):
        self._server, self._writer = parse_dsn(dsn), writer
        super().__init__(name, mapping, seed, clock, MariaDbDialect())

    def _connect(self) -> pymysql.Connection:
        return pymysql.connect(
            host=self._server.host,
            port=self._server.port,
            user=self._writer,
            database=DATABASE,
            charset="gbk",
            autocommit=True,
            connect_timeout=10,
            ssl_disabled=True,
        )

    def _insert(
        self, connection: pymysql.Connection, chunks: collections.abc.Iterable[list[RowChange]]
    ) -> None:
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            for lines in chunks:
                for table, rows in by_table(lines):
                    self._put(cursor, table, rows)
            cursor.execute("COMMIT")

    def _validate(self, connection: pymysql.Connection, uploaded: Uploaded) -> None:
        statement = (
            f"UPDATE {DATABASE}.JYJG SET JGZT = 1, XGSJ = %s WHERE JYXH BETWEEN %s AND %s"
            " AND JGZT = 0"
        )
        with connection.cursor() as cursor:
            now = plain(time_of(self._clock()))
            cursor.execute(statement, (now, uploaded.first, uploaded.last))

    def _store(self, connection: pymysql.Connection, table: str, rows: list[Row]) -> None:
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            self._put(cursor, table, rows)
            cursor.execute("COMMIT")

    def _put(self, cursor: pymysql.cursors.Cursor, table: str, rows: list[Row]) -> None:
        statement, _ = self._dialect.statement(RowChange("insert", table, None, rows[0], ()))
        cursor.executemany(statement, [tuple(row.values()) for row in rows])

    def _wrong(
        self, visit: Visit, number: collections.abc.Callable[[], int]
    ) -> dict[str, tuple[str, Row]]:
        now = time_of(self._clock())
        whose = {"BRID": visit.patient["pid"], "JZHM": visit.visit_no}
        number_of_visit = number()
        taken = plain(now).replace("-", "").replace(" ", "").replace(":", "")
        return {
            "spo2_above_100": (
                "HL_SMTZ",
                {"CJXH": number(), **whose, "XYBH": "250", "CLSJ": taken},
            ),
            "triage_level_9": (
                "MS_GHMX",
                {
                    "SBXH": number_of_visit,
                    "BRID": visit.patient["pid"],
                    "GHLB": 1,
                    "JZHM": f"V{number_of_visit:017d}",
                    "YJFJ": 9,
                    "XGSJ": plain(now),
                },
            ),
        }

    def _last_ids(self, ids: Ids, last: int) -> collections.abc.Iterator[str | int]:
        with self._connected().cursor() as cursor:
            for table, column, forms in _IDS:
                for form in forms:
                    ends = [form.format(number) for number in (ids.first, last)]
                    ends = [int(end) if end.isdigit() else end for end in ends]
                    cursor.execute(
                        f"SELECT max({column}) FROM {DATABASE}.{table}"
                        f" WHERE {column} BETWEEN %s AND %s",
                        ends,
                    )
                    (found,) = cursor.fetchone()
                    if found is not None:
                        yield found

    def _staffed(self) -> bool:
        with self._connected().cursor() as cursor:
            return cursor.execute(f"SELECT KSDM FROM {DATABASE}.GY_KSDM LIMIT 1") > 0

    def _connected(self) -> pymysql.Connection:
        if self._connection is not None and not self._connection.open:
            self._connection = None
        return super()._connected()
