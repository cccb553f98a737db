"""Canonical record batches from rows written by hand."""

import datetime
from collections.abc import Sequence

import pyarrow as pa

from schemas.batches import Op
from schemas.entities import TABLES

COMMIT_US = 1_772_352_000_000_000  # 2026-03-01 08:00 UTC.


def rows_of(table: str, rows: Sequence[dict]) -> pa.RecordBatch:
    """Returns `rows` as a batch of `table`; what a row does not name is null or a default.

    Defaults: an insert of a patient `P1`, committed at COMMIT_US, at place (1, i + 1).
    `unchanged` names the columns whose value the log did not carry.
    """
    declared = TABLES[table]
    schema = declared.arrow_schema
    full = []
    for i, row in enumerate(rows):
        given = dict(row)
        bits = sum(1 << declared.index[name] for name in given.pop("unchanged", ()))
        full.append(
            {
                **dict.fromkeys(schema.names),
                "_op": int(Op.INSERT),
                "_lsn": 1,
                "_seq": i + 1,
                "_commit_us": COMMIT_US,
                "_src_table": f"source.{table}",
                "_unchanged": bits,
                "record_id": str(i + 1),
                declared.patient: "P1",
                **given,
            }
        )
    columns = [pa.array([row[f.name] for row in full], f.type) for f in schema]
    return pa.record_batch(columns, schema=schema)


def at(commit_us: int) -> datetime.datetime:
    """Returns microseconds since 1970 as a time in UTC."""
    return datetime.datetime.fromtimestamp(commit_us / 1e6, datetime.UTC)
