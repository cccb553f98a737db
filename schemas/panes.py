"""Panes: routine batches that are delivered in one transaction, with the window they belong to."""

import dataclasses
import enum
import struct

from apache_beam import coders

from schemas.batches import ChangeBatch
from schemas.wire import ChangeBatchCoder

_FORMAT = 1
# Format, timing, start, end, late rows, number of batches, bytes of the link's name.
_HEAD = struct.Struct("<BBqqqII")
_SIZE = struct.Struct("<Q")


class Timing(enum.StrEnum):
    """When a pane left, against the watermark of its window."""

    EARLY = "early"
    ON_TIME = "on_time"
    LATE = "late"


_TIMINGS = tuple(Timing)  # Append only: the wire carries the place in it.


@dataclasses.dataclass(frozen=True)
class RoutinePane:
    """Batches of one link whose newest commits lie in one event-time window.

    Attributes:
      link: `source>store`.
      window_start_us: inclusive; window_end_us: exclusive.
      timing: a `Timing`.
      batches: in the order of their positions; not necessarily joining on.
      late_rows: rows that came behind the watermark of the window; only in a late pane.
    """

    link: str
    window_start_us: int
    window_end_us: int
    timing: str
    batches: tuple[ChangeBatch, ...]
    late_rows: int = 0

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)


class RoutinePaneCoder(coders.Coder):
    """Encodes a pane as a fixed head, the link's name and length-prefixed batches."""

    def __init__(self):
        self._batch = ChangeBatchCoder()

    def encode(self, value: RoutinePane) -> bytes:
        link = value.link.encode()
        head = _HEAD.pack(
            _FORMAT,
            _TIMINGS.index(value.timing),
            value.window_start_us,
            value.window_end_us,
            value.late_rows,
            len(value.batches),
            len(link),
        )
        parts = [head, link]
        for batch in value.batches:
            content = self._batch.encode(batch)
            parts += [_SIZE.pack(len(content)), content]
        return b"".join(parts)

    def decode(self, encoded: bytes) -> RoutinePane:
        """Returns the pane.

        Raises:
          ValueError: the bytes are of another format or are cut short.
        """
        encoded = memoryview(encoded)
        if len(encoded) < _HEAD.size or encoded[0] != _FORMAT:
            raise ValueError("not a routine pane of this format")
        _, timing, start, end, late, count, at = _HEAD.unpack_from(encoded)
        link = str(encoded[_HEAD.size : _HEAD.size + at], "utf-8")
        at += _HEAD.size
        batches = []
        for _ in range(count):
            (size,) = _SIZE.unpack_from(encoded, at) if len(encoded) >= at + 8 else (-1,)
            at += _SIZE.size
            if not 0 <= size <= len(encoded) - at:
                raise ValueError("a routine pane is cut short")
            batches.append(self._batch.decode(bytes(encoded[at : at + size])))
            at += size
        return RoutinePane(link, start, end, _TIMINGS[timing], tuple(batches), late)

    def is_deterministic(self) -> bool:
        return self._batch.is_deterministic()


coders.registry.register_coder(RoutinePane, RoutinePaneCoder)
