"""Time left until the source removes log that a link needs."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from transforms.capture.mariadb.dsn import Server
from transforms.capture.mariadb.places import border, last_before_transaction
from transforms.capture.mariadb.state import LogFile, LogState
from transforms.capture.retention import Retention, seconds_left

NOW_US = 1_000_000_000_000_000


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(None, 9e9, None, 1 << 40, 1e9), None),
        (Retention(3600, 0, None, 0, 0), 3600),
        (Retention(3600, 600, None, 0, 0), 3000),
        (Retention(3600, 4000, None, 0, 0), 0),
        (Retention(None, 0, 1000, 400, 60), 10),
        (Retention(None, 0, 1000, 1000, 0), 0),
        (Retention(None, 0, 1000, 400, 0), None),
        (Retention(5, 0, 1000, 400, 60), 5),
        (Retention(50, 0, 1000, 400, 60), 10),
    ],
)
def test_seconds_left(retention, expected):
    assert seconds_left(retention) == expected


@hypothesis.given(
    st.none() | st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.none() | st.integers(0, 1 << 50),
    st.integers(0, 1 << 50),
    st.floats(0, 1e12),
)
def test_standing_still_longer_never_leaves_more(expire_s, behind_s, size_max, needed, rate):
    now = Retention(expire_s, behind_s, size_max, needed, rate)
    later = dataclasses.replace(now, behind_s=behind_s + 60, needed_bytes=needed + int(60 * rate))
    left = seconds_left(now)
    assert left is None or (left >= 0 and seconds_left(later) <= left)


def log_state(files: dict[int, int], end: int, **settings: str) -> LogState:
    listed = tuple(LogFile(number, size) for number, size in files.items())
    return LogState(
        server=Server("h", 3306, "sync", "his"),
        mariadb=True,
        logging=True,
        base="binlog",
        files=listed,
        log_end_lsn=last_before_transaction(border(listed[-1].number, end)),
        oldest_lsn=border(listed[0].number, 4),
        do_databases=frozenset(),
        ignore_databases=frozenset(),
        settings=settings,
        grants=(),
        identity="i",
        now_us=NOW_US,
    )


def test_what_a_link_needs_of_the_log():
    state = log_state(
        {3: 100, 4: 200, 5: 50}, 50, expire_logs_days="2", max_binlog_total_size="900"
    )
    found = state.retention(border(4, 20), NOW_US - 5_000_000, 7.0)
    assert found == Retention(172_800.0, 5.0, 900, 250, 7.0)
    assert state.retention(state.log_end_lsn, 0, 7.0).behind_s == 0
    assert not state.keeps(border(2, 4)) and state.keeps(border(3, 4))


def test_expiry_may_be_off():
    state = log_state({3: 9}, 9, binlog_expire_logs_seconds="0", expire_logs_days="0.000000")
    assert state.retention(0, 0, 0).expire_s is None
    state = log_state(
        {3: 9}, 9, binlog_expire_logs_seconds="60", binlog_expire_logs_auto_purge="OFF"
    )
    assert state.retention(0, 0, 0).expire_s is None


def test_growth_is_measured_over_rotation_and_purge():
    before = log_state({3: 100, 4: 200}, 150)
    for files in ({4: 250, 5: 300, 6: 10}, {3: 100, 4: 250, 5: 300, 6: 10}):
        now = dataclasses.replace(log_state(files, 10), now_us=NOW_US + 2_000_000)
        assert now.growth(before) == (100 + 300 + 10) / 2
    gone = dataclasses.replace(log_state({6: 10}, 10), now_us=NOW_US + 1_000_000)
    assert gone.growth(before) == 10
    assert before.growth(before) == 0


def test_filters_of_the_log():
    state = dataclasses.replace(log_state({1: 9}, 9), do_databases=frozenset({"his"}))
    assert state.logs("his") and not state.logs("lis")
    state = dataclasses.replace(log_state({1: 9}, 9), ignore_databases=frozenset({"his"}))
    assert state.logs("lis") and not state.logs("his")
