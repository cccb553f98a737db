"""Read tables at an exported snapshot, in the same words as the stream."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numba
import numpy as np
import psycopg
import pyarrow as pa
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict

from schemas.batches import Op, RawChanges, Reject
from schemas.errors import CampusSyncError
from schemas.positions import SEQ_END, Position
from transforms.capture.columns import NULL, SLACK, Layout, Rows, record_batch
from transforms.capture.replication import CopyReader, connect, start_copy, unavailable
from transforms.capture.slots import CreatedSlot

_WAIT_S = 5.0
_BACKSLASH, _NULL_LETTER, _TAB, _NEWLINE = (ord(letter) for letter in "\\N\t\n")
# What PostgreSQL writes for a control character or a backslash: itself or a letter.
_ESCAPES = np.arange(256, dtype=np.uint8)
_ESCAPES[[ord(letter) for letter in "bfnrtv"]] = [ord(c) for c in "\b\f\n\r\t\v"]


class TableMissing(CampusSyncError):
    """A table to be read does not exist, or this role may not read it."""


class SnapshotTooLarge(CampusSyncError):
    """There are more rows than one snapshot has positions."""


def snapshot(
    dsn: str,
    created: CreatedSlot,
    tables: Collection[str],
    *,
    batch_rows: int,
    batch_bytes: int,
    keys: Mapping[str, Sequence[str]] | None = None,
    publication: str | None = None,
) -> Iterator[RawChanges]:
    """Yields every row of the tables as `Op.SNAPSHOT`, in `RawChanges` that join on.

    They go from (created.lsn, 0) to (created.lsn, SEQ_END), counting rows and, after each
    table, one more for its sweep, which the table's last `RawChanges` carries: it may have
    no rows. Rows have the source's time of the snapshot as commit time, and the columns and
    texts that the stream has. Memory is bounded by one batch.

    Args:
      created: from `slots.create`, still open when this starts.
      tables: `schema.table`, read in this order.
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one row is larger.
      keys: as for `PgOutputDecoder`; None: the replica identity, or under FULL the primary key.
      publication: whose column lists hold; None: all columns but generated ones.

    Raises:
      SourceUnavailable: the connection is lost; only a new slot gives another snapshot.
      TableMissing, SnapshotTooLarge, TooManyColumns: as they say.
    """
    connection = connect(dsn)
    try:
        with contextlib.closing(connection):
            _begin(connection, created, tables)
            layouts = [_layout(connection, table, keys, publication) for table in tables]
            seq = 0
            for layout in layouts:
                rows = _Rows(connection, layout, created, seq)
                for changes in rows.read(batch_rows, batch_bytes):
                    seq = changes.end.seq
                    if changes.sweeps and layout is layouts[-1]:
                        end = Position(created.lsn, SEQ_END)
                        changes = dataclasses.replace(changes, end=end)
                    yield changes
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable) as error:
        raise TableMissing(
            f"a table of {', '.join(tables)} does not exist, or this role may not read all of it."
        ) from error
    except psycopg.OperationalError as error:
        raise unavailable(conninfo_to_dict(dsn), error) from error


def _begin(connection: psycopg.Connection, created: CreatedSlot, tables: Collection[str]) -> None:
    """Enters the snapshot; the locks keep every table from being truncated or rewritten."""
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(created.snapshot)))
    if tables:
        names = sql.SQL(", ").join(_name(table) for table in tables)
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))


def _name(table: str) -> sql.Identifier:
    schema, _, name = table.partition(".")
    return sql.Identifier(schema, name)


_COLUMNS = """
SELECT a.attname, coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_index i ON i.indrelid = c.oid
  AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
WHERE n.nspname = %(schema)s AND c.relname = %(name)s
  AND CASE WHEN %(publication)s::text IS NULL THEN a.attgenerated = ''
    ELSE a.attname IN (SELECT unnest(p.attnames) FROM pg_publication_tables p
      WHERE p.pubname = %(publication)s AND p.schemaname = n.nspname AND p.tablename = c.relname)
    END
ORDER BY a.attnum
"""


def _layout(
    connection: psycopg.Connection,
    table: str,
    keys: Mapping[str, Sequence[str]] | None,
    publication: str | None,
) -> Layout:
    schema, _, name = table.partition(".")
    rows = connection.execute(
        _COLUMNS, {"schema": schema, "name": name, "publication": publication}
    ).fetchall()
    columns = tuple(column for column, _ in rows)
    key = tuple(i for i, (_, is_key) in enumerate(rows) if is_key)
    lacking = sorted(set(keys[table]) - set(columns)) if keys is not None else []
    if not columns or lacking:
        raise TableMissing(
            f"table {table} has no {', '.join(lacking) or 'published columns'} in the source."
        )
    if keys is not None:
        key = tuple(columns.index(column) for column in keys[table])
    return Layout(table, columns, key, key)


class _Rows:
    """Reads one table; its first row has the ordinal after `seq`."""

    def __init__(
        self, connection: psycopg.Connection, layout: Layout, created: CreatedSlot, seq: int
    ):
        self._connection, self._layout, self._created = connection, layout, created
        self._seq = seq

    def read(self, batch_rows: int, batch_bytes: int) -> Iterator[RawChanges]:
        """Yields the rows, the last time with the sweep."""
        # The text format has every value as its type's output function writes it, which is what
        # the stream sends; a cast to text differs for boolean, character and inet.
        columns = sql.SQL(", ").join(map(sql.Identifier, self._layout.columns))
        command = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(
            columns, _name(self._layout.table)
        )
        self._expect(start_copy(self._connection, command), pq.ExecStatus.COPY_OUT)
        reader = CopyReader(self._connection.pgconn)
        waiting: list[bytes] = []
        size = 0
        while True:
            copied = reader.read(batch_bytes - size)
            waiting += copied.payloads
            size += sum(map(len, copied.payloads))
            while len(waiting) > batch_rows:
                yield self._take(waiting[:batch_rows], False)
                del waiting[:batch_rows]
                size = sum(map(len, waiting))
            if copied.ended:
                break
            if size >= batch_bytes:
                yield self._take(waiting, False)
                waiting, size = [], 0
            if copied.drained:
                reader.wait(_WAIT_S)
        pgconn = self._connection.pgconn
        self._expect(pgconn.get_result(), pq.ExecStatus.COMMAND_OK)
        pgconn.get_result()  # Nothing: it makes the connection ready for the next command.
        yield self._take(waiting, True)

    def _expect(self, result: pq.abc.PGresult | None, status: pq.ExecStatus) -> None:
        if result is None or result.status != status:
            while self._connection.pgconn.get_result() is not None:
                pass
            if result is None:
                raise psycopg.OperationalError("the copy has no result")
            raise psycopg.errors.error_from_result(result)

    def _take(self, payloads: Sequence[bytes], last: bool) -> RawChanges:
        def content(rows: Rows) -> Content:
            return record_batch(self._layout, rows, *self._cells(payloads))

        created, table = self._created, self._layout.table
        begin = Position(created.lsn, self._seq)
        taken = snapshot_changes(table, begin, created.taken_us, len(payloads), last, content)
        self._seq = taken.end.seq
        return taken

    def _cells(self, payloads: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        joined = b"".join(payloads)
        buffer = np.empty(len(joined) + SLACK, np.uint8)
        buffer[: len(joined)] = np.frombuffer(joined, np.uint8)
        ends = np.cumsum(np.fromiter(map(len, payloads), np.int64, len(payloads)))
        start = np.zeros((len(payloads), self._layout.width), np.int64)
        length = np.full((len(payloads), self._layout.width), NULL, np.int32)
        broken = _lines(buffer, ends, len(self._layout.columns), _ESCAPES, start, length)
        if broken >= 0:
            raise psycopg.OperationalError("a copied line is damaged")
        return buffer, start, length


Content = tuple[pa.RecordBatch, tuple[Reject, ...]]


def snapshot_changes(
    table: str,
    begin: Position,
    taken_us: int,
    count: int,
    last: bool,
    content: Callable[[Rows], Content],
) -> RawChanges:
    """Returns the next `count` rows of a table as changes behind `begin`, at its LSN.

    The `last` of a table have its sweep, which takes a place of its own.

    Args:
      taken_us: the source's time of the snapshot.
      content: returns the batch of given places, and what is refused of it; not asked if empty.

    Raises:
      SnapshotTooLarge: there are more rows than places.
    """
    lsn, end_seq = begin.lsn, begin.seq + count + last
    if end_seq >= SEQ_END:
        raise SnapshotTooLarge(
            f"table {table} and those before it have more than {SEQ_END} rows: map fewer "
            "tables to one link."
        )
    tables, rejects = {}, ()
    if count:
        rows = Rows(
            op=np.full(count, Op.SNAPSHOT, np.uint8),
            lsn=np.full(count, lsn, np.int64),
            seq=np.arange(begin.seq + 1, begin.seq + 1 + count, dtype=np.int32),
            commit_us=np.full(count, taken_us, np.int64),
        )
        batch, rejects = content(rows)
        tables = {table: batch} if batch.num_rows else {}
    return RawChanges(
        begin,
        Position(lsn, end_seq),
        count,
        taken_us,
        tables,
        sweeps=((table, Position(lsn, 0)),) if last else (),
        rejects=rejects,
    )


@numba.njit(nogil=True, cache=True)
def _lines(buffer, ends, columns, escapes, start, length):
    """Finds the cells of lines of COPY's text format, undoing escapes in place.

    Returns -1, or which line is damaged.
    """
    at = 0
    for row in range(len(ends)):
        end = ends[row] - 1
        if end < at or buffer[end] != _NEWLINE:
            return row
        for c in range(columns):
            start[row, c] = to = at
            null = False
            while at < end and buffer[at] != _TAB:
                letter = buffer[at]
                if letter == _BACKSLASH:
                    at += 1
                    null = null or buffer[at] == _NULL_LETTER
                    letter = escapes[buffer[at]]
                buffer[to] = letter
                to += 1
                at += 1
            length[row, c] = NULL if null else to - start[row, c]
            if (at == end) != (c == columns - 1):
                return row
            at += 1  # Past the tab or the newline.
    return -1
