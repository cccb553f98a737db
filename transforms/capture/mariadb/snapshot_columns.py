"""How each column of a table is asked for in a snapshot, so that its text is that of the log."""

import dataclasses
from collections.abc import Collection, Sequence

import pymysql

from transforms.capture.columns import Layout
from transforms.capture.mariadb import charsets, result_rows
from transforms.capture.mariadb.layouts import table_layout
from transforms.capture.postgresql.snapshot import TableMissing

INTEGERS = {"tinyint", "smallint", "mediumint", "int", "bigint"}
TEXTS = {"char", "varchar", "tinytext", "text", "mediumtext", "longtext", "enum", "set"}
_BYTES = {"binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"}
_SHAPES = {
    *("geometry", "point", "linestring", "polygon", "multipoint", "multilinestring"),
    *("multipolygon", "geometrycollection", "geomcollection"),
}
_WIDTHS = {"uuid": 16, "inet6": 16, "inet4": 4}
_MOMENTS = {"date", "datetime", "time", "year"}
# Those whose order in an index is that of a comparison with a constant.
_ORDERED = INTEGERS | {"decimal", "date", "datetime", "time", "timestamp", "year"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """One column of the SELECT.

    Attributes:
      expression: SQL. how, mode, codec: see `result_rows` and `charsets`.
      float_size: bytes of a number of floating point, else 0.
    """

    name: str
    expression: str
    how: int
    mode: int = charsets.COPIED
    codec: str = ""
    float_size: int = 0


@dataclasses.dataclass(frozen=True)
class KeyPart:
    """A column of the primary key that chunks go by: `charset` "" stands for no text."""

    name: str
    type: str
    charset: str

    @property
    def quoted(self) -> str:
        return quote(self.name)

    def literal(self, value: bytes) -> str:
        """Returns a value of the column, as a query's result has it, as SQL."""
        if self.charset:
            introducer = "" if self.charset == charsets.BINARY else f"_{self.charset} "
            return f"{introducer}X'{value.hex()}'"
        text = value.decode("ascii")
        return text if self.type in INTEGERS | {"decimal", "year"} else f"'{text}'"


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """A table as a snapshot reads it: `chunk_key` is empty where it must be read in one go."""

    layout: Layout
    asked: tuple[Asked, ...]
    chunk_key: tuple[KeyPart, ...]


def quote(name: str) -> str:
    """Returns an identifier of SQL."""
    return "`" + name.replace("`", "``") + "`"


def quote_table(table: str) -> str:
    """Returns `database.table` as SQL."""
    database, _, name = table.partition(".")
    return f"{quote(database)}.{quote(name)}"


_COLUMNS = """
SELECT COLUMN_NAME, DATA_TYPE, COLUMN_TYPE, CHARACTER_SET_NAME, NUMERIC_PRECISION, NUMERIC_SCALE
FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s
ORDER BY ORDINAL_POSITION
"""
_PRIMARY = """
SELECT COLUMN_NAME, SUB_PART FROM information_schema.STATISTICS
WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s AND INDEX_NAME = 'PRIMARY' ORDER BY SEQ_IN_INDEX
"""


def source_table(
    cursor: pymysql.cursors.Cursor,
    table: str,
    key: Sequence[str] | None,
    wanted: Collection[str] | None,
) -> SourceTable:
    """Returns how a table is read; `key` None takes its primary key.

    Raises:
      TableMissing: there is none, or this account may not read it.
      KeyUnknown, TooManyColumns: as for `layouts.table_layout`.
    """
    names = table.split(".", 1)
    cursor.execute(_COLUMNS, names)
    columns = {str(row[0]): row[1:] for row in cursor.fetchall()}
    if not columns:
        raise TableMissing(f"table {table} does not exist, or this account may not read it.")
    cursor.execute(_PRIMARY, names)
    primary = cursor.fetchall()
    key = [str(name) for name, _ in primary] if key is None else key
    layout = table_layout(table, list(columns), key, wanted)
    parts = [
        KeyPart(str(name), *_type_and_charset(columns[str(name)], part)) for name, part in primary
    ]
    chunked = all(part.type in _ORDERED or part.charset for part in parts)
    return SourceTable(
        layout,
        tuple(_asked(name, *columns[name]) for name in layout.columns),
        tuple(parts) if chunked else (),
    )


def _type_and_charset(column: Sequence, prefix: int | None) -> tuple[str, str]:
    kind = str(column[0]).lower()
    if prefix is not None or kind in ("enum", "set"):
        return "", ""  # Ordered by less than its value, or by the place of its label.
    if kind in _BYTES:
        return kind, charsets.BINARY
    return kind, str(column[2] or "") if kind in TEXTS else ""


def _asked(
    name: str, data_type: str, column_type: str, charset: str, precision: int, scale: int
) -> Asked:
    kind, column = str(data_type).lower(), quote(name)
    zerofill = "zerofill" in str(column_type).lower()
    if kind in INTEGERS:
        expression = f"CAST({column} AS UNSIGNED)" if zerofill else column
        return Asked(name, expression, result_rows.PLAIN)
    if kind == "bit":
        return Asked(name, f"CAST({column} AS UNSIGNED)", result_rows.PLAIN)
    if kind == "decimal":
        whole = f"CAST({column} AS DECIMAL({precision},{scale}))"
        return Asked(name, whole if zerofill else column, result_rows.PLAIN)
    if kind in ("float", "double"):
        # All digits of a FLOAT, which the server prints but six of.
        expression = f"({column} + 0e0)"
        return Asked(name, expression, result_rows.PLAIN, float_size=4 if kind == "float" else 8)
    if kind in _MOMENTS:
        return Asked(name, column, result_rows.PLAIN)
    if kind == "timestamp":
        return Asked(name, column, result_rows.INSTANT)
    if kind in TEXTS:
        reading = charsets.reading(str(charset))
        return Asked(name, column, result_rows.CHARACTERS, reading.mode, reading.codec)
    if kind in _BYTES | _SHAPES:
        return Asked(name, column, result_rows.BYTES)
    if kind in _WIDTHS:
        return Asked(name, f"CAST({column} AS BINARY({_WIDTHS[kind]}))", result_rows.BYTES)
    return Asked(name, column, result_rows.REFUSED)
