"""Edits that wait at a store, taken into a record as each editor saw it."""

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Lane
from schemas.conflict_policy import load_conflict_rules
from schemas.siblings import UNSEEN, Record, Stamp
from schemas.versions import Dot
from transforms.conflicts.edit import edit_record
from transforms.conflicts.fold import EditApart, PendingEdit, fold_edits
from transforms.conflicts.join import join_records
from transforms.conflicts.show import show

RULES = load_conflict_rules()
PLAN = RULES.tables["treatment_plan"]
NOTHING = dict.fromkeys(PLAN.group_of)


def stamp(n: int, role: str = "attending") -> Stamp:
    return Stamp(n << 16, Lane.ROUTINE, role, f"D{n}")


def edit(
    n: int, before: dict | None, after: dict | None, role: str = "attending", actor: str = "a"
):
    """An edit of a store, the n-th by its clock, from one row to another."""
    return PendingEdit(actor, stamp(n, role), after is None, before, after)


def row(**values) -> dict:
    return NOTHING | values


def shown(record: Record) -> dict:
    return show(record, PLAN, RULES).values


def test_edits_in_order_leave_the_last_and_the_history_of_all():
    one, two = row(title="t", content="1"), row(title="t", content="2")
    record, met = fold_edits(UNSEEN, [edit(1, None, one), edit(2, one, two)], PLAN, RULES)
    assert record.seen == {"a": 2}
    assert shown(record) == two
    plans = [entry.values["content"] for group, entry in met if group == "plan"]
    assert plans == ["1", "2"]
    assert [entry.dot.counter for entry in record.entries("plan").values()] == [2]


def test_an_edit_touches_its_groups_only():
    one = row(title="t", follow_up="1")
    record, _ = fold_edits(UNSEEN, [edit(1, None, one)], PLAN, RULES)
    record, met = fold_edits(record, [edit(2, one, one | {"follow_up": "2"})], PLAN, RULES)
    assert {group for group, _ in met} == {"row", "follow_up"}
    assert list(record.entries("plan")) == [Dot("a", 1)]


def test_the_second_of_two_waiting_edits_has_not_seen_what_the_row_did_not_show():
    """A consultant's edit loses to one that had come before; the next one saw the consultant's."""
    base, _ = fold_edits(UNSEEN, [edit(1, None, row(content="0"))], PLAN, RULES)
    theirs = edit_record(base, "b", stamp(2, "consultant"), {"content": "b"}, PLAN, RULES)
    ours = edit_record(base, "c", stamp(2, "consultant"), {"content": "c"}, PLAN, RULES)
    held = join_records(theirs, ours)  # Two equals: a person is asked.
    before = row(**shown(held))
    first, second = before | {"content": "1st"}, before | {"content": "2nd"}
    waiting = [edit(2, before, first), edit(3, first, second)]
    record, _ = fold_edits(held, waiting, PLAN, RULES)
    left = {entry.values["content"] for entry in record.entries("plan").values()}
    assert "2nd" in left and "1st" not in left
    assert left & {"b", "c"}  # What was not on the screen still waits.


def test_deleted_and_created_anew_while_waiting_is_a_new_life():
    one = row(title="t", content="1")
    edits = [edit(1, None, one), edit(2, one, None), edit(3, None, row(title="u"))]
    record, met = fold_edits(UNSEEN, edits, PLAN, RULES)
    assert shown(record)["content"] is None and shown(record)["title"] == "u"
    assert record.seen == {"a": 3}
    assert [entry.values for group, entry in met if group == "row"] == [
        {"deleted": False},
        {"deleted": True},
        {"deleted": False},
    ]


@pytest.mark.parametrize(
    ("version", "apart"),
    [({"a": 1}, False), ({}, False), (None, False), ({"a": 2}, True), ({"a": 1, "b": 1}, True)],
)
def test_an_edit_of_another_version_than_the_record_has_is_told(version, apart):
    """As where the row or the record was restored by hand, and not the other."""
    one, two = row(title="t"), row(title="u")
    record, _ = fold_edits(UNSEEN, [edit(1, None, one)], PLAN, RULES)
    with pytest.raises(EditApart) if apart else contextlib.nullcontext():
        fold_edits(record, [edit(2, one, two)._replace(version=version)], PLAN, RULES)


def test_a_waiting_edit_may_have_seen_one_that_waited_before_it():
    one, two = row(title="t"), row(title="u")
    waiting = [edit(1, None, one), edit(2, one, two)._replace(version={"a": 1})]
    record, _ = fold_edits(UNSEEN, waiting, PLAN, RULES)
    assert record.seen == {"a": 2}


@given(st.lists(st.tuples(st.sampled_from(["content", "follow_up", "title"]), st.integers(0, 9))))
def test_folded_at_once_or_one_by_one_is_the_same_where_nothing_is_in_dispute(changes):
    rows = [row(title="t")]
    for column, value in changes:
        rows.append(rows[-1] | {column: str(value)})
    edits = [edit(1, None, rows[0])]
    for before, after in itertools.pairwise(rows):
        if before != after:
            edits.append(edit(len(edits) + 1, before, after))
    together, _ = fold_edits(UNSEEN, edits, PLAN, RULES)
    single = UNSEEN
    for one in edits:
        single, _ = fold_edits(single, [one], PLAN, RULES)
    assert together == single
    assert shown(together) == rows[-1]
