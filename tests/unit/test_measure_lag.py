"""What receipts say about lag, their wire form, and the algebra behind the windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Lane
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from schemas.receipts_wire import ReceiptCoder
from schemas.sketches import EMPTY
from transforms.measure_lag import (
    LagWindow,
    LagWindowCoder,
    Measured,
    MeasuredCoder,
    MergeReceipts,
    measure,
    merge,
)

US = 1_000_000


@st.composite
def receipts(draw) -> Receipt:
    commits = draw(st.lists(st.integers(0, 50 * US), unique=True, max_size=5))
    rows = [draw(st.integers(1, 1000)) for _ in commits]
    return Receipt(
        link=draw(st.sampled_from(["main>primary", "east>main"])),
        lane=draw(st.sampled_from(list(Lane))),
        progress=Position(draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 2**31 - 1))),
        applied=draw(st.booleans()),
        counts=Counts(sum(rows), sum(rows)),
        visible_us=draw(st.integers(50 * US, 60 * US)),
        watermark_us=draw(st.integers(0, 50 * US)),
        commit_us=np.array(commits, np.int64),
        rows_per_commit=np.array(rows, np.int64),
        late=draw(st.integers(0, 10)),
    )


def same(a: Receipt, b: Receipt) -> bool:
    plain = [name for name in vars(a) if name not in ("commit_us", "rows_per_commit")]
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("commit_us", "rows_per_commit")
    )
    return arrays and all(getattr(a, name) == getattr(b, name) for name in plain)


@given(receipts())
def test_receipts_cross_the_wire(receipt):
    coder = ReceiptCoder()
    encoded = coder.encode(receipt)
    assert same(coder.decode(encoded), receipt)
    assert coder.encode(coder.decode(encoded)) == encoded


def test_foreign_or_cut_receipts_are_refused():
    receipt = Receipt(
        "a>b", Lane.ROUTINE, Position(1, 1), True, Counts(), 0, 0, np.array([1]), np.array([1])
    )
    encoded = ReceiptCoder().encode(receipt)
    for wrong in (b"", b"\x07" + encoded[1:], encoded[:-20]):
        with pytest.raises(ValueError):
            ReceiptCoder().decode(wrong)


def test_lag_is_from_each_rows_commit_to_visible():
    receipt = Receipt(
        link="main>primary",
        lane=Lane.EMERGENCY,
        progress=Position(9, 1),
        applied=True,
        counts=Counts(4, 4),
        visible_us=10 * US,
        watermark_us=9 * US,
        commit_us=np.array([9 * US, 9_990_000]),
        rows_per_commit=np.array([1, 3]),
    )
    measured = measure(receipt)
    assert measured.sketch.count == 4
    assert (measured.sketch.min_ms, measured.sketch.max_ms) == (10, 1000)
    assert measured.counts == Counts(4, 4)


@given(st.lists(receipts(), max_size=6), st.integers(0, 6))
def test_any_grouping_of_receipts_gives_the_same_bytes(some, cut):
    combine, coder = MergeReceipts(), MeasuredCoder()

    def accumulate(part):
        accumulator = combine.create_accumulator()
        for receipt in part:
            accumulator = combine.add_input(accumulator, receipt)
        return accumulator

    whole = accumulate(some)
    parts = [accumulate(some[cut:]), accumulate(some[:cut])]
    assert coder.encode(combine.merge_accumulators(parts)) == coder.encode(whole)
    assert whole.sketch.count == sum(int(receipt.rows_per_commit.sum()) for receipt in some)


def test_measurements_and_windows_cross_the_wire():
    measured = Measured(EMPTY, 3, Counts(5, 4, 1), 77)
    again = MeasuredCoder().decode(MeasuredCoder().encode(measured))
    assert merge([again]).counts == measured.counts
    assert (again.late, again.watermark_us) == (3, 77)
    window = LagWindow("east>main", Lane.ROUTINE, 10 * US, 0, 3, EMPTY, Counts(5, 4, 1), 77)
    assert LagWindowCoder().decode(LagWindowCoder().encode(window)) == window
    with pytest.raises(ValueError):
        MeasuredCoder().decode(b"\x05")
