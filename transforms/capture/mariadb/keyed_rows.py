"""Conditions that find the rows of some keys by an index, from keys as texts."""

import re
from collections.abc import Collection, Iterator, Sequence

import pymysql

from transforms.capture.mariadb.snapshot_columns import INTEGERS, TEXTS, quote

# MariaDB makes a temporary table of longer lists, and gives an index up for it.
_KEYS_MAX = 500
_INTEGER = re.compile(r"-?\d{1,20}")
_DECIMAL = re.compile(r"-?\d{1,65}(\.\d{1,38})?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_COLUMNS = """
SELECT COLUMN_NAME, DATA_TYPE FROM information_schema.COLUMNS
WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s
"""
_INDEXES = """
SELECT INDEX_NAME, COLUMN_NAME FROM information_schema.STATISTICS
WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s ORDER BY INDEX_NAME, SEQ_IN_INDEX
"""


def conditions(
    cursor: pymysql.cursors.Cursor, table: str, key: Sequence[str], keys: Collection[Sequence[str]]
) -> Iterator[str]:
    """Yields conditions that together hold for every row whose key is among `keys`.

    They may hold for a few others: texts are held against each other by the column's collation.
    Without an index of the key's columns, or where a column has a type whose texts are no plain
    constants, it is one that holds for all rows.

    Args:
      table: `database.table`. key: its columns. keys: values in their order, as the log has them.
    """
    names = table.split(".", 1)
    cursor.execute(_COLUMNS, names)
    types = {str(name): str(kind).lower() for name, kind in cursor.fetchall()}
    cursor.execute(_INDEXES, names)
    indexes: dict[str, list[str]] = {}
    for index, column in cursor.fetchall():
        indexes.setdefault(str(index), []).append(str(column))
    known = all(types.get(name) in INTEGERS | TEXTS | {"decimal", "date"} for name in key)
    if not known or not any(set(part[: len(key)]) == set(key) for part in indexes.values()):
        yield "TRUE"
        return
    found = []
    for values in sorted(keys):
        literals = [_literal(types[name], value) for name, value in zip(key, values, strict=True)]
        if None not in literals:  # No row has what is no value of the column.
            found.append(literals)
    for start in range(0, len(found), _KEYS_MAX):
        some = found[start : start + _KEYS_MAX]
        if len(key) == 1:
            yield f"{quote(key[0])} IN ({', '.join(one for (one,) in some)})"
            continue
        ways = (
            " AND ".join(f"{quote(n)} = {v}" for n, v in zip(key, w, strict=True)) for w in some
        )
        yield " OR ".join(f"({way})" for way in ways)


def _literal(kind: str, text: str) -> str | None:
    if kind in TEXTS:
        # The server makes a constant of the column's own charset of it, so that an index serves.
        return f"_utf8mb4 X'{text.encode().hex()}'"
    if kind == "date":
        return f"'{text}'" if _DATE.fullmatch(text) else None
    pattern = _DECIMAL if kind == "decimal" else _INTEGER
    return text if pattern.fullmatch(text) else None
