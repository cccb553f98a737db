"""Lay out the cells of a byte buffer as Arrow text columns: what stream and snapshot share."""

import dataclasses
import functools

import numba
import numpy as np
import pyarrow as pa
from numba.core import cgutils, types
from numba.extending import intrinsic

from schemas.batches import Reject
from schemas.errors import DataError
from schemas.positions import Position

NULL, UNCHANGED = -1, -2  # Lengths of cells that have no bytes.
COLUMNS_MAX = 64  # Bits of `_unchanged`.
SLACK = 16  # Bytes that must be readable behind a buffer's last cell.


class InvalidText(DataError):
    """A value is not UTF-8."""

    code = "invalid_text"


class TooManyColumns(DataError):
    """A source table has more columns than an unchanged mask has bits."""

    code = "too_many_columns"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of one source table as its changes carry them.

    Attributes:
      table: `schema.table`.
      columns: names in the order of the cells.
      key: indices of the columns that identify a row.
      identity: indices of the columns that a delete names, at least the key.

    Raises:
      TooManyColumns: more than `COLUMNS_MAX`.
    """

    table: str
    columns: tuple[str, ...]
    key: tuple[int, ...]
    identity: tuple[int, ...]

    def __post_init__(self):
        if len(self.columns) > COLUMNS_MAX:
            raise TooManyColumns(
                f"table {self.table} has {len(self.columns)} columns, {COLUMNS_MAX} can be read: "
                "give the publication a column list for it."
            )

    @functools.cached_property
    def width(self) -> int:
        """Cells of a row: the columns, then the old key."""
        return len(self.columns) + len(self.key)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Schema of the table's record batches in `RawChanges`."""
        fixed = [
            pa.field("_op", pa.uint8(), False),
            pa.field("_lsn", pa.int64(), False),
            pa.field("_seq", pa.int32(), False),
            pa.field("_commit_us", pa.int64(), False),
            pa.field("_unchanged", pa.uint64(), False),
        ]
        data = [pa.field(name, pa.utf8()) for name in self.columns]
        old = [pa.field(f"_old.{self.columns[i]}", pa.utf8()) for i in self.key]
        return pa.schema([*fixed, *data, *old])


@dataclasses.dataclass(frozen=True)
class Rows:
    """What every row has beside its cells: arrays of one length, owned by the batch made of them.

    Attributes:
      op: uint8. lsn, commit_us: int64. seq: int32.
    """

    op: np.ndarray
    lsn: np.ndarray
    seq: np.ndarray
    commit_us: np.ndarray


def record_batch(
    layout: Layout, rows: Rows, buffer: np.ndarray, start: np.ndarray, length: np.ndarray
) -> tuple[pa.RecordBatch, tuple[Reject, ...]]:
    """Returns the rows whose text is UTF-8, and the others as rejects.

    Args:
      buffer: uint8, with `SLACK` readable bytes behind the last cell.
      start: int64 (rows, layout.width), where each cell begins.
      length: int32 of the same shape: bytes of the cell, or `NULL` or `UNCHANGED`.
    """
    count, width = length.shape
    offsets = np.empty((width, count + 1), np.int32)
    valid = np.zeros((width, (count + 7) // 8), np.uint8)
    nulls = np.zeros(width, np.int64)
    unchanged = np.empty(count, np.uint64)
    _measure(length, len(layout.columns), offsets, valid, nulls, unchanged)
    sizes = offsets[:, -1].astype(np.int64)
    bases = np.concatenate(([0], np.cumsum(sizes + SLACK)))
    data = np.empty(bases[-1], np.uint8)
    _copy_cells(buffer, start, length, offsets, bases, data)
    fixed = (rows.op, rows.lsn, rows.seq, rows.commit_us, unchanged)
    arrays = [
        pa.Array.from_buffers(field.type, count, [None, pa.py_buffer(values)], 0)
        for field, values in zip(layout.schema, fixed, strict=False)
    ]
    invalid: dict[int, str] = {}
    for c in range(width):
        bitmap = pa.py_buffer(valid[c]) if nulls[c] else None
        text = data[bases[c] : bases[c] + sizes[c]]
        buffers = [bitmap, pa.py_buffer(offsets[c]), pa.py_buffer(text)]
        array = pa.Array.from_buffers(pa.utf8(), count, buffers, int(nulls[c]))
        if not _is_ascii(text):
            for row in _invalid_rows(array):
                invalid.setdefault(row, layout.schema.field(len(fixed) + c).name)
        arrays.append(array)
    batch = pa.RecordBatch.from_arrays(arrays, schema=layout.schema)
    return _refuse(layout, batch, invalid) if invalid else (batch, ())


def _invalid_rows(array: pa.StringArray) -> list[int]:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        values = array.view(pa.binary()).to_pylist()
        return [row for row, value in enumerate(values) if value is not None and not _text(value)]
    return []


def _text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse(
    layout: Layout, batch: pa.RecordBatch, invalid: dict[int, str]
) -> tuple[pa.RecordBatch, tuple[Reject, ...]]:
    """Takes the rows of `invalid` (to the column at fault) out of the batch."""
    columns = [array.view(pa.binary()) for array in batch.columns[-layout.width :]]
    names = batch.schema.names[-layout.width :]
    rejects = []
    for row, column in sorted(invalid.items()):
        unchanged = batch["_unchanged"][row].as_py()
        content = {
            name: None if value is None else value.decode(errors="backslashreplace")
            for c, (name, value) in enumerate(
                zip(names, (array[row].as_py() for array in columns), strict=True)
            )
            if c >= len(layout.columns) or not unchanged >> c & 1
        }
        rejects.append(
            Reject(
                src_table=layout.table,
                position=Position(batch["_lsn"][row].as_py(), batch["_seq"][row].as_py()),
                op=batch["_op"][row].as_py(),
                commit_us=batch["_commit_us"][row].as_py(),
                reason=InvalidText.code,
                column=column,
                row=content,
            )
        )
    keep = np.ones(batch.num_rows, bool)
    keep[list(invalid)] = False
    return batch.filter(pa.array(keep)), tuple(rejects)


@intrinsic
def _copy_bytes(typing_context, target, to, source, at, count):
    """Copies memory without bounds checks; a constant `count` becomes a pair of moves."""

    def generate(context, builder, signature, args):
        target_type, _, source_type, _, _ = signature.args
        target_data = context.make_array(target_type)(context, builder, args[0]).data
        source_data = context.make_array(source_type)(context, builder, args[2]).data
        target_data = builder.gep(target_data, [args[1]])
        source_data = builder.gep(source_data, [args[3]])
        cgutils.raw_memcpy(builder, target_data, source_data, args[4], 1)
        return context.get_dummy_value()

    return types.void(target, to, source, at, count), generate


@numba.njit(nogil=True, cache=True)
def _measure(length, columns, offsets, valid, nulls, unchanged):
    """Fills offsets, validity bits, null counts and the unchanged masks from the lengths."""
    count, width = length.shape
    offsets[:, 0] = 0
    for row in range(count):
        mask = np.uint64(0)
        for c in range(width):
            size = length[row, c]
            if size >= 0:
                valid[c, row >> 3] |= np.uint8(1 << (row & 7))
                offsets[c, row + 1] = offsets[c, row] + size
            else:
                nulls[c] += 1
                offsets[c, row + 1] = offsets[c, row]
                if size == UNCHANGED and c < columns:
                    mask |= np.uint64(1) << np.uint64(c)
        unchanged[row] = mask


@numba.njit(nogil=True, cache=True)
def _copy_cells(buffer, start, length, offsets, bases, data):
    """Copies every cell to its column's part of `data`, which ends with `SLACK` spare bytes.

    Rows are the outer loop, since the source is read once that way; a short cell is copied
    as `SLACK` bytes, and the excess is overwritten by the next one.
    """
    count, width = length.shape
    for row in range(count):
        for c in range(width):
            size = np.int64(length[row, c])
            if size <= 0:
                continue
            to = bases[c] + np.int64(offsets[c, row])
            if size <= SLACK:
                _copy_bytes(data, to, buffer, start[row, c], np.int64(SLACK))
            else:
                _copy_bytes(data, to, buffer, start[row, c], size)


@numba.njit(nogil=True, cache=True)
def _is_ascii(text):
    bits = np.uint8(0)
    for i in range(len(text)):
        bits |= text[i]
    return bits < 128
