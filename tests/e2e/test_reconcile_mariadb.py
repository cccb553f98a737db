"""Reconciliation of a GBK MariaDB campus: places of a binlog, and rows that lean on a parent."""

import psycopg
import pytest

from pipelines.compare import compare
from pipelines.differences import Ends
from pipelines.reconcile import Task
from runners.embedded.mariadb import MariaDbServer
from runners.reconcile import run_direct, run_task
from schemas.clocks import monotonic_s
from tests.e2e.test_mariadb_link import CAMPUS_B, PATIENT, RESULT, Campus
from tests.faults.harness import Link
from transforms.capture.mariadb.keyed_rows import conditions
from transforms.sign_report import ReportKey

pytest_plugins = ["tests.fixtures_mariadb"]
DAMAGE = (
    "UPDATE consult.patient SET name = '李' WHERE record_id = '7'",
    "DELETE FROM consult.patient WHERE record_id = '8'",
    "UPDATE consult.lab_result SET patient_id = NULL WHERE record_id = '20'",
    "UPDATE consult.lab_result SET record_id = 'ghost' WHERE record_id = '21'",
)


def test_damage_is_mended_twice_at_one_place_of_the_log(make_mariadb, database, tmp_path):
    server = make_mariadb()
    server.create_database("his")
    campus = Campus(server, database, tmp_path, "campus_b.yaml")
    campus.execute(*CAMPUS_B)
    campus.execute(PATIENT, rows=[(i, f"B{i}", f"张{i}", "男") for i in range(100)])
    campus.execute(RESULT, rows=[(i, i % 100, "6.8") for i in range(300)])
    ReportKey(campus.config.report_key).make()
    with Link(campus.settings):
        campus.drain()
        for number in range(2):
            with psycopg.connect(campus.store) as store:
                store.execute("SET session_replication_role = replica")
                for statement in DAMAGE[: 3 if number else 4]:
                    store.execute(statement)
            folder = tmp_path / f"run {number}"
            folder.mkdir()
            made = run_task(campus.config, Task(repair=True), folder, run_direct)
            assert made.sound, made
            assert sum(one.mended for one in made.links) == (3 if number else 5)
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, comparison
    assert campus.ask("SELECT patient_id FROM consult.lab_result WHERE record_id = '20'") == [
        ("B20",)
    ]
    law = "SELECT captured - delivered - duplicates - superseded - held - dead FROM sync.progress"
    assert not any(rest for (rest,) in campus.ask(law))


READ = "SHOW GLOBAL STATUS LIKE 'Rows_read'"


def rows_read(campus: Campus) -> int:
    with campus.server.connect("his") as connection, connection.cursor() as cursor:
        cursor.execute(READ)
        return int(cursor.fetchone()[1])


def test_the_second_pass_reads_the_rows_that_differ_and_their_parents(
    make_mariadb, database, tmp_path
):
    server = make_mariadb()
    server.create_database("his")
    campus = Campus(server, database, tmp_path, "campus_b.yaml")
    campus.execute(*CAMPUS_B)
    campus.execute(PATIENT, rows=[(i, f"B{i}", f"张{i}", "男") for i in range(3000)])
    campus.execute(RESULT, rows=[(i, i % 3000, "6.8") for i in range(30_000)])
    with Link(campus.settings):
        campus.drain()
        with psycopg.connect(campus.store) as store:
            store.execute("SET session_replication_role = replica")
            store.execute(
                "DELETE FROM consult.lab_result WHERE record_id IN ('77', '1500', '29999')"
            )
        ends = Ends(campus.config, 30, monotonic_s)
        first = ends.first_look("east", "lab_result")
        (link,) = ends.links("east")
        ids, _ = first.suspects(link.store)
        assert ids == ["1500", "29999", "77"]
        before = rows_read(campus)
        excuses = ends.excuses(link, "lab_result")
        (found,) = ends.look_closer(link, "lab_result", ids, (), 30_000, excuses)
        assert sorted(found.rows("missing").ids.to_pylist()) == ids
        assert rows_read(campus) - before < 100  # Two looks: 3 results and 3 patients each.


KEYED = (
    "CREATE TABLE whole (id INT PRIMARY KEY)",
    "CREATE TABLE coded (code VARCHAR(20) PRIMARY KEY) CHARACTER SET gbk",
    "CREATE TABLE paired (a DECIMAL(10,2), b VARCHAR(20), c INT, PRIMARY KEY (b, a))"
    " CHARACTER SET gbk",
    "CREATE TABLE bare (id INT)",
    "CREATE TABLE timed (at DATETIME PRIMARY KEY)",
)


@pytest.mark.parametrize(
    ("table", "key", "keys", "wanted"),
    [
        ("whole", ["id"], [["-3"], ["12"], ["1 OR 1"], ["张"]], "type: range, 2 rows"),
        ("coded", ["code"], [["张三"], ["it's"], ["B-\\"]], "type: range, 3 rows"),
        ("paired", ["a", "b"], [["1.50", "张"], ["2.00", "B"]], "type: range, 2 rows"),
        ("bare", ["id"], [["1"]], "TRUE"),
        ("timed", ["at"], [["2026-01-01 00:00:00"]], "TRUE"),
    ],
)
def test_keys_are_found_by_an_index(keyed, table, key, keys, wanted):
    (only,) = conditions(keyed, f"his.{table}", key, keys)
    if wanted == "TRUE":
        assert only == wanted
        return
    columns = ", ".join(key)
    keyed.execute(f"EXPLAIN SELECT {columns} FROM his.{table} FORCE INDEX (PRIMARY) WHERE {only}")
    names = [column[0] for column in keyed.description]
    (plan,) = (dict(zip(names, row, strict=True)) for row in keyed.fetchall())
    assert f"type: {plan['type']}, {plan['rows']} rows" == wanted, plan
    keyed.execute(f"SELECT {columns} FROM his.{table} WHERE {only}")
    found = {tuple(map(str, row)) for row in keyed.fetchall()}
    there = {tuple(part) for part in keys}
    assert found == there & ROWS[table]


ROWS = {
    "whole": {("-3",), ("12",)},
    "coded": {("张三",), ("it's",), ("B-\\",)},
    "paired": {("1.50", "张"), ("2.00", "B")},
}


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory):
    with MariaDbServer(tmp_path_factory.mktemp("keyed") / "server", durable=False) as server:
        server.create_database("his")
        with server.connect("his") as connection, connection.cursor() as cursor:
            for statement in KEYED:
                cursor.execute(statement)
            cursor.execute("INSERT INTO whole SELECT CAST(seq AS SIGNED) - 500 FROM seq_0_to_2000")
            cursor.execute("INSERT INTO coded SELECT concat('C', seq) FROM seq_0_to_2000")
            cursor.execute("INSERT INTO paired SELECT seq, 'B', 1 FROM seq_0_to_2000 WHERE seq > 2")
            cursor.executemany("INSERT INTO coded VALUES (%s)", sorted(ROWS["coded"]))
            cursor.executemany("INSERT INTO paired VALUES (%s, %s, 1)", sorted(ROWS["paired"]))
            connection.commit()
        yield server


@pytest.fixture
def keyed(keyed_server):
    with keyed_server.connect("his") as connection, connection.cursor() as cursor:
        yield cursor
