"""Stores of older versions: upgraded in place while links deliver, and newer ones refused."""

import concurrent.futures
import pathlib
import threading

import psycopg
import pytest
from psycopg.types.json import Jsonb

from schemas.batches import Op
from schemas.errors import ConfigError
from schemas.positions import SEQ_END, START, Position
from tests.deliveries import LINK, batch_of, lab_results, resealed
from tests.edited_stores import HOUR_US, PLAN, RULES, EditedStore, agree, settle
from tests.store_rows import StoreRows
from transforms.deliver import ledger, store_schema
from transforms.deliver.edits.edit_schema import OWN_SESSION
from transforms.deliver.edits.open_store import open_store
from transforms.deliver.store import Store
from transforms.seal_dead_letters import Sealer

VERSIONS = sorted((pathlib.Path(__file__).parents[1] / "golden" / "store_versions").glob("*.sql"))
# What makes two stores alike for every statement; the order of columns does not.
CATALOGUE = """\
SELECT n.nspname, c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod),
    a.attnotnull, a.attstorage::text, coalesce(k.collname, ''), c.reloptions::text,
    pg_get_expr(d.adbin, d.adrelid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (c.oid, a.attnum)
LEFT JOIN pg_collation k ON k.oid = a.attcollation
WHERE n.nspname IN ('consult', 'sync') ORDER BY 1, 2, 4"""
DEFINED = """\
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
WHERE indrelid IN (SELECT oid FROM pg_class
    WHERE relnamespace IN ('consult'::regnamespace, 'sync'::regnamespace))
UNION ALL SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace IN ('consult'::regnamespace, 'sync'::regnamespace)
UNION ALL SELECT viewname, definition FROM pg_views WHERE schemaname IN ('consult', 'sync')
ORDER BY 1, 2"""
LINKS = tuple(f"{campus}>primary" for campus in ("main", "east", "west", "north"))


def as_of(dsn: str, path: pathlib.Path) -> None:
    """Makes a store as the program of that version made it, with a delivery of two rows in it."""
    with psycopg.connect(dsn) as conn:
        conn.execute(path.read_bytes())
        version = int(path.stem.partition("_")[0])
        conn.execute("INSERT INTO sync.schema_version (version) VALUES (%s)", (version,))
        conn.execute(
            "INSERT INTO sync.progress SELECT %s, 'routine', 7, %s, 2, 2, 0, 0, 0, 0, 0, 1, 1",
            (LINK, SEQ_END),
        )
        for i in (1, 2):
            conn.execute(
                "INSERT INTO consult.lab_result (campus, record_id, patient_id, value, src_table,"
                " src_lsn, src_seq, committed_at, hlc, lane, security_level, deleted) VALUES"
                " ('main', %s, 'P1', 5, 'lis.result', 7, %s, now(), 0, 'R', 2, false)",
                (str(10_000_000 + i), i),
            )


def version_of(conn: psycopg.Connection) -> int:
    return conn.execute("SELECT version FROM sync.schema_version").fetchone()[0]


@pytest.fixture
def new_store(database):
    with psycopg.connect(database, autocommit=True) as conn:
        yield database, conn


def store_of(dsn: str, link: str = LINK) -> Store:
    sealer = Sealer("env:KEY_OF_THIS_TEST")
    return Store(dsn, link, link.partition(">")[0], sealer, lambda: 0)


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.stem)
def test_an_older_store_becomes_as_a_new_one_and_its_link_goes_on(new_store, postgres_server, path):
    dsn, conn = new_store
    as_of(dsn, path)
    other = postgres_server.create_database(f"fresh_{path.stem}")
    store = store_of(dsn)
    # The first delivery upgrades, and joins on to the ledger that was there.
    batch = batch_of({"lab_result": lab_results(1, 3, 8, Op.UPDATE)}, Position(7, SEQ_END))
    receipt = store.apply([batch], batch.lane)
    store.close()
    assert (receipt.applied, receipt.counts.delivered) == (True, 3)
    assert version_of(conn) == store_schema.SCHEMA_VERSION
    with psycopg.connect(other, autocommit=True) as fresh:
        store_schema.ensure(fresh)
        for query in (CATALOGUE, DEFINED):
            assert conn.execute(query).fetchall() == fresh.execute(query).fetchall()
    rows = conn.execute("SELECT count(*), min(src_lsn) FROM consult.lab_result").fetchone()
    assert rows == (3, 8)
    (captured,) = conn.execute("SELECT captured FROM sync.progress").fetchone()
    assert captured == 5
    before = conn.execute("SELECT upgraded_at FROM sync.schema_version").fetchone()
    store_schema.ensure(conn)
    assert conn.execute("SELECT upgraded_at FROM sync.schema_version").fetchone() == before


def test_what_new_columns_lack_is_read_again(new_store):
    """Only the sources know what a column that the store did not have would have held."""
    dsn, conn = new_store
    last = next(path for path in VERSIONS if path.stem == "1_last")
    as_of(dsn, last)
    ledger.note_published(conn, LINK, {"lis.result": "1"})
    store_schema.ensure(conn)
    assert ledger.published(conn, LINK) == {"lis.result": "1"}
    conn.execute("UPDATE sync.schema_version SET version = 1")
    conn.execute("ALTER TABLE consult.lab_result DROP COLUMN comparator")
    store_schema.ensure(conn)
    assert ledger.published(conn, LINK) == {}


HELD = (
    "SELECT record_id, table_name, campus, src_table, seen, record, change FROM sync.record"
    " ORDER BY 1, 2, 3",
    "SELECT record_id, table_name, campus, actor, counter, edit, met_at FROM sync.version"
    " ORDER BY 1, 2, 3, 4, 5",
)


def entries_of_4(edit: dict) -> dict[str, dict]:
    """Returns an edit as version 4 kept it: by group, each with all that the edit says."""
    said = {"decides": False, "reason": "", "distrusted": [], **edit}
    wrote = said.pop("wrote")
    return {group: said | written for group, written in wrote.items()}


def test_what_clients_edited_is_by_edit_from_version_5_on(new_store, postgres_server):
    dsn, conn = new_store
    edited = EditedStore("main", postgres_server.create_database("edited_5"), HOUR_US)
    other = EditedStore("east", postgres_server.create_database("edited_5b"))
    rows = StoreRows(edited.own)
    rows.put("patient", "main", "p1", phone="1", allergies="无")
    edited.as_("D7", "attending", "emergency")
    edited.client.execute("SET campus_sync.reason = 'why'")
    edited.update("p1", "patient", phone="2")
    edited.insert("r1", title="t", content="文", participants="A")
    settle([edited, other])
    for i, store in enumerate((edited, other)):
        store.update("r1", content=f"x{i}")
    settle([edited, other])
    assert len(edited.record("r1").entries("plan")) == 2
    records, versions = (edited.own.execute(query).fetchall() for query in HELD)
    edited.close()
    other.close()

    as_of(dsn, next(path for path in VERSIONS if path.stem == "4_last"))
    for *key, src_table, seen, record, change in records:
        live: dict[str, list] = {}
        for edit in record["edits"]:
            for group, entry in entries_of_4(edit).items():
                live.setdefault(group, []).append(entry)
        row = (*key, src_table, Jsonb(seen), Jsonb({"seen": seen, "live": live}), change)
        conn.execute(
            "INSERT INTO sync.record (record_id, table_name, campus, src_table, seen, record,"
            " change) VALUES (%s, %s, %s, %s, %s, %s, %s)",
            row,
        )
    for *key, actor, counter, edit, met_at in versions:
        for group, entry in entries_of_4(edit).items():
            conn.execute(
                "INSERT INTO sync.version VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                (*key, group, actor, counter, Jsonb(entry), met_at),
            )
    store_schema.ensure(conn)
    assert conn.execute(HELD[0]).fetchall() == records
    assert conn.execute(HELD[1]).fetchall() == versions
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("DELETE FROM sync.version")


def test_edits_that_waited_while_a_store_of_version_5_was_upgraded_are_folded(
    new_store, postgres_server
):
    """Its trigger had given them their numbers, in record and row; now the fold does."""
    dsn, conn = new_store
    made = EditedStore("west", postgres_server.create_database("waiting_5"))
    made.insert("known", title="a", content="old")
    made.fold()
    row, record, versions = (
        made.own.execute(query).fetchall()
        for query in (f"SELECT to_jsonb(t) FROM consult.{PLAN} t", *HELD)
    )
    made.close()

    as_of(dsn, next(path for path in VERSIONS if path.stem == "5_last"))
    open_store(conn, "main", RULES)
    conn.execute(OWN_SESSION)
    conn.execute(
        f"INSERT INTO consult.{PLAN} SELECT * FROM jsonb_populate_record(NULL::consult.{PLAN}, %s)",
        (Jsonb(row[0][0]),),
    )
    (*key, src_table, seen, content, change), (version,) = record[0], versions
    conn.execute(
        "INSERT INTO sync.record (record_id, table_name, campus, src_table, seen, record, change)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (*key, src_table, Jsonb(seen), Jsonb(content), change),
    )
    conn.execute(
        "INSERT INTO sync.version VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (*version[:5], Jsonb(version[5]), version[6]),
    )
    StoreRows(conn).put("patient", "main", "p1", phone="1")
    with psycopg.connect(dsn, autocommit=True) as client:
        client.execute(
            f"INSERT INTO consult.{PLAN} (campus, record_id, title) VALUES"
            " ('main', 'new', 't'), ('main', 'twice', 't'), ('main', 'gone', 't')"
        )
        client.execute(f"UPDATE consult.{PLAN} SET title = 'u' WHERE record_id = 'twice'")
        client.execute(f"DELETE FROM consult.{PLAN} WHERE record_id = 'gone'")
        client.execute(f"UPDATE consult.{PLAN} SET content = 'now' WHERE record_id = 'known'")
        client.execute("UPDATE consult.patient SET phone = '2'")
    assert conn.execute("SELECT count(*) FROM sync.edit").fetchone() == (7,)

    one = EditedStore("main", dsn)  # Upgrades it.
    other = EditedStore("east", postgres_server.create_database("waiting_5b"))
    StoreRows(other.own).put("patient", "main", "p1", phone="1")
    settle([one, other])
    assert conn.execute("SELECT count(*) FROM sync.edit").fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM sync.incident").fetchone() == (0,)
    assert agree([one, other])
    for store in (one, other):
        assert [store.row(name, "title", "content") for name in ("new", "twice", "known")] == [
            ("t", None),
            ("u", None),
            ("a", "now"),
        ]
        assert store.row("gone", "title") is None
        assert store.row("p1", "phone", table="patient") == ("2",)
        counts = [sum(store.record(name).seen.values()) for name in ("new", "twice", "gone")]
        assert counts == [1, 2, 2]
        store.close()


def test_many_workers_meet_an_old_store_at_once(new_store):
    """Four links deliver; each opens the store for itself, at the same moment."""
    dsn, conn = new_store
    as_of(dsn, VERSIONS[0])
    ready = threading.Barrier(len(LINKS))

    def deliver(link: str) -> int:
        ready.wait()
        store = store_of(dsn, link)
        try:
            rows = lab_results(100, 50, 9)
            begin = Position(7, SEQ_END) if link == LINK else START
            batch = resealed(batch_of({"lab_result": rows}, begin), link=link)
            return store.apply([batch], batch.lane).counts.delivered
        finally:
            store.close()

    with concurrent.futures.ThreadPoolExecutor(len(LINKS)) as pool:
        assert list(pool.map(deliver, LINKS)) == [50] * len(LINKS)
    assert version_of(conn) == store_schema.SCHEMA_VERSION
    assert conn.execute("SELECT count(*) FROM consult.lab_result").fetchone() == (202,)


def test_an_upgrade_that_breaks_leaves_the_old_store(new_store, monkeypatch):
    dsn, conn = new_store
    as_of(dsn, VERSIONS[0])
    before = conn.execute(CATALOGUE).fetchall()
    with monkeypatch.context() as changed:
        changed.setattr(store_schema, "_PATIENCE", "SET LOCAL lock_timeout = '200ms'")
        with psycopg.connect(dsn) as other:
            other.execute("LOCK TABLE consult.consultation IN ACCESS SHARE MODE")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                store_schema.ensure(conn)
    assert (version_of(conn), conn.execute(CATALOGUE).fetchall()) == (1, before)
    store_schema.ensure(conn)
    assert version_of(conn) == store_schema.SCHEMA_VERSION


def test_a_store_of_a_newer_version_is_refused(new_store):
    dsn, conn = new_store
    store_schema.ensure(conn)
    conn.execute("UPDATE sync.schema_version SET version = 999")
    with pytest.raises(ConfigError, match=r"version 999.*Remedy: install the newer"):
        store_schema.ensure(conn)
    store = store_of(dsn)
    batch = batch_of({"lab_result": lab_results(1, 1, 8)})
    with pytest.raises(ConfigError):
        store.apply([batch], batch.lane)
    assert conn.execute("SELECT count(*) FROM consult.lab_result").fetchone() == (0,)
