"""A record with its versions: what each edit wrote, in which group of columns, having seen what.

The columns of a table are parted into groups (`schemas.conflict_policy`); each group holds the
edits that no later edit has replaced: one, or siblings. `ROW` is a group of its own and says
whether the row is there.
"""

import collections.abc
import json
import typing

from schemas.batches import Lane
from schemas.errors import WireFormatError
from schemas.versions import EMPTY, Dot, VersionVector, canonical_json, checked_vector

ROW = "row"  # The group that says whether the record is there.
DELETED = "deleted"  # Its column.
CONTENT = "content"  # In a source's entry of it: the row's digest, so that a repeat is known.

# Text, whole number, truth or null; decimals and times as their canonical text.
Value = str | int | bool | None
Values = collections.abc.Mapping[str, Value]


class Stamp(typing.NamedTuple):
    """Who made an edit, when and why.

    Attributes:
      hlc: hybrid logical clock. lane: of the editor's session.
      role: one of `ConflictRules.roles`, or "" where it is not known. editor: staff number.
      decides: a person settled a conflict by it. reason: in words, where one was asked for.
      distrusted: actors whose clocks the editor's store does not trust.
    """

    hlc: int
    lane: Lane
    role: str
    editor: str
    decides: bool = False
    reason: str = ""
    distrusted: tuple[str, ...] = ()


class Base(typing.NamedTuple):
    """What the source said when edits replaced it: the same said again is nothing new."""

    counter: int
    values: Values


class Entry(typing.NamedTuple):
    """What one edit wrote in one group. Never changes; losing ones stay readable.

    Attributes:
      values: every column of the group; in an add-only group what was added.
      base: the newest source's content among what the edit and those before it replaced.
      drops: elements that the editor took out of an add-only group: a person must agree.
    """

    dot: Dot
    stamp: Stamp
    values: Values
    base: Base | None = None
    drops: tuple[str, ...] = ()


Entries = collections.abc.Mapping[Dot, Entry]


class Record(typing.NamedTuple):
    """A record as one store holds it; also what stores send each other.

    Attributes:
      seen: all edits that went into it. An edit that is seen and not in `live` was replaced.
      live: group to the entries that nothing has replaced.
    """

    seen: VersionVector = EMPTY
    live: collections.abc.Mapping[str, Entries] = EMPTY

    def entries(self, group: str) -> Entries:
        """Returns the entries of a group."""
        return self.live.get(group, EMPTY)


UNSEEN = Record()


def record_to_plain(record: Record) -> dict[str, object]:
    """Returns a record as what JSON can hold: what is seen, and its live entries by edit."""
    wrote = [(group, entry) for group, some in record.live.items() for entry in some.values()]
    return {"seen": dict(record.seen), "edits": edits_to_plain(wrote)}


def record_to_json(record: Record) -> str:
    """Returns the canonical text of a record (as jsonb prints it): equal for equal records."""
    return canonical_json(record_to_plain(record))


def record_from_json(text: str) -> Record:
    """Returns the record of such a text.

    Raises:
      WireFormatError: it is none.
    """
    try:
        found = json.loads(text)
        live: dict[str, dict[Dot, Entry]] = {}
        for edit in found["edits"]:
            for group, entry in entries_of(edit).items():
                live.setdefault(group, {})[entry.dot] = entry
        return Record(checked_vector(found["seen"]), live)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise WireFormatError from None


def edits_to_plain(
    wrote: collections.abc.Iterable[tuple[str, Entry]],
) -> list[dict[str, typing.Any]]:
    """Returns entries, given with their groups, as what JSON can hold: once for each edit, by dot.

    What most edits have not (`decides`, `reason`, `distrusted`, `base`, `drops`) is left out.
    """
    edits: dict[tuple[Dot, Stamp], dict[str, dict]] = {}
    for group, entry in wrote:
        edits.setdefault((entry.dot, entry.stamp), {})[group] = _written(entry)
    return [
        {"dot": list(dot), **_said(stamp), "wrote": edits[dot, stamp]}
        for dot, stamp in sorted(edits)
    ]


def entries_of(plain: collections.abc.Mapping[str, typing.Any]) -> dict[str, Entry]:
    """Returns what one such edit wrote, by group; KeyError, TypeError or ValueError: it is none."""
    dot = Dot(*plain["dot"])
    stamp = Stamp(
        plain["hlc"],
        Lane(plain["lane"]),
        plain["role"],
        plain["editor"],
        plain.get("decides", False),
        plain.get("reason", ""),
        tuple(plain.get("distrusted", ())),
    )
    return {
        group: Entry(
            dot,
            stamp,
            one["values"],
            Base(one["base"][0], one["base"][1]) if "base" in one else None,
            tuple(one.get("drops", ())),
        )
        for group, one in plain["wrote"].items()
    }


def _said(stamp: Stamp) -> dict[str, object]:
    always = {name: getattr(stamp, name) for name in ("hlc", "lane", "role", "editor")}
    rare = {name: getattr(stamp, name) for name in ("decides", "reason", "distrusted")}
    return always | {name: value for name, value in rare.items() if value}


def _written(entry: Entry) -> dict[str, object]:
    plain: dict[str, object] = {"values": dict(entry.values)}
    if entry.base is not None:
        plain["base"] = [entry.base.counter, dict(entry.base.values)]
    if entry.drops:
        plain["drops"] = list(entry.drops)
    return plain
