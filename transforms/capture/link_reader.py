"""Read one link continuously: log to batches in two lanes, by credit, from the ledger on."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator

import psycopg

from schemas.batches import ChangeBatch, Lane, RawChanges
from schemas.clocks import jitter, monotonic_s, wall_clock_us
from schemas.errors import CampusSyncError, SourceUnavailable, StoreUnavailable
from schemas.links import LinkSettings
from schemas.mappings import load_mapping
from schemas.positions import START, Position
from schemas.wire import ChangeBatchCoder, seal
from transforms.capture.prepare import Preparer
from transforms.capture.resume import Known, refuse_rewound, snapshot_reason
from transforms.capture.sender import LaneSender
from transforms.capture.slots import SlotState
from transforms.capture.source_log import GapFound, LogStream, source_log
from transforms.capture.spool import Spool
from transforms.capture.warm_up import warm_up
from transforms.deliver import ledger
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.parents_in_store import StoreParents
from transforms.parking import HERE
from transforms.turns import turn

_LOGGER = logging.getLogger(__name__)

# A reader that nobody asks for this long belongs to a job that is gone: it frees its slot.
_ABANDONED_S = 60.0
# The ledger is asked this often while changes are under way, and otherwise; sooner where the
# process that delivers is this one and tells.
_LEDGER_BUSY_S, _LEDGER_IDLE_S = 0.05, 0.5
_BACKOFF_MIN_S, _BACKOFF_MAX_S = 0.2, 15.0
# Trickling changes are gathered: a batch costs nearly the same for one row or a hundred. The
# pause grows with what a batch costs now, so that many links share a busy machine; the first
# change after a quiet moment never waits.
_PAUSE_MIN_S, _PAUSE_MAX_S, _PAUSE_FACTOR = 0.005, 0.25, 10
_EMERGENCY_CREDIT_ROWS = 50_000
# What a reader meets so long after its commit has emergencies behind it that it cannot see: the
# routine lane waits then, and leaves it the processors until half the memory is full.
_BEHIND_US = 250_000
# An emergency changes threads some ten times on its way to the store, and at each change waits
# for its turn behind whatever computes: turns are short, by Python's default they are 5 ms.
_TURN_S = 0.0005
# A table that leaves the publication is silent, not an error: somebody has to look.
_LOOK_AT_PUBLICATION_S = 30.0


class LinkReader:
    """One link's reading side; made by `live_reader`, one a process and link.

    Threads: one reads the log (decode, harmonise, classify, spool), one asks the ledger.
    `next` hands out what may be sent; what the ledger does not reach is handed out again.
    """

    def __init__(
        self,
        settings: LinkSettings,
        now_us: Callable[[], int] = wall_clock_us,
        monotonic: Callable[[], float] = monotonic_s,
        jitter: Callable[[], float] = jitter,
    ):
        limits = settings.limits
        coder = ChangeBatchCoder()
        self._settings = settings
        self._now_us, self._monotonic, self._jitter = now_us, monotonic, jitter
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._ledger_known = threading.Event()
        self._applied = HERE.applied(settings.name)
        self._spool = Spool(
            limits.spool_memory_bytes, limits.spool_disk_bytes, coder.encode, coder.decode
        )
        self._routine = LaneSender(
            self._spool,
            limits.in_flight_rows,
            # As many as fill a pane: then it passes the keyed state without being kept in it.
            limits.early_rows,
            limits.gather_s,
            limits.resend_routine_s,
            monotonic,
        )
        self._urgent_spool = Spool(
            limits.spool_memory_bytes, limits.spool_disk_bytes, coder.encode, coder.decode
        )
        self._emergency = LaneSender(
            self._urgent_spool,
            _EMERGENCY_CREDIT_ROWS,
            limits.batch_rows,
            0.0,
            limits.resend_emergency_s,
            monotonic,
        )
        self._ledger = ledger.Progress(None, None)
        self._preparer: Preparer | None = None
        self._mapping = load_mapping(settings.mapping)
        self._log = source_log(settings, self._mapping, now_us, monotonic)
        parents = StoreParents(self._asking, settings.source, self._mapping)
        has_parents = any(table.parent for table in self._mapping.tables.values())
        self._lookups = Lookups(self._mapping, parents) if has_parents else None
        self._asked: psycopg.Connection | None = None
        self._joined = False
        self._confirmed_lsn = 0
        self._published: dict[str, str] = {}
        self._read_to: Position | None = None
        self._urgent_to: Position | None = None
        self._asked_at = monotonic()
        self._behind_us = 0
        self.watermark_us = 0
        self._threads = [
            threading.Thread(target=target, name=f"{name} {settings.name}", daemon=True)
            for target, name in ((self._watch_ledger, "ledger"), (self._read, "log"))
        ]

    @property
    def closed(self) -> bool:
        """Whether it has ended, by `close` or because nobody asked for a long time."""
        return self._stopping.is_set()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops both threads and frees the slot."""
        self._stopping.set()
        self._applied.set()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()

    def next(self, wait_s: float) -> ChangeBatch | None:
        """Returns the next batch to send, emergencies first, or None after `wait_s`.

        Raises:
          RuntimeError: a thread has met a fault of ours and ended: nothing moves any more.
        """
        deadline = self._monotonic() + wait_s
        with self._changed:
            while True:
                self._asked_at = self._monotonic()
                batch = self._emergency.next()
                if batch is None and not self._reading_first:
                    batch = self._routine.next()
                remaining = deadline - self._monotonic()
                if batch is not None or remaining <= 0:
                    break
                self._changed.wait(min(remaining, self._settings.limits.gather_s / 2))
        if not self.closed and not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError(f"link {self._settings.name}: a reading thread has ended")
        if batch is None:
            return None
        if batch.lane is Lane.ROUTINE:
            # An emergency overtakes; only the routine lane says what is behind it.
            self.watermark_us = max(self.watermark_us, batch.watermark_us)
        return self._depart(batch)

    @property
    def _reading_first(self) -> bool:
        if self._behind_us < _BEHIND_US:
            return False
        return self._spool.memory_bytes < self._settings.limits.spool_memory_bytes / 2

    def _depart(self, batch: ChangeBatch) -> ChangeBatch:
        """Finishes a batch that leaves: sealed, or parked here with a stub on its way."""
        with turn(batch.rows):
            finished = self._preparer.finish(batch)
        sender = self._routine if batch.lane is Lane.ROUTINE else self._emergency
        if self._settings.one_worker and not sender.doubts(batch):
            return HERE.park(finished)
        return seal(finished)

    # The log.

    def _read(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._ledger_known.wait(1.0)
                if self._ledger_known.is_set():
                    for _taken in self._session():
                        failures = 0
            except GapFound as error:
                self._joined = False
                _LOGGER.warning("link %s: %s", self._settings.name, error)
            except (SourceUnavailable, StoreUnavailable, psycopg.Error) as error:
                failures += 1
                _LOGGER.warning("link %s: %s", self._settings.name, _place(error))
                self._stopping.wait(self._backoff_s(failures))
            except CampusSyncError as error:
                # Only a person can mend it: the link stands still, says so and looks again.
                _LOGGER.error("link %s: %s", self._settings.name, error)
                self._stopping.wait(_BACKOFF_MAX_S)
            self._check_abandoned()
        with self._changed:
            self._spool.close()
            self._urgent_spool.close()
        if self._asked is not None:
            self._asked.close()
        for lane in Lane:
            HERE.clear(self._settings.name, lane)

    def _session(self) -> Iterator[None]:
        """Reads from one connection until it breaks; yields after each thing taken."""
        settings = self._settings
        self._behind_us = 0
        with ledger.connect(settings.store_dsn) as store:
            if self._preparer is None:
                escalations = ledger.escalations(store, settings.source)
                warm_up(settings, self._mapping)
                self._preparer = Preparer(
                    settings, self._mapping, escalations, lookups=self._lookups
                )
            self._log.require_covered()
            applied = self._read_to if self._joined else self._ledger.routine
            state = self._log.state(applied)
            if self._joined:
                # It may have come back as an older copy of itself.
                refuse_rewound(self._read_to, state.log_end_lsn)
            published = self._log.memberships()
            if published != self._published:
                self._joined = False
            if not self._joined:
                yield from self._join(store, state, published)
        self._joined, self._published = True, published
        yield from self._stream()

    def _join(
        self, store: psycopg.Connection, state: SlotState, published: dict[str, str]
    ) -> Iterator[None]:
        """Finds where the stream goes on; fills a gap in the log by a snapshot first."""
        settings = self._settings
        progress = ledger.read(store, settings.name)
        for applied in (progress.routine, progress.emergency):
            refuse_rewound(applied or START, state.log_end_lsn)
        reason = snapshot_reason(
            Known(
                ledger=progress.routine,
                snapshot_lsn=progress.snapshot_lsn,
                slot_exists=state.exists,
                slot_lost=state.lost,
                confirmed_lsn=state.confirmed_lsn,
                log_end_lsn=state.log_end_lsn,
                new_tables=not published.items() <= ledger.published(store, settings.name).items()
                or (
                    self._log.sweeps_all
                    and not self._mapping.tables.keys() <= ledger.read_tables(store, settings.name)
                ),
            )
        )
        with self._changed:
            if self._read_to is None:
                self._read_to = progress.routine or START
                self._urgent_to = progress.emergency or START
        self._confirmed_lsn = state.confirmed_lsn
        if reason is None:
            return
        _LOGGER.warning("link %s: snapshot, reason %s", settings.name, reason)
        with self._log.create(self._read_to) as point:
            self._confirmed_lsn = point.lsn + 1
            with store.transaction():
                ledger.begin_snapshot(store, settings.name, point.lsn, str(reason))
                ledger.note_published(store, settings.name, published)
            for raw in self._log.snapshot(point):
                self._take(raw)
                yield
                self._wait_for_room()
                if self._stopping.is_set():
                    return

    def _stream(self) -> Iterator[None]:
        looked_at = self._monotonic()
        with self._log.open(self._read_to, self._acknowledgeable_lsn()) as stream:
            while not self._stopping.is_set():
                reading = stream.read(timeout_s=0.25)
                now = self._monotonic()
                for raw in reading.taken:
                    self._take(raw)
                if reading.taken or reading.caught_up:
                    self._behind_us = reading.behind_us
                took_s = self._monotonic() - now
                stream.acknowledge(self._acknowledgeable_lsn())
                yield
                self._check_abandoned()
                self._wait_for_room(stream)
                if now - looked_at >= _LOOK_AT_PUBLICATION_S:
                    looked_at = now
                    if self._lookups is not None and self._lookups.waiting:
                        self._lookups.doubt()  # A parent may have come by a replay.
                    if self._log.memberships() != self._published:
                        return
                if reading.trickle:
                    pause_s = max(_PAUSE_MIN_S, took_s * _PAUSE_FACTOR)
                    self._stopping.wait(min(_PAUSE_MAX_S, pause_s))

    def _acknowledgeable_lsn(self) -> int:
        """Where the slot may stand: at the ledger, or where it was made or found at the start."""
        routine = self._ledger.routine
        return max(self._confirmed_lsn, routine.acknowledgeable_lsn if routine else 0)

    def _take(self, raw: RawChanges) -> None:
        """Prepares one stretch and queues it in both lanes."""
        if self._lookups is not None:
            self._lookups.acknowledged(self._ledger.routine or START)
        # Parents that are not known here are asked for in the store.
        with turn(raw.captured, waits=self._lookups is not None):
            prepared = self._preparer.prepare(raw, self._read_to, self._now_us())
        with self._changed:
            waiting = self._spool.rows_of(set(prepared.opened)) if prepared.opened else {}
            urgent = self._preparer.emergency(prepared, self._urgent_to, waiting)
            # After a restart the log is read again from the routine ledger; what the emergency
            # lane had passed by then needs no second copy.
            if urgent is not None and urgent.end > self._urgent_to:
                self._emergency.add(urgent)
                self._urgent_to = urgent.end
            self._routine.add(prepared.routine)
            self._read_to = raw.end
            self._changed.notify_all()

    def _asking(self) -> psycopg.Connection:
        """Returns a connection on which the store is asked for parents."""
        if self._asked is None or self._asked.closed:
            self._asked = ledger.connect(self._settings.store_dsn)
        return self._asked

    @property
    def _full(self) -> bool:
        if self._lookups is not None:
            self._lookups.acknowledged(self._ledger.routine or START)
            if self._lookups.crowded:
                return True
        return self._spool.full

    def _wait_for_room(self, stream: LogStream | None = None) -> None:
        while self._full and not self._stopping.is_set():
            if stream is not None:
                stream.keep_alive()
                stream.acknowledge(self._acknowledgeable_lsn())
            self._check_abandoned()
            self._stopping.wait(0.05)

    def _check_abandoned(self) -> None:
        if self._monotonic() - self._asked_at > _ABANDONED_S:
            self._stopping.set()

    # The ledger.

    def _watch_ledger(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                with ledger.connect(self._settings.store_dsn) as store:
                    while not self._stopping.is_set():
                        self._learn(ledger.read(store, self._settings.name))
                        failures = 0
                        self._wait_for_ledger()
            except (StoreUnavailable, psycopg.Error) as error:
                failures += 1
                _LOGGER.warning("link %s: %s", self._settings.name, _place(error))
                with self._changed:
                    self._routine.on_store_lost()
                    self._emergency.on_store_lost()
                for lane in Lane:
                    HERE.clear(self._settings.name, lane)
                self._stopping.wait(self._backoff_s(failures))

    def _wait_for_ledger(self) -> None:
        busy = self._routine.under_way_rows or self._emergency.under_way_rows
        if busy:
            self._stopping.wait(_LEDGER_BUSY_S)
        if not busy or self._settings.one_worker:
            self._applied.wait(_LEDGER_IDLE_S)
        self._applied.clear()

    def _learn(self, progress: ledger.Progress) -> None:
        with self._changed:
            if _behind(progress.routine, self._ledger.routine) or _behind(
                progress.emergency, self._ledger.emergency
            ):
                # What we have let go of may be missing there: another reader joins from its start.
                _LOGGER.warning("link %s: its store is an older copy", self._settings.name)
                self._stopping.set()
                return
            self._ledger = progress
            if progress.routine is not None or self._read_to is not None:
                for lane, sender, applied in (
                    (Lane.ROUTINE, self._routine, progress.routine or START),
                    (Lane.EMERGENCY, self._emergency, progress.emergency or START),
                ):
                    sender.on_ledger(applied)
                    HERE.release(self._settings.name, lane, applied)
            self._changed.notify_all()
        self._ledger_known.set()

    def _backoff_s(self, failures: int) -> float:
        bound = min(_BACKOFF_MAX_S, _BACKOFF_MIN_S * 2 ** min(failures, 10))
        return bound * (0.5 + self._jitter() / 2)


def _behind(now: Position | None, before: Position | None) -> bool:
    return (now or START) < (before or START)


def _place(error: Exception) -> str:
    """Returns what may be logged of an error: our own texts, else class and SQLSTATE."""
    if isinstance(error, CampusSyncError):
        return str(error)
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''}".strip()


_LIVE: dict[str, LinkReader] = {}
_LIVE_LOCK = threading.Lock()


def live_reader(settings: LinkSettings) -> LinkReader:
    """Returns the process's reader of the link, started; a closed one is replaced.

    A slot has one reader, but a runner makes and drops bundle processors as it likes: the
    reader therefore belongs to the process, not to any of Beam's objects.
    """
    with _LIVE_LOCK:
        reader = _LIVE.get(settings.slot)
        if reader is None or reader.closed:
            sys.setswitchinterval(_TURN_S)
            reader = LinkReader(settings)
            reader.start()
            _LIVE[settings.slot] = reader
        return reader
