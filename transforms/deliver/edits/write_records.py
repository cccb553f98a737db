"""Write records, each under the store's next change number."""

import collections.abc

import psycopg

from transforms.deliver.edits.record_keys import same_key

# One lock for all who change records, from here to the commit: whoever reads up to a change has
# read every change before it. Clients never take it.
_COUNT = "UPDATE sync.store SET change = change + %s"
_CHANGE = "(SELECT change FROM sync.store) - %(records)s + v.place"
# One that somebody else has just made is no reason to write over it: `hold_records.PASSING`.
_ADD = f"""\
INSERT INTO sync.record (record_id, table_name, campus, src_table, seen, record, change, urgent,
    taken_from)
SELECT v.record_id, v.table_name, v.campus, v.src_table, v.seen, v.record, {_CHANGE}, v.urgent,
    %(taken_from)s::text
FROM {{rows}} AS v"""
_PUT = f"""\
UPDATE sync.record AS r SET src_table = v.src_table, seen = v.seen, record = v.record,
    change = {_CHANGE}, urgent = v.urgent, taken_from = %(taken_from)s::text
FROM {{rows}} AS v WHERE {same_key("r", "v")}"""


def write_records(
    conn: psycopg.Connection,
    rows: str,
    records: int,
    *,
    new: bool,
    names: collections.abc.Mapping[str, object] | None = None,
    taken_from: str | None = None,
) -> None:
    """Writes records in the caller's transaction; within its pipeline it waits for nothing.

    Args:
      rows: a FROM item with record_id, table_name, campus, src_table, seen, record, urgent, and
        place: 1 to `records`. names: its parameters.
      new: whether there are no such records yet; else all of them are there, and locked.
      taken_from: the incarnation of the store that holds just the same.

    Raises:
      psycopg.errors.UniqueViolation: a new one is there after all.
    """
    if records:
        conn.execute(_COUNT, (records,))
        query = (_ADD if new else _PUT).format(rows=rows)
        conn.execute(
            query.encode(), {"records": records, "taken_from": taken_from, **(names or {})}
        )
