"""Take the canonical digests of rows as a store is to show them, a set at a time."""

import typing

import psycopg
import pyarrow as pa

from schemas.tables import ARROW_TYPES, Kind, Table
from transforms.checksum import digest_rows
from transforms.deliver.store_schema import quoted

EXACT = (Kind.TEXT, Kind.DATE, Kind.TIME)  # JSON prints them as their text.

_CONTENT = """\
SELECT array_agg({key}), array_agg(f.record_id), array_agg(w.whole), {columns}
FROM {rows} CROSS JOIN LATERAL (SELECT {whole} AS whole) AS w"""
# As `digest_rows` takes them, of the years that Python's calendar has.
_READ = {
    Kind.TEXT: "{0}",
    Kind.DATE: "CASE WHEN w.whole THEN {0} - date '1970-01-01' END",
    Kind.TIME: "CASE WHEN w.whole THEN (extract(epoch FROM {0}) * 1000000)::bigint END",
}
_WHOLE = "({0} IS NULL OR {0} >= '0001-01-01' AND {0} < '10000-01-01')"


class Digests(typing.NamedTuple):
    """Of rows: what names them where they are staged, and digests; None where a value has no
    Arrow form."""

    keys: list
    digests: list[bytes | None]


def ask_content(
    conn: psycopg.Connection, table: Table, rows: str, row: str, key: str
) -> psycopg.Cursor:
    """Asks for rows of `table`, all of whose columns are of `EXACT` kinds, for `digests_of`.

    Args:
      rows: a FROM item in which `f` has the record_id and `row` names the rows. key: a column of
        it.
    """
    names = {column.name: f"{row}.{quoted(column.name)}" for column in table.columns}
    dated = [names[c.name] for c in table.columns if c.kind in (Kind.DATE, Kind.TIME)]
    columns = [f"array_agg({_READ[c.kind].format(names[c.name])})" for c in table.columns]
    whole = " AND ".join(map(_WHOLE.format, dated)) or "true"
    query = _CONTENT.format(rows=rows, key=key, columns=", ".join(columns), whole=whole)
    return conn.execute(query.encode())


def digests_of(table: Table, content: psycopg.Cursor) -> Digests:
    """Returns the digests of what `ask_content` asked for, in no order."""
    keys, ids, wholes, *values = content.fetchone()
    if keys is None:
        return Digests([], [])
    arrays = [
        pa.array(column, pa.int64() if c.kind is Kind.TIME else ARROW_TYPES[c.kind])
        for c, column in zip(table.columns, values, strict=True)
    ]
    arrays = [
        array.cast(ARROW_TYPES[c.kind]) for c, array in zip(table.columns, arrays, strict=True)
    ]
    batch = pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.utf8()), *arrays], ["record_id", *table.by_name]
    )
    digests = [
        digest if whole else None
        for digest, whole in zip(digest_rows(table, batch).to_pylist(), wholes, strict=True)
    ]
    return Digests(keys, digests)


def time_of(hlc: str) -> str:
    """Returns SQL: the time of a stamp, as `schemas.hlc.us_of` has it."""
    return (
        "timestamptz 'epoch' + interval '1 microsecond'"
        f" * (({hlc} >> 16) * 1000 + least({hlc} >> 6 & 1023, 999))"
    )
