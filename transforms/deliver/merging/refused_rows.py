"""Rows that a store refuses, as dead letters are to keep them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from schemas.batches import Reject
from schemas.entities import TABLES
from schemas.positions import Position
from transforms.deliver.merging.outcomes import Refusal


def rejected(
    table: str, rows: pa.RecordBatch, refusals: Sequence[Refusal], captured: pa.RecordBatch
) -> tuple[pa.RecordBatch, list[Reject]]:
    """Returns the refused rows as they were captured, and what is to be sealed of each.

    Args:
      rows: of the merge, to which the refusals point. captured: what they were made of.
    """
    refused = rows.take(pa.array([refusal.row for refusal in refusals]))
    captured = _as_captured(captured, refused)
    places = zip(captured["_lsn"].to_pylist(), captured["_seq"].to_pylist(), strict=True)
    digests = dict(zip(places, captured["_digest"].to_pylist(), strict=True))
    rejects = []
    for refusal in refusals:
        row = rows.slice(refusal.row, 1)
        change = row.select(["_src_table", "_lsn", "_seq", "_op", "_commit_us"]).to_pylist()[0]
        rejects.append(
            Reject(
                src_table=change["_src_table"],
                position=Position(change["_lsn"], change["_seq"]),
                op=change["_op"],
                commit_us=change["_commit_us"],
                reason=refusal.reason,
                column=refusal.column,
                row=sealed_row(table, row, digests[change["_lsn"], change["_seq"]]),
            )
        )
    return captured, rejects


def _as_captured(rows: pa.RecordBatch, some: pa.RecordBatch) -> pa.RecordBatch:
    """Returns the rows of `rows` at the positions of `some`: with the digests that they came with.

    Compaction fills columns in, and the digest of such a row is no longer what was captured.
    """
    wanted = set(zip(some["_lsn"].to_pylist(), some["_seq"].to_pylist(), strict=True))
    lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
    near = np.flatnonzero(np.isin(lsn, some["_lsn"].to_numpy()))
    found = {(int(lsn[i]), int(seq[i])): i for i in near[::-1]}
    return rows.take(pa.array([found[place] for place in sorted(wanted)], pa.int64()))


def sealed_row(table: str, row: pa.RecordBatch, digest: bytes | None) -> dict[str, str | None]:
    """Returns what a letter keeps of a canonical row; a column that is absent was unchanged.

    `digest` is what the manifest counted of it.
    """
    unchanged = row["_unchanged"][0].as_py()
    known = [name for bit, name in enumerate(TABLES[table].by_name) if not unchanged >> bit & 1]
    return {
        **{name: _text(row[name][0]) for name in ("record_id", *known, "_prev_id")},
        "_table": table,
        "_digest": digest and digest.hex(),
    }


def _text(value: pa.Scalar) -> str | None:
    """As text by Arrow: a time may lie beyond what Python has."""
    return value.as_py() if pa.types.is_string(value.type) else value.cast(pa.utf8()).as_py()
