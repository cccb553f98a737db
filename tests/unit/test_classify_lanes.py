"""Emergency classification: a case table per rule, a scalar twin, and the laws of escalation."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.batches import Op
from schemas.emergency_rules import (
    ITEM_UNITS,
    LEVEL_RULES,
    UNITLESS,
    EmergencyRules,
    Rule,
    load_rules,
    spellings_of,
)
from schemas.entities import TABLES
from tests.canonical import COMMIT_US, at, rows_of
from transforms.classify_lanes import Classified, Classifier
from transforms.escalations import Escalations

RULES = load_rules()
HOUR_US = 3_600_000_000
NOBODY = Escalations()


def rule_of(table: str, row: dict, campus: str = "main") -> str:
    """Returns the rule that applies to one row of nobody under emergency."""
    done = Classifier(RULES, campus).classify({table: rows_of(table, [row])}, NOBODY)
    return Rule(done.rules[table][0]).name


def lab(code: str, value: str | None, unit: str | None = None, **more) -> dict:
    unit = ITEM_UNITS.get(code) if unit is None else unit
    return {"item_code": code, "value": value, "unit": unit or None, **more}


# Rule, table, row, whether it applies. Each limit has its last routine and its first
# emergency value; `-` says that no rule applies.
CASES = [
    ("E1", "visit", {"class": "EMER", "status": "open"}),
    ("E1", "visit", {"class": "EMER"}),
    ("-", "visit", {"class": "EMER", "status": "closed"}),
    ("-", "visit", {"class": "EMER", "status": "signed_off"}),
    ("-", "visit", {"class": "EMER", "status": "open", "ended_at": at(COMMIT_US)}),
    ("-", "visit", {"class": "AMB", "status": "open"}),
    ("-", "visit", {"class": "IMP", "status": "open"}),
    ("E1", "visit", {"class": "EMER", "triage_level": 1}),  # The lowest number is told.
    ("E2", "visit", {"class": "AMB", "triage_level": 1, "status": "open"}),
    ("E2", "visit", {"class": "AMB", "triage_level": 2, "status": "treated"}),
    ("E2", "visit", {"class": "AMB", "triage_level": 3, "status": "open"}),
    ("E2", "visit", {"class": "AMB", "triage_level": 3, "status": "waiting"}),
    ("E2", "visit", {"class": "AMB", "triage_level": 3}),
    ("-", "visit", {"class": "AMB", "triage_level": 3, "status": "treated"}),
    ("-", "visit", {"class": "AMB", "triage_level": 3, "unchanged": ["status"]}),
    ("-", "visit", {"class": "AMB", "triage_level": 4, "status": "open"}),
    ("-", "visit", {"class": "AMB", "triage_level": 1, "status": "closed"}),
    ("E3", "vital_sign", {"pulse_per_min": 39}),
    ("E4", "vital_sign", {"pulse_per_min": 40}),
    ("E4", "vital_sign", {"pulse_per_min": 50}),
    ("-", "vital_sign", {"pulse_per_min": 51}),
    ("-", "vital_sign", {"pulse_per_min": 149}),
    ("E4", "vital_sign", {"pulse_per_min": 150}),
    ("E4", "vital_sign", {"pulse_per_min": 180}),
    ("E3", "vital_sign", {"pulse_per_min": 181}),
    ("E3", "vital_sign", {"systolic_mmhg": 69}),
    ("E4", "vital_sign", {"systolic_mmhg": 70}),
    ("E4", "vital_sign", {"systolic_mmhg": 80}),
    ("-", "vital_sign", {"systolic_mmhg": 81}),
    ("-", "vital_sign", {"systolic_mmhg": 200}),
    ("E4", "vital_sign", {"systolic_mmhg": 201}),
    ("E3", "vital_sign", {"spo2_percent": 79}),
    ("E4", "vital_sign", {"spo2_percent": 80}),
    ("E4", "vital_sign", {"spo2_percent": 90}),
    ("-", "vital_sign", {"spo2_percent": 91}),
    ("-", "vital_sign", {"temperature_cel": "41"}),
    ("-", "vital_sign", {"temperature_cel": "41.0"}),
    ("E3", "vital_sign", {"temperature_cel": "41.1"}),
    ("E3", "vital_sign", {"pulse_per_min": 160, "spo2_percent": 70}),  # The worst sign counts.
    ("-", "vital_sign", {"diastolic_mmhg": 10, "gcs": 3, "respiration_per_min": 99}),
    ("-", "vital_sign", {}),
    ("-", "lab_result", lab("2823-3", "2.8")),
    ("E6", "lab_result", lab("2823-3", "2.79")),
    ("-", "lab_result", lab("2823-3", "6.2")),
    ("E6", "lab_result", lab("2823-3", "6.21")),
    ("E6", "lab_result", lab("2823-3", "7")),
    ("E3", "lab_result", lab("2823-3", "7.01")),
    ("E6", "lab_result", lab("6298-4", "6.5")),
    ("-", "lab_result", lab("2951-2", "120")),
    ("E6", "lab_result", lab("2951-2", "119.9")),
    ("-", "lab_result", lab("2951-2", "160")),
    ("E6", "lab_result", lab("2951-2", "160.1")),
    ("E3", "lab_result", lab("14749-6", "2.7")),
    ("E3", "lab_result", lab("14749-6", "3.32")),
    ("-", "lab_result", lab("14749-6", "3.33")),
    ("-", "lab_result", lab("14749-6", "22.2")),
    ("E6", "lab_result", lab("14749-6", "22.3")),
    ("-", "lab_result", lab("2345-7", "60", "mg/dL")),  # Mass glucose is another item.
    ("-", "lab_result", lab("2000-8", "1.6")),
    ("E6", "lab_result", lab("2000-8", "1.59")),
    ("-", "lab_result", lab("2000-8", "3.5")),
    ("E6", "lab_result", lab("2000-8", "3.51")),
    ("-", "lab_result", lab("718-7", "50")),
    ("E6", "lab_result", lab("718-7", "49")),
    ("-", "lab_result", lab("718-7", "200")),
    ("E6", "lab_result", lab("718-7", "201")),
    ("-", "lab_result", lab("718-7", "13", "g/dL")),  # Not compared in another unit.
    ("-", "lab_result", lab("718-7", "13", "")),
    ("-", "lab_result", lab("777-3", "30")),
    ("E6", "lab_result", lab("777-3", "29", "10^9/L")),
    ("-", "lab_result", lab("777-3", "1000")),
    ("E6", "lab_result", lab("777-3", "1001", "G/L")),
    ("-", "lab_result", lab("6690-2", "1.5")),
    ("E6", "lab_result", lab("6690-2", "1.4")),
    ("-", "lab_result", lab("6690-2", "30")),
    ("E6", "lab_result", lab("6690-2", "30.1")),
    ("-", "lab_result", lab("6301-6", "5", "")),
    ("E6", "lab_result", lab("6301-6", "5.1", "")),
    ("E6", "lab_result", lab("6301-6", "5.1", "1")),
    ("-", "lab_result", lab("5902-2", "35")),
    ("E6", "lab_result", lab("5902-2", "35.1")),
    ("-", "lab_result", lab("14979-9", "90")),
    ("E6", "lab_result", lab("14979-9", "90.1")),
    ("-", "lab_result", lab("10839-9", "1")),
    ("E6", "lab_result", lab("10839-9", "1.01", "µg/L")),
    ("-", "lab_result", lab("10839-9", "14", "ng/L")),
    ("-", "lab_result", lab("2019-8", "20")),
    ("E6", "lab_result", lab("2019-8", "19.9", "mmHg")),
    ("-", "lab_result", lab("2019-8", "70")),
    ("E6", "lab_result", lab("2019-8", "70.1")),
    ("-", "lab_result", lab("2703-7", "45")),
    ("E6", "lab_result", lab("2703-7", "44")),
    ("-", "lab_result", lab("2744-1", "7.2")),
    ("E6", "lab_result", lab("2744-1", "7.19")),
    ("-", "lab_result", lab("2744-1", "7.6")),
    ("E6", "lab_result", lab("2744-1", "7.61")),
    ("E6", "lab_result", lab("1742-6", "9", "U/L", flag="HH")),
    ("E6", "lab_result", lab("1742-6", "9", "U/L", flag="LL")),
    ("-", "lab_result", lab("1742-6", "9", "U/L", flag="H")),
    ("E6", "lab_result", lab("1742-6", "9", "U/L", critical=True)),
    ("-", "lab_result", lab("1742-6", "9", "U/L", critical=False)),
    ("E6", "lab_result", lab("600-7", None, value_text=" 阳性(+)")),
    ("E6", "lab_result", lab("606-4", None, value_text="Positive: E. coli")),
    ("-", "lab_result", lab("600-7", None, value_text="阴性")),
    ("-", "lab_result", lab("600-7", None, value_text="not positive")),
    ("-", "lab_result", lab("5778-6", None, value_text="positive")),
    ("-", "lab_result", lab("2823-3", None)),
    ("-", "lab_result", lab("2823-3", "溶血")),  # Haemolytic: no number, so no alarm.
    ("-", "lab_result", {"value": "9.9", "unit": "mmol/L"}),
    ("E7", "medical_order", {"priority": "stat", "status": "active"}),
    ("E7", "medical_order", {"priority": "asap"}),
    ("-", "medical_order", {"priority": "urgent", "status": "active"}),
    ("-", "medical_order", {"priority": "routine", "status": "active"}),
    ("-", "medical_order", {"priority": "stat", "status": "completed"}),
    ("-", "medical_order", {"priority": "stat", "status": "stopped"}),
    ("E8", "consultation", {"urgency": "emergency", "status": "requested"}),
    ("E8", "consultation", {"urgency": "emergency", "status": "answered"}),
    ("-", "consultation", {"urgency": "emergency", "status": "signed_off"}),
    ("-", "consultation", {"urgency": "routine", "status": "requested"}),
    ("E9", "visit", {"class": "AMB", "pathway": "chest_pain", "status": "open"}),
    ("-", "visit", {"class": "AMB", "pathway": "chest_pain", "status": "closed"}),
    ("E9", "diagnosis", {"code": "I20.000", "type": "admission"}),
    ("E9", "diagnosis", {"code": "I22.9", "type": "emergency"}),
    ("E9", "diagnosis", {"code": "I21"}),
    ("-", "diagnosis", {"code": "I23.0", "type": "admission"}),
    ("-", "diagnosis", {"code": "I21.900x001", "type": "discharge"}),
    ("-", "diagnosis", {"code": "I2", "type": "admission"}),
    ("E10", "visit", {"class": "IMP", "pathway": "stroke", "status": "open"}),
    ("E10", "diagnosis", {"code": "I60.1", "type": "outpatient"}),
    ("E10", "diagnosis", {"code": "I64.x00", "type": "admission"}),
    ("-", "diagnosis", {"code": "I65.2", "type": "admission"}),
    ("-", "diagnosis", {"code": None, "type": "admission"}),
    ("E11", "visit", {"triage_level": 4, "status": "open"}),
    ("E11", "visit", {"department": "急诊科", "status": "open"}),
    ("E11", "visit", {"pathway": "trauma"}),
    ("-", "visit", {"department": "cardiology", "status": "open"}),
    ("-", "visit", {"department": "急诊科", "status": "closed"}),
    ("-", "visit", {"department": "急诊科", "status": "open", "unchanged": ["class"]}),
    ("-", "patient", {"name": "x"}),
    ("-", "emr_document", {"status": "draft"}),
    ("-", "prescription", {"status": "active"}),
]


@pytest.mark.parametrize(
    ("rule", "table", "row"), CASES, ids=[f"{i}-{c[0]}-{c[1]}" for i, c in enumerate(CASES)]
)
def test_rule(rule, table, row):
    assert rule_of(table, row).replace("NONE", "-") == rule


def test_every_rule_has_a_case_that_applies():
    levels_of_c = {"E5"}  # Level III does not count by default; see the next test.
    applied = {case[0] for case in CASES} | levels_of_c
    assert applied == {rule.name for rule in Rule if rule} | {"-"}


# Campus, rule there, rule at a campus with the defaults, table, row.
CAMPUS_CASES = [
    ("B", "-", "E6", "lab_result", lab("2823-3", "6.4")),
    ("B", "E6", "E6", "lab_result", lab("2823-3", "6.5")),
    ("B", "E6", "-", "lab_result", lab("2823-3", "3")),
    ("B", "-", "-", "lab_result", lab("2823-3", "3.01")),
    ("B", "E6", "-", "lab_result", lab("2000-8", "1.74")),
    ("C", "E6", "-", "lab_result", lab("718-7", "69")),
    ("C", "-", "-", "lab_result", lab("718-7", "70")),
    ("C", "E6", "-", "lab_result", lab("6301-6", "3.6")),
    ("C", "E5", "-", "vital_sign", {"pulse_per_min": 100}),
    ("C", "E5", "-", "vital_sign", {"pulse_per_min": 55}),
    ("C", "-", "-", "vital_sign", {"pulse_per_min": 56}),
    ("C", "-", "-", "vital_sign", {"pulse_per_min": 99}),
    ("C", "E5", "-", "vital_sign", {"systolic_mmhg": 180}),
    ("C", "E5", "-", "vital_sign", {"systolic_mmhg": 90}),
    ("C", "-", "-", "vital_sign", {"systolic_mmhg": 179}),
    ("C", "-", "-", "vital_sign", {"systolic_mmhg": 91}),
    ("C", "E5", "-", "vital_sign", {"spo2_percent": 94}),
    ("C", "-", "-", "vital_sign", {"spo2_percent": 95}),
    ("C", "E4", "E4", "vital_sign", {"pulse_per_min": 100, "spo2_percent": 85}),
]


@pytest.mark.parametrize(("campus", "there", "elsewhere", "table", "row"), CAMPUS_CASES)
def test_a_campus_has_its_own_limits(campus, there, elsewhere, table, row):
    assert rule_of(table, row, campus).replace("NONE", "-") == there
    assert rule_of(table, row).replace("NONE", "-") == elsewhere


@pytest.mark.parametrize(
    ("op", "age_h", "counts"),
    [
        (Op.INSERT, 0, True),
        (Op.INSERT, 9999, True),
        (Op.UPDATE, 24, True),
        (Op.UPDATE, 24.001, False),
        (Op.SNAPSHOT, 24, True),
        (Op.SNAPSHOT, 24.001, False),
        (Op.SNAPSHOT, None, True),
        (Op.DELETE, 0, False),
    ],
)
def test_history_opens_nothing(op, age_h, counts):
    """A first snapshot reads years of critical values: they are no emergency of today."""
    when = None if age_h is None else at(COMMIT_US - round(age_h * HOUR_US))
    row = lab("2823-3", "7", _op=int(op), reported_at=when)
    assert (rule_of("lab_result", row) != "NONE") == counts


def test_an_open_visit_is_never_history():
    row = {"class": "EMER", "status": "open", "_op": int(Op.SNAPSHOT)}
    assert rule_of("visit", {**row, "started_at": at(COMMIT_US - 999 * HOUR_US)}) == "E1"


def test_alarms_in_another_unit_are_counted_not_compared():
    rows = [
        lab("718-7", "13", "g/dL"),
        lab("718-7", "13", ""),
        lab("718-7", "130", "g/dL"),
        lab("2823-3", "9", "mmol/L"),
    ]
    done = Classifier(RULES, "main").classify({"lab_result": rows_of("lab_result", rows)}, NOBODY)
    assert done.unit_mismatches == 2
    assert done.rules["lab_result"].tolist() == [Rule.E11, Rule.E11, Rule.E11, Rule.E3]


def classify(tables: dict[str, list[dict]], open_patients: Escalations = NOBODY) -> Classified:
    batches = {name: rows_of(name, rows) for name, rows in tables.items()}
    return Classifier(RULES, "main").classify(batches, open_patients)


OPENING = lab("2823-3", "7.5")
OPEN_P1 = Escalations({"P1": ("E1", 1, 0)})


def test_an_opening_covers_the_patient_in_the_whole_batch_and_nobody_else():
    done = classify(
        {
            "patient": [{"_seq": 1}, {"_seq": 2, "patient_id": "P2"}],
            "lab_result": [{**OPENING, "_seq": 3}],
            "emr_document": [{"_seq": 4}, {"_seq": 5, "patient_id": None}],
        }
    )
    assert done.masks["patient"].tolist() == [True, False]
    assert done.masks["emr_document"].tolist() == [True, False]
    assert done.rules["patient"].tolist() == [Rule.E11, 0]
    assert done.rules["lab_result"].tolist() == [Rule.E3]
    assert done.escalations == [("P1", "E3", 1, 3, True)]
    assert done.urgent == 3


def test_a_sign_off_covers_its_own_row_and_nothing_after():
    done = classify(
        {
            "emr_document": [{"_seq": 1}, {"_seq": 3}],
            "visit": [{"_seq": 2, "class": "AMB", "status": "signed_off"}],
        },
        OPEN_P1,
    )
    assert done.masks["visit"].tolist() == [True]
    assert done.masks["emr_document"].tolist() == [True, False]
    assert done.escalations == [("P1", "sign_off", 1, 2, False)]


def test_an_opening_after_a_sign_off_covers_everything_again():
    done = classify(
        {
            "visit": [{"_seq": 1, "class": "EMER", "status": "closed"}],
            "emr_document": [{"_seq": 2}],
            "lab_result": [{**OPENING, "_seq": 3}],
        },
        OPEN_P1,
    )
    assert done.masks["emr_document"].tolist() == [True]
    assert [(change[1], change[4]) for change in done.escalations] == [
        ("sign_off", False),
        ("E3", True),
    ]


# Table, row, whether it ends the emergency of its patient.
ENDINGS = [
    ("visit", {"status": "signed_off"}, True),
    ("visit", {"status": "signed_off", "class": "AMB"}, True),
    ("visit", {"status": "closed", "class": "EMER"}, True),
    ("visit", {"status": "closed", "class": "IMP"}, True),
    ("visit", {"status": "closed", "class": "AMB"}, False),  # An outpatient visit's end.
    ("visit", {"status": "closed"}, False),
    ("visit", {"status": "open", "class": "EMER", "ended_at": at(COMMIT_US)}, False),
    ("visit", {"status": "open", "triage_level": 4, "class": "AMB"}, False),
    ("visit", {"status": "signed_off", "_op": int(Op.DELETE)}, False),
    ("visit", {"status": "signed_off", "patient_id": None}, False),
    ("visit", {"status": "signed_off", "patient_id": "P2"}, False),
    ("consultation", {"status": "signed_off", "urgency": "emergency"}, True),
    ("consultation", {"status": "signed_off", "urgency": "routine"}, False),
    ("consultation", {"status": "answered", "urgency": "emergency"}, False),
    ("lab_result", lab("2823-3", "4.1", status="corrected", flag="N"), False),
    ("medical_order", {"status": "completed", "priority": "stat"}, False),
    ("emr_document", {"status": "archived"}, False),
]


@pytest.mark.parametrize(("table", "row", "ends"), ENDINGS)
def test_only_an_explicit_sign_off_ends_an_emergency(table, row, ends):
    done = classify({table: [{**row, "_seq": 5}]}, OPEN_P1)
    assert ("P1" not in OPEN_P1.after(done.escalations)) == ends
    if ends:
        assert done.masks[table].tolist() == [True]


def test_an_old_sign_off_read_again_does_not_end_a_newer_emergency():
    """The log is read again from the ledger; what was loaded is of a later place."""
    opened = Escalations({"P1": ("E6", 9, 1)})
    done = classify({"visit": [{"_lsn": 5, "class": "EMER", "status": "closed"}]}, opened)
    assert done.escalations == []
    assert done.masks["visit"].tolist() == [True]
    assert opened.after([("P1", "sign_off", 5, 1, False)]) is opened


def test_incomplete_rows_open_but_are_not_copied():
    rows = [{**OPENING, "unchanged": ["item_name"], "_seq": 1}, {"_seq": 2, "item_code": "x"}]
    done = classify({"lab_result": rows})
    assert done.masks["lab_result"].tolist() == [False, True]
    assert done.rules["lab_result"].tolist() == [Rule.E3, Rule.E11]
    assert done.escalations == [("P1", "E3", 1, 1, True)]


def test_a_delete_follows_a_known_patient_only():
    rows = [
        {"_op": int(Op.DELETE)},
        {"_op": int(Op.DELETE), "patient_id": None},
        {"_op": int(Op.DELETE), "patient_id": "P2"},
    ]
    done = classify({"emr_document": rows}, OPEN_P1)
    assert done.masks["emr_document"].tolist() == [True, False, False]


def test_a_row_of_an_unknown_patient_is_urgent_and_opens_nothing():
    done = classify({"lab_result": [{**OPENING, "patient_id": None}]})
    assert done.masks["lab_result"].tolist() == [True]
    assert done.escalations == []


def test_a_rule_may_be_urgent_without_escalating():
    rules = RULES.default
    quiet = rules.escalation.model_copy(update={"opened_by": ("E1",)})
    changed = EmergencyRules("x", rules.model_copy(update={"escalation": quiet}), {})
    batch = rows_of("lab_result", [OPENING, {"item_code": "x"}])
    done = Classifier(changed, "main").classify({"lab_result": batch}, NOBODY)
    assert done.masks["lab_result"].tolist() == [True, False]
    assert done.escalations == []


def test_empty_batches_and_no_tables():
    assert classify({}).masks == {}
    done = classify({name: [] for name in TABLES}, OPEN_P1)
    assert all(mask.size == 0 for mask in done.masks.values())


def test_state_names_nobody_and_can_be_loaded_in_any_order():
    rows = [("P1", "E6", 5, 1, True), ("P2", "E1", 2, 1, True), ("P1", "sign_off", 7, 1, False)]
    state = Escalations.from_rows(reversed(rows))
    assert "P2" in state and "P1" not in state and len(state) == 1
    assert "P2" not in repr(state)
    assert state.patients == {"P2"}
    assert pickle.loads(pickle.dumps(state)) == state


# The scalar twin: one row and one event at a time, written from the rules' words.


@dataclasses.dataclass
class Twin:
    """Classifies rows one by one; the columnar classifier must agree with it."""

    rules: object
    opened: dict

    def direct(self, table: str, row: dict) -> Rule:
        if row["_op"] == Op.DELETE:
            return Rule.NONE
        found = [rule for rule in getattr(self, table, lambda row: [])(row) if rule]
        times = {"lab_result": "reported_at", "vital_sign": "measured_at"}
        times |= {"medical_order": "ordered_at", "diagnosis": "diagnosed_at"}
        times |= {"consultation": "requested_at"}
        when = row.get(times.get(table))
        if when is not None and row["_op"] != Op.INSERT:
            age_us = row["_commit_us"] - round(when.timestamp() * 1e6)
            if age_us > self.rules.freshness.hours * HOUR_US:
                return Rule.NONE
        return min(found, default=Rule.NONE)

    def visit(self, row):
        rules = self.rules
        ends = {act.status for act in rules.escalation.sign_off if act.table == "visit"}
        if row.get("status") in ends or row.get("ended_at") is not None:
            return
        unsaid = row.get("status") is None and "status" not in row["unchanged"]
        waits = row.get("status") in rules.triage.waiting_statuses or unsaid
        level, pathway = row.get("triage_level"), row.get("pathway")
        if row.get("class") in rules.encounter.emergency_classes:
            yield Rule.E1
        if level in rules.triage.emergency_levels or (
            level in rules.triage.waiting_levels and waits
        ):
            yield Rule.E2
        if pathway in rules.chest_pain.pathways:
            yield Rule.E9
        if pathway in rules.stroke.pathways:
            yield Rule.E10
        if row.get("class") is None and "class" not in row["unchanged"]:
            known = level is not None or pathway is not None
            if known or row.get("department") in rules.missing_class.departments:
                yield Rule.E11

    def lab_result(self, row):
        rules = self.rules
        code, text, unit = row.get("item_code"), row.get("value"), row.get("unit")
        limits = [(Rule.E6, limit) for limit in rules.critical_values]
        limits += [(LEVEL_RULES[limit.level], limit) for limit in rules.vital_items]
        for rule, limit in limits:
            if code not in limit.codes or text is None:
                continue
            if rule is not Rule.E6 and limit.level not in rules.vital_levels.counting:
                continue
            right = ITEM_UNITS[code]
            if unit in spellings_of(right) or (unit is None and right in UNITLESS):
                yield outside(limit, float(text)) and rule
        if row.get("flag") in rules.critical_marks.flags or row.get("critical"):
            yield Rule.E6

    def vital_sign(self, row):
        for limit in self.rules.vital_signs:
            value = row.get(limit.sign)
            if value is not None and limit.level in self.rules.vital_levels.counting:
                yield outside(limit, float(value)) and LEVEL_RULES[limit.level]

    def medical_order(self, row):
        orders = self.rules.orders
        if row.get("priority") in orders.priorities:
            yield row.get("status") not in orders.ended_statuses and Rule.E7

    def diagnosis(self, row):
        code = row.get("code") or ""
        if row.get("type") in (None, *self.rules.diagnoses.types):
            yield code.startswith(self.rules.chest_pain.icd10) and Rule.E9
            yield code.startswith(self.rules.stroke.icd10) and Rule.E10

    def consultation(self, row):
        if row.get("urgency") in self.rules.consultations.urgencies:
            yield row.get("status") != "signed_off" and Rule.E8

    def signs_off(self, table: str, row: dict) -> bool:
        if row["_op"] == Op.DELETE:
            return False
        return any(
            act.table == table
            and row.get("status") == act.status
            and (not act.classes or row.get("class") in act.classes)
            and (not act.urgencies or row.get("urgency") in act.urgencies)
            for act in self.rules.escalation.sign_off
        )

    def run(self, log: list[tuple[str, dict]]) -> tuple[list[Rule], list[tuple]]:
        """Returns the rule of each row and the openings and closings, for rows in log order."""
        opened, changes = dict(self.opened), []
        ever, last_end = set(opened), {}
        rules = [self.direct(table, row) for table, row in log]
        for (table, row), rule in zip(log, rules, strict=True):
            patient, place = row["patient_id"], (row["_lsn"], row["_seq"])
            if patient is None:
                continue
            if rule and patient not in opened:
                opened[patient] = place
                ever.add(patient)
                last_end.pop(patient, None)
                changes.append((patient, rule.name, *place, True))
            elif self.signs_off(table, row) and opened.get(patient, place) < place:
                del opened[patient]
                last_end[patient] = place
                changes.append((patient, "sign_off", *place, False))
        for i, (_, row) in enumerate(log):
            patient = row["patient_id"]
            past = last_end.get(patient, (2**62, 0)) < (row["_lsn"], row["_seq"])
            if not rules[i] and patient in ever and not past:
                rules[i] = Rule.E11
        return rules, changes


def outside(limit, value: float) -> bool:
    return any(
        (
            limit.below is not None and value < limit.below,
            limit.at_or_below is not None and value <= limit.at_or_below,
            limit.above is not None and value > limit.above,
            limit.at_or_above is not None and value >= limit.at_or_above,
        )
    )


def _around(numbers, step: float, as_text: bool):
    values = sorted({n + d for n in numbers for d in (-step, 0, step)})
    return st.sampled_from([f"{v:g}" if as_text else int(v) for v in values])


TIMES = st.sampled_from([None, at(COMMIT_US), at(COMMIT_US - 30 * HOUR_US)])
FIELDS = {
    "visit": {
        "class": st.sampled_from(["EMER", "AMB", "IMP", None]),
        "triage_level": st.sampled_from([None, None, 1, 2, 3, 4]),
        "pathway": st.sampled_from([None, None, "chest_pain", "stroke"]),
        "department": st.sampled_from(["急诊科", "cardiology", None]),
        "status": st.sampled_from(["open", "signed_off", "closed", None]),
        "ended_at": st.sampled_from([None, None, at(COMMIT_US)]),
    },
    "lab_result": {
        "item_code": st.sampled_from(["2823-3", "14749-6", "718-7", "6301-6", "1742-6", None]),
        "value": st.one_of(st.none(), _around((2.8, 3.33, 5, 6.2, 7, 22.2, 50, 200), 0.1, True)),
        "unit": st.sampled_from(["mmol/L", "mmol/L", "g/L", "1", "g/dL", None]),
        "flag": st.sampled_from(["N", "H", None, "HH"]),
        "critical": st.sampled_from([None, False, False, True]),
        "reported_at": TIMES,
    },
    "vital_sign": {
        "pulse_per_min": st.one_of(st.none(), _around((40, 50, 55, 100, 150, 180), 1, False)),
        "systolic_mmhg": st.one_of(st.none(), _around((70, 80, 90, 180, 200), 1, False)),
        "spo2_percent": st.one_of(st.none(), _around((80, 90, 94), 1, False)),
        "temperature_cel": st.one_of(st.none(), _around((37, 41), 0.1, True)),
        "measured_at": TIMES,
    },
    "medical_order": {
        "priority": st.sampled_from(["stat", "asap", "urgent", "routine", None]),
        "status": st.sampled_from(["active", "completed", "stopped", None]),
        "ordered_at": TIMES,
    },
    "diagnosis": {
        "code": st.sampled_from(["I19", "I20.1", "I22", "I23", "I59", "I60", "I64.x", "I65", None]),
        "type": st.sampled_from(["admission", "discharge", None]),
        "diagnosed_at": TIMES,
    },
    "consultation": {
        "urgency": st.sampled_from(["emergency", "routine", None]),
        "status": st.sampled_from(["requested", "answered", "signed_off", None]),
        "requested_at": TIMES,
    },
    "emr_document": {"status": st.sampled_from(["draft", "signed"])},
    "patient": {},
}
OPS = st.sampled_from([int(op) for op in (Op.INSERT, Op.INSERT, Op.UPDATE, Op.SNAPSHOT, Op.DELETE)])


@st.composite
def logs(draw) -> list[tuple[str, dict]]:
    """A stretch of log: rows of four patients, in order, some incomplete."""
    log = []
    tables = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=14))
    for i, table in enumerate(tables):
        row = draw(st.fixed_dictionaries(FIELDS[table]))
        unchanged = draw(st.sampled_from([(), (), (), *[(name,) for name in sorted(row)]]))
        row |= dict.fromkeys(unchanged)
        row |= {"unchanged": unchanged, "_op": draw(OPS), "_commit_us": COMMIT_US}
        row |= {"_lsn": 10 + i // 3, "_seq": 1 + i % 3}
        row["patient_id"] = draw(st.sampled_from(["P1", "P2", "P3", "P4", None]))
        log.append((table, row))
    return log


PATIENTS_OPEN = st.dictionaries(
    st.sampled_from(["P1", "P2", "P5"]),
    st.tuples(st.just("E1"), st.sampled_from([1, 11]), st.just(2)),
)
CAMPUSES = st.sampled_from(["main", "B", "C"])


def columnar(rules: EmergencyRules, campus: str, log, opened: Escalations) -> tuple:
    """Returns mask and rule of each row of the log, and the changes."""
    tables, places = {}, []
    for table, row in log:
        tables.setdefault(table, []).append(row)
        places.append((table, len(tables[table]) - 1))
    batches = {name: rows_of(name, rows) for name, rows in tables.items()}
    done = Classifier(rules, campus).classify(batches, opened)
    masks = [bool(done.masks[table][i]) for table, i in places]
    return masks, [Rule(done.rules[table][i]) for table, i in places], done.escalations


@settings(max_examples=300, deadline=None)
@given(logs(), PATIENTS_OPEN, CAMPUSES)
def test_agrees_with_the_scalar_twin(log, opened, campus):
    masks, rules, changes = columnar(RULES, campus, log, Escalations(opened))
    twin = Twin(RULES.for_campus(campus), {p: place[1:] for p, place in opened.items()})
    expected, expected_changes = twin.run(log)
    assert rules == expected
    assert changes == expected_changes
    for (_, row), rule, mask in zip(log, expected, masks, strict=True):
        complete = not row["unchanged"] or row["_op"] == Op.DELETE
        assert mask == (rule is not Rule.NONE and complete)


@settings(max_examples=200, deadline=None)
@given(logs(), PATIENTS_OPEN, st.integers(0, 14))
def test_a_batch_covers_what_its_parts_in_order_cover(log, opened, cut):
    """Openings and closings are the same; the rows of the whole contain those of the parts."""
    state = Escalations(opened)
    whole, _, changes = columnar(RULES, "main", log, state)
    first, _, early = columnar(RULES, "main", log[:cut], state)
    second, _, late = columnar(RULES, "main", log[cut:], state.after(early))
    assert early + late == changes
    assert all(a or not b for a, b in zip(whole, first + second, strict=True))
    assert state.after(early).after(late) == state.after(changes)


@st.composite
def loosened(draw) -> EmergencyRules:
    """The default rules with some limits moved towards the normal range."""
    rules = RULES.default
    shift = draw(st.sampled_from([0.1, 0.5, 1]))

    def move(limit):
        if not draw(st.booleans()):
            return limit
        sides = {side: getattr(limit, side) for side in ("below", "at_or_below")}
        moved = {side: n + shift for side, n in sides.items() if n is not None}
        sides = {side: getattr(limit, side) for side in ("above", "at_or_above")}
        return limit.model_copy(
            update=moved | {side: n - shift for side, n in sides.items() if n is not None}
        )

    changed = {
        name: tuple(map(move, getattr(rules, name)))
        for name in ("vital_signs", "vital_items", "critical_values")
    }
    return EmergencyRules("x", rules.model_copy(update=changed), {})


@settings(max_examples=200, deadline=None)
@given(logs(), PATIENTS_OPEN, loosened())
def test_a_loosened_limit_only_adds_rows(log, opened, rules):
    strict, _, _ = columnar(RULES, "main", log, Escalations(opened))
    loose, _, _ = columnar(rules, "main", log, Escalations(opened))
    assert all(b or not a for a, b in zip(strict, loose, strict=True))


@settings(max_examples=50, deadline=None)
@given(logs(), PATIENTS_OPEN)
def test_does_not_change_what_it_is_given(log, opened):
    state = Escalations(opened)
    first = columnar(RULES, "main", log, state)
    assert columnar(RULES, "main", log, state) == first
    assert state == Escalations(opened)


def test_many_rows_of_one_storm():
    rows = [{**OPENING, "patient_id": f"P{i % 7}", "_seq": i + 1} for i in range(5000)]
    done = classify({"lab_result": rows})
    assert len(done.escalations) == 7
    assert done.urgent == 5000
    assert np.all(done.rules["lab_result"] == Rule.E3)
