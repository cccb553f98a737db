"""Read rows of a PostgreSQL database into Arrow: binary COPY, decoded column by column."""

import dataclasses
import enum
import select
from collections.abc import Iterator, Sequence

import numba as nb
import numpy as np
import psycopg
import pyarrow as pa
from psycopg import pq

from schemas.tables import Kind, Table
from transforms import parse_text

_HEADER_BYTES = 19  # Signature, flags, length of an extension that PostgreSQL leaves empty.
_TRAILER = b"\xff\xff"
_EPOCH_US = 946_684_800_000_000  # 2000-01-01, PostgreSQL's zero, in µs since 1970.
_EPOCH_DAYS = 10_957
CHUNK_BYTES = 8 << 20


class Form(enum.Enum):
    """What a column is in PostgreSQL and becomes in Arrow; its number is the kernel's width."""

    TEXT = "text to utf8"
    DECIMAL = "numeric cast to text, to canonical decimal text"
    DIGEST = "bytea of 32 bytes to fixed binary; any other length becomes zeros"
    INT = "bigint to int64"
    BOOL = "boolean to bool"
    DATE = "date to date32"
    TIME = "timestamptz to timestamp[us, UTC]"


_FORMS = {
    Kind.TEXT: Form.TEXT,
    Kind.INT: Form.INT,
    Kind.DECIMAL: Form.DECIMAL,
    Kind.BOOL: Form.BOOL,
    Kind.DATE: Form.DATE,
    Kind.TIME: Form.TIME,
}
_WIDTHS = {Form.INT: 8, Form.BOOL: 1, Form.DATE: 4, Form.TIME: 8}
_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True)
class ColumnRead:
    """A column of a query: `sql` in its select list, `name` in the batch."""

    name: str
    sql: str
    form: Form


def content_columns(table: Table) -> list[ColumnRead]:
    """Returns the record id and the entity's own columns of a consult table."""
    columns = [ColumnRead("record_id", "record_id", Form.TEXT)]
    for column in table.columns:
        cast = "::text" if column.kind is Kind.DECIMAL else ""
        columns.append(ColumnRead(column.name, f'"{column.name}"{cast}', _FORMS[column.kind]))
    return columns


def read_rows(
    conn: psycopg.Connection,
    columns: Sequence[ColumnRead],
    source: str,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of `SELECT columns FROM source` as record batches of `chunk_bytes` or more.

    Holds one chunk, or one row if it is larger. The query's statement must be over before
    `conn` is used otherwise: exhaust the iterator or close the connection.

    Args:
      source: SQL after FROM; identifiers and literals quoted by the caller.

    Raises:
      psycopg.Error: as the server says.
    """
    select_list = ", ".join(column.sql for column in columns)
    statement = f"COPY (SELECT {select_list} FROM {source}) TO STDOUT (FORMAT binary)"
    for data, rows in _chunks(conn, statement, chunk_bytes):
        yield _decode(columns, data, rows)


def _chunks(
    conn: psycopg.Connection, statement: str, chunk_bytes: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields `(bytes, rows)` of whole rows; PostgreSQL sends each row as one message."""
    pgconn = conn.pgconn
    result = pgconn.exec_(statement.encode())
    if result.status != pq.ExecStatus.COPY_OUT:
        raise psycopg.errors.error_from_result(result, encoding="utf-8")
    parts: list[bytes] = []
    size = rows = 0
    head = _HEADER_BYTES
    while True:
        length, data = pgconn.get_copy_data(1)
        if length == 0:
            # Waiting here, not in libpq, leaves the interpreter to others meanwhile.
            select.select([pgconn.socket], [], [])
            pgconn.consume_input()
            continue
        if length < 0:
            break
        part = bytes(data[head:])
        head = 0
        if part and part != _TRAILER:
            parts.append(part)
            size += len(part)
            rows += 1
        if size >= chunk_bytes:
            yield np.frombuffer(b"".join(parts), np.uint8), rows
            parts, size, rows = [], 0, 0
    while (result := pgconn.get_result()) is not None:
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")
    if rows:
        yield np.frombuffer(b"".join(parts), np.uint8), rows


def _decode(columns: Sequence[ColumnRead], data: np.ndarray, rows: int) -> pa.RecordBatch:
    starts = np.empty((len(columns), rows), np.int64)
    lengths = np.empty((len(columns), rows), np.int32)
    if not _index(data, starts, lengths):
        raise psycopg.DataError("a row of binary COPY has another number of columns")
    arrays = [_array(column.form, data, starts[i], lengths[i]) for i, column in enumerate(columns)]
    return pa.RecordBatch.from_arrays(arrays, names=[column.name for column in columns])


def _array(form: Form, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pa.Array:
    valid = lengths >= 0
    nulls = len(valid) - int(np.count_nonzero(valid))
    bitmap = pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None
    rows = len(starts)
    if form in _WIDTHS:
        values = _fixed(data, starts, lengths, _WIDTHS[form])
        return _typed(form, values, rows, bitmap, nulls)
    if form is Form.DIGEST:
        out = _digests(data, starts, lengths)
        buffers = [bitmap, pa.py_buffer(out)]
        return pa.Array.from_buffers(pa.binary(_DIGEST_BYTES), rows, buffers, nulls)
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(np.maximum(lengths, 0), out=offsets[1:])
    if offsets[-1] >= 2**31:
        raise psycopg.DataError("one chunk holds more text than an Arrow column can")
    texts = _texts(data, starts, lengths, offsets)
    buffers = [bitmap, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(texts)]
    array = pa.Array.from_buffers(pa.utf8(), rows, buffers, nulls)
    if form is Form.DECIMAL:
        array, bad = parse_text.parse_decimal(array)
        if bad is not None and bad.any():
            raise psycopg.DataError("a numeric is not finite")
    return array


def _typed(form: Form, values: np.ndarray, rows: int, bitmap, nulls: int) -> pa.Array:
    if form is Form.BOOL:
        bits = pa.py_buffer(np.packbits(values != 0, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), rows, [bitmap, bits], nulls)
    if form is Form.DATE:
        kind, values = pa.date32(), (values + _EPOCH_DAYS).astype(np.int32)
    elif form is Form.TIME:
        kind, values = pa.timestamp("us", tz="UTC"), values + _EPOCH_US
    else:
        kind = pa.int64()
    return pa.Array.from_buffers(kind, rows, [bitmap, pa.py_buffer(values)], nulls)


@nb.njit(nogil=True, cache=True)
def _index(data, starts, lengths):
    """Finds every field; False if the bytes are not rows of so many fields."""
    fields, rows = starts.shape
    at = 0
    for row in range(rows):
        if at + 2 > len(data) or (data[at] << 8 | data[at + 1]) != fields:
            return False
        at += 2
        for field in range(fields):
            if at + 4 > len(data):
                return False
            length = np.int32(
                np.uint32(data[at]) << 24
                | np.uint32(data[at + 1]) << 16
                | np.uint32(data[at + 2]) << 8
                | np.uint32(data[at + 3])
            )
            at += 4
            starts[field, row] = at
            lengths[field, row] = length
            if length > 0:
                at += length
    return at == len(data)


@nb.njit(nogil=True, cache=True)
def _fixed(data, starts, lengths, width):
    """Big-endian signed integers of `width` bytes; 0 for a null."""
    out = np.zeros(len(starts), np.int64)
    for row in range(len(starts)):
        if lengths[row] == width:
            value = np.uint64(0)
            for k in range(width):
                value = value << np.uint64(8) | np.uint64(data[starts[row] + k])
            shift = np.int64(64 - 8 * width)
            out[row] = (np.int64(value) << shift) >> shift
    return out


@nb.njit(nogil=True, cache=True)
def _digests(data, starts, lengths):
    out = np.zeros((len(starts), 32), np.uint8)
    for row in range(len(starts)):
        if lengths[row] == 32:
            for k in range(32):
                out[row, k] = data[starts[row] + k]
    return out


@nb.njit(nogil=True, cache=True)
def _texts(data, starts, lengths, offsets):
    out = np.empty(offsets[-1], np.uint8)
    for row in range(len(starts)):
        at = offsets[row]
        for k in range(lengths[row]):
            out[at + k] = data[starts[row] + k]
    return out
