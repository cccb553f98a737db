"""A fourth campus by configuration only: a mapping file and an entry in campuses.yaml."""

import contextlib

import psycopg
import pytest
import yaml

from pipelines.compare import compare
from runners.preflight import Severity, check
from runners.run import prepare_stores
from schemas.config import Config, load
from schemas.mappings import PACKAGED
from tests.faults.harness import Link, Network, Site, until

# Another vendor's tables: English abbreviations, one code table of its own, mass units, epochs of
# text, a result whose patient stands in the report, deletion by status.
SOUTH = """
CREATE SCHEMA yy;
CREATE TABLE yy.person (
    person_key varchar(16) PRIMARY KEY, full_nm text, gender char(1), dob char(8), cert_no text,
    mobile text, bld_grp smallint, rec_state char(1) NOT NULL DEFAULT 'A', chg_tm timestamp);
CREATE TABLE yy.report (
    rpt_id int PRIMARY KEY, person_key varchar(16) NOT NULL, enc_no text, smp_tm timestamp);
CREATE TABLE yy.report_line (
    rpt_id int, line smallint, test_abbr varchar(12), res varchar(40), uom varchar(12),
    lo text, hi text, mark char(1), rpt_tm timestamp, PRIMARY KEY (rpt_id, line));
ALTER TABLE yy.person OWNER TO sync; ALTER TABLE yy.report OWNER TO sync;
ALTER TABLE yy.report_line OWNER TO sync; GRANT USAGE ON SCHEMA yy TO sync;
CREATE PUBLICATION yy_out FOR TABLE yy.person, yy.report, yy.report_line
"""
MAPPING = """\
version: 1
description: South campus, a vendor of its own
zone: +08:00
code_lists:
  gender: {codes: {M: 1, F: 2, X: 9}}
  blood: {codes: {10: A, 20: B, 30: O, 40: AB}}
  tests: {codes: {GLUC: 2345-7, HB: 718-7, K: 2823-3}}
  marks: {codes: {'^': H, v: L, '=': N, '!': HH}}
units:
  mass:
    spellings: {mg%: mg/dL, mval/L: mEq/L}
    rules:
      - {item: 2345-7, unit: mg/dL, factor: 0.0555, to_unit: mmol/L, to_item: 14749-6}
      - {item: 718-7, unit: g/dL, factor: 10, to_unit: g/L}
      - {item: 2823-3, unit: mEq/L, factor: 1, to_unit: mmol/L}
tables:
  yy.person:
    table: patient
    id: person_key
    deleted_when: {column: rec_state, values: [D]}
    columns:
      patient_id: person_key
      name: full_nm
      sex: {from: gender, codes: gender}
      birth_date: {from: dob, formats: ['%Y%m%d']}
      id_no: cert_no
      phone: mobile
      abo: {from: bld_grp, codes: blood}
      updated_at: chg_tm
    absent: [rh, allergies]
  yy.report:
    table: lab_report
    id: rpt_id
    columns:
      patient_id: person_key
      visit_no: enc_no
      collected_at: smp_tm
    absent: [name, specimen, status, priority, ordered_by, reported_at, updated_at]
  yy.report_line:
    table: lab_result
    id: [rpt_id, line]
    parent: {table: yy.report, by: rpt_id}
    columns:
      patient_id: {parent: patient_id}
      visit_no: {parent: visit_no}
      collected_at: {parent: collected_at}
      reported_at: rpt_tm
    measurement: {item: test_abbr, items: tests, result: res, unit: uom, low: lo, high: hi,
                  flag: mark, flags: marks, units: mass}
    absent: [item_name, critical, status, updated_at]
"""
ROWS = """
INSERT INTO yy.person VALUES
    ('S-1', '欧阳娜', 'F', '19800229', NULL, '138', 20, 'A', '2026-03-01 08:00'),
    ('S-2', '李䶮', 'M', '19660305', NULL, NULL, 40, 'A', NULL),
    ('S-3', '作废', 'X', NULL, NULL, NULL, NULL, 'D', NULL);
INSERT INTO yy.report VALUES (7, 'S-1', 'E-9', '2026-03-01 07:30');
INSERT INTO yy.report_line VALUES
    (7, 1, 'GLUC', '90', 'mg%', '70', '110', '=', '2026-03-01 08:30'),
    (7, 2, 'K', '<7.1', 'mval/L', '3.5', '5.3', '!', '2026-03-01 08:30'),
    (7, 3, 'HB', '溶血', 'g/dL', NULL, NULL, NULL, '2026-03-01 08:30'),
    (7, 4, 'XYZ', '1', 'U', NULL, NULL, NULL, NULL)
"""
CHANGES = """
UPDATE yy.person SET rec_state = 'D' WHERE person_key = 'S-2';
UPDATE yy.report_line SET res = '126' WHERE line = 1;
INSERT INTO yy.report_line SELECT 8, 1, 'K', '6.9', 'mval/L', NULL, NULL, '!', '2026-03-01 09:00';
INSERT INTO yy.report VALUES (8, 'S-1', 'E-10', '2026-03-01 08:45');
DELETE FROM yy.report_line WHERE line = 4
"""
PATIENTS = [
    ("S-1", "欧阳娜", "2", "1980-02-29", "B", False),
    ("S-2", "李䶮", "1", "1966-03-05", "AB", True),
    ("S-3", "作废", "9", None, None, True),
]
RESULTS = [
    ("7|1", "S-1", "E-9", "14749-6", "=", "6.993", "mmol/L", "126", "mg%", "N"),
    ("7|2", "S-1", "E-9", "2823-3", "<", "7.1", "mmol/L", "<7.1", "mval/L", "HH"),
    ("7|3", "S-1", "E-9", "718-7", "=", None, "g/dL", "溶血", "g/dL", None),
    ("8|1", "S-1", "E-10", "2823-3", "=", "6.9", "mmol/L", "6.9", "mval/L", "HH"),
]


@pytest.fixture
def site(make_server, tmp_path) -> Site:
    """One campus with its links, that has never heard of another."""
    source, store = make_server("source"), make_server("store")
    return Site(tmp_path, source, {"primary": store})


def add_south(site: Site) -> Config:
    """All that an engineer does for the new campus: two texts."""
    (site.folder / "south.yaml").write_text(MAPPING, encoding="utf-8")
    content = yaml.safe_load(site.path.read_text())
    content["sources"]["south"] = {
        "kind": "postgresql",
        "dsn": site.source_server.dsn("south", "sync"),
        "mapping": "south.yaml",
        "publication": "yy_out",
    }
    site.path.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = load(site.path)
    prepare_stores(config)
    return config


def south(site: Site, *statements: str) -> None:
    with site.source_server.connect("south") as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_mapping_and_an_entry_are_all_it_takes(site):
    site.source_server.create_database("south")
    south(site, SOUTH, ROWS)
    assert not [path for path in PACKAGED.glob("*.yaml") if "yy." in path.read_text()]
    with site.hospital() as hospital:
        hospital.execute("INSERT INTO his.patient (pid, mrn, updated_at) VALUES (1, 'S-1', now())")
    config = add_south(site)
    assert [f for f in check(config) if f.severity is Severity.ERROR] == []
    with contextlib.ExitStack() as stack:
        for number, link in enumerate(config.links()):
            network = Network(number, lost=0.1, repeated=0.1, waiting=3)
            stack.enter_context(Link(config.settings(link), network))
        until(lambda: ask(site, "SELECT FROM sync.snapshot WHERE link = 'south>primary'"), 60, "it")
        south(site, *CHANGES.split(";"))
        until(lambda: drained(site, config), 60, lambda: str(site.facts()))
    assert ask(site, SELECT_PATIENTS) == PATIENTS
    assert ask(site, SELECT_RESULTS) == RESULTS
    unknown = "SELECT campus, code_list, code FROM sync.unknown_code"
    assert ask(site, unknown) == [("south", "tests", "XYZ")]
    comparison = compare(config, show_keys=True)
    assert comparison.equal, [match for match in comparison.tables if not match.equal]
    rows = {(m.campus, m.table): m.source_rows for m in comparison.tables if m.source_rows}
    assert rows == {
        ("main", "patient"): 1,
        ("south", "patient"): 1,
        ("south", "lab_report"): 2,
        ("south", "lab_result"): 4,
    }


SELECT_PATIENTS = (
    "SELECT record_id, name, sex, birth_date::text, abo, deleted FROM consult.patient"
    " WHERE campus = 'south' ORDER BY 1"
)
SELECT_RESULTS = (
    "SELECT record_id, patient_id, visit_no, item_code, coalesce(comparator, '='), value::text,"
    " unit, raw_value, raw_unit, flag FROM consult.lab_result"
    " WHERE campus = 'south' AND NOT deleted ORDER BY 1"
)


def ask(site: Site, query: str) -> list[tuple]:
    with site.store() as store:
        return store.execute(query).fetchall()


def drained(site: Site, config: Config) -> bool:
    with psycopg.connect(config.sources["south"].dsn) as source:
        (end,) = source.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
    rows = ask(site, "SELECT lsn FROM sync.progress WHERE lane = 'routine'")
    waiting = ask(site, "SELECT FROM consult.lab_result WHERE patient_id IS NULL AND NOT deleted")
    running = ask(site, "SELECT FROM sync.snapshot WHERE state = 'running'")
    return len(rows) == 2 and all(lsn + 1 >= end for (lsn,) in rows) and not running + waiting
