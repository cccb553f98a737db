"""When the content of a deleted record may leave its table, and what stays for ever."""

import collections.abc

from schemas.conflict_policy import ConflictRules, TablePolicy
from schemas.hlc import us_of
from schemas.siblings import DELETED, ROW, Entry, Record, Stamp
from schemas.versions import VersionVector, covers, next_dot, with_dot
from transforms.conflicts.show import show_group


def may_forget(
    record: Record,
    table: TablePolicy,
    rules: ConflictRules,
    acknowledged: collections.abc.Mapping[str, VersionVector],
    now_us: int,
) -> bool:
    """Whether a record's content may leave its table: its history is kept elsewhere, by law.

    It must be deleted without dispute, for longer than the longest outage; every other store,
    reachable or not, must have seen all that this one has; no source may still have the row.

    Args:
      acknowledged: each other store of the configuration to what it last said that it has seen
        of the record; an empty vector where it said nothing.
    """
    view = show_group(record.entries(ROW), table.deletes, rules)
    if view.conflict or not view.values[DELETED] or set(record.live) == {ROW}:
        return False
    everything = [entry for entries in record.live.values() for entry in entries.values()]
    if any(entry.dot.of_source or entry.base is not None for entry in everything):
        return False
    if not all(covers(vector, record.seen) for vector in acknowledged.values()):
        return False
    deleted_us = max(us_of(entry.stamp.hlc) for entry in view.entries)
    return now_us - deleted_us > rules.longest_outage_us


def forget(record: Record, actor: str, stamp: Stamp) -> Record:
    """Returns the record without its content: a tombstone of some 200 bytes that never goes.

    It is an edit like any other, so stores that forget at different times agree. Were the rest
    dropped, too, a store restored from a backup would bring the record back, and a record that
    is created anew under the same number would begin its count again.
    """
    dot = next_dot(record.seen, actor)
    gone = Entry(dot, stamp, {DELETED: True})
    return Record(with_dot(record.seen, dot), {ROW: {dot: gone}})
