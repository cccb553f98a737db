"""Digest rows canonically and sum the digests of sets, equal for equal content at both ends.

The encoding of a row, which any database's client can repeat (all integers little-endian):

    0x01                          version of this encoding
    u32 length, bytes             canonical table name, UTF-8
    then for record_id (ordinal 0) and every column (ordinal 1 .. in declared order) not null:
    u8 ordinal, u8 kind, value    kind 1 text: u32 length, UTF-8 bytes
                                  kind 2 int: i64
                                  kind 3 decimal: u32 length, canonical ASCII text
                                  kind 4 bool: u8
                                  kind 5 date: i32 days since 1970-01-01
                                  kind 6 time: i64 microseconds since 1970-01-01 UTC

The ordinal makes a null distinct by its absence, and a column that is appended later leaves the
digest of every row alone in which it is null. The campus is not part of it: a row is digested
where it stands, and campuses are compared with themselves.
"""

import numba
import numpy as np
import pyarrow as pa

from schemas.batches import ManifestEntry, Op
from schemas.tables import ARROW_TYPES, Kind, Table
from transforms.hash_rows import DIGEST_BYTES, hash_rows
from transforms.memory import (
    copy,
    load_i32,
    load_i64,
    load_u8,
    store_i32,
    store_i64,
    store_u8,
    store_u16,
)
from transforms.parse_text import text_buffers

EMPTY_SET = bytes(DIGEST_BYTES)
_VERSION = 1
_KINDS = {kind: i for i, kind in enumerate(Kind, 1)}
_FIXED_BYTES = {Kind.INT: 8, Kind.BOOL: 1, Kind.DATE: 4, Kind.TIME: 8}
_WORDS = DIGEST_BYTES // 8
_jit = numba.njit(nogil=True, cache=True)


def digest_rows(table: Table, batch: pa.RecordBatch, algorithm: str = "sha256") -> pa.Array:
    """Returns the digest of every row's content (fixed binary[32]).

    Null for a delete and where a column is unchanged: the whole content is not known there.

    Args:
      table: whose columns, after `record_id`, are covered. Other columns of `batch` are not.
      batch: canonical Arrow types, decimals as canonical text; a change batch, or rows read
        back from a store or source, which have no `_op` and `_unchanged`.
      algorithm: one of `hash_rows.ALGORITHMS`.
    """
    whole = _whole(batch)
    digests = hash_rows(*encode_rows(table, batch, whole), algorithm)
    if whole is None:
        buffers = [None, pa.py_buffer(digests)]
        return pa.Array.from_buffers(pa.binary(DIGEST_BYTES), batch.num_rows, buffers)
    out = np.zeros((batch.num_rows, DIGEST_BYTES), np.uint8)
    out[whole] = digests
    buffers = [pa.py_buffer(np.packbits(whole, bitorder="little")), pa.py_buffer(out)]
    return pa.Array.from_buffers(pa.binary(DIGEST_BYTES), batch.num_rows, buffers)


def with_digests(table: Table, batch: pa.RecordBatch, algorithm: str = "sha256") -> pa.RecordBatch:
    """Returns a change batch with its `_digest` column filled."""
    place = batch.schema.get_field_index("_digest")
    digests = digest_rows(table, batch, algorithm)
    return batch.set_column(place, batch.schema.field(place), digests)


def lacks_digests(batch: pa.RecordBatch) -> bool:
    """Whether a row of a change batch has no digest though its whole content is there."""
    missing = batch.column("_digest").null_count
    if not missing:
        return False
    whole = _whole(batch)
    return whole is None or missing > batch.num_rows - np.count_nonzero(whole)


def encode_rows(
    table: Table, batch: pa.RecordBatch, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(data uint8[], offsets int64[n+1])`: the encoding above, of the rows in the mask."""
    columns = _Columns()
    columns.add(batch.column("record_id"), Kind.TEXT)
    for column in table.columns:
        columns.add(batch.column(column.name), column.kind)
    name = table.name.encode()
    prefix = bytes([_VERSION]) + len(name).to_bytes(4, "little") + name
    chosen = np.arange(batch.num_rows) if rows is None else np.flatnonzero(rows)
    kinds, validity, values, offsets = columns.pointers()
    ends = np.empty(len(chosen) + 1, np.int64)
    _measure_kernel(chosen, len(prefix), kinds, validity, offsets, ends)
    data = np.empty(ends[-1], np.uint8)
    _encode_kernel(
        chosen, np.frombuffer(prefix, np.uint8), kinds, validity, values, offsets, ends, data
    )
    return data, ends


def digest_set(digests: pa.Array) -> tuple[int, bytes]:
    """Returns `(rows, sum)` of a set of rows, as `ManifestEntry` defines it.

    Independent of order; a null counts as a row and adds nothing.
    """
    return len(digests), _words(digests).sum(axis=0, dtype=np.uint64).astype("<u8").tobytes()


def add_sets(first: bytes, second: bytes) -> bytes:
    """Returns the sum of two disjoint sets' sums."""
    a, b = (np.frombuffer(part, "<u8") for part in (first, second))
    return (a + b).astype("<u8").tobytes()


def manifest(table: Table, batch: pa.RecordBatch, window_us: int) -> tuple[ManifestEntry, ...]:
    """Returns an entry for every window `[k * window_us, (k + 1) * window_us)` of commit time.

    `batch` has `_commit_us` and filled digests. Ordered by window; none for an empty batch.
    """
    if not batch.num_rows:
        return ()
    windows = batch.column("_commit_us").to_numpy() // window_us
    words = _words(batch.column("_digest"))
    # Commits come nearly in order, so runs of one window are summed first and are few.
    starts = np.flatnonzero(np.diff(windows, prepend=windows[0] - 1))
    sums = np.add.reduceat(words, starts, axis=0, dtype=np.uint64)
    counts = np.diff(starts, append=len(windows))
    unique, run = np.unique(windows[starts], return_inverse=True)
    total = np.zeros((len(unique), _WORDS), np.uint64)
    count = np.zeros(len(unique), np.int64)
    np.add.at(total, run, sums)
    np.add.at(count, run, counts)
    return tuple(
        ManifestEntry(table.name, int(window) * window_us, int(n), row.astype("<u8").tobytes())
        for window, n, row in zip(unique, count, total, strict=True)
    )


def _words(digests: pa.Array) -> np.ndarray:
    """uint64[n, 4]; zeros for a null."""
    n = len(digests)
    if not n:
        return np.zeros((0, _WORDS), np.uint64)
    data = np.frombuffer(digests.buffers()[1], np.uint8)
    data = data[digests.offset * DIGEST_BYTES : (digests.offset + n) * DIGEST_BYTES]
    words = data.view("<u8").reshape(n, _WORDS)
    if not digests.null_count:
        return words
    return np.where(digests.is_valid().to_numpy(zero_copy_only=False)[:, None], words, 0)


def _whole(batch: pa.RecordBatch) -> np.ndarray | None:
    """bool[n] of rows whose whole content is there, None if that is every row."""
    if "_op" not in batch.schema.names:
        return None
    ops = batch.column("_op").to_numpy()
    unchanged = batch.column("_unchanged").to_numpy()
    whole = (ops != Op.DELETE) & (unchanged == 0)
    return None if whole.all() else whole


class _Columns:
    """Addresses of the columns' buffers for the kernel, and what keeps them alive meanwhile."""

    def __init__(self):
        self._alive = []
        self._kinds, self._validity, self._values, self._offsets = [], [], [], []

    def add(self, array: pa.Array, kind: Kind) -> None:
        if array.type != ARROW_TYPES[kind]:
            array = array.cast(ARROW_TYPES[kind])
        valid = offsets = np.empty(0, np.uint8)
        if kind in _FIXED_BYTES:
            if array.null_count:
                valid = array.is_valid().to_numpy(zero_copy_only=False)
            if kind is Kind.BOOL:
                values = array.fill_null(False).to_numpy(zero_copy_only=False).view(np.uint8)
            else:
                width = np.int32 if kind is Kind.DATE else np.int64
                values = np.frombuffer(array.buffers()[1] or b"", width)[array.offset :]
        else:
            offsets, values, valid = text_buffers(array)
        self._alive.append((array, valid, values, offsets))
        self._kinds.append(_KINDS[kind])
        self._validity.append(valid.ctypes.data if len(valid) else 0)
        self._values.append(values.ctypes.data)
        self._offsets.append(offsets.ctypes.data if len(offsets) else 0)

    def pointers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.array(self._kinds, np.uint8),
            np.array(self._validity, np.int64),
            np.array(self._values, np.int64),
            np.array(self._offsets, np.int64),
        )


@_jit
def _measure_kernel(rows, prefix, kinds, validity, offsets, ends):
    ends[0] = 0
    for k in range(len(rows)):
        i = rows[k]
        size = prefix
        for c in range(len(kinds)):
            if validity[c] and not load_u8(validity[c] + i):
                continue
            kind = kinds[c]
            if kind == 1 or kind == 3:
                size += 6 + load_i32(offsets[c] + 4 * i + 4) - load_i32(offsets[c] + 4 * i)
            elif kind == 2 or kind == 6:
                size += 10
            elif kind == 5:
                size += 6
            else:
                size += 3
        ends[k + 1] = ends[k] + size


@_jit
def _encode_kernel(rows, prefix, kinds, validity, values, offsets, ends, out):
    base = np.int64(out.ctypes.data)
    for k in range(len(rows)):
        i, o = rows[k], base + ends[k]
        copy(o, np.int64(prefix.ctypes.data), len(prefix))
        o += len(prefix)
        for c in range(len(kinds)):
            if validity[c] and not load_u8(validity[c] + i):
                continue
            kind = kinds[c]
            store_u16(o, np.uint16(c | (kind << 8)))
            o += 2
            if kind == 1 or kind == 3:
                start = np.int64(load_i32(offsets[c] + 4 * i))
                size = np.int64(load_i32(offsets[c] + 4 * i + 4)) - start
                store_i32(o, np.int32(size))
                copy(o + 4, values[c] + start, size)
                o += 4 + size
            elif kind == 2 or kind == 6:
                store_i64(o, load_i64(values[c] + 8 * i))
                o += 8
            elif kind == 5:
                store_i32(o, load_i32(values[c] + 4 * i))
                o += 4
            else:
                store_u8(o, load_u8(values[c] + i))
                o += 1
