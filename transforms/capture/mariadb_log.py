"""A MariaDB or MySQL source as a link's reader uses it (ADR 0012)."""

import contextlib
from collections.abc import Callable, Iterator

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.capture.mariadb.errors import LogPurged, LogUnusable
from transforms.capture.mariadb.snapshot import SnapshotPoint
from transforms.capture.mariadb.source import MariaDbSource
from transforms.capture.mariadb.stream import BinlogStream
from transforms.capture.slots import SlotState
from transforms.capture.source_log import GapFound, Reading

_TRICKLE_ROWS = 500


class MariadbLog:
    """`SourceLog` over the row binlog."""

    sweeps_all = True

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        now_us: Callable[[], int],
        monotonic: Callable[[], float],
    ):
        self._now_us = now_us
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

    def require_covered(self) -> None:
        self._source.require_covered()

    def state(self, applied: Position | None) -> SlotState:
        return self._source.state(applied)

    def memberships(self) -> dict[str, str]:
        return self._source.memberships()

    def create(self, after: Position) -> contextlib.AbstractContextManager[SnapshotPoint]:
        return self._source.create(after)

    def snapshot(self, point: SnapshotPoint) -> Iterator[RawChanges]:
        return self._source.snapshot(point)

    def open(self, start: Position, acknowledged_lsn: int) -> "_Stream":
        with _gaps():
            return _Stream(self._source, self._source.open(start), self._now_us)


class _Stream:
    def __init__(self, source: MariaDbSource, stream: BinlogStream, now_us: Callable[[], int]):
        self._source, self._stream, self._now_us = source, stream, now_us

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, timeout_s: float) -> Reading:
        with _gaps():
            taken = self._source.read(self._stream, timeout_s)
        rows = sum(raw.captured for raw in taken)
        behind_us = max(0, self._now_us() - taken[-1].commit_us_max) if rows else 0
        caught_up = self._stream.caught_up
        return Reading(taken, caught_up, caught_up and 0 < rows < _TRICKLE_ROWS, behind_us)

    def acknowledge(self, lsn: int) -> None:
        """Does nothing: a binlog is kept by age and size."""

    def keep_alive(self) -> None:
        """Does nothing: the source waits for hours."""


@contextlib.contextmanager
def _gaps() -> Iterator[None]:
    try:
        yield
    except (LogPurged, LogUnusable) as error:
        raise GapFound(str(error)) from error
