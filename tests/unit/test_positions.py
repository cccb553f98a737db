"""Places in the logs of a source: each log behind the one before."""

from hypothesis import given
from hypothesis import strategies as st

from schemas.positions import (
    GENERATION_MAX,
    OWN_BITS,
    SEQ_END,
    START,
    Position,
    distance,
    format_lsn,
    generation_of,
    lsn_in,
    own_lsn,
    own_position,
)

OWN = st.integers(0, 2**OWN_BITS - 1)
GENERATIONS = st.integers(0, GENERATION_MAX)


@given(OWN, OWN, GENERATIONS, GENERATIONS)
def test_a_later_log_lies_behind_an_earlier_one(one, other, before, after):
    first, second = lsn_in(before, one), lsn_in(after, other)
    assert (first < second) == ((before, one) < (after, other))
    assert (own_lsn(second), generation_of(second)) == (other, after)
    assert 0 <= second < 2**63


@given(OWN, OWN, GENERATIONS, GENERATIONS)
def test_what_lies_between_is_of_one_log(at, end, before, after):
    found = distance(lsn_in(before, at), lsn_in(after, end))
    assert found == (max(0, end - at) if before == after else end)


def test_a_place_in_another_log_is_before_all_of_this_one():
    place = Position(lsn_in(2, 77), SEQ_END)
    assert own_position(2, place) == Position(77, SEQ_END)
    assert own_position(3, place) == START
    assert own_position(0, START) == START


def test_people_see_which_log_it_is():
    assert format_lsn(0x16_B374_D848) == "16/B374D848"
    assert format_lsn(lsn_in(2, 0x16_B374_D848)) == "2:16/B374D848"
