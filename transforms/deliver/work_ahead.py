"""Deliver what is parked behind a pane before its own pane has come by way of the engine."""

import queue
import threading
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from schemas.batches import ChangeBatch, ParkingTicket
from schemas.positions import Position
from schemas.receipts import Receipt


class Outcome(typing.NamedTuple):
    """What became of batches: `receipt` is None where nothing new was written.

    `unclaimed` of them were not here, `refused` ones the store could not take now.
    """

    receipt: Receipt | None
    unclaimed: int = 0
    refused: int = 0


class WorkAhead:
    """Applies the batches of one link and lane, one after another, in a thread of its own.

    Between two panes the engine takes tens of milliseconds, in which the store would stand still
    (ADR 0028). So, when a batch is applied, the thread goes on with the one that follows it, if
    that is here; the outcome is kept until its pane comes. Methods are of one caller's thread.

    Args:
      name: of the thread.
      apply: applies batches in one transaction.
      following: returns the batch that begins at a position, if it is here.
      most: how many outcomes are kept; with 0 nothing is done ahead.
    """

    def __init__(
        self,
        name: str,
        apply: Callable[[Sequence[ChangeBatch]], Outcome],
        following: Callable[[Position], ChangeBatch | None],
        most: int,
    ):
        self._apply, self._following, self._most = apply, following, most
        self._turn = threading.Lock()  # Held while batches are applied.
        self._lock = threading.Lock()
        self._kept: dict[ParkingTicket, tuple[Position, Future[Outcome]]] = {}
        self._at: Position | None = None  # Where the thread goes on, while it does nothing.
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        # A store that hangs must not keep a worker from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, when the transactions that were begun have ended."""
        with self._lock:
            self._most = 0
        self._tasks.put(None)
        self._thread.join()

    def outcomes(self, batches: Sequence[ChangeBatch]) -> list[Outcome]:
        """Returns what became of a pane's batches, applied now or before.

        Raises:
          Exception: as `apply` does.
        """
        with self._lock:
            # Panes come in order: what ends before this one has lost its pane.
            begin = batches[0].begin
            self._kept = {t: kept for t, kept in self._kept.items() if kept[0] > begin}
            self._go_on()
            kept = [self._kept.pop(batch.ticket, (None, None))[1] for batch in batches]
            self._go_on()  # There is room for another outcome now.
        outcomes, rest = [], []
        for batch, future in zip(batches, kept, strict=True):
            outcome = future and future.result()
            # What the store could not take before, it may take now.
            if outcome is None or outcome.receipt is None:
                rest.append(batch)
            else:
                outcomes.append(outcome)
        if rest:
            outcomes.append(self._work(rest))
        return outcomes

    def _work(self, batches: Sequence[ChangeBatch]) -> Outcome:
        with self._turn:
            outcome = self._apply(batches)
        if outcome.receipt is not None:
            with self._lock:
                self._at = outcome.receipt.progress
                self._go_on()
        return outcome

    def _go_on(self) -> None:
        """Gives the thread the next batch, if it does nothing and one follows; under the lock."""
        if self._at is None or len(self._kept) >= self._most:
            return
        batch = self._following(self._at)
        if batch is not None and batch.ticket not in self._kept:
            self._at = None
            future: Future[Outcome] = Future()
            self._kept[batch.ticket] = batch.end, future
            self._tasks.put((future, batch))

    def _run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                future, batch = task
                outcome = Outcome(None)
                try:
                    outcome = self._work((batch,))
                finally:
                    future.set_result(outcome)
        finally:  # After a fault nothing more is done ahead; the caller's thread will meet it.
            with self._lock:
                self._most = 0
            while not self._tasks.empty():
                if task := self._tasks.get():
                    task[0].set_result(Outcome(None))
