"""Sum up one campus's table at every end, and tell what is to be looked at row by row."""

import dataclasses

import numpy as np

from transforms.row_sets import Rows
from transforms.set_sums import BUCKETS, Sketch, Sums

_ROTTEN_MAX = 10_000


@dataclasses.dataclass
class StoreSums:
    """One campus's rows of one table in one store.

    Attributes:
      live, sketch: rows that only the source may change. edited: the others. tombstones: of the
        stretch of log that every store has followed.
      rotten: live rows whose stored digest is not their content's; some of their ids, and the
        buckets of them all.
    """

    live: Sums = dataclasses.field(default_factory=Sums)
    sketch: Sketch = dataclasses.field(default_factory=Sketch)
    edited: Sums = dataclasses.field(default_factory=Sums)
    tombstones: Sums = dataclasses.field(default_factory=Sums)
    rotten: int = 0
    rotten_ids: list[str] = dataclasses.field(default_factory=list)
    rotten_buckets: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BUCKETS, bool))

    def add(self, rows: Rows, edited: np.ndarray, followed: tuple[int, int]) -> None:
        aside = rows.edited | np.isin(rows.hashes, edited) if len(edited) else rows.edited
        own = rows if rows.live.all() and not aside.any() else rows.where(rows.live & ~aside)
        self.live.add(own.hashes, own.words)
        self.sketch.add(own.words, own.ids)
        gone = rows.hashes[~rows.live & (rows.lsn > followed[0]) & (rows.lsn <= followed[1])]
        self.tombstones.add(gone, np.repeat(gone[:, None], 4, axis=1))
        if aside.any():
            shown = rows.where(rows.live & aside)
            self.edited.add(shown.hashes, shown.words)
        if own.rotten.any():
            rotten = own.where(own.rotten)
            self.rotten += len(rotten)
            self.rotten_ids += rotten.ids.slice(0, _ROTTEN_MAX - len(self.rotten_ids)).to_pylist()
            self.rotten_buckets[rotten.hashes & np.uint64(BUCKETS - 1)] = True


@dataclasses.dataclass(frozen=True)
class FirstLook:
    """One campus's table, read whole at every end, in sums.

    Attributes:
      source, sketch: None where the source cannot be seen. stores: by name, those that answered.
      edited: hashes of the record ids that clients have edited at some store.
      down: ends that could not be read, with the reason.
    """

    campus: str
    table: str
    source: Sums | None
    sketch: Sketch | None
    stores: dict[str, StoreSums]
    edited: np.ndarray
    down: dict[str, str]

    def suspects(self, store: str) -> tuple[list[str] | None, np.ndarray]:
        """Returns the ids of rows that a store may not have as its source: (None, their buckets)
        where they are too many."""
        theirs = self.stores[store]
        buckets = self.source.unequal(theirs.live)
        ids = self.sketch.difference(theirs.sketch) if len(buckets) else []
        if ids is None or theirs.rotten > _ROTTEN_MAX:
            both = theirs.rotten_buckets.copy()
            both[buckets] = True
            return None, np.flatnonzero(both)
        return sorted({*ids, *theirs.rotten_ids}), np.empty(0, np.int64)
