"""Read one link continuously: log to batches in two lanes, by credit, from the ledger on."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator

import psycopg

from schemas.batches import ChangeBatch, RawChanges
from schemas.clocks import jitter, monotonic_s, wall_clock_us
from schemas.errors import CampusSyncError, SourceUnavailable, StoreUnavailable, told
from schemas.links import LinkSettings
from schemas.mappings import load_mapping
from schemas.positions import SEQ_END, START, Position
from schemas.reports import LOG_REWOUND, SNAPSHOT_WAITS
from transforms.capture.express import ExpressReading
from transforms.capture.interpret import Interpreter
from transforms.capture.log_of_link import log_of
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.resume import (
    Known,
    SourceRewound,
    can_resume,
    refuse_rewound,
    snapshot_reason,
)
from transforms.capture.shared_log import SharedLog, Stretch, shared_log
from transforms.capture.snapshot_reading import SnapshotReading
from transforms.capture.source_log import GapFound, LogStream
from transforms.capture.two_lanes import TwoLanes
from transforms.capture.warm_up import warm_up
from transforms.deliver import drift_notes, ledger, sla_store
from transforms.escalations import Change
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.parents_in_store import StoreConnection, StoreParents
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
_PAUSE_MIN_S, _PAUSE_MAX_S, _PAUSE_FACTOR = 0.005, 0.25, 5
# An emergency changes threads some ten times on its way to the store, and at each change waits
# for its turn behind whatever computes: turns are short, by Python's default they are 5 ms.
_TURN_S = 0.0005
# A table that leaves the publication is silent, not an error: somebody has to look.
_LOOK_AT_PUBLICATION_S = 30.0
_WAIT_S = 0.25
# Who follows another link's reading moves its own slot so often.
_KEEP_SLOT_S = 10.0


class LinkReader:
    """One link's reading side; made by `live_reader`, one a process and link.

    Threads: one reads the log, or follows another link of the process that reads the same one;
    one asks the ledger; one keeps the slot of a link that follows. `next` hands out what may be
    sent; what the ledger does not reach is handed out again.
    """

    def __init__(
        self,
        settings: LinkSettings,
        now_us: Callable[[], int] = wall_clock_us,
        monotonic: Callable[[], float] = monotonic_s,
        jitter: Callable[[], float] = jitter,
    ):
        self._settings = settings
        self._now_us, self._monotonic, self._jitter = now_us, monotonic, jitter
        self._stopping = threading.Event()
        self._ledger_known = threading.Event()
        self._applied = HERE.applied(settings.name)
        self._lanes = TwoLanes(settings, monotonic)
        self._ledger = ledger.Progress(None, None)
        self._interpreter: Interpreter | None = None
        self._mapping = load_mapping(settings.mapping)
        self._log = log_of(settings, self._mapping, now_us, monotonic, self._source_waits)
        has_parents = any(table.parent for table in self._mapping.tables.values())
        self._asking = StoreConnection(settings.store_dsn)
        parents = StoreParents(self._asking, settings.source, self._mapping)
        self._lookups = Lookups(self._mapping, parents) if has_parents else None
        # What is known of parents is one link's own state: its reading is, too.
        self._shared = SharedLog() if has_parents else shared_log(settings)
        self._joined = False
        self._lost_to = START
        self._confirmed_lsn = 0
        self._published: dict[str, str] = {}
        self._drift: dict[str, str] = {}
        self._looked_at = monotonic()
        self._asked_at = monotonic()
        self._slot_free = threading.Lock()
        self._following = False
        self._slot_gone: GapFound | None = None
        self._threads = [
            threading.Thread(target=target, name=f"{name} {settings.name}", daemon=True)
            for target, name in (
                (self._watch_ledger, "ledger"),
                (self._read, "log"),
                (self._keep_slot, "slot"),
            )
        ]

    @property
    def closed(self) -> bool:
        """Whether it has ended, by `close` or because nobody asked for a long time."""
        return self._stopping.is_set()

    @property
    def watermark_us(self) -> int:
        """No routine change that is still to be handed out is older."""
        return self._lanes.watermark_us

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops the threads and frees the slot."""
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
        self._asked_at = self._monotonic()
        batch = self._lanes.next(wait_s)
        if not self.closed and not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError(f"link {self._settings.name}: a reading thread has ended")
        return batch

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
                _LOGGER.warning("link %s: %s", self._settings.name, told(error))
                self._stopping.wait(self._backoff_s(failures))
            except CampusSyncError as error:
                # Only a person can mend it: the link stands still, says so and looks again.
                _LOGGER.error("link %s: %s", self._settings.name, error)
                self._stopping.wait(_BACKOFF_MAX_S)
            self._check_abandoned()
        self._lanes.close()
        self._asking.close()

    def _session(self) -> Iterator[None]:
        """Reads from one connection until it breaks; yields after each thing taken."""
        settings = self._settings
        self._lanes.behind_us = 0
        with ledger.connect(settings.store_dsn) as store:
            if self._interpreter is None:
                escalations = ledger.escalations(store, settings.source)
                warm_up(settings, self._mapping)
                self._interpreter = Interpreter(
                    settings, self._mapping, escalations, lookups=self._lookups
                )
            self._drift = self._log.require_covered()
            drift_notes.note(store, settings.name, self._drift)
            applied = self._lanes.read_to if self._joined else self._ledger.log_from
            state = self._log.state(applied)
            if self._joined:
                # It may have come back as an older copy of itself.
                self._refuse_rewound(store, self._lanes.read_to, state.log_end_lsn)
            published = self._log.memberships()
            gone = self._mapping.tables.keys() - published.keys()
            ledger.forget_published(store, settings.name, gone)
            if published != self._published:
                self._joined = False
            if not self._joined:
                yield from self._join(store, state, published)
        self._joined, self._published = True, published
        if self._shared.covers(self._lanes.read_to):
            yield from self._follow()
        else:
            yield from self._stream()

    def _join(
        self, store: psycopg.Connection, state: SlotState, published: dict[str, str]
    ) -> Iterator[None]:
        """Finds where the stream goes on; fills a gap in the log by a snapshot first."""
        settings, drift = self._settings, self._drift.keys()
        published = {name: text for name, text in published.items() if name not in drift}
        ledger.pass_delivered(store, settings.name)
        progress = ledger.read(store, settings.name)
        # What was read and is on its way may arrive yet.
        for applied in (progress.routine, progress.emergency, self._lost_to):
            self._refuse_rewound(store, applied or START, state.log_end_lsn)
        known = Known(
            ledger=progress.routine,
            snapshot_lsn=progress.snapshot_lsn,
            slot_exists=state.exists,
            slot_lost=state.lost,
            confirmed_lsn=state.confirmed_lsn,
            log_end_lsn=state.log_end_lsn,
            new_tables=self._log.sweeps_all
            and not self._mapping.tables.keys() - drift <= ledger.read_tables(store, settings.name),
            missed=not published.items() <= ledger.published(store, settings.name).items(),
            rewound=sla_store.open_incident(store, settings.name, LOG_REWOUND) is not None,
        )
        reason = snapshot_reason(known)
        if reason is not None or not self._log.known_again:
            self._refuse_lost_tail(store, state.log_end_lsn)
        self._lanes.start(progress)
        self._confirmed_lsn = state.confirmed_lsn
        reading = SnapshotReading(settings, self._log, store, self._monotonic)
        if can_resume(known) and reading.find_rest(known.snapshot_lsn, self._lanes.read_to):
            opened = reading.resume(self._lanes.read_to)
        elif reason is not None:
            opened = reading.begin(self._lanes.read_to, str(reason), published)
        else:
            return
        ledger.forget_published(store, settings.name, drift)
        with opened as (point, parts):
            for kind in (SNAPSHOT_WAITS, LOG_REWOUND):
                sla_store.close_incident(store, settings.name, kind)
            self._confirmed_lsn = point.lsn + 1
            with self._beside(Position(point.lsn, SEQ_END)) as express:
                for raw in parts:
                    escalations = self._take(raw, beside=True)
                    if express is not None:
                        express.learn(escalations)
                    yield
                    self._wait_for_room()
                    self._wait(reading.pause_s)
                    if self._stopping.is_set():
                        return

    def _refuse_lost_tail(self, store: psycopg.Connection, log_end_lsn: int) -> None:
        """Refuses a log that ends before what the store has beyond its ledger.

        A snapshot below those rows would neither renew nor sweep them, and changes in an island
        there would count as applied.
        """
        name, campus = self._settings.name, self._settings.source
        newest = ledger.newest_beyond(store, name, campus, log_end_lsn)
        if newest:  # Other links may have read on meanwhile.
            at = Position(newest, SEQ_END)
            log_end_lsn = self._log.state(self._lanes.read_to).log_end_lsn
            self._refuse_rewound(store, at, log_end_lsn)

    def _refuse_rewound(self, store: psycopg.Connection, at: Position, log_end_lsn: int) -> None:
        """Refuses a log that ends before `at`, and notes that it did: once it has grown past, it
        may look like one that never went back."""
        try:
            refuse_rewound(at, log_end_lsn)
        except SourceRewound as error:
            if not self._log.known_again:
                self._joined, self._lost_to = False, max(at, self._lost_to)
                detail = f"{error} Otherwise it is read whole once it has grown past that."
                sla_store.keep_incident(store, self._settings.name, LOG_REWOUND, detail)
            raise

    @contextlib.contextmanager
    def _beside(self, begin: Position) -> Iterator[ExpressReading | None]:
        """Carries emergencies out of the log behind `begin` while a snapshot is read."""
        if not self._log.resumes:
            yield None  # It is in the topic itself.
            return
        settings, lookups = self._settings, None
        with contextlib.closing(StoreConnection(settings.store_dsn)) as asking:
            if self._lookups is not None:
                parents = StoreParents(asking, settings.source, self._mapping)
                lookups = Lookups(self._mapping, parents, follow=False)
            with ExpressReading(
                settings.name,
                self._log,
                begin,
                self._confirmed_lsn,
                self._interpreter.sibling(lookups),
                lookups,
                lambda stretch: self._lanes.add_urgent(stretch, self._now_us()),
                lambda: not self._lanes.urgent_full,
            ) as express:
                yield express

    def _source_waits(self, what: str) -> None:
        """Tells what keeps a snapshot from beginning; ends the waiting with the link."""
        self._check_abandoned()
        if self._stopping.is_set():
            raise SourceUnavailable("the link ended before its snapshot could begin")
        name, detail = self._settings.name, f"the snapshot waits for {what}"
        if sla_store.keep_incident(self._asking(), name, SNAPSHOT_WAITS, detail):
            _LOGGER.warning("link %s: %s", name, detail)

    def _stream(self) -> Iterator[None]:
        """Reads the log, for others too, until it is better to follow another link."""
        name = self._settings.name
        try:
            with self._log.open(self._lanes.read_to, self._acknowledgeable_lsn()) as stream:
                while not self._stopping.is_set():
                    reading = stream.read(_WAIT_S)
                    began = self._monotonic()
                    for raw in reading.taken:
                        self._take(raw, reading.behind_us)
                    if reading.caught_up:
                        self._lanes.behind_us = reading.behind_us
                    took_s = self._monotonic() - began
                    stream.acknowledge(self._acknowledgeable_lsn())
                    yield
                    self._check_abandoned()
                    self._wait_for_room(stream)
                    if self._published_anew():
                        return
                    # Who is far behind would hold up the others.
                    at = self._lanes.read_to
                    writes = reading.caught_up and self._shared.take_pen(name, at)
                    if reading.caught_up and not writes and self._shared.covers(at):
                        return
                    if reading.trickle:
                        pause_s = max(_PAUSE_MIN_S, took_s * _PAUSE_FACTOR)
                        self._stopping.wait(min(_PAUSE_MAX_S, pause_s))
        finally:
            self._shared.leave(name)

    def _follow(self) -> Iterator[None]:
        """Takes what another link reads, as long as that goes on from where this one is."""
        name = self._settings.name
        self._following = True
        try:
            while not self._stopping.is_set():
                stretches = self._shared.follow(name, self._lanes.read_to, _WAIT_S)
                for interpreted, behind_us in stretches or ():
                    new = interpreted.beyond(self._lanes.read_to)
                    self._lanes.add(self._interpreter.adopt(new), self._now_us())
                    self._lanes.behind_us = behind_us
                yield
                self._check_abandoned()
                if self._slot_gone is not None:
                    raise self._slot_gone
                if stretches is None or self._full or self._published_anew():
                    return
        finally:
            self._shared.leave(name)
            with self._slot_free:
                self._following = False
                self._slot_gone = None

    def _keep_slot(self) -> None:
        """Moves the slot of a link that follows, whose own stream is not open."""
        while not self._stopping.wait(_KEEP_SLOT_S):
            with self._slot_free:
                if not self._following:
                    continue
                try:
                    self._log.advance(self._acknowledgeable_lsn())
                except GapFound as error:
                    self._slot_gone = error
                except (SourceUnavailable, psycopg.Error) as error:
                    # Whoever reads meets it too, and then this link reads for itself.
                    _LOGGER.warning("link %s: %s", self._settings.name, told(error))

    def _published_anew(self) -> bool:
        """Whether tables are not as they were: gone, back, or altered; looks now and then."""
        now = self._monotonic()
        if now - self._looked_at < _LOOK_AT_PUBLICATION_S:
            return False
        self._looked_at = now
        if self._lookups is not None and self._lookups.waiting:
            self._lookups.doubt()  # A parent may have come by a replay.
        return self._log.memberships() != self._published or self._log.drift() != self._drift

    def _acknowledgeable_lsn(self) -> int:
        """Where the slot may stand: at the ledger, or where it was made or found at the start."""
        routine = self._ledger.routine
        return max(self._confirmed_lsn, routine.acknowledgeable_lsn if routine else 0)

    def _take(
        self, raw: RawChanges, behind_us: int = 0, beside: bool = False
    ) -> tuple[Change, ...]:
        """Interprets one stretch and queues it in both lanes, and for the links that follow.

        Returns the emergencies that it opens and closes. `beside`: as `TwoLanes.add` has it.
        """
        if self._lookups is not None:
            self._lookups.acknowledged(self._ledger.routine or START)
        # Parents that are not known here are asked for in the store.
        with turn(raw.captured, waits=self._lookups is not None):
            interpreted = self._interpreter.interpret(raw, self._lanes.read_to)
        self._shared.write(self._settings.name, Stretch(interpreted, behind_us))
        self._lanes.add(interpreted, self._now_us(), beside)
        self._lanes.behind_us = behind_us
        return interpreted.escalations

    @property
    def _full(self) -> bool:
        if self._lookups is not None:
            self._lookups.acknowledged(self._ledger.routine or START)
            if self._lookups.crowded:
                return True
        return self._lanes.full

    def _wait_for_room(self, stream: LogStream | None = None) -> None:
        while self._full and not self._stopping.is_set():
            self._shared.drop_pen(self._settings.name)
            if stream is not None:
                stream.keep_alive()
                stream.acknowledge(self._acknowledgeable_lsn())
            self._check_abandoned()
            self._stopping.wait(0.05)

    def _wait(self, seconds: float) -> None:
        until = self._monotonic() + seconds
        while (left := until - self._monotonic()) > 0 and not self._stopping.is_set():
            self._check_abandoned()
            self._stopping.wait(min(left, 0.5))

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
                _LOGGER.warning("link %s: %s", self._settings.name, told(error))
                self._lanes.on_store_lost()
                self._stopping.wait(self._backoff_s(failures))

    def _wait_for_ledger(self) -> None:
        busy = self._lanes.under_way
        if busy:
            self._stopping.wait(_LEDGER_BUSY_S)
        if not busy or self._settings.one_worker:
            self._applied.wait(_LEDGER_IDLE_S)
        self._applied.clear()

    def _learn(self, progress: ledger.Progress) -> None:
        if _behind(progress.routine, self._ledger.routine) or _behind(
            progress.emergency, self._ledger.emergency
        ):
            # What we have let go of may be missing there: another reader joins from its start.
            _LOGGER.warning("link %s: its store is an older copy", self._settings.name)
            self._stopping.set()
            return
        self._ledger = progress
        self._lanes.on_ledger(progress)
        self._ledger_known.set()

    def _backoff_s(self, failures: int) -> float:
        bound = min(_BACKOFF_MAX_S, _BACKOFF_MIN_S * 2 ** min(failures, 10))
        return bound * (0.5 + self._jitter() / 2)


def _behind(now: Position | None, before: Position | None) -> bool:
    return (now or START) < (before or START)


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
