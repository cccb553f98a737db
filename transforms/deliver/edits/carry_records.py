"""Take a peer's records in as sets, where one side has seen all that the other has.

Such a record is its result unread (ADR 0017): the peer's record, row and history are written as
they came, by a few statements a page. What is concurrent, in dispute, or being edited is named,
for `hold_records` to join one by one.
"""

import collections.abc
import functools
import itertools
import typing

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import EDITED_AT_STORES, ConflictRules
from schemas.versions import COVERS_SQL, SOURCE_MARK
from transforms.deliver.edits.hold_records import row_statement
from transforms.deliver.edits.record_keys import (
    AS_IS,
    KEYS,
    OF_KEY,
    Key,
    cleared,
    names_of,
    same_key,
)
from transforms.deliver.edits.stamp_records import ask_clock, take_stamps
from transforms.deliver.edits.write_records import write_records

_STAGE = f"""\
CREATE TEMP TABLE IF NOT EXISTS campus_sync_pulled (change bigint PRIMARY KEY,
    table_name text COLLATE "C", campus text COLLATE "C", record_id text COLLATE "C",
    src_table text, seen jsonb, record jsonb, kind text, shown jsonb) {AS_IS}"""
_CLEAR = cleared("pg_temp.campus_sync_pulled")
_PUT = "COPY pg_temp.campus_sync_pulled FROM STDIN"

# What a peer offers of a record. `kind`: `row` where the row that shows it may be taken as it is,
# `gone` where nothing shows it, else null: an edit waits, a person is asked, or it is a
# tombstone, whose content each store keeps as it had it. One transaction wrote record and row; if
# not, a client has edited the row since (or both came out of a dump).
_OFFER = """\
COPY (SELECT p.change, p.table_name, p.campus, p.record_id, p.src_table, p.record -> 'seen',
    p.record, k.kind, CASE WHEN k.kind = 'row' THEN t.shown END
FROM ({page}) AS p LEFT JOIN LATERAL ({rows}) AS t ON true
CROSS JOIN LATERAL (SELECT CASE
    WHEN (SELECT true FROM sync.conflict c
        WHERE {key} AND c.state || '' <> 'closed' LIMIT 1) THEN NULL
    WHEN t.shown IS NULL AND p.src_table = ''
        AND (SELECT true FROM sync.edit c WHERE {key} LIMIT 1) IS NULL THEN 'gone'
    WHEN t.seen = p.seen AND t.wrote = p.wrote AND NOT t.deleted THEN 'row' END AS kind) AS k)
TO STDOUT"""
_SHOWN = """\
SELECT to_jsonb(t) AS shown, t.version_vector AS seen, t.deleted, t.xmin AS wrote
FROM consult.{name} AS t
WHERE p.table_name = '{name}' AND t.record_id = p.record_id AND t.campus = p.campus"""
# But what this store had taken from the one that asks, as it is now, and what that has by express.
_PAGE = """\
SELECT *, xmin AS wrote FROM sync.record WHERE change > %(after)s AND change <= %(upto)s
    AND {lane} AND taken_from IS DISTINCT FROM %(asker)s
ORDER BY change LIMIT %(limit)s"""
_AGAIN = f"""\
SELECT r.*, r.xmin AS wrote FROM {KEYS} JOIN sync.record r ON {OF_KEY}
WHERE r.record IS NOT NULL"""
# What waited may stand in the page too, and may have changed between the two readings.
_TAKE_OUT = f"""\
DELETE FROM pg_temp.campus_sync_pulled AS p USING {KEYS} WHERE {same_key("p", "k")}"""
_ANY = "SELECT EXISTS ({page})"
_LANES = {Lane.EMERGENCY: "urgent", Lane.ROUTINE: "NOT (urgent AND change <= %(express)s)"}
_INCARNATION = "SELECT sync.incarnation()"
_LAST = "SELECT max(change) FROM pg_temp.campus_sync_pulled"
_KEY = same_key("r", "p")
_OF_ROW = "t.record_id = p.record_id AND t.campus = p.campus"
_DROP_KNOWN = (
    f"DELETE FROM pg_temp.campus_sync_pulled AS p USING sync.record AS r WHERE {_KEY} AND "
    + COVERS_SQL.format(above="r.seen", below="p.seen")
)
_TABLES = sorted(EDITED_AT_STORES)  # In which rows are locked, as by all who lock some.
_LOCK_ROWS = """\
SELECT p.change FROM pg_temp.campus_sync_pulled p JOIN consult.{name} t ON {of_row}
WHERE p.table_name = '{name}' ORDER BY t.record_id, t.campus FOR UPDATE OF t SKIP LOCKED"""
_LOCK_RECORDS = f"""\
SELECT p.change FROM pg_temp.campus_sync_pulled p JOIN sync.record r ON {_KEY}
ORDER BY r.record_id, r.table_name, r.campus FOR UPDATE OF r SKIP LOCKED"""
# Behind the locks, in a statement of its own: it sees what was committed before they were had.
# A row without a record is what its source wrote last: `schemas.versions.source_dot`.
_JUDGE = """\
SELECT p.change, p.table_name, p.campus, p.record_id, CASE
    WHEN t.record_id IS NOT NULL AND p.change <> ALL (%(rows)s::bigint[])
        OR r.record_id IS NOT NULL AND p.change <> ALL (%(records)s::bigint[]) THEN 'skip'
    WHEN p.kind IS NULL OR (r.record_id IS NOT NULL AND r.record IS NULL)
        OR coalesce(r.src_table, t.src_table, '') NOT IN ('', p.src_table)
        OR {above_base} IS NOT TRUE
        OR (SELECT true FROM sync.edit r WHERE {key} LIMIT 1)
        OR (SELECT true FROM sync.conflict r WHERE {key} AND r.state || '' <> 'closed' LIMIT 1)
        THEN 'join'
    WHEN p.kind = 'gone' THEN 'remove'
    WHEN t.record_id IS NULL THEN 'insert' ELSE 'update' END
FROM pg_temp.campus_sync_pulled p LEFT JOIN consult.{name} t ON {of_row}
LEFT JOIN sync.record r ON {key}
CROSS JOIN LATERAL (SELECT CASE WHEN r.record_id IS NOT NULL THEN r.seen
    WHEN t.record_id IS NULL THEN '{{}}'
    WHEN t.version_vector IS NULL AND t.src_table <> '' THEN jsonb_build_object(
        '{mark}' || t.campus, greatest(1, t.src_lsn::numeric * 2147483648 + t.src_seq))
    END AS seen) AS base
WHERE p.table_name = '{name}'"""
_ROWS = """\
(SELECT s.* FROM pg_temp.campus_sync_pulled p,
    LATERAL jsonb_populate_record(NULL::consult.{name}, p.shown) AS s
WHERE p.change = ANY (%s))"""
_GONE = """\
(SELECT p.record_id, p.campus FROM pg_temp.campus_sync_pulled p WHERE p.change = ANY (%s))"""
# What has not been seen here goes into the history; what it says of clocks and lanes comes back.
_MEET = f"""\
WITH met AS MATERIALIZED (
    SELECT p.change, p.record_id, p.table_name, p.campus, e.edit, d.actor, d.counter,
        (e.edit ->> 'hlc')::bigint AS hlc, e.edit ->> 'lane' AS lane
    FROM pg_temp.campus_sync_pulled p LEFT JOIN sync.record r ON {_KEY}
    CROSS JOIN LATERAL jsonb_array_elements(p.record -> 'edits') AS e(edit)
    CROSS JOIN LATERAL (SELECT e.edit -> 'dot' ->> 0 AS actor,
        (e.edit -> 'dot' ->> 1)::numeric AS counter) AS d
    WHERE p.change = ANY (%(taken)s) AND (r.record IS NULL
        OR d.counter > coalesce((r.seen ->> d.actor)::numeric, 0))
), kept AS (
    INSERT INTO sync.version (record_id, table_name, campus, actor, counter, edit)
    SELECT record_id, table_name, campus, actor, counter, edit FROM met
    ON CONFLICT DO NOTHING
), wall AS (SELECT sync.wall_us() + %(bound)s AS us)
SELECT actor, max(hlc), max(hlc) FILTER (WHERE hlc < ((us / 1000 << 16) | (us %% 1000 << 6))),
    max(hlc) FILTER (WHERE lane = %(lane)s),
    array_agg(DISTINCT change) FILTER (WHERE lane = '{Lane.EMERGENCY.value}')
FROM met, wall GROUP BY actor"""
_RECORD_ROWS = """\
(SELECT p.*, row_number() OVER (ORDER BY p.change) AS place,
    p.change = ANY (%(urgent)s::bigint[]) AS urgent
FROM pg_temp.campus_sync_pulled p WHERE p.change = ANY (%(some)s))"""
_TO_JOIN = """\
SELECT change, table_name, campus, record_id, src_table, record::text
FROM pg_temp.campus_sync_pulled WHERE change = ANY (%s) ORDER BY change"""


class Wanted(typing.NamedTuple):
    """What is asked of a peer.

    Attributes:
      incarnation: the peer's, whose change numbers these are.
      after, upto: exclusive and inclusive.
      express: up to which change the emergency lane has brought all of its own.
      limit: of how many records at once.
    """

    lane: Lane
    incarnation: str
    after: int
    upto: int
    express: int
    limit: int


class Page(typing.NamedTuple):
    """`rows`: how many records of the peer are staged: all that it has up to change `last`."""

    rows: int
    last: int


class Taken(typing.NamedTuple):
    """What became of a staged page.

    Attributes:
      learned: records that were taken as they came.
      hlc: the newest stamp of the lane among what was news, or None.
      to_join: the peer's change number, key, source table and record, as text, of those that
        must be joined one by one.
      skipped: key to change number of those that a client has locked.
    """

    learned: int
    hlc: int | None
    to_join: list[tuple[int, Key, str, str]]
    skipped: dict[Key, int]


class Carrier:
    """Carries pages of records from a peer into a store, in the caller's transactions.

    Args:
      conn, peer: set up by `hold_records.SESSION`.
    """

    def __init__(self, conn: psycopg.Connection, peer: psycopg.Connection, rules: ConflictRules):
        self._conn, self._peer, self._rules = conn, peer, rules
        self._from = ""
        (self._asker,) = conn.execute(_INCARNATION).fetchone()

    def offered(self, wanted: Wanted) -> bool:
        """Whether the peer has any of it; asks the peer alone."""
        query = _ANY.format(page=_PAGE.format(lane=_LANES[wanted.lane]))
        return self._peer.execute(query.encode(), self._names(wanted)).fetchone()[0]

    def _names(self, wanted: Wanted) -> dict[str, int | str]:
        return wanted._asdict() | {"asker": self._asker}

    def stage(self, wanted: Wanted) -> Page:
        """Stages what the peer has of it; returns what was found."""
        self._from = wanted.incarnation
        with self._conn.pipeline():
            self._conn.execute(_STAGE)
            self._conn.execute(_CLEAR)
        rows = self._copy(_PAGE.format(lane=_LANES[wanted.lane]), self._names(wanted))
        if rows < wanted.limit:
            return Page(rows, wanted.upto)
        return Page(rows, self._conn.execute(_LAST).fetchone()[0])

    def stage_again(self, keys: collections.abc.Collection[Key]) -> None:
        """Stages records that had to wait, as they are now."""
        names = names_of(list(keys))
        self._conn.execute(_TAKE_OUT.encode(), names)
        self._copy(_AGAIN, names)

    def _copy(self, page: str, names: dict) -> int:
        """Stages what the peer offers; returns how many records."""
        with self._conn.cursor() as cursor:
            with (
                self._peer.cursor().copy(_offer().format(page=page).encode(), names) as out,
                cursor.copy(_PUT) as into,
            ):
                for block in out:
                    into.write(block)
            return cursor.rowcount

    def take(self, lane: Lane) -> Taken:
        """Takes what is staged in, but what is known already.

        Raises:
          psycopg.Error, one of `hold_records.PASSING`: roll back and try again.
        """
        with self._conn.pipeline():  # What nothing is asked about goes together.
            return self._take(lane)

    def _take(self, lane: Lane) -> Taken:
        self._conn.execute(_DROP_KNOWN)
        rows = [_LOCK_ROWS.format(name=name, of_row=_OF_ROW) for name in _TABLES]
        locks = [self._conn.execute(query.encode()) for query in (*rows, _LOCK_RECORDS)]
        *rows, records = ([change for (change,) in lock] for lock in locks)
        found = self._judged({"rows": list(itertools.chain(*rows)), "records": records})
        skipped = {key: change for change, key in found.pop("skip", ())}
        joins = [change for change, _ in found.pop("join", ())]
        to_join = [
            (change, Key(table, campus, record_id), src_table, text)
            for change, table, campus, record_id, src_table, text in (
                self._conn.execute(_TO_JOIN, (joins,)) if joins else ()
            )
        ]
        taken = [change for some in found.values() for change, _ in some]
        hlc = self._write(found, taken, records, lane) if taken else None
        return Taken(len(taken), hlc, to_join, skipped)

    def _judged(self, locked: dict[str, list[int]]) -> dict[str, list[tuple[int, Key]]]:
        queries = [
            _JUDGE.format(
                name=name,
                key=_KEY,
                of_row=_OF_ROW,
                mark=SOURCE_MARK,
                above_base=COVERS_SQL.format(above="p.seen", below="base.seen"),
            )
            for name in _TABLES
        ]
        judged = [self._conn.execute(query.encode(), locked) for query in queries]
        found: dict[str, list[tuple[int, Key]]] = {}
        for change, table, campus, record_id, verdict in itertools.chain.from_iterable(judged):
            found.setdefault(verdict, []).append((change, Key(table, campus, record_id)))
        return found

    def _write(
        self,
        found: dict[str, list[tuple[int, Key]]],
        taken: list[int],
        records: list[int],
        lane: Lane,
    ) -> int | None:
        conn = self._conn
        # A dot that another store has seen must not be lost here: it would be given out again.
        conn.execute("SET LOCAL synchronous_commit = local")
        names = {"taken": taken, "lane": lane.value, "bound": self._rules.skew_bound_us + 1}
        meeting, clock = conn.execute(_MEET, names), ask_clock(conn)
        met = meeting.fetchall()
        stamps = {(hlc, row[0]) for row in met for hlc in row[1:3] if hlc is not None}
        take_stamps(conn, self._rules, stamps, clock)
        for how, some in sorted(found.items()):
            for name in sorted({key.table for _, key in some}):
                changes = [change for change, key in some if key.table == name]
                rows = (_GONE if how == "remove" else _ROWS).format(name=name)
                conn.execute(row_statement(name, how, rows).encode(), (changes,))
        urgent = [change for row in met for change in row[4] or ()]
        known = set(taken) & set(records)
        for new, some in ((True, set(taken) - known), (False, known)):
            names = {"some": list(some), "urgent": urgent}
            write_records(
                conn, _RECORD_ROWS, len(some), new=new, names=names, taken_from=self._from
            )
        return max((row[3] for row in met if row[3] is not None), default=None)


@functools.cache
def _offer() -> str:
    shown = " UNION ALL ".join(_SHOWN.format(name=name) for name in _TABLES)
    return _OFFER.format(page="{page}", rows=shown, key=same_key("c", "p"))
