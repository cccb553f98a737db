"""Issue rows again with what their parent says now, at the parent's position."""

import typing
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.positions import Position
from schemas.tables import ARROW_TYPES, Kind, Table

AWAITING = "awaiting_parent"
# How values of a kind are kept outside Arrow.
STORED = {Kind.TIME: pa.int64(), Kind.DATE: pa.int32()}


def awaits(remarks: pa.Array) -> np.ndarray | None:
    """Returns bool[n]: which rows wait for their parent, by their remarks; None: no row does."""
    if remarks.null_count == len(remarks):
        return None
    marked = pc.fill_null(pc.starts_with(remarks, AWAITING), False)
    return marked.to_numpy(zero_copy_only=False)


class Reissue(typing.NamedTuple):
    """A row to be issued again.

    Attributes:
      record_id, src_table: whose. at, commit_us: of the parent's change.
      ref: its `parent_ref`.
      values: canonical column to value, as taken from the parent.
      remarks: as they were. waits: the column to remark on if it waits on, else None.
      row: its content, one row, where that is at hand; else the store has it.
    """

    record_id: str
    src_table: str
    at: Position
    commit_us: int
    ref: str
    values: dict[str, typing.Any]
    remarks: str | None
    waits: str | None
    row: pa.RecordBatch | None


def reissued_rows(
    table: Table, taken: dict[str, str], again: Sequence[Reissue], like: pa.RecordBatch | None
) -> pa.RecordBatch:
    """Returns updates (`Table.arrow_schema`), in order of position.

    A whole row where the content is at hand, so that an emergency in it is seen; else all but
    what the parent says is unchanged.
    """
    again = sorted(again, key=lambda one: (one.at, one.record_id))
    count = len(again)
    own = {name: [one.values[name] for one in again] for name in taken}
    own["parent_ref"] = [one.ref for one in again]
    own["remarks"] = [_remarks(one) for one in again]
    rest = sum(1 << bit for name, bit in table.index.items() if name not in own)
    names = [one.src_table for one in again]
    meta = {
        "_op": pa.array(np.full(count, Op.UPDATE, np.uint8)),
        "_lsn": pa.array([one.at.lsn for one in again], pa.int64()),
        "_seq": pa.array([one.at.seq for one in again], pa.int32()),
        "_commit_us": pa.array([one.commit_us for one in again], pa.int64()),
        "_src_table": pa.array(names, pa.utf8()).dictionary_encode(),
        "_unchanged": pa.array([0 if one.row is not None else rest for one in again], pa.uint64()),
        "_prev_id": pa.nulls(count, pa.utf8()),
        "_digest": pa.nulls(count, pa.binary(32)),
        "record_id": pa.array([one.record_id for one in again], pa.utf8()),
    }
    arrays = []
    for field in table.arrow_schema:
        if field.name in meta:
            arrays.append(meta[field.name].cast(field.type))
        elif field.name in own:
            kind = table.by_name[field.name].kind
            values = pa.array(own[field.name], STORED.get(kind, ARROW_TYPES[kind]))
            arrays.append(values.cast(field.type))
        else:
            parts = [
                pa.nulls(1, field.type) if one.row is None else one.row[field.name] for one in again
            ]
            arrays.append(pa.concat_arrays(parts))
    return pa.RecordBatch.from_arrays(arrays, schema=table.arrow_schema)


def _remarks(again: Reissue) -> str | None:
    """The remarks of a row without that it waited, or with that it does."""
    lines = (again.remarks or "").split("\n")
    lines = [line for line in lines if line and not line.startswith(AWAITING)]
    if again.waits:
        lines.insert(0, f"{AWAITING} {again.waits}: {again.ref}")
    return "\n".join(lines) or None
