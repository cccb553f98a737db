"""Time left until a source removes log that a link needs: rates, slots, thresholds, words."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.link_health import link_health, risk_of
from pipelines.log_guard import Rates, SlotKeeping, SlotsKeeping
from pipelines.sla_facts import Slot, SourceFacts, StoreFacts
from runners.words import log_warnings, span
from schemas.batches import Lane
from schemas.config import Config, Link, Retention
from schemas.positions import SEQ_END
from schemas.receipts import Counts
from schemas.reports import Conservation, Health, Risk, State
from transforms.capture.retention import RATE_SPAN_US, Rate, seconds_left

GIB = 1 << 30
NOW_US = 1_790_000_000_000_000
LINK = Link("main>primary", "main", "primary")


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10**9)), min_size=2, max_size=60))
def test_the_rate_is_that_of_about_the_last_minute(steps):
    rate, looks, at_us, total = Rate(), [], 0, 0
    for seconds, grown in steps:
        at_us, total = at_us + seconds * 1_000_000, total + grown
        rate.look(at_us, total)
        looks.append((at_us, total))
    then_us, then = max((one for one in looks if one[0] <= at_us - RATE_SPAN_US), default=looks[0])
    assert rate.per_s == pytest.approx((total - then) / ((at_us - then_us) / 1e6))


def test_a_log_that_went_back_is_another_log():
    rate = Rate()
    rate.look(0, 10**9)
    assert rate.per_s is None
    rate.look(1_000_000, 10**9 + 50)
    assert rate.per_s == 50
    rate.look(2_000_000, 100)
    assert rate.per_s is None
    rate.look(3_000_000, 400)
    assert rate.per_s == 300
    rate.look(3_000_000, 500)  # The source's clock has not moved.
    assert rate.per_s == 300


@pytest.mark.parametrize(
    ("slot", "left"),
    [
        (SlotKeeping(0, None, False, 0, None), None),
        (SlotKeeping(3 * GIB, GIB, False, 0, None), 1024),
        (SlotKeeping(3 * GIB, -5, False, 0, None), 0),
        (SlotKeeping(3 * GIB, GIB, True, 0, None), 0),  # `unreserved`: at the next checkpoint.
        (SlotKeeping(3 * GIB, None, False, 600, 3600), 3000),
        (SlotKeeping(3 * GIB, GIB, False, 3500, 3600), 100),
    ],
)
def test_a_slot_keeps_log_by_size_and_by_time_unread(slot, left):
    assert seconds_left(slot.left(per_s=1 << 20)) == left


@given(st.none() | st.floats(0, 1e7))
def test_risk_grows_as_time_goes(left):
    risk = risk_of(left, Retention(warn_s=1000, critical_s=100))
    wanted = Risk.NONE
    if left is not None and left <= 1000:
        wanted = Risk.WARNING if left > 100 else Risk.CRITICAL
    assert risk is wanted


@pytest.fixture
def config():
    source = {"kind": "postgresql", "mapping": "m", "dsn": "postgresql://x@h/main"}
    return Config.model_validate(
        {
            "version": 1,
            "sources": {"main": source},
            "stores": {"primary": {"dsn": "postgresql://x@h/consult"}},
            "dead_letter_key": "file:key",
        }
    )


def health(config, slot: SlotKeeping, rate: float | None) -> Health:
    slots = {LINK.slot: Slot(True, "reserved", slot.retained_bytes, 0)}
    source = SourceFacts(10, NOW_US, slots, keeping=SlotsKeeping({LINK.slot: slot}))
    ledger = Conservation(LINK.name, Lane.ROUTINE, Counts(), 0, 10, SEQ_END, watermark_us=NOW_US)
    store = StoreFacts((ledger,), (), (), (), ())
    return link_health(LINK, source, store, config, NOW_US, rate)


def test_a_links_health_tells_the_time_left_at_the_rate_of_now(config):
    slot = SlotKeeping(GIB, GIB, False, 0, None)
    calm = health(config, slot, 1024.0)
    assert (calm.state, calm.seconds_left, calm.log_risk) == (State.UP, 1 << 20, Risk.NONE)
    busy = health(config, slot, float(1 << 20))
    assert (busy.state, busy.seconds_left, busy.log_risk) == (State.UP, 1024, Risk.CRITICAL)
    unknown = health(config, slot, None)
    assert (unknown.seconds_left, unknown.log_risk) == (None, Risk.NONE)


@pytest.mark.parametrize(
    ("others_read", "lag_s", "state"),
    [(True, 2, State.UP), (True, 60, State.DOWN), (False, 2, State.DOWN)],
    ids=["follows", "left behind", "nobody reads"],
)
def test_a_link_may_follow_what_another_reads(config, others_read, lag_s, state):
    """Its own slot is then not in use (ADR 0018), and all is well."""
    slots = {
        LINK.slot: Slot(False, "reserved", 0, 0),
        "campus_sync_main_other": Slot(others_read, "reserved", 0, 0),
    }
    source = SourceFacts(1_000, NOW_US, slots)
    watermark_us = NOW_US - lag_s * 1_000_000
    ledger = Conservation(
        LINK.name, Lane.ROUTINE, Counts(), 0, 10, SEQ_END, watermark_us=watermark_us
    )
    store = StoreFacts((ledger,), (), (), (), ())
    assert link_health(LINK, source, store, config, NOW_US).state is state


def test_warnings_name_the_nearest_first():
    base = Health("a>b", State.UP)
    healths = [
        dataclasses.replace(base, link=link, seconds_left=left, log_risk=risk)
        for link, left, risk in (
            ("far", 80_000.0, Risk.WARNING),
            ("fine", 1e6, Risk.NONE),
            ("gone", 0.0, Risk.CRITICAL),
            ("near", 90.0, Risk.CRITICAL),
        )
    ]
    texts = [text for text, _ in log_warnings(healths)]
    assert [text.partition(":")[0] for text in texts] == ["gone", "near", "far"]
    assert texts[0].endswith("at any moment")
    assert texts[1].endswith("in 90 s")
    assert texts[2].endswith("in 22 h")


@given(st.floats(0, 1e9))
def test_a_span_is_never_rounded_up(seconds):
    number, unit = span(seconds).split(" ")
    scale = {"s": 1, "min": 60, "h": 3600, "days": 86_400}[unit]
    assert float(number) * scale <= seconds * 1.005


def test_rates_are_kept_apart_by_source():
    rates = Rates()
    assert rates.look("main", 0, 5) is None
    assert rates.look("east", 0, 900) is None
    assert rates.look("main", 1_000_000, 15) == 10
    assert rates.all() == {"main": 10}
