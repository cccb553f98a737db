"""Fold clients' plain edits into their records as sets: the usual edit meets nobody else's.

An edit is plain if it waits alone for its record, created it or changed whole groups of which
each had one version that such an edit replaces, and nobody is asked about the record. Then
`transforms.conflicts.edit` says what the record becomes without comparing anything, and here SQL
says the same. All others are named, for `hold_records` to fold one by one; tests hold the two
against each other.
"""

import collections.abc
import itertools

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import (
    ALL_TABLES,
    Branches,
    ConflictRules,
    HoldBoth,
    Newest,
    Policy,
    States,
    TablePolicy,
    Union,
)
from schemas.siblings import DELETED, ROW
from schemas.tables import Table
from schemas.versions import SOURCE_MARK
from transforms.deliver.edits.edit_json import source_edit, values_of
from transforms.deliver.edits.hold_records import lock_keys
from transforms.deliver.edits.record_keys import (
    AS_IS,
    OF_KEY,
    Key,
    cleared,
    looked_up,
    names_of,
    same_key,
)
from transforms.deliver.edits.row_digests import EXACT, ask_content, digests_of, time_of
from transforms.deliver.edits.stamp_records import take_stamps
from transforms.deliver.edits.write_records import write_records

_REPLACED = (Branches, HoldBoth, Newest, States)  # Whose version an edit of it replaces.
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))

_STAGE = f"""\
CREATE TEMP TABLE IF NOT EXISTS campus_sync_folded (edit_id bigint PRIMARY KEY,
    record_id text COLLATE "C", table_name text COLLATE "C", campus text COLLATE "C",
    src_table text, seen jsonb, edits jsonb, news jsonb, hlc bigint, urgent boolean,
    said_hlc bigint, said_by text, fresh boolean) {AS_IS}"""
_LOCKED = (
    "unnest(%(ids)s::text[], %(tables)s::text[], %(campuses)s::text[], %(held)s::boolean[])"
    " AS k(record_id, table_name, campus, held)"
)
_CLEAR = cleared("pg_temp.campus_sync_folded")
# `news`: what goes into the history; null for all of `edits`. `fresh`: there is no record yet.
_PLAIN = """\
WITH alone AS MATERIALIZED (
    SELECT e.*, r.record AS stored, r.src_table AS held_table, CASE
        WHEN e.op = 'I' AND r.record_id IS NULL AND e.before IS NULL THEN 'new'
        WHEN NOT k.held THEN NULL
        WHEN e.op = 'U' AND r.record IS NOT NULL THEN 'known'
        WHEN e.op = 'U' AND e.before -> 'version_vector' = 'null' AND e.before ->> 'src_table' <> ''
            AND (e.before ->> 'src_lsn')::bigint > 0 THEN 'source' END AS kind
    FROM {keys} CROSS JOIN {edit} LEFT JOIN {record} ON true
    WHERE e.actor = %(actor)s
        AND (SELECT true FROM sync.edit o WHERE {other} AND o.id <> e.id LIMIT 1) IS NULL
        AND (SELECT true FROM sync.conflict c
            WHERE {conflict} AND c.state || '' <> 'closed' LIMIT 1) IS NULL
), based AS MATERIALIZED (
    SELECT a.*, b.seen, b.edits, c.counter
    FROM alone a CROSS JOIN LATERAL (
        SELECT a.stored -> 'seen' AS seen, a.stored -> 'edits' AS edits WHERE a.kind = 'known'
        UNION ALL SELECT '{{}}', '[]' WHERE a.kind = 'new' AND {new}
        UNION ALL {said}) AS b
    CROSS JOIN LATERAL (SELECT coalesce((b.seen ->> a.actor)::bigint, 0) + 1 AS counter) AS c
    -- The newest stamp of the record, or a clock is wrong and the row shows another's. And the
    -- row showed just this record, or it stands apart.
    WHERE (a.kind = 'new' OR a.hlc > (a.before ->> 'hlc')::bigint)
        AND (a.kind <> 'known' OR a.before -> 'version_vector' = b.seen)
)
INSERT INTO pg_temp.campus_sync_folded
SELECT b.id, b.record_id, b.table_name, b.campus, '',
    jsonb_build_object(b.actor, b.counter), n.edits, NULL, b.hlc, b.lane = '{emergency}',
    NULL, NULL, true
FROM based b
CROSS JOIN LATERAL (
    SELECT jsonb_build_array({new_edit}) AS edits OFFSET 0) AS n
WHERE b.kind = 'new'
UNION ALL
SELECT b.id, b.record_id, b.table_name, b.campus,
    CASE WHEN b.kind = 'source' THEN b.before ->> 'src_table' ELSE b.held_table END,
    b.seen || jsonb_build_object(b.actor, b.counter),
    (SELECT jsonb_agg(k.edit ORDER BY (k.edit -> 'dot' ->> 0) COLLATE "C",
            (k.edit -> 'dot' ->> 1)::numeric)
        FROM (SELECT jsonb_set(o.edit, '{{wrote}}', o.wrote) AS edit
            FROM (SELECT e.edit, (e.edit -> 'wrote') - t.touched AS wrote
                FROM jsonb_array_elements(b.edits) AS e(edit) OFFSET 0) AS o
            WHERE o.wrote <> '{{}}' UNION ALL SELECT n.edit) AS k),
    CASE WHEN b.kind <> 'source' THEN jsonb_build_array(n.edit) END, b.hlc,
    b.lane = '{emergency}', CASE WHEN b.kind = 'source' THEN (b.before ->> 'hlc')::bigint END,
    '{mark}' || b.campus, false
FROM based b
CROSS JOIN LATERAL (
    SELECT array_remove(ARRAY['{row}', {touched}], NULL) AS touched OFFSET 0) AS t
CROSS JOIN LATERAL (
    SELECT jsonb_object_agg(g.name, jsonb_build_object('values', CASE g.name
                WHEN '{row}' THEN '{{"{deleted}": false}}' {given} END) || CASE
            WHEN o.was IS NULL THEN '{{}}'
            WHEN o.of_source THEN jsonb_build_object('base',
                jsonb_build_array(o.dot -> 1, o.was -> 'values'))
            WHEN o.was ? 'base' THEN jsonb_build_object('base', o.was -> 'base')
            ELSE '{{}}' END) AS wrote,
        bool_and(o.versions <= 1
            AND (g.name <> '{row}' OR coalesce(o.was -> 'values' -> '{deleted}' = 'false', false))
            AND NOT coalesce(o.of_source AND o.was ? 'base', false)) AS plain
    FROM unnest(t.touched) AS g(name)
    CROSS JOIN LATERAL (
        SELECT count(*) AS versions, (array_agg(e.edit -> 'wrote' -> g.name))[1] AS was,
            (array_agg(e.edit -> 'dot'))[1] AS dot,
            bool_or(e.edit -> 'dot' ->> 0 ^@ '{mark}') AS of_source
        FROM jsonb_array_elements(b.edits) AS e(edit) WHERE e.edit -> 'wrote' ? g.name) AS o) AS w
CROSS JOIN LATERAL (SELECT {edited} AS edit OFFSET 0) AS n
WHERE b.kind <> 'new' AND t.touched <@ {replaced} AND w.plain"""
# An edit; most have no reason and distrust nobody, and are put together at once.
_EDIT = """\
jsonb_build_object('hlc', b.hlc, 'lane', b.lane, 'role', b.role, 'editor', b.editor,
    'dot', jsonb_build_array(b.actor, b.counter), 'wrote', {wrote})"""
_MORE = """\
CASE WHEN b.reason = '' AND b.distrusted = '{{}}' THEN {edit} ELSE {edit}
    || CASE WHEN b.reason <> '' THEN jsonb_build_object('reason', b.reason) ELSE '{{}}' END
    || CASE WHEN b.distrusted <> '{{}}' THEN jsonb_build_object('distrusted',
        (SELECT jsonb_agg(d ORDER BY d COLLATE "C") FROM unnest(b.distrusted) AS d))
        ELSE '{{}}' END END"""
# What the source had said, as `transforms.conflicts.stored_rows.record_of_row` has it.
_SAID = """\
SELECT jsonb_build_object('{mark}' || a.campus, q.place), jsonb_build_array({edit})
FROM (SELECT (a.before ->> 'src_lsn')::numeric * 2147483648
    + (a.before ->> 'src_seq')::numeric AS place) AS q
WHERE a.kind = 'source' AND {lists}"""
_HISTORY = """\
INSERT INTO sync.version (record_id, table_name, campus, actor, counter, edit)
SELECT f.record_id, f.table_name, f.campus, e.edit -> 'dot' ->> 0,
    (e.edit -> 'dot' ->> 1)::numeric, e.edit
FROM pg_temp.campus_sync_folded f, jsonb_array_elements(coalesce(f.news, f.edits)) AS e(edit)
ON CONFLICT DO NOTHING"""
_SAID_BY = """\
SELECT DISTINCT said_hlc, said_by FROM pg_temp.campus_sync_folded WHERE said_hlc IS NOT NULL"""
_FOLDED = "SELECT table_name, campus, record_id, edit_id, fresh FROM pg_temp.campus_sync_folded"
_CONTENT = """\
pg_temp.campus_sync_folded AS f
JOIN consult.{name} t ON t.record_id = f.record_id AND t.campus = f.campus
    AND f.table_name = '{name}'"""
_SHOW = """\
UPDATE consult.{name} AS t SET digest = d.digest, security_level = {level}, hlc = f.hlc,
    committed_at = {time}, src_seq = greatest(t.src_seq, 0), version_vector = f.seen,
    lane = CASE WHEN f.urgent THEN 'E' ELSE 'R' END
FROM unnest(%s::bigint[], %s::bytea[]) AS d(edit_id, digest)
JOIN pg_temp.campus_sync_folded AS f ON f.edit_id = d.edit_id
WHERE t.record_id = f.record_id AND t.campus = f.campus"""
_RECORD_ROWS = """\
(SELECT *, row_number() OVER (ORDER BY edit_id) AS place,
    jsonb_build_object('seen', seen, 'edits', edits) AS record
FROM pg_temp.campus_sync_folded WHERE fresh = %(new)s)"""
_DONE = "DELETE FROM sync.edit WHERE id = ANY (%s)"
_ACTOR = "SELECT name || '.' || sync.incarnation() FROM sync.store"


def fold_plain(
    conn: psycopg.Connection, rules: ConflictRules, keys: collections.abc.Sequence[Key]
) -> frozenset[Key]:
    """Folds what is plain among the edits of these records; returns whose edits they were.

    In the caller's transaction. Passes over records that a client holds.

    Raises:
      psycopg.Error, one of `hold_records.PASSING`: roll back and try again.
    """
    with conn.pipeline():  # What nothing is asked about goes together: a store may be far.
        conn.execute(_STAGE)
        conn.execute(_CLEAR)
        asked = conn.execute(_ACTOR)
        locked = lock_keys(conn, keys)
        names = {"actor": asked.fetchone()[0], "source_role": rules.source_role}
        records = set(locked.records)
        contents = {}
        for name, some in itertools.groupby(locked.rows, key=lambda key: key.table):
            table, there = ALL_TABLES[name], list(some)
            if statement := _statement(table, rules.tables[name]):
                held = [key in records for key in there]
                conn.execute(statement.encode(), names | names_of(there) | {"held": held})
                rows = _CONTENT.format(name=name)
                contents[name] = ask_content(conn, table, rows, "t", "f.edit_id")
        found, said = conn.execute(_FOLDED), conn.execute(_SAID_BY)
        folded = found.fetchall()
        if folded:
            edits = {edit_id: fresh for *_, edit_id, fresh in folded}
            _write(conn, rules, contents, edits, said.fetchall())
    return frozenset(Key(*row[:3]) for row in folded)


def _write(
    conn: psycopg.Connection,
    rules: ConflictRules,
    contents: dict[str, psycopg.Cursor],
    edits: dict[int, bool],
    said: list[tuple],
) -> None:
    # As `Records.update` does, and in its order.
    conn.execute("SET LOCAL synchronous_commit = local")
    if said:
        take_stamps(conn, rules, said)
    conn.execute(_HISTORY)
    for name, content in contents.items():
        _show(conn, ALL_TABLES[name], content)
    conn.execute(_DONE, (list(edits),))
    fresh = list(edits.values())
    for new in (True, False):
        write_records(conn, _RECORD_ROWS, fresh.count(new), new=new, names={"new": new})


def _show(conn: psycopg.Connection, table: Table, content: psycopg.Cursor) -> None:
    """Gives rows, which show already what their editors wrote, the rest of what a row has."""
    found = digests_of(table, content)
    if found.keys:
        statement = _SHOW.format(name=table.name, level=table.level, time=time_of("f.hlc"))
        conn.execute(statement.encode(), found)


def _statement(table: Table, policy: TablePolicy) -> str | None:
    """Returns what stages the plain edits of a table; None if a column's JSON is not exact."""
    if any(column.kind not in EXACT for column in table.columns):
        return None

    groups = [(group.group, values_of("b.after", group.columns), group) for group in policy.groups]
    created = [f"'{ROW}', '{{\"values\": {{\"{DELETED}\": false}}}}'::jsonb"]
    created += [f"'{name}', jsonb_build_object('values', {given})" for name, given, _ in groups]
    given = " ".join(f"WHEN '{name}' THEN {given}" for name, given, _ in groups)
    touched = ", ".join(
        f"CASE WHEN {_differs(group.columns)} THEN '{name}' END" for name, _, group in groups
    )
    replaced = [ROW, *(name for name, _, group in groups if isinstance(group, _REPLACED))]
    # A list as it came is not yet as it is shown: neither a client's nor a source's.
    shown = [_as_shown(group) for group in policy.groups if isinstance(group, Union)]
    lists = " AND ".join(shown) or "true"
    edit = source_edit(
        policy,
        "a.before",
        values_of("a.before", table.by_name),
        "a.campus",
        "(a.before ->> 'hlc')::bigint",
        "q.place",
    )
    said = _SAID.format(edit=edit, lists=lists, mark=SOURCE_MARK)
    return _PLAIN.format(
        keys=_LOCKED,
        record=looked_up("sync.record", "r", OF_KEY),
        edit=looked_up("sync.edit", "e", same_key("e", "k")),
        other=same_key("o", "e"),
        conflict=same_key("c", "e"),
        new=lists,
        said=said,
        new_edit=_edit(f"jsonb_build_object({', '.join(created)})"),
        edited=_edit("w.wrote"),
        touched=touched,
        given=given,
        replaced="ARRAY[" + ", ".join(map(_literal, replaced)) + "]",
        mark=SOURCE_MARK,
        row=ROW,
        deleted=DELETED,
        emergency=Lane.EMERGENCY.value,
    )


def _edit(wrote: str) -> str:
    """Returns SQL: the edit `b`, which wrote that."""
    return _MORE.format(edit=_EDIT.format(wrote=wrote))


def _differs(columns: collections.abc.Iterable[str]) -> str:
    """Returns SQL: whether an edit gave one of these columns another value."""
    return " OR ".join(f"b.before -> '{c}' IS DISTINCT FROM b.after -> '{c}'" for c in columns)


def _as_shown(group: Policy) -> str:
    """Returns SQL: whether a list's text is as `show` would write it, and no conflict."""
    (column,), first = group.columns, group.separators[0]
    text = f"(a.after ->> '{column}')"
    strange = _literal(_SPACES + group.separators[1:])
    none = "ARRAY[" + ", ".join(map(_literal, group.none)) + "]::text[]"
    return (
        f"({text} IS NULL OR translate({text}, {strange}, '') = {text} AND {text} ="
        f" (SELECT CASE WHEN bool_or(x = ANY ({none})) = bool_and(x = ANY ({none}))"
        f' THEN string_agg(x, {_literal(first)} ORDER BY x COLLATE "C") END FROM'
        f" (SELECT DISTINCT x FROM unnest(string_to_array({text}, {_literal(first)})) AS x"
        f" WHERE x <> '') AS q))"
    )


def _literal(text: str) -> str:
    escaped = "".join(
        c if c.isprintable() and c not in "'\\%{}" else f"\\u{ord(c):04X}" for c in text
    )
    return f"E'{escaped}'"
