"""Readings of a snapshot that are broken off again and again: nothing lost, nothing read twice."""

import contextlib
import random
import time

import pytest

from pipelines.compare import compare
from pipelines.sla_report import Observer
from runners.embedded.mariadb import MariaDbServer
from schemas.clocks import wall_clock_us
from tests.e2e.test_mariadb_link import CAMPUS_B, Campus
from tests.faults.harness import (
    QUICK,
    SOURCE_SETTINGS,
    Link,
    Network,
    Site,
    drop_slot,
    seed_of_this_run,
    until,
)
from tests.faults.test_gaps import resumes
from transforms.capture.postgresql import slots

pytest_plugins = ["tests.fixtures_mariadb"]

LIMITS = QUICK | {
    "batch_rows": 200,
    "in_flight_rows": 1000,
    "snapshot_rows_s": 3000,
    "spool_memory_bytes": 8_000_000,
}
ROWS = 6000
# By number, by text in the database's own order, and by two columns.
FILL = (
    "INSERT INTO his.vital_sign (vital_id, mrn, pulse, measured_at)"
    f" SELECT g * 7 %% 100003, 'P' || g %% 50, 70, now() FROM generate_series(1, {ROWS}) g",
    "INSERT INTO his.visit (visit_no, mrn, dept, updated_at)"
    " SELECT CASE g %% 3 WHEN 0 THEN 'v' WHEN 1 THEN 'V-' ELSE '门\\' END || g, 'P1', '内科', now()"
    f" FROM generate_series(1, {ROWS}) g",
    "INSERT INTO his.prescription (rx_no, line_no, mrn, dose, updated_at)"
    f" SELECT 'R' || g / 4, g %% 4, 'P2', g, now() FROM generate_series(1, {ROWS}) g",
    "INSERT INTO emr.document (doc_id, mrn, title, content, updated_at)"
    " SELECT g, 'P3', 't', (SELECT string_agg(md5(g * 100 + i || ''), '')"
    " FROM generate_series(1, 100) i), now() FROM generate_series(1, 1500) g",
)


@pytest.fixture
def site(tmp_path, make_server) -> Site:
    source = make_server("source", settings=SOURCE_SETTINGS)
    made = Site(tmp_path, source, {"primary": make_server("primary")}, limits=LIMITS)
    with made.hospital() as hospital:
        for statement in FILL:
            hospital.execute(statement, [])
        hospital.execute("ANALYZE")
    return made


def meddle(hospital, chance: random.Random) -> None:
    """Changes rows that were read, are being read and are not yet; texts out of line stay."""
    numbers = [chance.randrange(1500) for _ in range(20)]
    for statement in (
        "UPDATE emr.document SET title = title || 'x' WHERE doc_id = ANY (%s)",
        "DELETE FROM emr.document WHERE doc_id = ANY (%s) AND doc_id %% 3 = 0",
        "UPDATE emr.document SET doc_id = doc_id + 10000 WHERE doc_id = ANY (%s)"
        " AND doc_id %% 5 = 1",
        "UPDATE his.prescription SET dose = dose + 1 WHERE dose = ANY (%s)",
        "DELETE FROM his.vital_sign WHERE vital_id = ANY (%s)",
        "UPDATE his.vital_sign SET vital_id = -vital_id WHERE vital_id %% 1000 = ANY (%s)",
        "INSERT INTO his.visit (visit_no, mrn, updated_at) SELECT 'new' || n, 'P9', now()"
        " FROM unnest(%s::int[]) n ON CONFLICT DO NOTHING",
    ):
        hospital.execute(statement, [numbers])


def waiting(site: Site, state: str) -> list[str]:
    told = "SELECT detail FROM sync.incident WHERE kind = 'snapshot_waits' AND state = %s"
    with site.store() as store:
        return [detail for (detail,) in store.execute(told, [state])]


@pytest.mark.parametrize("prepared", [False, True], ids=["session", "prepared"])
def test_a_source_that_lets_no_snapshot_begin_is_told_of(site, prepared):
    """A new slot waits for every transaction that has written, also for one that was forgotten."""
    with site.hospital(autocommit=False, application_name="ward") as forgotten:
        forgotten.execute("UPDATE his.vital_sign SET pulse = 71 WHERE vital_id = 7")
        if prepared:
            forgotten.execute("PREPARE TRANSACTION 'forgotten'")
        who = "a prepared one" if prepared else f"session {forgotten.info.backend_pid} (ward)"
        for _ in range(2):
            with Link(site.settings()):
                until(lambda: waiting(site, "open"), 60, "the incident")
                began = time.monotonic()
            assert time.monotonic() - began < 20  # It ends, though the source does not answer.
            (told,) = waiting(site, "open")
            assert f"the snapshot waits for the transaction of {who}" in told
            assert not slots.state(site.config.sources["main"].dsn, site.settings().slot).exists
        with Observer(site.config) as observer:
            view = observer.view(wall_clock_us())
        assert [one.detail for one in view.incidents] == [told]
        if prepared:
            forgotten.commit()
            with site.hospital() as hospital:
                hospital.execute("COMMIT PREPARED 'forgotten'")
    with Link(site.settings()):
        until(lambda: site.snapshots() == [("first", "done")], 60, "the snapshot")
        assert waiting(site, "open") == []
        site.drain()
    site.prove()


def read(site: Site) -> int:
    snapshots = site.facts()["snapshot"]
    return snapshots[-1]["rows_read"] if snapshots else 0


def test_readings_broken_off_at_random(site):
    """Each time another part of it is under way, applied apart from the rest, or lost."""
    seed = seed_of_this_run()
    chance = random.Random(seed)
    with site.hospital() as hospital:
        for number in range(8):
            with Link(site.settings(), Network(seed + number, 0.2, 0.2, 5)):
                before = read(site)
                until(lambda before=before: read(site) > before or done(site), 60, "some rows")
                time.sleep(chance.uniform(0, 0.5))
                meddle(hospital, chance)
            meddle(hospital, chance)
        with Link(site.settings(), Network(seed, 0.1, 0.1, 4)):
            site.drain()
            meddle(hospital, chance)
            site.drain()
    site.prove()
    assert site.snapshots() == [("first", "done")]
    assert resumes(site) >= 4
    with site.store() as store:
        letters = store.execute("SELECT reason, count(*) FROM sync.dead_letter GROUP BY 1")
        assert letters.fetchall() == []
    assert site.captured() < 3 * read(site)


def done(site: Site) -> bool:
    return site.snapshots()[-1:] == [("first", "done")]


@pytest.mark.parametrize("why", ["slot dropped", "table left the publication"])
def test_a_log_with_a_hole_cannot_be_gone_on_with(site, why):
    with Link(site.settings(), Network(1)):
        until(lambda: read(site) > 2000, 60, "some rows")
    if why == "slot dropped":
        slot = site.settings().slot
        dsn = site.config.sources["main"].dsn
        drop_slot(dsn, slot, 10)
    else:
        with site.administrator() as administrator:
            administrator.execute("ALTER PUBLICATION campus_sync DROP TABLE his.visit")
            administrator.execute("DELETE FROM his.visit WHERE dept IS NOT NULL")
            administrator.execute("ALTER PUBLICATION campus_sync ADD TABLE his.visit")
    with site.hospital() as hospital:
        hospital.execute("DELETE FROM his.vital_sign WHERE pulse = 70 AND vital_id %% 2 = 0", [])
    with Link(site.settings(), Network(1)):
        site.drain()
    site.prove()
    assert [reason for reason, _ in site.snapshots()] == ["first", "interrupted"]
    assert resumes(site) == 0


def test_campus_b(make_mariadb, database, tmp_path):
    """The same of a GBK MariaDB, whose results find their patients by a key (ADR 0014)."""
    server: MariaDbServer = make_mariadb()
    server.create_database("his")
    campus = Campus(server, database, tmp_path, "campus_b.yaml")
    campus.execute(*CAMPUS_B)
    patients = [(i, f"B{i}", f"张{i}", "男", "1966.3.5", None, None, None) for i in range(1000)]
    campus.execute("INSERT INTO MS_BRDA VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", rows=patients)
    results = [(i, i % 1000, "K", "6.8", 0) for i in range(ROWS)]
    campus.execute("INSERT INTO JYJG VALUES (%s, %s, %s, %s, %s)", rows=results)
    seed = seed_of_this_run()
    chance = random.Random(seed)
    settings = campus.settings
    limits = type(settings.limits)(**LIMITS)
    settings = type(settings)(**{**vars(settings), "limits": limits})

    def progress() -> tuple[int, int]:
        rows = campus.ask("SELECT rows_read, resumes FROM sync.snapshot")
        return rows[0] if rows else (0, 0)

    with contextlib.closing(server.connect("his")) as connection, connection.cursor() as cursor:
        for number in range(5):
            with Link(settings, Network(seed + number, 0.2, 0.2, 5)):
                before = progress()[0]
                until(lambda before=before: progress()[0] > before or before > ROWS, 60, "rows")
                time.sleep(chance.uniform(0, 0.3))
                numbers = tuple(chance.randrange(ROWS) for _ in range(30))
                cursor.execute("UPDATE JYJG SET JG = '阴性' WHERE JYXH IN %s", [numbers])
                cursor.execute("DELETE FROM JYJG WHERE JYXH IN %s AND MOD(JYXH, 3) = 0", [numbers])
                cursor.execute("UPDATE IGNORE JYJG SET JYXH = -JYXH WHERE JYXH IN %s", [numbers])
        with Link(settings, Network(seed, 0.1, 0.1, 4)):
            campus.drain()
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, comparison
    assert campus.ask("SELECT reason, state FROM sync.snapshot") == [("first", "done")]
    assert progress()[1] >= 3
    assert campus.ask("SELECT FROM sync.dead_letter") == []
