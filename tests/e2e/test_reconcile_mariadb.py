"""Reconciliation of a GBK MariaDB campus: places of a binlog, and rows that lean on a parent."""

import psycopg

from pipelines.compare import compare
from pipelines.reconcile import Task
from runners.reconcile import run_direct, run_task
from tests.e2e.test_mariadb_link import CAMPUS_B, PATIENT, RESULT, Campus
from tests.faults.harness import Link
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
