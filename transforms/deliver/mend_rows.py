"""Deliver rows again that a store has otherwise than its source: by the merge of every delivery."""

from collections.abc import Callable

import numpy as np
import psycopg
import pyarrow as pa

from schemas.batches import Lane, Op
from schemas.entities import TABLES
from schemas.receipts import Counts
from transforms.checksum import with_digests
from transforms.deliver import ledger
from transforms.deliver.merging.compact import compact, every_column
from transforms.deliver.merging.merge import TableMerger
from transforms.deliver.merging.outcomes import Outcome

_NEWEST = """\
SELECT coalesce(max(src_seq), 0) FROM consult.{table}
WHERE record_id = ANY (%s) AND campus = %s AND src_lsn = %s"""


def mend(
    conn: psycopg.Connection,
    link: str,
    campus: str,
    table: str,
    rows: pa.RecordBatch,
    merger_of: Callable[[str, Lane], TableMerger],
) -> Counts:
    """Merges rows of one view of the source and commits; returns what became of them.

    The routine lane's ledger is locked meanwhile and counts them, but does not move. A row of the
    store that a newer change has written wins, and so does a later snapshot's sweep. A row that
    the store refuses is left as it is, without a letter: its own change has one.

    Args:
      rows: of distinct records, as `as_changes` and `as_tombstones` make them, at one lsn.
    """
    lsn = rows["_lsn"][0].as_py()
    before = ledger.lock(conn, link, Lane.ROUTINE)
    ids = rows["record_id"].to_pylist()
    (newest,) = conn.execute(_NEWEST.format(table=table), (ids, campus, lsn)).fetchone()
    # The log may not have grown since rows were last given that place: the newest view is right.
    seq = pa.array(np.arange(newest + 1, newest + 1 + len(ids), dtype=np.int32))
    rows = _with(rows, "_seq", seq)
    swept = [lsn < before.sweeps.get(name, 0) for name in rows["_src_table"].to_pylist()]
    rows = rows.filter(pa.array([not old for old in swept]))
    outcomes = np.empty(0, np.uint8)
    if rows.num_rows:
        merger = merger_of(table, Lane.ROUTINE)
        merger.begin()
        outcomes = merger.merge(compact(TABLES[table], rows)).outcomes
    found = np.bincount(outcomes, minlength=len(Outcome)).tolist()
    counts = Counts(
        captured=len(ids) - found[Outcome.DEAD],
        delivered=found[Outcome.DELIVERED],
        duplicates=found[Outcome.DUPLICATE],
        superseded=found[Outcome.SUPERSEDED] + sum(swept),
    )
    ledger.save(conn, link, Lane.ROUTINE, before, before, counts, 0, 0, 0)
    conn.execute("COMMIT")
    return counts


def as_changes(table: str, rows: pa.RecordBatch, lsn: int, taken_us: int) -> pa.RecordBatch:
    """Returns rows of the source as snapshot changes at `lsn`, with digests."""
    n = rows.num_rows
    rows = _with(rows, "_lsn", pa.array(np.full(n, lsn, np.int64)))
    rows = _with(rows, "_commit_us", pa.array(np.full(n, taken_us, np.int64)))
    return with_digests(TABLES[table], rows)


def as_tombstones(
    table: str, ids: pa.Array, src_tables: pa.Array, lsn: int, taken_us: int
) -> pa.RecordBatch:
    """Returns deletions of records that the source does not have, at `lsn`."""
    declared, n = TABLES[table], len(ids)
    values = {
        "_op": np.full(n, Op.DELETE, np.uint8),
        "_lsn": np.full(n, lsn, np.int64),
        "_seq": np.zeros(n, np.int32),
        "_commit_us": np.full(n, taken_us, np.int64),
        "_src_table": src_tables,
        "_unchanged": np.full(n, every_column(declared), np.uint64),
        "record_id": ids,
    }
    arrays = [
        pa.array(values[field.name]).cast(field.type)
        if field.name in values
        else pa.nulls(n, field.type)
        for field in declared.arrow_schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=declared.arrow_schema)


def _with(rows: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    place = rows.schema.get_field_index(name)
    field = rows.schema.field(place)
    return rows.set_column(place, field, values.cast(field.type))
