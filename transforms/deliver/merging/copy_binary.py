"""Encode Arrow columns as PostgreSQL's binary COPY rows, column by column, without the GIL."""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import numba as nb
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_TRAILER = b"\xff\xff"
_EPOCH_US = 946_684_800_000_000  # 2000-01-01 in µs since 1970, PostgreSQL's zero.
_EPOCH_DAYS = 10_957
_NO_MASK = np.empty(0, np.bool_)
_NUMERIC_GROUPS_MAX = 16_000  # Of four digits: far beyond any measurement, well inside int16.


class Wire(enum.Enum):
    """PostgreSQL's binary form of a column."""

    BYTES = "text, varchar, bytea, char"  # From utf8, binary, binary(n) or a dictionary of utf8.
    INT8 = "bigint"
    INT4 = "integer"
    BOOL = "boolean"
    DATE = "date"
    TIMESTAMPTZ = "timestamptz"
    NUMERIC = "numeric"  # From canonical decimal text; anything else is refused by the server.
    CONSTANT = "one value in every row"  # From its binary form (bytes) or None.


@dataclasses.dataclass(frozen=True)
class WireColumn:
    """One column to encode: `values` is an Arrow or NumPy array, or bytes for a constant."""

    wire: Wire
    values: pa.Array | np.ndarray | bytes | None


@dataclasses.dataclass(frozen=True)
class CopyRows:
    """Encoded rows: row i is `data[offsets[i]:offsets[i + 1]]`; no header, no trailer."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def encode_rows(columns: Sequence[WireColumn], rows: int) -> CopyRows:
    """Returns `rows` rows of `columns`, each column as long, in the binary COPY format.

    Deterministic. A decimal that is no canonical decimal text is encoded as a numeric that
    PostgreSQL refuses (22P03), a time out of its range as one that it refuses (22008): a bad
    value costs its row, never the batch.
    """
    plans = [_plan(column, rows) for column in columns]
    sizes = np.full(rows, 2, np.int64)
    for plan in plans:
        plan.measure(sizes)
    offsets = np.empty(rows + 1, np.int64)
    offsets[0] = 0
    np.cumsum(sizes, out=offsets[1:])
    data = np.empty(int(offsets[-1]), np.uint8)
    cursor = offsets[:-1].copy()
    _put_counts(data, cursor, len(columns))
    for plan in plans:
        plan.write(data, cursor)
    return CopyRows(data, offsets)


def copy_rows(cursor: psycopg.Cursor, statement: bytes, chunks: Iterable[CopyRows]) -> None:
    """Runs `statement` (`COPY .. FROM STDIN (FORMAT binary)`) over the rows of all chunks.

    A chunk is asked for when the last has been handed to the socket: while the server parses
    one, the next is encoded.

    Raises:
      psycopg.Error: as the server says; the transaction is then to be rolled back.
    """
    with cursor.copy(statement) as copy:
        copy.write(_HEADER)
        for chunk in chunks:
            copy.write(memoryview(chunk.data))
        copy.write(_TRAILER)


def encode_text_array(values: pa.Array) -> bytes:
    """Returns PostgreSQL's binary `text[]` of a utf8 array without nulls."""
    rows = len(values)
    head = np.array([1, 0, 25, rows, 1], ">i4").tobytes()
    plan = _plan(WireColumn(Wire.BYTES, values), rows)
    sizes = np.zeros(rows, np.int64)
    plan.measure(sizes)
    ends = np.cumsum(sizes)
    data = np.empty(int(ends[-1]) if rows else 0, np.uint8)
    plan.write(data, ends - sizes)
    return head + data.tobytes()


@dataclasses.dataclass(frozen=True)
class _Bytes:
    offsets: np.ndarray
    data: np.ndarray
    valid: np.ndarray

    def measure(self, sizes: np.ndarray) -> None:
        _measure_bytes(sizes, self.offsets, self.valid)

    def write(self, out: np.ndarray, cursor: np.ndarray) -> None:
        _write_bytes(out, cursor, self.offsets, self.data, self.valid)


@dataclasses.dataclass(frozen=True)
class _Coded:
    """Bytes through a dictionary: a handful of distinct values, never decoded per row."""

    codes: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    valid: np.ndarray

    def measure(self, sizes: np.ndarray) -> None:
        _measure_coded(sizes, self.codes, self.offsets, self.valid)

    def write(self, out: np.ndarray, cursor: np.ndarray) -> None:
        _write_coded(out, cursor, self.codes, self.offsets, self.data, self.valid)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    values: np.ndarray  # int64
    width: int
    valid: np.ndarray

    def measure(self, sizes: np.ndarray) -> None:
        _measure_fixed(sizes, self.width, self.valid)

    def write(self, out: np.ndarray, cursor: np.ndarray) -> None:
        _write_fixed(out, cursor, self.values, self.width, self.valid)


@dataclasses.dataclass(frozen=True)
class _Numeric:
    offsets: np.ndarray
    data: np.ndarray
    valid: np.ndarray

    def measure(self, sizes: np.ndarray) -> None:
        _measure_numeric(sizes, self.offsets, self.data, self.valid)

    def write(self, out: np.ndarray, cursor: np.ndarray) -> None:
        _write_numeric(out, cursor, self.offsets, self.data, self.valid)


@dataclasses.dataclass(frozen=True)
class _Constant:
    field: np.ndarray  # Length and content, as on the wire.

    def measure(self, sizes: np.ndarray) -> None:
        sizes += len(self.field)

    def write(self, out: np.ndarray, cursor: np.ndarray) -> None:
        _write_constant(out, cursor, self.field)


def _plan(column: WireColumn, rows: int):
    values, wire = column.values, column.wire
    if wire is Wire.CONSTANT:
        content = b"" if values is None else values
        length = -1 if values is None else len(values)
        return _Constant(np.frombuffer(length.to_bytes(4, "big", signed=True) + content, np.uint8))
    if isinstance(values, np.ndarray):
        values = pa.array(values)
    if len(values) != rows:
        raise ValueError(f"a column of {len(values)} rows among {rows}")
    valid = _valid(values)
    if wire is Wire.BYTES and pa.types.is_dictionary(values.type):
        codes = values.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        offsets, data = _buffers(values.dictionary)
        return _Coded(codes, offsets, data, valid)
    if wire in (Wire.BYTES, Wire.NUMERIC):
        offsets, data = _buffers(values)
        return (_Bytes if wire is Wire.BYTES else _Numeric)(offsets, data, valid)
    return _fixed(wire, values, valid)


def _fixed(wire: Wire, values: pa.Array, valid: np.ndarray) -> _Fixed:
    if wire is Wire.BOOL:
        return _Fixed(_numpy(pc.cast(values, pa.int8()), 0).astype(np.int64), 1, valid)
    if wire is Wire.DATE:
        days = _numpy(values.cast(pa.int32()), 0).astype(np.int64) - _EPOCH_DAYS
        # PostgreSQL's ends of int32 mean infinity; a date beyond is written as one it refuses.
        return _Fixed(np.maximum(days, -(2**31) + 1), 4, valid)
    whole = _numpy(values if pa.types.is_int64(values.type) else values.cast(pa.int64()), 0)
    if wire is Wire.TIMESTAMPTZ:
        # Shifted, the range of int64 would wrap at its low end: held at a time it refuses.
        whole = np.maximum(whole, np.int64(-(2**63) + 1 + _EPOCH_US)) - _EPOCH_US
    return _Fixed(whole.astype(np.int64, copy=False), 8 if wire is not Wire.INT4 else 4, valid)


def _numpy(values: pa.Array, fill: int) -> np.ndarray:
    if values.null_count:
        values = values.fill_null(fill)
    return values.to_numpy(zero_copy_only=False)


def _valid(values: pa.Array) -> np.ndarray:
    """A boolean mask, or an empty one where every value is valid."""
    if not values.null_count:
        return _NO_MASK
    return values.is_valid().to_numpy(zero_copy_only=False)


def _buffers(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """int64 offsets[n + 1] and the bytes they point into."""
    n = len(values)
    if pa.types.is_fixed_size_binary(values.type):
        width = values.type.byte_width
        buffer = values.buffers()[1]
        offsets = np.arange(values.offset, values.offset + n + 1, dtype=np.int64) * width
    else:
        values = values if values.type in (pa.utf8(), pa.binary()) else values.cast(pa.binary())
        start = values.buffers()[1]
        if start is None or n == 0:
            return np.zeros(n + 1, np.int64), np.empty(0, np.uint8)
        raw = np.frombuffer(start, np.int32)[values.offset : values.offset + n + 1]
        offsets, buffer = raw.astype(np.int64), values.buffers()[2]
    return offsets, np.empty(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)


@nb.njit(nogil=True, cache=True, inline="always")
def _put(out, at, value, width):
    for i in range(width):
        out[at + i] = (value >> (8 * (width - 1 - i))) & 0xFF


@nb.njit(nogil=True, cache=True)
def _put_counts(out, cursor, count):
    for i in range(len(cursor)):
        _put(out, cursor[i], count, 2)
        cursor[i] += 2


@nb.njit(nogil=True, cache=True)
def _measure_bytes(sizes, offsets, valid):
    masked = len(valid) > 0
    for i in range(len(sizes)):
        sizes[i] += 4
        if not masked or valid[i]:
            sizes[i] += offsets[i + 1] - offsets[i]


@nb.njit(nogil=True, cache=True, inline="always")
def _put_field(out, at, data, start, length):
    _put(out, at, length, 4)
    at += 4
    for k in range(length):
        out[at + k] = data[start + k]
    return at + length


@nb.njit(nogil=True, cache=True)
def _write_bytes(out, cursor, offsets, data, valid):
    masked = len(valid) > 0
    for i in range(len(cursor)):
        if masked and not valid[i]:
            _put(out, cursor[i], -1, 4)
            cursor[i] += 4
        else:
            length = offsets[i + 1] - offsets[i]
            cursor[i] = _put_field(out, cursor[i], data, offsets[i], length)


@nb.njit(nogil=True, cache=True)
def _measure_coded(sizes, codes, offsets, valid):
    masked = len(valid) > 0
    for i in range(len(sizes)):
        sizes[i] += 4
        if not masked or valid[i]:
            sizes[i] += offsets[codes[i] + 1] - offsets[codes[i]]


@nb.njit(nogil=True, cache=True)
def _write_coded(out, cursor, codes, offsets, data, valid):
    masked = len(valid) > 0
    for i in range(len(cursor)):
        if masked and not valid[i]:
            _put(out, cursor[i], -1, 4)
            cursor[i] += 4
        else:
            c = codes[i]
            length = offsets[c + 1] - offsets[c]
            cursor[i] = _put_field(out, cursor[i], data, offsets[c], length)


@nb.njit(nogil=True, cache=True)
def _measure_fixed(sizes, width, valid):
    masked = len(valid) > 0
    for i in range(len(sizes)):
        sizes[i] += 4
        if not masked or valid[i]:
            sizes[i] += width


@nb.njit(nogil=True, cache=True)
def _write_fixed(out, cursor, values, width, valid):
    masked = len(valid) > 0
    for i in range(len(cursor)):
        at = cursor[i]
        if masked and not valid[i]:
            _put(out, at, -1, 4)
            cursor[i] = at + 4
        else:
            _put(out, at, width, 4)
            _put(out, at + 4, values[i], width)
            cursor[i] = at + 4 + width


@nb.njit(nogil=True, cache=True)
def _write_constant(out, cursor, field):
    for i in range(len(cursor)):
        at = cursor[i]
        for k in range(len(field)):
            out[at + k] = field[k]
        cursor[i] = at + len(field)


@nb.njit(nogil=True, cache=True)
def _decimal_shape(data, start, end):
    """(first integer digit, integer digits, first fraction digit, fraction digits, ok)."""
    p = start
    if p < end and data[p] == 45:
        p += 1
    first = p
    while p < end and 48 <= data[p] <= 57:
        p += 1
    whole = p - first
    fraction_at = p
    fraction = 0
    if p < end and data[p] == 46:
        p += 1
        fraction_at = p
        while p < end and 48 <= data[p] <= 57:
            p += 1
        fraction = p - fraction_at
        if fraction == 0:
            return first, whole, fraction_at, fraction, False
    groups = (whole + 3) // 4 + (fraction + 3) // 4
    ok = p == end and whole > 0 and groups <= _NUMERIC_GROUPS_MAX
    return first, whole, fraction_at, fraction, ok


@nb.njit(nogil=True, cache=True)
def _measure_numeric(sizes, offsets, data, valid):
    masked = len(valid) > 0
    for i in range(len(sizes)):
        sizes[i] += 4
        if masked and not valid[i]:
            continue
        _, whole, _, fraction, ok = _decimal_shape(data, offsets[i], offsets[i + 1])
        sizes[i] += 8 + 2 * ((whole + 3) // 4 + (fraction + 3) // 4) if ok else 10


@nb.njit(nogil=True, cache=True)
def _write_numeric(out, cursor, offsets, data, valid):
    masked = len(valid) > 0
    for i in range(len(cursor)):
        at = cursor[i]
        if masked and not valid[i]:
            _put(out, at, -1, 4)
            cursor[i] = at + 4
            continue
        shape = _decimal_shape(data, offsets[i], offsets[i + 1])
        first, whole, fraction_at, fraction, ok = shape
        if not ok:
            # One group of 10000, which no numeric has: the server refuses the row.
            _put(out, at, 10, 4)
            _put(out, at + 4, 1, 2)
            _put(out, at + 6, 0, 2)
            _put(out, at + 8, 0, 2)
            _put(out, at + 10, 0, 2)
            _put(out, at + 12, 10000, 2)
            cursor[i] = at + 14
            continue
        groups_whole = (whole + 3) // 4
        groups = groups_whole + (fraction + 3) // 4
        _put(out, at, 8 + 2 * groups, 4)
        _put(out, at + 4, groups, 2)
        _put(out, at + 6, groups_whole - 1, 2)
        _put(out, at + 8, 0x4000 if data[offsets[i]] == 45 else 0, 2)
        _put(out, at + 10, fraction, 2)
        at += 12
        # The integer part is aligned at the point: its first group may be short.
        group = 0
        for k in range(whole):
            group = group * 10 + (data[first + k] - 48)
            if (whole - k - 1) % 4 == 0:
                _put(out, at, group, 2)
                at += 2
                group = 0
        for g in range(groups - groups_whole):
            group = 0
            for k in range(4 * g, 4 * g + 4):
                group = group * 10 + (data[fraction_at + k] - 48 if k < fraction else 0)
            _put(out, at, group, 2)
            at += 2
        cursor[i] = at
