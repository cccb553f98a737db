"""Lag windows under a runner: accumulating panes each second, no wait for any watermark."""

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as BeamTestPipeline
from apache_beam.testing.test_stream import TestStream as BeamTestStream
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import TimestampedValue

from schemas.batches import Lane
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from transforms.measure_lag import GatherReceipts, LagWindow, MeasureLag

STREAMING = PipelineOptions(["--streaming", "--no_save_main_session"])
NOW_S = 1000  # What the injected clock says; the runner's own processing time is advanced.


def now_us() -> int:
    return NOW_S * 1_000_000


def receipt(visible_s, lag_ms, rows, link="main>primary", lane=Lane.EMERGENCY, applied=True):
    visible_us = round(visible_s * 1_000_000)
    return TimestampedValue(
        Receipt(
            link=link,
            lane=lane,
            progress=Position(visible_us, 1),
            applied=applied,
            counts=Counts(rows, rows) if applied else Counts(),
            visible_us=visible_us,
            watermark_us=visible_us - 5,
            commit_us=np.array([visible_us - lag_ms * 1000] if applied else [], np.int64),
            rows_per_commit=np.array([rows] if applied else [], np.int64),
            late=1 if lag_ms > 500 else 0,
        ),
        visible_s,
    )


def run(stream: BeamTestStream, check) -> None:
    with BeamTestPipeline("BundleBasedDirectRunner", STREAMING) as root:
        panes = root | stream.with_output_types(Receipt) | MeasureLag(now_us)
        assert_that(panes, check)


def rows_of(panes: list[LagWindow]) -> dict[tuple, list[int]]:
    found: dict[tuple, list[int]] = {}
    for pane in panes:
        key = (pane.link, pane.lane, pane.window_start_us // 1_000_000)
        found.setdefault(key, []).append(pane.rows)
        assert pane.counts.captured == pane.rows == pane.sketch.count
    return found


def stream() -> BeamTestStream:
    """Begins where the injected clock stands."""
    return BeamTestStream().advance_watermark_to(0).advance_processing_time(NOW_S)


def test_a_pane_contains_those_before_it():
    def check(panes):
        found = rows_of(panes)
        assert found == {("main>primary", "emergency", 1000): [3, 5]}
        last = max(panes, key=lambda pane: pane.rows)
        assert last.late == 1
        assert last.sketch.max_ms == 600
        assert last.watermark_us == 1_004_000_000 - 5

    run(
        stream()
        .add_elements([receipt(1000.1, 20, 1), receipt(1000.2, 600, 2)])
        .advance_processing_time(2)
        .add_elements([receipt(1004, 30, 2)])
        .advance_processing_time(2)
        .advance_watermark_to_infinity(),
        check,
    )


def test_windows_fire_while_the_watermark_stands_still():
    """One campus is dead, so the watermark behind the flatten never moves: lag is measured."""

    def check(panes):
        assert rows_of(panes) == {
            ("main>primary", "emergency", 1000): [1],
            ("main>primary", "emergency", 1010): [2],
            ("main>primary", "routine", 1010): [4],
            ("east>primary", "routine", 1000): [8],
        }

    run(
        stream()
        .add_elements(
            [
                receipt(1009.9, 20, 1),
                receipt(1010, 20, 2),
                receipt(1019, 20, 4, lane=Lane.ROUTINE),
                receipt(1001, 20, 8, link="east>primary", lane=Lane.ROUTINE),
            ]
        )
        .advance_processing_time(1)
        .advance_watermark_to_infinity(),
        check,
    )


def test_a_receipt_behind_the_watermark_is_measured_all_the_same():
    def check(panes):
        assert rows_of(panes)[("main>primary", "emergency", 1000)] == [7]

    run(
        stream()
        .advance_watermark_to(5000)
        .add_elements([receipt(1003, 2_000, 7)])
        .advance_processing_time(1)
        .advance_watermark_to_infinity(),
        check,
    )


def test_a_receipt_that_applied_nothing_makes_no_window():
    def check(panes):
        assert panes == []

    run(
        stream()
        .add_elements([receipt(1003, 20, 7, applied=False)])
        .advance_processing_time(5)
        .advance_watermark_to_infinity(),
        check,
    )


def test_state_is_cleared_a_minute_after_the_window():
    """What comes then begins anew, with fewer rows: the sink keeps the fuller pane."""

    def check(panes):
        assert rows_of(panes)[("main>primary", "emergency", 1000)] == [7, 1]

    run(
        stream()
        .add_elements([receipt(1003, 20, 7)])
        .advance_processing_time(71)
        .add_elements([receipt(1003, 20, 1)])
        .advance_processing_time(1)
        .advance_watermark_to_infinity(),
        check,
    )


def test_no_coder_falls_back_to_pickle(caplog):
    with BeamTestPipeline("BundleBasedDirectRunner", STREAMING) as root:
        panes = root | beam.Create([receipt(1000, 1, 1).value]) | MeasureLag(now_us)
        assert panes.element_type is LagWindow
    assert not [r for r in caplog.records if "pickle" in r.getMessage().lower()]


@pytest.mark.parametrize("lane", list(Lane))
def test_lanes_never_mix(lane):
    def check(panes):
        assert {pane.lane for pane in panes} == {lane}

    run(
        stream()
        .add_elements([receipt(1003, 20, 7, lane=lane)])
        .advance_processing_time(1)
        .advance_watermark_to_infinity(),
        check,
    )


def test_held_receipts_travel_together_and_none_is_lost():
    clock = iter([5.0, 5.5, 6.9, 7.1, 7.2, 9.3])
    gather = GatherReceipts(hold_us=2_000_000, now_us=lambda: round(next(clock) * 1e6))
    sent = []
    for visible_s in (1000, 1001, 1002, 1011, 1012, 1013):
        gather.process(receipt(visible_s, 20, 1).value)
        gather.process(receipt(visible_s, 20, 0, applied=False).value)
        sent.append([element.value for element in gather.finish_bundle()])
    assert [[len(receipts) for _, receipts in bundle] for bundle in sent] == [
        [1], [], [], [2, 1], [], [2],
    ]  # fmt: skip
    found = [one.visible_us for bundle in sent for _, some in bundle for one in some]
    assert found == [s * 1_000_000 for s in (1000, 1001, 1002, 1011, 1012, 1013)]
