"""What a mapping and type hints say of columns whose events come without a schema."""

import dataclasses
import re
from collections.abc import Mapping

from schemas.errors import ConfigError
from schemas.mappings import CampusMapping, Source
from schemas.tables import Kind
from transforms.capture.debezium.encodings import DOUBLE, Encoding

# Of several uses of one column the first of these says how it is read.
_ORDER = (Kind.TIME, Kind.DATE, Kind.DECIMAL, Kind.INT, Kind.BOOL, Kind.TEXT)
_BY_KIND = {
    Kind.TEXT: Encoding("any_text"),
    Kind.INT: Encoding("any_number"),
    Kind.DECIMAL: Encoding("any_number"),
    Kind.BOOL: Encoding("any_bool"),
    Kind.DATE: Encoding("any_date"),
    Kind.TIME: Encoding("any_time"),
}
_UNITS = {"seconds": "s", "millis": "ms", "micros": "us", "nanos": "ns"}
HINTS = {
    "text": Encoding("any_text"),
    "number": Encoding("number"),
    "float": DOUBLE,
    "base64": Encoding("bytes"),
    "hex": Encoding("hex"),
    "days": Encoding("days"),
    **{name: Encoding("instant", unit=unit) for name, unit in _UNITS.items()},
    **{f"{name}_of_day": Encoding("clock", unit=unit) for name, unit in _UNITS.items()},
    "iso": Encoding("iso"),
    "iso_time": Encoding("iso_clock"),
    "zoned": Encoding("zoned"),
    "zoned_time": Encoding("zoned_clock"),
    "json": Encoding("json"),
}
_COUNTED = re.compile(r"(decimal|bits):(\d{1,3})")
UNKNOWN = Encoding("any_text")


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """What the decoder must know of one source table.

    Attributes:
      key: the columns that identify a row, in order.
      columns: those that the mapping reads; a value of another one refuses no row. None: all.
      encodings: how columns are written in events without a schema; others as text.
    """

    key: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    encodings: Mapping[str, Encoding] = dataclasses.field(default_factory=dict)


def encoding_of_hint(hint: str) -> Encoding:
    """Returns the encoding that a hint names: a key of `HINTS`, `decimal:SCALE` or `bits:LENGTH`.

    Raises:
      ConfigError: there is no such hint.
    """
    if hint in HINTS:
        return HINTS[hint]
    if match := _COUNTED.fullmatch(hint):
        count = int(match[2])
        if match[1] == "decimal":
            return Encoding("decimal", scale=count)
        return Encoding("bits", length=count)
    known = ", ".join([*HINTS, "decimal:SCALE", "bits:LENGTH"])
    raise ConfigError(f"`{hint}` is no type hint. Remedy: write one of {known}.")


def table_specs(
    mapping: CampusMapping, hints: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, TableSpec]:
    """Returns the specification of every table of a mapping.

    Args:
      hints: source table to column to hint. Under the table `*` stand hints by canonical kind
        (`time: zoned`, `decimal: number`, `date: days`), for the columns that have no own.

    Raises:
      ConfigError: a hint names no table, column, kind or encoding that there is.
    """
    hints = hints or {}
    by_kind = dict(_BY_KIND)
    for kind, hint in hints.get("*", {}).items():
        if kind not in list(Kind):
            raise ConfigError(
                f"type hint *.{kind}: no such kind. Remedy: one of {', '.join(Kind)}."
            )
        by_kind[Kind(kind)] = encoding_of_hint(hint)
    for table in hints.keys() - mapping.tables.keys() - {"*"}:
        raise ConfigError(f"type hint for {table}: the mapping has no such table. Remedy: map it.")
    return {
        name: _spec(name, source, by_kind, hints.get(name, {}))
        for name, source in mapping.tables.items()
    }


def _spec(
    name: str, source: Source, by_kind: Mapping[Kind, Encoding], hints: Mapping[str, str]
) -> TableSpec:
    for column in hints.keys() - set(source.needed):
        raise ConfigError(
            f"type hint for {name}.{column}: the mapping does not read it. Remedy: remove the hint."
        )
    kinds = _kinds(source)
    encodings = {column: by_kind[kinds.get(column, Kind.TEXT)] for column in source.needed}
    encodings |= {column: encoding_of_hint(hint) for column, hint in hints.items()}
    return TableSpec(tuple(source.id), source.needed, encodings)


def _kinds(source: Source) -> dict[str, Kind]:
    """The kind that each source column is read as."""
    uses: dict[str, set[Kind]] = {column: set() for column in source.needed}
    for column, rule in source.columns.items():
        # A list of codes reads texts, and so does a rule that joins.
        as_text = rule.codes is not None or rule.join is not None
        kind = Kind.TEXT if as_text else source.canonical.by_name[column].kind
        for name in rule.source:
            uses[name].add(kind)
    if source.measurement:
        rule = source.measurement
        for name in (rule.number, rule.low, rule.high):
            if name is not None:
                uses[name].add(Kind.DECIMAL)
    return {
        column: next(kind for kind in _ORDER if kind in kinds or kind is Kind.TEXT)
        for column, kinds in uses.items()
    }
