"""Rows of a merge made whole: values that only the store knows filled in, digests made."""

import dataclasses

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.tables import ARROW_TYPES, Table
from transforms.checksum import digest_rows
from transforms.deliver.merging.compact import Compacted, every_column
from transforms.deliver.merging.merge_sql import FETCHED_TYPES, merge_sql
from transforms.deliver.merging.merge_wire import TextArray


@dataclasses.dataclass(frozen=True)
class Ready:
    """Rows to write; `places` are their rows in the compacted batch."""

    rows: pa.RecordBatch
    fresh: np.ndarray
    places: np.ndarray

    def part(self, lo: int, hi: int) -> "Ready":
        return Ready(self.rows.slice(lo, hi - lo), self.fresh[lo:hi], self.places[lo:hi])


@dataclasses.dataclass(frozen=True)
class Whole:
    """`ready` to be written; `orphans` are places in the compacted batch that have no base."""

    ready: Ready
    orphans: np.ndarray


def made_whole(
    conn: psycopg.Connection | None, table: Table, campus: str, compacted: Compacted
) -> Whole:
    """Digests rows that were filled in; fetches what rows with unknown values stand on.

    A base is locked until the transaction's end, so that it is still the base then. Without a
    connection every value must be known, but those of deleted rows.
    """
    rows = compacted.rows
    masks = rows["_unchanged"].to_numpy()
    bare = is_bare(table, rows)
    needs = (masks != 0) & ~bare
    places = np.arange(rows.num_rows)
    orphaned = np.empty(0, np.int64)
    whole = None
    if needs.any():
        whole, rebased, orphans = _filled(conn, table, campus, compacted, needs)
        orphaned = np.flatnonzero(orphans)
        # Only a changed key has its values written anew: they stand in another row.
        rows = _choose(rebased, whole, rows, table)
        keep = ~orphans
        places, bare = places[keep], bare[keep]
        rows, whole = rows.filter(pa.array(keep)), whole.filter(pa.array(keep))
    digest = rows["_digest"]
    undigested = digest.is_null().to_numpy(zero_copy_only=False) & ~bare
    if undigested.any():
        digest = _digested(table, rows if whole is None else whole, digest, undigested)
        at = rows.schema.get_field_index("_digest")
        rows = rows.set_column(at, rows.schema.field(at), digest)
    return Whole(Ready(rows, compacted.fresh[places], places), orphaned)


def is_bare(table: Table, rows: pa.RecordBatch) -> np.ndarray:
    """Returns bool[n]: tombstones of which nothing is known; the store keeps what it has."""
    unknown = rows["_unchanged"].to_numpy() == np.uint64(every_column(table))
    return unknown & (rows["_op"].to_numpy() == Op.DELETE)


def _filled(
    conn: psycopg.Connection, table: Table, campus: str, compacted: Compacted, needs: np.ndarray
):
    """(rows with the store's values filled in, rows whose key changed, rows without a base)."""
    rows, wanted = compacted.rows, np.flatnonzero(needs)
    base_ids = compacted.base_id.take(pa.array(wanted))
    arguments = (TextArray(base_ids), campus)
    found = conn.execute(merge_sql(table).base, arguments).fetchall()
    masks = rows["_unchanged"].to_numpy().copy()
    lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
    own = pc.equal(compacted.base_id, rows["record_id"]).fill_null(True)
    rebased = needs & ~own.to_numpy(zero_copy_only=False)
    source = np.full(rows.num_rows, -1, np.int64)
    for k, row in enumerate(found):
        i = wanted[row[0]]
        # A base that is newer is none, unless the guard will set the row aside anyway.
        if not rebased[i] or row[1:3] < (lsn[i], seq[i]):
            source[i] = k
    columns = list(rows.columns)
    for bit, column in enumerate(table.columns):
        lacks = needs & (masks >> np.uint64(bit) & np.uint64(1) == 1) & (source >= 0)
        if lacks.any():
            stored = pa.array([row[3 + bit] for row in found], FETCHED_TYPES[column.kind])
            stored = stored.cast(ARROW_TYPES[column.kind])
            stored = stored.take(pa.array(source, mask=source < 0))
            at = rows.schema.get_field_index(column.name)
            columns[at] = pc.if_else(pa.array(lacks), stored, columns[at])
    # A deleted row may lack its base: an incomplete tombstone has no digest.
    deleted = rows["_op"].to_numpy() == Op.DELETE
    masks[source >= 0] = 0
    columns[rows.schema.get_field_index("_unchanged")] = pa.array(masks)
    filled = pa.record_batch(columns, schema=rows.schema)
    return filled, rebased & (source >= 0), needs & (source < 0) & ~deleted


def _digested(table: Table, whole: pa.RecordBatch, digest: pa.Array, at: np.ndarray) -> pa.Array:
    # Neither operation nor mask goes along: the content is complete now, deleted or not.
    content = ["record_id", *(column.name for column in table.columns)]
    made = digest_rows(table, whole.select(content).filter(pa.array(at)))
    unknown = at & (whole["_unchanged"].to_numpy() != 0)
    made = pc.if_else(pa.array(~unknown[at]), made, pa.scalar(None, made.type))
    order = np.full(len(digest), -1, np.int64)
    order[at] = np.arange(len(made))
    spread = made.take(pa.array(order, mask=order < 0))
    return pc.if_else(pa.array(at), spread, digest)


def _choose(first: np.ndarray, a: pa.RecordBatch, b: pa.RecordBatch, table: Table):
    """Rows of `a` where `first`, else of `b`, in the columns where the two may differ."""
    if not first.any():
        return b
    columns = list(b.columns)
    condition = pa.array(first)
    for name in ("_unchanged", *(column.name for column in table.columns)):
        at = b.schema.get_field_index(name)
        columns[at] = pc.if_else(condition, a.column(at), columns[at])
    return pa.record_batch(columns, schema=b.schema)
