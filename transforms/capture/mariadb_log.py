"""A MariaDB or MySQL source as a link's reader uses it (ADR 0012)."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.capture.mariadb.errors import LogPurged, LogUnusable
from transforms.capture.mariadb.snapshot import SnapshotPoint
from transforms.capture.mariadb.source import MariaDbSource
from transforms.capture.polled_stream import PolledStream
from transforms.capture.slots import SlotState
from transforms.capture.source_log import gaps

_gaps = functools.partial(gaps, LogPurged, LogUnusable)


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

    def advance(self, lsn: int) -> None:
        """Does nothing: the log is deleted by age or size alone."""

    def open(self, start: Position, acknowledged_lsn: int) -> PolledStream:
        with _gaps():
            stream = self._source.open(start)

        def read(timeout_s: float) -> list[RawChanges]:
            with _gaps():
                return self._source.read(stream, timeout_s)

        return PolledStream(stream, read, self._now_us)
