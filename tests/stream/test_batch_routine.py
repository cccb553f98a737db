"""The routine lane under a runner: when panes leave, and that no row is lost however late."""

import logging
import random

import apache_beam as beam
import pytest
from apache_beam.coders import registry
from apache_beam.metrics import MetricsFilter
from apache_beam.testing.test_pipeline import TestPipeline as BeamTestPipeline
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import TimestampedValue

from schemas.batches import ChangeBatch
from schemas.panes import RoutinePane, RoutinePaneCoder
from tests.stream.gathering import LINK, Delivery, Story, batch_of, name_of
from transforms.batch_routine import BatchRoutine, PanePolicy, Step, Waiting

POLICY = {"window_s": 60, "early_rows": 100, "early_s": 5}
DAY_S = 86_400


def told(deliveries: list[Delivery]) -> list[tuple]:
    """Returns `(clock, timing, window start, batches, late rows)` of each delivery."""
    return [
        (d.clock_s, d.timing, d.window_s[0], "".join(d.batches), d.late_rows) for d in deliveries
    ]


def test_on_time():
    """Window [0, 60) s: two batches wait for the watermark, which passes at clock 3."""
    story = Story(**POLICY).watermark(1).commit("A", 10, 3).clock(1).commit("B", 59.9, 4)
    story.clock(3).watermark(59).clock(4).watermark(60)
    assert told(story.run()) == [(4, "on_time", 0, "AB", 0)]


def test_the_end_of_a_window_belongs_to_the_next():
    story = Story(**POLICY).watermark(1).commit("A", 59.999, 1).commit("B", 60, 1)
    story.watermark(60).clock(2).watermark(120)
    assert told(story.run()) == [(0, "on_time", 0, "A", 0), (2, "on_time", 60, "B", 0)]


def test_late_is_delivered_at_once_and_alone():
    """B of the closed window overtakes A of the open one, which goes on waiting."""
    story = Story(**POLICY).watermark(60).commit("A", 70, 2).clock(1).commit("B", 30, 5)
    story.clock(3).watermark(120)
    assert told(story.run()) == [(1, "late", 0, "B", 5), (3, "on_time", 60, "A", 0)]


def test_days_too_late_is_delivered_all_the_same():
    story = Story(**POLICY).watermark(1).commit("A", 10, 2).watermark(60)
    story.clock(1).watermark(30 * DAY_S).commit("B", 11, 3)
    assert told(story.run()) == [(0, "on_time", 0, "A", 0), (1, "late", 0, "B", 3)]


def test_behind_a_watermark_that_no_batch_has_seen_is_late():
    """Nothing was in the window before, and no timer had stood there."""
    story = Story(**POLICY).watermark(600).commit("A", 30, 1)
    assert told(story.run()) == [(0, "late", 0, "A", 1)]


def test_out_of_order_leaves_in_the_order_of_positions():
    story = Story(**POLICY).watermark(1)
    for name, place in (("C", 3), ("A", 1), ("D", 4), ("B", 2)):
        story.commit(name, 10 + place, 1, place=place)
    story.watermark(60)
    assert told(story.run()) == [(0, "on_time", 0, "ABCD", 0)]


def test_a_batch_sent_again_is_delivered_again():
    """Beam and the reader repeat; the store counts the second one as duplicates."""
    story = Story(**POLICY).watermark(1).commit("A", 10, 2, place=1).commit("A", 10, 2, place=1)
    story.watermark(60).clock(1).commit("A", 10, 2, place=1)
    assert told(story.run()) == [(0, "on_time", 0, "AA", 0), (1, "late", 0, "A", 2)]


def test_early_by_count_takes_all_that_waits():
    story = Story(**POLICY).watermark(1).commit("A", 10, 40).clock(1).commit("B", 11, 59)
    story.clock(2).commit("C", 12, 1).commit("D", 13, 1).clock(3).watermark(60)
    assert told(story.run()) == [(2, "early", 0, "ABC", 0), (3, "on_time", 0, "D", 0)]


def test_a_full_batch_passes_alone():
    story = Story(**POLICY).watermark(1).commit("A", 10, 100).commit("B", 11, 250)
    assert told(story.run()) == [(0, "early", 0, "A", 0), (0, "early", 0, "B", 0)]


def test_early_by_bytes():
    story = Story(window_s=60, early_rows=10**6, early_s=5, early_bytes=3000).watermark(1)
    story.commit("A", 10, 2).commit("B", 11, 200)
    assert told(story.run()) == [(0, "early", 0, "AB", 0)]


def test_early_by_processing_time():
    """The first of a pane waits 5 s by the runner's clock; the next pane begins anew."""
    story = Story(**POLICY).watermark(1).commit("A", 10, 1).clock(4).commit("B", 11, 1)
    story.clock(5).commit("C", 12, 1).clock(9.9).clock(10).clock(20)
    assert told(story.run()) == [(5, "early", 0, "AB", 0), (10, "early", 0, "C", 0)]


def test_an_early_pane_takes_its_timers_with_it():
    """After a pane has filled at clock 3, nothing leaves at 5 or at the watermark."""
    story = Story(**POLICY).watermark(1).commit("A", 10, 1).clock(3).commit("B", 11, 99)
    story.clock(5).watermark(60).clock(6).commit("C", 70, 1).clock(8).clock(11)
    assert told(story.run()) == [(3, "early", 0, "AB", 0), (11, "early", 60, "C", 0)]


def test_a_pane_holds_one_window():
    story = Story(**POLICY).watermark(1).commit("A", 59, 50).commit("B", 61, 1).commit("C", 60, 49)
    assert told(story.run()) == [(0, "early", 0, "A", 0), (0, "early", 60, "BC", 0)]


def test_the_watermark_takes_one_window_and_leaves_the_next():
    story = Story(**POLICY).watermark(1).commit("A", 61, 1).commit("B", 59, 1).commit("C", 190, 1)
    story.clock(1).watermark(60).clock(2).watermark(120).clock(4).clock(5)
    assert told(story.run()) == [
        (1, "on_time", 0, "B", 0),
        (2, "on_time", 60, "A", 0),
        (5, "early", 180, "C", 0),
    ]


def test_heartbeats_travel_so_that_the_ledger_moves():
    story = Story(**POLICY).watermark(1).commit("beat", 10, 0).clock(5)
    assert told(story.run()) == [(5, "early", 0, "beat", 0)]


def test_a_stalled_campus_holds_back_no_other():
    """South's watermark stands still; north's windows close, and south's rows leave early."""
    north, south = "north>primary", "south>primary"
    story = Story(north, south, **POLICY).watermark(1, north).watermark(1, south)
    story.commit("N1", 10, 1, north).commit("S1", 10, 1, south)
    story.clock(1).watermark(60, north).commit("N2", 61, 1, north)
    story.clock(2).watermark(120, north)
    story.clock(5).commit("S2", 12, 1, south).clock(60).watermark(60, south)
    deliveries = story.run()
    by_link = {link: [d for d in deliveries if d.link == link] for link in (north, south)}
    assert told(by_link[north]) == [(1, "on_time", 0, "N1", 0), (2, "on_time", 60, "N2", 0)]
    assert told(by_link[south]) == [(5, "early", 0, "S1", 0), (60, "early", 0, "S2", 0)]


@pytest.mark.parametrize("seed", range(12))
def test_no_row_is_lost_in_any_weather(seed):
    """Seeded stories of commits, clocks and watermarks; `Story.run` checks the law."""
    rng = random.Random(seed)
    links = ("a>p", "b>p")
    story = Story(*links, **POLICY)
    clock, watermark = 0.0, dict.fromkeys(links, 0.0)
    for step in range(40):
        link = rng.choice(links)
        action = rng.random()
        if action < 0.6:
            at_s = max(0.0, watermark[link] + rng.uniform(-200, 90))
            story.commit(str(step), at_s, rng.choice([0, 1, 30, 99, 150]), link)
        elif action < 0.8:
            clock += rng.uniform(0.1, 6)
            story.clock(clock)
        else:
            watermark[link] += rng.uniform(0.5, 90)
            story.watermark(watermark[link], link)
    for delivery in story.run():
        assert delivery.late_rows == (delivery.rows if delivery.timing == "late" else 0), seed
        assert delivery.window_s[1] - delivery.window_s[0] == 60, seed


def epoch_us() -> int:
    return 0


def leave_as_they_should(panes: list[tuple[str, RoutinePane]]) -> None:
    """A waits until B tells that its window is over; B fills a pane alone.

    C is behind the watermark that B has told.

    D leaves by one of its timers: this runner lets processing time and watermark run together.
    """
    found = {name_of(b): pane.timing for _, pane in panes for b in pane.batches}
    assert found.pop("D") in ("early", "on_time")
    assert found == {"A": "on_time", "B": "early", "C": "late"}


def test_state_travels_through_the_portable_interface(caplog):
    """FnApiRunner encodes state, timers and panes; nothing of it falls back to pickle."""
    batches = [
        batch_of("A", 10, 1, 3, place=1),
        batch_of("B", 70, 65, 120, place=2),
        batch_of("C", 20, 65, 2, place=3),
        batch_of("D", 71, 66, 4, place=4),
    ]
    root = BeamTestPipeline("FnApiRunner")
    with caplog.at_level(logging.WARNING):
        panes = (
            root
            | beam.Create([TimestampedValue(b, b.commit_us_max / 1e6) for b in batches])
            | beam.Map(lambda value: value).with_output_types(ChangeBatch)
            | beam.WithKeys(lambda batch: batch.link)
            | BatchRoutine(60, 100, 1 << 20, 5, epoch_us)
        )
        assert_that(panes, leave_as_they_should)
        result = root.run()
        result.wait_until_finish()
    assert "RoutinePane" in str(panes.element_type)
    assert isinstance(registry.get_coder(RoutinePane), RoutinePaneCoder)
    assert not [r for r in caplog.records if "deterministic" in r.message]
    found = result.metrics().query(MetricsFilter().with_namespace("batch_routine"))["counters"]
    counts = {counter.key.metric.name: counter.committed for counter in found}
    assert (counts["panes_late_total"], counts["late_rows_total"]) == (1, 2)
    assert counts["panes_early_total"] + counts.get("panes_on_time_total", 0) == 3


@pytest.mark.parametrize("name", ["window_s", "early_rows", "early_bytes", "early_s"])
def test_a_limit_that_is_none_is_refused_when_built(name):
    with pytest.raises(ValueError, match=name):
        BatchRoutine(**{name: -1 if name == "early_s" else 0})


def test_batches_that_come_gathered_are_panes_at_once():
    policy = PanePolicy(window_us=60_000_000, early_rows=100, early_bytes=1000, at_once=True)
    step, after = policy.arrive(Waiting(), 61_000_000, 30_000_000, rows=1, nbytes=1)
    assert (step, after.count) == (Step.PASS, 0)
    step, after = policy.arrive(after, 62_000_000, 130_000_000, rows=1, nbytes=1)
    assert step is Step.LATE


def test_pane_survives_the_wire():
    pane = RoutinePane(LINK, -60, 0, "late", (batch_of("A", 1, 0, 2), batch_of("B", 2, 0, 0)), 2)
    coder = RoutinePaneCoder()
    encoded = coder.encode(pane)
    decoded = coder.decode(encoded)
    assert coder.encode(decoded) == encoded
    assert (decoded.link, decoded.window_start_us, decoded.window_end_us) == (LINK, -60, 0)
    assert (decoded.timing, decoded.late_rows, decoded.rows) == ("late", 2, 2)
    assert [name_of(batch) for batch in decoded.batches] == ["A", "B"]
    for size in (0, 10, 40, len(encoded) - 1):
        with pytest.raises(ValueError):
            coder.decode(encoded[:size])


def test_golden_bytes_of_an_empty_pane():
    """01 format, 02 late, window [60, 120) s, 5 late rows, no batch, name of 3 bytes."""
    pane = RoutinePane("a>b", 60_000_000, 120_000_000, "late", (), 5)
    assert RoutinePaneCoder().encode(pane).hex() == (
        "01020087930300000000000e27070000000005000000000000000000000003000000613e62"
    )
