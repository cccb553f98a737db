"""Make versions: an edit of a client, a person's decision, a row of the hospital's own system."""

import collections.abc
import hashlib

from schemas.conflict_policy import (
    ConflictRules,
    Deletes,
    Immutable,
    Owner,
    Policy,
    TablePolicy,
    Union,
)
from schemas.siblings import CONTENT, DELETED, ROW, Entries, Entry, Record, Stamp, Values
from schemas.versions import Dot, canonical_json, next_dot, with_dot
from transforms.conflicts.show import (
    GroupView,
    Sight,
    elements_of,
    joined,
    newer_base,
    newest_base,
    replaced_base,
    show_group,
)

# What the source or others put into such a group only a decision takes out.
_ADDED_TO = (Immutable, Owner, Union)

Seen = collections.abc.Mapping[str, Sight]


def edit_record(
    record: Record,
    actor: str,
    stamp: Stamp,
    changed: Values,
    table: TablePolicy,
    rules: ConflictRules,
    *,
    deleted: bool = False,
    seen: Seen | None = None,
) -> Record:
    """Returns the record after an edit at this store.

    What the edit replaces is what its editor saw: by default what the record shows now. What was
    not shown, because it waits for a person, stays. What an add-only, immutable or owned group
    holds is replaced by a decision only. A record that is deleted begins anew: of its earlier
    life nothing stays but what the source says. (So a store must refuse to save a form over a
    row that was deleted, or created, since the form was opened.)

    Args:
      actor: this store in its present incarnation, which must hold all that it ever wrote to
        the record: ADR 0017 says how a restored copy gets a new one.
      changed: the columns that the edit changes, with their new values; all, if it creates.
      deleted: whether the row is gone after it. Any other edit says that it is there.
      seen: group to what the editor saw, if that was not now: `GroupView.sight` of when the
        form was opened (then `changed` names every column of the group), or for a decision
        (`stamp.decides`) `full_sight`. Groups that are not named are as seen now.
    """
    dot = next_dot(record.seen, actor)
    live = dict(record.live)
    touched = {ROW, *(table.group_of[column] for column in changed)}
    begins = not deleted and is_gone(record, table, rules)
    for group in table.by_group:
        if not begins and group not in touched:
            continue
        policy, entries, before = table.by_group[group], record.entries(group), None
        keeps = isinstance(policy, _ADDED_TO) and not stamp.decides
        if begins:
            before = (newest_base if keeps else replaced_base)(entries.values())
            entries = {old: e for old, e in entries.items() if keeps and old.of_source}
            live[group] = entries
            if group not in touched:
                continue
        view = show_group(entries, policy, rules)
        sight = (not begins and (seen or {}).get(group)) or view.sight
        wanted = {DELETED: deleted} if group == ROW else changed
        values, drops = {c: wanted.get(c, view.values[c]) for c in policy.columns}, ()
        if isinstance(policy, Union) and not begins and not stamp.decides:
            values, drops = _added(view, sight, values, policy)
            if not drops and values[policy.columns[0]] is None:
                continue
        replaced = _replaced(entries, sight, policy, stamp)
        said = None if keeps else sight.source
        base = newer_base(replaced_base(replaced), said, before)
        kept = {old: entry for old, entry in entries.items() if entry not in replaced}
        live[group] = {**kept, dot: Entry(dot, stamp, values, base, drops)}
    return Record(with_dot(record.seen, dot), live)


def is_gone(record: Record, table: TablePolicy, rules: ConflictRules) -> bool:
    """Whether the record was deleted without dispute, or never was."""
    view = show_group(record.entries(ROW), table.deletes, rules)
    return view.values[DELETED] is not False


def source_record(
    dot: Dot,
    stamp: Stamp,
    values: Values,
    table: TablePolicy,
    *,
    deleted: bool = False,
) -> Record:
    """Returns a row of a hospital's own system as a record that has seen its own log only.

    Joined to what a store holds it replaces what the source said before, and competes with the
    edits of the stores, of which the source knows nothing. The same row gives the same record at
    every store, whichever of its earlier versions the store has met.

    Args:
      dot: `schemas.versions.source_dot` of the change. values: every column; none if deleted.
    """
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()[:16]
    live = {ROW: {dot: Entry(dot, stamp, {DELETED: deleted, CONTENT: digest})}}
    for policy in () if deleted else table.groups:
        group = {column: values[column] for column in policy.columns}
        live[policy.group] = {dot: Entry(dot, stamp, group)}
    return Record({dot.actor: dot.counter}, live)


def _replaced(
    entries: Entries, sight: Sight, policy: Policy | Deletes, stamp: Stamp
) -> list[Entry]:
    seen = [entry for entry in entries.values() if _was_seen(entry, sight)]
    if stamp.decides or not isinstance(policy, _ADDED_TO):
        return seen
    stores_own = isinstance(policy, Owner)
    return [entry for entry in seen if stores_own and not entry.dot.of_source]


def _was_seen(entry: Entry, sight: Sight) -> bool:
    """Whether the editor saw it, or a repeat of it: a source repeats whole rows."""
    if entry.dot in sight.dots:
        return True
    repeated = sight.source is not None and entry.values == sight.source.values
    return repeated and entry.dot.of_source


def _added(
    view: GroupView, sight: Sight, values: Values, policy: Union
) -> tuple[Values, tuple[str, ...]]:
    """Returns what a list's new text adds to it, and what it would take out."""
    column = policy.columns[0]
    looked_at, before, after = (
        set(elements_of(each[column], policy)) for each in (sight.values, view.values, values)
    )
    # What others added since the editor looked is not missing from the list by intent.
    drops = (looked_at & before) - after
    if not after & set(policy.none):
        drops -= set(policy.none)  # Whoever names an allergy need not be asked about `none`.
    return {column: joined(after - before, policy)}, tuple(sorted(drops))
