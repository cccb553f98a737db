"""Whose delivery a row counts as that was written to all stores at once."""

import collections
import threading
import typing

import numpy as np
import pyarrow as pa

from transforms.deliver.merging.outcomes import Outcome

_ROWS_MAX = 100_000  # Of one store; what is forgotten counts as a duplicate.

_Place = tuple[str, int, int]  # Table, lsn, seq.


class Brought:
    """Rows that this process has written to one store as parts of sets, until a lane claims them.

    By position alone they would be duplicates when their lane comes, and no lag of them would
    be measured. Thread-safe.
    """

    def __init__(self, rows_max: int = _ROWS_MAX):
        self._lock = threading.Lock()
        self._rows_max = rows_max
        self._places: collections.OrderedDict[_Place, None] = collections.OrderedDict()

    def note(self, name: str, rows: pa.RecordBatch) -> None:
        """Notes rows of a table."""
        with self._lock:
            self._places |= dict.fromkeys(_places(name, rows))
            while len(self._places) > self._rows_max:
                self._places.popitem(last=False)

    def take(self, places: typing.Iterable[_Place]) -> list[_Place]:
        """Returns those of `places` that were noted, and forgets them."""
        with self._lock:
            found = [place for place in places if place in self._places]
            for place in found:
                del self._places[place]
            return found

    def give_back(self, places: typing.Iterable[_Place]) -> None:
        """Notes again what was taken for a delivery that came to nothing."""
        with self._lock:
            self._places |= dict.fromkeys(places)


class Claims:
    """One store's claims: a context around each delivery, which keeps them if it succeeds."""

    def __init__(self, brought: Brought):
        self._brought = brought
        self._taken: list[_Place] = []

    def __enter__(self) -> typing.Self:
        self._taken = []
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is not None:
            self._brought.give_back(self._taken)

    def delivered(self, name: str, rows: pa.RecordBatch, outcomes: np.ndarray) -> np.ndarray:
        """Returns `outcomes` of `rows` with what this process brought counted as delivered."""
        at = np.flatnonzero(outcomes == Outcome.DUPLICATE)
        if not len(at):
            return outcomes
        places = _places(name, rows.take(pa.array(at)))
        taken = set(self._brought.take(places))
        self._taken += taken
        counted = outcomes.copy()
        counted[at[[place in taken for place in places]]] = Outcome.DELIVERED
        return counted


def _places(name: str, rows: pa.RecordBatch) -> list[_Place]:
    lsn, seq = rows["_lsn"].to_pylist(), rows["_seq"].to_pylist()
    return [(name, *place) for place in zip(lsn, seq, strict=True)]
