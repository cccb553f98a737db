"""Measure how long changes took to become visible: receipts to lag windows of ten seconds."""

import dataclasses
import struct
from collections.abc import Callable, Iterable

import apache_beam as beam
from apache_beam import coders
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import CombiningValueStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.timestamp import Timestamp

from schemas import receipts_wire  # noqa: F401  Registers the receipts' coder.
from schemas.batches import Lane
from schemas.clocks import wall_clock_us
from schemas.receipts import Counts, Receipt
from schemas.sketches import EMPTY, WINDOW_S, LagSketch, merge_all

EARLY_S = 1.0
# A receipt is made when its commit returns, so it is here within seconds; a window is kept a
# minute longer than it lasts for what a restarting engine had in hand.
GRACE_S = 60

_FORMAT = 1
_HEAD = struct.Struct("<Bq6qqI")  # Format, late, six counts, watermark, bytes of the sketch.

_NOTHING = Counts()


@dataclasses.dataclass(frozen=True)
class Measured:
    """What receipts say together; the accumulator of `MergeReceipts`.

    Attributes:
      sketch: lag of every delivered row, commit at the source to commit at the store.
      late: rows delivered behind the watermark. counts: outcomes of all changes.
      watermark_us: newest source watermark.
    """

    sketch: LagSketch = EMPTY
    late: int = 0
    counts: Counts = _NOTHING
    watermark_us: int = 0


@dataclasses.dataclass(frozen=True)
class LagWindow:
    """The lag of one link and lane in one window, as far as it is known: a later pane has more.

    Attributes:
      window_start_us: windows are `WINDOW_S` long, aligned to 1970, by the time when rows
        became visible.
      rows: delivered rows, all in `sketch`; `late` of them behind the watermark.
      counts: outcomes of all row changes. watermark_us: newest source watermark.
    """

    link: str
    lane: Lane
    window_start_us: int
    rows: int
    late: int
    sketch: LagSketch
    counts: Counts
    watermark_us: int


def measure(receipt: Receipt) -> Measured:
    """Returns the lags of one receipt's rows, each from its own commit."""
    lags_us = receipt.visible_us - receipt.commit_us
    sketch = LagSketch.of_us(lags_us, receipt.rows_per_commit)
    return Measured(sketch, receipt.late, receipt.counts, receipt.watermark_us)


def merge(parts: Iterable[Measured]) -> Measured:
    """Returns all parts together; commutative and associative."""
    parts = list(parts)
    counts = _NOTHING
    for part in parts:
        counts = counts.plus(part.counts)
    return Measured(
        merge_all(part.sketch for part in parts),
        sum(part.late for part in parts),
        counts,
        max((part.watermark_us for part in parts), default=0),
    )


class MeasuredCoder(coders.Coder):
    """A fixed head and the sketch's own bytes."""

    def encode(self, value: Measured) -> bytes:
        sketch = value.sketch.to_bytes()
        head = _HEAD.pack(_FORMAT, value.late, *value.counts, value.watermark_us, len(sketch))
        return head + sketch

    def decode(self, encoded: bytes) -> Measured:
        """Returns the measurement.

        Raises:
          ValueError: the bytes are of another format or damaged.
        """
        if len(encoded) < _HEAD.size or encoded[0] != _FORMAT:
            raise ValueError("not a measurement of this format")
        _, late, *counts, watermark_us, size = _HEAD.unpack_from(encoded)
        sketch = LagSketch.from_bytes(encoded[_HEAD.size : _HEAD.size + size])
        return Measured(sketch, late, Counts(*counts), watermark_us)

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self):
        return Measured


class LagWindowCoder(coders.Coder):
    """The window's key, then its measurement."""

    _measured = MeasuredCoder()

    def encode(self, value: LagWindow) -> bytes:
        key = _key(value.link, value.lane, value.window_start_us).encode()
        measured = Measured(value.sketch, value.late, value.counts, value.watermark_us)
        return len(key).to_bytes(2, "little") + key + self._measured.encode(measured)

    def decode(self, encoded: bytes) -> LagWindow:
        end = 2 + int.from_bytes(encoded[:2], "little")
        return _window(str(encoded[2:end], "utf-8"), self._measured.decode(encoded[end:]))

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self):
        return LagWindow


coders.registry.register_coder(LagWindow, LagWindowCoder)


class MergeReceipts(beam.CombineFn):
    """Combines receipts into what they say together; any grouping gives the same bytes."""

    def create_accumulator(self) -> Measured:
        return Measured()

    def add_input(self, accumulator: Measured, receipt: Receipt) -> Measured:
        return merge((accumulator, measure(receipt)))

    def merge_accumulators(self, accumulators: Iterable[Measured]) -> Measured:
        return merge(accumulators)

    def extract_output(self, accumulator: Measured) -> Measured:
        return accumulator


_MEASURED = beam.DoFn.StateParam(
    CombiningValueStateSpec("measured", MeasuredCoder(), MergeReceipts())
)
_PANE = TimerSpec("pane", TimeDomain.REAL_TIME)
_PANE_TIMER = beam.DoFn.TimerParam(_PANE)
_CLOSE = TimerSpec("close", TimeDomain.REAL_TIME)
_CLOSE_TIMER = beam.DoFn.TimerParam(_CLOSE)


class GatherReceipts(beam.DoFn):
    """Holds receipts over bundles, so that few elements travel; what a worker that dies had in
    hand is not measured."""

    def __init__(self, hold_us: int, now_us: Callable[[], int]):
        self._hold_us, self._now_us = hold_us, now_us
        self._held: dict[str, list[Receipt]] = {}
        self._sent_us = 0

    def process(self, receipt: Receipt):
        if receipt.applied:
            self._held.setdefault(_key_of(receipt), []).append(receipt)

    def finish_bundle(self):
        now_us = self._now_us()
        if self._held and now_us - self._sent_us >= self._hold_us:
            self._sent_us = now_us
            held, self._held = self._held, {}
            for element in held.items():
                yield GlobalWindows.windowed_value(element, Timestamp(micros=now_us))


class _MeasureFn(beam.DoFn):
    """One key is one window of one link and lane."""

    def __init__(self, now_us: Callable[[], int]):
        self._now_us = now_us
        self._panes = Metrics.counter("measure_lag", "panes_total")

    def process(
        self,
        element: tuple[str, list[Receipt]],
        measured=_MEASURED,
        pane=_PANE_TIMER,
        close=_CLOSE_TIMER,
    ):
        now_us = self._now_us()
        for receipt in element[1]:
            measured.add(receipt)
        # The pane is due at the next whole second: receipts in between do not put it off.
        early_us = round(EARLY_S * 1e6)
        pane.set(Timestamp(micros=(now_us // early_us + 1) * early_us))
        close.set(Timestamp(micros=now_us + (WINDOW_S + GRACE_S) * 1_000_000))

    @on_timer(_PANE)
    def when_second_passed(self, key=beam.DoFn.KeyParam, measured=_MEASURED):
        self._panes.inc()
        yield _window(key, measured.read())

    @on_timer(_CLOSE)
    def when_over(self, measured=_MEASURED):
        measured.clear()


class MeasureLag(beam.PTransform):
    """Turns receipts, one PCollection or several, into accumulating panes of LagWindow.

    Windows are fixed, ten seconds of the time when rows became visible, per link and lane.
    A window with news fires at the next whole second with all that it has, so each pane
    contains the ones before it and a sink overwrites by key. State is a kilobyte a window
    and is cleared a minute after the window.

    Windows close by processing time and stand in the key, in the global window: with event
    time, one dead campus would hold back the watermark behind the flatten of all links, and
    with it every other link's windows and their state.

    Receipts that applied nothing are left out. An engine that falls back to a checkpoint may
    forget receipts after it, and never counts one twice (the ledger, not this, is the law).

    Args:
      now_us: microseconds since 1970, the runner's processing time; can be pickled.
      hold_s: how long receipts are gathered before they travel. Above 0 the last ones leave with
        a later bundle, so that the engine has to make one now and then, as a pulse does.
    """

    def __init__(self, now_us: Callable[[], int] = wall_clock_us, hold_s: float = 0.0):
        super().__init__()
        self._now_us, self._hold_us = now_us, round(hold_s * 1e6)

    def expand(self, receipts):
        parts = (receipts,) if isinstance(receipts, beam.PCollection) else receipts
        # Before they are flattened, and so in the bundle that made them.
        gathered = [
            part
            | f"Gather {i}"
            >> beam.ParDo(GatherReceipts(self._hold_us, self._now_us)).with_output_types(
                tuple[str, list[Receipt]]
            )
            for i, part in enumerate(parts)
        ]
        return (
            gathered
            | "Flatten" >> beam.Flatten()
            | "Everlasting" >> beam.WindowInto(GlobalWindows())
            | "Measure" >> beam.ParDo(_MeasureFn(self._now_us)).with_output_types(LagWindow)
        )


def _key_of(receipt: Receipt) -> str:
    width_us = WINDOW_S * 1_000_000
    return _key(receipt.link, receipt.lane, receipt.visible_us // width_us * width_us)


def _key(link: str, lane: Lane, window_start_us: int) -> str:
    return f"{link}|{lane}|{window_start_us}"


def _window(key: str, measured: Measured) -> LagWindow:
    link, lane, start_us = key.rsplit("|", 2)
    return LagWindow(
        link=link,
        lane=Lane(lane),
        window_start_us=int(start_us),
        rows=measured.sketch.count,
        late=measured.late,
        sketch=measured.sketch,
        counts=measured.counts,
        watermark_us=measured.watermark_us,
    )
