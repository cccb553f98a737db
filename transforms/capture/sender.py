"""Send one lane of a link over a runner that may lose, repeat and reorder: go-back-N by ledger."""

import collections
import math
from collections.abc import Callable

from schemas.batches import ChangeBatch
from schemas.positions import START, Position
from transforms.capture.spool import Spool
from transforms.join_batches import join_batches

# A store that is slow is not made faster by what it gets again.
_PATIENCE_MAX = 4


class LaneSender:
    """Decides which batch leaves next and when to send again.

    The store's ledger is the only acknowledgement. At most `in_flight_rows` rows are under
    way beyond it, so no runner buffer grows with a backlog; when the ledger stands still for
    `resend_s` with something under way, or the store comes back, everything after the ledger
    is sent again. Delivery trims what it has already applied (ADR 0003). What this process is just
    delivering is not sent again meanwhile, nor, for four times `resend_s`, what it has applied.

    Not thread-safe: the caller holds one lock around it.

    Args:
      spool: where the lane's batches wait, oldest first.
      in_flight_rows: credit; one batch may always be under way, however large.
      in_flight_batches: likewise; what must wait is gathered, so a store far away, to which each
        batch takes seconds, gets few and large ones.
      gather_rows, gather_s: batches are joined until there are so many rows, or the oldest
        has waited so long.
      resend_s: patience with a ledger that stands still; doubled each time that sending again
        was in vain, up to fourfold.
      monotonic: seconds, never going back.
      worked_at: as `Parking.worked_at`, of this lane.
    """

    def __init__(
        self,
        spool: Spool,
        in_flight_rows: int,
        in_flight_batches: int,
        gather_rows: int,
        gather_s: float,
        resend_s: float,
        monotonic: Callable[[], float],
        worked_at: Callable[[Position], float] = lambda end: -math.inf,
    ):
        self._spool = spool
        self._worked_at = worked_at
        self._credit, self._batches_max = in_flight_rows, in_flight_batches
        self._gather_rows = gather_rows
        self._gather_s = gather_s
        self._resend_s = resend_s
        self._patience = 1
        self._monotonic = monotonic
        self._waiting_since: float | None = None
        self._under_way: collections.deque[tuple[Position, int]] = collections.deque()
        self._under_way_rows = 0
        self._moved_at = monotonic()
        self._store_up = True
        self._doubted_to = START
        self.resends = 0

    @property
    def under_way_rows(self) -> int:
        """Rows sent and not in the ledger."""
        return self._under_way_rows

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._under_way and not self._spool.pending

    def doubts(self, batch: ChangeBatch) -> bool:
        """Whether the batch, or part of it, was sent in vain: what worked before may not now."""
        return batch.begin < self._doubted_to

    def add(self, batch: ChangeBatch) -> None:
        """Takes the next batch of the lane, which begins where the last one ended."""
        self._spool.append(batch)
        if self._waiting_since is None:
            self._waiting_since = self._monotonic()

    def next(self) -> ChangeBatch | None:
        """Returns the batch to send now, or None while there is none or no credit for it."""
        now = self._monotonic()
        if self._under_way and self._overdue(now):
            self._patience = min(2 * self._patience, _PATIENCE_MAX)
            self._doubted_to = self._under_way[-1][0]
            self._rewind(now)
        if not self._store_up or not self._ready(now):
            return None
        if len(self._under_way) >= self._batches_max:
            return None
        credit_left = self._credit - self._under_way_rows
        if self._under_way and credit_left < min(self._spool.pending_rows, self._gather_rows):
            return None  # A sliver costs the runner as much as a full batch.
        parts: list[ChangeBatch] = []
        rows = 0
        while (head := self._spool.peek()) is not None:
            if rows >= self._gather_rows:
                break
            if self._under_way and self._under_way_rows + rows + head[1] > self._credit:
                break
            parts.append(self._spool.take())
            rows += head[1]
        if not parts:
            return None
        self._waiting_since = now if self._spool.pending else None
        if not self._under_way:
            self._moved_at = now
        self._under_way.append((parts[-1].end, rows))
        self._under_way_rows += rows
        return join_batches(parts)

    def on_ledger(self, position: Position) -> None:
        """Learns how far the store has applied this lane; the store is reachable."""
        now = self._monotonic()
        self._spool.acknowledge(position)
        while self._under_way and self._under_way[0][0] <= position:
            self._under_way_rows -= self._under_way.popleft()[1]
            self._moved_at = now
            self._patience = 1
        if not self._store_up:
            self._store_up = True
            self._patience = 1
            self._rewind(now)

    def on_store_lost(self) -> None:
        """Learns that the store cannot be reached: nothing is sent until it can, then all again."""
        self._store_up = False

    def _overdue(self, now: float) -> bool:
        """Whether what is under way must be taken for lost."""
        worked_at = self._worked_at(self._under_way[0][0])
        if worked_at > self._moved_at:
            return now - worked_at >= self._resend_s * _PATIENCE_MAX
        return now - self._moved_at >= self._resend_s * self._patience

    def _ready(self, now: float) -> bool:
        head = self._spool.peek()
        if head is None:
            return False
        waited = now - (self._waiting_since if self._waiting_since is not None else now)
        return waited >= self._gather_s or self._spool.pending_rows >= self._gather_rows

    def _rewind(self, now: float) -> None:
        if self._under_way:
            self.resends += 1
        self._spool.rewind()
        self._under_way.clear()
        self._under_way_rows = 0
        self._moved_at = now
        if self._spool.pending:
            self._waiting_since = now - self._gather_s
