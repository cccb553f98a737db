"""A stream of a log that its source keeps by age or size, whoever reads it."""

import typing
from collections.abc import Callable

from schemas.batches import RawChanges
from transforms.capture.source_log import Reading

_TRICKLE_ROWS = 500


class Polled(typing.Protocol):
    """What such a stream is made of."""

    @property
    def caught_up(self) -> bool: ...

    def close(self) -> None: ...


class PolledStream:
    """`LogStream` over a library's own stream; nothing is told to the source.

    Args:
      stream: is closed with this one.
      read: reads from it, with a timeout in seconds; raises as `LogStream.read`.
      now_us: microseconds since 1970, for how far behind the source this reader is.
    """

    def __init__(
        self,
        stream: Polled,
        read: Callable[[float], list[RawChanges]],
        now_us: Callable[[], int],
    ):
        self._stream, self._read, self._now_us = stream, read, now_us

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, timeout_s: float) -> Reading:
        taken = self._read(timeout_s)
        rows = sum(raw.captured for raw in taken)
        behind_us = max(0, self._now_us() - taken[-1].commit_us_max) if rows else 0
        caught_up = self._stream.caught_up
        return Reading(taken, caught_up, caught_up and 0 < rows < _TRICKLE_ROWS, behind_us)

    def acknowledge(self, lsn: int) -> None:
        """Does nothing: the log is deleted by age or size alone."""

    def keep_alive(self) -> None:
        """Does nothing: the source waits for hours."""
