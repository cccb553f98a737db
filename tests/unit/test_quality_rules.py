"""The file of quality rules: what is read, and what is refused with its line."""

import pytest

from schemas.errors import ConfigError
from schemas.quality_rules import DEFAULT_PATH, RULES, load_quality_rules

TEXT = DEFAULT_PATH.read_text(encoding="utf-8")


@pytest.fixture
def edited(tmp_path):
    """Returns a function: the packaged file with one text replaced, as a path."""

    def edit(old: str, new: str):
        assert old in TEXT, old
        path = tmp_path / "quality.yaml"
        path.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
        return path

    return edit


def test_all_thirty_are_there_and_name_their_source():
    rules = load_quality_rules()
    assert [rule.rule for rule in rules.rules] == list(RULES)
    tags = {"M", "GK", "PROP", "S16", "S27", "S40"}
    assert all(tags & set(rule.source.replace(",", " ").split()) for rule in rules.rules)
    assert all(rule.checks or rule.waits for rule in rules.rules)
    reasons = [check.reason for rule in rules.rules for check in rule.checks]
    assert len(reasons) == len(set(reasons)) > 45
    assert rules.unknown_campuses(["main"]) == []


def test_the_version_follows_the_content(edited):
    assert load_quality_rules().version == load_quality_rules().version
    assert load_quality_rules(edited("above: 30}", "above: 29}")).version != (
        load_quality_rules().version
    )


# What is edited, what it becomes, and what the message must say.
REFUSED = [
    ("  - rule: 1\n", "  - rule: 2\n", "rule 2 stands twice"),
    ("  - rule: 1\n", "  - rule: 2\n", "rules 1 are missing"),
    ("rule: 30", "rule: 31", "rules[29].rule"),
    ("table: vital_sign, column: pulse", "table: vitals, column: pulse", "no table `vitals`"),
    ("column: pulse_per_min", "column: puls_per_min", "did you mean `pulse_per_min`?"),
    ("column: pulse_per_min", "column: device", "vital_sign.device is text"),
    ("items: [potassium]", "items: [kalium]", "no item `kalium`"),
    ("reason: sodium_impossible", "reason: potassium_impossible", "stands twice"),
    ("at_or_below: 0, above: 30}", "below: 31, above: 30}", "every value is an alarm"),
    ("kind: flag,", "kind: flags,", "checks[0]"),
    ('"^[A-Z][0-9]{2}"', '"^[A-Z"', "no regular expression"),
    ("campuses: {}", "campuses: {B: {off: [flag]}}", "no check `flag`"),
    (
        "campuses: {}",
        "campuses: {B: {checks: [{kind: item_unit, reason: unit_of_item}]}}",
        "did you mean `unit_not_of_item`?",
    ),
    ('{codes: ["2075-0"], unit', '{codes: ["2823-3"], unit', "2823-3 stands twice"),
    ("when: value,", "when: values,", "did you mean `value`?"),
    ("    waits: The canonical data have no waveform.\n", "", "neither evaluated nor explained"),
    ("  visit: [started_at, ended_at]\n", "  visit: [started]\n", "visit has no column"),
    ("minutes: 5", "minutes: -5", "minutes"),
]


@pytest.mark.parametrize(("old", "new", "said"), REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_what_does_not_fit_is_refused_with_its_line(edited, old, new, said):
    with pytest.raises(ConfigError) as caught:
        load_quality_rules(edited(old, new))
    text = str(caught.value)
    assert said in text and "line " in text and "quality.yaml" in text
