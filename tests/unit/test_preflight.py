"""Preflight against real servers: what is found, and that each pasted remedy makes it vanish."""

import base64
import contextlib
import pathlib
import time

import psycopg
import pytest

import runners.embedded
from runners.embedded.postgres import PostgresServer
from runners.preflight import Finding, Severity, check
from schemas.config import Config, load
from schemas.mappings import load_mapping
from tests.faults.harness import drop_slots

HOSPITAL = pathlib.Path(runners.embedded.__file__).with_name("hospital.sql").read_text()
MAKE_SLOT = "SELECT pg_create_logical_replication_slot('campus_sync_main_primary', 'pgoutput')"
TABLES = sorted(load_mapping("postgresql_his").tables)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = {"max_replication_slots": 4, "max_wal_senders": 4, "max_slot_wal_keep_size": "1GB"}
    path = tmp_path_factory.mktemp("preflight") / "server"
    with PostgresServer(path, settings=settings, durable=False) as server:
        with server.connect() as connection:
            connection.execute("CREATE ROLE sync LOGIN REPLICATION")
            connection.execute("CREATE ROLE weak LOGIN")
        yield server


@pytest.fixture
def world(server, tmp_path):
    """A source and a store as they should be; yields (config maker, source connection)."""
    with server.connect() as connection:
        for name in ("his", "consult"):
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {name}")
        connection.execute("GRANT CREATE, TEMPORARY ON DATABASE consult TO sync")
    key = tmp_path / "dead-letter.key"
    key.write_text(base64.b64encode(bytes(32)).decode())
    key.chmod(0o600)

    def config(user: str = "sync", text: str = "") -> Config:
        path = tmp_path / "campuses.yaml"
        path.write_text(
            f"""\
version: 1
sources:
  main: {{kind: postgresql, dsn: "{server.dsn("his", user)}", mapping: postgresql_his}}
stores:
  primary: {{dsn: "{server.dsn("consult", user)}"}}
dead_letter_key: "file:dead-letter.key"
{text}"""
        )
        return load(path)

    with server.connect("his") as connection:
        connection.execute(HOSPITAL)
        connection.execute("GRANT USAGE ON SCHEMA his, lis, emr TO sync")
        for schema in ("his", "lis", "emr"):
            connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO sync")
        connection.execute(f"CREATE PUBLICATION campus_sync FOR TABLE {', '.join(TABLES)}")
        yield config, connection
        drop_slots(connection)
        physical = "SELECT slot_name FROM pg_replication_slots WHERE database IS NULL"
        connection.execute(f"SELECT pg_drop_replication_slot(slot_name) FROM ({physical}) AS s")
        connection.execute("ALTER ROLE sync REPLICATION")


def serious(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != Severity.NOTE]


def one(findings: list[Finding], part: str) -> Finding:
    found = [finding for finding in findings if part in finding.what]
    assert len(found) == 1, findings
    return found[0]


def test_a_world_as_it_should_be(world):
    config, _ = world
    findings = check(config())
    assert serious(findings) == []
    assert one(findings, "no slot campus_sync_main_primary yet").severity == Severity.NOTE


# How it is spoilt, what is found; the remedy is SQL that the test pastes into the source.
REPAIRED_BY_ITS_REMEDY = {
    "no publication": ("DROP PUBLICATION campus_sync", "no publication campus_sync"),
    "table not published": (
        "ALTER PUBLICATION campus_sync DROP TABLE lis.result",
        "lis.result is mapped and not in publication",
    ),
    "kinds left out": (
        "ALTER PUBLICATION campus_sync SET (publish = 'insert, update')",
        "leaves out some kinds of change",
    ),
    "row filter": (
        "ALTER PUBLICATION campus_sync DROP TABLE emr.document; ALTER PUBLICATION campus_sync"
        " ADD TABLE emr.document WHERE (doc_id > 5)",
        "filters the rows of emr.document",
    ),
    "no primary key": (
        "ALTER TABLE his.vital_sign DROP CONSTRAINT vital_sign_pkey",
        "his.vital_sign has no primary key",
    ),
    "replica identity nothing": (
        "ALTER TABLE his.visit REPLICA IDENTITY NOTHING",
        "his.visit has no primary key",
    ),
    "other replica identity": (
        "ALTER TABLE his.patient REPLICA IDENTITY USING INDEX patient_mrn_key",
        "a delete carries only (mrn), the mapping's id is (pid)",
    ),
    "unlogged": (
        "ALTER PUBLICATION campus_sync DROP TABLE his.diagnosis;"
        "ALTER TABLE his.diagnosis SET UNLOGGED",
        "his.diagnosis is not in the log",
    ),
    "no select": ("REVOKE SELECT ON lis.result FROM sync", "lis.result may not be read"),
    "no replication": ("ALTER ROLE sync NOREPLICATION", "sync may not replicate"),
}


@pytest.mark.parametrize("case", REPAIRED_BY_ITS_REMEDY)
def test_the_pasted_remedy_repairs(world, case):
    config, source = world
    spoil, what = REPAIRED_BY_ITS_REMEDY[case]
    source.execute(spoil)
    if case == "replica identity nothing":
        finding = one(check(config()), what)
        source.execute("ALTER TABLE his.visit REPLICA IDENTITY FULL")
        assert "REPLICA IDENTITY FULL" in finding.remedy
    else:
        finding = one(check(config()), what)
        source.execute(finding.remedy)
    assert finding.severity == Severity.ERROR
    assert finding.place == "source main"
    if case == "unlogged":
        source.execute("ALTER PUBLICATION campus_sync ADD TABLE his.diagnosis")
    assert serious(check(config())) == []


def test_columns_are_held_against_the_mapping(world):
    config, source = world
    source.execute("ALTER TABLE his.patient ADD COLUMN nickname text, DROP COLUMN phone")
    findings = check(config())
    assert one(findings, "his.patient.phone: missing column").severity == Severity.ERROR
    assert one(findings, "his.patient.nickname: unknown column").severity == Severity.WARNING


def test_a_column_list_that_leaves_out_a_mapped_column_is_found(world):
    config, source = world
    source.execute("ALTER PUBLICATION campus_sync DROP TABLE his.visit")
    source.execute("ALTER PUBLICATION campus_sync ADD TABLE his.visit (visit_no, mrn)")
    assert one(check(config()), "his.visit.triage_level: missing column").severity == "error"


def test_a_mapped_table_that_is_not_there(world):
    config, source = world
    source.execute("DROP TABLE his.consultation")
    assert one(check(config()), "his.consultation is mapped and does not exist")


def test_long_values_are_warned_of(world):
    config, source = world
    source.execute(
        "INSERT INTO emr.document (doc_id, mrn, content, updated_at) SELECT 1, 'M1',"
        " string_agg(md5(i::text), '') , now() FROM generate_series(1, 400) i"
    )
    finding = one(check(config()), "long values of emr.document")
    assert finding.severity == Severity.WARNING
    source.execute(finding.remedy)
    assert not [f for f in check(config()) if "long values" in f.what]


def test_rights_in_the_store(world, server):
    config, _ = world
    with server.connect() as connection:
        connection.execute("REVOKE CREATE ON DATABASE consult FROM sync")
        connection.execute("REVOKE TEMPORARY ON DATABASE consult FROM sync, PUBLIC")
        findings = check(config())
        for what in ("may not create the schema", "may not make temporary tables"):
            finding = one(findings, what)
            assert finding.place == "store primary"
            connection.execute(finding.remedy)
    assert serious(check(config())) == []


def test_a_newer_store_schema_is_refused(world, server):
    config, _ = world
    with server.connect("consult") as connection:
        connection.execute("CREATE SCHEMA sync CREATE TABLE schema_version (version int)")
        connection.execute("CREATE SCHEMA consult")
        connection.execute("GRANT ALL ON SCHEMA sync, consult TO sync")
        connection.execute("GRANT ALL ON sync.schema_version TO sync")
        connection.execute("INSERT INTO sync.schema_version VALUES (999)")
    assert one(check(config()), "its schema is version 999").severity == Severity.ERROR


def test_a_foreign_slot_and_slots_that_do_not_suffice(world, server):
    config, source = world
    source.execute(MAKE_SLOT)
    assert serious(check(config())) == []
    for i in range(3):
        source.execute("SELECT pg_create_physical_replication_slot(%s)", (f"other_{i}",))
    assert serious(check(config())) == []
    source.execute("SELECT pg_drop_replication_slot('campus_sync_main_primary')")
    source.execute("SELECT pg_create_physical_replication_slot('campus_sync_main_primary')")
    finding = one(check(config()), "is not ours")
    source.execute(finding.remedy)
    source.execute("SELECT pg_create_physical_replication_slot('other_3')")
    finding = one(check(config()), "max_replication_slots (4) leaves room for 0, its links need 1")
    assert "max_replication_slots = 5" in finding.remedy


def test_a_slot_in_use_is_noted(world, server):
    config, source = world
    source.execute(MAKE_SLOT)
    dsn = server.dsn("his", "sync")
    with contextlib.closing(
        psycopg.connect(dsn, autocommit=True, replication="database")
    ) as stream:
        stream.pgconn.exec_(
            b"START_REPLICATION SLOT campus_sync_main_primary LOGICAL 0/0"
            b" (proto_version '1', publication_names 'campus_sync')"
        )
        assert one(check(config()), "is in use by process").severity == Severity.NOTE


def test_a_source_that_is_down_is_told_fast_and_without_a_password(world, tmp_path):
    config, _ = world
    good = config()
    # 192.0.2.0/24 is nobody's: packets vanish, as behind a firewall.
    source = good.sources["main"].model_copy(update={"dsn": "host=192.0.2.1 dbname=his user=sync"})
    store = good.stores["primary"].model_copy(update={"dsn": "host=127.0.0.1 port=9 dbname=c"})
    bad = good.model_copy(update={"sources": {"main": source}, "stores": {"primary": store}})
    began = time.monotonic()
    findings = check(bad)
    assert time.monotonic() - began < 4
    assert one(findings, "sync@192.0.2.1/his cannot be reached").severity == Severity.ERROR
    assert "psql" in one(findings, "127.0.0.1:9/c cannot be reached").remedy


def test_a_skewed_clock_is_told(world):
    config, _ = world
    findings = check(config(), wall_clock=lambda: time.time() - 7)
    assert len([f for f in findings if "clock is 7.0 s ahead" in f.what]) == 2
    assert all(f.severity == Severity.WARNING for f in serious(findings))


def test_the_key_and_its_rights(world, tmp_path):
    config, _ = world
    key = tmp_path / "dead-letter.key"
    key.chmod(0o644)
    assert one(check(config()), "others may read the dead letters' key").severity == "warning"
    key.write_text("short")
    assert one(check(config()), "is not 32 bytes in base64")
    key.unlink()
    assert "openssl rand" in one(check(config()), "is missing or cannot be read").remedy


def test_settings_of_a_server_that_was_never_prepared(tmp_path):
    settings = {"wal_level": "replica"}
    with PostgresServer(tmp_path / "server", settings=settings, durable=False) as server:
        server.create_database("his")
        server.create_database("consult")
        path = tmp_path / "campuses.yaml"
        path.write_text(
            f"""\
version: 1
sources: {{main: {{kind: postgresql, dsn: "{server.dsn("his")}", mapping: postgresql_his}}}}
stores: {{primary: {{dsn: "{server.dsn("consult")}"}}}}
dead_letter_key: "env:CAMPUS_SYNC_TEST_NO_SUCH_KEY"
"""
        )
        findings = check(load(path))
    assert "wal_level = 'logical'" in one(findings, "wal_level is replica").remedy
    assert one(findings, "max_slot_wal_keep_size has no limit").severity == Severity.WARNING
    assert findings == sorted(findings, key=lambda f: list(Severity).index(f.severity))
    assert findings[0].to_dict().keys() == {"severity", "place", "what", "remedy"}
