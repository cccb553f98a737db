"""Runs stories of the routine lane: what links commit, how clocks move, what is delivered when."""

import collections
import dataclasses

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct import direct_runner
from apache_beam.runners.direct.clock import TestClock as BeamTestClock
from apache_beam.testing.test_pipeline import TestPipeline as BeamTestPipeline
from apache_beam.testing.test_stream import TestStream as BeamTestStream
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from schemas.batches import ChangeBatch, Lane
from schemas.panes import RoutinePane
from schemas.positions import SEQ_END, Position
from schemas.wire import ChangeBatchCoder
from tests.canonical import rows_of
from transforms.batch_routine import BatchRoutine

STREAMING = PipelineOptions(["--streaming", "--no_save_main_session"])
LINK = "main>primary"


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A pane as it left: seconds by the runner's clock, window in seconds, batches by name."""

    clock_s: float
    link: str
    timing: str
    window_s: tuple[float, float]
    batches: tuple[str, ...]
    rows: int
    late_rows: int


class _StreamClock(BeamTestClock):
    """TestStream's processing time, where the tests and the transform can read it too."""

    running: "_StreamClock"

    def __init__(self):
        super().__init__()
        self.deliveries: list[Delivery] = []
        _StreamClock.running = self


def now_us() -> int:
    return round(_StreamClock.running.time() * 1e6)


def batch_of(
    name: str, commit_s: float, watermark_s: float, rows: int, link: str = LINK, place: int = 1
) -> ChangeBatch:
    """Returns a routine batch of `rows` laboratory results in (place - 1, place]."""
    return ChangeBatch(
        link=link,
        lane=Lane.ROUTINE,
        begin=Position(place - 1, SEQ_END),
        end=Position(place, SEQ_END),
        captured=rows,
        commit_us_max=round(commit_s * 1e6),
        watermark_us=round(watermark_s * 1e6),
        read_us=0,
        tables={"lab_result": rows_of("lab_result", [{}] * rows)} if rows else {},
        escalations=((name, "E1", 0, 0, True),),  # Carries the name through the coder.
    )


def name_of(batch: ChangeBatch) -> str:
    return batch.escalations[0][0]


def _note(element: tuple[str, RoutinePane]) -> None:
    link, pane = element
    clock = _StreamClock.running
    clock.deliveries.append(
        Delivery(
            clock_s=clock.time(),
            link=link,
            timing=pane.timing,
            window_s=(pane.window_start_us / 1e6, pane.window_end_us / 1e6),
            batches=tuple(map(name_of, pane.batches)),
            rows=pane.rows,
            late_rows=pane.late_rows,
        )
    )
    assert pane.link == link == pane.batches[0].link


class Story:
    """Events of one run in order; each link has a source, a watermark and a branch of its own.

    Every commit is one batch, at the next position of its link unless `place` says otherwise.
    The batch carries the watermark that its link's reader has reported by then.
    """

    def __init__(self, *links: str, **policy):
        self._links = links or (LINK,)
        self._policy = policy
        self._stream = BeamTestStream(coder=ChangeBatchCoder(), output_tags=set(self._links))
        self._watermark_s = dict.fromkeys(self._links, 0.0)
        self._clock_s = 0.0
        self._places: collections.Counter = collections.Counter()
        self._rows: collections.Counter = collections.Counter()

    def clock(self, at_s: float) -> "Story":
        """Moves the runner's clock on to `at_s`; a time that has come already is no move."""
        at_s = round(at_s, 3)  # TestStream counts milliseconds.
        if at_s > self._clock_s:
            step_us = round((at_s - self._clock_s) * 1000) * 1000
            self._stream.advance_processing_time(Duration(micros=step_us))
            self._clock_s = at_s
        return self

    def commit(
        self, name: str, at_s: float, rows: int, link: str = "", place: int | None = None
    ) -> "Story":
        link, at_s = link or self._links[0], round(at_s, 3)
        self._places[link] += 1
        place = self._places[link] if place is None else place
        self._rows[link] += rows
        batch = batch_of(name, at_s, self._watermark_s[link], rows, link, place)
        element = TimestampedValue(batch, Timestamp(micros=batch.commit_us_max))
        self._stream.add_elements([element], tag=link)
        return self

    def watermark(self, at_s: float, link: str = "") -> "Story":
        link = link or self._links[0]
        self._watermark_s[link] = at_s = round(at_s, 3)
        self._stream.advance_watermark_to(Timestamp(micros=round(at_s * 1e6)), tag=link)
        return self

    def run(self) -> list[Delivery]:
        """Returns the deliveries in order, after asserting that no row was lost or doubled."""
        for link in self._links:
            self._stream.advance_watermark_to_infinity(tag=link)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(direct_runner, "TestClock", _StreamClock)
            root = BeamTestPipeline("BundleBasedDirectRunner", STREAMING)
            sources = root | self._stream
            if not isinstance(sources, dict):
                sources = {self._links[0]: sources}
            for link in self._links:
                _ = (
                    sources[link]
                    | f"KeyByLink {link}" >> beam.WithKeys(_link_of).with_output_types(_KEYED)
                    | f"BatchRoutine {link}" >> BatchRoutine(now_us=now_us, **self._policy)
                    | f"Note {link}" >> beam.Map(_note)
                )
            root.run().wait_until_finish()
        deliveries = _StreamClock.running.deliveries
        delivered = collections.Counter()
        for delivery in deliveries:
            delivered[delivery.link] += delivery.rows
        assert delivered == +self._rows, "rows in differ from rows out"
        return deliveries


_KEYED = tuple[str, ChangeBatch]


def _link_of(batch: ChangeBatch) -> str:
    return batch.link
