"""Capture from a real PostgreSQL: what is committed arrives once, in its own words."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import threading
import time

import psycopg
import pytest

from schemas.batches import Op, RawChanges
from schemas.errors import SourceUnavailable
from schemas.positions import SEQ_END, Position
from tests.faults.harness import drop_slot, wait_until_free
from tests.raw_changes import rows_of, short
from transforms.capture.postgresql import slots
from transforms.capture.postgresql.pgoutput import PgOutputDecoder
from transforms.capture.postgresql.replication import (
    PublicationMissing,
    ReplicationStream,
    SlotInvalidated,
    SlotMissing,
)
from transforms.capture.postgresql.snapshot import TableMissing, snapshot
from transforms.capture.warm_up import warm_up_decoder

ROOT = pathlib.Path(__file__).parents[2]
SLOT, PUBLICATION = "campus_sync_test", "campus_sync"
DEADLINE_S = 60
NOTHING = Position(0, 0)


@dataclasses.dataclass
class Capture:
    """One source captured: slot and snapshot first, then the stream, joined by position."""

    dsn: str
    keys: dict[str, tuple[str, ...]]
    slot: str
    position: Position = NOTHING
    batch_rows: int = 1000
    batch_bytes: int = 1 << 20

    def start(self) -> list[RawChanges]:
        slots.ensure_publication_covers(self.dsn, PUBLICATION, self.keys)
        with slots.create(self.dsn, self.slot) as created:
            batches = list(
                snapshot(
                    self.dsn,
                    created,
                    list(self.keys),
                    batch_rows=self.batch_rows,
                    batch_bytes=self.batch_bytes,
                    keys=self.keys,
                    publication=PUBLICATION,
                )
            )
        self.position = Position(created.lsn, 0)
        self._join(batches)
        assert self.position == Position(created.lsn, SEQ_END)
        return batches

    def stream(self) -> ReplicationStream:
        return ReplicationStream(
            self.dsn, self.slot, PUBLICATION, self.position.acknowledgeable_lsn
        )

    def stream_once_free(self) -> ReplicationStream:
        """As `stream`; waits for a reader that has just been broken off."""
        wait_until_free(self.dsn, self.slot, DEADLINE_S)
        return self.stream()

    def drop(self) -> None:
        """Drops the slot, once the last reader has left."""
        drop_slot(self.dsn, self.slot, DEADLINE_S)

    def drain(self, batches_max: int = 1 << 30) -> list[RawChanges]:
        """Reads on until what is committed now has come, or for so many batches."""
        with psycopg.connect(self.dsn) as connection:
            (end,) = connection.execute("SELECT pg_current_wal_flush_lsn() - '0/0'").fetchone()
        decoder = PgOutputDecoder(self.batch_rows, self.batch_bytes, self.position, self.keys)
        batches: list[RawChanges] = []
        deadline = time.monotonic() + DEADLINE_S
        with self.stream_once_free() as stream:
            while self.position < (int(end) - 1, SEQ_END) and len(batches) < batches_max:
                assert time.monotonic() < deadline
                read = stream.read(1 << 18, 0.1)
                found = decoder.feed(read.payloads)
                if read.caught_up:
                    found += decoder.flush(read.wal_end, read.server_us)
                found = found[: batches_max - len(batches)]
                self._join(found)
                batches += found
                stream.acknowledge(self.position.acknowledgeable_lsn)
        return batches

    def _join(self, batches: list[RawChanges]) -> None:
        for batch in batches:
            assert batch.begin == self.position <= batch.end
            self.position = batch.end
            held = sum(table.num_rows for table in batch.tables.values())
            assert batch.captured == held + len(batch.rejects)


@pytest.fixture
def capture(database, request):
    """Makes captures of the test's database; drops their slots."""
    warm_up_decoder()
    made = []

    def make(keys: dict[str, tuple[str, ...]], **options) -> Capture:
        slot = f"{SLOT}_{database.rsplit('_', 1)[1]}_{len(made)}"
        made.append(Capture(database, keys, slot, **options))
        return made[-1]

    yield make
    for each in made:
        each.drop()


def replay(tables: dict[str, dict], batches: list[RawChanges], keys: dict) -> None:
    """Applies changes to `tables`, `{table: {key: row}}`, as a store would."""
    for row in rows_of(batches):
        name = row["table"]
        columns = [c for c in row if c != "table" and not c.startswith("_")]
        key = tuple(row[column] for column in keys[name])
        rows = tables[name]
        if row["_op"] == Op.DELETE:
            rows.pop(key, None)
            continue
        old = rows.get(key, {})
        rows[key] = {
            column: old.get(column) if row["_unchanged"] >> i & 1 else row[column]
            for i, column in enumerate(columns)
        }


def content(dsn: str, keys: dict) -> dict[str, dict]:
    """The source's tables in the stream's words."""
    tables = {}
    with psycopg.connect(dsn) as connection:
        for name, key in keys.items():
            cursor = connection.execute(f"SELECT * FROM {name}")
            columns = [column.name for column in cursor.description]
            rows = [
                {c: None if v is None else str(v) for c, v in zip(columns, row, strict=True)}
                for row in cursor
            ]
            tables[name] = {tuple(row[column] for column in key): row for row in rows}
    return tables


TYPES = {
    "boolean": ["true", "false"],
    "smallint": ["-32768"],
    "bigint": ["9223372036854775807"],
    "numeric": ["'NaN'", "'-Infinity'", "0.0010", "-12345678901234567890.123456789"],
    "numeric(12,4)": ["1.5"],
    "real": ["0.1", "3.4028235e38", "'NaN'"],
    "double precision": ["0.1::float8 + 0.2", "1e-300", "'-Infinity'"],
    "money": ["'1234.50'"],
    "text": [
        "''",
        "E'tab\\tnewline\\nreturn\\r\\b\\f\\v back\\\\slash \\\\N'",
        "'会诊\U0001f691'",
        "'\\N'",
    ],
    "varchar(20)": ["' padded '"],
    "char(8)": ["'ab'", "''"],
    '"char"': ["'x'"],
    "name": ["'n'"],
    "bytea": [r"'\x00ff5c0a'", r"'\x'"],
    "date": ["'2024-02-29'", "'infinity'", "'0044-03-15 BC'"],
    "time": ["'23:59:59.999999'"],
    "timetz": ["'04:05:06.789+08:30'"],
    "timestamp": ["'2024-01-01 12:00'", "'-infinity'", "'0001-01-01 BC'"],
    "timestamptz": ["'2024-01-01 12:00:00.000001+08'", "'1900-01-01 00:00:00+08:05:43'"],
    "interval": ["'1 year -2 mons +3 days -04:05:06.7'"],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "json": ["'{\"a\":  1}'"],
    "jsonb": ['\'{"b": [1, null, "\\u4f1a"]}\''],
    "inet": ["'10.0.0.1'", "'10.0.0.1/8'", "'::1'"],
    "cidr": ["'10.0.0.0/8'", "'10.0.0.1/32'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "bit(4)": ["B'1010'"],
    "varbit": ["B'101'"],
    "point": ["'(1.5,-2)'"],
    "polygon": ["'((0,0),(1,1),(1,0))'"],
    "int4range": ["'[1,5)'", "'empty'"],
    "tstzmultirange": ["'{[2024-01-01 00:00+08,2024-01-02 00:00+08)}'"],
    "text[]": ["ARRAY['a', NULL, 'NULL', '', E'\\\\', ',']"],
    "boolean[]": ["ARRAY[true, false]"],
    "timestamptz[]": ["ARRAY['2024-01-01 12:00+08'::timestamptz]"],
    "int[][]": ["'{{1,2},{3,4}}'"],
    "tsvector": ["to_tsvector('simple', 'a b')"],
    "oid": ["4294967295"],
    "regclass": ["'public.matrix'::regclass", "'pg_class'::regclass"],
    "pg_lsn": ["'16/B374D848'"],
    "mood": ["'急'"],
    "yes": ["true"],
    "pair": ["(1, 'a,\"b')"],
}


def test_every_type_reads_the_same_in_snapshot_and_stream(database, capture):
    """Whatever the database's own settings for texts are (trap 12)."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TYPE mood AS ENUM ('急', 'b'); CREATE DOMAIN yes AS boolean")
        source.execute("CREATE TYPE pair AS (a int, b text)")
        columns = ", ".join(f"c{i} {name}" for i, name in enumerate(TYPES))
        source.execute(f"CREATE TABLE matrix (id int PRIMARY KEY, {columns})")
        name = source.info.dbname
        for setting in (
            "datestyle = 'German'",
            "timezone = 'Asia/Shanghai'",
            "intervalstyle = 'iso_8601'",
            "bytea_output = 'escape'",
            "extra_float_digits = -5",
        ):
            source.execute(f"ALTER DATABASE {name} SET {setting}")
        source.execute("SET timezone = 'UTC'")
        depth = max(map(len, TYPES.values()))
        lines = [[v[i] if i < len(v) else "NULL" for v in TYPES.values()] for i in range(depth)]
        insert = "; ".join(
            f"INSERT INTO matrix VALUES ({i}, {', '.join(line)})" for i, line in enumerate(lines)
        )
        source.execute(insert)
        link = capture({"public.matrix": ("id",)})
        before = link.start()
        source.execute("DELETE FROM matrix")
        source.execute(insert)
        after = link.drain()
    snapshotted = [short(row)[2:] for row in rows_of(before)]
    streamed = [short(row)[2:] for row in rows_of(after) if row["_op"] == Op.INSERT]
    assert len(snapshotted) == depth
    for one, other in zip(snapshotted, streamed, strict=True):
        for i, (value, again) in enumerate(zip(one, other, strict=True)):
            assert value == again, ["id", *TYPES][i]
    first = dict(zip(["id", *TYPES], streamed[0][:-1], strict=True))
    assert first["boolean"] == "t" and first["char(8)"] == "ab      "
    assert first["timestamptz"] == "2024-01-01 04:00:00.000001+00"
    assert first["inet"] == "10.0.0.1" and first["regclass"] == "public.matrix"


@pytest.mark.parametrize(
    ("encoding", "stored", "expected", "rejected"),
    [
        ("EUC_CN", "'会诊'", "会诊", 0),
        ("SQL_ASCII", r"convert_from('\xfffe', 'SQL_ASCII')", None, 1),
    ],
)
def test_text_of_other_encodings(postgres_server, database, encoding, stored, expected, rejected):
    """A GB database is converted; bytes that are no text refuse their row and nothing else."""
    name = f"encoding_{encoding.lower()}"
    with psycopg.connect(database, autocommit=True) as other:
        other.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'"
            " LOCALE_PROVIDER libc LOCALE 'C'"
        )
    dsn = postgres_server.dsn(name)
    link = Capture(dsn, {"public.t": ("id",)}, f"{SLOT}_{encoding.lower()}")
    with psycopg.connect(dsn, autocommit=True, client_encoding="utf8") as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        source.execute(f"INSERT INTO t VALUES (1, {stored}), (2, 'a')")
        before = link.start()
        source.execute("UPDATE t SET id = id + 2")
        after = link.drain()
    link.drop()
    for batches in (before, after):
        rows = [row for row in rows_of(batches) if row["_op"] != Op.DELETE]
        assert {row["v"] for row in rows} == {"a"} | ({expected} if expected else set())
        rejects = [reject for batch in batches for reject in batch.rejects]
        assert [(r.reason, r.column) for r in rejects] == [("invalid_text", "v")] * rejected


def test_rows_come_as_they_were_changed(database, capture):
    """NULL, unchanged TOAST and a changed key are told apart; what was undone never comes."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE doc (id int PRIMARY KEY, title text, body text)")
        source.execute("ALTER TABLE doc ALTER body SET STORAGE EXTERNAL")
        link = capture({"public.doc": ("id",)})
        assert rows_of(link.start()) == []
        long = "长" * 5000
        source.execute("INSERT INTO doc VALUES (1, NULL, %s), (2, '', NULL)", [long])
        source.execute("UPDATE doc SET title = 'x' WHERE id = 1")
        source.execute("UPDATE doc SET id = 7 WHERE id = 1")
        source.execute("DELETE FROM doc WHERE id = 2")
        with contextlib.suppress(psycopg.errors.DivisionByZero), source.transaction():
            source.execute("INSERT INTO doc VALUES (66, 'rolled back', 'x')")
            source.execute("SELECT 1 / 0")
        with source.transaction():
            source.execute("INSERT INTO doc VALUES (3, 'kept', 'a')")
            source.execute("SAVEPOINT s")
            source.execute("INSERT INTO doc VALUES (67, 'rolled back', 'x')")
            source.execute("ROLLBACK TO s")
            source.execute("INSERT INTO doc VALUES (4, 'kept', 'b')")
        batches = link.drain()
    assert [(*short(row), row["_unchanged"]) for row in rows_of(batches)] == [
        ("I", 1, "1", None, long, None, 0),
        ("I", 2, "2", "", None, None, 0),
        ("U", 1, "1", "x", None, None, 0b100),
        ("D", 1, "1", None, None, None, 0b110),
        ("U", 2, "7", "x", None, "1", 0b100),
        ("D", 1, "2", None, None, None, 0b110),
        ("I", 1, "3", "kept", "a", None, 0),
        ("I", 2, "4", "kept", "b", None, 0),
    ]


def test_a_whole_row_identity_fills_what_is_unchanged(database, capture):
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE doc (id int PRIMARY KEY, title text, body text)")
        source.execute("ALTER TABLE doc REPLICA IDENTITY FULL, ALTER body SET STORAGE EXTERNAL")
        link = capture({"public.doc": ("id",)})
        link.start()
        long = "长" * 5000
        source.execute("INSERT INTO doc VALUES (1, 'a', %s)", [long])
        source.execute("UPDATE doc SET title = 'b'")
        source.execute("UPDATE doc SET id = 2")
        source.execute("DELETE FROM doc")
        batches = link.drain()
    assert [(*short(row), row["_unchanged"]) for row in rows_of(batches)] == [
        ("I", 1, "1", "a", long, None, 0),
        ("U", 1, "1", "b", long, None, 0),
        ("D", 1, "1", "b", long, None, 0),
        ("U", 2, "2", "b", long, "1", 0),
        ("D", 1, "2", "b", long, None, 0),
    ]


def test_tables_truncates_and_new_columns_in_one_transaction(database, capture):
    with psycopg.connect(database, autocommit=True) as source:
        source.execute(
            'CREATE SCHEMA "LIS"; CREATE TABLE "LIS"."Result" (a int, b int,'
            " c text, PRIMARY KEY (a, b))"
        )
        source.execute("CREATE TABLE visit (id int PRIMARY KEY)")
        link = capture({"LIS.Result": ("a", "b"), "public.visit": ("id",)})
        source.execute('INSERT INTO "LIS"."Result" VALUES (0, 0, \'before\')')
        snapshots = link.start()
        assert [batch.sweeps[0][0] for batch in snapshots] == ["LIS.Result", "public.visit"]
        with source.transaction():
            source.execute("INSERT INTO visit VALUES (1)")
            source.execute('INSERT INTO "LIS"."Result" VALUES (1, 1, \'x\')')
            source.execute('TRUNCATE visit, "LIS"."Result"')
            source.execute("INSERT INTO visit VALUES (2)")
            source.execute('ALTER TABLE "LIS"."Result" ADD flag text DEFAULT \'N\', DROP c')
            source.execute('INSERT INTO "LIS"."Result" VALUES (2, 2, \'H\')')
            source.execute('UPDATE "LIS"."Result" SET b = 3')
        batches = link.drain()
    assert [short(row)[1:] for row in rows_of(batches)] == [
        (1, "1", None),
        (2, "1", "1", "x", None, None),
        (5, "2", None),
        (6, "2", "2", "H", None, None),
        (7, "2", "2", None, None, None),
        (8, "2", "3", "H", "2", "2"),
    ]
    truncates = [item for batch in batches for item in batch.truncates]
    assert {name for name, _ in truncates} == {"public.visit", "LIS.Result"}
    assert [place.seq for _, place in truncates] == [3, 4]
    assert [batch.end.seq for batch in batches if batch.captured] == [5, SEQ_END]


def test_no_change_is_lost_or_doubled_between_snapshot_and_stream(database, capture):
    """Four writers work all through the making of the slot and the snapshot (trap 10)."""
    keys = {"public.a": ("id",), "public.b": ("id",)}
    stop = threading.Event()

    def write(number: int) -> None:
        with psycopg.connect(database, autocommit=True) as writer:
            for turn in range(100_000):
                if stop.is_set():
                    return
                row, table = turn * 4 + number, "ab"[turn % 2]
                writer.execute(f"INSERT INTO {table} VALUES ({row}, 'new')")
                with writer.transaction():
                    writer.execute(f"UPDATE {table} SET v = 'changed' WHERE id = {row - 8}")
                    writer.execute(f"UPDATE {table} SET id = -{row + 1} WHERE id = {row - 16}")
                    writer.execute(f"DELETE FROM {table} WHERE id = {row - 24}")

    with psycopg.connect(database, autocommit=True) as source:
        for table in "ab":
            source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, v text)")
    writers = [threading.Thread(target=write, args=[i]) for i in range(4)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(3):
            link = capture(keys, batch_rows=50)
            tables: dict[str, dict] = collections.defaultdict(dict)
            replay(tables, link.start(), keys)
            replay(tables, link.drain(), keys)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    replay(tables, link.drain(), keys)
    expected = content(database, keys)
    assert len(expected["public.a"]) > 10
    assert tables == expected


def test_a_transaction_that_was_cut_goes_on_after_a_restart(make_server):
    """Killed again and again in one big transaction: every row once, none missing."""
    server = make_server("killed", settings={"synchronous_commit": "on"})
    dsn = server.create_database("his")
    with psycopg.connect(dsn, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        link = Capture(dsn, {"public.t": ("id",)}, SLOT, batch_rows=700)
        link.start()
        source.execute("INSERT INTO t SELECT g, 'v' FROM generate_series(1, 10000) g")
        source.execute("UPDATE t SET id = -id WHERE id <= 1000")
    batches = []
    for _ in range(3):
        batches += link.drain(batches_max=3)
        assert link.position.seq != SEQ_END
        server.kill()
        server.start()
    batches += link.drain()
    rows = rows_of(batches)
    assert [row["id"] for row in rows[:10000]] == [str(i) for i in range(1, 10001)]
    assert len(rows) == 12000 and sum(batch.captured for batch in batches) == 12000
    assert len({(row["_lsn"], row["_seq"]) for row in rows}) == 12000


LARGE = """
import json, resource, sys
from schemas.positions import Position
from tests.e2e.test_capture_postgresql import Capture
from transforms.capture.postgresql.pgoutput import PgOutputDecoder

dsn, slot, lsn, seq = sys.argv[1:]
link = Capture(dsn, {"public.t": ("id",)}, slot, Position(int(lsn), int(seq)))
link.drain(batches_max=1)  # The first small one: everything is loaded.
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = PgOutputDecoder(5000, 2_000_000, link.position, link.keys)
rows = 0
with link.stream_once_free() as stream:
    while rows < 300_000:
        read = stream.read(2_000_000, 1)
        rows += sum(batch.captured for batch in decoder.feed(read.payloads) + decoder.flush())
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_memory_is_bounded_whatever_the_transaction(database, capture):
    """300,000 rows, 84 MB, in one transaction grow the reader by less than a third of that."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        link = capture({"public.t": ("id",)})
        link.start()
        source.execute("INSERT INTO t VALUES (0, 'small')")
        source.execute("INSERT INTO t SELECT g, repeat('x', 250) FROM generate_series(1, 300000) g")
    found = subprocess.run(
        [sys.executable, "-c", LARGE, database, link.slot, *map(str, link.position)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    rows, growth_kib = json.loads(found.stdout)
    assert rows == 300_000
    assert growth_kib < 28 << 10


def test_snapshots_are_cut_by_rows_and_bytes_and_joined(database, capture):
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        source.execute("CREATE TABLE empty (id int PRIMARY KEY, v text)")
        source.execute("INSERT INTO t SELECT g, repeat('x', g % 40) FROM generate_series(1, 999) g")
        for rows, size in ((100, 1 << 20), (999, 1 << 20), (10_000, 1000)):
            keys = {"public.t": ("id",), "public.empty": ("id",)}
            batches = capture(keys, batch_rows=rows, batch_bytes=size).start()
            assert all(batch.captured <= rows for batch in batches)
            assert len(batches) > 5 or rows == 999
            assert [row["_seq"] for row in rows_of(batches)] == list(range(1, 1000))
            swept = [batch.sweeps[0] for batch in batches if batch.sweeps]
            place = Position(batches[0].begin.lsn, 0)
            assert swept == [("public.t", place), ("public.empty", place)]
            assert all(batch.begin < batch.end for batch in batches)
        with pytest.raises(TableMissing), slots.create(database, "other") as created:
            list(snapshot(database, created, ["public.none"], batch_rows=1, batch_bytes=1))
        slots.drop(database, "other")


def test_partial_publications_and_generated_columns(database, capture):
    """The snapshot has the columns that the stream has."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute(
            "CREATE TABLE t (id int PRIMARY KEY, secret text, v text,"
            " twice int GENERATED ALWAYS AS (id * 2) STORED)"
        )
        source.execute("INSERT INTO t VALUES (1, 's', 'v')")
        source.execute(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE t (id, v)")
        link = capture({"public.t": ("id",)})
        before = link.start()
        source.execute("UPDATE t SET id = 2")
        after = link.drain()
    schemas = {batch.tables["public.t"].schema for batch in before + after if batch.captured}
    assert len(schemas) == 1
    assert schemas.pop().names[5:] == ["id", "v", "_old.id"]


def test_the_slot_follows_what_is_acknowledged(database, capture):
    """An idle source's heartbeats release its log (trap 1)."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (v text)")
        link = capture({"public.t": ("id",)})
        link.start()
        source.execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        before = slots.state(database, link.slot)
        assert before.exists and not before.lost and not before.active
        (beat,) = link.drain()
        assert (beat.captured, beat.tables, beat.end.seq) == (0, {}, SEQ_END)
        after = slots.state(database, link.slot)
        assert after.confirmed_lsn > before.confirmed_lsn
        assert after.confirmed_lsn == link.position.acknowledgeable_lsn
        assert beat.commit_us_max > 1_700_000_000_000_000
    link.drop()
    slots.drop(database, link.slot)
    assert not slots.state(database, link.slot).exists


def test_a_publication_is_made_extended_and_checked(database):
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        source.execute("CREATE TABLE bare (id int)")
        assert slots.missing_tables(database, PUBLICATION, ["public.a"]) == ("public.a",)
        assert slots.ensure_publication_covers(database, PUBLICATION, ["public.a"]) == ("public.a",)
        both = ["public.b", "public.a"]
        assert slots.ensure_publication_covers(database, PUBLICATION, both) == ("public.b",)
        assert slots.ensure_publication_covers(database, PUBLICATION, both) == ()
        with pytest.raises(PublicationMissing, match=r"no table public\.c"):
            slots.ensure_publication_covers(database, PUBLICATION, ["public.c"])
        with pytest.raises(PublicationMissing, match=r"public\.bare must not be published"):
            slots.ensure_publication_covers(database, PUBLICATION, ["public.bare"])
        source.execute("INSERT INTO bare VALUES (1); UPDATE bare SET id = 2")
        source.execute("CREATE PUBLICATION part FOR TABLE a WHERE (id > 5)")
        with pytest.raises(PublicationMissing, match=r"row filters of public\.a"):
            slots.missing_tables(database, "part", ["public.a"])
        source.execute("CREATE PUBLICATION inserts FOR TABLE a WITH (publish = 'insert')")
        with pytest.raises(PublicationMissing, match="publish"):
            slots.ensure_publication_covers(database, "inserts", ["public.a"])


def test_what_keeps_a_stream_from_starting_is_told_apart(database, capture):
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY)")
        link = capture({"public.t": ("id",)})
        with pytest.raises(SlotMissing):
            link.stream()
        link.start()
        with link.stream():
            assert slots.state(database, link.slot).active
            with pytest.raises(SourceUnavailable, match="another reader"):
                link.stream()
            with pytest.raises(SourceUnavailable, match="has a reader"):
                slots.drop(database, link.slot)
        with pytest.raises(SlotInvalidated, match="advanced past"):
            ReplicationStream(database, link.slot, PUBLICATION, 1)
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            ReplicationStream("host=127.0.0.1 port=1 dbname=x", "s", "p", 0)
        source.execute(f"DROP PUBLICATION {PUBLICATION}")
        with pytest.raises(PublicationMissing):
            link.stream()


def test_a_publication_dropped_under_the_stream_is_noticed(database, capture):
    """PostgreSQL 18 only warns, and sends nothing more of the table."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY)")
        link = capture({"public.t": ("id",)})
        link.start()
        with link.stream() as stream:
            stream.read(1 << 20, 0.2)
            source.execute(f"DROP PUBLICATION {PUBLICATION}")
            source.execute("INSERT INTO t VALUES (1)")
            with pytest.raises((PublicationMissing, SlotMissing)):
                for _ in range(50):
                    stream.read(1 << 20, 0.2)


def test_an_invalidated_slot_is_a_gap_not_silence(make_server):
    server = make_server(
        "small", settings={"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB",
                           "max_wal_size": "32MB"}
    )  # fmt: skip
    dsn = server.create_database("his")
    with psycopg.connect(dsn, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY)")
        link = Capture(dsn, {"public.t": ("id",)}, SLOT)
        link.start()
        for _ in range(4):
            source.execute("SELECT pg_switch_wal(); CREATE TABLE x (); DROP TABLE x")
            source.execute("CHECKPOINT")
        state = slots.state(dsn, SLOT)
        assert state.exists and state.lost
        with pytest.raises(SlotInvalidated):
            link.stream()
        slots.drop(dsn, SLOT)
        link.start()
        link.drain()


def test_a_lost_and_a_stopping_server(make_server):
    """A store that is down must not hold up the stop of the source's server."""
    server = make_server("stopped")
    dsn = server.create_database("his")
    with psycopg.connect(dsn, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY)")
        link = Capture(dsn, {"public.t": ("id",)}, SLOT)
        link.start()
        source.execute("INSERT INTO t SELECT generate_series(1, 1000)")
    failures = []

    def read(stream: ReplicationStream) -> None:
        try:
            while True:
                stream.read(1 << 20, 0.2)
        except SourceUnavailable as error:
            failures.append(error)
        stream.close()

    for end in (lambda: server.stop("fast", timeout_s=30), server.kill):
        reader = threading.Thread(target=read, args=[link.stream()])
        reader.start()
        began = time.monotonic()
        end()
        reader.join(10)
        assert time.monotonic() - began < 10
        server.start()
    assert len(failures) == 2
    assert len(rows_of(link.drain())) == 1000


def test_a_server_that_hangs_is_given_up(make_server):
    server = make_server("frozen")
    dsn = server.create_database("his")
    with psycopg.connect(dsn, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY)")
    link = Capture(dsn, {"public.t": ("id",)}, SLOT)
    link.start()
    lsn = link.position.acknowledgeable_lsn
    fast = ReplicationStream(dsn, SLOT, PUBLICATION, lsn, monotonic=lambda: 20 * time.monotonic())
    fast.read(1 << 20, 1)
    server.freeze()
    try:
        with pytest.raises(SourceUnavailable, match="said nothing"):
            for _ in range(200):
                fast.read(1 << 20, 5)
    finally:
        server.thaw()
        fast.close()


def test_signs_of_life_hold_the_connection_while_nothing_is_read(make_server):
    server = make_server("patient", settings={"wal_sender_timeout": "4s"})
    dsn = server.create_database("his")
    with psycopg.connect(dsn, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        link = Capture(dsn, {"public.t": ("id",)}, SLOT)
        link.start()
        source.execute("INSERT INTO t SELECT g, repeat('x', 900) FROM generate_series(1, 20000) g")
        with link.stream() as stream:
            end = time.monotonic() + 6
            while time.monotonic() < end:
                stream.keep_alive()
                time.sleep(0.1)
            assert stream.read(1 << 20, 1).payloads
