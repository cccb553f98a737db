"""Tell how the rows of a store differ from its source's, and what accounts for it."""

import dataclasses

import numpy as np

from transforms.row_sets import Rows, concat

LSN_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Excuses:
    """What accounts for rows that differ.

    Attributes:
      refused: hashes of the record ids whose change is a dead letter or would be (uint64[n]).
      held: by source table, the LSN up to which its rows wait for a person.
      edited: hashes of the record ids that clients have edited at some store.
    """

    refused: np.ndarray
    held: dict[str, int]
    edited: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))


class Found:
    """Rows that differ, by kind."""

    def __init__(self):
        self._parts: dict[str, list[Rows]] = {}

    def add(self, kind: str, rows: Rows) -> None:
        self._parts.setdefault(kind, []).append(rows)

    def take(self, *kinds: str) -> "Found":
        """Returns the rows of some kinds and forgets them."""
        taken = Found()
        taken._parts = {kind: self._parts.pop(kind) for kind in kinds if kind in self._parts}
        return taken

    def extend(self, other: "Found") -> None:
        for kind, parts in other._parts.items():
            self._parts.setdefault(kind, []).extend(parts)

    def count(self, kind: str) -> int:
        return sum(len(rows) for rows in self._parts.get(kind, ()))

    def rows(self, *kinds: str) -> Rows:
        """Returns the rows of some kinds; of all without any."""
        wanted = kinds or tuple(self._parts)
        return concat([rows for kind in wanted for rows in self._parts.get(kind, ())])

    def keys(self, most: int) -> dict[str, list[str]]:
        """Returns some record ids of every kind."""
        return {
            kind: [key for rows in parts for key in rows.ids.slice(0, most).to_pylist()][:most]
            for kind, parts in self._parts.items()
        }


def differences(
    mine: Rows, theirs: Rows, read_lsn: int, excuses: Excuses, reached_lsn: int = LSN_MAX
) -> Found:
    """Returns how a store's rows differ from the source's; both are sets of distinct ids.

    Args:
      mine: the source's, all live. theirs: the store's, with tombstones.
      read_lsn: of the source, before it was read: later changes of the store are `moving`.
      reached_lsn: what the store's ledgers have come to since; beyond it no row has a place, and
        one that claims to is not moving.
    """
    found = Found()

    def later(lsn: np.ndarray) -> np.ndarray:
        return (lsn > read_lsn) & (lsn <= reached_lsn)

    gone = theirs.where(~theirs.live)
    theirs = theirs.where(theirs.live)

    def sort(kind: str, rows: Rows, moving: np.ndarray) -> None:
        left = np.ones(len(rows), np.bool_)
        held = np.zeros(len(rows), np.bool_)
        if kind == "extra" and excuses.held:
            up_to = [excuses.held.get(name, -1) for name in rows.src_tables.to_pylist()]
            held = rows.lsn <= np.array(up_to, np.int64)
        for name, mask in (
            ("edited", rows.edited | np.isin(rows.hashes, excuses.edited)),
            ("refused", np.isin(rows.hashes, excuses.refused)),
            ("held", held),
            ("moving", moving),
            (kind, left),
        ):
            mask = mask & left
            left = left & ~mask
            if mask.any():
                found.add(name, rows.where(mask))

    _, i, j = np.intersect1d(mine.hashes, theirs.hashes, return_indices=True)
    unlike = (mine.words[i] != theirs.words[j]).any(axis=1)
    both = _chosen(theirs, j[unlike])
    sort("different", both, later(both.lsn))
    alike = _chosen(theirs, j[~unlike])
    rotten = alike.where(alike.rotten)
    sort("rotten", rotten, np.zeros(len(rotten), np.bool_))
    extra = _others(theirs, j)
    sort("extra", extra, later(extra.lsn))
    missing = _others(mine, i)
    sort("missing", missing, np.isin(missing.hashes, gone.hashes[later(gone.lsn)]))
    return found


def _chosen(rows: Rows, places: np.ndarray) -> Rows:
    mask = np.zeros(len(rows), np.bool_)
    mask[places] = True
    return rows.where(mask)


def _others(rows: Rows, places: np.ndarray) -> Rows:
    mask = np.ones(len(rows), np.bool_)
    mask[places] = False
    return rows.where(mask)
