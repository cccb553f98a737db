"""Receipts: what a consult store did with the batches of one transaction."""

import dataclasses
import typing

import numpy as np

from schemas.batches import Lane
from schemas.positions import Position


class Counts(typing.NamedTuple):
    """Row changes by outcome; `captured` equals the sum of the others (the law)."""

    captured: int = 0
    delivered: int = 0
    duplicates: int = 0
    superseded: int = 0
    held: int = 0
    dead: int = 0

    @property
    def balanced(self) -> bool:
        """Whether captured = delivered + duplicates + superseded + held + dead."""
        return self.captured == sum(self[1:])

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Receipt:
    """The outcome of one delivery.

    Attributes:
      link: `source>store`. lane: the ledger that moved.
      progress: the ledger after it. applied: False if the store could not be reached or
        everything had been applied before; the counts are then zero.
      visible_us: when the commit returned, store host's injected clock, µs since 1970.
      watermark_us: newest source watermark among the batches.
      commit_us: distinct commit times of the delivered rows, µs (int64[n]); rows of a snapshot
        have none.
      rows_per_commit: rows of each (int64[n]).
      late: rows of batches that arrived behind the watermark.
    """

    link: str
    lane: Lane
    progress: Position
    applied: bool
    counts: Counts
    visible_us: int
    watermark_us: int
    commit_us: np.ndarray
    rows_per_commit: np.ndarray
    late: int = 0
