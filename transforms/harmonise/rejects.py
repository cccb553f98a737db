"""Refused rows with their content: never logged, only sealed."""

import numpy as np
import pyarrow as pa

from schemas.batches import Reject
from schemas.positions import Position
from transforms.harmonise.columns import META, OLD, source_columns


def rejects_of(
    name: str, batch: pa.RecordBatch, places: np.ndarray, refusals: list[tuple[str, str]]
) -> list[Reject]:
    """The rows at `places` with their reasons and columns. Rejects are few: this is per row."""
    if not len(places):
        return []
    part = batch.take(pa.array(places, pa.int64()))
    columns = source_columns(batch)
    texts = {
        column: part.column(column).to_pylist()
        for column in (*columns, *(n for n in batch.schema.names if n.startswith(OLD)))
    }
    meta = {column: part.column(column).to_pylist() for column in META}
    rejects = []
    for i, (reason, column) in enumerate(refusals):
        bits = meta["_unchanged"][i]
        unchanged = {c for k, c in enumerate(columns) if bits >> k & 1}
        rejects.append(
            Reject(
                src_table=name,
                position=Position(meta["_lsn"][i], meta["_seq"][i]),
                op=meta["_op"][i],
                commit_us=meta["_commit_us"][i],
                reason=reason,
                column=column,
                row={c: value[i] for c, value in texts.items() if c not in unchanged},
            )
        )
    return rejects
