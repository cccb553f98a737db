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
    be measured. Each is claimed once, however often it is written. Thread-safe.
    """

    def __init__(self, rows_max: int = _ROWS_MAX):
        self._lock = threading.Lock()
        self._rows_max = rows_max
        self._claimed: collections.OrderedDict[_Place, bool] = collections.OrderedDict()

    def note(self, name: str, rows: pa.RecordBatch) -> None:
        """Notes rows of a table."""
        with self._lock:
            for place in _places(name, rows):
                self._claimed.setdefault(place, False)
            while len(self._claimed) > self._rows_max:
                self._claimed.popitem(last=False)

    def claim(self, places: typing.Iterable[_Place]) -> set[_Place]:
        """Returns those of `places` that were noted and that nobody has claimed."""
        with self._lock:
            found = {place for place in places if self._claimed.get(place, True) is False}
            self._claimed.update(dict.fromkeys(found, True))
            return found

    def give_back(self, places: typing.Iterable[_Place]) -> None:
        """Takes claims back of a delivery that came to nothing."""
        with self._lock:
            self._claimed.update(dict.fromkeys(places, False))


class Claims:
    """One store's claims: a context around each delivery, which keeps them if it succeeds."""

    def __init__(self, brought: Brought):
        self._brought = brought
        self._taken: set[_Place] = set()

    def __enter__(self) -> typing.Self:
        self._taken = set()
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
        taken = self._brought.claim(places)
        self._taken |= taken
        counted = outcomes.copy()
        counted[at[[place in taken for place in places]]] = Outcome.DELIVERED
        return counted


def _places(name: str, rows: pa.RecordBatch) -> list[_Place]:
    lsn, seq = rows["_lsn"].to_pylist(), rows["_seq"].to_pylist()
    return [(name, *place) for place in zip(lsn, seq, strict=True)]
