"""Sealed change batches for a store, as a reader would make them, from rows written by hand."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from schemas.batches import ChangeBatch, Lane, Op
from schemas.entities import TABLES
from schemas.positions import SEQ_END, START, Position
from schemas.wire import seal
from tests.canonical import COMMIT_US
from transforms.checksum import manifest, with_digests

LINK = "main>primary"
WINDOW_US = 60_000_000


def batch_of(
    tables: Mapping[str, pa.RecordBatch],
    begin: Position = START,
    end: Position | None = None,
    lane: Lane = Lane.ROUTINE,
    **more,
) -> ChangeBatch:
    """Returns a sealed batch with digests and manifest; `captured` is what its content adds up to.

    `end` is by default the end of the newest transaction in it.
    """
    digested = {name: with_digests(TABLES[name], rows) for name, rows in tables.items()}
    entries = tuple(
        entry
        for name, rows in digested.items()
        for entry in manifest(TABLES[name], rows, WINDOW_US)
    )
    rows = sum(rows.num_rows for rows in digested.values())
    if end is None:
        end = Position(
            max(int(rows["_lsn"].to_numpy().max()) for rows in digested.values()), SEQ_END
        )
    given = {
        "captured": rows + len(more.get("dead", ())) + len(more.get("holds", ())),
        "commit_us_max": COMMIT_US,
        "watermark_us": COMMIT_US - 1_000_000,
        "read_us": COMMIT_US,
        **more,
    }
    return seal(
        ChangeBatch(
            link=LINK, lane=lane, begin=begin, end=end, tables=digested, manifest=entries, **given
        )
    )


def part_of(batch: ChangeBatch, begin: Position, end: Position) -> ChangeBatch:
    """Returns what of `batch` lies in (begin, end], sealed anew: another split of the same log."""
    tables = {}
    for name, rows in batch.tables.items():
        lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
        inside = np.array(
            [begin < (a, b) <= end for a, b in zip(lsn.tolist(), seq.tolist(), strict=True)], bool
        )
        if inside.any():
            tables[name] = rows.filter(pa.array(inside))
    return batch_of(tables, begin, end, batch.lane)


def lab_results(
    first: int, rows: int, lsn: int, op: Op = Op.INSERT, value: str = "5.3", per_commit: int = 1000
) -> pa.RecordBatch:
    """Returns `rows` laboratory results, about 250 bytes each, `per_commit` a transaction."""
    table = TABLES["lab_result"]
    number = np.arange(first, first + rows)
    commit = lsn + np.arange(rows) // per_commit
    commit_us = pa.array(COMMIT_US + commit * 1000)
    at = commit_us.cast(pa.timestamp("us", "UTC"))
    texts: dict[str, Callable[[int], str] | str] = {
        "patient_id": lambda i: f"P{i * 7919 % 20_000:08d}",
        "visit_no": lambda i: f"V{i * 7919 % 40_000:010d}",
        "item_code": "2345-7",
        "item_name": "葡萄糖",
        "value": value,
        "unit": "mmol/L",
        "raw_value": "5.30",
        "raw_unit": "mmol/l",
        "reference_low": "3.9",
        "reference_high": "6.1",
        "flag": "N",
        "status": "final",
    }
    columns = {
        "_op": pa.array(np.full(rows, int(op), np.uint8)),
        "_lsn": pa.array(commit),
        "_seq": pa.array((np.arange(rows) % per_commit + 1).astype(np.int32)),
        "_commit_us": commit_us,
        "_src_table": pa.array(["lis.result"] * rows).dictionary_encode(),
        "_unchanged": pa.array(np.zeros(rows, np.uint64)),
        "record_id": pa.array([str(10_000_000 + i) for i in number.tolist()]),
        "critical": pa.array(np.zeros(rows, np.bool_)),
        "collected_at": at,
        "reported_at": at,
        "updated_at": at,
    }
    for name, text in texts.items():
        columns[name] = pa.array([text(i) if callable(text) else text for i in number.tolist()])
    schema = table.arrow_schema
    arrays = [columns.get(f.name, pa.nulls(rows, f.type)).cast(f.type) for f in schema]
    return pa.record_batch(arrays, schema=schema)


def resealed(batch: ChangeBatch, **changes) -> ChangeBatch:
    """Returns `batch` with `changes`, sealed anew."""
    return seal(dataclasses.replace(batch, **changes))
