"""Campus C's tables as campus_c.sql declares them to an Oracle, and as PostgreSQL holds them."""

import functools
import pathlib
import re
import typing

from runners.embedded.campus_c import SCHEMA

_TABLE = re.compile(r"CREATE TABLE (\w+) \((.*?)\);", re.DOTALL)
_PARTS = re.compile(r",\s*(?![^()]*\))")  # Commas outside of brackets.
_KEY = re.compile(r"PRIMARY KEY \((.*)\)")
_COLUMN = re.compile(r"(\w+) (\w+)(?:\((\d+)(?:,\s*(\d+))?\))?( PRIMARY KEY)?")


class OracleType(typing.NamedTuple):
    """A column's type: VARCHAR2, NUMBER, DATE or CLOB, with length or precision and scale."""

    name: str
    length: int = 0
    scale: int = 0

    @property
    def in_postgresql(self) -> str:
        """The type that holds the same values. An Oracle's DATE has a time, to the second."""
        match self.name:
            case "VARCHAR2":
                return f"varchar({self.length})"
            case "NUMBER":
                return f"numeric({self.length}, {self.scale})"
            case "DATE":
                return "timestamp(0)"
        return "text"


class OracleTable(typing.NamedTuple):
    """A table: its columns in order, and the names of its key's."""

    name: str
    columns: dict[str, OracleType]
    key: tuple[str, ...]


@functools.cache
def oracle_tables() -> dict[str, OracleTable]:
    """Returns the tables of campus_c.sql by name."""
    path = pathlib.Path(__file__).with_name("campus_c.sql")
    text = re.sub(r"--.*", "", path.read_text(encoding="utf-8"))
    found = {}
    for name, body in _TABLE.findall(text):
        columns, key = {}, ()
        for part in _PARTS.split(body):
            if match := _KEY.fullmatch(part.strip()):
                key = tuple(match[1].split(", "))
                continue
            column, kind, length, scale, alone = _COLUMN.fullmatch(part.strip()).groups()
            columns[column] = OracleType(kind, int(length or 0), int(scale or 0))
            key = (column,) if alone else key
        found[name] = OracleTable(name, columns, key)
    return found


def postgresql_script() -> str:
    """Returns what makes the tables in a PostgreSQL, under their own names in capitals."""
    statements = [f'CREATE SCHEMA "{SCHEMA}";']
    for table in oracle_tables().values():
        parts = [f'"{name}" {kind.in_postgresql}' for name, kind in table.columns.items()]
        key = ", ".join(f'"{name}"' for name in table.key)
        parts.append(f"PRIMARY KEY ({key})")
        statements.append(f'CREATE TABLE "{SCHEMA}"."{table.name}" ({", ".join(parts)});')
    return "\n".join(statements)


def hints() -> dict[str, dict[str, str]]:
    """Returns the type hints for campuses.yaml: what events without a schema do not tell.

    Every DATE comes as milliseconds; a NUMBER with decimals as the base64 of its digits.
    """
    found = {"*": {"time": "millis", "date": "millis"}}
    for table in oracle_tables().values():
        scaled = {
            name: f"decimal:{kind.scale}" for name, kind in table.columns.items() if kind.scale
        }
        if scaled:
            found[f"{SCHEMA}.{table.name}"] = scaled
    return found
