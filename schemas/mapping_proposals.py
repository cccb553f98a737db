"""Propose how a mapping follows a source whose table has changed: a line of YAML to paste."""

import difflib
import re
import typing
from collections.abc import Mapping, Sequence

import yaml

from schemas.tables import Kind

if typing.TYPE_CHECKING:
    from schemas.mappings import Source

_LIKE = 0.6  # Of names, from 0 to 1.
_ALONE = 0.5  # Enough where nothing else has a type that fits.
# The first word of a type's name, in any database, to what its values can become.
_TYPES = (
    (r"(small|big|medium|tiny)?(int|serial)", {Kind.INT, Kind.DECIMAL}),
    (r"numeric|decimal|number|real|double|float|money", {Kind.DECIMAL, Kind.INT}),
    (r"bool", {Kind.BOOL}),
    (r"bit", {Kind.BOOL, Kind.INT}),
    (r"date(?!time)", {Kind.DATE, Kind.TIME}),
    (r"timestamp|datetime", {Kind.TIME, Kind.DATE}),
)


def successor(column: str, kinds: set[Kind], fresh: Mapping[str, str]) -> str:
    """Returns the column that most likely took the place of one that is gone, "" if none did.

    Args:
      column: its name. kinds: what the mapping makes of its values.
      fresh: columns that the mapping does not know yet, to their types; "" for an unknown type.
    """
    fits = {name: _fits(kind, kinds) for name, kind in fresh.items()}
    likeness = {name: _likeness(column, name) for name in fits if fits[name] is not False}
    certain = [name for name in fits if fits[name]] or list(likeness)
    if not likeness:
        return ""
    best = max(sorted(likeness), key=likeness.get)
    return best if likeness[best] >= (_ALONE if certain == [best] else _LIKE) else ""


def proposal(name: str, source: "Source", column: str, fresh: Mapping[str, str]) -> str:
    """Returns what to write in the mapping of a source table that lacks a column.

    One line for each place that names it, under `tables: {name}:`; text alone, no remedy.
    """
    targets = [c for c, rule in source.columns.items() if column in rule.source]
    kinds = {source.canonical.by_name[target].kind for target in targets}
    new = successor(column, kinds, fresh)
    if new:
        lines = list(_renamed(source, column, new, targets))
        return f"write under tables: {name}: " + "; ".join(lines)
    if targets and not _needed_elsewhere(source, column):
        absent = [*source.absent, *targets]
        return (
            f"if it is gone for good, take {', '.join(targets)} out of columns: and write under "
            f"tables: {name}: {_line({'absent': absent})}"
        )
    return "no new column is like it: restore it in the source"


def _renamed(source: "Source", old: str, new: str, targets: Sequence[str]):
    """Yields a line for each place of the mapping that names a column."""

    def swap(names: Sequence[str]) -> str | list[str]:
        found = [new if name == old else name for name in names]
        return found[0] if len(found) == 1 else found

    if old in source.id:
        yield _line({"id": swap(source.id)})
    for target in targets:
        rule = source.columns[target].model_dump(by_alias=True, exclude_defaults=True, mode="json")
        rule["from"] = swap(source.columns[target].source)
        short = rule["from"] if len(rule) == 1 else rule
        yield f"columns: {_line({target: short})}"
    if source.measurement and old in source.measurement.source:
        rule = source.measurement.model_dump(exclude_defaults=True, mode="json")
        names = {key: new if value == old else value for key, value in rule.items()}
        yield _line({"measurement": names})
    if any(flag.column == old for flag in source.deleted_when):
        flags = [flag.model_dump(mode="json") for flag in source.deleted_when]
        yield _line(
            {"deleted_when": [f | {"column": new} if f["column"] == old else f for f in flags]}
        )
    if source.parent and old in source.parent.by:
        yield _line({"parent": {"table": source.parent.table, "by": swap(source.parent.by)}})


def _needed_elsewhere(source: "Source", column: str) -> bool:
    measured = source.measurement.source if source.measurement else ()
    flags = [flag.column for flag in source.deleted_when]
    parents = source.parent.by if source.parent else ()
    return column in (*source.id, *measured, *flags, *parents)


def _line(content: dict) -> str:
    text = yaml.safe_dump(content, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip()[1:-1]


def _fits(type_name: str, kinds: set[Kind]) -> bool | None:
    """Whether values of a type can be what is wanted; None: nobody knows, as of a text."""
    if not type_name or not kinds or Kind.TEXT in kinds:
        return None
    for pattern, able in _TYPES:
        if re.match(pattern, type_name.lower()):
            return bool(kinds & able)
    return None


def _likeness(one: str, other: str) -> float:
    """How alike two names are, from 0 to 1; one that holds the other whole is very much so."""
    one, other = (re.sub(r"[\s_]", "", name.casefold()) for name in (one, other))
    if min(len(one), len(other)) >= 3 and (one in other or other in one):
        return 0.9
    return difflib.SequenceMatcher(None, one, other).ratio()
