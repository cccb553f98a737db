"""Capture from a real MariaDB: what is committed arrives once, in one form whatever way it came."""

import contextlib
import dataclasses
import pathlib
import time

import pymysql
import pytest

from schemas.batches import Op, RawChanges
from schemas.errors import SourceUnavailable
from schemas.positions import SEQ_END, Position
from tests.mariadb_types import CASES, NULL
from tests.raw_changes import rows_of, short
from transforms.capture.mariadb.dsn import parse_dsn
from transforms.capture.mariadb.errors import (
    LogPurged,
    LogSettingsWrong,
    LogUnusable,
    RightsMissing,
)
from transforms.capture.mariadb.places import border_at, describe
from transforms.capture.mariadb.snapshot import consistent_point, snapshot
from transforms.capture.mariadb.source import MariaDbSource
from transforms.capture.mariadb.state import state
from transforms.capture.mariadb.stream import BinlogStream
from transforms.capture.postgresql.snapshot import TableMissing
from transforms.capture.resume import SourceRewound

pytest_plugins = ["tests.fixtures_mariadb"]

DEADLINE_S = 90
NOTHING = Position(0, 0)
# DOMAIN 2.2's campus B, as a ten-year-old system has it.
CAMPUS_B = (
    "CREATE TABLE MS_BRDA(BRID INT PRIMARY KEY, MZHM VARCHAR(12), BRXM VARCHAR(20),"
    " BRXB VARCHAR(4), CSNY VARCHAR(10), SFZH VARCHAR(18), JTDH VARCHAR(30), GMS VARCHAR(200),"
    " XGSJ DATETIME)",
    "CREATE TABLE JYJG(JYXH BIGINT PRIMARY KEY, BRID INT, XMDM VARCHAR(10), XMMC VARCHAR(40),"
    " JG VARCHAR(40), DW VARCHAR(12), CKZ VARCHAR(40), TS VARCHAR(4), BGSJ CHAR(14), ZFPB TINYINT)",
    "CREATE TABLE YS_ZY_HZSQ(SQXH INT PRIMARY KEY, JZHM INT, SQSJ DATETIME, SQKS INT,"
    " SQYS VARCHAR(10), JJBZ TINYINT, HZMD TEXT)",
)


@dataclasses.dataclass
class Capture:
    """One source captured: snapshot first, then the log, joined by position."""

    dsn: str
    keys: dict[str, tuple[str, ...]]
    columns: dict[str, tuple[str, ...]] | None = None
    position: Position = NOTHING
    batch_rows: int = 1000
    batch_bytes: int = 1 << 20

    def start(self) -> list[RawChanges]:
        with consistent_point(self.dsn, self.position.lsn) as point:
            batches = list(
                snapshot(
                    point,
                    list(self.keys),
                    batch_rows=self.batch_rows,
                    batch_bytes=self.batch_bytes,
                    keys=self.keys,
                    columns=self.columns,
                )
            )
        self.position = Position(point.lsn, 0)
        self._join(batches)
        assert self.position == Position(point.lsn, SEQ_END)
        return batches

    def from_here(self) -> "Capture":
        """Begins at the log's end, with no snapshot."""
        self.position = Position(state(self.dsn).log_end_lsn, SEQ_END)
        return self

    def stream(self, **more) -> BinlogStream:
        arguments = {
            "reader_id": 4242,
            "batch_rows": self.batch_rows,
            "batch_bytes": self.batch_bytes,
            "keys": self.keys,
            "columns": self.columns,
            "heartbeat_s": 0.1,
        } | more
        return BinlogStream(self.dsn, self.position, **arguments)

    def drain(self, batches_max: int = 1 << 30) -> list[RawChanges]:
        """Reads on until what is logged now has come, or for so many batches."""
        end = state(self.dsn).log_end_lsn
        batches: list[RawChanges] = []
        deadline = time.monotonic() + DEADLINE_S
        with self.stream() as stream:
            while self.position.lsn < border_at(end) and len(batches) < batches_max:
                assert time.monotonic() < deadline, describe(self.position.lsn)
                found = stream.read(0.1)[: batches_max - len(batches)]
                self._join(found)
                batches += found
        return batches

    def _join(self, batches: list[RawChanges]) -> None:
        for batch in batches:
            assert batch.begin == self.position <= batch.end
            self.position = batch.end
            held = sum(table.num_rows for table in batch.tables.values())
            assert batch.captured == held + len(batch.rejects)
            for table in batch.tables.values():
                table.validate(full=True)


def replay(tables: dict[str, dict], batches: list[RawChanges], keys: dict) -> None:
    """Applies changes to `tables`, `{table: {key: row}}`, as a store would."""
    for row in rows_of(batches):
        name = row["table"]
        columns = [c for c in row if c != "table" and not c.startswith("_")]
        key = tuple(row[column] for column in keys[name])
        rows = tables.setdefault(name, {})
        if row["_op"] == Op.DELETE:
            rows.pop(key, None)
            continue
        old = rows.get(key, {})
        rows[key] = {
            column: old.get(column) if row["_unchanged"] >> i & 1 else row[column]
            for i, column in enumerate(columns)
        }


@contextlib.contextmanager
def session(dsn: str, **more):
    server = parse_dsn(dsn)
    given = {"autocommit": True, "charset": "utf8mb4", "ssl_disabled": True} | more
    connection = pymysql.connect(
        host=server.host, port=server.port, user="root", database=server.database, **given
    )
    with contextlib.closing(connection), connection.cursor() as cursor:
        yield cursor


def execute(dsn: str, *statements: str) -> None:
    with session(dsn) as cursor:
        for statement in statements:
            cursor.execute(statement)


def database_of(dsn: str) -> str:
    return parse_dsn(dsn).database


@pytest.fixture
def patients(mariadb_database):
    """Campus B's tables, and a capture of its patients that begins at the log's end."""
    execute(mariadb_database, *CAMPUS_B)
    name = f"{database_of(mariadb_database)}.MS_BRDA"
    return Capture(mariadb_database, {name: ("BRID",)}).from_here()


def test_every_type_reads_the_same_from_log_and_snapshot(mariadb_database):
    """Each type x value and NULL; both ways must give the expected text."""
    database = database_of(mariadb_database)
    keys, expected = {}, {}
    with session(mariadb_database) as cursor:
        cursor.execute("SET sql_mode = '', time_zone = '+08:00'")
        capture = Capture(mariadb_database, keys).from_here()
        for number, case in enumerate(CASES):
            table = f"{database}.t{number}"
            keys[table] = ("k",)
            cursor.execute(f"CREATE TABLE {table} (k INT PRIMARY KEY, v {case.type})")
            for k, (value, text) in enumerate([*case.values, NULL]):
                cursor.execute(f"INSERT INTO {table} VALUES ({k}, {value})")
                expected[table, str(k)] = (case.type, text)
    logged = capture.drain()
    read = Capture(mariadb_database, keys).start()
    for batches in (logged, read):
        assert not [reject for batch in batches for reject in batch.rejects]
        found = {(row["table"], row["k"]): row["v"] for row in rows_of(batches)}
        wrong = {
            expected[place][0]: (found.get(place, "absent"), text)
            for place, (_, text) in expected.items()
            if found.get(place, "absent") != text
        }
        assert not wrong


def test_old_times_read_the_same_from_log_and_snapshot(mariadb_database):
    """Tables made by servers before 10.1 keep their format when those are upgraded."""
    database = database_of(mariadb_database)
    table = f"{database}.old"
    capture = Capture(mariadb_database, {table: ("k",)}).from_here()
    with session(mariadb_database) as cursor:
        cursor.execute("SET GLOBAL mysql56_temporal_format = OFF")
        try:
            cursor.execute(
                f"CREATE TABLE {table} (k INT PRIMARY KEY, a DATETIME, b TIME, c TIMESTAMP)"
            )
        finally:
            cursor.execute("SET GLOBAL mysql56_temporal_format = ON")
        cursor.execute("SET sql_mode = ''")
        cursor.execute(
            f"INSERT INTO {table} VALUES"
            " (1, '2016-03-05 08:15:00', '-838:59:59', '2016-03-05 08:15:00'),"
            " (2, '0000-00-00 00:00:00', '08:15:00', '0000-00-00 00:00:00')"
        )
    expected = [
        ("1", "2016-03-05 08:15:00", "-838:59:59", "2016-03-05 00:15:00+00"),
        ("2", "0000-00-00 00:00:00", "08:15:00", "0000-00-00 00:00:00"),
    ]
    for batches in (capture.drain(), Capture(mariadb_database, capture.keys).start()):
        assert [tuple(row[c] for c in "kabc") for row in rows_of(batches)] == expected


def test_changes_of_a_gbk_table(patients):
    execute(
        patients.dsn,
        "INSERT INTO MS_BRDA(BRID, BRXM, BRXB, CSNY)"
        " VALUES (1, '张三', '男', '2016.3.5'), (2, '乗俓', '女', '')",
        "UPDATE MS_BRDA SET BRXM = '匼' WHERE BRID = 2",
        "UPDATE MS_BRDA SET BRID = 3 WHERE BRID = 1",
        "DELETE FROM MS_BRDA WHERE BRID = 2",
    )
    batches = patients.drain()
    picked = [
        (chr(row["_op"]), row["_seq"], row["BRID"], row["BRXM"], row["_old.BRID"])
        for row in rows_of(batches)
    ]
    assert picked == [
        ("I", 1, "1", "张三", None),
        ("I", 2, "2", "乗俓", None),
        ("U", 1, "2", "匼", None),
        ("D", 1, "1", "张三", None),
        ("U", 2, "3", "张三", "1"),
        ("D", 1, "2", "匼", None),
    ]
    places = [row["_lsn"] for row in rows_of(batches)]
    assert len(set(places)) == 4
    assert all(row["_unchanged"] == 0 for row in rows_of(batches))
    assert rows_of(batches)[0]["CSNY"] == "2016.3.5"


def test_transactions_are_whole_and_what_was_rolled_back_is_not_there(patients):
    with session(patients.dsn, autocommit=False) as cursor:
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (1)")
        cursor.execute("INSERT INTO JYJG(JYXH) VALUES (1)")
        cursor.execute("SAVEPOINT s")
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (2)")
        cursor.execute("ROLLBACK TO s")
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (3)")
        cursor.connection.commit()
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (4)")
        cursor.connection.rollback()
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (5)")
        cursor.connection.commit()
    rows = rows_of(patients.drain())
    # Rows of tables that are not followed are numbered too.
    assert [(row["BRID"], row["_seq"]) for row in rows] == [("1", 1), ("3", 3), ("5", 1)]
    assert rows[0]["_lsn"] == rows[1]["_lsn"] < rows[2]["_lsn"]


def test_a_table_without_transactions(patients):
    table = f"{database_of(patients.dsn)}.m"
    execute(patients.dsn, "CREATE TABLE m (k INT PRIMARY KEY, v INT) ENGINE=MyISAM")
    patients.keys[table] = ("k",)
    with session(patients.dsn, autocommit=False) as cursor:
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (1)")
        cursor.execute("INSERT INTO m VALUES (1, 1)")
        cursor.connection.rollback()
    assert [(row["table"], row["_op"]) for row in rows_of(patients.drain())] == [(table, Op.INSERT)]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("FULL", [("I", "1", "a", "t", 0), ("U", "1", "b", "t", 0), ("D", "1", "b", "t", 0)]),
        ("FULL_NODUP", [("I", "1", "a", "t", 0), ("U", "1", "b", "t", 0), ("D", "1", "b", "t", 0)]),
        (
            "NOBLOB",
            [("I", "1", "a", "t", 0), ("U", "1", "b", None, 4), ("D", "1", "b", None, 4)],
        ),
        (
            "MINIMAL",
            [("I", "1", "a", "t", 0), ("U", "1", "b", None, 4), ("D", "1", None, None, 6)],
        ),
    ],
)
def test_partial_images(mariadb_database, image, expected):
    table = f"{database_of(mariadb_database)}.p"
    execute(mariadb_database, "CREATE TABLE p (k INT PRIMARY KEY, v VARCHAR(9), t TEXT)")
    capture = Capture(mariadb_database, {table: ("k",)}).from_here()
    execute(
        mariadb_database,
        f"SET SESSION binlog_row_image = '{image}'",
        "INSERT INTO p VALUES (1, 'a', 't')",
        "UPDATE p SET v = 'b' WHERE k = 1",
        "DELETE FROM p WHERE k = 1",
    )
    rows = rows_of(capture.drain())
    assert [
        (chr(row["_op"]), row["k"], row["v"], row["t"], row["_unchanged"]) for row in rows
    ] == expected


@pytest.mark.parametrize("mapped", [None, ("k", "v")])
def test_a_new_row_whose_defaults_were_not_logged_is_refused(mariadb_database, mapped):
    """The log tells nothing of columns that a statement did not name; read or refused, not guessed.

    A column that the mapping does not read may be lacking.
    """
    table = f"{database_of(mariadb_database)}.p"
    execute(
        mariadb_database,
        "CREATE TABLE p (k INT PRIMARY KEY, v VARCHAR(9) DEFAULT 'x', t TEXT, n INT NULL)",
    )
    columns = None if mapped is None else {table: mapped}
    capture = Capture(mariadb_database, {table: ("k",)}, columns=columns).from_here()
    execute(
        mariadb_database,
        "SET SESSION binlog_row_image = 'MINIMAL'",
        "INSERT INTO p(k) VALUES (1)",
        "INSERT INTO p(k, v) VALUES (2, 'b')",
        "INSERT INTO p VALUES (3, 'c', 't', NULL)",
        "UPDATE p SET v = 'd' WHERE k = 1",
        "REPLACE INTO p(k, v) VALUES (2, 'e')",
    )
    taken = capture.drain()
    refused = [reject for batch in taken for reject in batch.rejects]
    assert {reject.reason for reject in refused} == {"partial_row"}
    told = [(chr(reject.op), reject.column, reject.row) for reject in refused]
    rows = [(chr(row["_op"]), row["k"]) for row in rows_of(taken)]
    if mapped:
        assert told == [("I", "v", {"k": "1"})]
        assert ("I", "2") in rows and ("I", "3") in rows
    else:
        assert told[:2] == [("I", "v", {"k": "1"}), ("I", "t", {"k": "2", "v": "b"})]
        assert ("I", "3") in rows and ("U", "1") in rows
    assert sum(batch.captured for batch in taken) == len(rows) + len(refused)


def test_a_key_that_moves_in_a_minimal_image(mariadb_database):
    table = f"{database_of(mariadb_database)}.p"
    execute(mariadb_database, "CREATE TABLE p (a INT, v INT, b INT, PRIMARY KEY (a, b))")
    capture = Capture(mariadb_database, {table: ("a", "b")}).from_here()
    execute(
        mariadb_database,
        "SET SESSION binlog_row_image = 'MINIMAL'",
        "INSERT INTO p VALUES (1, 7, 1)",
        "UPDATE p SET b = 2",
    )
    rows = rows_of(capture.drain())
    assert [short(row)[:5] for row in rows[1:]] == [
        ("D", 1, "1", None, "1"),
        ("U", 2, "1", None, "2"),
    ]
    assert (rows[2]["_old.a"], rows[2]["_old.b"], rows[2]["_unchanged"]) == ("1", "1", 2)


def test_columns_come_and_go_with_the_rows_that_have_them(patients):
    execute(
        patients.dsn,
        "INSERT INTO MS_BRDA(BRID, JTDH) VALUES (1, '0571')",
        "ALTER TABLE MS_BRDA ADD COLUMN LXR VARCHAR(20) AFTER BRID",
        "INSERT INTO MS_BRDA(BRID, LXR) VALUES (2, '李四')",
        "ALTER TABLE MS_BRDA DROP COLUMN JTDH,"
        " CHANGE COLUMN LXR 联系人 VARCHAR(30) CHARSET utf8mb4",
        "INSERT INTO MS_BRDA(BRID, 联系人) VALUES (3, '䶮')",
        "ALTER TABLE MS_BRDA MODIFY GMS TEXT CHARACTER SET utf8mb4",
        "INSERT INTO MS_BRDA(BRID, GMS) VALUES (4, '青霉素³')",
    )
    rows = rows_of(patients.drain())
    assert [("LXR" in row, "JTDH" in row, "联系人" in row) for row in rows] == [
        (False, True, False),
        (True, True, False),
        (False, False, True),
        (False, False, True),
    ]
    assert (rows[1]["LXR"], rows[2]["联系人"], rows[3]["GMS"]) == ("李四", "䶮", "青霉素³")


def test_a_key_column_that_is_gone_is_told(patients):
    execute(
        patients.dsn,
        "ALTER TABLE MS_BRDA CHANGE COLUMN BRID BRBH INT",
        "INSERT INTO MS_BRDA(BRBH) VALUES (1)",
    )
    (row,) = rows_of(patients.drain())
    assert row["BRBH"] == "1" and "BRID" not in row


def test_only_the_mapped_columns_of_a_wide_table(mariadb_database):
    table = f"{database_of(mariadb_database)}.wide"
    names = ", ".join(f"c{i} INT" for i in range(200))
    execute(mariadb_database, f"CREATE TABLE wide (k INT PRIMARY KEY, {names})")
    capture = Capture(mariadb_database, {table: ("k",)}, {table: ("c7", "c150")}).from_here()
    execute(mariadb_database, "INSERT INTO wide(k, c7, c150) VALUES (1, 2, 3)")
    for batches in (
        capture.drain(),
        Capture(mariadb_database, capture.keys, capture.columns).start(),
    ):
        assert [short(row)[2:] for row in rows_of(batches)] == [("1", "2", "3", None)]


def test_bytes_that_are_no_text_refuse_their_row_only(mariadb_database):
    """Sets in which the server takes pairs that stand for nothing; never mended by guessing."""
    table = f"{database_of(mariadb_database)}.odd"
    execute(
        mariadb_database,
        "CREATE TABLE odd (k INT PRIMARY KEY, v VARCHAR(9) CHARACTER SET big5,"
        " w VARCHAR(9) CHARACTER SET ucs2)",
    )
    capture = Capture(mariadb_database, {table: ("k",)}).from_here()
    execute(
        mariadb_database,
        "INSERT INTO odd VALUES (1, '會', '会'), (2, _big5 X'41C8FE', '会'),"
        " (3, '診', _ucs2 X'4F1AD800'), (4, '診', NULL)",
    )
    for batches in (capture.drain(), Capture(mariadb_database, capture.keys).start()):
        assert [row["k"] for row in rows_of(batches)] == ["1", "4"]
        first, second = (reject for batch in batches for reject in batch.rejects)
        assert (first.reason, first.column) == ("invalid_text", "v")
        assert (first.row["k"], first.row["v"]) == ("2", "A\\xc8\\xfe")
        assert (second.column, second.row["w"]) == ("w", "O\x1a\\xd8\x00")


def test_characters_of_a_hospitals_own_keep_their_place(patients):
    """GBK's user-defined pairs (造字) are private code points, the same in log and snapshot."""
    with session(patients.dsn) as cursor:
        cursor.execute("INSERT INTO MS_BRDA(BRID, BRXM) VALUES (2, CONVERT(X'FEFE41' USING gbk))")
    for batches in (patients.drain(), Capture(patients.dsn, patients.keys).start()):
        assert [row["BRXM"] for row in rows_of(batches)] == ["\ue4c5A"]


def test_emptied_and_dropped_tables_are_held(patients):
    name = f"{database_of(patients.dsn)}.MS_BRDA"
    execute(
        patients.dsn,
        "INSERT INTO MS_BRDA(BRID) VALUES (1)",
        "TRUNCATE TABLE MS_BRDA",
        "TRUNCATE JYJG",
        "INSERT INTO MS_BRDA(BRID) VALUES (2)",
        "DROP TABLE MS_BRDA",
    )
    batches = patients.drain()
    held = [item for batch in batches for item in batch.truncates]
    assert [table for table, _ in held] == [name, name]
    rows = rows_of(batches)
    assert [row["BRID"] for row in rows] == ["1", "2"]
    assert rows[0]["_lsn"] < held[0][1].lsn < rows[1]["_lsn"] < held[1][1].lsn
    assert held[0][1].seq == 1


@pytest.mark.parametrize(
    "statements",
    [
        ("SET SESSION binlog_format = 'STATEMENT'", "INSERT INTO MS_BRDA(BRID) VALUES (1)"),
        ("SET SESSION binlog_format = 'STATEMENT'", "UPDATE MS_BRDA b, JYJG j SET b.BRXB = 1"),
        ("CREATE TABLE fresh LIKE MS_BRDA", "RENAME TABLE MS_BRDA TO stale, fresh TO MS_BRDA"),
        ("RENAME TABLE MS_BRDA TO x", "ALTER TABLE x RENAME TO MS_BRDA"),
    ],
)
def test_what_the_log_does_not_tell_is_a_gap(patients, statements):
    execute(patients.dsn, *statements)
    with pytest.raises(LogUnusable, match="needs a new snapshot"):
        patients.drain()


def test_statements_on_other_tables_are_none_of_ours(patients):
    execute(
        patients.dsn,
        "SET SESSION binlog_format = 'STATEMENT'",
        "INSERT INTO JYJG(JYXH) VALUES (1)",
        "CREATE TEMPORARY TABLE MS_BRDA_T (k INT)",
        "DROP TEMPORARY TABLE MS_BRDA_T",
    )
    assert rows_of(patients.drain()) == []


def test_distributed_transactions_count_where_they_are_committed(patients):
    with session(patients.dsn) as one, session(patients.dsn) as other:
        one.execute("XA START 'a'")
        one.execute("INSERT INTO MS_BRDA(BRID) VALUES (1)")
        one.execute("XA END 'a'")
        one.execute("XA PREPARE 'a'")
        other.execute("XA START 'b', 'branch', 7")
        other.execute("INSERT INTO MS_BRDA(BRID) VALUES (2)")
        other.execute("XA END 'b', 'branch', 7")
        other.execute("XA PREPARE 'b', 'branch', 7")
        execute(patients.dsn, "INSERT INTO MS_BRDA(BRID) VALUES (3)")
        other.execute("XA ROLLBACK 'b', 'branch', 7")
        one.execute("XA COMMIT 'a'")
        one.execute("XA START 'c'")
        one.execute("INSERT INTO MS_BRDA(BRID) VALUES (4)")
        one.execute("XA END 'c'")
        one.execute("XA COMMIT 'c' ONE PHASE")
    assert [row["BRID"] for row in rows_of(patients.drain())] == ["3", "1", "4"]


def test_a_distributed_transaction_that_was_prepared_before_is_a_gap(patients):
    with session(patients.dsn) as cursor:
        cursor.execute("XA START 'a'")
        cursor.execute("INSERT INTO MS_BRDA(BRID) VALUES (1)")
        cursor.execute("XA END 'a'")
        cursor.execute("XA PREPARE 'a'")
        patients.drain()
        cursor.execute("XA COMMIT 'a'")
    with pytest.raises(LogUnusable, match="distributed transaction"):
        patients.drain()


@pytest.mark.parametrize("setting", ["log_bin_compress = ON", "binlog_checksum = NONE"])
def test_other_forms_of_the_log(make_mariadb, setting):
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, "SET GLOBAL log_bin_compress_min_len = 10", f"SET GLOBAL {setting}", *CAMPUS_B)
    capture = Capture(dsn, {"his.MS_BRDA": ("BRID",)}).from_here()
    with session(dsn) as cursor:
        cursor.executemany(
            "INSERT INTO MS_BRDA(BRID, BRXM, GMS) VALUES (%s, %s, %s)",
            [(i, "张三", "青霉素" * 30) for i in range(500)],
        )
        cursor.execute("UPDATE MS_BRDA SET BRXM = '李四'")
        cursor.execute("DELETE FROM MS_BRDA")
        cursor.execute("TRUNCATE TABLE MS_BRDA /* a comment that makes it long enough */")
    batches = capture.drain()
    rows = rows_of(batches)
    assert [(chr(row["_op"]), row["BRXM"]) for row in rows] == [
        *[("I", "张三")] * 500,
        *[("U", "李四")] * 500,
        *[("D", "李四")] * 500,
    ]
    assert sum(len(batch.truncates) for batch in batches) == 1


def test_an_encrypted_connection(make_mariadb):
    server = make_mariadb(settings={"ssl": 1})
    dsn = server.create_database("his")
    execute(dsn, *CAMPUS_B)
    capture = Capture(dsn, {"his.MS_BRDA": ("BRID",)}).from_here()
    execute(dsn, "INSERT INTO MS_BRDA(BRID, BRXM) VALUES (1, '张三')")
    assert [row["BRXM"] for row in rows_of(capture.drain())] == ["张三"]
    assert [row["BRXM"] for row in rows_of(Capture(dsn, capture.keys).start())] == ["张三"]


def test_rows_longer_than_a_packet(patients):
    """The protocol divides what is longer than 16 MiB; the second value divides exactly."""
    table = f"{database_of(patients.dsn)}.big"
    execute(patients.dsn, "CREATE TABLE big (k INT PRIMARY KEY, v LONGTEXT CHARACTER SET latin1)")
    capture = Capture(patients.dsn, {table: ("k",)}).from_here()
    sizes = [40_000_000, (1 << 24) - 1, 10]
    for k, size in enumerate(sizes):
        execute(patients.dsn, f"INSERT INTO big VALUES ({k}, REPEAT('x', {size}))")
    for batches in (capture.drain(), Capture(patients.dsn, capture.keys).start()):
        assert [len(row["v"]) for row in rows_of(batches)] == sizes


def test_a_snapshot_joins_on_to_the_log_while_rows_are_written(patients):
    """Traps 10 and 12: every row once, whatever is committed around the snapshot's place."""
    with session(patients.dsn) as cursor:
        cursor.executemany(
            "INSERT INTO MS_BRDA(BRID, BRXM) VALUES (%s, %s)", [(i, "初") for i in range(3000)]
        )
        taken = Capture(patients.dsn, patients.keys, batch_rows=100)
        with consistent_point(patients.dsn) as point:
            cursor.execute("UPDATE MS_BRDA SET BRXM = '后' WHERE BRID % 3 = 0")
            cursor.execute("DELETE FROM MS_BRDA WHERE BRID % 7 = 0")
            cursor.execute("INSERT INTO MS_BRDA(BRID, BRXM) VALUES (5000, '新')")
            read = list(
                snapshot(
                    point,
                    list(patients.keys),
                    batch_rows=100,
                    batch_bytes=1 << 20,
                    keys=patients.keys,
                )
            )
        assert {row["BRXM"] for row in rows_of(read)} == {"初"}
        assert sum(batch.captured for batch in read) == 3000
        assert [batch.sweeps for batch in read if batch.sweeps] == [
            ((next(iter(patients.keys)), Position(point.lsn, 0)),)
        ]
        taken.position = read[-1].end
        tables: dict = {}
        replay(tables, read, patients.keys)
        replay(tables, taken.drain(), patients.keys)
        cursor.execute("SELECT BRID, BRXM FROM MS_BRDA")
        expected = {str(k): name for k, name in cursor.fetchall()}
    (rows,) = tables.values()
    assert {row["BRID"]: row["BRXM"] for row in rows.values()} == expected


def test_snapshots_of_an_idle_source_are_each_later_than_the_one_before(patients):
    execute(patients.dsn, "INSERT INTO MS_BRDA(BRID) VALUES (1)")
    capture = Capture(patients.dsn, patients.keys)
    first, second = capture.start(), capture.start()
    assert first[-1].end < second[0].begin
    execute(patients.dsn, "INSERT INTO MS_BRDA(BRID) VALUES (2)")
    assert [row["BRID"] for row in rows_of(capture.drain())] == ["2"]


def test_chunks_go_by_any_key(mariadb_database):
    """Keys whose order is a collation's, composite, of times, or none at all."""
    tables = {
        "a": "k VARCHAR(20) CHARACTER SET gbk PRIMARY KEY, v INT",
        "b": "k CHAR(4), v INT, PRIMARY KEY (v, k)",
        "c": "k DATETIME(3) PRIMARY KEY, v INT",
        "d": "k ENUM('z','y','x','w','v'), v INT, PRIMARY KEY (k, v)",
        "e": "k VARBINARY(9) PRIMARY KEY, v INT",
        "f": "k DECIMAL(9,2), v INT",
        "g": "k BIGINT UNSIGNED PRIMARY KEY, v INT",
        "h": "k VARCHAR(60), v INT, PRIMARY KEY (k(3), v)",
    }
    database = database_of(mariadb_database)
    with session(mariadb_database) as cursor:
        cursor.execute("SET sql_mode = ''")
        for name, columns in tables.items():
            cursor.execute(f"CREATE TABLE {name} ({columns})")
        for i in range(55):
            cursor.execute("INSERT INTO a VALUES (CONCAT('张', %s, '乗'), %s)", (i, i))
            cursor.execute("INSERT INTO b VALUES (%s, %s)", (f"{i % 7}甲", i // 7))
            cursor.execute(
                "INSERT INTO c VALUES ('2024-01-01' + INTERVAL %s SECOND, %s)", (i / 8, i)
            )
            cursor.execute("INSERT INTO d VALUES (%s, %s)", (i % 5 + 1, i))
            cursor.execute("INSERT INTO e VALUES (CHAR(%s), %s)", (200 + i, i))
            cursor.execute("INSERT INTO f VALUES (%s, %s)", (i, i))
            cursor.execute("INSERT INTO g VALUES (18446744073709551615 - %s, %s)", (i, i))
            cursor.execute("INSERT INTO h VALUES (%s, %s)", (f"abc{i % 5}", i))
    keys = {f"{database}.{name}": ("k", "v") for name in tables}
    batches = Capture(mariadb_database, keys, batch_rows=10).start()
    assert max(batch.captured for batch in batches) <= 10
    rows = rows_of(batches)
    for name in keys:
        found = [(row["k"], row["v"]) for row in rows if row["table"] == name]
        assert len(found) == len(set(found)) == 55, name
    assert len([batch for batch in batches if batch.sweeps]) == len(keys)


def test_300_000_rows_in_one_transaction_and_a_resume_inside(patients):
    name = next(iter(patients.keys))
    patients.batch_rows = 20_000
    execute(
        patients.dsn,
        "INSERT INTO MS_BRDA(BRID, BRXM, GMS, XGSJ)"
        " SELECT seq, '张三', REPEAT('青霉素过敏', 10), NOW() FROM seq_1_to_300000",
    )
    patients.drain(1)  # Compiled and warm before memory is looked at.
    inside = patients.position
    assert 0 < inside.seq < SEQ_END
    before, count, peak = resident_bytes(), 0, 0
    with patients.stream() as stream:
        while patients.position.seq != SEQ_END:
            for batch in stream.read(1.0):
                assert batch.begin == patients.position
                patients.position = batch.end
                count += batch.captured
                if batch.captured:
                    assert batch.tables[name]["BRID"][-1].as_py() == str(inside.seq + count)
            peak = max(peak, resident_bytes())
    assert (count, patients.position.seq) == (300_000 - inside.seq, SEQ_END)
    assert peak - before < 100 << 20


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_an_idle_source_moves_the_position(patients):
    execute(patients.dsn, "INSERT INTO JYJG(JYXH) VALUES (1)")
    patients.drain()
    with patients.stream() as stream:
        deadline = time.monotonic() + DEADLINE_S
        execute(patients.dsn, "INSERT INTO JYJG(JYXH) VALUES (2)")
        found: list[RawChanges] = []
        while not found or found[-1].end.lsn < state(patients.dsn).log_end_lsn - 62:
            assert time.monotonic() < deadline
            found += stream.read(0.1)
        assert not any(batch.captured for batch in found)
        assert abs(found[-1].commit_us_max / 1e6 - time.time()) < 60
        assert stream.caught_up


def test_a_killed_server_loses_nothing(make_mariadb):
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, *CAMPUS_B)
    capture = Capture(dsn, {"his.MS_BRDA": ("BRID",)}).from_here()
    execute(dsn, "INSERT INTO MS_BRDA(BRID) VALUES (1)")
    stream = capture.stream()
    deadline = time.monotonic() + DEADLINE_S
    while not (found := stream.read(0.1)):
        assert time.monotonic() < deadline
    capture._join(found)
    with session(dsn) as open_one:
        open_one.execute("BEGIN")
        open_one.execute("INSERT INTO MS_BRDA(BRID) VALUES (99)")
        server.kill()
    with pytest.raises(SourceUnavailable, match=r"his cannot be reached or dropped|dropped the"):
        while time.monotonic() < deadline:
            capture._join(stream.read(0.1))
    with pytest.raises(SourceUnavailable):
        capture.stream()
    server.start()
    execute(dsn, "INSERT INTO MS_BRDA(BRID) VALUES (2)")
    assert [row["BRID"] for row in rows_of(capture.drain())] == ["2"]


def test_purged_log_is_a_gap_and_a_snapshot_goes_on(make_mariadb):
    dsn = make_mariadb(settings={"slave-connections-needed-for-purge": 0}).create_database("his")
    execute(dsn, *CAMPUS_B)
    source = MariaDbSource(
        dsn, "link", {"his.MS_BRDA": ("BRID",)}, None, batch_rows=1000, batch_bytes=1 << 20
    )
    start = Position(state(dsn).log_end_lsn, SEQ_END)
    execute(
        dsn,
        "INSERT INTO MS_BRDA(BRID) VALUES (1)",
        "FLUSH BINARY LOGS",
        "INSERT INTO MS_BRDA(BRID) VALUES (2)",
        "FLUSH BINARY LOGS",
    )
    deadline = time.monotonic() + DEADLINE_S
    while state(dsn).files[0].number < 3:  # What a recovery might need goes a little later.
        assert time.monotonic() < deadline
        execute(dsn, "PURGE BINARY LOGS TO 'binlog.000003'")
    assert source.state(start).lost
    with pytest.raises(LogPurged, match=r"no longer keeps its log from binlog\.000001"):
        source.open(start)
    with source.create(start) as point:
        batches = list(source.snapshot(point))
    assert batches[0].begin > start
    assert [row["BRID"] for row in rows_of(batches)] == ["1", "2"]
    assert not source.state(batches[-1].end).lost
    source.open(batches[-1].end).close()


def test_a_log_begun_anew_is_refused(make_mariadb):
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, *CAMPUS_B)
    capture = Capture(dsn, {"his.MS_BRDA": ("BRID",)}).from_here()
    for i in range(20):
        execute(dsn, f"INSERT INTO MS_BRDA(BRID) VALUES ({i})")
    capture.drain()
    execute(dsn, "RESET MASTER")
    with pytest.raises(SourceRewound, match="RESET MASTER"):
        capture.stream()
    source = MariaDbSource(dsn, "link", capture.keys, None, batch_rows=1000, batch_bytes=1 << 20)
    assert source.state(capture.position).log_end_lsn < capture.position.lsn


@pytest.mark.parametrize("idle", [False, True])
def test_a_log_begun_anew_that_has_grown_as_far_is_refused(make_mariadb, idle):
    """Same file, same offset, an event starts there: only its GTID tells."""
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, "RESET MASTER", *CAMPUS_B)
    source = MariaDbSource(
        dsn,
        "link",
        {"his.MS_BRDA": ("BRID",)},
        None,
        batch_rows=1000,
        batch_bytes=1 << 20,
        heartbeat_s=0.05,
    )
    start = Position(state(dsn).log_end_lsn, SEQ_END)
    execute(dsn, "INSERT INTO MS_BRDA(BRID) VALUES (1)")
    position = start
    deadline = time.monotonic() + DEADLINE_S
    with source.open(start) as stream:
        while position == start or (idle and position.lsn & 63 == 63):
            assert time.monotonic() < deadline
            for batch in source.read(stream, 0.1):
                position = batch.end
                if not idle and batch.captured:
                    break
            if not idle and position != start:
                break
    with source.open(position) as stream:
        stream.read(0.5)  # The same log is recognised.
    execute(
        dsn,
        "RESET MASTER",
        "SET gtid_seq_no = 100",
        "DROP TABLE MS_BRDA, JYJG, YS_ZY_HZSQ",
        *CAMPUS_B,
        "DROP TABLE MS_BRDA, JYJG, YS_ZY_HZSQ",
        *CAMPUS_B,
        "INSERT INTO MS_BRDA(BRID) VALUES (1)",
        "INSERT INTO MS_BRDA(BRID) VALUES (2)",
    )
    with pytest.raises(SourceRewound, match="begun anew"), source.open(position) as stream:
        for _ in range(50):
            source.read(stream, 0.1)


def test_another_server_has_another_identity(make_mariadb):
    texts = []
    for name, settings in (("one", {}), ("two", {"server-id": 9})):
        dsn = make_mariadb(name, settings=settings).create_database("his")
        execute(dsn, *CAMPUS_B)
        source = MariaDbSource(
            dsn, "link", {"his.MS_BRDA": ("BRID",)}, None, batch_rows=1000, batch_bytes=1 << 20
        )
        assert source.memberships() == source.memberships()
        texts.append(source.memberships()["his.MS_BRDA"])
    assert texts[0] != texts[1]


def test_wrong_settings_are_refused_with_the_remedy(make_mariadb):
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, *CAMPUS_B)
    keys = {"his.MS_BRDA": ("BRID",), "his.NONE": ("k",)}
    source = MariaDbSource(dsn, "link", keys, None, batch_rows=1000, batch_bytes=1 << 20)
    assert "table his.NONE does not exist" in source.preflight()[0][0]
    source.require_covered()
    assert list(source.columns()) == ["his.MS_BRDA"]
    position = Position(state(dsn).log_end_lsn, SEQ_END)
    execute(
        dsn,
        "SET GLOBAL binlog_row_metadata = 'MINIMAL'",
        "SET GLOBAL binlog_row_image = 'MINIMAL'",
        "INSERT INTO MS_BRDA(BRID) VALUES (1)",
    )
    with pytest.raises(LogSettingsWrong, match="SET GLOBAL binlog_row_metadata = 'FULL'"):
        source.open(position)
    assert any("binlog_row_image" in text for text in source.preflight()[1])
    execute(dsn, "SET GLOBAL binlog_row_metadata = 'FULL'")
    # What was written meanwhile names no columns: a snapshot must tell it.
    with pytest.raises(LogUnusable), source.open(position) as stream:
        for _ in range(50):
            source.read(stream, 0.1)
    assert source.state(position).lost
    with source.create(position) as point:
        assert not source.state(position).lost
        del keys["his.NONE"]
        (batch,) = snapshot(point, keys, batch_rows=10, batch_bytes=1 << 20, keys=keys)
        assert [row["BRID"] for row in rows_of([batch])] == ["1"]


def test_rights_that_lack_are_named(make_mariadb):
    server = make_mariadb()
    dsn = server.create_database("his")
    execute(dsn, *CAMPUS_B, "CREATE USER sync@'127.0.0.1' IDENTIFIED BY 's3cret/:@'")
    mine = server.dsn("his", "sync", "s3cret%2F%3A%40")
    with pytest.raises(RightsMissing) as caught:
        state(mine)
    assert "GRANT" in str(caught.value) and "s3cret" not in str(caught.value)
    execute(dsn, "GRANT SELECT ON his.* TO sync@'127.0.0.1'")
    with pytest.raises(RightsMissing, match="BINLOG MONITOR"):
        state(mine)
    execute(dsn, "GRANT BINLOG MONITOR, REPLICATION SLAVE ON *.* TO sync@'127.0.0.1'")
    source = MariaDbSource(
        mine, "link", {"his.MS_BRDA": ("BRID",)}, None, batch_rows=1000, batch_bytes=1 << 20
    )
    source.require_covered()
    with source.create(None) as point:
        end = list(source.snapshot(point))[-1].end
    source.open(end).close()
    with pytest.raises(TableMissing), consistent_point(mine) as point:
        list(
            snapshot(point, ["mysql.user"], batch_rows=9, batch_bytes=9, keys={"mysql.user": ["x"]})
        )


def test_time_left_until_the_log_is_purged(make_mariadb):
    dsn = make_mariadb(
        settings={"binlog-expire-logs-seconds": 7200, "max-binlog-total-size": "1M"}
    ).create_database("his")
    execute(dsn, *CAMPUS_B)
    source = MariaDbSource(
        dsn, "link", {"his.MS_BRDA": ("BRID",)}, None, batch_rows=1000, batch_bytes=1 << 20
    )
    position, now_us = Position(state(dsn).log_end_lsn, SEQ_END), state(dsn).now_us
    assert source.seconds_left(position, now_us) == 7200
    with session(dsn) as cursor:
        cursor.executemany(
            "INSERT INTO MS_BRDA(BRID, GMS) VALUES (%s, %s)", [(i, "x" * 150) for i in range(2000)]
        )
    left = source.seconds_left(position, now_us - 3_600_000_000)
    assert 0 < left < 60  # Some 300 kB in a moment, of a megabyte.
    assert any("the log is kept for 2.0 h" in text for text in source.preflight()[1])
