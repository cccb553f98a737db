"""Park a batch in the worker that read it, and send a ticket for it through the runner instead."""

import collections
import collections.abc
import dataclasses
import math
import secrets
import threading
import typing

from schemas import wire
from schemas.batches import ChangeBatch, Lane, ParkingTicket
from schemas.clocks import monotonic_s
from schemas.errors import SealBrokenError
from schemas.positions import Position


class _Held(typing.NamedTuple):
    stub: ChangeBatch
    batch: ChangeBatch


class Parking:
    """Batches of one process, each held from `park` until its ledger has passed it (ADR 0011).

    The stub that `park` returns stands for the batch in every rule of panes and windows: it has
    its link, lane, range, times and size. A stub that cannot be claimed is a lost batch, which
    the reader sends again, by value. One that is being delivered here is not lost, however long
    its store takes. Thread-safe.

    Args:
      token: 16 random bytes that no other process has.
      monotonic: seconds, never going back.
    """

    def __init__(self, token: bytes, monotonic: collections.abc.Callable[[], float] = monotonic_s):
        self._token = token
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._number = 0
        self._applied: collections.defaultdict[str, threading.Event] = collections.defaultdict(
            threading.Event
        )
        self._held: dict[tuple[str, Lane], dict[int, _Held]] = {}
        self._worked: dict[tuple[str, Lane], dict[Position, float]] = {}

    def park(self, batch: ChangeBatch) -> ChangeBatch:
        """Keeps `batch` and returns its stub, sealed and without rows."""
        with self._lock:
            self._number += 1
            number = self._number
        stub = self._stub(batch, number)
        with self._lock:
            held = self._held.setdefault((batch.link, batch.lane), {})
            held[number] = _Held(stub, dataclasses.replace(batch, seal=self._token))
        return stub

    def _stub(self, batch: ChangeBatch, number: int) -> ChangeBatch:
        ticket = ParkingTicket(self._token.hex(), number, batch.rows, batch.nbytes)
        stub = dataclasses.replace(
            batch, tables={}, dead=(), holds=(), sweeps=(), manifest=(), escalations=(), codes=(),
            ticket=ticket,
        )  # fmt: skip
        return wire.seal(stub)

    def claim(self, batch: ChangeBatch) -> ChangeBatch | None:
        """Returns what a stub stands for, or None: it is not held here (any more).

        A batch that is no stub is returned as it is. A batch may be claimed more than once.
        """
        ticket = batch.ticket
        if ticket is None:
            return batch
        if ticket.token != self._token.hex():
            return None
        with self._lock:
            held = self._held.get((batch.link, batch.lane), {}).get(ticket.number)
            return held and held.batch

    def following(self, link: str, lane: Lane, position: Position) -> ChangeBatch | None:
        """Returns the stub of the batch of this lane that begins at `position`, if one is held."""
        with self._lock:
            held = self._held.get((link, lane), {}).values()
            return next((one.stub for one in held if one.stub.begin == position), None)

    def begun(self, batches: collections.abc.Iterable[ChangeBatch]) -> None:
        """Notes that batches are being delivered here, parked or not."""
        with self._lock:
            for batch in batches:
                worked = self._worked.setdefault((batch.link, batch.lane), {})
                worked[batch.end] = math.inf

    def ended(
        self, batches: collections.abc.Iterable[ChangeBatch], applied_to: Position | None
    ) -> None:
        """Notes that they are not any more; what is beyond `applied_to` was in vain."""
        with self._lock:
            for batch in batches:
                worked = self._worked.setdefault((batch.link, batch.lane), {})
                worked.pop(batch.end, None)
                if applied_to is not None and batch.end <= applied_to:
                    worked[batch.end] = self._monotonic()

    def worked_at(self, link: str, lane: Lane, end: Position) -> float:
        """Returns when a batch that ends there was applied here, though its ledger may not have
        told yet: infinity while it is being delivered, minus infinity if it was not."""
        with self._lock:
            return self._worked.get((link, lane), {}).get(end, -math.inf)

    def applied(self, link: str) -> threading.Event:
        """Returns what is set when a batch of the link has been applied by this process."""
        with self._lock:
            return self._applied[link]

    def release(self, link: str, lane: Lane, position: Position) -> None:
        """Lets go of what the ledger holds: every batch that ends at or before `position`."""
        with self._lock:
            held = self._held.get((link, lane), {})
            for number in [n for n, one in held.items() if one.stub.end <= position]:
                del held[number]
            worked = self._worked.get((link, lane), {})
            for end in [end for end in worked if end <= position]:
                del worked[end]

    def clear(self, link: str, lane: Lane) -> None:
        """Lets go of all: they will be sent again."""
        with self._lock:
            self._held.pop((link, lane), None)
            self._worked.pop((link, lane), None)

    def verify(self, batch: ChangeBatch) -> None:
        """Checks that a batch is as it was sealed; one that never left the process is.

        Raises:
          SealBrokenError: it is not, or it is a stub.
        """
        if batch.ticket is not None:
            raise SealBrokenError
        if batch.seal != self._token:
            wire.verify(batch)


HERE = Parking(secrets.token_bytes(16))
