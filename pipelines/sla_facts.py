"""What one source or one store says of itself now: its log and slots, its ledgers and alarms."""

import collections
import dataclasses
import datetime
from collections.abc import Callable

import psycopg

from pipelines.log_guard import Keeping, SlotKeeping, SlotsKeeping
from schemas.batches import Lane
from schemas.receipts import Counts
from schemas.reconcile_schedule import Run
from schemas.reports import (
    AlarmCount,
    BacklogPoint,
    Completeness,
    Conservation,
    Fill,
    Gap,
    Hold,
    Incident,
    Refused,
    Snapshot,
    State,
    Tending,
)
from schemas.sketches import LagSketch
from transforms.capture.retention import RATE_AGE_MAX_US
from transforms.deliver import reconcile_records

POINTS_MAX = 240  # A chart shows no more.
_GAPS_MAX = 50


@dataclasses.dataclass(frozen=True)
class Slot:
    """A link's replication slot; `wal_status` as PostgreSQL says it."""

    active: bool
    wal_status: str
    retained_bytes: int
    confirmed_lsn: int


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """One source now: end of its log, its clock, and slots by name.

    `units_per_byte` tells how the distance of two of its LSNs is read; 0: it is no length.
    `total` is how much log there has been, `keeping` how long it stays.
    """

    wal_lsn: int
    clock_us: int
    slots: dict[str, Slot]
    units_per_byte: int = 1
    total: int = 0
    keeping: Keeping | None = None


@dataclasses.dataclass(frozen=True)
class LagRow:
    """A row of `sync.lag`: one window of one start of the pipeline."""

    link: str
    lane: Lane
    start_us: int
    late: int
    sketch: LagSketch


@dataclasses.dataclass(frozen=True)
class StoreFacts:
    """One store's ledgers now; `gaps` and `completeness` only where they were asked for."""

    ledgers: tuple[Conservation, ...]
    refused: tuple[Refused, ...]
    snapshots: tuple[Snapshot, ...]
    holds: tuple[Hold, ...]
    incidents: tuple[Incident, ...]
    completeness: tuple[Completeness, ...] = ()
    gaps: tuple[Gap, ...] = ()
    lag: tuple[LagRow, ...] = ()
    backlog: tuple[BacklogPoint, ...] = ()
    alarms: tuple[AlarmCount, ...] = ()
    tending: Tending | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    reconciliations: tuple[Run, ...] = ()


NO_FACTS = StoreFacts((), (), (), (), ())


_SOURCE = """\
SELECT pg_current_wal_lsn() - '0/0', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"""
_SLOTS = """\
SELECT slot_name, active, coalesce(wal_status, 'lost'),
    coalesce(pg_current_wal_lsn() - restart_lsn, 0)::bigint,
    coalesce(confirmed_flush_lsn - '0/0', 0)::bigint, safe_wal_size,
    coalesce(extract(epoch FROM clock_timestamp()
        - (to_jsonb(s) ->> 'inactive_since')::timestamptz), 0)::float8
FROM pg_replication_slots s WHERE database = current_database()"""
_IDLE_MAX = """\
SELECT setting::float8 * CASE unit WHEN 'min' THEN 60 WHEN 'ms' THEN 0.001 ELSE 1 END
FROM pg_settings WHERE name = 'idle_replication_slot_timeout' AND setting <> '0'"""
_LEDGERS = """\
SELECT p.link, p.lane, p.captured, p.delivered, p.duplicates, p.superseded, p.held, p.dead,
    p.swept, p.lsn, p.seq, p.commit_us, p.watermark_us, p.updated_at,
    (SELECT count(*) FROM sync.island i WHERE (i.link, i.lane) = (p.link, p.lane))
FROM sync.progress p ORDER BY p.link, p.lane"""
_REFUSED = """\
SELECT link, src_table, column_name, reason, count(*) FILTER (WHERE state = 'open'),
    count(*) FILTER (WHERE state = 'replayed')
FROM sync.dead_letter GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4"""
_SNAPSHOTS = """\
SELECT link, state, reason, started_at, finished_at, rows_read, rows_estimated,
    coalesce((rows_read - resumed_rows) / nullif(extract(epoch FROM read_at - resumed_at), 0),
        0)::float8, resumes
FROM sync.snapshot ORDER BY started_at"""
_HOLDS = "SELECT link, kind, src_table, state, noted_at FROM sync.hold ORDER BY noted_at"
_INCIDENTS = """\
SELECT link, kind, detail, state, opened_at, closed_at FROM sync.incident
WHERE opened_at >= %s OR state = 'open' ORDER BY id"""
_COMPLETENESS = """\
SELECT link, lane, table_name, count(*),
    count(*) FILTER (WHERE store_count < source_count),
    count(*) FILTER (WHERE store_count >= source_count
        AND (store_count, store_digest) <> (source_count, source_digest)),
    sum(source_count)::bigint, sum(store_count)::bigint,
    min(window_start) FILTER (WHERE (store_count, store_digest) <> (source_count, source_digest))
FROM sync.manifest GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"""
_GAPS = """\
SELECT link, lane, table_name, window_start, source_count, store_count
FROM sync.manifest WHERE (store_count, store_digest) <> (source_count, source_digest)
ORDER BY window_start, 1, 2, 3 LIMIT %s"""
_LAG = """\
SELECT link, lane, window_start, late, sketch FROM sync.lag WHERE window_start >= %s
ORDER BY window_start"""
_HEALTH = """\
SELECT link, sampled_at, state, backlog_bytes, watermark_lag_ms FROM sync.link_health
WHERE sampled_at >= %s ORDER BY link, sampled_at"""
# By the index of open alarms: there are far more settled ones.
_ALARMS_OPEN = """\
SELECT rule, campus, table_name, column_name, reason, count(*), NULL
FROM sync.quality_alarm WHERE settled_at IS NULL GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"""
_ALARMS = """\
SELECT rule, campus, table_name, column_name, reason,
    count(*) FILTER (WHERE settled_at IS NULL), count(*)
FROM sync.quality_alarm GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"""
_TENDING = """\
SELECT (SELECT min(checked_at) FROM sync.quality_progress),
    (SELECT min(linked_at) FROM sync.person_progress),
    (SELECT count(*) FROM sync.person_review WHERE state = 'open')"""
_RATES = """\
SELECT source, units_per_s FROM sync.log_rate
WHERE measured_at > now() - make_interval(secs => %s)"""


def source_facts(conn: psycopg.Connection) -> SourceFacts:
    wal_lsn, clock_us = conn.execute(_SOURCE).fetchone()
    row = conn.execute(_IDLE_MAX).fetchone()
    idle_max_s = None if row is None else row[0]
    slots, keeping = {}, {}
    for name, active, status, retained, confirmed, safe, idle_s in conn.execute(_SLOTS):
        slots[name] = Slot(active, status, retained, confirmed)
        in_danger = status in ("unreserved", "lost")
        keeping[name] = SlotKeeping(retained, safe, in_danger, idle_s, idle_max_s)
    lsn = int(wal_lsn)
    return SourceFacts(lsn, clock_us, slots, total=lsn, keeping=SlotsKeeping(keeping))


def recent_facts(since_us: int) -> Callable[[psycopg.Connection], StoreFacts]:
    def find(conn: psycopg.Connection) -> StoreFacts:
        facts = _ledger_facts(conn, since_us)
        alarms = _alarms(conn, _ALARMS_OPEN)
        return dataclasses.replace(facts, lag=_lag_rows(conn, since_us), alarms=alarms)

    return find


def all_facts(conn: psycopg.Connection, since_us: int) -> StoreFacts:
    if not _exists(conn, "sync.progress"):
        return NO_FACTS
    completeness = tuple(
        Completeness(link, Lane(lane), *rest, None if first is None else _us(first))
        for link, lane, *rest, first in conn.execute(_COMPLETENESS)
    )
    gaps = tuple(
        Gap(
            link,
            Lane(lane),
            table,
            _us(start),
            wanted,
            got,
            Fill.SHORT if got < wanted else Fill.DIFFERENT,
        )
        for link, lane, table, start, wanted, got in conn.execute(_GAPS, (_GAPS_MAX,))
    )
    return dataclasses.replace(
        _ledger_facts(conn, since_us),
        completeness=completeness,
        gaps=gaps,
        lag=_lag_rows(conn, since_us),
        backlog=_backlog_points(conn, since_us),
        alarms=_alarms(conn, _ALARMS),
    )


def _ledger_facts(conn: psycopg.Connection, since_us: int) -> StoreFacts:
    if not _exists(conn, "sync.progress"):
        return NO_FACTS
    ledgers = tuple(
        Conservation(link, Lane(lane), Counts(*row[:6]), *row[6:11], _us(row[11]), row[12])
        for link, lane, *row in conn.execute(_LEDGERS)
    )
    snapshots = tuple(
        Snapshot(link, state, why, _us(started), None if done is None else _us(done), *read)
        for link, state, why, started, done, *read in conn.execute(_SNAPSHOTS)
    )
    incidents = tuple(
        Incident(*row, _us(opened), None if closed is None else _us(closed))
        for *row, opened, closed in conn.execute(_INCIDENTS, (_time(since_us),))
    )
    return StoreFacts(
        ledgers=ledgers,
        refused=tuple(Refused(*row) for row in conn.execute(_REFUSED)),
        snapshots=snapshots,
        holds=tuple(Hold(*row, _us(noted)) for *row, noted in conn.execute(_HOLDS)),
        incidents=incidents,
        tending=_tending(conn),
        rates=_rates(conn),
        reconciliations=reconcile_records.runs(conn),
    )


def _alarms(conn: psycopg.Connection, query: str) -> tuple[AlarmCount, ...]:
    if not _exists(conn, "sync.quality_alarm"):
        return ()
    return tuple(AlarmCount("", *row) for row in conn.execute(query))


def _tending(conn: psycopg.Connection) -> Tending | None:
    if not _exists(conn, "sync.quality_progress") or not _exists(conn, "sync.person_progress"):
        return None
    judged, matched, reviews = conn.execute(_TENDING).fetchone()
    return Tending(
        "",
        None if judged is None else _us(judged),
        None if matched is None else _us(matched),
        reviews,
    )


def _rates(conn: psycopg.Connection) -> dict[str, float]:
    if not _exists(conn, "sync.log_rate"):
        return {}
    return dict(conn.execute(_RATES, (RATE_AGE_MAX_US / 1e6,)).fetchall())


def _lag_rows(conn: psycopg.Connection, since_us: int) -> tuple[LagRow, ...]:
    if not _exists(conn, "sync.lag"):
        return ()
    rows = conn.execute(_LAG, (_time(since_us),), binary=True)
    return tuple(
        LagRow(link, Lane(lane), _us(start), late, LagSketch.from_bytes(sketch))
        for link, lane, start, late, sketch in rows
    )


def _backlog_points(conn: psycopg.Connection, since_us: int) -> tuple[BacklogPoint, ...]:
    """Returns samples of health, thinned out to what a chart shows; the worst of each step."""
    if not _exists(conn, "sync.link_health"):
        return ()
    points = collections.defaultdict(list)
    for link, at, state, *rest in conn.execute(_HEALTH, (_time(since_us),)):
        points[link].append(BacklogPoint(link, _us(at), State(state), *rest))
    kept = []
    for some in points.values():
        step = -(-len(some) // POINTS_MAX)
        for i in range(0, len(some), step):
            kept.append(max(some[i : i + step], key=lambda point: point.backlog_bytes or 0))
    return tuple(kept)


def _exists(conn: psycopg.Connection, table: str) -> bool:
    return conn.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone()[0]


def _time(us: int) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(microseconds=us)


def _us(moment: datetime.datetime) -> int:
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
