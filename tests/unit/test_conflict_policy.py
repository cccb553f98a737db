"""The file of conflict policies: every column covered once, refused with a line, told in words."""

import pytest

from schemas.conflict_policy import (
    ALL_TABLES,
    DEFAULT_PATH,
    ORDER,
    Branches,
    Never,
    Newest,
    Rule,
    load_conflict_rules,
)
from schemas.conflict_words import policy_words
from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.siblings import ROW

TEXT = DEFAULT_PATH.read_text(encoding="utf-8")
RULES = load_conflict_rules()


@pytest.fixture
def edited(tmp_path):
    """Returns a function: the packaged file with one text replaced, as a path."""

    def edit(old: str, new: str):
        assert old in TEXT, old
        path = tmp_path / "conflicts.yaml"
        path.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
        return path

    return edit


@pytest.mark.parametrize("name", ALL_TABLES)
def test_every_column_has_exactly_one_policy(name):
    columns = [c for group in RULES.tables[name].groups for c in group.columns]
    assert sorted(columns) == sorted(ALL_TABLES[name].by_name)
    assert set(RULES.tables[name].group_of) == set(columns)
    assert RULES.tables[name].by_group[ROW].columns == ("deleted",)


def test_the_tables_that_several_may_write():
    assert RULES.edited_at_stores == ["consultation", "emr_document", "patient", "treatment_plan"]


def test_the_rules_stand_in_the_order_of_the_domain_notes():
    assert ORDER == (Rule.ARCHIVED, Rule.EMERGENCY, Rule.ROLE, Rule.TIME)
    assert list(RULES.roles) == ["superior", "attending", "consultant", "trainee"]
    assert RULES.undecided == {("consultant", "attending")}
    plan = RULES.tables["treatment_plan"].by_group["plan"]
    assert isinstance(plan, Branches) and plan.by == ORDER
    patient = RULES.tables["patient"].by_group
    assert isinstance(patient["identity"], Never) and patient["blood"].lock
    assert isinstance(patient["phone"], Newest) and patient["phone"].by == (Rule.TIME,)


def test_the_digest_follows_the_content(edited):
    assert load_conflict_rules().digest == RULES.digest
    assert load_conflict_rules(edited("skew_bound_s: 300", "skew_bound_s: 299")).digest != (
        RULES.digest
    )


def test_a_new_table_or_column_is_a_gap():
    with pytest.raises(ConfigError, match="table extra has no policy"):
        load_conflict_rules(tables={**ALL_TABLES, "extra": TABLES["staff"]})


# What is edited, what it becomes, and what the message must say.
REFUSED = [
    ("columns: [phone]", "columns: [fone]", "did you mean `phone`?"),
    ("columns: [phone]", "columns: [fone]", "column `phone` has no policy"),
    ("columns: [phone]", "columns: [phone, abo]", "`abo` has a policy already, in `blood`"),
    ("group: phone,", "group: blood,", "group `blood` is taken"),
    ("group: phone,", "group: row,", "group `row` is taken"),
    ("columns: [bed]", "columns: all", "`all` stands beside other groups"),
    ("\n  allergy:\n", "\n  alergy:\n", "did you mean `allergy`?"),
    ("\n  allergy:\n", "\n  alergy:\n", "table allergy has no policy"),
    ("by: [time], columns: [phone]", "by: [time, role], columns: [phone]", "not in their order"),
    ("by: [time], columns: [phone]", "by: [tine], columns: [phone]", "by[0]"),
    ("source_role: attending", "source_role: atending", "did you mean `attending`?"),
    ("{emergency: consultant, routine", "{emergency: nurse, routine", "`nurse` is no role"),
    ("kind: union, columns: [allergies]", "kind: unite, columns: [allergies]", "groups[4]"),
    ("columns: [allergies], separators", "columns: [allergies, phone], separators", "one text"),
    ("archived: {column: status, values: [archived]}", "assignee: attending", "is archived"),
    (
        "archived: {column: status, values: [archived]}",
        "archived: {column: parent_ref, values: [archived]}",
        "`parent_ref` is not a column of the group",
    ),
    ("signed_off: [closed], closed: []", "signed_off: [shut], closed: []", "no state `shut`"),
    (
        "signed_off: [closed], closed: []",
        "signed_off: [closed], closed: [open]",
        "lead to each other",
    ),
    ("deletes: {rule: goes}", "deletes: {rule: gone}", "deletes.rule"),
    ("skew_bound_s: 300", "skew_bound_s: 0", "skew_bound_s"),
    ("skew_bound_s: 300", "skew_bounds: 300", "did you mean `skew_bound_s`?"),
    ("kind: never, lock: true", "kind: never, locked: true", "is not a setting here"),
]


@pytest.mark.parametrize(("old", "new", "said"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_does_not_fit_is_refused_with_its_line(edited, old, new, said):
    with pytest.raises(ConfigError) as caught:
        load_conflict_rules(edited(old, new))
    text = str(caught.value)
    assert said in text and "line " in text and "conflicts.yaml" in text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_policy_is_told_in_words(language):
    text = policy_words(RULES, language)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + sum(len(table.by_group) for table in RULES.tables.values())
    for table in RULES.tables.values():
        for policy in table.by_group.values():
            said = policy.said
            assert (said.zh if language == "zh" else said.en) in text
    assert all(len(line.split(" | ")) == 5 for line in rows)
    if language == "zh":
        assert "上级医师、主诊医师、会诊医师、规培医师" in text
        assert "empi" not in text and "laboratory" not in text
