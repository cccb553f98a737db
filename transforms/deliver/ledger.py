"""The ledger of a consult store: how far each link and lane has been applied, and what is known."""

import dataclasses
import json
import typing
from collections.abc import Collection, Mapping, Sequence

import psycopg
from psycopg.conninfo import conninfo_to_dict

from schemas.batches import Lane
from schemas.entities import TABLES
from schemas.errors import StoreUnavailable
from schemas.positions import SEQ_END, START, Position
from schemas.receipts import Counts
from transforms import postgresql_sessions
from transforms.capture.resume import Reason
from transforms.capture.snapshot_part import Rest, SnapshotChanges
from transforms.deliver import store_schema
from transforms.escalations import Escalations

_NEWEST_BEYOND = (
    "SELECT coalesce(max(p.lsn), 0) FROM ("
    "SELECT end_lsn FROM sync.island WHERE link = %(link)s AND end_lsn > %(lsn)s"
    + "".join(
        f" UNION ALL SELECT src_lsn FROM consult.{name}"
        " WHERE campus = %(campus)s AND src_lsn > %(lsn)s"
        for name in TABLES
    )
    + ") AS p (lsn)"
)

Span = tuple[Position, Position]  # (begin exclusive, end inclusive].


class Progress(typing.NamedTuple):
    """What a link's reader needs to know of the store; positions are durable, None if unknown.

    `snapshot_lsn` is L0 of the link's latest snapshot.
    """

    routine: Position | None
    emergency: Position | None
    snapshot_lsn: int | None = None

    @property
    def log_from(self) -> Position | None:
        """From where on the log is needed: behind the snapshot while that is being read."""
        if self.snapshot_lsn is None:
            return self.routine
        return max(self.routine or START, Position(self.snapshot_lsn, SEQ_END))


def connect(dsn: str) -> psycopg.Connection:
    """Returns an autocommit connection to a store whose schema is in place.

    Raises:
      psycopg.OperationalError: the store cannot be reached.
      ConfigError: its schema is newer than this software.
    """
    conn = postgresql_sessions.connect(dsn, application_name="campus_sync")
    try:
        store_schema.ensure(conn)
    except BaseException:
        conn.close()
        raise
    return conn


def server_of(dsn: str) -> str:
    """Returns `host:port` of a connection string, for people."""
    known = conninfo_to_dict(dsn)
    return f"{known.get('host', 'local')}:{known.get('port', 5432)}"


def unavailable(place: str, error: psycopg.Error) -> StoreUnavailable:
    """Returns the error for a store that broke; PostgreSQL's own text may quote data."""
    if isinstance(error, psycopg.errors.DiskFull):
        return StoreUnavailable(f"{place}: its disk is full ({error.sqlstate}). Remedy: make room.")
    return StoreUnavailable(f"{place}: {type(error).__name__} ({error.sqlstate or 'connection'})")


def read(conn: psycopg.Connection, link: str) -> Progress:
    """Returns the link's progress as a crash of the store would leave it.

    The store may commit asynchronously: rows and ledger are then lost together or not at all,
    but a position must be acknowledged to the source only once it is on the store's disk
    (trap 3). The log's insert position is taken after the ledger was seen, so it covers the
    commit; where the flush has not come so far, an empty synchronous commit forces it.
    """
    rows = conn.execute(_READ, (link,)).fetchall()
    durable, snapshot_lsn = conn.execute(_DURABLE, (link,)).fetchone()
    if not durable:
        with conn.transaction():
            conn.execute("SET LOCAL synchronous_commit = local")
            conn.execute("SELECT pg_current_xact_id(), pg_logical_emit_message(true, '', '')")
    lanes = {lane: Position(lsn, seq) for lane, lsn, seq in rows}
    return Progress(lanes.get(Lane.ROUTINE), lanes.get(Lane.EMERGENCY), snapshot_lsn)


def newest_beyond(conn: psycopg.Connection, link: str, campus: str, lsn: int) -> int:
    """Returns the last place behind `lsn` of which the store has anything, 0 if there is none.

    Rows of sets (ADR 0026) and islands lie beyond the ledger. Costs one look at the block ranges
    of each table (`quality_schema.changed_ddl`), and reads those that hold such a place of any
    campus: at the worst the tables once, as a snapshot's sweeps do.
    """
    names = {"link": link, "campus": campus, "lsn": lsn}
    return conn.execute(_NEWEST_BEYOND, names).fetchone()[0]


def escalations(conn: psycopg.Connection, campus: str) -> Escalations:
    """Returns who is under emergency at `campus`, as the store has it."""
    rows = conn.execute(
        'SELECT patient_id, rule, lsn, seq, "open" FROM sync.escalation WHERE campus = %s',
        (campus,),
    )
    return Escalations.from_rows(rows.fetchall())


def read_tables(conn: psycopg.Connection, link: str) -> set[str]:
    """Returns the source tables (`schema.table`) that a snapshot of the link has read whole."""
    rows = conn.execute("SELECT src_table FROM sync.sweep WHERE link = %s", (link,))
    return {table for (table,) in rows.fetchall()}


def begin_snapshot(
    conn: psycopg.Connection, link: str, lsn: int, reason: str, rows_estimated: int | None = None
) -> None:
    """Notes that the link is being read whole as of `lsn`; may be called again.

    With `Reason.NEW_LOG`, dead letters, holds and manifests of the source's log before are done
    with.
    """
    with conn.transaction():
        for statement in _END_OLD_LOG if reason == Reason.NEW_LOG else ():
            conn.execute(statement, (link,))
        conn.execute("DELETE FROM sync.snapshot_part WHERE link = %s", (link,))
        conn.execute("DELETE FROM sync.snapshot WHERE (link, lsn) = (%s, %s)", (link, lsn))
        conn.execute(
            "INSERT INTO sync.snapshot (link, lsn, state, reason, rows_estimated, read_at,"
            " resumed_at) VALUES (%s, %s, 'running', %s, %s, now(), now())",
            (link, lsn, reason, rows_estimated),
        )


def rest_of_snapshot(conn: psycopg.Connection, link: str, lsn: int, at: Position) -> Rest | None:
    """Returns what the snapshot at `lsn` has left, if its rows up to `at` are safe.

    None: it does not run, or not by this software: it can only be begun anew.
    """
    row = conn.execute(
        "SELECT last_seq FROM sync.snapshot WHERE link = %s AND lsn = %s AND state = 'running'"
        " AND read_at IS NOT NULL",
        (link, lsn),
    ).fetchone()
    if row is None:
        return None
    parts = conn.execute(
        "SELECT src_table, ended, behind FROM sync.snapshot_part"
        " WHERE link = %s AND lsn = %s AND (lsn, seq) <= (%s, %s) ORDER BY seq",
        (link, lsn, *at),
    ).fetchall()
    done = frozenset(table for table, ended, _ in parts if ended)
    table, behind = (parts[-1][0], parts[-1][2]) if parts and not parts[-1][1] else ("", {})
    key = {column: bytes.fromhex(value) for column, value in behind.items()}
    return Rest(row[0], done, table, key)


def resume_snapshot(
    conn: psycopg.Connection, link: str, lsn: int, view_lsn: int | None, at: Position
) -> None:
    """Notes that a snapshot goes on behind `at`, by a view that reaches up to `view_lsn`."""
    with conn.transaction():
        conn.execute(
            "DELETE FROM sync.snapshot_part WHERE link = %s AND (lsn, seq) > (%s, %s)", (link, *at)
        )
        conn.execute(
            "UPDATE sync.snapshot s SET view_lsn = %(view)s, resumes = resumes + 1,"
            " resumed_at = now(), read_at = now(), rows_read = p.rows, resumed_rows = p.rows"
            " FROM (SELECT coalesce(sum(rows), 0) AS rows FROM sync.snapshot_part"
            " WHERE link = %(link)s) p WHERE (s.link, s.lsn) = (%(link)s, %(lsn)s)",
            {"view": view_lsn, "link": link, "lsn": lsn},
        )


def note_part(conn: psycopg.Connection, link: str, part: SnapshotChanges) -> None:
    """Notes where a snapshot goes on behind a part of it, on the store's disk.

    To be called before the part is handed out: no number of it is then given to another row.
    """
    with conn.pipeline(), conn.transaction():
        conn.execute("SET LOCAL synchronous_commit = local")
        if part.table:
            behind = {column: value.hex() for column, value in part.behind.items()}
            place = (link, *part.end, part.table, part.ended, json.dumps(behind))
            conn.execute(_PART, (*place, part.captured), prepare=True)
        numbers = (part.last_seq, part.captured, link, part.end.lsn)
        conn.execute(_PART_READ, numbers, prepare=True)


_PART = "INSERT INTO sync.snapshot_part VALUES (%s, %s, %s, %s, %s, %s, %s)"
_PART_READ = """\
UPDATE sync.snapshot SET last_seq = greatest(last_seq, %s), rows_read = rows_read + %s,
    read_at = now() WHERE link = %s AND lsn = %s"""


def published(conn: psycopg.Connection, link: str) -> dict[str, str]:
    """Returns which membership of its publication each source table had at the last snapshot."""
    query = "SELECT src_table, identity FROM sync.published WHERE link = %s"
    return dict(conn.execute(query, (link,)).fetchall())


def note_published(conn: psycopg.Connection, link: str, identities: Mapping[str, str]) -> None:
    """Notes the memberships (`slots.memberships`) whose tables a snapshot reads from now on."""
    conn.execute(
        "INSERT INTO sync.published (link, src_table, identity)"
        " SELECT %s, * FROM unnest(%s::text[], %s::text[])"
        " ON CONFLICT (link, src_table) DO UPDATE SET identity = excluded.identity",
        (link, list(identities), list(identities.values())),
    )


def forget_published(conn: psycopg.Connection, link: str, tables: Collection[str]) -> None:
    """Forgets memberships of tables that cannot be read now: once they can, a snapshot does."""
    conn.execute(
        "DELETE FROM sync.published WHERE link = %s AND src_table = ANY (%s)", (link, list(tables))
    )


# The snapshot judges all rows again, and what a new log does not have is neither to be replayed
# nor to be missed.
_END_OLD_LOG = (
    "UPDATE sync.dead_letter SET state = 'replayed', replayed_at = clock_timestamp()"
    " WHERE link = %s AND state = 'open'",
    "UPDATE sync.hold SET state = 'resolved' WHERE link = %s AND state = 'open'",
    "DELETE FROM sync.manifest WHERE link = %s",
)
_READ = "SELECT lane, lsn, seq FROM sync.progress WHERE link = %s"
_DURABLE = """\
SELECT pg_current_wal_insert_lsn() <= pg_current_wal_flush_lsn(), (
    SELECT max(lsn) FROM sync.snapshot WHERE link = %s)"""


@dataclasses.dataclass(frozen=True)
class LedgerState:
    """One lane's ledger under its lock.

    Attributes:
      position: everything up to here is applied.
      islands: what is applied beyond it, ordered, apart from it and from one another.
      sweeps: source table to the LSN of the snapshot that told what was gone before it.
      snapshot_running: whether a snapshot of the link is not noted as done.
      view_lsn: how far in the log later views of snapshots have seen, 0 if there were none.
    """

    position: Position
    islands: tuple[Span, ...] = ()
    sweeps: dict[str, int] = dataclasses.field(default_factory=dict)
    snapshot_running: bool = False
    view_lsn: int = 0

    def covered_in(self, begin: Position, end: Position) -> list[Span]:
        """Returns the parts of (begin, end] that have been applied, in order."""
        spans = [(Position(-1, 0), self.position), *self.islands]
        parts = [(max(begin, low), min(end, high)) for low, high in spans]
        return [(low, high) for low, high in parts if low < high]

    def covers(self, begin: Position, end: Position) -> bool:
        """Whether all of (begin, end], which is not empty, has been applied."""
        return (begin, end) in self.covered_in(begin, end)

    def joins(self, begin: Position) -> bool:
        """Whether a batch that begins there leaves no gap."""
        return begin <= self.position

    def with_applied(self, begin: Position, end: Position) -> "LedgerState":
        """Returns the state once (begin, end] is applied: islands that touch become one."""
        position, islands = self.position, []
        for low, high in sorted([*self.islands, (begin, end)]):
            if low <= position:
                position = max(position, high)
            elif islands and low <= islands[-1][1]:
                islands[-1] = (islands[-1][0], max(islands[-1][1], high))
            else:
                islands.append((low, high))
        return dataclasses.replace(self, position=position, islands=tuple(islands))


_LOOK = "SELECT lsn, seq FROM sync.progress WHERE link = %s AND lane = %s"
_LOCK = f"{_LOOK} FOR UPDATE"
_CREATE = """\
INSERT INTO sync.progress (link, lane, lsn, seq, captured, delivered, duplicates, superseded,
    held, dead, swept, commit_us, watermark_us)
VALUES (%s, %s, %s, %s, 0, 0, 0, 0, 0, 0, 0, 0, 0) ON CONFLICT (link, lane) DO NOTHING"""
# One row a fact, so that one statement after the lock sees what its last holder committed.
_KNOWN = """\
SELECT 'island', '', begin_lsn, begin_seq, end_lsn, end_seq FROM sync.island
    WHERE link = %(link)s AND lane = %(lane)s
UNION ALL SELECT 'sweep', src_table, lsn, 0, 0, 0 FROM sync.sweep WHERE link = %(link)s
UNION ALL SELECT state, '', coalesce(view_lsn, 0), 0, 0, 0 FROM sync.snapshot
    WHERE link = %(link)s AND (state = 'running' OR view_lsn IS NOT NULL)"""
_SAVE = """\
UPDATE sync.progress SET lsn = %s, seq = %s, captured = captured + %s,
    delivered = delivered + %s, duplicates = duplicates + %s, superseded = superseded + %s,
    held = held + %s, dead = dead + %s, swept = swept + %s,
    commit_us = greatest(commit_us, %s), watermark_us = greatest(watermark_us, %s),
    updated_at = clock_timestamp()
WHERE link = %s AND lane = %s"""
_DONE = """\
UPDATE sync.snapshot SET state = 'done', finished_at = now()
WHERE link = %s AND state = 'running' AND (lsn, %s) <= (%s, %s)"""


def lock(conn: psycopg.Connection, link: str, lane: Lane) -> LedgerState:
    """Begins a transaction that holds a lane's ledger, and returns it; creates it if absent."""
    names = {"link": link, "lane": lane.value}
    while True:
        with conn.pipeline():
            conn.execute("BEGIN")
            locked = conn.execute(_LOCK, (link, lane.value), prepare=True)
            known = conn.execute(_KNOWN, names, prepare=True)
        row = locked.fetchone()
        if row is not None:
            break
        conn.execute(_CREATE, (link, lane.value, *START))
        conn.execute("COMMIT")
    return _state(row, known.fetchall())


def look(conn: psycopg.Connection, link: str, lane: Lane) -> LedgerState:
    """Returns a lane's ledger as it is now; it may move at once."""
    with conn.pipeline():
        found = conn.execute(_LOOK, (link, lane.value), prepare=True)
        known = conn.execute(_KNOWN, {"link": link, "lane": lane.value}, prepare=True)
    return _state(found.fetchone() or START, known.fetchall())


def _state(row: Sequence[int], facts: Sequence[tuple]) -> LedgerState:
    islands, sweeps, running, view_lsn = [], {}, False, 0
    for kind, table, lsn, seq, end_lsn, end_seq in facts:
        if kind == "island":
            islands.append((Position(lsn, seq), Position(end_lsn, end_seq)))
        elif kind == "sweep":
            sweeps[table] = lsn
        else:
            running |= kind == "running"
            view_lsn = max(view_lsn, lsn)
    return LedgerState(Position(*row), tuple(sorted(islands)), sweeps, running, view_lsn)


def save(
    conn: psycopg.Connection,
    link: str,
    lane: Lane,
    before: LedgerState,
    after: LedgerState,
    counts: Counts,
    swept: int,
    commit_us: int,
    watermark_us: int,
) -> None:
    """Moves the locked ledger; to be the transaction's last work."""
    place = (link, lane.value)
    numbers = (*after.position, *counts, swept, commit_us, watermark_us)
    conn.execute(_SAVE, (*numbers, *place), prepare=True)
    if before.islands != after.islands:
        _save_islands(conn, place, after.islands)
    if after.snapshot_running and lane is Lane.ROUTINE:
        conn.execute(_DONE, (link, SEQ_END, *after.position))


def pass_delivered(conn: psycopg.Connection, link: str) -> None:
    """Moves an emergency ledger with missing stretches to where the routine one stands.

    For a reader that begins: it reads from there on, so nobody would send what the lane lost
    before; the routine lane has brought it.
    """
    if not look(conn, link, Lane.EMERGENCY).islands:
        return
    before = lock(conn, link, Lane.EMERGENCY)
    delivered = look(conn, link, Lane.ROUTINE).position
    if delivered <= before.position:
        conn.execute("ROLLBACK")
        return
    after = before.with_applied(before.position, delivered)
    save(conn, link, Lane.EMERGENCY, before, after, Counts(), 0, 0, 0)
    conn.execute("COMMIT")


def _save_islands(conn, place: tuple[str, str], islands: Sequence[Span]) -> None:
    conn.execute("DELETE FROM sync.island WHERE link = %s AND lane = %s", place)
    for begin, end in islands:
        conn.execute(
            "INSERT INTO sync.island (link, lane, begin_lsn, begin_seq, end_lsn, end_seq)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            (*place, *begin, *end),
        )
