"""A ten-year-old GBK campus end to end: MariaDB's binlog into a real store, killed and compared."""

import argparse
import itertools
import json
import pathlib

import pytest

from pipelines.compare import compare
from pipelines.sla_report import Observer
from pipelines.source_clocks import log_end
from runners.codes import codes
from runners.embedded.campus_b import MariaDbDialect, script
from runners.embedded.mariadb import MariaDbServer
from runners.preflight import Severity, check
from schemas.clocks import wall_clock_us
from schemas.reports import State
from tests.faults.harness import Link, Network, until
from tests.one_link import OneLink
from tests.unit.test_dialects import tell
from transforms.capture.mariadb.places import border_at
from transforms.capture.mariadb.state import state

pytest_plugins = ["tests.fixtures_mariadb"]

CAMPUS_B = (
    "CREATE TABLE MS_BRDA(BRID INT PRIMARY KEY, MZHM VARCHAR(12), BRXM VARCHAR(20),"
    " BRXB VARCHAR(4), CSNY VARCHAR(10), SFZH VARCHAR(18), JTDH VARCHAR(30), XGSJ DATETIME)",
    "CREATE TABLE JYJG(JYXH BIGINT PRIMARY KEY, BRID INT, XMDM VARCHAR(10), JG VARCHAR(40),"
    " ZFPB TINYINT)",
)
MAPPING = """\
version: 1
description: A GBK HIS, its patients and results
zone: +08:00
code_lists:
  sex: {codes: {1: 1, 2: 2, 男: 1, 女: 2}}
tables:
  his.MS_BRDA:
    table: patient
    id: BRID
    columns:
      patient_id: MZHM
      name: BRXM
      sex: {from: BRXB, codes: sex}
      birth_date: {from: CSNY, formats: ['%Y.%m.%d', '%Y-%m-%d']}
      id_no: SFZH
      phone: JTDH
      updated_at: XGSJ
    absent: [abo, allergies, rh]
  his.JYJG:
    table: lab_result
    id: JYXH
    parent: {table: his.MS_BRDA, by: BRID}
    columns:
      patient_id: {parent: patient_id}
      item_code: XMDM
      value_text: JG
    deleted_when: {column: ZFPB, values: [1]}
    absent: [collected_at, comparator, critical, flag, item_name, raw_unit, raw_value,
             reference_high, reference_low, reported_at, status, unit, updated_at, value, visit_no]
"""
PATIENT = "INSERT INTO MS_BRDA VALUES (%s, %s, %s, %s, '1966.3.5', NULL, '13800000000', now())"
RESULT = "INSERT INTO JYJG VALUES (%s, %s, 'K', %s, 0)"


class Campus(OneLink):
    """The server, its database, the store and the link between them."""

    def __init__(self, server: MariaDbServer, store: str, folder: pathlib.Path, mapping: str):
        self.server = server
        source = {"kind": "mariadb", "dsn": server.dsn("his"), "mapping": mapping}
        super().__init__(folder, store, "east", source, {"campus_b.yaml": MAPPING})

    def execute(self, *statements: str, rows: list[tuple] | None = None) -> None:
        with self.server.connect("his") as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.executemany(statement, rows) if rows else cursor.execute(statement)
            connection.commit()

    def drain(self) -> None:
        end = log_end(self.config.sources["east"]).lsn
        reached = (
            f"SELECT FROM sync.progress WHERE lane = 'routine' AND lsn >= {end} AND NOT EXISTS"
            " (SELECT FROM sync.snapshot WHERE state = 'running') AND NOT EXISTS"
            " (SELECT FROM sync.island)"
        )
        until(lambda: self.ask(reached), 90, lambda: str(self.ask("SELECT * FROM sync.progress")))


@pytest.fixture
def campus(make_mariadb, database, tmp_path):
    server = make_mariadb()
    server.create_database("his")
    made = Campus(server, database, tmp_path, "campus_b.yaml")
    made.execute(*CAMPUS_B)
    return made


def test_is_equal_after_kills_and_loss(campus, capsys):
    """Snapshot, GBK text, late parents, voided rows, a killed server and a lossy network."""
    campus.execute(PATIENT, rows=[(i, f"B{i}", f"张{i}", "男") for i in range(500)])
    campus.execute(RESULT, rows=[(i, i % 600, "6.8") for i in range(2000)])
    assert not [f for f in check(campus.config) if f.severity is Severity.ERROR]
    with Link(campus.settings, Network(7, lost=0.2, repeated=0.2, waiting=4)):
        campus.drain()
        campus.execute(PATIENT, rows=[(i, f"B{i}", "欧阳", "不明") for i in range(500, 600)])
        campus.execute("UPDATE JYJG SET JG = '阴性(-)' WHERE MOD(JYXH, 3) = 0")
        campus.server.kill()
        campus.server.restart()
        campus.execute("UPDATE JYJG SET ZFPB = 1 WHERE JYXH < 100")
        campus.execute("UPDATE MS_BRDA SET MZHM = 'B0-new' WHERE BRID = 0")
        campus.execute("DELETE FROM JYJG WHERE JYXH >= 1900")
        campus.drain()
    with Observer(campus.config) as observer:
        (view,) = observer.view(wall_clock_us()).links
    assert (view.health.state, view.health.backlog_bytes) == (State.UP, 0), view.health
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, comparison
    assert comparison.rows > 4000
    unknown = "SELECT campus, code_list, code, column_name FROM sync.unknown_code"
    assert campus.ask(unknown) == [("east", "sex", "不明", "BRXB")]
    assert codes(argparse.Namespace(config=campus.folder / "campuses.yaml", json=True)) == 1
    assert json.loads(capsys.readouterr().out)[0]["code"] == "不明"
    (waiting,) = campus.ask("SELECT count(*) FROM consult.lab_result WHERE patient_id IS NULL")
    assert waiting == (0,)
    results = "SELECT patient_id, value_text FROM consult.lab_result WHERE record_id = '600'"
    assert campus.ask(results) == [("B0-new", "阴性(-)")]
    live = campus.ask("SELECT count(*) FROM consult.lab_result WHERE NOT deleted")
    assert live == [(1800,)]
    (counts,) = campus.ask(
        "SELECT captured, delivered + duplicates + superseded + held + dead FROM sync.progress"
        " WHERE lane = 'routine'"
    )
    assert counts[0] == counts[1]


SNAPSHOTS = "SELECT reason, state FROM sync.snapshot ORDER BY started_at"


def _begin_log_anew(campus, past_lsn: int) -> None:
    """RESET MASTER, then other transactions until the log has grown past a place of the old one."""
    campus.execute("RESET MASTER", "SET SESSION gtid_seq_no = 5000")
    i = 10_000
    while border_at(state(campus.server.dsn("his")).log_end_lsn) <= past_lsn:
        campus.execute(PATIENT, rows=[(i + n, f"C{i + n}", "赵六", "女") for n in range(50)])
        i += 50


@pytest.mark.parametrize("idle", [False, True])
def test_a_log_begun_anew_is_a_gap_to_a_new_process(campus, idle):
    """It has grown past our place, and nobody was there to see: what is beside the ledger tells."""
    campus.execute(PATIENT, rows=[(i, f"B{i}", "李四", "女") for i in range(20)])
    with Link(campus.settings):
        campus.drain()
        if not idle:
            campus.execute("UPDATE MS_BRDA SET BRXM = '李思' WHERE BRID < 5")
            campus.drain()
        noted = "SELECT FROM sync.anchor WHERE gtid <> ''"
        until(lambda: campus.ask(noted), 30, lambda: "no anchor")
    with Link(campus.settings):  # The same log is recognised.
        campus.execute("DELETE FROM MS_BRDA WHERE BRID = 19")
        campus.drain()
    assert campus.ask(SNAPSHOTS) == [("first", "done")]
    campus.execute("DELETE FROM MS_BRDA WHERE BRID = 18")  # Nobody reads this before it is gone.
    (reached,) = campus.ask("SELECT max(lsn) FROM sync.progress")
    (anchor,) = campus.ask("SELECT lsn FROM sync.anchor")
    _begin_log_anew(campus, max(*reached, *anchor))
    with Link(campus.settings):
        campus.drain()
        campus.execute("UPDATE MS_BRDA SET BRXM = '李四' WHERE BRID = 1")
        campus.drain()
    assert campus.ask(SNAPSHOTS) == [("first", "done"), ("slot_invalidated", "done")]
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, comparison
    gone = "SELECT record_id FROM consult.patient WHERE deleted ORDER BY 1"
    assert campus.ask(gone) == [("18",), ("19",)]


def test_a_shorter_log_is_another_one_once_a_person_says_so(campus, caplog, monkeypatch):
    monkeypatch.setattr("pipelines.link_health._SEEN_BY_US", 0)
    campus.execute(PATIENT, rows=[(i, f"B{i}", "李四", "女") for i in range(20)])
    campus.execute(*["UPDATE MS_BRDA SET XGSJ = now()"] * 3)
    with Link(campus.settings):
        campus.drain()
    campus.execute("RESET MASTER", "DELETE FROM MS_BRDA WHERE BRID > 17")
    with Link(campus.settings):
        until(lambda: "raise the source's `generation`" in caplog.text, 30, "the refusal")
        with Observer(campus.config) as observer:
            (view,) = observer.view(wall_clock_us()).links
        assert view.health.state is State.DOWN and "`generation`" in view.health.why
    campus.configure(generation=1)
    for name in ("李思", "王五"):
        with Link(campus.settings):
            campus.drain()
            campus.execute(f"UPDATE MS_BRDA SET BRXM = '{name}' WHERE BRID = 1")
            campus.drain()
    assert campus.ask(SNAPSHOTS) == [("first", "done"), ("new_log", "done")]
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, comparison
    gone = "SELECT record_id FROM consult.patient WHERE deleted ORDER BY 1"
    assert campus.ask(gone) == [("18",), ("19",)]
    with Observer(campus.config) as observer:
        (view,) = observer.view(wall_clock_us()).links
    assert view.health.backlog_bytes == 0, view.health


def test_every_entity_of_the_packaged_campus_b_is_equal(make_mariadb, database, tmp_path):
    """What its programs do all day, read while they do it, over a network that loses batches."""
    server = make_mariadb()
    with server.connect("mysql") as connection, connection.cursor() as cursor:
        for statement in script():
            cursor.execute(statement)
    campus = Campus(server, database, tmp_path, "mariadb_his_gbk")
    told = tell("old", True, MariaDbDialect(), 47, 60)
    dialect = MariaDbDialect()
    transactions = [dialect.transaction(step) for step in told.steps]
    third = len(transactions) // 3
    with server.connect("his") as connection, connection.cursor() as cursor:

        def work(some: list) -> None:
            for statement, parameters in itertools.chain.from_iterable(some):
                cursor.execute(statement, parameters)

        work(transactions[:third])
        with Link(campus.settings, Network(3, lost=0.2, repeated=0.2, waiting=4)):
            work(transactions[third : 2 * third])
            campus.drain()
        with Link(campus.settings):
            work(transactions[2 * third :])
            campus.drain()
    comparison = compare(campus.config, show_keys=True)
    assert comparison.equal, [match for match in comparison.tables if not match.equal]
    filled = {match.table for match in comparison.tables if match.source_rows}
    assert len(filled) >= 12, filled
    assert campus.ask("SELECT count(*) FROM sync.dead_letter") == [(0,)]
