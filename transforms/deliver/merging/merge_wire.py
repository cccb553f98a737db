"""Write the rows of a merge as the server takes them: COPY's binary form, arrays and JSON."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from psycopg.adapt import Dumper
from psycopg.pq import Format

from schemas.batches import Lane, Op
from schemas.tables import Kind, Table
from transforms.deliver.merging.copy_binary import (
    CopyRows,
    Wire,
    WireColumn,
    encode_rows,
    encode_text_array,
)
from transforms.deliver.merging.merge_sql import stored_names

_WIRES = {
    Kind.TEXT: Wire.BYTES,
    Kind.INT: Wire.INT8,
    Kind.DECIMAL: Wire.NUMERIC,
    Kind.BOOL: Wire.BOOL,
    Kind.DATE: Wire.DATE,
    Kind.TIME: Wire.TIMESTAMPTZ,
}
LANE_CODES = {Lane.EMERGENCY: b"E", Lane.ROUTINE: b"R"}
_TEXT_ARRAY_OID = 1009
_CHUNK_ROWS = 2048  # The server parses one chunk while the next is being encoded.
_PLAIN = (pa.utf8(), pa.int64(), pa.int32(), pa.bool_())


class TextArray:
    """A text[] parameter in its binary form already."""

    def __init__(self, values: pa.Array):
        self.encoded = encode_text_array(values)


class TextArrayDumper(Dumper):
    format = Format.BINARY
    oid = _TEXT_ARRAY_OID

    def dump(self, obj: TextArray) -> bytes:
        return obj.encoded


def hlc_of(commit_us: np.ndarray) -> np.ndarray:
    """Returns the hybrid logical clock of commit times: 48 bits of ms, 10 of µs, 6 of count.

    Order is that of the commit times; fits a signed 64-bit integer until the year 6429.
    """
    return (commit_us // 1000 << 16) | (commit_us % 1000 << 6)


def copy_chunks(
    table: Table, campus: str, lane: Lane, rows: pa.RecordBatch, staged: bool
) -> Iterator[CopyRows]:
    """Yields `rows` encoded for COPY into the table, or `staged` with what is unchanged in them."""
    for start in range(0, rows.num_rows, _CHUNK_ROWS):
        yield _encoded(table, campus, lane, rows.slice(start, _CHUNK_ROWS), staged)


def _encoded(table: Table, campus: str, lane: Lane, rows: pa.RecordBatch, staged: bool) -> CopyRows:
    commit_us = rows["_commit_us"].to_numpy()
    columns = [
        WireColumn(Wire.CONSTANT, campus.encode()),
        WireColumn(Wire.BYTES, rows["record_id"]),
        *(WireColumn(_WIRES[c.kind], rows[c.name]) for c in table.columns),
        WireColumn(Wire.BYTES, rows["_src_table"]),
        WireColumn(Wire.INT8, rows["_lsn"]),
        WireColumn(Wire.INT4, rows["_seq"]),
        WireColumn(Wire.TIMESTAMPTZ, rows["_commit_us"]),
        WireColumn(Wire.INT8, hlc_of(commit_us)),
        WireColumn(Wire.CONSTANT, LANE_CODES[lane]),
        WireColumn(Wire.CONSTANT, table.level.to_bytes(2, "big")),
        WireColumn(Wire.BYTES, rows["_digest"]),
        WireColumn(Wire.BOOL, pa.array(rows["_op"].to_numpy() == Op.DELETE)),
    ]
    if staged:
        columns.append(WireColumn(Wire.INT8, rows["_unchanged"].to_numpy().astype(np.int64)))
    return encode_rows(columns, rows.num_rows)


def json_rows(table: Table, lane: Lane, rows: pa.RecordBatch, chosen: np.ndarray) -> str:
    """Returns the chosen rows as a JSON array of objects, nulls left out."""
    rows = rows.filter(pa.array(chosen))
    count = rows.num_rows
    columns = [
        *(texts_of(rows[name]) for name in ("record_id", *table.by_name)),
        *(texts_of(rows[name]) for name in ("_src_table", "_lsn", "_seq")),
        texts_of(rows["_commit_us"].cast(pa.timestamp("us", "UTC"))),
        hlc_of(rows["_commit_us"].to_numpy()).tolist(),
        [LANE_CODES[lane].decode()] * count,
        [table.level] * count,
        [
            None if digest is None else f"\\x{digest.hex()}"
            for digest in rows["_digest"].to_pylist()
        ],
        (rows["_op"].to_numpy() == Op.DELETE).tolist(),
    ]
    keys = [name.strip('"') for name in stored_names(table)[1:]]
    records = [
        {key: value for key, value in zip(keys, row, strict=True) if value is not None}
        for row in zip(*columns, strict=True)
    ]
    return json.dumps(records)


def texts_of(values: pa.Array) -> list:
    """Returns the values as what becomes JSON that PostgreSQL reads: exact, whatever the type."""
    if values.null_count == len(values):
        return [None] * len(values)
    plain = pa.types.is_dictionary(values.type) or values.type in _PLAIN
    return (values if plain else values.cast(pa.utf8())).to_pylist()


def fixed_array(encoded: bytes, width: int) -> np.ndarray:
    """Returns the values of a binary array of int4 or int8 without nulls."""
    fields = np.frombuffer(encoded, np.uint8)[20:].reshape(-1, 4 + width)[:, 4:]
    return np.ascontiguousarray(fields).view(f">i{width}").ravel().astype(np.int64)
