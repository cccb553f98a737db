"""The checker of histories finds what it is for, and nothing else."""

import pytest

from tests.faults.history import State, fault_between, final_faults

FIRST = State.read("1,10,11", False)


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        ("1,10,11", None),
        ("1,10,11,12", None),
        ("2", None),
        ("1,10", "going back"),
        ("1,10,12", "lost update"),
        ("1,11", "lost update"),
        ("1,10,12,13", "lost update"),
        ("0,7,8,9", "going back"),
    ],
)
def test_what_may_follow_a_row(after, kind):
    found = fault_between("r", FIRST, State.read(after, False))
    assert (found and found.kind) == kind


def test_a_row_that_is_gone_comes_back_in_another_life_only():
    gone = FIRST._replace(deleted=True)
    assert fault_between("r", FIRST, gone) is None
    assert fault_between("r", gone, State.read("2", False)) is None
    assert fault_between("r", gone, FIRST).kind == "resurrection"
    assert fault_between("r", gone, State.read("1,10,11,12", False)).kind == "resurrection"


def test_the_last_state_is_the_source_s():
    gone = FIRST._replace(deleted=True)
    assert final_faults({"a": FIRST}, {"a": FIRST, "b": gone}) == []
    lost = final_faults({"a": FIRST}, {"a": State.read("1,10", False)})
    assert [fault.kind for fault in lost] == ["lost update"]
    assert [fault.kind for fault in final_faults({"a": FIRST}, {})] == ["lost update"]
    assert [fault.kind for fault in final_faults({}, {"a": FIRST})] == ["resurrection"]
