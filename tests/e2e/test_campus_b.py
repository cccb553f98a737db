"""Campus B on a real MariaDB: its tables, its programs, its log, and one canonical record."""

import contextlib

import pymysql
import pytest

from runners.embedded.campus_b import DATABASE, MariaDbDialect, script
from schemas.mappings import load_mapping
from tests.e2e.test_capture_mariadb import Capture
from tests.memory_store import MemoryStore
from tests.unit.test_dialects import assert_same, key_of_campus_b, tell
from transforms.capture.mariadb.dsn import parse_dsn
from transforms.harmonise import Harmoniser

pytest_plugins = ["tests.fixtures_mariadb"]

MAPPING = "mariadb_his_gbk"


@contextlib.contextmanager
def session(dsn: str, charset: str):
    server = parse_dsn(dsn)
    connection = pymysql.connect(
        host=server.host, port=server.port, user="root", charset=charset, ssl_disabled=True
    )
    with contextlib.closing(connection), connection.cursor() as cursor:
        yield cursor


@pytest.fixture
def campus_b(make_mariadb) -> str:
    """The connection string of a server of its own with campus B's tables."""
    server = make_mariadb("campus_b")
    with session(server.dsn("mysql"), "utf8mb4") as cursor:
        for statement in script():
            cursor.execute(statement)
    return server.dsn(DATABASE)


def test_events_come_through_the_log_as_they_were(campus_b):
    mapping = load_mapping(MAPPING)
    keys = {name: source.id for name, source in mapping.tables.items()}
    capture = Capture(campus_b, keys).from_here()
    told = tell("old", True, MariaDbDialect(), 31, 40)
    dialect = MariaDbDialect()
    with session(campus_b, "gbk") as cursor:
        for step in told.steps:
            for statement, parameters in dialect.transaction(step):
                cursor.execute(statement, parameters)
    store, harmoniser = MemoryStore(mapping), Harmoniser(mapping)
    for raw in capture.drain():
        done = harmoniser.apply(raw)
        assert (done.rejects, done.notes) == ([], {})
        store.apply(done.tables)
    assert sum(step.rolled_back for step in told.steps)
    counts = assert_same(told, store, True, key_of_campus_b(told))
    assert len(counts) == 12
