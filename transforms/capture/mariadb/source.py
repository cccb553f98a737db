"""One MariaDB or MySQL source as a link's reader uses it."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from schemas.batches import RawChanges
from schemas.clocks import monotonic_s
from schemas.errors import CampusSyncError
from schemas.positions import Position
from transforms.capture.mariadb.anchor import Anchor, stands
from transforms.capture.mariadb.check import problems, require_readable
from transforms.capture.mariadb.errors import LogReplaced, LogSettingsWrong, LogUnusable
from transforms.capture.mariadb.snapshot import (
    SnapshotPoint,
    consistent_point,
    later_view,
    snapshot,
)
from transforms.capture.mariadb.state import LogState, columns_of, rows_estimated, state, tables_of
from transforms.capture.mariadb.stream import BinlogStream
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.retention import seconds_left
from transforms.capture.snapshot_part import WHOLE, Rest, SnapshotChanges

_READER_IDS = 1 << 31  # The upper half: replicas are given small numbers.


class MariaDbSource:
    """What `LinkReader` asks of a source, in the terms of `slots`, `snapshot` and `replication`.

    A binlog has no slot: the server keeps its log by age and size whoever reads it. The "slot"
    of a link is its position, and it is lost when the log there is gone or unusable.

    Args:
      dsn: of the source. name: of the link's slot; two readers of one name exclude each other.
      keys: `database.table` to the columns that identify a row: the mapped tables.
      columns: `database.table` to the columns that the mapping needs; None: all.
      batch_rows, batch_bytes, heartbeat_s: as in `Limits`.
      monotonic: a clock.
    """

    def __init__(
        self,
        dsn: str,
        name: str,
        keys: Mapping[str, Sequence[str]],
        columns: Mapping[str, Sequence[str]] | None,
        *,
        batch_rows: int,
        batch_bytes: int,
        heartbeat_s: float = 1.0,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._dsn, self._keys, self._columns = dsn, dict(keys), columns
        self._batch_rows, self._batch_bytes = batch_rows, batch_bytes
        self._heartbeat_s, self._monotonic = heartbeat_s, monotonic
        digest = hashlib.sha256(name.encode()).digest()
        self._reader_id = _READER_IDS | int.from_bytes(digest[:4], "big")
        self._stream: BinlogStream | None = None
        self._unusable = False
        self._looked: LogState | None = None
        self._passed_over: frozenset[str] = frozenset()

    def require_covered(self) -> None:
        """Checks that the mapped tables that exist are logged.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
          LogSettingsWrong: all that is wrong, with remedies.
        """
        wrong, _ = self.preflight(self.columns())
        if wrong:
            raise LogSettingsWrong(" ".join(wrong))

    def columns(self) -> dict[str, dict[str, str]]:
        """Returns the columns, to their types, of the mapped tables that exist.

        Raises:
          SourceUnavailable: no connection.
        """
        return columns_of(self._dsn, self._keys, state(self._dsn).fold)

    def pass_over(self, tables: Collection[str]) -> None:
        """Leaves tables out of snapshots from now on, and only these."""
        self._passed_over = frozenset(tables)

    @property
    def _whole(self) -> tuple[str, ...]:
        return tuple(name for name in self._keys if name not in self._passed_over)

    def preflight(
        self, tables: Collection[str] | None = None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns what keeps the link from working, and what is only to be feared, with remedies.

        Args:
          tables: those that are wanted; None: all mapped ones.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
        """
        found = state(self._dsn)
        wanted = tuple(self._keys if tables is None else tables)
        return problems(found, wanted, tables_of(self._dsn, wanted, found.fold))

    def state(self, applied: Position | None, anchor: Anchor | None = None) -> SlotState:
        """Returns the log as a slot at the ledger's position would look; `lost` means a gap.

        `anchor` is what an earlier reader noted of the log: another log is a gap too.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
        """
        found = state(self._dsn)
        lsn = applied.lsn if applied is not None else found.log_end_lsn
        retention = found.retention(lsn, found.now_us, 0.0)
        spare = retention.size_max and retention.size_max - retention.needed_bytes
        return SlotState(
            exists=True,
            log_end_lsn=found.log_end_lsn,
            lost=self._unusable
            or not found.keeps(lsn)
            or (anchor is not None and not stands(found, anchor)),
            confirmed_lsn=0,
            retained_bytes=retention.needed_bytes,
            safe_wal_bytes=spare,
        )

    def memberships(self) -> dict[str, str]:
        """Returns a text for each mapped table that is logged; another server has another text.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
        """
        found = state(self._dsn)
        tables = tables_of(self._dsn, self._keys, found.fold)
        return {name: found.identity for name in tables if found.logs(name.partition(".")[0])}

    @contextlib.contextmanager
    def create(self, after: Position | None) -> Iterator[SnapshotPoint]:
        """Yields a consistent view of the source, later than the position `after`.

        Raises:
          SourceUnavailable, RightsMissing, LogSettingsWrong: as they say.
        """
        require_readable(state(self._dsn))
        with consistent_point(self._dsn, after.lsn if after is not None else 0) as point:
            self._unusable, self._stream = False, None
            yield point

    def view(self, lsn: int) -> contextlib.AbstractContextManager[SnapshotPoint]:
        """Returns the source as it is now, for what a snapshot at `lsn` has left.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
        """
        return later_view(self._dsn, lsn)

    def rows_estimated(self) -> int:
        """Returns about how many rows the mapped tables have.

        Raises:
          SourceUnavailable: no connection.
        """
        return rows_estimated(self._dsn, self._whole)

    def snapshot(
        self, point: SnapshotPoint, batch_rows: int | None = None, rest: Rest = WHOLE
    ) -> Iterator[SnapshotChanges]:
        """Yields all rows of the mapped tables, or the rest of them; see `snapshot.snapshot`."""
        return snapshot(
            point,
            self._whole,
            batch_rows=batch_rows or self._batch_rows,
            batch_bytes=self._batch_bytes,
            keys=self._keys,
            columns=self._columns,
            rest=rest,
        )

    def open(self, position: Position) -> BinlogStream:
        """Returns a stream from `position` on; one that an earlier stream reached is recognised.

        Raises:
          As `BinlogStream`.
        """
        last = self._stream
        known = last is not None and last.position == position
        with self._unusable_if(LogReplaced):
            self._stream = self._opened(position, last.anchor if known else "")
        return self._stream

    def _opened(self, position: Position, gtid: str) -> BinlogStream:
        return BinlogStream(
            self._dsn,
            position,
            reader_id=self._reader_id,
            batch_rows=self._batch_rows,
            batch_bytes=self._batch_bytes,
            keys=self._keys,
            columns=self._columns,
            heartbeat_s=self._heartbeat_s,
            gtid=gtid,
            monotonic=self._monotonic,
        )

    @contextlib.contextmanager
    def _unusable_if(self, *errors: type[CampusSyncError]) -> Iterator[None]:
        try:
            yield
        except errors:
            self._unusable = True
            raise

    def read(self, stream: BinlogStream, timeout_s: float) -> list[RawChanges]:
        """As `BinlogStream.read`; remembers that a gap was found.

        Raises:
          As `BinlogStream.read`.
        """
        with self._unusable_if(LogUnusable, LogReplaced):
            return stream.read(timeout_s)

    def seconds_left(self, applied: Position, commit_us: int) -> float | None:
        """Returns how long the source keeps the log that a link at `applied` needs, if it stops.

        The rate of growth is that since the last call; None: nothing removes the log.

        Raises:
          SourceUnavailable, RightsMissing: as they say.
        """
        found = state(self._dsn)
        rate = found.growth(self._looked) if self._looked is not None else 0.0
        self._looked = found
        return seconds_left(found.retention(applied.lsn, commit_us, rate))
