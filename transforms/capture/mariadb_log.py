"""A MariaDB or MySQL source as a link's reader uses it (ADR 0012)."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import psycopg

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.capture.mariadb.anchor import Anchor
from transforms.capture.mariadb.errors import LogPurged, LogReplaced, LogUnusable
from transforms.capture.mariadb.snapshot import SnapshotPoint
from transforms.capture.mariadb.source import MariaDbSource
from transforms.capture.mariadb.stream import BinlogStream
from transforms.capture.polled_stream import PolledStream
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.snapshot_part import WHOLE, Rest, SnapshotChanges
from transforms.capture.source_log import gaps
from transforms.deliver import anchors, ledger

_LOGGER = logging.getLogger(__name__)

_NOTE_EVERY_S = 1.0
_RETRY_S = 30.0  # A store that cannot be had must not hold up reading again and again.

_gaps = functools.partial(gaps, LogPurged, LogUnusable, LogReplaced)


class MariadbLog:
    """`SourceLog` over the row binlog.

    What stands in the log where the reader is, is noted beside the ledger once a second, so that
    a new process too knows a log that was begun anew and has grown past that place.
    """

    sweeps_all = resumes = True
    known_again = True  # By what stood where it was read last.

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        now_us: Callable[[], int],
        monotonic: Callable[[], float],
    ):
        self._settings, self._now_us, self._monotonic = settings, now_us, monotonic
        self._mapping = mapping
        self._source = MariaDbSource(
            settings.source_dsn,
            settings.slot,
            {name: table.id for name, table in mapping.tables.items()},
            {name: table.needed for name, table in mapping.tables.items()},
            batch_rows=settings.limits.batch_rows,
            batch_bytes=settings.limits.batch_bytes,
            heartbeat_s=settings.limits.heartbeat_s,
            monotonic=monotonic,
        )

    def require_covered(self) -> dict[str, str]:
        self._source.require_covered()
        return self.drift()

    def drift(self) -> dict[str, str]:
        found = self._mapping.drift(self._source.columns())
        self._source.pass_over(found)
        return found

    def state(self, applied: Position | None) -> SlotState:
        with ledger.connect(self._settings.store_dsn) as store:
            return self._source.state(applied, anchors.read(store, self._settings.name))

    def memberships(self) -> dict[str, str]:
        return self._source.memberships()

    @contextlib.contextmanager
    def create(self, after: Position) -> Iterator[SnapshotPoint]:
        with self._source.create(after) as point:
            with ledger.connect(self._settings.store_dsn) as store:
                anchors.forget(store, self._settings.name)
            yield point

    def view(self, lsn: int) -> contextlib.AbstractContextManager[SnapshotPoint]:
        return self._source.view(lsn)

    def rows_estimated(self) -> int:
        return self._source.rows_estimated()

    def snapshot(self, point: SnapshotPoint, rest: Rest = WHOLE) -> Iterator[SnapshotChanges]:
        return self._source.snapshot(point, self._settings.limits.snapshot_batch_rows, rest)

    def advance(self, lsn: int) -> None:
        """Does nothing: the log is deleted by age or size alone."""

    def open(self, start: Position, acknowledged_lsn: int) -> PolledStream:
        with _gaps():
            stream = self._source.open(start)
        anchored = _Anchored(self._source, stream, self._settings, self._monotonic)
        return PolledStream(anchored, anchored.read, self._now_us)


class _Anchored:
    """A stream that notes in the store what stands in the log where it is."""

    def __init__(
        self,
        source: MariaDbSource,
        stream: BinlogStream,
        settings: LinkSettings,
        monotonic: Callable[[], float],
    ):
        self._source, self._stream, self._settings = source, stream, settings
        self._monotonic, self._due_s = monotonic, monotonic()
        self._noted: Anchor | None = None
        self._store: psycopg.Connection | None = None

    @property
    def caught_up(self) -> bool:
        return self._stream.caught_up

    def read(self, timeout_s: float) -> list[RawChanges]:
        with _gaps():
            taken = self._source.read(self._stream, timeout_s)
        anchor = self._stream.last_transaction
        if anchor != self._noted and anchor is not None and self._monotonic() >= self._due_s:
            self._note(anchor)
        return taken

    def close(self) -> None:
        self._stream.close()
        self._forget_store()

    def _note(self, anchor: Anchor) -> None:
        try:
            if self._store is None:
                self._store = ledger.connect(self._settings.store_dsn)
                self._store.execute("SET synchronous_commit = off")
            anchors.note(self._store, self._settings.name, anchor)
        except psycopg.Error as error:
            _LOGGER.warning(
                "link %s: no anchor is noted, SQLSTATE %s", self._settings.name, error.sqlstate
            )
            self._forget_store()
            self._due_s = self._monotonic() + _RETRY_S
        else:
            self._noted, self._due_s = anchor, self._monotonic() + _NOTE_EVERY_S

    def _forget_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
