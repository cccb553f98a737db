"""Hybrid logical clocks: order, layout, and what a wrong clock may not do."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.hlc import HybridClock, stamp_of, us_of
from transforms.deliver.merging.merge_wire import hlc_of

NOW = 1_800_000_000_000_000
BOUND = 300_000_000
TIMES = st.integers(0, 4_102_444_800_000_000)


class Wall:
    """A wall clock that a test sets."""

    def __init__(self, us: int):
        self.us = us

    def __call__(self) -> int:
        return self.us


@given(TIMES)
def test_the_layout_is_that_of_the_column(us):
    assert stamp_of(us) == int(hlc_of(np.int64(us)))
    assert us_of(stamp_of(us)) == us
    assert stamp_of(us) < 1 << 63


MOVES = st.lists(
    st.tuples(st.integers(-3_600_000_000, 3_600_000_000), st.booleans(), st.integers(0, 99))
)


@given(MOVES)
def test_stamps_ascend_whatever_the_wall_does(moves):
    wall = Wall(NOW)
    clock = HybridClock(wall, BOUND)
    last = 0
    for jump, hears, count in moves:
        wall.us += jump
        if hears:
            heard = stamp_of(NOW + jump) + count
            last = max(last, heard) if clock.witness(heard, "east.1") else last
        stamp = clock.tick()
        assert stamp > last
        last = stamp


def test_a_burst_within_a_microsecond_stays_in_order():
    clock = HybridClock(lambda: NOW, BOUND)
    stamps = [clock.tick() for _ in range(100_000)]
    assert stamps == sorted(set(stamps))
    assert us_of(stamps[-1]) - NOW < 2_000_000


def test_an_hour_ahead_is_refused_and_remembered_until_it_is_trusted_again():
    clock = HybridClock(lambda: NOW, BOUND)
    ahead = stamp_of(NOW + 3_600_000_000)
    assert not clock.witness(ahead, "east.1")
    assert clock.distrusted == {"east.1"}
    assert us_of(clock.tick()) - NOW < 1000
    assert clock.witness(stamp_of(NOW + BOUND), "west.1")
    assert clock.distrusted == {"east.1"}
    clock.trust("east.1")
    assert not clock.distrusted


def test_a_stamp_of_the_past_changes_nothing():
    clock = HybridClock(lambda: NOW, BOUND)
    first = clock.tick()
    assert clock.witness(stamp_of(NOW - 3_600_000_000), "east.1")
    assert clock.latest == first


def test_a_clock_that_was_set_back_goes_on_and_says_so():
    wall = Wall(NOW)
    clock = HybridClock(wall, BOUND)
    before = clock.tick()
    wall.us -= 3_600_000_000
    assert clock.tick() == before + 1
    assert clock.ahead_us >= 3_600_000_000
    later = HybridClock(wall, BOUND, latest=clock.latest, distrusted=["east.1"])
    assert later.tick() > clock.latest
    assert later.distrusted == {"east.1"}
