"""Lag sketches: the error bound against exact quantiles, the algebra of merging, the bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.receipts_wire import LagSketchCoder
from schemas.sketches import EMPTY, RELATIVE_ACCURACY, LagSketch, merge_all

DAYS_30_US = 30 * 86_400 * 1_000_000
lags_us = st.integers(10, DAYS_30_US) | st.integers(10, 5_000_000)
weighted = st.lists(st.tuples(lags_us, st.integers(1, 50)), min_size=1, max_size=200)
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)


def sketch_of(pairs) -> LagSketch:
    values, weights = np.array(pairs, np.int64).reshape(-1, 2).T
    return LagSketch.of_us(values, weights)


@given(weighted)
def test_every_quantile_is_within_one_per_cent_of_the_exact_one(pairs):
    sketch = sketch_of(pairs)
    exact = np.sort(np.repeat(*np.array(pairs, np.int64).T))
    for q in QUANTILES:
        truth = exact[int(q * (len(exact) - 1))] / 1000
        assert sketch.quantile(q) == pytest.approx(truth, rel=RELATIVE_ACCURACY * 1.000001)
    assert sketch.quantile(0) == exact[0] / 1000
    assert sketch.quantile(1) == exact[-1] / 1000


@given(weighted)
def test_count_ends_and_mean_are_exact(pairs):
    sketch = sketch_of(pairs)
    assert sketch.count == sum(weight for _, weight in pairs)
    assert sketch.min_us == min(value for value, _ in pairs)
    assert sketch.max_us == max(value for value, _ in pairs)
    assert sketch.sum_us == sum(value * weight for value, weight in pairs)


@given(weighted, weighted, weighted)
def test_merge_is_commutative_and_associative_and_equals_one_sketch_of_all(a, b, c):
    x, y, z = sketch_of(a), sketch_of(b), sketch_of(c)
    assert x.merge(y) == y.merge(x)
    whole = sketch_of(a + b + c)
    assert x.merge(y).merge(z) == x.merge(y.merge(z)) == merge_all([z, x, y]) == whole
    assert x.merge(EMPTY) == x == EMPTY.merge(x)


@given(weighted)
def test_bytes_come_back_and_are_equal_for_equal_content(pairs):
    sketch = sketch_of(pairs)
    encoded = sketch.to_bytes()
    assert LagSketch.from_bytes(encoded) == sketch
    assert sketch_of(sorted(pairs, reverse=True)).to_bytes() == encoded
    assert len(encoded) <= 40 + 4 * len(pairs)


@given(weighted, st.data())
def test_damaged_bytes_are_refused_or_differ(pairs, data):
    encoded = sketch_of(pairs).to_bytes()
    for cut in (0, data.draw(st.integers(0, len(encoded) - 1))):
        with pytest.raises(ValueError):
            LagSketch.from_bytes(encoded[:cut])
    with pytest.raises(ValueError):
        LagSketch.from_bytes(b"\x09" + encoded[1:])


def test_empty_and_weightless_sketches_say_nothing():
    nothing = LagSketch.of_us(np.array([5]), np.array([0]))
    assert nothing == EMPTY == LagSketch.from_bytes(EMPTY.to_bytes())
    assert (EMPTY.count, EMPTY.quantile(0.99), EMPTY.mean_ms, EMPTY.share_within(1)) == (0, 0, 0, 1)


def test_a_negative_lag_of_a_skewed_clock_is_kept_and_shows_as_the_smallest():
    sketch = LagSketch.of_ms(np.array([-250.0, 3.0, 4.0]))
    assert sketch.min_ms == -250.0
    assert sketch.count == 3
    assert sketch.quantile(0.5) == pytest.approx(3.0, rel=RELATIVE_ACCURACY)


def test_a_sum_beyond_64_bits_stays_exact():
    sketch = LagSketch.of_us(np.array([DAYS_30_US, 1]), np.array([10**9, 1]))
    assert sketch.sum_us == DAYS_30_US * 10**9 + 1
    assert LagSketch.from_bytes(sketch.to_bytes()).sum_us == sketch.sum_us


def test_share_within_counts_rows():
    sketch = LagSketch.of_ms(np.array([10.0, 2000.0]), np.array([99, 1]))
    assert sketch.share_within(1000) == 0.99
    assert sketch.share_within(2000) == 1.0


def test_weights_must_fit():
    for values, weights in (([1], [-1]), ([1, 2], [1])):
        with pytest.raises(ValueError):
            LagSketch.of_us(np.array(values), np.array(weights))
    with pytest.raises(ValueError):
        EMPTY.quantile(1.5)


def test_sketches_cross_the_wire():
    coder = LagSketchCoder()
    sketch = LagSketch.of_ms(np.array([0.01, 30.0]))
    assert coder.decode(coder.encode(sketch)) == sketch
    assert coder.is_deterministic()
