"""Hold a link's changes between its log and the runner, in two lanes, until the ledger has them."""

import dataclasses
import functools
import threading
from collections.abc import Callable

import pyarrow as pa

from schemas.batches import ChangeBatch, Lane
from schemas.links import LinkSettings
from schemas.positions import SEQ_END, START, Position
from schemas.wire import ChangeBatchCoder, seal
from transforms.capture.interpret import Interpreted
from transforms.capture.prepare import Preparer
from transforms.capture.sender import LaneSender
from transforms.capture.spool import Spool
from transforms.deliver.ledger import Progress
from transforms.parking import HERE
from transforms.turns import turn

# Rows and batches of the emergency lane. Each is written before the next is asked for.
_EMERGENCY_CREDIT = 50_000, 10_000
# Two are on their way while one is written, and one has just been: the engine's own buffers, which
# hold some hundred, never fill, or the reader would stand still with its emergencies.
_ROUTINE_BATCHES = 4
# What a reader meets so long after its commit has emergencies behind it that it cannot see: the
# routine lane waits then, and leaves it the processors until half the memory is full.
_BEHIND_US = 250_000


class TwoLanes:
    """What was read of a link and is not in its store: emergency first, each lane in order.

    `add` takes stretches of the log; `next` hands out what may be sent now; what the ledger
    does not reach is handed out again. Thread-safe.

    Attributes:
      read_to: where the next stretch begins; None before `start`.
      watermark_us: no routine change that is still to be handed out is older.
      behind_us: how long after its commit the newest change was read.
    """

    def __init__(self, settings: LinkSettings, monotonic: Callable[[], float]):
        limits = settings.limits
        coder = ChangeBatchCoder()
        self._settings, self._monotonic = settings, monotonic
        self._changed = threading.Condition()
        self._preparer = Preparer(settings)
        self._spools = {
            lane: Spool(
                limits.spool_memory_bytes, limits.spool_disk_bytes, coder.encode, coder.decode
            )
            for lane in Lane
        }
        self._senders = {
            Lane.ROUTINE: LaneSender(
                self._spools[Lane.ROUTINE],
                limits.in_flight_rows,
                _ROUTINE_BATCHES,
                # As many as fill a pane: then it passes the keyed state without being kept in it.
                limits.early_rows,
                limits.gather_s,
                limits.resend_routine_s,
                monotonic,
                functools.partial(HERE.worked_at, settings.name, Lane.ROUTINE),
            ),
            Lane.EMERGENCY: LaneSender(
                self._spools[Lane.EMERGENCY],
                *_EMERGENCY_CREDIT,
                limits.batch_rows,
                0.0,
                limits.resend_emergency_s,
                monotonic,
                functools.partial(HERE.worked_at, settings.name, Lane.EMERGENCY),
            ),
        }
        self.read_to: Position | None = None
        self._urgent_to: Position | None = None
        self.behind_us = 0
        self.watermark_us = 0

    @property
    def full(self) -> bool:
        """Whether nothing more should be read until the ledger moves."""
        return self._spools[Lane.ROUTINE].full

    @property
    def urgent_full(self) -> bool:
        """Whether no more emergencies should be read until the ledger moves."""
        return self._spools[Lane.EMERGENCY].full

    @property
    def under_way(self) -> bool:
        """Whether something was sent that the ledger does not have."""
        return any(sender.under_way_rows for sender in self._senders.values())

    def start(self, progress: Progress) -> None:
        """Begins both lanes where the ledger stands, unless they have begun."""
        with self._changed:
            if self.read_to is None:
                self.read_to = progress.routine or START
                self._urgent_to = progress.emergency or START

    def add(self, stretch: Interpreted, read_us: int, beside: bool = False) -> None:
        """Queues the next stretch in both lanes.

        Args:
          read_us: when it was read.
          beside: it is of a snapshot, beside which `add_urgent` may have gone ahead in the log.
        """
        routine = self._preparer.routine(stretch, read_us)
        waiting = self._waiting_of(stretch)
        with self._changed:
            self._add_urgent(stretch, read_us, waiting, beside)
            self._senders[Lane.ROUTINE].add(routine)
            self.read_to = stretch.end
            self._changed.notify_all()

    def add_urgent(self, stretch: Interpreted, read_us: int) -> None:
        """Queues what is urgent of a stretch that both lanes have still to come to."""
        waiting = self._waiting_of(stretch)
        with self._changed:
            self._add_urgent(stretch, read_us, waiting, False)
            self._changed.notify_all()

    def _add_urgent(
        self,
        stretch: Interpreted,
        read_us: int,
        waiting: dict[str, list[pa.RecordBatch]],
        beside: bool,
    ) -> None:
        urgent = self._preparer.emergency(stretch, read_us, self._urgent_to, waiting)
        if urgent is None:
            return
        if beside and urgent.end <= self._urgent_to:
            urgent = dataclasses.replace(urgent, end=_just_behind(self._urgent_to))
        # After a restart the log is read again from the routine ledger, and after a snapshot
        # too: what the emergency lane had passed by then needs no second copy.
        if urgent.end > self._urgent_to:
            self._senders[Lane.EMERGENCY].add(urgent)
            self._urgent_to = urgent.end

    def _waiting_of(self, stretch: Interpreted) -> dict[str, list[pa.RecordBatch]]:
        """Returns what the routine lane still holds of patients whose emergency it opens."""
        patients = {change[0] for change in stretch.escalations if change[4]}
        if not patients:
            return {}
        spool = self._spools[Lane.ROUTINE]
        with self._changed:
            pinned = spool.pin()
        try:
            return spool.rows_of(pinned, patients)
        finally:
            with self._changed:
                spool.unpin(pinned)

    def next(self, wait_s: float) -> ChangeBatch | None:
        """Returns the next batch to send, emergencies first, or None after `wait_s`."""
        deadline = self._monotonic() + wait_s
        with self._changed:
            while (batch := self._ready()) is None:
                remaining = deadline - self._monotonic()
                if remaining <= 0:
                    return None
                self._changed.wait(min(remaining, self._settings.limits.gather_s / 2))
        if batch.lane is Lane.ROUTINE:
            # An emergency overtakes; only the routine lane says what is behind it.
            self.watermark_us = max(self.watermark_us, batch.watermark_us)
        return self._finished(batch)

    def on_ledger(self, progress: Progress) -> None:
        """Learns how far the store has applied both lanes; it is reachable."""
        with self._changed:
            if progress.routine is not None or self.read_to is not None:
                for lane, at in (
                    (Lane.ROUTINE, progress.routine),
                    (Lane.EMERGENCY, progress.emergency),
                ):
                    self._senders[lane].on_ledger(at or START)
                    HERE.release(self._settings.name, lane, at or START)
            self._changed.notify_all()

    def on_store_lost(self) -> None:
        """Learns that the store cannot be reached: nothing is sent until it can, then all again."""
        with self._changed:
            for lane, sender in self._senders.items():
                sender.on_store_lost()
                HERE.clear(self._settings.name, lane)

    def close(self) -> None:
        """Lets go of everything; it is read again from the ledger on."""
        with self._changed:
            for lane, spool in self._spools.items():
                spool.close()
                HERE.clear(self._settings.name, lane)

    def _ready(self) -> ChangeBatch | None:
        batch = self._senders[Lane.EMERGENCY].next()
        if batch is None and not self._reading_first:
            batch = self._senders[Lane.ROUTINE].next()
        return batch

    @property
    def _reading_first(self) -> bool:
        if self.behind_us < _BEHIND_US:
            return False
        spool = self._spools[Lane.ROUTINE]
        # With changes on disk the memory was full once, however empty it is now.
        return not spool.disk_bytes and (
            spool.memory_bytes < self._settings.limits.spool_memory_bytes / 2
        )

    def _finished(self, batch: ChangeBatch) -> ChangeBatch:
        """Returns the batch as it leaves: sealed, or parked here with a stub on its way."""
        with turn(batch.rows):
            finished = self._preparer.finish(batch)
        if self._settings.one_worker and not self._senders[batch.lane].doubts(batch):
            return HERE.park(finished)
        return seal(finished)


def _just_behind(position: Position) -> Position:
    """Returns a place that no commit has: the next one begins at least a record further."""
    lsn, seq = position
    return Position(lsn + 1, 1) if seq == SEQ_END else Position(lsn, seq + 1)
