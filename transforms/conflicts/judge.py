"""Decide between concurrent entries by the rules, in their order; or say that a person must."""

import collections.abc

from schemas.batches import Lane
from schemas.conflict_policy import Branches, ConflictRules, Marked, Policy, Rule
from schemas.hlc import us_of
from schemas.siblings import Entry

Verdict = tuple[Entry | None, str]  # The winner, or None: a person; and the rule that decided.


def is_marked(entry: Entry, mark: Marked | None) -> bool:
    """Whether the entry's values are as `mark` says."""
    return mark is not None and entry.values.get(mark.column) in mark.values


def foremost_first(entry: Entry, rules: ConflictRules) -> tuple:
    """Returns a key by which entries stand in one order at every store; the greatest is foremost.

    What is seen while a person has yet to decide, and the order in which versions are listed.
    """
    stamp = entry.stamp
    return (stamp.lane is Lane.EMERGENCY, rules.ranks.get(stamp.role, 0), stamp.hlc, entry.dot)


def decide(
    entries: collections.abc.Collection[Entry],
    by: collections.abc.Collection[Rule],
    policy: Policy,
    rules: ConflictRules,
) -> Verdict:
    """Returns the entry that beats each of the others, and the last rule that was needed.

    Each pair is settled by the first of the rules `by` that tells the two apart. Entries with
    the same content do not compete. A function of the set alone: not of the order of arrival.
    """
    archived = policy.archived if isinstance(policy, Branches) else None
    for one in entries:
        used = []
        for other in entries:
            if other is one or other.values == one.values:
                continue
            beats, rule = _beats(one, other, by, archived, rules)
            if not beats:
                break
            used.append(rule)
        else:
            equals = [entry for entry in entries if entry.values == one.values]
            best = max(equals, key=lambda entry: foremost_first(entry, rules))
            return best, str(max(used, key=list(Rule).index, default="agreed"))
    return None, "person"


def _beats(
    one: Entry,
    other: Entry,
    by: collections.abc.Collection[Rule],
    archived: Marked | None,
    rules: ConflictRules,
) -> tuple[bool, Rule | None]:
    """Returns whether a rule puts `one` above `other`, and which."""
    a, b = one.stamp, other.stamp
    if Rule.ARCHIVED in by and is_marked(one, archived) != is_marked(other, archived):
        return is_marked(one, archived), Rule.ARCHIVED
    if Rule.EMERGENCY in by and a.lane != b.lane:
        urgent, routine = (a, b) if a.lane is Lane.EMERGENCY else (b, a)
        if (urgent.role, routine.role) in rules.undecided:
            return False, None
        return urgent is a, Rule.EMERGENCY
    if Rule.ROLE in by:
        rank, other_rank = rules.ranks.get(a.role, 0), rules.ranks.get(b.role, 0)
        if rank != other_rank:
            return rank > other_rank, Rule.ROLE
    if Rule.TIME in by and not _clocks_disagree(one, other):
        gap_us = us_of(a.hlc) - us_of(b.hlc)
        later = one if gap_us > 0 else other
        # A source stamps its row, not each value: this one may be older than its stamp.
        if abs(gap_us) > rules.skew_bound_us and not later.dot.of_source:
            return later is one, Rule.TIME
    return False, None


def _clocks_disagree(one: Entry, other: Entry) -> bool:
    return other.dot.actor in one.stamp.distrusted or one.dot.actor in other.stamp.distrusted
