"""Show a record: one value for each group, what lost beside it, and what a person must decide."""

import collections.abc
import dataclasses
import typing

from schemas.conflict_policy import (
    Branches,
    ConflictRules,
    Deletes,
    HoldBoth,
    Immutable,
    Never,
    Newest,
    Owner,
    Policy,
    Rule,
    States,
    TablePolicy,
    Union,
)
from schemas.siblings import DELETED, ROW, Base, Entries, Entry, Record, Value, Values
from schemas.versions import Dot
from transforms.conflicts.judge import Verdict, decide, foremost_first, is_marked

PERSON = "person"
_OWNERLESS = (Rule.EMERGENCY, Rule.ROLE, Rule.TIME)


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Concurrent edits of one group that somebody is told of.

    Attributes:
      group: of the table. rule: what decided, or `person`.
      open: a person must decide. locked: nothing is shown until then.
      alarm, assignee: as the policy says.
      shown: the dot of what is seen meanwhile, or of what the rule chose; None for a list.
      dots: all versions that compete, the foremost first.
      drops: elements that somebody wants out of an add-only list.
    """

    group: str
    rule: str
    open: bool
    locked: bool
    alarm: str
    assignee: str
    shown: Dot | None
    dots: tuple[Dot, ...]
    drops: tuple[str, ...] = ()


class Sight(typing.NamedTuple):
    """What somebody saw of a group when a form was opened: an edit made later replaces that.

    Attributes:
      dots: of the entries. values: as they were shown.
      source: the newest content of the source in it, by which a repeat of it is known.
    """

    dots: frozenset[Dot]
    values: Values
    source: Base | None


@dataclasses.dataclass(frozen=True)
class GroupView:
    """One group as it is shown.

    Attributes:
      values: column to value; null in each column if nobody wrote any.
      rests_on: the entries that an edit of the group replaces whose editor sees this: all, if
        it is settled; else what is shown, so that what waits for a person still waits.
      entries: what competes, the foremost first; repeats of the source are left out.
      conflict: or None.
    """

    values: Values
    rests_on: tuple[Entry, ...]
    entries: tuple[Entry, ...]
    conflict: Conflict | None = None

    @property
    def sight(self) -> Sight:
        """What an editor has seen."""
        return self._sight(self.rests_on)

    @property
    def full_sight(self) -> Sight:
        """What a person has seen before whom all is laid."""
        return self._sight((*self.rests_on, *self.entries))

    def _sight(self, entries: collections.abc.Iterable[Entry]) -> Sight:
        entries = tuple(entries)
        dots = frozenset(entry.dot for entry in entries)
        return Sight(dots, self.values, replaced_base(entries))


@dataclasses.dataclass(frozen=True)
class Shown:
    """A record as it is shown: a function of the record alone, equal at all stores that hold it.

    Attributes:
      values: every column of the table.
      deleted: nothing of it is to be seen, or it never was.
      groups: group to its view, `ROW` among them.
      conflicts: of all groups; of a deleted record, whether it is deleted.
      archived: it is not to be edited, but by a decision.
    """

    values: dict[str, Value]
    deleted: bool
    groups: dict[str, GroupView]
    conflicts: tuple[Conflict, ...]
    archived: bool


def show(record: Record, table: TablePolicy, rules: ConflictRules) -> Shown:
    """Returns what is shown of a record under the policies of its table."""
    groups = {
        group: show_group(record.entries(group), policy, rules)
        for group, policy in table.by_group.items()
    }
    values: dict[str, Value] = {}
    for group, view in groups.items():
        if group != ROW:
            values.update(view.values)
    deleted = groups[ROW].values[DELETED] is not False
    asked = [groups[ROW]] if deleted else groups.values()
    conflicts = tuple(view.conflict for view in asked if view.conflict)
    archived = any(
        isinstance(policy, Branches)
        and policy.archived is not None
        and values[policy.archived.column] in policy.archived.values
        for policy in table.groups
    )
    return Shown(values, deleted, groups, conflicts, archived)


def show_group(entries: Entries, policy: Policy | Deletes, rules: ConflictRules) -> GroupView:
    """Returns what is shown of one group."""
    ranked = sorted(entries.values(), key=lambda e: foremost_first(e, rules), reverse=True)
    if isinstance(policy, Union):
        return _show_union(ranked, policy)
    if not ranked:
        return GroupView(dict.fromkeys(policy.columns), (), ())
    news = _without_echo(ranked) if len(ranked) > 1 else ranked
    first = news[0]
    if all(_same(entry, first) for entry in news):
        return GroupView(_columns(first, policy), tuple(ranked), tuple(news))
    winner, rule = _verdict(news, policy, rules)
    shown = winner or _meanwhile(news, policy)
    locked = winner is None and isinstance(policy, Never) and policy.lock
    rests_on = tuple(ranked)
    if locked:
        rests_on = ()
    elif winner is None:
        rests_on = tuple(e for e in ranked if e not in news or _same(e, shown))
    values = dict.fromkeys(policy.columns) if locked else _columns(shown, policy)
    if winner is not None and (isinstance(policy, Newest) or policy.alarm == "none"):
        return GroupView(values, rests_on, tuple(news))
    conflict = Conflict(
        group=policy.group,
        rule=rule,
        open=winner is None,
        locked=locked,
        alarm=policy.alarm,
        assignee=policy.assignee,
        shown=shown.dot,
        dots=tuple(entry.dot for entry in news),
    )
    return GroupView(values, rests_on, tuple(news), conflict)


def newest_base(entries: collections.abc.Iterable[Entry]) -> Base | None:
    """Returns the newest content of the source that any of the edits has replaced."""
    return newer_base(*(entry.base for entry in entries))


def replaced_base(replaced: collections.abc.Collection[Entry]) -> Base | None:
    """Returns the base of an edit that replaces these."""
    said = [Base(e.dot.counter, e.values) for e in replaced if e.dot.of_source]
    inherited = newest_base(replaced)
    return newer_base(*said, inherited)


def newer_base(*bases: Base | None) -> Base | None:
    """Returns the newest of what the source said."""
    known = [base for base in bases if base is not None]
    return max(known, key=lambda base: base.counter, default=None)


def elements_of(text: Value, policy: Union) -> list[str]:
    """Returns the elements of a list in a text column, each once, in order."""
    if not isinstance(text, str):
        return []
    first = policy.separators[0]
    for other in policy.separators[1:]:
        text = text.replace(other, first)
    return sorted({part.strip() for part in text.split(first)} - {""})


def joined(elements: collections.abc.Iterable[str], policy: Union) -> str | None:
    """Returns elements as the text of their column; None if there are none."""
    return policy.separators[0].join(sorted(elements)) or None


def _without_echo(entries: list[Entry]) -> list[Entry]:
    """Leaves out what the source says again after edits have replaced just that.

    A source does not learn of edits at the stores: whatever changes there, the row comes again
    with the old value of every other column.
    """
    base = newest_base(entries)
    if base is None:
        return entries
    return [e for e in entries if not (e.dot.of_source and e.values == base.values)]


def _same(one: Entry, other: Entry) -> bool:
    if DELETED in one.values:
        return one.values[DELETED] == other.values[DELETED]
    return one.values == other.values


def _columns(entry: Entry, policy: Policy | Deletes) -> Values:
    return {column: entry.values.get(column) for column in policy.columns}


def _verdict(news: list[Entry], policy: Policy | Deletes, rules: ConflictRules) -> Verdict:
    if isinstance(policy, Newest | Branches):
        return decide(news, policy.by, policy, rules)
    if isinstance(policy, Owner):
        owned = [entry for entry in news if entry.dot.of_source]
        return (owned[0], "owner") if owned else decide(news, _OWNERLESS, policy, rules)
    if isinstance(policy, States):
        return _furthest(news, policy)
    if isinstance(policy, Deletes) and policy.rule != PERSON:
        gone = policy.rule == "goes"
        return next(e for e in news if e.values[DELETED] is gone), "deletes"
    return None, PERSON


def _furthest(news: list[Entry], policy: States) -> Verdict:
    """Returns the entry whose state all the others can still become."""
    column = policy.columns[0]
    states = {entry.values[column] for entry in news} - {None}
    for entry in news:
        state = entry.values[column]
        if all(state == other or state in policy.reached.get(other, ()) for other in states):
            return entry, "states"
    return None, PERSON


def _meanwhile(news: list[Entry], policy: Policy | Deletes) -> Entry:
    """Returns what is seen until a person decides."""
    if isinstance(policy, HoldBoth):
        return next((e for e in news if is_marked(e, policy.foremost)), news[0])
    if isinstance(policy, Immutable):
        owned = [entry for entry in news if entry.dot.of_source]
        return owned[0] if owned else min(news, key=lambda e: (e.stamp.hlc, e.dot))
    if isinstance(policy, Deletes):
        return next(e for e in news if e.values[DELETED] is False)
    return news[0]


def _show_union(entries: list[Entry], policy: Union) -> GroupView:
    column = policy.columns[0]
    base = newest_base(entries)
    known = set(elements_of(base.values[column], policy)) if base else set()
    found = set()
    for entry in entries:
        elements = set(elements_of(entry.values[column], policy))
        # A person has dealt with what the source said before: only what it adds is news.
        found |= elements - known if entry.dot.of_source else elements
    positive = found - set(policy.none)
    shown = positive or found
    drops = sorted({drop for entry in entries for drop in entry.drops} & shown)
    conflict = None
    if drops or (positive and positive != found):
        conflict = Conflict(
            group=policy.group,
            rule=PERSON if drops else "union",
            open=bool(drops),
            locked=False,
            alarm=policy.alarm,
            assignee=policy.assignee,
            shown=None,
            dots=tuple(entry.dot for entry in entries),
            drops=tuple(drops),
        )
    values = {column: joined(shown, policy)}
    return GroupView(values, tuple(entries), tuple(entries), conflict)
