"""Conflicts of one store: list them, lay their versions side by side, write a person's decision."""

import collections.abc
import dataclasses
import datetime
import json

import psycopg

from schemas.batches import Lane
from schemas.config import Config
from schemas.conflict_policy import ALL_TABLES, ConflictRules, Deletes, Policy, Union
from schemas.errors import CampusSyncError, ConfigError
from schemas.siblings import DELETED, ROW, Entry, Record, Stamp, Value, entries_of
from schemas.versions import Dot
from transforms.conflicts.edit import edit_record
from transforms.conflicts.show import Conflict, show
from transforms.deliver.edits.exchange_records import connect
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.record_keys import Key

_LIST = """\
SELECT id, table_name, campus, record_id, group_name, rule, alarm, assignee, versions, state,
    opened_at FROM sync.conflict WHERE state = 'open' OR %s AND state = 'settled'
ORDER BY state, array_position(ARRAY['emergency', 'alarm', 'notice', 'none'], alarm), opened_at"""
_HISTORY = """\
SELECT edit FROM sync.version WHERE (record_id, table_name, campus) = (%s, %s, %s)
    AND edit -> 'wrote' ? %s ORDER BY (edit ->> 'hlc')::bigint, actor, counter"""
_CANONICAL = "SELECT to_jsonb(t) FROM jsonb_populate_record(NULL::consult.{}, %s) AS t"
_STAMP = "SELECT sync.tick(), name || '.' || sync.incarnation(), distrusted FROM sync.store"


@dataclasses.dataclass(frozen=True)
class Noted:
    """A conflict as a store's list has it, without content.

    Attributes:
      conflict_id: the same at every store. state: `open`, or `settled` by a rule.
      assignee: who is asked: a role or an office.
    """

    conflict_id: str
    key: Key
    group: str
    rule: str
    alarm: str
    assignee: str
    versions: int
    state: str
    opened_at: datetime.datetime


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """A conflict with its content: never for a log.

    Attributes:
      versions: that compete, the foremost first. shown: the number (from 1) of the one that is
        seen meanwhile, 0 for none. values: of the group, as they are seen now.
      history: every version ever met of the group, the oldest first.
      drops: what somebody wants out of a list.
    """

    noted: Noted
    versions: tuple[Entry, ...]
    shown: int
    values: collections.abc.Mapping[str, Value]
    history: tuple[Entry, ...]
    drops: tuple[str, ...]


def open_at(config: Config, store: str) -> psycopg.Connection:
    """Returns a connection to a store.

    Raises:
      ConfigError: there is no such store.
      CampusSyncError: it cannot be reached, or was never opened for edits.
    """
    if store not in config.stores:
        raise ConfigError(f"no store {store}. Remedy: one of {', '.join(config.stores)}.")
    try:
        conn = connect(config.stores[store].dsn)
    except psycopg.OperationalError:
        raise CampusSyncError(f"store {store} cannot be reached") from None
    if conn.execute("SELECT to_regclass('sync.conflict')").fetchone()[0] is None:
        conn.close()
        raise CampusSyncError(f"store {store} is of an older version. Remedy: start `run` once.")
    return conn


def noted(conn: psycopg.Connection, settled: bool = False) -> list[Noted]:
    """Returns the open conflicts of a store, the loudest first; with what rules `settled`."""
    rows = conn.execute(_LIST, (settled,)).fetchall()
    return [
        Noted(name, Key(table, campus, record_id), *rest)
        for name, table, campus, record_id, *rest in rows
    ]


def chosen(found: list[Noted], wanted: collections.abc.Sequence[str]) -> list[Noted]:
    """Returns the conflicts whose ids begin so.

    Raises:
      ConfigError: one of `wanted` names none, or several.
    """
    picked = []
    for beginning in wanted:
        some = [one for one in found if one.conflict_id.startswith(beginning)]
        if len(some) != 1:
            what = "no conflict" if not some else f"{len(some)} conflicts"
            raise ConfigError(
                f"{beginning}: {what}. Remedy: give ids from `conflicts list`, long enough."
            )
        picked += some
    return picked


def lay_out(conn: psycopg.Connection, one: Noted, rules: ConflictRules) -> LaidOut | None:
    """Returns a conflict with all its versions; None if it is one no more."""
    record = Records(conn, rules).read(one.key)
    conflict = _conflict(record, one, rules)
    if conflict is None:
        return None
    view = show(record, rules.tables[one.key.table], rules).groups[one.group]
    entries = record.entries(one.group)
    place = (one.key.record_id, one.key.table, one.key.campus, one.group)
    history = [entries_of(edit)[one.group] for (edit,) in conn.execute(_HISTORY, place)]
    return LaidOut(
        noted=one,
        versions=tuple(entries[dot] for dot in conflict.dots),
        shown=conflict.dots.index(conflict.shown) + 1 if conflict.shown in conflict.dots else 0,
        values=view.values,
        history=tuple(history),
        drops=conflict.drops,
    )


def resolve(
    conn: psycopg.Connection,
    one: Noted,
    rules: ConflictRules,
    who: tuple[str, str, str],
    choose: int | None,
    given: collections.abc.Mapping[str, str],
) -> None:
    """Writes a person's decision as an edit that has seen every version of the group.

    Args:
      who: staff number, role, reason. choose: a version's number in `lay_out`; or `given`:
        column to value as text, the group's other columns as they are seen now.

    Raises:
      ConfigError: it is no conflict any more, or the decision does not fit it.
    """
    editor, role, why = who
    if role not in rules.roles:
        raise ConfigError(f"`{role}` is no role. Remedy: one of {', '.join(rules.roles)}.")
    table = rules.tables[one.key.table]
    records = Records(conn, rules)
    with conn.transaction():
        hlc, actor, distrusted = conn.execute(_STAMP).fetchone()
        stamp = Stamp(hlc, Lane.ROUTINE, role, editor, True, why, tuple(sorted(distrusted)))

        def decide(_: Key, record: Record) -> Record:
            conflict = _conflict(record, one, rules)
            if conflict is None:
                raise ConfigError(f"conflict {one.conflict_id} was settled meanwhile.")
            view = show(record, table, rules).groups[one.group]
            policy = table.by_group[one.group]
            entries = record.entries(one.group)
            if choose is not None:
                values = dict(_version(conflict, entries, choose, policy).values)
            else:
                values = dict(view.values) | _canonical(conn, one, policy, given)
            deleted = bool(values.get(DELETED)) if one.group == ROW else False
            changed = {} if one.group == ROW else {c: values[c] for c in policy.columns}
            seen = {one.group: view.full_sight}
            return edit_record(
                record, actor, stamp, changed, table, rules, deleted=deleted, seen=seen
            )

        records.update([one.key], decide)


def _version(
    conflict: Conflict,
    entries: collections.abc.Mapping[Dot, Entry],
    choose: int,
    policy: Policy | Deletes,
) -> Entry:
    if isinstance(policy, Union):
        raise ConfigError("a list is decided by --set COLUMN=VALUE, which says all its elements.")
    if not 1 <= choose <= len(conflict.dots):
        raise ConfigError(f"--choose {choose}: it has versions 1 to {len(conflict.dots)}.")
    return entries[conflict.dots[choose - 1]]


def _canonical(
    conn: psycopg.Connection,
    one: Noted,
    policy: Policy | Deletes,
    given: collections.abc.Mapping[str, str],
) -> dict[str, Value]:
    for column in given:
        if column not in policy.columns:
            known = ", ".join(policy.columns)
            raise ConfigError(f"--set {column}: not in this conflict. Remedy: one of {known}.")
    if one.group == ROW:
        return {DELETED: given[DELETED] in ("true", "t", "yes", "1")}
    query = _CANONICAL.format(ALL_TABLES[one.key.table].name).encode()
    try:
        (row,) = conn.execute(query, (json.dumps(dict(given)),)).fetchone()
    except psycopg.DataError:
        raise ConfigError("--set: a value is not of its column's type.") from None
    return {column: row[column] for column in given}


def _conflict(record: Record, one: Noted, rules: ConflictRules) -> Conflict | None:
    found = show(record, rules.tables[one.key.table], rules).conflicts
    return next((conflict for conflict in found if conflict.group == one.group), None)
