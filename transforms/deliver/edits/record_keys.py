"""Name records, and look for them in a store by name."""

import collections.abc
import typing


class Key(typing.NamedTuple):
    """Names a record."""

    table: str
    campus: str
    record_id: str


def same_key(one: str, other: str) -> str:
    """Returns SQL: whether two aliases name one record, looked for in `one`'s primary key.

    All but the number is hidden from the planner: to it few tables and campuses look, before the
    first ANALYZE and in indexes that begin with them, as if they led to a single record.
    """
    return (
        f"{one}.record_id = {other}.record_id AND {one}.table_name || '' = {other}.table_name"
        f" AND {one}.campus || '' = {other}.campus"
    )


def looked_up(table: str, one: str, where: str) -> str:
    """Returns a FROM item: as `one`, the rows of `table` that `where` finds for those before it.

    Looked up for each of these: OFFSET 0 leaves no other order. Where a later step looks very
    dear, as before the first ANALYZE, all orders cost the same to the planner, and it may begin
    with every record that there is.
    """
    return f"LATERAL (SELECT * FROM {table} {one} WHERE {where} OFFSET 0) AS {one}"


# Of a table that is read once or twice and emptied: PostgreSQL leaves rows of a page's length as
# they are, where it would compress them.
AS_IS = "WITH (toast_tuple_target = 8160)"


def cleared(stage: str) -> str:
    """Returns SQL: makes a temporary table empty, cheaply where it was little used.

    TRUNCATE, like ON COMMIT DELETE ROWS, has every plan that reads the table made anew, which for
    a small page costs as much as all its rows.
    """
    return (
        f"DO $$ BEGIN IF pg_relation_size('{stage}') > 16000000 THEN TRUNCATE {stage};"
        f" ELSE DELETE FROM {stage}; END IF; END $$"
    )


def names_of(keys: collections.abc.Sequence[Key]) -> dict[str, list[str]]:
    """Returns keys as the three lists that a query takes."""
    return {
        "ids": [key.record_id for key in keys],
        "tables": [key.table for key in keys],
        "campuses": [key.campus for key in keys],
    }


def plain_key(key: Key) -> dict[str, str]:
    """Returns a key by the columns that it has in every table of records."""
    return {"record_id": key.record_id, "table_name": key.table, "campus": key.campus}


# A FROM item of the keys of `names_of`; and whether `r` is the record of one of them.
KEYS = (
    "unnest(%(ids)s::text[], %(tables)s::text[], %(campuses)s::text[])"
    " AS k(record_id, table_name, campus)"
)
OF_KEY = same_key("r", "k")
