"""Trim change batches to what the ledger does not have, exactly: rows, counts and manifest."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from schemas.batches import ChangeBatch, Lane, ManifestEntry, Op
from schemas.positions import Position
from transforms.checksum import EMPTY_SET, add_sets, digest_set
from transforms.deliver.ledger import LedgerState, Span
from transforms.join_batches import concat_rows

Sums = dict[tuple[str, int], tuple[int, bytes]]  # (table, window's start in µs): count, digest.
_Tables = dict[str, pa.RecordBatch]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is new in one batch.

    Attributes:
      batch: the batch with that only; `captured` counts it, `manifest` is as it came.
      source: the manifest of it: as counted at capture, less what the ledger has.
      runs: the new ranges of the log in it, each with its rows, in order.
    """

    batch: ChangeBatch
    source: Sums
    runs: tuple[tuple[Span, _Tables], ...]


def new_parts(
    batches: Sequence[ChangeBatch], state: LedgerState, in_order: Collection[str] = ()
) -> tuple[list[Part], LedgerState]:
    """Returns what of `batches` the ledger does not cover, in order, and the ledger after it.

    A batch beyond the ledger that leans on what is missing, or has rows of tables `in_order`,
    is not among it.
    """
    parts = []
    for batch in sorted(batches, key=lambda batch: (batch.begin, batch.end)):
        if batch.begin >= batch.end or state.covers(batch.begin, batch.end):
            continue
        if not state.joins(batch.begin) and (
            batch.sweeps
            or not batch.tables.keys().isdisjoint(in_order)
            or _leans_on_the_past(batch)
        ):
            continue
        parts.append(_new_in(batch, state))
        state = state.with_applied(batch.begin, batch.end)
    return parts, state


def runs_of(parts: Sequence[Part]) -> list[_Tables]:
    """Returns the rows of all parts by stretches of the log without a hole, tables by name.

    Between two stretches there is what the store has or what is still to come. Rows are
    filled in from rows before them in their own stretch only: over a hole, the value may be
    an old one.
    """
    runs: list[list[_Tables]] = []
    end = None
    for (begin, stop), tables in (run for part in parts for run in part.runs):
        if begin != end:
            runs.append([])
        runs[-1].append(tables)
        end = stop
    return [_joined(run) for run in runs]


def unswept(rows: pa.RecordBatch, sweeps: Mapping[str, int]) -> pa.RecordBatch:
    """Returns `rows` without what is older than a finished snapshot of its source table.

    That had the last word: an old copy that comes late would bring back a row that is gone.
    """
    lsn = rows["_lsn"].to_numpy()
    if not sweeps or not len(lsn) or lsn.min() >= max(sweeps.values()):
        return rows
    tables = rows["_src_table"]
    bounds = np.array([sweeps.get(t, 0) for t in tables.dictionary.to_pylist()], np.int64)
    return rows.filter(pa.array(lsn >= bounds[tables.indices.to_numpy()]))


def _joined(run: Sequence[_Tables]) -> _Tables:
    names = sorted({name for tables in run for name in tables})
    return {name: concat_rows([t[name] for t in run if name in t]) for name in names}


def _leans_on_the_past(batch: ChangeBatch) -> bool:
    """Whether rows take values from the store: right only when all before them is there.

    A routine tombstone keeps its row's content for a key change that follows; the emergency
    lane brings no row with unchanged columns, and its tombstones are no base for one.
    """
    for rows in batch.tables.values():
        if rows["_unchanged"].to_numpy().any():
            return True
        if batch.lane is Lane.ROUTINE and (rows["_op"].to_numpy() == Op.DELETE).any():
            return True
    return False


def _new_in(batch: ChangeBatch, state: LedgerState) -> Part:
    """Leaves out what was applied of the batch's own range.

    Rows from before it, which an emergency batch has of a patient newly under emergency, are
    no part of the range: they stay, and the position guard knows them.
    """
    source: Sums = {}
    for entry in batch.manifest:
        add_to(source, (entry.table, entry.window_start_us), entry.count, entry.digest)
    known = state.covered_in(batch.begin, batch.end)
    if not known:
        return Part(batch, source, (((batch.begin, batch.end), batch.tables),))
    new = _between(known, batch.begin, batch.end)
    gone = 0
    runs: list[_Tables] = [{} for _ in new]
    for name, rows in batch.tables.items():
        lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
        out = rows.filter(pa.array(_inside(lsn, seq, known)))
        for window, (count, digest) in sums_of(name, out, batch.manifest).items():
            add_to(source, window, -count, negative(digest))
        gone += out.num_rows
        for i, span in enumerate(new):
            inside = _inside(lsn, seq, [span])
            if i == 0:
                inside |= ~_inside(lsn, seq, [(batch.begin, batch.end)])
            if inside.any():
                runs[i][name] = rows.filter(pa.array(inside))
    dead = tuple(x for x in batch.dead if not _spanned(Position(x.lsn, x.seq), known))
    holds = tuple(x for x in batch.holds if not _spanned(x[1], known))
    gone += len(batch.dead) - len(dead) + len(batch.holds) - len(holds)
    trimmed = dataclasses.replace(
        batch, captured=batch.captured - gone, tables=_joined(runs), dead=dead, holds=holds
    )
    return Part(trimmed, source, tuple(zip(new, runs, strict=True)))


def _between(spans: Sequence[Span], begin: Position, end: Position) -> list[Span]:
    """Returns what the ordered `spans` leave of (begin, end]."""
    left = []
    for low, high in spans:
        if begin < low:
            left.append((begin, low))
        begin = high
    return [*left, (begin, end)] if begin < end else left


def _inside(lsn: np.ndarray, seq: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    inside = np.zeros(len(lsn), np.bool_)
    for begin, end in spans:
        after = (lsn > begin[0]) | ((lsn == begin[0]) & (seq > begin[1]))
        until = (lsn < end[0]) | ((lsn == end[0]) & (seq <= end[1]))
        inside |= after & until
    return inside


def _spanned(position: Position, spans: Sequence[Span]) -> bool:
    return any(begin < position <= end for begin, end in spans)


def add_to(sums: Sums, window: tuple[str, int], count: int, digest: bytes) -> None:
    """Adds a set of rows to the sums of its window."""
    known_count, known_digest = sums.get(window, (0, EMPTY_SET))
    sums[window] = (known_count + count, add_sets(known_digest, digest))


def negative(digest: bytes) -> bytes:
    """Returns what takes a set of rows out of a sum again, by `add_to`."""
    return (np.uint64(0) - np.frombuffer(digest, "<u8")).astype("<u8").tobytes()


def sums_of(table: str, rows: pa.RecordBatch, entries: Sequence[ManifestEntry]) -> Sums:
    """Returns count and digest of `rows` by the windows that the manifest names for them."""
    known = {entry.window_start_us for entry in entries if entry.table == table}
    if not known or not rows.num_rows:
        return {}
    starts = np.array(sorted(known))
    commit_us = rows["_commit_us"].to_numpy()
    window = np.maximum(np.searchsorted(starts, commit_us, side="right") - 1, 0)
    if window.min() == window.max():
        return {(table, int(starts[window[0]])): digest_set(rows["_digest"])}
    sums: Sums = {}
    for i in np.unique(window):
        inside = rows["_digest"].filter(pa.array(window == i))
        sums[table, int(starts[i])] = digest_set(inside)
    return sums
