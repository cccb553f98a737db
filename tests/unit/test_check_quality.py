"""Rules of quality over columns: every check fires on rows made to break it, and on no others."""

import collections

import pyarrow as pa
import pytest

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.quality_rules import ALARM_SCHEMA, DEFAULT_PATH, RULES, load_quality_rules
from tests.canonical import rows_of
from tests.quality_cases import NOW_US, ROW_CASES, STORE_CASES, Case, Rows, lab, row
from tests.unit.test_clinic import STYLES, clinic, harmonised
from transforms.check_quality import QualityChecker
from transforms.deliver.judging.quality_sql import STORE_KINDS
from transforms.harmonise.damaged_text import Damage

QUALITY = load_quality_rules()
CHECKER = QualityChecker(QUALITY, "main")
CAUSES = {kind.name.lower() for kind in Damage}
CASE_IDS = [f"{case.rule}-{case.reason}" for case in ROW_CASES]


def batches(rows: Rows) -> dict[str, pa.RecordBatch]:
    """Rows as changes, each at its own place, in the order given."""
    by_table = collections.defaultdict(list)
    for i, (table, values) in enumerate(rows, 1):
        by_table[table].append({"_seq": i, "record_id": str(i), **values})
    return {table: rows_of(table, some) for table, some in by_table.items()}


def alarms(rows: Rows) -> list[dict]:
    found = CHECKER.check(batches(rows), NOW_US)
    assert found.schema == ALARM_SCHEMA
    return found.to_pylist()


@pytest.mark.parametrize("case", ROW_CASES, ids=CASE_IDS)
def test_every_check_fires_on_what_breaks_it_and_on_nothing_else(case: Case):
    (alarm,) = alarms(case.bad)
    reason = alarm["reason"]
    assert (alarm["rule"], alarm["campus"]) == (case.rule, "main")
    assert reason == case.reason or reason.removeprefix(f"{case.reason}_") in CAUSES
    table, _ = case.bad[-1]
    assert (alarm["table"], alarm["record_id"], alarm["lsn"]) == (table, str(len(case.bad)), 1)
    assert alarm["column"] in TABLES[table].by_name
    assert alarms(case.good) == []


def test_every_check_of_the_rules_has_a_case():
    kinds = {check.reason: check.kind for rule in QUALITY.rules for check in rule.checks}
    rows = {case.reason for case in ROW_CASES}
    store = {case.reason for case in STORE_CASES}
    assert rows | store == set(kinds)
    assert {kinds[reason] for reason in store} <= STORE_KINDS
    waiting = {rule.rule for rule in QUALITY.rules if not rule.checks}
    assert waiting | {case.rule for case in ROW_CASES + STORE_CASES} == set(RULES)


@pytest.mark.parametrize("case", ROW_CASES, ids=CASE_IDS)
def test_deletes_and_values_that_the_log_did_not_carry_are_not_judged(case: Case):
    deleted = [(table, values | {"_op": int(Op.DELETE)}) for table, values in case.bad]
    assert alarms(deleted) == []
    unchanged = []
    for table, _ in case.bad:
        names = [name for name in TABLES[table].by_name if name != "patient_id"]
        unchanged.append((table, {"patient_id": "P1", "unchanged": names}))
    assert alarms(unchanged) == []


def test_one_alarm_a_rule_and_row():
    (alarm,) = alarms([row("visit", visit_no=None, started_at=None)])
    assert (alarm["rule"], alarm["column"]) == (30, "visit_no")
    found = alarms([lab("2823-3", "42", "cm"), lab("2823-3", "42", "mmol/L", flag="N")])
    assert [(one["rule"], one["record_id"]) for one in found] == [(7, "2"), (11, "1")]


def test_a_specimen_is_judged_by_its_newest_results_and_blamed_once():
    wrong = lab("1751-7", "75", "g/L")
    whole = lab("2885-2", "70", "g/L")
    (alarm,) = alarms([wrong, whole])
    assert alarm["record_id"] == "2"
    assert alarms([wrong, whole, lab("1751-7", "45", "g/L")]) == []
    assert alarms([wrong]) == []
    other = lab("2885-2", "70", "g/L", patient_id="P2")
    assert alarms([wrong, other]) == []
    assert alarms([wrong, lab("2885-2", "70", "g/L", collected_at=None)]) == []
    assert alarms([wrong, (whole[0], whole[1] | {"_op": int(Op.DELETE)})]) == []


OLD_CAMPUS = """\
campuses:
  old:
    off: [unit_missing]
    checks:
      - {kind: range, reason: heart_rate_impossible, table: vital_sign, column: pulse_per_min,
         above: 250}
"""


def test_a_campus_switches_a_check_off_or_replaces_it(tmp_path):
    path = tmp_path / "quality.yaml"
    text = DEFAULT_PATH.read_text(encoding="utf-8")
    assert "campuses: {}" in text
    path.write_text(text.replace("campuses: {}", OLD_CAMPUS), encoding="utf-8")
    old = QualityChecker(load_quality_rules(path), "old")
    tables = batches([lab("2823-3", "4", None), row("vital_sign", pulse_per_min=260)])
    assert [one["reason"] for one in old.check(tables, NOW_US).to_pylist()] == [
        "heart_rate_impossible"
    ]
    assert old.check(batches([row("vital_sign", pulse_per_min=0)]), NOW_US).num_rows == 0


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_clean_data_raise_no_false_alarm(name, mapping):
    """Tens of thousands of rows of ordinary days at three campuses, judged row by row and by
    specimen; what needs the store is measured in tests/e2e/test_quality.py."""
    one = clinic(21, name, mapping)
    stories = (step for _ in range(150) for step in (one.routine(), one.emergency()))
    done = harmonised(mapping, stories)
    rows = sum(batch.num_rows for batch in done.tables.values())
    newest = max(int(batch["_commit_us"].to_numpy().max()) for batch in done.tables.values())
    found = QualityChecker(QUALITY, name).check(done.tables, newest).to_pylist()
    assert rows > 10_000
    assert collections.Counter((one["rule"], one["reason"]) for one in found) == {}


def test_a_bound_is_no_value():
    bound = {"comparator": "<", "flag": "L", "reference_low": "3.5"}
    assert alarms([lab("2823-3", "3.5", "mmol/L", **bound)]) == []
    assert len(alarms([lab("2823-3", "3.5", "mmol/L", **bound | {"comparator": None})])) == 1
    whole = lab("2885-2", "40", "g/L", comparator="<")
    assert alarms([lab("1751-7", "75", "g/L"), whole]) == []


@pytest.mark.parametrize(
    ("table", "column", "text", "reason"),
    [
        ("patient", "name", "张?", "name_garbled_question_marks"),
        ("lab_result", "item_name", "白细?计数", "name_garbled_question_marks"),
        ("patient", "name", "ÕÅÈý", "name_garbled_read_as_latin1"),
        ("patient", "name", "寮犱笁", "name_garbled_read_as_gbk"),
        ("patient", "name", "王\ufffd", "name_garbled_replaced"),
        ("emr_document", "content", "现病史：???", "text_garbled_question_marks"),
        ("emr_document", "content", "考虑??", None),
        ("patient", "name", "王䶮", None),
        ("lab_result", "item_name", "×10⁹/L", None),
    ],
)
def test_text_that_was_decoded_wrongly(table, column, text, reason):
    found = [one["reason"] for one in alarms([row(table, **{column: text})])]
    assert found == ([reason] if reason else [])
