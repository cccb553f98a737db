"""Compact rows of one table to one per key: the last version, its unchanged columns filled in."""

import dataclasses
from collections.abc import Callable

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.tables import Table


@dataclasses.dataclass(frozen=True)
class Compacted:
    """One row per record_id, in byte order of record_id: every writer locks in one order.

    Attributes:
      rows: the last version of each key. `_unchanged` has the bits of what the batch does not
        know; a delete's columns count as unchanged, so that its tombstone keeps what was there.
        `_digest` is null where columns were filled in or are still unknown.
      base_id: record_id of the stored row with the unknown values: the row's own, or what it
        was before its key changed. Null where nothing is unknown.
      fresh: bool[n], the first change of the key in the batch created it or gave it a new key: the
        store is expected not to have it.
      superseded: rows that a later one in the batch replaced.
      duplicates: rows that stand at the same position as another of their key.
    """

    rows: pa.RecordBatch
    base_id: pa.Array
    fresh: np.ndarray
    superseded: int
    duplicates: int

    def part(self, places: np.ndarray) -> "Compacted":
        """Returns some of the rows, in order; what was left out on the way stays with the whole."""
        chosen = pa.array(places)
        rows, base_id = self.rows.take(chosen), self.base_id.take(chosen)
        return Compacted(rows, base_id, self.fresh[places], 0, 0)


def every_column(table: Table) -> int:
    """Returns the `_unchanged` mask with the bit of every column."""
    return (1 << len(table.columns)) - 1


def in_position_order(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Returns `rows` by (`_lsn`, `_seq`), stably; itself if they stand so."""
    lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
    later = (lsn[1:] > lsn[:-1]) | ((lsn[1:] == lsn[:-1]) & (seq[1:] >= seq[:-1]))
    return rows if later.all() else rows.take(pa.array(np.lexsort((seq, lsn))))


def compact(table: Table, rows: pa.RecordBatch) -> Compacted:
    """Returns the last version of each key of `rows`, in whatever order they stand.

    An unchanged column takes its value from the row before it of the same key, or, where
    `_prev_id` tells that the key changed, from the last row of the old key.
    """
    rows = in_position_order(rows)
    ops = rows["_op"].to_numpy()
    masks = np.where(
        ops == Op.DELETE, np.uint64(every_column(table)), rows["_unchanged"].to_numpy()
    )
    rekeyed = rows["_prev_id"].is_valid().to_numpy(zero_copy_only=False)
    fresh = (ops == Op.INSERT) | (ops == Op.SNAPSHOT) | rekeyed
    if not masks.any() and _rising(rows["record_id"], pc.less):
        return Compacted(rows, pa.nulls(rows.num_rows, pa.utf8()), fresh, 0, 0)
    keys = rows["record_id"].dictionary_encode()
    codes = keys.indices.to_numpy()
    distinct = len(keys.dictionary) == rows.num_rows
    if distinct and not masks.any():
        order = _key_order(rows["record_id"])
        if order is not None:
            rows, fresh = rows.take(order), fresh[order.to_numpy()]
        return Compacted(rows, pa.nulls(rows.num_rows, pa.utf8()), fresh, 0, 0)
    # An old key that the batch has no row of is -2: its values are in the store.
    prev = pc.index_in(rows["_prev_id"], keys.dictionary, skip_nulls=True).fill_null(-2)
    prev = np.where(rekeyed, prev.to_numpy(zero_copy_only=False), -1)
    take = np.broadcast_to(np.arange(rows.num_rows), (len(table.columns), rows.num_rows)).copy()
    left, base = np.empty_like(masks), np.empty(rows.num_rows, np.int64)
    last, first = (np.full(len(keys.dictionary), -1, np.int64) for _ in range(2))
    places = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
    repeats = _resolve(codes, prev, masks, *places, take, left, base, last, first)
    order = _key_order(keys.dictionary)
    if order is not None:
        last, first = last[order.to_numpy()], first[order.to_numpy()]
    return Compacted(
        _filled(table, rows, masks, left, take, last),
        _base_ids(rows, left, base, last),
        fresh[first],
        rows.num_rows - len(last) - repeats,
        repeats,
    )


def _key_order(ids: pa.Array) -> pa.Array | None:
    """Indices that sort `ids` bytewise, None if they are sorted."""
    return None if _rising(ids, pc.less_equal) else pc.sort_indices(ids)


def _rising(ids: pa.Array, before: Callable[[pa.Array, pa.Array], pa.Array]) -> bool:
    return len(ids) < 2 or pc.all(before(ids[:-1], ids[1:])).as_py()


def _filled(table: Table, rows, masks, left, take, last) -> pa.RecordBatch:
    """The rows `last` with every column taken from where its value is known."""
    out = rows.take(pa.array(last))
    touched = np.flatnonzero(masks[last])
    if not len(touched):
        return out
    columns, names = list(out.columns), out.schema.names
    any_bit = np.bitwise_or.reduce(masks[last])
    for i, column in enumerate(table.columns):
        if int(any_bit) >> i & 1:
            place = names.index(column.name)
            columns[place] = rows.column(place).take(pa.array(take[i][last]))
    unknown = left[last]
    columns[names.index("_unchanged")] = pa.array(unknown)
    digest = names.index("_digest")
    whole = pa.array(masks[last] == 0)
    columns[digest] = pc.if_else(whole, columns[digest], pa.scalar(None, columns[digest].type))
    return pa.record_batch(columns, schema=out.schema)


def _base_ids(rows, left, base, last) -> pa.Array:
    """Whose stored row has the unknown values of `last`: see `Compacted.base_id`."""
    roots = pa.array(base[last])
    previous = rows["_prev_id"].take(roots)
    deleted = pa.array(rows["_op"].to_numpy()[base[last]] == Op.DELETE)
    own = rows["record_id"].take(roots)
    ids = pc.if_else(deleted, own, pc.coalesce(previous, own))
    return pc.if_else(pa.array(left[last] != 0), ids, pa.scalar(None, pa.utf8()))


@nb.njit(nogil=True, cache=True)
def _resolve(codes, prev, masks, lsn, seq, take, left, base, last, first):
    """Points every unknown value at the row that has it; returns the repeated positions.

    take[c, i] is the row with column c's value as of row i, left[i] the bits that no row
    has, base[i] the earliest row that i depends on.
    """
    repeats = 0
    for i in range(len(codes)):
        key = codes[i]
        before = last[key]
        left[i] = masks[i]
        base[i] = i
        if before >= 0 and lsn[before] == lsn[i] and seq[before] == seq[i]:
            repeats += 1
        if masks[i]:
            parent = before
            if prev[i] == -2:
                parent = -1
            elif prev[i] >= 0:
                parent = last[prev[i]]
            if parent >= 0:
                base[i] = base[parent]
                left[i] = masks[i] & left[parent]
                for c in range(take.shape[0]):
                    if (masks[i] >> np.uint64(c)) & np.uint64(1):
                        take[c, i] = take[c, parent]
        last[key] = i
        if first[key] < 0:
            first[key] = i
    return repeats
