"""Places of the binlog as positions: ordered as the log is, and back."""

import hypothesis
import pytest
from hypothesis import strategies as st

from transforms.capture.mariadb.places import (
    FILE_NUMBER_MAX,
    OFFSET_BITS,
    LogPlaceInvalid,
    border,
    describe,
    file_name,
    file_number,
    is_transaction,
    last_before_transaction,
    next_snapshot,
    place_of,
    transaction,
)

files = st.integers(0, FILE_NUMBER_MAX)
offsets = st.integers(0, (1 << OFFSET_BITS) - 1)


@hypothesis.given(files, offsets, files, offsets)
def test_order_is_that_of_the_log(file, offset, other_file, other_offset):
    here, there = (file, offset), (other_file, other_offset)
    assert (border(*here) < border(*there)) == (here < there)
    assert (transaction(*here) < border(*there)) == (here < there)
    assert border(*here) < transaction(*here) < 1 << 63


@hypothesis.given(files, offsets)
def test_there_and_back(file, offset):
    for lsn in (border(file, offset), transaction(file, offset)):
        assert place_of(lsn) == (file, offset)
        assert place_of(last_before_transaction(lsn)) == (file, offset)
    assert is_transaction(transaction(file, offset))
    assert not is_transaction(border(file, offset))


def test_snapshots_of_one_place_follow_on_each_other_until_there_are_too_many():
    here, taken = border(3, 400), []
    while (lsn := next_snapshot(here, taken[-1] if taken else here)) is not None:
        taken.append(lsn)
    assert taken == sorted(set(taken))
    assert len(taken) == 62
    assert here < taken[0] and taken[-1] < transaction(3, 400)
    assert next_snapshot(border(3, 401), taken[-1]) == border(3, 401) + 1
    assert next_snapshot(here, 0) == here + 1


def test_names():
    assert file_number("mysql-bin.000042") == 42
    assert file_name("mysql-bin", 42) == "mysql-bin.000042"
    assert file_number(file_name("b.c", 1_234_567)) == 1_234_567
    assert describe(transaction(7, 1234)) == "binlog.000007:1234"
    for name in ("binlog", "binlog.", "binlog.index", "binlog.１"):
        with pytest.raises(LogPlaceInvalid):
            file_number(name)


def test_what_no_position_holds_is_refused():
    with pytest.raises(LogPlaceInvalid):
        border(FILE_NUMBER_MAX + 1, 4)
    with pytest.raises(LogPlaceInvalid):
        border(1, 1 << OFFSET_BITS)
