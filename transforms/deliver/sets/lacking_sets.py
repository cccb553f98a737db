"""What sets of a delivery its store lacks: those that are to be written to all stores together."""

from collections.abc import Sequence

import numpy as np
import psycopg
import pyarrow as pa

from schemas.batches import ChangeBatch, Lane
from schemas.entities import TABLES
from transforms.deliver import ledger
from transforms.deliver.merging.merge_sql import merge_sql
from transforms.deliver.merging.merge_wire import TextArray, fixed_array
from transforms.deliver.merging.trim import new_parts, runs_of, unswept
from transforms.deliver.sets.commit_sets import CommitSets, commit_sets


def lacking_sets(
    conn: psycopg.Connection,
    link: str,
    campus: str,
    batches: Sequence[ChangeBatch],
    lane: Lane,
    kinds: Sequence[Sequence[str]],
    by_commit: bool,
) -> list[CommitSets] | None:
    """Returns the sets in what is new of `batches` of which the store lacks a row, by stretch.

    A row that it has at its place or newer is not lacking, nor is one that a finished snapshot
    had the last word of. None where nothing of a set is new and follows the ledger: whether sets
    can be written is then not known. Looks only; nothing is locked.
    """
    state = ledger.look(conn, link, lane)
    names = {name for kind in kinds for name in kind}
    parts, _ = new_parts(batches, state, names)
    if all(names.isdisjoint(part.batch.tables) for part in parts):
        return None
    found = []
    for run in runs_of(parts):
        tables = {n: unswept(run[n], state.sweeps) for kind in kinds for n in kind if n in run}
        sets = commit_sets(tables, kinds, by_commit)
        lacks = np.zeros(sets.count, np.bool_)
        for name, rows in sets.tables.items():
            lacks[sets.numbers[name][_lacking(conn, campus, name, rows)]] = True
        if lacks.any():
            found.append(sets.chosen(lacks))
    return found


def _lacking(conn: psycopg.Connection, campus: str, name: str, rows: pa.RecordBatch) -> np.ndarray:
    """Returns bool[n]: the store has no version of the row, or an older one."""
    arguments = (TextArray(rows["record_id"]), campus)
    result = conn.execute(merge_sql(TABLES[name]).look, arguments, binary=True).pgresult
    lacks = np.ones(rows.num_rows, np.bool_)
    if result.get_value(0, 0) is not None:
        at = fixed_array(result.get_value(0, 0), 4).astype(np.int64)
        known_lsn = fixed_array(result.get_value(0, 1), 8)
        known_seq = fixed_array(result.get_value(0, 2), 4)
        lsn, seq = rows["_lsn"].to_numpy()[at], rows["_seq"].to_numpy()[at]
        lacks[at] = (known_lsn < lsn) | ((known_lsn == lsn) & (known_seq < seq))
    return lacks
