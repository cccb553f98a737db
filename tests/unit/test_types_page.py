"""docs/types.md: what every type of every kind of source becomes, as the other tests prove it.

Write it anew with `python -m tests.unit.test_types_page`.
"""

import collections.abc
import pathlib
import unicodedata

import pyarrow as pa

from schemas.tables import Kind
from tests import mariadb_types, postgresql_types
from tests.unit.test_debezium_types import BAD, TYPES
from transforms.harmonise.values import parse
from transforms.parse_text import parse_zone

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "types.md"
HEAD = (
    "# What every type of a source becomes\n\n"
    "Checked and written by `python -m tests.unit.test_types_page`. The texts are proven against"
    " real servers, from log and snapshot alike, by `tests/e2e/test_postgresql_types.py` and"
    " `tests/e2e/test_capture_mariadb.py`, and from recorded bytes and events by"
    " `tests/unit/test_mariadb_cells.py` and `tests/unit/test_debezium_types.py`.\n\n"
    "A value is first read as a text, in the source's own words; the mapping then says of which"
    " kind the canonical column is. The last column shows that value for the kind that fits the"
    " type. **refused** means: under `invalid: refuse` the row becomes a dead letter that names"
    " the column; under `invalid: note` the value is null, with a note, and its text stands in"
    " `remarks`. An event whose encoding is broken, with no text here, refuses its row either way."
    " `nulls:` in a mapping makes texts such as `0000-00-00` null without a word. Times without a"
    " zone are taken as of +08:00, and shown in UTC. Every type's NULL is null.\n"
)
KINDS = (
    (Kind.BOOL, ("boolean", "yes")),
    (Kind.INT, ("smallint", "integer", "bigint", "tinyint", "mediumint", "int", "year", "bit(1")),
    (Kind.DECIMAL, ("numeric", "decimal", "real", "double", "float", "number")),
    (Kind.TIME, ("timestamp", "datetime", "zoned")),
    (Kind.DATE, ("date",)),
)
CONNECT = {
    "io.debezium.time.Date": "date",
    "org.apache.kafka.connect.data.Date": "date",
    "org.apache.kafka.connect.data.Decimal": "decimal",
    "int8": "tinyint",
    "int16": "smallint",
    "int32": "int",
    "int64": "bigint",
}
ZONE = parse_zone("+08:00")
SHOWN = 60


def kind_of(type_: str) -> Kind:
    """The kind of a canonical column that a mapping gives such a column."""
    name = type_.lower()
    if any(word in name for word in ("[]", "range", "duration", "interval")):
        return Kind.TEXT
    for kind, beginnings in KINDS:
        if any(name.startswith(beginning) for beginning in beginnings):
            return kind
    return Kind.TEXT


def canonical(text: str, kind: Kind) -> str:
    """The value in a canonical column, as a client of a store reads it."""
    if kind is Kind.TEXT:
        return "**refused**" if "\0" in text else text
    values, bad = parse(pa.array([text], pa.utf8()), kind, (), ZONE)
    if bad is not None and bad[0]:
        return "**refused**"
    return str(values.cast(pa.utf8())[0].as_py())


def shown(text: str) -> str:
    """A text as a cell of a table: one line, short, nothing invisible."""
    if text.startswith("**"):
        return text
    cell = "".join(
        f"<U+{ord(c):04X}>" if unicodedata.category(c)[0] in "CZ" and c != " " else c for c in text
    )
    if len(cell) > SHOWN:
        cell = f"{cell[: SHOWN // 2]}…"
        cell += f" ({len(text)} characters)"
    bars = cell.replace("|", "\\|")
    return f"`{bars}`" if cell else "(empty)"


def server_rows(cases) -> collections.abc.Iterator[tuple[str, str, str, str, str]]:
    for case in cases:
        kind = kind_of(case.type)
        for value, text in case.values:
            yield case.type[:40], value, text, kind, canonical(text, kind)


def oracle_rows() -> collections.abc.Iterator[tuple[str, str, str, str, str]]:
    for connectors, schema, values in TYPES:
        if "oracle" not in connectors:
            continue
        name = schema.get("name") or schema["type"]
        kind = kind_of(CONNECT.get(name, name.rpartition(".")[2]))
        scale = schema.get("parameters", {}).get("scale")
        label = name + (f" scale {scale}" if scale is not None else "")
        for value, text in values.items():
            if text == BAD:
                yield label, repr(value), None, kind, "**refused**"
            else:
                yield label, repr(value), text, kind, canonical(text, kind)


def page() -> str:
    parts = [HEAD]
    for title, rows in (
        ("PostgreSQL", server_rows(postgresql_types.CASES)),
        ("MariaDB and MySQL", server_rows(mariadb_types.CASES)),
        ("Oracle, by Debezium's events", oracle_rows()),
    ):
        parts.append(f"\n## {title}\n\n| Type | Value | Text | Kind | Canonical value |\n")
        parts.append("|---|---|---|---|---|\n")
        for label, value, text, kind, result in rows:
            cell = "–" if text is None else shown(text)
            cells = (shown(label), shown(value), cell, kind.value, shown(result))
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def test_the_page_is_what_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_kind_and_every_refusal_is_there():
    text = page()
    for title in ("PostgreSQL", "MariaDB", "Oracle"):
        part = text.partition(f"## {title}")[2].partition("\n## ")[0]
        assert part.count("\n| ") > 50
        assert part.count("**refused**") >= 5
        for kind in (Kind.INT, Kind.DECIMAL, Kind.DATE, Kind.TIME, Kind.TEXT):
            assert f"| {kind.value} |" in part, (title, kind)


def test_extremes_by_hand():
    """A few of the page's lines, by what a person expects and not by what is computed."""
    for type_, text, expected in (
        ("bigint", "9223372036854775807", "9223372036854775807"),
        ("BIGINT UNSIGNED", "18446744073709551615", "**refused**"),
        ("numeric", "NaN", "**refused**"),
        ("numeric", "0.0010", "0.001"),
        ("double precision", "1e+15", "1000000000000000"),
        ("date", "0000-00-00", "**refused**"),
        ("date", "9999-12-31", "9999-12-31"),
        ("timestamptz", "10000-01-01 00:00:00+00", "**refused**"),
        ("timestamptz", "2024-01-01 04:00:00.000001+00", "2024-01-01 04:00:00.000001Z"),
        ("DATETIME", "2016-03-05 08:15:00", "2016-03-05 00:15:00.000000Z"),
        ("timestamp", "infinity", "**refused**"),
    ):
        assert canonical(text, kind_of(type_)) == expected, (type_, text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
