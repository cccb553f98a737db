"""Read tables at a known place of the binlog, in the same words as the log."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pymysql

from schemas.errors import SourceUnavailable
from schemas.positions import SEQ_END, Position
from transforms.capture.columns import NULL, SLACK, Rows, record_batch
from transforms.capture.mariadb import charsets, result_rows
from transforms.capture.mariadb.dsn import parse_dsn
from transforms.capture.mariadb.floats import float_texts
from transforms.capture.mariadb.packets import PacketReader, Packets
from transforms.capture.mariadb.places import border, file_number, next_snapshot
from transforms.capture.mariadb.raw_query import raw_rows
from transforms.capture.mariadb.refuse import unmarked
from transforms.capture.mariadb.session import clock_us, connect, is_mariadb, translated
from transforms.capture.mariadb.snapshot_columns import SourceTable, quote_table, source_table
from transforms.capture.mariadb.text_area import TextArea, decode_slowly
from transforms.capture.postgresql.snapshot import Content, snapshot_changes
from transforms.capture.snapshot_part import WHOLE, Key, Rest, SnapshotChanges, nothing_left

_READ_BYTES = 1 << 20
_LOCK_WAIT_S = 10


@dataclasses.dataclass(frozen=True)
class SnapshotPoint:
    """A consistent view of the source, valid while `consistent_point` is open.

    Attributes:
      lsn: it holds exactly the transactions before this place; those from here on are in the log.
      taken_us: the source's clock, microseconds since 1970.
      connection: in the transaction that sees it.
      view_lsn: of a later view of what the snapshot has left: it holds all transactions before
        `lsn`, and of the later ones those before this place. None: the snapshot is exact.
    """

    lsn: int
    taken_us: int
    connection: pymysql.Connection
    view_lsn: int | None = None


@contextlib.contextmanager
def consistent_point(dsn: str, after: int = 0) -> Iterator[SnapshotPoint]:
    """Yields a view of all tables at one place of the log, later than the lsn `after`.

    MariaDB gives view and place together, with no lock. MySQL does not: there all writes wait
    for some milliseconds, for which the account needs RELOAD.

    Raises:
      SourceUnavailable: no connection, or nothing was written since too many snapshots.
      RightsMissing: as it says.
    """
    with _view(dsn) as point:
        lsn = next_snapshot(point.lsn, after)
        if lsn is None:
            raise SourceUnavailable(
                f"source {parse_dsn(dsn).place} has had too many snapshots since anything was "
                "written to it."
            )
        yield dataclasses.replace(point, lsn=lsn)


@contextlib.contextmanager
def later_view(dsn: str, lsn: int) -> Iterator[SnapshotPoint]:
    """Yields a view of all tables as they are now, for what a snapshot at `lsn` has left.

    Raises:
      SourceUnavailable, RightsMissing: as for `consistent_point`.
    """
    with _view(dsn) as point:
        yield dataclasses.replace(point, lsn=lsn, view_lsn=point.lsn)


@contextlib.contextmanager
def _view(dsn: str) -> Iterator[SnapshotPoint]:
    """Yields a view at the border of the log where it stands."""
    server = parse_dsn(dsn)
    connection = connect(server)
    try:
        with contextlib.closing(connection):
            with connection.cursor() as cursor:
                place = _begin(cursor)
                now_us = clock_us(cursor)
            yield SnapshotPoint(border(file_number(place[0]), place[1]), now_us, connection)
    except (pymysql.err.OperationalError, pymysql.err.InternalError, OSError) as error:
        raise translated(server, error) from error


def _begin(cursor: pymysql.cursors.Cursor) -> tuple[str, int]:
    cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    begin = "START TRANSACTION WITH CONSISTENT SNAPSHOT"
    if is_mariadb(cursor):
        cursor.execute(begin)
        cursor.execute("SHOW STATUS LIKE 'binlog_snapshot_%'")
        found = {str(name).lower(): str(value) for name, value in cursor.fetchall()}
        return found["binlog_snapshot_file"], int(found["binlog_snapshot_position"])
    cursor.execute(f"SET lock_wait_timeout = {_LOCK_WAIT_S}")
    cursor.execute("FLUSH TABLES WITH READ LOCK")
    cursor.execute(begin)
    cursor.execute("SHOW MASTER STATUS")
    row = cursor.fetchone()
    cursor.execute("UNLOCK TABLES")
    return str(row[0]), int(row[1])


def snapshot(
    point: SnapshotPoint,
    tables: Collection[str],
    *,
    batch_rows: int,
    batch_bytes: int,
    keys: Mapping[str, Sequence[str]] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    rest: Rest = WHOLE,
    only: str = "",
    once: bool = False,
) -> Iterator[SnapshotChanges]:
    """Yields every row of the tables as `Op.SNAPSHOT`, in changes that join on.

    They go from (point.lsn, 0) to (point.lsn, SEQ_END), counting rows and, after each table,
    one more for its sweep, which the table's last changes carry: they may have no rows.
    Rows have the source's time of the snapshot as commit time. Tables are read in chunks by
    primary key where it has an order, and memory is bounded by one batch.

    Args:
      tables: `database.table`, read in this order.
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one row is larger.
      keys, columns: as for `BinlogDecoder`.
      rest: what an earlier reading has left; numbers go on behind those that it gave out.
      only: a condition in SQL that rows must meet; they are then read in one go.
      once: read one chunk of each table and no more, `only` or not.

    Raises:
      pymysql.OperationalError, OSError: the connection is lost, or a table was altered meanwhile;
        `consistent_point` turns them into SourceUnavailable.
      TableMissing, SnapshotTooLarge, TooManyColumns, KeyUnknown: as they say.
    """
    with point.connection.cursor() as cursor:
        cursor.execute("SET character_set_results = utf8mb4")
        found = [
            source_table(
                cursor,
                table,
                keys[table] if keys is not None else None,
                columns.get(table) if columns is not None else None,
            )
            for table in rest.of(tables)
        ]
        cursor.execute("SET character_set_results = NULL")  # Texts come as they are stored.
    if only and not once:
        found = [dataclasses.replace(table, chunk_key=()) for table in found]
    seq = rest.last_seq
    if not found:
        yield nothing_left(point.lsn, rest)
    for table in found:
        reading = _Reading(point, table, seq, batch_rows, batch_bytes, only, once)
        for changes in reading.read(rest):
            seq = changes.last_seq
            if changes.ended and table is found[-1]:
                changes = dataclasses.replace(changes, end=Position(point.lsn, SEQ_END))
            yield changes


class _Reading:
    """Reads one table; its first row has the ordinal after `seq`."""

    def __init__(
        self,
        point: SnapshotPoint,
        table: SourceTable,
        seq: int,
        batch_rows: int,
        batch_bytes: int,
        only: str,
        once: bool,
    ):
        self._point, self._table, self._seq, self._only = point, table, seq, only
        self._once = once
        self._batch_rows, self._batch_bytes = batch_rows, batch_bytes
        self._reader = PacketReader(point.connection._sock)
        self._area = TextArea()
        self._contents: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._rows = self._bytes = 0
        self._last: np.ndarray | None = None
        codecs = sorted({asked.codec for asked in table.asked if asked.mode in _TABLED})
        self._codecs = charsets.tables(codecs)
        extra = [(result_rows.LEFT_OUT, 0, 0, -1)] * len(table.chunk_key)
        self._lines = np.array(
            [
                (a.how, a.mode, codecs.index(a.codec) if a.mode in _TABLED else 0, target)
                for target, a in enumerate(table.asked)
            ]
            + extra,
            np.int64,
        )

    def read(self, rest: Rest) -> Iterator[SnapshotChanges]:
        """Yields the rows that are left, the last time with the sweep."""
        key = [part.name for part in self._table.chunk_key]
        after = rest.after(self._table.layout.table, key)
        while True:
            count = 0
            for packets in self._chunk(after):
                count += len(packets)
                for part in _parts(packets, self._batch_rows - self._rows, self._batch_rows):
                    self._keep(part)
                    if self._rows >= self._batch_rows or self._bytes >= self._batch_bytes:
                        yield self._take(False)
            if self._once or not key or count < self._batch_rows:
                break
            after = _tail(self._last, len(key), len(self._lines))
        yield self._take(True)

    def _chunk(self, after: tuple[bytes, ...] | None) -> Iterator[Packets]:
        key = self._table.chunk_key
        chosen = [asked.expression for asked in self._table.asked]
        chosen += [part.quoted for part in key]
        query = f"SELECT {', '.join(chosen)} FROM {quote_table(self._table.layout.table)}"
        conditions = [self._only] if self._only else []
        if key:
            query += " FORCE INDEX (PRIMARY)"
            conditions += [_beyond(key, after)] if after is not None else []
        if conditions:
            query += f" WHERE {' AND '.join(f'({one})' for one in conditions)}"
        if key:
            order = ", ".join(part.quoted for part in key)
            query += f" ORDER BY {order} LIMIT {self._batch_rows}"
        return raw_rows(self._point.connection, self._reader, query, _READ_BYTES)

    def _keep(self, packets: Packets) -> None:
        """Copies rows, since the reader uses its room again."""
        first, last = int(packets.starts[0]), int(packets.ends[-1])
        bounds = np.stack((packets.starts, packets.ends)) - first + self._bytes
        self._contents.append(packets.data[first:last].copy())
        self._sizes.append(bounds)
        self._rows += len(packets)
        self._bytes += last - first
        self._last = packets.data[packets.starts[-1] : last].copy()

    def _take(self, last: bool) -> SnapshotChanges:
        def content(rows: Rows) -> Content:
            start, length = self._cells(len(rows.op))
            batch, refused = record_batch(self._table.layout, rows, self._area.room, start, length)
            return batch, tuple(unmarked(reject) for reject in refused)

        point, table = self._point, self._table.layout.table
        begin = Position(point.lsn, self._seq)
        behind: Key = {}
        if self._last is not None and self._table.chunk_key:
            names = [part.name for part in self._table.chunk_key]
            tail = _tail(self._last, len(names), len(self._lines))
            behind = dict(zip(names, tail, strict=True))
        taken = snapshot_changes(table, begin, point.taken_us, self._rows, last, behind, content)
        self._seq = taken.end.seq
        self._contents, self._sizes = [], []
        self._rows = self._bytes = 0
        return taken

    def _cells(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        layout, area, codecs = self._table.layout, self._area, self._codecs
        buffer = np.concatenate((*self._contents, np.empty(SLACK, np.uint8)))
        bounds = np.concatenate(self._sizes, axis=1)
        start = np.zeros((count, layout.width), np.int64)
        length = np.full((count, layout.width), NULL, np.int32)
        area.clear()
        at = 0
        while at >= 0:
            at, area.used = result_rows.write_result(
                buffer,
                bounds[0],
                bounds[1],
                at,
                self._lines,
                (codecs.single, codecs.double, codecs.four),
                start,
                length,
                area.room,
                area.used,
            )
            if at < -1:
                raise pymysql.OperationalError(2027, "damaged row")
            if at >= 0:
                area.grow()
        for place, asked in enumerate(self._table.asked):
            if asked.float_size:
                self._shorten(start[:, place], length[:, place], asked.float_size)
            elif asked.mode == charsets.SLOW:
                decode_slowly(area, asked.codec, start[:, place], length[:, place])
        return start, length

    def _shorten(self, start: np.ndarray, length: np.ndarray, size: int) -> None:
        """Writes numbers of floating point again, in the words of the log."""
        room = self._area.room
        texts = [
            room[at : at + count].tobytes().decode() if count >= 0 else None
            for at, count in zip(start.tolist(), length.tolist(), strict=True)
        ]
        numbers = pa.array(texts, pa.utf8()).cast(pa.float64()).fill_null(0.0).to_numpy()
        bits = numbers.view(np.int64) if size == 8 else _float_bits(numbers)
        self._area.put(float_texts(bits, size), start, length)


_TABLED = (charsets.TABLED, charsets.GB18030)


def _float_bits(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).view(np.uint32).astype(np.int64)


def _parts(packets: Packets, first: int, size: int) -> Iterator[Packets]:
    """Divides packets after the `first` so many, and then every `size`."""
    at = 0
    while at < len(packets):
        end = at + (first if at == 0 else size)
        yield Packets(packets.data, packets.starts[at:end], packets.ends[at:end])
        at = end


def _tail(row: np.ndarray, count: int, columns: int) -> tuple[bytes, ...]:
    """Returns the last cells of a row, none of which is null."""
    at, cells = 0, []
    for _ in range(columns):
        at, size = result_rows.cell_bounds(row, at, len(row))
        at, size = int(at), int(size)
        cells.append(row[at : at + max(size, 0)].tobytes())
        at += max(size, 0)
    return tuple(cells[-count:])


def _beyond(key: Sequence, after: Sequence[bytes]) -> str:
    """Returns the condition of rows behind a key, in a form that an index serves.

    (a, b) > (1, 2) is a >= 1 AND (a > 1 OR a = 1 AND b > 2).
    """
    values = [part.literal(value) for part, value in zip(key, after, strict=True)]
    names = [part.quoted for part in key]
    ways = []
    for i, name in enumerate(names):
        equal = [f"{n} = {v}" for n, v in zip(names[:i], values[:i], strict=True)]
        ways.append(" AND ".join([*equal, f"{name} > {values[i]}"]))
    if len(ways) == 1:
        return ways[0]
    return f"{names[0]} >= {values[0]} AND ({' OR '.join(f'({way})' for way in ways)})"
