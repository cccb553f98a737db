"""Hold records in a consult store: locked, client's edits folded in, changed, shown, counted."""

import collections
import collections.abc
import hashlib
import itertools
import json
import typing

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import (
    ALL_TABLES,
    ConflictRules,
    Immutable,
    Never,
    Owner,
    TablePolicy,
)
from schemas.hlc import HybridClock
from schemas.siblings import (
    CONTENT,
    DELETED,
    ROW,
    UNSEEN,
    Record,
    Stamp,
    edits_to_plain,
    record_from_json,
    record_to_plain,
)
from schemas.versions import SOURCE_MARK, Dot, canonical_json
from transforms.conflicts.fold import DotTaken, Met, PendingEdit, fold_edits
from transforms.conflicts.show import Shown, show
from transforms.conflicts.stored_rows import put_digests, record_of_row, row_of
from transforms.deliver.edits.edit_schema import OWN_SESSION
from transforms.deliver.store_schema import quoted

SESSION = f"""\
SET default_transaction_isolation = 'read committed'; SET TimeZone = 'UTC'; {OWN_SESSION};
-- Shorter than PostgreSQL's look for deadlocks: we give way to a client, never it to us.
SET lock_timeout = '700ms'; SET idle_in_transaction_session_timeout = '60s';
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
-- Records are looked for by key, also before the first ANALYZE.
SET jit = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off;
SET enable_material = off; SET enable_memoize = off; SET work_mem = '32MB'"""
# Kinds of incidents.
CONFLICT, SKEW, APART = "conflict", "clock_distrusted", "edit_apart"
# Somebody else was at the same records, or a link has just brought one of them.
PASSING = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
)
_LOUD = ("alarm", "emergency")


def same_key(one: str, other: str) -> str:
    """Returns SQL: whether two aliases name one record, looked for in `one`'s primary key.

    All but the number is hidden from the planner: to it few tables and campuses look, before the
    first ANALYZE and in indexes that begin with them, as if they led to a single record.
    """
    return (
        f"{one}.record_id = {other}.record_id AND {one}.table_name || '' = {other}.table_name"
        f" AND {one}.campus || '' = {other}.campus"
    )


def values_of(row: str, columns: collections.abc.Iterable[str]) -> str:
    """Returns SQL: columns of a jsonb `row` as an object of their own."""
    pairs = ", ".join(f"'{column}', {row} -> '{column}'" for column in columns)
    return f"jsonb_build_object({pairs})"


def source_edit(table: TablePolicy, row: str, content: str, campus: str, hlc: str, at: str) -> str:
    """Returns SQL: a source's row as the edit that `transforms.conflicts.edit.source_record` makes.

    Args:
      row: jsonb with every column; content: just these. campus, hlc: its stamp; at: its count.
        The role is the parameter `source_role`.
    """
    wrote = ", ".join(
        f"'{group.group}', jsonb_build_object('values', {values_of(row, group.columns)})"
        for group in table.groups
    )
    actor = f"'{SOURCE_MARK}' || {campus}"
    return (
        f"jsonb_build_object('hlc', {hlc}, 'lane', '{Lane.ROUTINE.value}',"
        f" 'role', %(source_role)s::text, 'editor', {actor},"
        f" 'dot', jsonb_build_array({actor}, {at}), 'wrote', jsonb_build_object('{ROW}',"
        f" jsonb_build_object('values', jsonb_build_object('{DELETED}', false, '{CONTENT}',"
        f" substr(encode(sha256(convert_to(({content})::text, 'UTF8')), 'hex'), 1, 16))), {wrote}))"
    )


_KEYS = "unnest(%(ids)s::text[], %(tables)s::text[], %(campuses)s::text[])"
_MATCH = same_key("r", "k")
_ROWS = """\
SELECT t.record_id, t.campus, {what} FROM unnest(%(ids)s::text[], %(campuses)s::text[])
    AS k(record_id, campus)
JOIN consult.{table} AS t ON t.record_id = k.record_id AND t.campus = k.campus
ORDER BY t.record_id, t.campus {lock}"""
_RECORDS = (
    "SELECT r.record_id, r.table_name, r.campus, {what} FROM "
    + _KEYS
    + " AS k(record_id, table_name, campus) JOIN sync.record AS r ON "
    + _MATCH
    + " ORDER BY r.record_id, r.table_name, r.campus {lock}"
)
_EDITS = (
    "SELECT r.record_id, r.table_name, r.campus, r.id, r.op, r.actor, r.counter, r.hlc, r.lane,"
    " r.role, r.editor, r.reason, r.distrusted, r.before, r.after FROM "
    + _KEYS
    + " AS k(record_id, table_name, campus) JOIN sync.edit AS r ON "
    + _MATCH
    + " ORDER BY r.id"
)
_HISTORY = """\
INSERT INTO sync.version (record_id, table_name, campus, actor, counter, edit)
SELECT record_id, table_name, campus, edit -> 'dot' ->> 0, (edit -> 'dot' ->> 1)::numeric, edit
FROM json_to_recordset(%s) AS v(record_id text, table_name text, campus text, edit jsonb)
ON CONFLICT DO NOTHING"""
_PUT_RECORDS = """\
INSERT INTO sync.record AS r (record_id, table_name, campus, src_table, seen, record, change,
    urgent)
SELECT * FROM json_to_recordset(%s) AS v(record_id text, table_name text, campus text,
    src_table text, seen jsonb, record jsonb, change bigint, urgent boolean)
ON CONFLICT (record_id, table_name, campus) DO UPDATE
SET src_table = excluded.src_table, seen = excluded.seen, record = excluded.record,
    change = excluded.change, urgent = excluded.urgent"""
# One lock for all who change records, from here to the commit: whoever reads up to a change has
# read every change before it. Clients never take it.
_COUNT = "UPDATE sync.store SET change = change + %s RETURNING change - %s"
_CLOCK = """\
SELECT name, sync.wall_us(), (SELECT last_value FROM sync.hlc), distrusted,
    name || '.' || sync.incarnation() FROM sync.store"""
_ADOPT = "SELECT setval('sync.hlc', %(stamp)s) FROM sync.hlc WHERE last_value < %(stamp)s"
_CONFLICTS = """\
INSERT INTO sync.conflict AS c (id, record_id, table_name, campus, group_name, rule, alarm,
    assignee, versions, state)
SELECT * FROM json_to_recordset(%s) AS v(id text, record_id text, table_name text, campus text,
    group_name text, rule text, alarm text, assignee text, versions integer, state text)
ON CONFLICT (id) DO UPDATE SET rule = excluded.rule, alarm = excluded.alarm,
    assignee = excluded.assignee, versions = excluded.versions, state = excluded.state,
    opened_at = CASE WHEN c.state = excluded.state THEN c.opened_at ELSE now() END,
    closed_at = NULL"""
_CLOSE = (
    "UPDATE sync.conflict AS r SET state = 'closed', closed_at = now() FROM "
    + _KEYS
    + " AS k(record_id, table_name, campus) WHERE "
    + _MATCH
    + " AND r.state || '' <> 'closed' AND r.id <> ALL (%(named)s)"
)
_INCIDENTS = f"""\
INSERT INTO sync.incident (link, kind, detail)
SELECT c.table_name || ' ' || c.id, '{CONFLICT}',
    format('%%s of %%s: %%s is asked', c.group_name, c.table_name, c.assignee)
FROM sync.conflict c WHERE c.id = ANY (%(named)s) AND c.state = 'open'
    AND c.alarm = ANY (%(loud)s) AND NOT EXISTS (SELECT FROM sync.incident i
        WHERE (i.link, i.kind, i.state) = (c.table_name || ' ' || c.id, '{CONFLICT}', 'open'))"""
_END_INCIDENTS = f"""\
UPDATE sync.incident i SET state = 'closed', closed_at = now() FROM sync.conflict r, {_KEYS}
    AS k(record_id, table_name, campus)
WHERE {_MATCH} AND r.state <> 'open' AND i.link = r.table_name || ' ' || r.id
    AND i.kind = '{CONFLICT}' AND i.state = 'open'"""
_DISTRUST = f"""\
WITH told AS (UPDATE sync.store SET distrusted = ARRAY(
        SELECT DISTINCT unnest(distrusted || %(actors)s::text[]) ORDER BY 1))
INSERT INTO sync.incident (link, kind, detail) SELECT actor, '{SKEW}',
    'its stamps are ahead by more than the bound: mend that clock' FROM unnest(%(actors)s::text[])
    AS actor"""
_APART = f"""\
INSERT INTO sync.incident (link, kind, detail) SELECT a.actor, '{APART}',
    'an edit stands apart from its record: were tables restored by hand? '
    'UPDATE sync.store SET salt = salt + 1'
FROM (VALUES (%s)) AS a(actor) WHERE NOT EXISTS (SELECT FROM sync.incident i
    WHERE (i.link, i.kind, i.state) = (a.actor, '{APART}', 'open'))"""
_PENDING = """\
SELECT DISTINCT table_name, campus, record_id FROM (
    (SELECT * FROM sync.edit WHERE lane = 'emergency' ORDER BY id LIMIT %(limit)s)
    UNION ALL (SELECT * FROM sync.edit WHERE lane <> 'emergency' ORDER BY id LIMIT %(limit)s)
    LIMIT %(limit)s) AS e"""
_OPEN = """\
INSERT INTO sync.store AS s (name, rules, policies) VALUES (%(name)s, %(rules)s, %(policies)s)
ON CONFLICT (id) DO UPDATE
SET name = excluded.name, rules = excluded.rules, policies = excluded.policies
WHERE (s.name, s.rules, s.policies)
    IS DISTINCT FROM (excluded.name, excluded.rules, excluded.policies)"""
_POLICY = """\
INSERT INTO sync.policy AS p VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (table_name) DO UPDATE
SET editable = excluded.editable, created = excluded.created,
    archived_column = excluded.archived_column, archived_values = excluded.archived_values,
    roles = excluded.roles"""


class Key(typing.NamedTuple):
    """Names a record."""

    table: str
    campus: str
    record_id: str


class Updated(typing.NamedTuple):
    """`learned`: keys whose record is another one now. `skipped`: a client has them locked, or
    their versions are not whole (an incident tells)."""

    learned: dict[Key, Record]
    skipped: frozenset[Key]


Step = collections.abc.Callable[[Key, Record], Record]


class _Held:
    """One record under its lock, and what is to be written of it."""

    def __init__(self, key: Key):
        self.key = key
        self.row: dict | None = None
        self.stored: Record | None = None
        self.edits: list[PendingEdit] = []
        self.edit_ids: list[int] = []
        self.record: Record = UNSEEN
        self.src_table = ""
        self.met: Met = []


def open_store(conn: psycopg.Connection, name: str, rules: ConflictRules) -> None:
    """Opens a store for edits: gives it its name and tells its trigger the policies; idempotent.

    Commits. The schema must be in place (`store_schema.ensure`).
    """
    with conn.transaction():
        names = {"name": name, "rules": rules.digest, "policies": rules.content}
        conn.execute(_OPEN, names)
        for table in rules.edited_at_stores:
            conn.execute(_POLICY, _policy_row(table, rules))


def _policy_row(name: str, rules: ConflictRules) -> tuple:
    groups = rules.tables[name].groups
    closed = (Immutable, Never, Owner)
    editable = [c for group in groups if not isinstance(group, closed) for c in group.columns]
    marks = [mark for group in groups if (mark := getattr(group, "archived", None)) is not None]
    column, values = (marks[0].column, list(marks[0].values)) if marks else (None, [])
    created = not any(isinstance(group, Never) for group in groups)
    return name, sorted([*editable, "deleted"]), created, column, values, list(rules.roles)


def pending_keys(conn: psycopg.Connection, limit: int) -> list[Key]:
    """Returns records with edits that are not folded in yet, those of the emergency lane first."""
    return [Key(*row) for row in conn.execute(_PENDING, {"limit": limit})]


class Records:
    """The records of one store, over a connection set up by `SESSION`.

    Every edit of a record that a client has committed is folded in before anything else touches
    the record, so each editor replaces what was to be seen then.
    """

    def __init__(self, conn: psycopg.Connection, rules: ConflictRules):
        self._conn = conn
        self._rules = rules

    def update(
        self,
        keys: collections.abc.Iterable[Key],
        step: Step = lambda key, record: record,
        src_tables: collections.abc.Mapping[Key, str] | None = None,
        wait: bool = True,
    ) -> Updated:
        """Changes records by `step`, in the caller's transaction or one of its own.

        Writes what changed: record, row, history, conflicts, and the store's next change numbers.

        Args:
          step: pure; gives the record after it. By default pending edits are folded in, only.
          src_tables: source table of records that this store may not have met yet.
          wait: for clients that hold a record; else it is skipped.

        Raises:
          psycopg.Error, one of `PASSING`: nothing was written, try again.
        """
        with self._conn.transaction():
            held, skipped = self._locked(sorted(set(keys)), wait)
            changed = []
            for one in held:
                policy = self._rules.tables[one.key.table]
                try:
                    folded, one.met = fold_edits(self._base(one), one.edits, policy, self._rules)
                except DotTaken:
                    skipped.add(one.key)
                    self._conn.execute(_APART, (one.edits[0].dot.actor,))
                    continue
                one.record = step(one.key, folded)
                if one.record is folded and not one.edits:
                    continue
                if not one.src_table:
                    one.src_table = (src_tables or {}).get(one.key, "")
                changed.append(one)
            if changed:
                self._write(changed)
            return Updated({one.key: one.record for one in changed}, frozenset(skipped))

    def read(self, key: Key) -> Record:
        """Returns a record, pending edits folded in but not written; `UNSEEN` if there is none."""
        with self._conn.transaction(force_rollback=True):
            held, _ = self._locked([key], True)
            policy = self._rules.tables[key.table]
            return fold_edits(self._base(held[0]), held[0].edits, policy, self._rules)[0]

    def _locked(self, keys: list[Key], wait: bool) -> tuple[list[_Held], set[Key]]:
        held = {key: _Held(key) for key in keys}
        lock = "FOR UPDATE OF {} " + ("" if wait else "SKIP LOCKED")
        skipped: set[Key] = set()
        for table, some in itertools.groupby(keys, key=lambda key: key.table):
            some = list(some)
            names = {"ids": [k.record_id for k in some], "campuses": [k.campus for k in some]}
            query = _ROWS.format(what="to_jsonb(t)", table=table, lock=lock.format("t"))
            for record_id, campus, row in self._conn.execute(query.encode(), names):
                held[Key(table, campus, record_id)].row = row
            if not wait:
                query = _ROWS.format(what="1", table=table, lock="")
                there = self._conn.execute(query.encode(), names).fetchall()
                found = {Key(table, campus, record_id) for record_id, campus, _ in there}
                skipped |= {key for key in found if held[key].row is None}
        names = names_of(keys)
        what = "r.src_table, r.record::text"
        query = _RECORDS.format(what=what, lock=lock.format("r"))
        locked = set()
        for record_id, table, campus, src_table, text in self._conn.execute(query.encode(), names):
            one = held[Key(table, campus, record_id)]
            locked.add(one.key)
            one.src_table = src_table
            one.stored = record_from_json(text) if text else None
        if not wait:
            query = _RECORDS.format(what="1", lock="")
            there = self._conn.execute(query.encode(), names).fetchall()
            found = {Key(table, campus, record_id) for record_id, table, campus, _ in there}
            skipped |= found - locked
        for edit in self._conn.execute(_EDITS.encode(), names):
            one = held[Key(edit[1], edit[2], edit[0])]
            one.edit_ids.append(edit[3])
            one.edits.append(_pending(edit[4:]))
        return [one for key, one in held.items() if key not in skipped], skipped

    def _base(self, one: _Held) -> Record:
        """Returns the record before its pending edits."""
        if one.stored is not None:
            return one.stored
        row = one.edits[0].before if one.edits else one.row
        if row is None or row["version_vector"] is not None:
            return UNSEEN
        one.src_table = row["src_table"]
        return record_of_row(row, self._rules.tables[one.key.table], self._rules)

    def _write(self, changed: list[_Held]) -> None:
        conn = self._conn
        for one in changed:
            before = one.stored.live if one.stored is not None else {}
            one.met += [
                (group, entry)
                for group, entries in one.record.live.items()
                for dot, entry in entries.items()
                if dot not in before.get(group, {})
            ]
        # A dot that another store has seen must not be lost here: it would be given out again.
        conn.execute("SET LOCAL synchronous_commit = local")
        met = (entry for one in changed for _, entry in one.met)
        take_stamps(conn, self._rules, {(entry.stamp.hlc, entry.dot.actor) for entry in met})
        versions = [
            {**_plain(one.key), "edit": edit} for one in changed for edit in edits_to_plain(one.met)
        ]
        conn.execute(_HISTORY, (_json(versions),))
        shown = self._write_rows(changed)
        self._note_conflicts(changed, shown)
        edits = [number for one in changed for number in one.edit_ids]
        if edits:
            conn.execute("DELETE FROM sync.edit WHERE id = ANY (%s)", (edits,))
        number = counted(conn, len(changed))
        rows = [
            {
                **_plain(one.key),
                "src_table": one.src_table,
                "seen": dict(one.record.seen),
                "record": record_to_plain(one.record),
                "change": number + i,
                "urgent": any(e.stamp.lane is Lane.EMERGENCY for _, e in one.met),
            }
            for i, one in enumerate(changed, 1)
        ]
        conn.execute(_PUT_RECORDS, (_json(rows),))

    def _write_rows(self, changed: list[_Held]) -> dict[Key, Shown]:
        rows: dict[tuple[str, str], list[dict]] = collections.defaultdict(list)
        shown = {}
        for one in changed:
            key = one.key
            table, policy = ALL_TABLES[key.table], self._rules.tables[key.table]
            shown[key] = show(one.record, policy, self._rules)
            row = row_of(
                key.campus, key.record_id, one.record, shown[key], one.src_table, table.level
            )
            if row["deleted"] and not one.src_table:
                rows[key.table, "remove"].append(row)
            elif one.row is None:
                rows[key.table, "insert"].append(row)
            else:
                rows[key.table, "end" if row["deleted"] else "update"].append(row)
        for (name, how), some in sorted(rows.items()):
            if how in ("insert", "update"):
                put_digests(ALL_TABLES[name], some)
            given = f"json_populate_recordset(NULL::consult.{name}, %s)"
            self._conn.execute(row_statement(name, how, given).encode(), (_json(some),))
        return shown

    def _note_conflicts(self, changed: list[_Held], shown: dict[Key, Shown]) -> None:
        rows = [
            {
                **_plain(one.key),
                "id": conflict_id(one.key, conflict.group),
                "group_name": conflict.group,
                "rule": conflict.rule,
                "alarm": conflict.alarm,
                "assignee": conflict.assignee,
                "versions": len(conflict.dots),
                "state": "open" if conflict.open else "settled",
            }
            for one in changed
            for conflict in shown[one.key].conflicts
        ]
        named = [row["id"] for row in rows]
        names = names_of([one.key for one in changed]) | {"named": named, "loud": list(_LOUD)}
        closed = self._conn.execute(_CLOSE.encode(), names).rowcount
        if rows:
            self._conn.execute(_CONFLICTS, (_json(rows),))
            self._conn.execute(_INCIDENTS.encode(), names)
        if rows or closed:
            self._conn.execute(_END_INCIDENTS.encode(), names)


def conflict_id(key: Key, group: str) -> str:
    """Returns a conflict's name, the same at every store: of one group of one record."""
    return hashlib.sha256(canonical_json([*key, group]).encode()).hexdigest()[:16]


def lock_keys(
    conn: psycopg.Connection, keys: collections.abc.Iterable[Key], wait: bool = False
) -> list[Key]:
    """Locks rows and records, in the caller's transaction; returns those that have both and that
    nobody else holds, or, with `wait`, holds any more."""
    found: set[Key] = set()
    keys = sorted(set(keys))
    lock = "FOR UPDATE OF {}" + ("" if wait else " SKIP LOCKED")
    for table, some in itertools.groupby(keys, key=lambda key: key.table):
        names = names_of(list(some))
        query = _ROWS.format(what="1", table=table, lock=lock.format("t"))
        rows = conn.execute(query.encode(), names)
        found |= {Key(table, campus, record_id) for record_id, campus, _ in rows}
    query = _RECORDS.format(what="1", lock=lock.format("r"))
    rows = conn.execute(query.encode(), names_of(keys)).fetchall()
    return [key for r, t, c, _ in rows if (key := Key(t, c, r)) in found]


def counted(conn: psycopg.Connection, records: int) -> int:
    """Takes change numbers for as many records, until the commit; they begin behind the result."""
    return conn.execute(_COUNT, (records, records)).fetchone()[0]


def take_stamps(
    conn: psycopg.Connection, rules: ConflictRules, stamps: collections.abc.Iterable[tuple]
) -> None:
    """Takes over what other clocks say, within the bound; tells of those beyond it.

    Args:
      stamps: (hlc, actor). Of each actor the greatest within the bound, and the greatest, will do.
    """
    _, wall_us, latest, distrusted, actor = conn.execute(_CLOCK).fetchone()
    clock = HybridClock(lambda: wall_us, rules.skew_bound_us, latest, distrusted)
    for stamp, who in sorted(stamps):
        if who != actor:
            clock.witness(stamp, who)
    if clock.latest > latest:
        conn.execute(_ADOPT, {"stamp": clock.latest})
    if new := sorted(clock.distrusted - set(distrusted)):
        conn.execute(_DISTRUST, {"actors": new})


def _pending(edit: tuple) -> PendingEdit:
    op, actor, counter, hlc, lane, role, editor, reason, distrusted, before, after = edit
    op = op.decode() if isinstance(op, bytes) else op
    stamp = Stamp(hlc, Lane(lane), role, editor, False, reason, tuple(sorted(distrusted)))
    return PendingEdit(Dot(actor, counter), stamp, op == "D", before, after)


def names_of(keys: collections.abc.Sequence[Key]) -> dict[str, list[str]]:
    """Returns keys as the three lists that a query takes."""
    return {
        "ids": [key.record_id for key in keys],
        "tables": [key.table for key in keys],
        "campuses": [key.campus for key in keys],
    }


def _plain(key: Key) -> dict[str, str]:
    return {"record_id": key.record_id, "table_name": key.table, "campus": key.campus}


def _json(rows: list[dict]) -> str:
    return json.dumps(rows, ensure_ascii=False)


_SYNC = ("src_table", "src_lsn", "src_seq", "committed_at", "hlc", "lane", "version_vector")
_OF_ROW = "t.record_id = s.record_id AND t.campus = s.campus"


def row_statement(name: str, how: str, given: str) -> str:
    """Returns what writes the rows of `given`, a relation of the table's columns or its key.

    `insert` and `update` write whole rows, `end` tombstones; `remove` takes rows away. `insert`
    meets no row that was looked for: one that is there nevertheless came just now.
    """
    rows = f"{given} AS s"
    if how == "remove":
        return f"DELETE FROM consult.{name} AS t USING {rows} WHERE {_OF_ROW}"
    own = [quoted(column.name) for column in ALL_TABLES[name].columns]
    columns = [*own, *_SYNC, "security_level", "digest", "deleted"]
    if how == "insert":
        names = ", ".join(["campus", "record_id", *columns])
        return f"INSERT INTO consult.{name} ({names}) SELECT {names} FROM {rows}"
    written = (*_SYNC, "deleted") if how == "end" else columns
    sets = ", ".join(f"{column} = s.{column}" for column in written)
    return f"UPDATE consult.{name} AS t SET {sets} FROM {rows} WHERE {_OF_ROW}"
