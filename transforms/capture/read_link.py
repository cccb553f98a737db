"""Read one link into Beam: an unbounded source whose truth is the store's ledger."""

import apache_beam as beam
from apache_beam import coders
from apache_beam.io.unbounded_source import (
    CheckpointMark,
    ReadFromUnboundedSource,
    UnboundedReader,
    UnboundedSource,
)
from apache_beam.utils.timestamp import Timestamp

from schemas.batches import ChangeBatch
from schemas.links import LinkSettings
from schemas.wire import ChangeBatchCoder
from transforms.capture.link_reader import LinkReader, live_reader

# A read that waits inside its bundle meets a change within a millisecond, where one that
# defers meets it after the runner has come round again; a bundle must still end often
# enough for checkpoints and for the routine lane, which leaves at its end (ADR 0006).
_WAIT_S = 1.0
_BUNDLE_S = 0.1
_BUNDLE_BATCHES = 16


class _Mark(CheckpointMark):
    """Carries nothing: a reader resumes from the ledger, whatever the engine remembers."""


class _MarkCoder(coders.Coder):
    def encode(self, value: _Mark) -> bytes:
        return b""

    def decode(self, encoded: bytes) -> _Mark:
        return _Mark()

    def is_deterministic(self) -> bool:
        return True


class _Reader(UnboundedReader):
    """A hand on the process's one reader of the link; see `live_reader`."""

    def __init__(self, settings: LinkSettings):
        self._settings = settings
        self._link: LinkReader | None = None
        self._current: ChangeBatch | None = None

    def start(self) -> bool:
        self._link = live_reader(self._settings)
        return self.advance()

    def advance(self) -> bool:
        if self._link.closed:
            self._link = live_reader(self._settings)
        # Only an idle read waits: what was found leaves for the routine lane at the bundle's end.
        idle = self._current is None
        self._current = self._link.next(_WAIT_S if idle else 0.0)
        return self._current is not None

    def get_current(self) -> ChangeBatch:
        return self._current

    def get_current_timestamp(self) -> Timestamp:
        return Timestamp(micros=self._current.commit_us_max)

    def get_watermark(self) -> Timestamp:
        return Timestamp(micros=self._link.watermark_us)

    def get_checkpoint_mark(self) -> _Mark:
        return _Mark()


class _LinkSource(UnboundedSource):
    def __init__(self, settings: LinkSettings):
        self._settings = settings

    def split(self, desired_num_splits, options=None):
        return [self]  # A replication slot has one reader.

    def create_reader(self, options, checkpoint_mark) -> _Reader:
        return _Reader(self._settings)

    def get_checkpoint_mark_coder(self) -> coders.Coder:
        return _MarkCoder()

    def default_output_coder(self) -> coders.Coder:
        return ChangeBatchCoder()


class ReadLink(beam.PTransform):
    """Reads a link's changes: PBegin to PCollection[ChangeBatch], both lanes, unbounded.

    The routine lane has every change, in order, each batch joining on to the last; the
    emergency lane has copies of the urgent ones, at once. Timestamps are commit times; the
    watermark holds at the oldest routine change not yet emitted. Batches are emitted again
    until the store's ledger holds them, whatever the runner does: at least once, and applied
    exactly once by `Deliver`.
    """

    def __init__(self, settings: LinkSettings):
        super().__init__()
        self._settings = settings

    def expand(self, root):
        return root | "Log" >> ReadFromUnboundedSource(
            _LinkSource(self._settings),
            poll_interval=0.0,
            max_records_per_bundle=_BUNDLE_BATCHES,
            max_read_time_seconds=_BUNDLE_S,
        )
