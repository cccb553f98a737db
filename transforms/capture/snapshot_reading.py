"""Read a link's snapshot part by part: begun, gone on with, throttled, and its progress noted."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

import psycopg

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.positions import SEQ_END, Position
from transforms.capture.snapshot_part import Rest, SnapshotChanges
from transforms.capture.source_log import SnapshotPoint, SourceLog
from transforms.deliver import ledger

_LOGGER = logging.getLogger(__name__)

Opened = tuple[SnapshotPoint, Iterator[RawChanges]]


class SnapshotReading:
    """One reading of a link's tables, whole or what another has left (ADR 0020).

    Args:
      log: the link's source. store: connection to its store, in autocommit.
      monotonic: seconds, never going back.
    """

    def __init__(
        self,
        settings: LinkSettings,
        log: SourceLog,
        store: psycopg.Connection,
        monotonic: Callable[[], float],
    ):
        self._link, self._log, self._store = settings.name, log, store
        self._rows_s, self._monotonic = settings.limits.snapshot_rows_s, monotonic
        self._lsn = 0
        self._rest: Rest | None = None
        self._rows, self._began_at = 0, monotonic()

    @property
    def pause_s(self) -> float:
        """How long to wait before the next part, so as not to be faster than is allowed."""
        if not self._rows_s:
            return 0.0
        return self._rows / self._rows_s - (self._monotonic() - self._began_at)

    def find_rest(self, lsn: int, read_to: Position) -> bool:
        """Looks what the snapshot at `lsn` has left behind `read_to`; False: nobody knows."""
        self._lsn = lsn
        if self._log.resumes:
            rest = ledger.rest_of_snapshot(self._store, self._link, lsn, read_to)
            # A store that failed over to an asynchronous standby may lack the last numbers: they
            # would go to other rows, while this reader still has those that they were given to.
            if rest is not None and (lsn, rest.last_seq) < read_to < (lsn, SEQ_END):
                rest = None
            self._rest = rest
        return self._rest is not None

    @contextlib.contextmanager
    def begin(self, after: Position, reason: str, published: Mapping[str, str]) -> Iterator[Opened]:
        """Begins a snapshot later than `after`; yields its point and its parts."""
        _LOGGER.warning("link %s: snapshot, reason %s", self._link, reason)
        estimated = self._log.rows_estimated()
        with self._log.create(after) as point:
            with self._store.transaction():
                ledger.begin_snapshot(self._store, self._link, point.lsn, reason, estimated)
                ledger.note_published(self._store, self._link, published)
            yield point, self._noted(self._log.snapshot(point))

    @contextlib.contextmanager
    def resume(self, read_to: Position) -> Iterator[Opened]:
        """Goes on with what `find_rest` found; yields the snapshot's point and the parts left."""
        with self._log.view(self._lsn) as point:
            if read_to >= (self._lsn, SEQ_END):  # All was read: what is under way arrives.
                yield point, iter(())
                return
            _LOGGER.warning(
                "link %s: snapshot goes on, %d tables done", self._link, len(self._rest.done)
            )
            ledger.resume_snapshot(self._store, self._link, point.lsn, point.view_lsn, read_to)
            yield point, self._noted(self._log.snapshot(point, self._rest))

    def _noted(self, parts: Iterator[RawChanges]) -> Iterator[RawChanges]:
        self._began_at = self._monotonic()
        for part in parts:
            if isinstance(part, SnapshotChanges):
                ledger.note_part(self._store, self._link, part)
            self._rows += part.captured
            yield part
