"""An emergency during a snapshot does not wait for it (ADR 0024)."""

import random
import time

import pytest

from pipelines.compare import compare
from runners.embedded.campus_b import DATABASE, script
from schemas.batches import Lane
from tests.e2e.test_campus_b import session
from tests.faults.harness import (
    CRITICAL,
    QUICK,
    SOURCE_SETTINGS,
    VITAL,
    Link,
    Network,
    Site,
    seed_of_this_run,
    until,
)
from tests.one_link import OneLink

pytest_plugins = ["tests.fixtures_mariadb"]

ROWS = 4000
LIMITS = QUICK | {"batch_rows": 100, "in_flight_rows": 1000, "snapshot_rows_s": 500}
DIAGNOSIS = (
    "INSERT INTO his.diagnosis (diagnosis_id, mrn, icd10, updated_at) VALUES (%s, %s, 'J06', now())"
)
# Soon enough to show that it overtook what takes 8 s.
SOON_S = 4


@pytest.fixture
def site(tmp_path, make_server) -> Site:
    source = make_server("source", settings=SOURCE_SETTINGS)
    made = Site(tmp_path, source, {"primary": make_server("primary")}, limits=LIMITS)
    with made.hospital() as hospital:
        hospital.execute(VITAL, [1, ROWS])
    return made


def lanes(site: Site, table: str, who: str) -> list[str]:
    """Returns by which lane each row of patients named like this came, those that came."""
    with site.store() as store:
        query = f"SELECT lane FROM consult.{table} WHERE patient_id LIKE %s AND NOT deleted"
        return [lane for (lane,) in store.execute(query, [f"{who}%"])]


def rows_read(site: Site) -> int:
    """Returns how far a running snapshot is; 0 if none runs."""
    running = [row for row in site.facts()["snapshot"] if row["state"] == "running"]
    return running[-1]["rows_read"] if running else 0


def test_emergencies_of_the_log_overtake_the_snapshot(site):
    with site.hospital() as hospital, Link(site.settings(), Network(1)):
        until(lambda: rows_read(site) > 200, 30, "some rows")
        hospital.execute(CRITICAL, ["log", 3])
        hospital.execute(DIAGNOSIS, [1, "log1"])
        hospital.execute(DIAGNOSIS, [2, "other"])
        until(lambda: lanes(site, "lab_result", "log") == ["E"] * 3, SOON_S, "critical values")
        until(lambda: lanes(site, "diagnosis", "log") == ["E"], SOON_S, "a patient's other data")
        assert lanes(site, "diagnosis", "other") == []
        assert 0 < rows_read(site) < ROWS
        site.drain()
    site.prove()
    assert lanes(site, "diagnosis", "other") == ["R"]
    assert site.snapshots() == [("first", "done")]


def test_the_snapshots_own_emergencies_go_ahead_though_the_log_was_first(site):
    """Their places in the log are long behind what the emergency lane has passed by then."""
    with site.hospital() as hospital:
        hospital.execute(CRITICAL, ["old", 2])
        with Link(site.settings(), Network(1)) as link:
            link.hold(Lane.ROUTINE)  # However busy the machine, it is not first.
            until(lambda: rows_read(site) > 200, 30, "some rows")
            assert lanes(site, "lab_result", "old") == []
            hospital.execute(CRITICAL, ["log", 1])
            until(lambda: lanes(site, "lab_result", "log") == ["E"], SOON_S, "the log's")
            until(lambda: len(lanes(site, "lab_result", "old")) == 2, 30, "the snapshot's own")
            link.release(Lane.ROUTINE)
            site.drain()
        assert lanes(site, "lab_result", "old") == ["E"] * 2
    site.prove()


def test_broken_off_at_random_with_emergencies_all_the_time(site):
    seed = seed_of_this_run()
    chance = random.Random(seed)
    with site.hospital() as hospital:
        for number in range(6):
            with Link(site.settings(), Network(seed + number, 0.2, 0.2, 5)):
                until(lambda: rows_read(site), 30, "a snapshot under way")
                hospital.execute(CRITICAL, [f"a{number}-", 5])
                time.sleep(chance.uniform(0, 1))
                hospital.execute(
                    "UPDATE lis.result SET val_num = val_num + 0.1 WHERE mrn LIKE %s",
                    [f"a{chance.randint(0, number)}%"],
                )
                hospital.execute(
                    "DELETE FROM lis.result WHERE mrn = %s", [f"a{chance.randint(0, number)}-1"]
                )
            hospital.execute(CRITICAL, [f"b{number}-", 5])
        with Link(site.settings(), Network(seed, 0.1, 0.1, 4)):
            site.drain()
    site.prove()
    with site.store() as store:
        assert store.execute("SELECT FROM sync.dead_letter").fetchall() == []


PATIENT = (
    "INSERT INTO MS_BRDA (BRID, MZHM, BRXM, XGSJ) SELECT seq, concat(%s, seq), '张三', now()"
    " FROM seq_{0}_to_{1}"
)
KALIUM = (
    "INSERT INTO JYJG (JYXH, BRID, XMDM, JG, DW, JGZT, BGSJ, XGSJ)"
    " VALUES (%s, %s, 'KAL', '8.1', 'mmol/L', 1, date_format(now(), '%%Y%%m%%d%%H%%i%%s'), now())"
)


def test_results_of_a_gbk_campus_find_their_patients_meanwhile(make_mariadb, database, tmp_path):
    """By rows of the snapshot that are in the store, and by rows of the log that are not yet."""
    server = make_mariadb()
    with session(server.dsn("mysql"), "utf8mb4") as cursor:
        for statement in script():
            cursor.execute(statement)
    source = {"kind": "mariadb", "dsn": server.dsn(DATABASE), "mapping": "mariadb_his_gbk"}
    campus = OneLink(tmp_path, database, "east", source, limits=LIMITS)

    def execute(statement: str, *values) -> None:
        with session(server.dsn(DATABASE), "gbk") as cursor:
            cursor.execute(f"USE {DATABASE}")
            cursor.execute(statement, values)
            cursor.execute("COMMIT")

    execute(PATIENT.format(1, 3000), "M")
    execute("INSERT INTO HL_SMTZ (CJXH, BRID) SELECT seq, 1 FROM seq_1_to_3000")

    def urgent() -> set[str | None]:
        rows = campus.ask("SELECT patient_id FROM consult.lab_result WHERE lane = 'E'")
        return {patient for (patient,) in rows}

    def state() -> tuple[str, int]:
        return (campus.ask("SELECT state, rows_read FROM sync.snapshot") or [("", 0)])[-1]

    with Link(campus.settings, Network(1)):
        until(lambda: state()[1] > 3100, 30, "the patients")
        execute(KALIUM, 1, 7)
        execute(PATIENT.format(4000, 4000), "N")
        execute(KALIUM, 2, 4000)
        until(lambda: urgent() == {"M7", "N4000"}, SOON_S, "critical values of known patients")
        assert state()[0] == "running"
        until(lambda: state()[0] == "done", 60, "the snapshot")
        until(
            lambda: campus.ask("SELECT FROM consult.patient WHERE patient_id = 'N4000'"), 30, "log"
        )
        until(lambda: not urgent(), 30, "the routine copies")
    assert compare(campus.config).equal
