"""Read tables at an exported snapshot, in the same words as the stream."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numba
import numpy as np
import psycopg
import pyarrow as pa
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict

from schemas.batches import Op, Reject
from schemas.errors import CampusSyncError
from schemas.positions import SEQ_END, Position
from transforms.capture.columns import NULL, SLACK, Layout, Rows, record_batch
from transforms.capture.postgresql.replication import CopyReader, connect, start_copy, unavailable
from transforms.capture.postgresql.slots import CreatedSlot
from transforms.capture.snapshot_part import WHOLE, Key, Rest, SnapshotChanges, nothing_left

_WAIT_S = 5.0
_BACKSLASH, _NULL_LETTER, _TAB, _NEWLINE = (ord(letter) for letter in "\\N\t\n")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
# Rows come in the order of the key's index, of which a chunk is a stretch: whatever statistics
# say of a table that was just filled, nobody sorts it once for every chunk.
_BY_INDEX = "SET LOCAL enable_sort = off; SET LOCAL enable_seqscan = off; SET LOCAL jit = off"
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
    rest: Rest = WHOLE,
) -> Iterator[SnapshotChanges]:
    """Yields every row of the tables as `Op.SNAPSHOT`, in changes that join on.

    They go from (created.lsn, 0) to (created.lsn, SEQ_END), counting rows and, after each
    table, one more for its sweep, which the table's last changes carry: they may have no rows.
    Rows have the source's time of the snapshot as commit time, and the columns and texts that
    the stream has. A table is read in chunks by its primary key, or by what its replica
    identity names; without either in one go. Memory is bounded by one batch.

    Args:
      created: from `slots.create`, still open when this starts.
      tables: `schema.table`, read in this order.
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one row is larger.
      keys: as for `PgOutputDecoder`; None: the replica identity, or under FULL the primary key.
      publication: whose column lists hold; None: all columns but generated ones.
      rest: what an earlier reading has left; numbers go on behind those that it gave out.

    Raises:
      SourceUnavailable: the connection is lost; `slots.view` gives another view of what is left.
      TableMissing, SnapshotTooLarge, TooManyColumns: as they say.
    """
    connection = connect(dsn)
    try:
        with contextlib.closing(connection):
            left = rest.of(tables)
            _begin(connection, created, left)
            layouts = [_layout(connection, table, keys, publication) for table in left]
            orders = [_order(connection, layout) for layout in layouts]
            seq = rest.last_seq
            if not layouts:
                yield nothing_left(created.lsn, rest)
            for layout, order in zip(layouts, orders, strict=True):
                rows = _Rows(connection, layout, order, created, seq)
                after = rest.after(layout.table, [name for name, _ in order])
                for changes in rows.read(batch_rows, batch_bytes, after):
                    seq = changes.last_seq
                    if changes.ended and layout is layouts[-1]:
                        end = Position(created.lsn, SEQ_END)
                        changes = dataclasses.replace(changes, end=end)
                    yield changes
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable) as error:
        raise TableMissing(
            f"a table of {', '.join(tables)} does not exist, or this role may not read all of it."
        ) from error
    except psycopg.OperationalError as error:
        raise unavailable(conninfo_to_dict(dsn), error) from error


def rows_estimated(dsn: str, tables: Collection[str]) -> int:
    """Returns about how many rows the tables have, as the source's planner takes it.

    Raises:
      SourceUnavailable: no connection. TableMissing: one is not there, or may not be read.
    """
    found = 0
    try:
        with contextlib.closing(connect(dsn)) as connection:
            for table in tables:
                query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(_name(table))
                (plan,) = connection.execute(query).fetchone()
                found += int(plan[0]["Plan"]["Plan Rows"])
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable) as error:
        raise TableMissing(f"a table of {', '.join(tables)} cannot be read.") from error
    except psycopg.OperationalError as error:
        raise unavailable(conninfo_to_dict(dsn), error) from error
    return found


def _begin(connection: psycopg.Connection, created: CreatedSlot, tables: Collection[str]) -> None:
    """Enters the snapshot; the locks keep every table from being truncated or rewritten."""
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(created.snapshot)))
    connection.execute(_BY_INDEX)
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


# Ends in what a partial or an expression index has: a table is not read by such.
_ORDER = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL
  AND i.indisunique AND i.indexprs IS NULL
  AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
CROSS JOIN unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k (attnum, place)
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
WHERE n.nspname = %s AND c.relname = %s ORDER BY k.place
"""


def _order(connection: psycopg.Connection, layout: Layout) -> list[tuple[str, str]]:
    """Returns name and type of the columns that a table is read by, none if there is no such."""
    schema, _, name = layout.table.partition(".")
    order = connection.execute(_ORDER, [schema, name]).fetchall()
    return order if {column for column, _ in order} <= set(layout.columns) else []


class _Rows:
    """Reads one table; its first row has the ordinal after `seq`."""

    def __init__(
        self,
        connection: psycopg.Connection,
        layout: Layout,
        order: Sequence[tuple[str, str]],
        created: CreatedSlot,
        seq: int,
    ):
        self._connection, self._layout, self._created = connection, layout, created
        self._order, self._seq = order, seq
        self._size = 0  # Of what waits.

    def read(
        self, batch_rows: int, batch_bytes: int, after: tuple[bytes, ...] | None
    ) -> Iterator[SnapshotChanges]:
        """Yields the rows behind the key `after`, the last time with the sweep."""
        while True:
            count = self._size = 0
            waiting: list[bytes] = []
            for payloads in self._copied(batch_rows, batch_bytes, after):
                count += len(payloads)
                waiting += payloads
                self._size += sum(map(len, payloads))
                while len(waiting) > batch_rows:
                    yield self._take(waiting[:batch_rows], False)
                    del waiting[:batch_rows]
                    self._size = sum(map(len, waiting))
                if self._size >= batch_bytes:
                    yield self._take(waiting, False)
                    after, waiting, self._size = self._key(waiting), [], 0
            if not self._order or count < batch_rows:
                yield self._take(waiting, True)
                return
            if waiting:
                yield self._take(waiting, False)
                after = self._key(waiting)

    def _copied(
        self, batch_rows: int, batch_bytes: int, after: tuple[bytes, ...] | None
    ) -> Iterator[list[bytes]]:
        """Yields the lines of one chunk as they come, no more than fit."""
        # The text format has every value as its type's output function writes it, which is what
        # the stream sends; a cast to text differs for boolean, character and inet.
        columns = sql.SQL(", ").join(map(sql.Identifier, self._layout.columns))
        query = sql.SQL("SELECT {} FROM {}").format(columns, _name(self._layout.table))
        if self._order:
            names = sql.SQL(", ").join(sql.Identifier(name) for name, _ in self._order)
            if after is not None:
                values = sql.SQL(", ").join(
                    _constant(value, kind)
                    for value, (_, kind) in zip(after, self._order, strict=True)
                )
                query += sql.SQL(" WHERE ({}) > ({})").format(names, values)
            query += sql.SQL(" ORDER BY {} LIMIT {}").format(names, sql.Literal(batch_rows))
        command = sql.SQL("COPY ({}) TO STDOUT").format(query)
        self._expect(start_copy(self._connection, command), pq.ExecStatus.COPY_OUT)
        reader = CopyReader(self._connection.pgconn)
        while True:
            copied = reader.read(batch_bytes - self._size)
            if copied.payloads:
                yield copied.payloads
            if copied.ended:
                break
            if copied.drained:
                reader.wait(_WAIT_S)
        pgconn = self._connection.pgconn
        self._expect(pgconn.get_result(), pq.ExecStatus.COMMAND_OK)
        pgconn.get_result()  # Nothing: it makes the connection ready for the next command.

    def _key(self, payloads: Sequence[bytes]) -> tuple[bytes, ...]:
        """Returns what the last line has in the columns that the table is read by."""
        cells = payloads[-1].rstrip(b"\n").split(b"\t")
        places = [self._layout.columns.index(name) for name, _ in self._order]
        return tuple(_ESCAPED.sub(_unescaped, cells[place]) for place in places)

    def _expect(self, result: pq.abc.PGresult | None, status: pq.ExecStatus) -> None:
        if result is None or result.status != status:
            while self._connection.pgconn.get_result() is not None:
                pass
            if result is None:
                raise psycopg.OperationalError("the copy has no result")
            raise psycopg.errors.error_from_result(result)

    def _take(self, payloads: Sequence[bytes], last: bool) -> SnapshotChanges:
        def content(rows: Rows) -> Content:
            return record_batch(self._layout, rows, *self._cells(payloads))

        created, table = self._created, self._layout.table
        begin = Position(created.lsn, self._seq)
        behind: Key = {}
        if payloads and self._order:
            names = [name for name, _ in self._order]
            behind = dict(zip(names, self._key(payloads), strict=True))
        taken = snapshot_changes(
            table, begin, created.taken_us, len(payloads), last, behind, content
        )
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


def _constant(value: bytes, kind: str) -> sql.Composed:
    """Returns a value as SQL, whatever bytes it has; `kind` is its type as SQL."""
    encoding = sql.SQL(
        "CASE getdatabaseencoding() WHEN 'SQL_ASCII' THEN 'SQL_ASCII' ELSE 'UTF8' END"
    )
    return sql.SQL("convert_from('\\x{}'::bytea, {})::{}").format(
        sql.SQL(value.hex()), encoding, sql.SQL(kind)
    )


def _unescaped(found: re.Match[bytes]) -> bytes:
    return bytes([_ESCAPES[found[1][0]]])


Content = tuple[pa.RecordBatch, tuple[Reject, ...]]


def snapshot_changes(
    table: str,
    begin: Position,
    taken_us: int,
    count: int,
    last: bool,
    behind: Key,
    content: Callable[[Rows], Content],
) -> SnapshotChanges:
    """Returns the next `count` rows of a table as changes behind `begin`, at its LSN.

    The `last` of a table have its sweep, which takes a place of its own.

    Args:
      taken_us: the source's time of the snapshot.
      behind: key of the last of them, as `SnapshotChanges` has it.
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
    return SnapshotChanges(
        begin,
        Position(lsn, end_seq),
        count,
        taken_us,
        tables,
        sweeps=((table, Position(lsn, 0)),) if last else (),
        rejects=rejects,
        table=table,
        behind=behind,
        last_seq=end_seq,
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
