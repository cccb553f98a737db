"""Read again a record that was refused whole: with what the mapping and the decoder know now."""

import typing
from collections.abc import Mapping

import pyarrow as pa

from schemas.batches import Reject
from schemas.errors import CampusSyncError
from schemas.positions import SEQ_END, Position
from transforms.capture.debezium.decoder import OLD_KEY, DebeziumDecoder
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import Record

# What `DebeziumDecoder` keeps of a record, and what stands for its one header that matters.
_PARTS = frozenset({"key", "value", OLD_KEY})


class ReadAgain(typing.NamedTuple):
    """The one row of a record: its source table and its content, or why there is none."""

    table: str = ""
    rows: pa.RecordBatch | None = None
    reason: str = ""
    column: str = ""


def is_whole(reject: Reject) -> bool:
    """Whether a letter of a topic holds a record rather than a row's columns."""
    return {"key", "value"} <= reject.row.keys() <= _PARTS


def read_again(reject: Reject, tables: Mapping[str, TableSpec]) -> ReadAgain:
    """Returns the row of a record that was refused, as capture would have had it.

    A record with bytes that are no UTF-8 was kept with these escaped, and is no JSON still.

    Args:
      tables: as for `DebeziumDecoder`.
    """
    before = Position(reject.position.lsn - 1, SEQ_END)
    decoder = DebeziumDecoder(10, 1 << 30, before, tables)
    try:
        taken = [*decoder.feed([_record(reject)]), *decoder.flush(whole=False)]
    except CampusSyncError:  # A bare row, or more columns than can be carried.
        return ReadAgain(reason=reject.reason, column=reject.column)
    refused = [one for raw in taken for one in raw.rejects]
    if refused:
        return ReadAgain(refused[0].src_table, None, refused[0].reason, refused[0].column)
    if any(raw.truncates for raw in taken):
        return ReadAgain(reason="truncate")
    found = [(name, rows) for raw in taken for name, rows in raw.tables.items()]
    if not found:
        return ReadAgain(reason="unknown_table")
    ((table, rows),) = found
    if rows.num_rows != 1:
        # Two rows at two places, where the letter was counted as one change.
        return ReadAgain(table, None, "key_changed")
    return ReadAgain(table, rows)


def _record(reject: Reject) -> Record:
    row = reject.row
    old = row.get(OLD_KEY)
    return Record(
        reject.position.lsn - 1,
        None if row["key"] is None else row["key"].encode(),
        (row["value"] or "").encode(),
        [] if old is None else [(OLD_KEY, old.encode())],
    )
