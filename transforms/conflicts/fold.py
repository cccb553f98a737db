"""Take edits that clients made to a stored row into its record, as each of them saw it."""

import collections.abc
import typing

from schemas.conflict_policy import ConflictRules, TablePolicy
from schemas.siblings import ROW, Entry, Record, Stamp, Value, Values
from schemas.versions import Dot
from transforms.conflicts.edit import edit_record
from transforms.conflicts.show import Sight, replaced_base

Met = list[tuple[str, Entry]]  # Entries with their groups, for the history.


class EditApart(Exception):
    """An edit changed another version than its record has: the store's versions are not whole."""


class PendingEdit(typing.NamedTuple):
    """What a trigger noted of one edit.

    Attributes:
      actor: the store in its incarnation of then.
      before, after: the row's columns; None where there was none, or is none.
      version: what the row said that it had seen; nothing before its first version.
    """

    actor: str
    stamp: Stamp
    deleted: bool
    before: Values | None
    after: Values | None
    version: collections.abc.Mapping[str, int] | None = None


def fold_edits(
    record: Record,
    edits: collections.abc.Iterable[PendingEdit],
    table: TablePolicy,
    rules: ConflictRules,
) -> tuple[Record, Met]:
    """Returns the record after edits that nothing else came between, and what each wrote.

    The first editor saw what the record shows. A later one saw, where an earlier of these had
    written, what that one wrote and nothing else: that alone is replaced, since the row did not
    show yet what the record makes of it.

    Raises:
      EditApart: the row that an edit changed showed neither the record nor one of these edits.
    """
    met: Met = []
    shown = [record.seen]
    looked: dict[str, Sight] = {}
    for edit in edits:
        if edit.version and edit.version not in shown:
            raise EditApart
        changed = _changed(edit, table)
        touched = {ROW, *(table.group_of[column] for column in changed)}
        seen = {group: sight for group, sight in looked.items() if group in touched}
        record = edit_record(
            record,
            edit.actor,
            edit.stamp,
            changed,
            table,
            rules,
            deleted=edit.deleted,
            seen=seen,
        )
        shown.append(record.seen)
        dot = Dot(edit.actor, record.seen[edit.actor])
        wrote = [(group, e[dot]) for group, e in record.live.items() if dot in e]
        met += wrote
        for group, entry in wrote:
            values = entry.values if group == ROW else _of_group(changed, group, table)
            looked[group] = Sight(frozenset([dot]), values, replaced_base([entry]))
    return record, met


def _changed(edit: PendingEdit, table: TablePolicy) -> dict[str, Value]:
    """Returns every column of the groups that the edit changes; of all, if it creates."""
    if edit.deleted or edit.after is None:
        return {}
    before, after = edit.before, edit.after
    groups = {
        group
        for column, group in table.group_of.items()
        if before is None or before.get(column) != after.get(column)
    }
    return {column: after.get(column) for column, g in table.group_of.items() if g in groups}


def _of_group(changed: Values, group: str, table: TablePolicy) -> Values:
    return {column: changed.get(column) for column in table.by_group[group].columns}
