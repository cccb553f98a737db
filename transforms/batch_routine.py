"""Batch the routine lane: event-time windows with early panes; what is late goes at once."""

import collections.abc
import dataclasses
import enum
import struct

import apache_beam as beam
from apache_beam import coders
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from schemas.batches import ChangeBatch
from schemas.clocks import wall_clock_us
from schemas.panes import RoutinePane, Timing
from schemas.wire import ChangeBatchCoder

_NEVER_US = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Waiting:
    """What is known of one link between elements.

    Attributes:
      rows, nbytes: of the batches that wait. count: how many they are.
      due_us: the earliest window end among them, where the timer stands.
      closed_us: windows that end by then are closed: the watermark has passed them.
    """

    rows: int = 0
    nbytes: int = 0
    count: int = 0
    due_us: int = _NEVER_US
    closed_us: int = -_NEVER_US


class WaitingCoder(coders.Coder):
    """Five signed 64-bit integers, little-endian."""

    _layout = struct.Struct("<5q")

    def encode(self, value: Waiting) -> bytes:
        return self._layout.pack(*dataclasses.astuple(value))

    def decode(self, encoded: bytes) -> Waiting:
        return Waiting(*self._layout.unpack(encoded))

    def is_deterministic(self) -> bool:
        return True


class Step(enum.Enum):
    """What to do with a batch that arrives."""

    WAIT = enum.auto()  # Keep it with those that wait.
    FLUSH = enum.auto()  # It fills the pane: everything that waits goes, and it too.
    PASS = enum.auto()  # Enough alone, and nothing waits: it goes without touching the bag.
    LATE = enum.auto()  # Behind the watermark of its window: it goes at once, alone.


@dataclasses.dataclass(frozen=True)
class PanePolicy:
    """When routine batches leave: the pure rule of `BatchRoutine`.

    Attributes:
      window_us: length of an event-time window; windows are aligned to 1970.
      early_rows, early_bytes: what fills a pane before its window ends.
      at_once: whether a batch that nothing waits for is a pane.
    """

    window_us: int
    early_rows: int
    early_bytes: int
    at_once: bool = False

    def window_of(self, commit_us: int) -> tuple[int, int]:
        """Returns start (inclusive) and end (exclusive) of the window of a commit."""
        start = commit_us // self.window_us * self.window_us
        return start, start + self.window_us

    def arrive(
        self, waiting: Waiting, commit_us: int, watermark_us: int, rows: int, nbytes: int
    ) -> tuple[Step, Waiting]:
        """Returns the step for a batch and what is known after it.

        A link's watermark is the newest that its batches (heartbeats too) and its timers
        have shown; Beam lets no DoFn ask for it.
        """
        closed_us = max(waiting.closed_us, watermark_us // self.window_us * self.window_us)
        waiting = dataclasses.replace(waiting, closed_us=closed_us)
        _, end_us = self.window_of(commit_us)
        if end_us <= closed_us:
            return Step.LATE, waiting
        if self.at_once and not waiting.count:
            return Step.PASS, Waiting(closed_us=closed_us)
        rows, nbytes = waiting.rows + rows, waiting.nbytes + nbytes
        if rows >= self.early_rows or nbytes >= self.early_bytes:
            step = Step.FLUSH if waiting.count else Step.PASS
            return step, Waiting(closed_us=closed_us)
        due_us = min(waiting.due_us, end_us)
        return Step.WAIT, Waiting(rows, nbytes, waiting.count + 1, due_us, closed_us)

    def waiting_of(self, batches: collections.abc.Sequence[ChangeBatch], closed_us: int) -> Waiting:
        """Returns what is known when just `batches` wait."""
        return Waiting(
            rows=sum(batch.rows for batch in batches),
            nbytes=sum(batch.nbytes for batch in batches),
            count=len(batches),
            due_us=min(
                (self.window_of(batch.commit_us_max)[1] for batch in batches), default=_NEVER_US
            ),
            closed_us=closed_us,
        )

    def parted(
        self, batches: collections.abc.Iterable[ChangeBatch], closed_us: int
    ) -> tuple[list[ChangeBatch], list[ChangeBatch]]:
        """Returns the batches whose windows are closed, and the rest."""
        due, rest = [], []
        for batch in batches:
            _, end_us = self.window_of(batch.commit_us_max)
            (due if end_us <= closed_us else rest).append(batch)
        return due, rest

    def panes(
        self, batches: collections.abc.Iterable[ChangeBatch], timing: Timing
    ) -> list[RoutinePane]:
        """Returns the batches as panes, one a window, each in the order of positions."""
        windows: dict[tuple[int, int], list[ChangeBatch]] = {}
        for batch in sorted(batches, key=lambda batch: (batch.begin, batch.end)):
            windows.setdefault(self.window_of(batch.commit_us_max), []).append(batch)
        return [
            RoutinePane(
                part[0].link,
                start,
                end,
                timing.value,
                tuple(part),
                sum(batch.rows for batch in part) if timing is Timing.LATE else 0,
            )
            for (start, end), part in sorted(windows.items())
        ]


_BATCHES = beam.DoFn.StateParam(BagStateSpec("batches", ChangeBatchCoder()))
_WAITING = beam.DoFn.StateParam(ReadModifyWriteStateSpec("waiting", WaitingCoder()))
_WINDOW_END = TimerSpec("window_end", TimeDomain.WATERMARK)
_WINDOW_END_TIMER = beam.DoFn.TimerParam(_WINDOW_END)
_EARLY = TimerSpec("early", TimeDomain.REAL_TIME)
_EARLY_TIMER = beam.DoFn.TimerParam(_EARLY)


class _BatchRoutineFn(beam.DoFn):
    def __init__(
        self, policy: PanePolicy, early_us: int, now_us: collections.abc.Callable[[], int]
    ):
        self._policy = policy
        self._early_us = early_us
        self._now_us = now_us
        self._panes = {
            timing: Metrics.counter("batch_routine", f"panes_{timing}_total") for timing in Timing
        }
        self._late_rows = Metrics.counter("batch_routine", "late_rows_total")

    def process(
        self,
        element: tuple[str, ChangeBatch],
        batches=_BATCHES,
        waiting=_WAITING,
        window_end=_WINDOW_END_TIMER,
        early=_EARLY_TIMER,
    ):
        link, batch = element
        before = waiting.read() or Waiting()
        step, after = self._policy.arrive(
            before, batch.commit_us_max, batch.watermark_us, batch.rows, batch.nbytes
        )
        if before.count and before.due_us <= after.closed_us:
            # The batch's own watermark closed their window: an engine whose watermark stands
            # still (runners/pulse.py) has on-time panes by this alone.
            due, before = self._part(batches, window_end, early, after.closed_us)
            waiting.write(before)
            yield from self._leave(link, due, Timing.ON_TIME)
            step, after = self._policy.arrive(
                before, batch.commit_us_max, batch.watermark_us, batch.rows, batch.nbytes
            )
        if after != before:
            waiting.write(after)
        if step is Step.LATE:
            yield from self._leave(link, [batch], Timing.LATE)
        elif step is Step.PASS:
            yield from self._leave(link, [batch], Timing.EARLY)
        elif step is Step.FLUSH:
            held = [*batches.read(), batch]
            batches.clear()
            window_end.clear()
            early.clear()
            yield from self._leave(link, held, Timing.EARLY)
        else:
            batches.add(batch)
            if not before.count:
                early.set(Timestamp(micros=self._now_us() + self._early_us))
            if after.due_us != before.due_us:
                window_end.set(Timestamp(micros=after.due_us))

    @on_timer(_EARLY)
    def when_waited_long(
        self,
        link=beam.DoFn.KeyParam,
        batches=_BATCHES,
        waiting=_WAITING,
        window_end=_WINDOW_END_TIMER,
    ):
        before = waiting.read() or Waiting()
        if not before.count:
            return  # The pane left by another way while this timer was on its way.
        held = list(batches.read())
        batches.clear()
        window_end.clear()
        waiting.write(Waiting(closed_us=before.closed_us))
        yield from self._leave(link, held, Timing.EARLY)

    @on_timer(_WINDOW_END)
    def when_watermark_passed(
        self,
        link=beam.DoFn.KeyParam,
        fired_at=beam.DoFn.TimestampParam,
        batches=_BATCHES,
        waiting=_WAITING,
        window_end=_WINDOW_END_TIMER,
        early=_EARLY_TIMER,
    ):
        before = waiting.read() or Waiting()
        closed_us = max(before.closed_us, self._policy.window_of(fired_at.micros)[0])
        due, after = self._part(batches, window_end, early, closed_us)
        waiting.write(after)
        yield from self._leave(link, due, Timing.ON_TIME)

    def _part(self, batches, window_end, early, closed_us: int) -> tuple[list, Waiting]:
        """Takes the batches of closed windows out; returns them and what is known of the rest."""
        due, rest = self._policy.parted(batches.read(), closed_us)
        after = self._policy.waiting_of(rest, closed_us)
        if due:
            batches.clear()
            for batch in rest:
                batches.add(batch)
        if rest:
            window_end.set(Timestamp(micros=after.due_us))
        else:
            window_end.clear()
            early.clear()
        return due, after

    def _leave(self, link: str, batches: list[ChangeBatch], timing: Timing):
        for pane in self._policy.panes(batches, timing):
            self._panes[timing].inc()
            if pane.late_rows:
                self._late_rows.inc(pane.late_rows)
            newest_us = max(batch.commit_us_max for batch in pane.batches)
            yield TimestampedValue((link, pane), Timestamp(micros=newest_us))


class BatchRoutine(beam.PTransform):
    """Gathers PCollection[tuple[link, ChangeBatch]] into PCollection[tuple[link, RoutinePane]].

    Every batch that enters leaves exactly once a bundle that succeeds; none is dropped,
    however late, and none waits for more. Per link, a pane leaves
      * early, when `early_rows` or `early_bytes` wait, or `early_s` after the first of them; with
        an `early_s` of 0 at once, which is right where batches come gathered;
      * on time, when the watermark passes the end of its window;
      * late, at once and alone, where the watermark had passed before. Batches that the
        reader sends again are late in this sense too: the store counts them as duplicates.
    A pane holds one window only. Empty batches (heartbeats) travel like any other, so that
    the ledger moves. Input is in the global window, timestamped by commit time; so is the
    output, by its newest commit. An idle link keeps 40 bytes, no timer and no batch.

    Args:
      now_us: microseconds since 1970, the runner's processing time; can be pickled.
    """

    def __init__(
        self,
        window_s: float = 60,
        early_rows: int = 50_000,
        early_bytes: int = 32 << 20,
        early_s: float = 0.5,
        now_us: collections.abc.Callable[[], int] = wall_clock_us,
    ):
        super().__init__()
        limits = {
            "window_s": window_s,
            "early_rows": early_rows,
            "early_bytes": early_bytes,
        }
        for name, value in limits.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, is {value}")
        if early_s < 0:
            raise ValueError(f"early_s must not be below 0, is {early_s}")
        self._policy = PanePolicy(round(window_s * 1e6), early_rows, early_bytes, not early_s)
        self._early_us = round(early_s * 1e6)
        self._now_us = now_us

    def expand(self, batches):
        # WithKeys leaves `tuple[Any, Any]` behind, for which Beam would fall back to pickle.
        typed = batches | "Type" >> beam.Map(_same).with_output_types(tuple[str, ChangeBatch])
        gather = _BatchRoutineFn(self._policy, self._early_us, self._now_us)
        return typed | "Gather" >> beam.ParDo(gather).with_output_types(tuple[str, RoutinePane])


def _same(element: tuple[str, ChangeBatch]) -> tuple[str, ChangeBatch]:
    return element
