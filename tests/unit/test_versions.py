"""Version vectors and dots: a lattice with one text for each vector."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import WireFormatError
from schemas.positions import SEQ_END, Position
from schemas.versions import (
    EMPTY,
    Dot,
    Order,
    canonical_json,
    compare,
    covers,
    from_text,
    includes,
    join,
    next_dot,
    source_dot,
    store_actor,
    to_text,
    with_dot,
)

ACTORS = st.sampled_from(["east.1", "east.2", "primary.1", "west.1", "院.1", "@main", "b"])
VECTORS = st.dictionaries(ACTORS, st.integers(1, 9) | st.integers(1, 1 << 120), max_size=5)


@given(VECTORS, VECTORS, VECTORS)
def test_join_is_a_least_upper_bound(a, b, c):
    assert join(a, b) == join(b, a)
    assert join(a, join(b, c)) == join(join(a, b), c)
    assert join(a, a) == a == join(a, EMPTY)
    assert covers(join(a, b), a) and covers(join(a, b), b)
    if covers(c, a) and covers(c, b):
        assert covers(c, join(a, b))


@given(VECTORS, VECTORS)
def test_two_vectors_stand_in_one_way(a, b):
    order = compare(a, b)
    turned = {Order.BEFORE: Order.AFTER, Order.AFTER: Order.BEFORE}
    assert compare(b, a) is turned.get(order, order)
    assert (order is Order.EQUAL) == (a == b)
    assert (order in (Order.AFTER, Order.EQUAL)) == covers(a, b)
    assert (order is Order.CONCURRENT) == (join(a, b) not in (a, b))


@given(VECTORS, ACTORS)
def test_the_next_dot_is_new_and_the_only_one_that_is(vector, actor):
    dot = next_dot(vector, actor)
    assert not includes(vector, dot)
    after = with_dot(vector, dot)
    assert includes(after, dot) and compare(after, vector) is Order.AFTER
    assert not includes(after, next_dot(after, actor))


@given(VECTORS)
def test_a_vector_has_one_text(vector):
    text = to_text(vector)
    assert from_text(text) == vector
    assert to_text(dict(reversed(vector.items()))) == text
    assert json.loads(text) == vector


def test_the_text_is_what_jsonb_prints():
    assert to_text({"primary.1": 12, "b": 1, "east.1": 3}) == (
        '{"b": 1, "east.1": 3, "primary.1": 12}'
    )
    assert to_text({"a.1": 0}) == "{}"
    assert canonical_json({"bb": [{"zz": None, "a": True}], "会": "诊"}) == (
        '{"bb": [{"a": true, "zz": null}], "会": "诊"}'
    )


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"a": -1}', '{"a": 0}', '{"a": "1"}', "{", '{"a": true}']
)
def test_what_is_no_vector_is_refused(text):
    with pytest.raises(WireFormatError):
        from_text(text)


POSITIONS = st.builds(Position, st.integers(0, (1 << 63) - 1), st.integers(1, SEQ_END))


@given(POSITIONS, POSITIONS)
def test_a_source_counts_by_its_log(one, other):
    dots = [source_dot("main", position) for position in (one, other)]
    assert (dots[0].counter < dots[1].counter) == (one < other)
    assert all(dot.of_source for dot in dots)
    assert not Dot(store_actor("main", "1"), 1).of_source
