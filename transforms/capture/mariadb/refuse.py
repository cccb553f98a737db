"""Tell of a refused row what the log had, without the mark that had it refused."""

import dataclasses
from collections.abc import Sequence

import pyarrow as pa

from schemas.batches import Op, Reject
from schemas.positions import Position
from transforms.capture.mariadb.charsets import MARK

# Under binlog_row_image = MINIMAL a new row is logged without the columns that its statement did
# not name. They got their defaults, of which the log tells nothing, and which may be an expression.
PARTIAL_ROW = "partial_row"
_MARK = MARK.decode(errors="backslashreplace")


def unmarked(reject: Reject) -> Reject:
    """Returns the reject with its values as they were logged, undecodable bytes escaped."""
    row = {
        name: value.removeprefix(_MARK) if value is not None else None
        for name, value in reject.row.items()
    }
    return dataclasses.replace(reject, row=row)


def refuse_partial(
    table: str, columns: Sequence[str], batch: pa.RecordBatch
) -> tuple[pa.RecordBatch, list[Reject]]:
    """Takes new rows out of which the log lacks a column; returns the others, and rejects.

    A reject names the first column that is lacking and has all that was logged.
    """
    unchanged = batch["_unchanged"].to_numpy()
    partial = (batch["_op"].to_numpy() == Op.INSERT) & (unchanged != 0)
    rejects = []
    for row in batch.filter(pa.array(partial)).to_pylist():
        lacking = [name for bit, name in enumerate(columns) if row["_unchanged"] >> bit & 1]
        rejects.append(
            Reject(
                src_table=table,
                position=Position(row["_lsn"], row["_seq"]),
                op=row["_op"],
                commit_us=row["_commit_us"],
                reason=PARTIAL_ROW,
                column=lacking[0],
                row={name: row[name] for name in columns if name not in lacking},
            )
        )
    return batch.filter(pa.array(~partial)), rejects
