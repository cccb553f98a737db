"""Chinese text from every kind of source to the store, and back to who reads or writes GBK."""

import psycopg
import pyarrow as pa
import pymysql
import pytest
from psycopg.conninfo import make_conninfo

from tests.chinese_cases import CASES
from tests.debezium_events import field
from tests.e2e.test_mariadb_link import Campus
from tests.faults.harness import SOURCE_SETTINGS, Link, Site, until
from tests.unit.test_debezium_types import decode_one
from transforms.harmonise.damaged_text import Damage, damage_of
from transforms.harmonise.gbk import for_gbk

pytest_plugins = ["tests.fixtures_mariadb"]
TABLE = (
    "CREATE TABLE MS_BRDA(BRID INT PRIMARY KEY, MZHM VARCHAR(12), BRXM TEXT CHARACTER SET {},"
    " BRXB VARCHAR(4), CSNY VARCHAR(10), SFZH VARCHAR(18), JTDH VARCHAR(30), XGSJ DATETIME)"
    " DEFAULT CHARSET=gbk",
    "CREATE TABLE JYJG(JYXH BIGINT PRIMARY KEY, BRID INT, XMDM VARCHAR(10), JG VARCHAR(40),"
    " ZFPB TINYINT)",
)
INSERT = "INSERT INTO MS_BRDA (BRID, BRXM) VALUES (%s, %s)"
NAMES = "SELECT record_id::int, name FROM consult.patient ORDER BY 1"
EXACT = [(number, case.text) for number, case in enumerate(CASES)]


@pytest.fixture
def store(make_server, tmp_path) -> Site:
    """A PostgreSQL campus whose patients have the texts as names, read into a store."""
    site = Site(
        tmp_path,
        make_server("source", settings=SOURCE_SETTINGS),
        {"primary": make_server("primary")},
    )
    insert = "INSERT INTO his.patient (pid, mrn, allergies, updated_at) VALUES (%s, %s, %s, now())"
    with site.hospital() as hospital, hospital.cursor() as cursor:
        rows = [(number, f"P{number}", text) for number, text in EXACT]
        cursor.executemany(insert, rows[::2])
        with Link(site.settings()):
            until(lambda: site.snapshots() == [("first", "done")], 60, "the snapshot")
            cursor.executemany(insert, rows[1::2])
            site.drain()
    site.prove()
    return site


def test_postgresql_to_the_store_and_back_to_gbk_and_gb18030_clients(store):
    """A client's own encoding gives it the exact text, or an error: never another text."""
    query = "SELECT record_id::int, allergies FROM consult.patient ORDER BY 1"
    with store.store() as connection:
        assert connection.execute(query).fetchall() == EXACT
    dsn = store.config.stores["primary"].dsn
    with psycopg.connect(make_conninfo(dsn, client_encoding="GB18030")) as client:
        assert client.execute(query).fetchall() == EXACT
    one = "SELECT allergies FROM consult.patient WHERE record_id = %s"
    with psycopg.connect(make_conninfo(dsn, client_encoding="GBK"), autocommit=True) as client:
        for number, case in enumerate(CASES):
            if case.gbk is None:
                assert client.execute(one, [str(number)]).fetchone() == (case.text,), case.label
            else:
                with pytest.raises(psycopg.errors.UntranslatableCharacter):
                    client.execute(one, [str(number)])


@pytest.mark.parametrize("charset", ["gbk", "utf8mb4"])
def test_mariadb_to_the_store_and_back_to_its_own_clients(
    make_mariadb, database, tmp_path, charset
):
    """What GBK cannot hold, the server refuses; what is written instead is what is carried."""
    server = make_mariadb()
    server.create_database("his")
    campus = Campus(server, database, tmp_path, "campus_b.yaml")
    campus.execute(*(statement.format(charset) for statement in TABLE))
    written = {}
    with server.connect("his") as connection, connection.cursor() as cursor:
        cursor.execute("SET sql_mode = 'STRICT_ALL_TABLES'")
        with Link(campus.settings):
            for number, case in enumerate(CASES):
                text = case.text
                if charset == "gbk" and case.gbk is not None:
                    with pytest.raises(pymysql.err.DataError):
                        cursor.execute(INSERT, (number, text))
                    text = for_gbk(text).text
                cursor.execute(INSERT, (number, text))
                written[number] = text
                if number == len(CASES) // 2:
                    campus.drain()  # The first half by log or snapshot, the rest by log.
            campus.drain()
    assert campus.ask(NAMES) == list(written.items())
    if charset == "gbk":
        with server.connect("his", charset="gbk") as client, client.cursor() as cursor:
            cursor.execute("SELECT BRID, BRXM FROM MS_BRDA ORDER BY BRID")
            assert list(cursor.fetchall()) == list(written.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_debezium_events_of_an_oracle(case):
    assert decode_one("oracle", field("c", "string"), case.text) == case.text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_what_a_gbk_end_is_given_and_how_the_text_is_marked(case):
    given = for_gbk(case.text)
    assert given.text == (case.text if case.gbk is None else case.gbk)
    assert "".join(given.lost) == case.lost
    assert given.text.encode("gbk").decode("gbk") == given.text
    assert Damage(int(damage_of(pa.array([case.text]))[0])) == case.damage
