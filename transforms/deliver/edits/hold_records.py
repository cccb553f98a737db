"""Hold records in a consult store: locked, client's edits folded in, changed, shown, counted."""

import collections
import collections.abc
import itertools
import json
import typing

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import ALL_TABLES, ConflictRules
from schemas.siblings import (
    UNSEEN,
    Record,
    Stamp,
    edits_to_plain,
    record_from_json,
    record_to_plain,
)
from transforms.conflicts.fold import EditApart, Met, PendingEdit, fold_edits
from transforms.conflicts.show import Shown, show
from transforms.conflicts.stored_rows import put_digests, record_of_row, row_of
from transforms.deliver.edits.edit_schema import OWN_SESSION
from transforms.deliver.edits.note_conflicts import note_conflicts
from transforms.deliver.edits.record_keys import KEYS, OF_KEY, Key, names_of, plain_key
from transforms.deliver.edits.stamp_records import take_stamps
from transforms.deliver.edits.write_records import write_records
from transforms.deliver.store_schema import quoted

SESSION = f"""\
SET default_transaction_isolation = 'read committed'; SET TimeZone = 'UTC'; {OWN_SESSION};
-- Shorter than PostgreSQL's look for deadlocks: we give way to a client, never it to us.
SET lock_timeout = '700ms'; SET idle_in_transaction_session_timeout = '60s';
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
-- Records are looked for by key, also before the first ANALYZE.
SET jit = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off;
SET enable_material = off; SET enable_memoize = off;
SET work_mem = '32MB'; SET temp_buffers = '64MB'"""
APART = "edit_apart"  # A kind of incident.
# Somebody else was at the same records, or a link has just brought one of them.
PASSING = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
)
_ROWS = """\
SELECT t.record_id, t.campus, {what} FROM unnest(%(ids)s::text[], %(campuses)s::text[])
    AS k(record_id, campus)
JOIN consult.{table} AS t ON t.record_id = k.record_id AND t.campus = k.campus
ORDER BY t.record_id, t.campus {lock}"""
_RECORDS = (
    "SELECT r.record_id, r.table_name, r.campus, {what} FROM "
    + KEYS
    + " JOIN sync.record AS r ON "
    + OF_KEY
    + " ORDER BY r.record_id, r.table_name, r.campus {lock}"
)
_EDITS = (
    "SELECT r.record_id, r.table_name, r.campus, r.id, r.op, r.actor, r.hlc, r.lane,"
    " r.role, r.editor, r.reason, r.distrusted, r.before, r.after FROM "
    + KEYS
    + " JOIN sync.edit AS r ON "
    + OF_KEY
    + " ORDER BY r.id"
)
_HISTORY = """\
INSERT INTO sync.version (record_id, table_name, campus, actor, counter, edit)
SELECT record_id, table_name, campus, edit -> 'dot' ->> 0, (edit -> 'dot' ->> 1)::numeric, edit
FROM json_to_recordset(%s) AS v(record_id text, table_name text, campus text, edit jsonb)
ON CONFLICT DO NOTHING"""
_RECORD_ROWS = """\
(SELECT * FROM json_to_recordset(%(rows)s) AS j(record_id text, table_name text, campus text,
    src_table text, seen jsonb, record jsonb, place bigint, urgent boolean))"""
_APART = f"""\
INSERT INTO sync.incident (link, kind, detail) SELECT a.actor, '{APART}',
    'an edit stands apart from its record: were tables restored by hand? '
    'UPDATE sync.store SET salt = salt + 1'
FROM (VALUES (%s)) AS a(actor) WHERE NOT EXISTS (SELECT FROM sync.incident i
    WHERE (i.link, i.kind, i.state) = (a.actor, '{APART}', 'open'))"""
_PENDING = """\
SELECT table_name, campus, record_id, count(*) FROM (
    (SELECT * FROM sync.edit WHERE lane = 'emergency' ORDER BY id LIMIT %(limit)s)
    UNION ALL (SELECT * FROM sync.edit WHERE lane <> 'emergency' ORDER BY id LIMIT %(limit)s)
    LIMIT %(limit)s) AS e GROUP BY 1, 2, 3"""


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
        self.new = True  # No record of it is there; else it is locked.
        self.stored: Record | None = None
        self.edits: list[PendingEdit] = []
        self.edit_ids: list[int] = []
        self.record: Record = UNSEEN
        self.src_table = ""
        self.met: Met = []


class Pending(typing.NamedTuple):
    """`keys`: records with edits that are not folded in yet. `full`: there may be others."""

    keys: list[Key]
    full: bool


def pending(conn: psycopg.Connection, limit: int) -> Pending:
    """Returns whose edits wait to be folded in, at most `limit` edits, emergencies first."""
    found = conn.execute(_PENDING, {"limit": limit}).fetchall()
    return Pending([Key(*row[:3]) for row in found], sum(row[3] for row in found) >= limit)


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
                except EditApart:
                    skipped.add(one.key)
                    self._conn.execute(_APART, (one.edits[0].actor,))
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
            one.new = False
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
            {**plain_key(one.key), "edit": edit}
            for one in changed
            for edit in edits_to_plain(one.met)
        ]
        conn.execute(_HISTORY, (_json(versions),))
        shown = self._write_rows(changed)
        note_conflicts(conn, shown)
        edits = [number for one in changed for number in one.edit_ids]
        if edits:
            conn.execute("DELETE FROM sync.edit WHERE id = ANY (%s)", (edits,))
        for new in (True, False):
            rows = [
                {
                    **plain_key(one.key),
                    "src_table": one.src_table,
                    "seen": dict(one.record.seen),
                    "record": record_to_plain(one.record),
                    "place": place,
                    "urgent": any(e.stamp.lane is Lane.EMERGENCY for _, e in one.met),
                }
                for place, one in enumerate((one for one in changed if one.new is new), 1)
            ]
            write_records(conn, _RECORD_ROWS, len(rows), new=new, names={"rows": _json(rows)})

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


class Locked(typing.NamedTuple):
    """Of keys those whose rows, and whose records, are there and locked, in the same order."""

    rows: list[Key]
    records: list[Key]


def lock_keys(
    conn: psycopg.Connection, keys: collections.abc.Iterable[Key], wait: bool = False
) -> Locked:
    """Locks rows and records, in the caller's transaction; passes over those that somebody else
    holds, or, with `wait`, waits for them."""
    keys = sorted(set(keys))
    lock = "FOR UPDATE OF {}" + ("" if wait else " SKIP LOCKED")
    found = []
    for table, some in itertools.groupby(keys, key=lambda key: key.table):
        query = _ROWS.format(what=f"'{table}'", table=table, lock=lock.format("t"))
        found.append(conn.execute(query.encode(), names_of(list(some))))
    query = _RECORDS.format(what="1", lock=lock.format("r"))
    records = conn.execute(query.encode(), names_of(keys))
    return Locked(
        [Key(table, campus, record_id) for rows in found for record_id, campus, table in rows],
        [Key(table, campus, record_id) for record_id, table, campus, _ in records],
    )


def _pending(edit: tuple) -> PendingEdit:
    op, actor, hlc, lane, role, editor, reason, distrusted, before, after = edit
    op = op.decode() if isinstance(op, bytes) else op
    stamp = Stamp(hlc, Lane(lane), role, editor, False, reason, tuple(sorted(distrusted)))
    version = before and before["version_vector"]
    return PendingEdit(actor, stamp, op == "D", before, after, version)


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
