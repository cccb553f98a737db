"""Join a source's rows with edited records as sets: the usual row says nothing new of what was
edited.

A row is plain if it is whole, its record is there, settled and without edits that wait, and if of
every group of columns that clients have edited, by one version, it says what it said before or
what they wrote. Then what is shown of edited groups stays, all others are the source's alone, and
SQL says what `transforms.conflicts` would (ADR 0019). All others are left to `hold_records`,
which joins them one by one; tests hold the two against each other.
"""

import collections.abc
import json
import typing

import numpy as np
import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import ConflictRules, TablePolicy, Union
from schemas.siblings import DELETED, ROW, Value
from schemas.tables import Table
from schemas.versions import SOURCE_MARK
from transforms.deliver.edits.edit_json import source_edit, values_of
from transforms.deliver.edits.hold_records import lock_keys
from transforms.deliver.edits.record_keys import AS_IS, Key, cleared, looked_up, same_key
from transforms.deliver.edits.row_digests import EXACT, ask_content, digests_of, time_of
from transforms.deliver.edits.stamp_records import take_stamps
from transforms.deliver.edits.write_records import write_records
from transforms.deliver.store_schema import quoted

_STAGES = f"""\
CREATE TEMP TABLE IF NOT EXISTS campus_sync_said (place integer PRIMARY KEY,
    record_id text COLLATE "C", table_name text COLLATE "C", campus text COLLATE "C",
    src_table text, lsn bigint, seq integer, count numeric, hlc bigint, whole boolean,
    said jsonb) {AS_IS};
CREATE TEMP TABLE IF NOT EXISTS campus_sync_joined (record_id text COLLATE "C" PRIMARY KEY,
    table_name text COLLATE "C", campus text COLLATE "C", place integer, src_table text,
    lsn bigint, seq integer, count numeric, seen jsonb, edit jsonb, edits jsonb, shown jsonb,
    hlc bigint, urgent boolean) {AS_IS};
{cleared("pg_temp.campus_sync_said")}; {cleared("pg_temp.campus_sync_joined")}"""
# Records are looked for by key, also before the first ANALYZE.
_BY_KEY, _AS_EVER = "SET LOCAL enable_seqscan = off", "SET LOCAL enable_seqscan = on"
# As a row of the table prints its values: equal ones have equal texts at every store.
_SAY = """\
INSERT INTO pg_temp.campus_sync_said
SELECT (j ->> 'place')::integer, j ->> 'id', '{name}', %(campus)s, j ->> 'src_table',
    (j ->> 'lsn')::bigint, (j ->> 'seq')::integer, (j ->> 'count')::numeric,
    (j ->> 'hlc')::bigint, (j ->> 'whole')::boolean,
    (SELECT {values} FROM to_jsonb(json_populate_record(NULL::consult.{name}, j -> 'row')) AS r)
FROM json_array_elements(%(rows)s) AS j"""
_KNOWN = f"""\
SELECT s.place, sign(s.count - (r.seen ->> ('{SOURCE_MARK}' || s.campus))::numeric)::integer
FROM pg_temp.campus_sync_said s, {looked_up("sync.record", "r", same_key("r", "s"))}
WHERE r.record IS NOT NULL AND s.count <= (r.seen ->> ('{SOURCE_MARK}' || s.campus))::numeric
    AND (SELECT true FROM sync.edit e WHERE {same_key("e", "s")} LIMIT 1) IS NULL"""
_PLAIN = """\
WITH met AS MATERIALIZED (
    SELECT s.*, r.seen, r.record -> 'edits' AS edits, r.src_table AS held_table
    FROM pg_temp.campus_sync_said s, {record}, {stored}
    WHERE s.whole AND r.record IS NOT NULL AND t.version_vector = r.seen AND NOT t.deleted
        AND s.count > coalesce((r.seen ->> ('{mark}' || s.campus))::numeric, 0)
        AND (SELECT true FROM sync.edit e WHERE {edit} LIMIT 1) IS NULL
        AND (SELECT true FROM sync.conflict c
            WHERE {conflict} AND c.state || '' <> 'closed' LIMIT 1) IS NULL
)
INSERT INTO pg_temp.campus_sync_joined
SELECT m.record_id, m.table_name, m.campus, m.place,
    CASE WHEN m.held_table = '' THEN m.src_table ELSE m.held_table END, m.lsn, m.seq, m.count,
    m.seen || jsonb_build_object('{mark}' || m.campus, m.count), n.edit, k.edits,
    m.said - ({kept}), k.hlc, k.urgent
FROM met m
-- A row of the source replaces its last one whole, so that there is one such edit at most.
CROSS JOIN LATERAL (
    SELECT coalesce((array_agg(e.edit -> 'wrote') FILTER (WHERE
        e.edit -> 'dot' ->> 0 ^@ '{mark}'))[1], '{{}}') AS said
    FROM jsonb_array_elements(m.edits) AS e(edit)) AS s
CROSS JOIN LATERAL (
    SELECT coalesce(jsonb_object_agg(g.key, g.value), '{{}}') AS wrote,
        count(*) = count(DISTINCT g.key) AS alone
    FROM jsonb_array_elements(m.edits) AS e(edit), jsonb_each(e.edit -> 'wrote') AS g
    WHERE NOT e.edit -> 'dot' ->> 0 ^@ '{mark}') AS c
CROSS JOIN LATERAL (SELECT {said} AS edit OFFSET 0) AS n
CROSS JOIN LATERAL (
    SELECT jsonb_agg(x.edit ORDER BY x.actor, x.count) AS edits, max(x.hlc) AS hlc,
        (array_agg(x.edit ->> 'lane' ORDER BY x.hlc DESC, x.actor DESC, x.count DESC))[1]
            = '{emergency}' AS urgent
    FROM (SELECT y.edit, (y.edit -> 'dot' ->> 0) COLLATE "C" AS actor,
            (y.edit -> 'dot' ->> 1)::numeric AS count, (y.edit ->> 'hlc')::bigint AS hlc
        FROM (SELECT e.edit FROM jsonb_array_elements(m.edits) AS e(edit)
            WHERE NOT e.edit -> 'dot' ->> 0 ^@ '{mark}' UNION ALL SELECT n.edit) AS y) AS x) AS k
WHERE c.alone AND coalesce(c.wrote #> '{{{row},values,{deleted}}}', 'false') = 'false'
    AND coalesce(s.said #> '{{{row},values,{deleted}}}', 'false') = 'false' AND {plain}"""
# Of a group that clients have edited: before it and by it, the source says what the edit replaced,
# or what it wrote; of a list, which edits only add to, what it said before.
_EDITED = """\
CASE WHEN c.wrote ? '{group}' THEN coalesce(({given} = {base} OR {text} AND {given} = {wrote})
    AND ({said} IS NULL OR {said} = {base} OR {text} AND {said} = {wrote}), false)
    OR NOT {text} AND coalesce({said} = {given}, false)
ELSE {said} IS NOT NULL AND ({text} OR {said} = {given}) END"""
_JOINED = "SELECT place FROM pg_temp.campus_sync_joined"
_HISTORY = f"""\
INSERT INTO sync.version (record_id, table_name, campus, actor, counter, edit)
SELECT record_id, table_name, campus, '{SOURCE_MARK}' || campus, count, edit
FROM pg_temp.campus_sync_joined ON CONFLICT DO NOTHING"""
_SHOWN = """\
pg_temp.campus_sync_joined AS f
JOIN consult.{name} t ON t.record_id = f.record_id AND t.campus = f.campus
CROSS JOIN LATERAL jsonb_populate_record(t, f.shown) AS s"""
_SHOW = """\
UPDATE consult.{name} AS t
SET ({names}) = (SELECT {values} FROM jsonb_populate_record(t, f.shown) AS s),
    src_table = f.src_table, src_lsn = f.lsn, src_seq = f.seq, committed_at = {time},
    hlc = f.hlc, lane = CASE WHEN f.urgent THEN 'E' ELSE 'R' END, security_level = {level},
    digest = d.digest, version_vector = f.seen
FROM unnest(%s::text[], %s::bytea[]) AS d(record_id, digest)
JOIN pg_temp.campus_sync_joined AS f ON f.record_id = d.record_id
WHERE t.record_id = f.record_id AND t.campus = f.campus"""
_RECORD_ROWS = """\
(SELECT record_id, table_name, campus, src_table, seen, false AS urgent,
    jsonb_build_object('seen', seen, 'edits', edits) AS record,
    row_number() OVER (ORDER BY record_id) AS place
FROM pg_temp.campus_sync_joined)"""


NOT_PLAIN = 2


class Said(typing.NamedTuple):
    """A source's change of an edited record.

    Attributes:
      count: of its dot (`schemas.versions.source_dot`). whole: no column is left out, and it is
        no deletion. row: column to text for PostgreSQL.
    """

    record_id: str
    src_table: str
    lsn: int
    seq: int
    count: int
    hlc: int
    whole: bool
    row: collections.abc.Mapping[str, Value]


class PlainRows:
    """Joins what is plain among rows of one campus and table, in the caller's transaction:
    `look`, and, after all that is not plain was joined, `write`."""

    def __init__(self, conn: psycopg.Connection, rules: ConflictRules, table: Table, campus: str):
        self._conn, self._rules, self._table, self._campus = conn, rules, table, campus
        self._hlcs: list[int] = []

    def look(self, rows: collections.abc.Sequence[Said]) -> np.ndarray:
        """Locks the records of all rows, and returns for each 1 if it is plain news, to be
        written; 0 if its record had seen just it; -1 if a later one; else `NOT_PLAIN`.

        Raises:
          psycopg.Error: a value that the table cannot hold; the transaction is lost.
        """
        verdicts = np.full(len(rows), NOT_PLAIN, np.int8)
        policy = self._rules.tables[self._table.name]
        if any(column.kind not in EXACT for column in self._table.columns):
            return verdicts
        conn, name = self._conn, self._table.name
        conn.execute(_BY_KEY)
        keys = [Key(name, self._campus, row.record_id) for row in rows]
        lock_keys(conn, keys, wait=True)
        conn.execute(_STAGES)
        given = [_plain(place, row) for place, row in enumerate(rows)]
        say = _SAY.format(name=name, values=values_of("r", self._table.by_name))
        texts = json.dumps(given, ensure_ascii=False)
        conn.execute(say.encode(), {"campus": self._campus, "rows": texts})
        for place, verdict in conn.execute(_KNOWN):
            verdicts[place] = verdict
        names = {"source_role": self._rules.source_role}
        conn.execute(_statement(self._table, policy).encode(), names)
        plain = [place for (place,) in conn.execute(_JOINED)]
        verdicts[plain] = 1
        self._hlcs = [rows[place].hlc for place in plain]
        conn.execute(_AS_EVER)
        return verdicts

    def write(self) -> None:
        """Writes what `look` found to be plain news."""
        if not self._hlcs:
            return
        # As `Records.update` does, and in its order.
        conn, table = self._conn, self._table
        conn.execute(_BY_KEY)
        conn.execute("SET LOCAL synchronous_commit = local")
        take_stamps(conn, self._rules, {(hlc, SOURCE_MARK + self._campus) for hlc in self._hlcs})
        conn.execute(_HISTORY)
        shown = _SHOWN.format(name=table.name)
        found = digests_of(table, ask_content(conn, table, shown, "s", "f.record_id"))
        show = _SHOW.format(
            name=table.name,
            names=", ".join(map(quoted, table.by_name)),
            values=", ".join(f"s.{quoted(name)}" for name in table.by_name),
            time=time_of("f.hlc"),
            level=table.level,
        )
        conn.execute(show.encode(), (found.keys, found.digests))
        write_records(conn, _RECORD_ROWS, len(self._hlcs), new=False)
        conn.execute(_AS_EVER)


def _plain(place: int, said: Said) -> dict[str, object]:
    plain = said._asdict()
    return {"place": place, "id": plain.pop("record_id"), **plain}


def _statement(table: Table, policy: TablePolicy) -> str:
    given = {group.group: values_of("m.said", group.columns) for group in policy.groups}
    # Of these the row keeps what it shows; of a list, as `show` has written it.
    kept = " || ".join(
        f"CASE WHEN {isinstance(group, Union)} OR c.wrote ? '{group.group}'"
        f" THEN '{{{','.join(group.columns)}}}'::text[] ELSE '{{}}' END"
        for group in policy.groups
    )
    plain = " AND ".join(
        _EDITED.format(
            group=group.group,
            given=given[group.group],
            base=f"(c.wrote #> '{{{group.group},base,1}}')",
            wrote=f"(c.wrote #> '{{{group.group},values}}')",
            said=f"(s.said #> '{{{group.group},values}}')",
            text=not isinstance(group, Union),
        )
        for group in policy.groups
    )
    return _PLAIN.format(
        name=table.name,
        record=looked_up("sync.record", "r", same_key("r", "s")),
        stored=looked_up(
            f"consult.{table.name}", "t", "t.record_id = s.record_id AND t.campus = s.campus"
        ),
        edit=same_key("e", "s"),
        conflict=same_key("c", "s"),
        kept=kept,
        plain=plain,
        said=source_edit(policy, "m.said", "m.said", "m.campus", "m.hlc", "m.count"),
        mark=SOURCE_MARK,
        row=ROW,
        deleted=DELETED,
        emergency=Lane.EMERGENCY.value,
    )
