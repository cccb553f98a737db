"""The emergency rules file: what is read, what is refused, and how it is told to a doctor."""

import math
import pathlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from schemas.emergency_rules import DEFAULT_PATH, ITEM_UNITS, Limit, Rule, load_rules
from schemas.errors import ConfigError


@pytest.fixture
def edited(tmp_path):
    """Returns a function: the packaged file with one text replaced, as a path."""

    def edit(old: str, new: str) -> pathlib.Path:
        text = DEFAULT_PATH.read_text(encoding="utf-8")
        assert text.count(old) >= 1, old
        path = tmp_path / "rules.yaml"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return path

    return edit


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_rules(path)
    return str(caught.value)


def test_packaged_rules_are_complete():
    rules = load_rules().default
    limits = {limit.name: limit for limit in rules.critical_values}
    assert len(limits) == 14
    assert (limits["potassium"].low, limits["potassium"].high) == (2.8, 6.2)
    assert {limit.level for limit in rules.vital_signs} == {1, 2, 3}
    assert set(rules.escalation.opened_by) == {rule.name for rule in Rule if rule}
    assert rules.vital_levels.counting == (1, 2)


def test_every_threshold_of_the_packaged_rules_names_its_source():
    tags = {f"S{n}" for n in range(2, 43)} | {"GK", "PROP", "RUN"}

    def sources(node):
        if isinstance(node, dict):
            if "source" in node:
                yield node["source"]
            for value in node.values():
                yield from sources(value)
        elif isinstance(node, list):
            for value in node:
                yield from sources(value)

    found = list(sources(yaml.safe_load(DEFAULT_PATH.read_text(encoding="utf-8"))))
    assert len(found) > 45
    for source in found:
        assert tags & set(source.replace(",", " ").replace(":", " ").replace(";", " ").split())


def test_a_campus_replaces_single_limits_and_keeps_the_rest():
    rules = load_rules()
    potassium = next(x for x in rules.for_campus("B").critical_values if x.name == "potassium")
    assert (potassium.at_or_below, potassium.at_or_above) == (3, 6.5)
    sodium = next(x for x in rules.for_campus("B").critical_values if x.name == "sodium")
    assert sodium == next(x for x in rules.default.critical_values if x.name == "sodium")
    assert rules.for_campus("C").vital_levels.counting == (1, 2, 3)
    assert rules.for_campus("main") is rules.default
    assert rules.unknown_campuses(["main", "B"]) == ["C"]


# What is edited, what it becomes, and what the message must say.
REFUSED = [
    ("below: 2.8, above: 6.2", "below: 6.5, above: 6.2", "every value is an alarm"),
    ("below: 2.8, above: 6.2", "above: 6.2, at_or_above: 7", "keep one of the two"),
    ("below: 2.8, above: 6.2, ", "", "no limit is given"),
    ("below: 2.8, above: 6.2", "below: .nan, above: 6.2", "critical_values[0].below"),
    ('"2000-8"', '"2000-9"', "unknown item 2000-9"),
    ('"2000-8"', '"718-7"', "718-7 stands twice"),
    ("unit: g/L, below: 50", "unit: g/dL, below: 5", "718-7 is compared in g/L, not in g/dL"),
    ("sign: pulse_per_min, unit: /min, below", "sign: puls, unit: /min, below", "no such vital"),
    ("sign: spo2_percent", "sign: pulse_per_min", "pulse_per_min of level 1 stands twice"),
    ("unit: Cel, above: 41", "unit: degF, above: 41", "temperature_cel is measured in Cel"),
    ("unit: Cel, above: 41", "unit: Cel, above: 105", "no value between 10 and 50 reaches"),
    ("at_or_below: 50, at_or_above: 150", "at_or_below: 30, at_or_above: 150", "reaches further"),
    ("at_or_below: 50, at_or_above: 150", "at_or_above: 35", "leave no value that is not"),
    ("below: 3.33", "below: 7.5, above: 7.1", "every value is an alarm"),
    ("emergency_levels: [1, 2]", "emergency_levels: [2]", "a level is left out"),
    ("waiting_levels: [3]", "waiting_levels: [2]", "level 2 is an emergency already"),
    ("waiting_levels: [3]", "waiting_levels: [4]", "level 3 is in neither list"),
    ("waiting_statuses: [open, waiting]", "waiting_statuses: [closed]", "closed is signed off"),
    ("counting: [1, 2], ", "counting: [1, 3], ", "a level is left out"),
    ("opened_by: [E1,", "opened_by: [E12,", "no rule E12"),
    ("{table: visit, status: signed_off,", "{table: visit, status: a, urgencies: [b],", "urgency"),
    ('codes: ["600-7", "606-4"]', 'codes: ["2823-3"]', "2823-3 is measured as a number"),
    ("icd10: [I20,", "icd10: [i20,", "chest_pain.icd10[0]"),
    (", source: S23}", "}", "chest_pain.source: is missing"),
    ("priorities:", "priority:", "is not a setting here"),
    ("hours: 24", "hours: 0", "freshness.hours"),
    ("at_or_below: 3, at_or_above: 6.5", "at_or_below: 7, at_or_above: 6.5", "campuses.B"),
    ("counting: [1, 2, 3]", "counting: [2]", "campuses.C.vital_levels.counting"),
    ("version: 1", "version: 2", "version"),
]


@pytest.mark.parametrize(("old", "new", "said"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_gap_or_contradiction_is_refused_with_its_place(edited, old, new, said):
    path = edited(old, new)
    message = refusal(path)
    assert said in message
    assert str(path) in message
    line = int(message.split("  line ")[1].split(":")[0])
    begins = DEFAULT_PATH.read_text(encoding="utf-8").split(old)[0].count("\n") + 1
    assert abs(line - begins) <= 12, message


def test_an_override_is_refused_at_its_own_line_and_only_there(edited):
    path = edited("below: 70, above: 200", "below: 70, above: 60")
    message = refusal(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    line = int(message.split("  line ")[1].split(":")[0])
    assert "haemoglobin" in lines[line - 1]
    assert message.startswith(f"{path}: 1 problem\n")


def test_all_problems_are_told_at_once(edited, tmp_path):
    text = edited('"2000-8"', '"2000-9"').read_text(encoding="utf-8")
    path = tmp_path / "two.yaml"
    path.write_text(text.replace("unit: Cel, above: 41", "unit: Cel, above: 60"), encoding="utf-8")
    message = refusal(path)
    assert "2 problems" in message
    assert message.count("Remedy:") == 2


def test_a_missing_file_is_told_with_its_remedy(tmp_path):
    assert "Remedy" in refusal(tmp_path / "none.yaml")


def test_rules_are_told_in_words():
    text = load_rules().describe("B")
    assert text.startswith("Emergency rules: campus B")
    assert "potassium: at or below 3 or at or above 6.5 mmol/L (2823-3 or 6298-4) [S25]" in text
    assert "heart rate: below 40 or above 180 /min [S4]" in text
    assert "a visit of class EMER or IMP is closed" in text
    for rule in Rule:
        if rule:
            assert f"{rule.name} " in text


def test_units_of_items_are_those_of_the_limits():
    for limit in load_rules().default.critical_values:
        assert {ITEM_UNITS[code] for code in limit.codes} == {limit.unit}


@given(st.floats(-1e6, 1e6), st.sampled_from(["below", "at_or_below", "above", "at_or_above"]))
def test_a_limit_is_open_or_closed_exactly(number, side):
    limit = Limit(**{side: number}, source="PROP")
    alarm = limit.low > number or limit.high < number
    assert alarm == side.startswith("at_or")
    inside = math.inf if side.endswith("below") else -math.inf
    assert not (math.nextafter(number, inside) < limit.low)
    assert not (math.nextafter(number, inside) > limit.high)
    outside = math.nextafter(number, -inside)
    assert outside < limit.low or outside > limit.high
