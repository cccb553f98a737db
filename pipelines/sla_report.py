"""Gather what sources, stores and ledgers say: the live view of every link, and the SLA report."""

import collections
import concurrent.futures
import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable, Sequence

import psycopg

from pipelines.source_clocks import log_end
from schemas.batches import Lane
from schemas.config import PRIMARY, Config, Link, Objectives
from schemas.errors import CampusSyncError
from schemas.positions import START, Position
from schemas.receipts import Counts
from schemas.reports import (
    ONE_SIDED,
    BacklogPoint,
    Comparison,
    Completeness,
    Conservation,
    Fill,
    Gap,
    Health,
    Hold,
    Incident,
    LagPoint,
    LaneLag,
    Measured,
    Pair,
    Refused,
    Report,
    Snapshot,
    State,
)
from schemas.sketches import WINDOW_S, LagSketch, merge_all

POINTS_MAX = 240  # A chart shows no more.
_GAPS_MAX = 50
_RECENT_US = 60_000_000
_CONNECT_TIMEOUT_S = 3
_OPTIONS = "-c statement_timeout=30000 -c default_transaction_read_only=on -c timezone=UTC"


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
    """

    wal_lsn: int
    clock_us: int
    slots: dict[str, Slot]
    units_per_byte: int = 1


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


_NO_FACTS = StoreFacts((), (), (), (), ())


@dataclasses.dataclass(frozen=True)
class LinkView:
    """One link now: its health, its ledgers by lane and its lag in the last minute."""

    health: Health
    ledgers: dict[Lane, Conservation]
    lag: dict[Lane, LaneLag]
    dead_letters: int


@dataclasses.dataclass(frozen=True)
class View:
    """All links now. `unreachable` names ends as `source main` or `store primary`."""

    at_us: int
    links: tuple[LinkView, ...]
    pairs: tuple[Pair, ...]
    unreachable: tuple[str, ...]


class Observer:
    """Asks every source and store, all at once; keeps its connections. Not thread-safe."""

    def __init__(self, config: Config):
        self._config = config
        self._conns: dict[tuple[str, str], psycopg.Connection] = {}
        ends = len(config.sources) + len(config.stores)
        self._pool = concurrent.futures.ThreadPoolExecutor(ends, "observe")

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()
        for conn in self._conns.values():
            conn.close()
        self._conns.clear()

    def view(self, now_us: int) -> View:
        """Returns all links now; what cannot be reached is named, never an error."""
        sources, stores = self._ask(_source_facts, _recent_facts(now_us - _RECENT_US))
        primary = stores.get(PRIMARY)
        recent = _by_lane(primary.lag if primary else ())
        links = []
        for link in self._config.links():
            store = stores.get(link.store)
            own = [part for part in (store.ledgers if store else ()) if part.link == link.name]
            lag = {
                lane: LaneLag.of(link.name, lane, *recent[link.name, lane])
                for lane in Lane
                if (link.name, lane) in recent
            }
            dead = [
                part.open for part in (store.refused if store else ()) if part.link == link.name
            ]
            health = _health(link, sources.get(link.source), store, self._config.objectives, now_us)
            links.append(LinkView(health, {part.lane: part for part in own}, lag, sum(dead)))
        return View(
            now_us,
            tuple(links),
            _pairs(self._config, stores, now_us),
            self._unreachable(sources, stores),
        )

    def report(
        self, now_us: int, since_us: int = 0, comparison: Comparison | None = None
    ) -> Report:
        """Returns the report of the time since `since_us`; `comparison` comes from `compare`."""
        sources, stores = self._ask(_source_facts, functools.partial(_all_facts, since_us=since_us))
        primary = stores.get(PRIMARY)
        rows = primary.lag if primary else ()
        links = self._config.links()
        known = {link.name for link in links}
        store_of = {link.name: stores.get(link.store) for link in links}

        def every(part: str) -> tuple:
            """One kind of fact of every link, each from the store that it feeds."""
            return tuple(
                fact
                for name, store in store_of.items()
                for fact in (getattr(store, part) if store else ())
                if fact.link == name
            )

        pairs = _pairs(self._config, stores, now_us)
        return Report(
            made_us=now_us,
            from_us=min((row.start_us for row in rows), default=0),
            to_us=max((row.start_us + WINDOW_S * 1_000_000 for row in rows), default=0),
            links=tuple(known_link.name for known_link in links),
            health=tuple(
                _health(
                    link,
                    sources.get(link.source),
                    store_of[link.name],
                    self._config.objectives,
                    now_us,
                )
                for link in links
            ),
            lag=tuple(LaneLag.of(*key, *value) for key, value in _by_lane(rows).items()),
            points=lag_points(rows),
            backlog=tuple(p for p in (primary.backlog if primary else ()) if p.link in known),
            conservation=_with_totals(every("ledgers")),
            completeness=every("completeness"),
            gaps=every("gaps"),
            refused=every("refused"),
            holds=every("holds"),
            incidents=_incidents(stores),
            snapshots=every("snapshots"),
            pairs=pairs,
            objectives=measure_objectives(self._config.objectives, known, rows, pairs),
            unreachable=self._unreachable(sources, stores),
            comparison=comparison,
        )

    def _unreachable(self, sources: dict, stores: dict) -> tuple[str, ...]:
        names = [f"source {name}" for name in self._config.sources if name not in sources]
        return (*names, *(f"store {name}" for name in self._config.stores if name not in stores))

    def _ask(self, of_source: Callable, of_store: Callable) -> tuple[dict, dict]:
        """Returns what `of_source` and `of_store` find, by name; the unreachable are left out."""
        asked = [
            (kind, name, self._pool.submit(self._one, kind, name, end.dsn, find))
            for kind, ends, find in (
                ("source", self._config.sources, of_source),
                ("store", self._config.stores, of_store),
            )
            for name, end in ends.items()
        ]
        found: dict[str, dict] = {"source": {}, "store": {}}
        for kind, name, future in asked:
            if (facts := future.result()) is not None:
                found[kind][name] = facts
        return found["source"], found["store"]

    def _one(self, kind: str, name: str, dsn: str, find: Callable):
        if kind == "source" and self._config.sources[name].kind != "postgresql":
            return self._slotless(name)
        try:
            conn = self._conns.get((kind, name))
            if conn is None or conn.closed:
                conn = self._conns[kind, name] = psycopg.connect(
                    dsn,
                    autocommit=True,
                    connect_timeout=_CONNECT_TIMEOUT_S,
                    options=_OPTIONS,
                    application_name="campus_sync_report",
                )
            with conn.transaction():
                # One picture: a ledger and its dead letters are of the same moment.
                conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                return find(conn)
        except psycopg.Error:
            if (conn := self._conns.pop((kind, name), None)) is not None:
                conn.close()
            return None

    def _slotless(self, name: str) -> SourceFacts | None:
        """Facts of a source that keeps its log for nobody in particular."""
        try:
            end = log_end(self._config.sources[name])
        except CampusSyncError:
            return None
        own = [link.slot for link in self._config.links() if link.source == name]
        slots = dict.fromkeys(own, Slot(True, "none", 0, 0))
        return SourceFacts(end.lsn, end.clock_us, slots, end.units_per_byte)


class PairWatch:
    """Decides when an emergency that only one of two stores has is an incident (ADR 0006).

    Not by the newest emergency, which is always young under load: by a position that the
    waiting store must reach within the objective of when the other one was seen there.
    """

    def __init__(self, pair_s: float):
        self._pair_us = round(pair_s * 1e6)
        self._wanted: dict[str, tuple[str, Position, int]] = {}

    def late(self, pair: Pair, now_us: int) -> bool:
        """Whether the pair has been one-sided for too long; to be asked again and again."""
        if pair.together:
            self._wanted.pop(pair.source, None)
            return False
        reached = pair.primary_reached if pair.waiting == pair.primary_link else pair.local_reached
        link, wanted, since_us = self._wanted.get(pair.source, ("", START, 0))
        if link != pair.waiting or (reached is not None and reached >= wanted):
            wanted, since_us = pair.newest, now_us
        self._wanted[pair.source] = (pair.waiting, wanted, since_us)
        return now_us - since_us > self._pair_us


def gather(config: Config, now_us: int, since_us: int = 0, comparison=None) -> Report:
    """Returns the report of the time since `since_us` (µs since 1970); see `Observer.report`."""
    with Observer(config) as observer:
        return observer.report(now_us, since_us, comparison)


def lag_points(rows: Sequence[LagRow], points_max: int = POINTS_MAX) -> tuple[LagPoint, ...]:
    """Returns lag over time by link and lane: windows joined until the period has `points_max`."""
    if not rows:
        return ()
    width_us = WINDOW_S * 1_000_000
    first, last = min(row.start_us for row in rows), max(row.start_us for row in rows)
    windows = (last - first) // width_us + 1
    span_us = width_us * -(-windows // points_max)
    parts: dict[tuple, list[LagRow]] = collections.defaultdict(list)
    for row in rows:
        start_us = first + (row.start_us - first) // span_us * span_us
        parts[row.link, row.lane, start_us].append(row)
    points = []
    for (link, lane, start_us), some in sorted(parts.items()):
        sketch = merge_all(row.sketch for row in some)
        p50, p90, p99 = sketch.quantiles((0.5, 0.9, 0.99))
        late = sum(row.late for row in some)
        rows_in = sketch.count
        seconds = span_us // 1_000_000
        points.append(
            LagPoint(link, lane, start_us, seconds, rows_in, late, p50, p90, p99, sketch.max_ms)
        )
    return tuple(points)


def measure_objectives(
    objectives: Objectives, links: Iterable[str], rows: Sequence[LagRow], pairs: Sequence[Pair]
) -> tuple[Measured, ...]:
    """Returns every objective of every link and pair with what was measured of it."""
    found = []
    limits = {
        Lane.EMERGENCY: ("emergency_p99_ms", objectives.emergency_p99_ms),
        Lane.ROUTINE: ("routine_p99_s", objectives.routine_p99_s * 1000),
    }
    windows: dict[tuple, list[LagSketch]] = collections.defaultdict(list)
    for link, lane, _, sketch in _windows(rows):
        windows[link, lane].append(sketch)
    for link in sorted(links):
        for lane, (name, limit_ms) in limits.items():
            some = [sketch for sketch in windows[link, lane] if sketch.count]
            whole = merge_all(some)
            over = sum(sketch.quantile(0.99) > limit_ms for sketch in some)
            scale, unit = (1000, "s") if name.endswith("_s") else (1, "ms")
            value = whole.quantile(0.99) / scale if whole.count else None
            share = whole.share_within(limit_ms) if whole.count else None
            found.append(
                Measured(name, link, lane, limit_ms / scale, value, unit, len(some), over, share)
            )
    for pair in pairs:
        found.append(Measured("pair_s", pair.source, None, objectives.pair_s, pair.longest_s, "s"))
    return tuple(found)


def _health(
    link: Link,
    source: SourceFacts | None,
    store: StoreFacts | None,
    objectives: Objectives,
    now_us: int,
) -> Health:
    ledger = None
    if store is not None:
        own = (part for part in store.ledgers if part.link == link.name)
        ledger = next((part for part in own if part.lane is Lane.ROUTINE), None)
    slot = source.slots.get(link.slot) if source else None
    backlog = lag_ms = None
    if source is not None and ledger is not None:
        applied = Position(ledger.lsn, ledger.seq).acknowledgeable_lsn
        left = max(0, source.wal_lsn - applied)
        backlog = (
            left // source.units_per_byte if source.units_per_byte else (0 if not left else None)
        )
    if ledger is not None and ledger.watermark_us:
        # The watermark of a source at rest stands still with its log: nothing is missing then.
        clock_us = source.clock_us if source else now_us
        lag_ms = 0 if backlog == 0 else max(0, clock_us - ledger.watermark_us) // 1000
    state, why = _judge(link, source, store, slot, ledger, lag_ms, objectives)
    return Health(
        link=link.name,
        state=state,
        why=why,
        backlog_bytes=backlog,
        retained_bytes=slot.retained_bytes if slot else None,
        watermark_lag_ms=lag_ms,
        slot=slot.wal_status if slot else "missing" if source else None,
        slot_active=slot.active if slot else None,
    )


def _judge(link, source, store, slot, ledger, lag_ms, objectives) -> tuple[State, str]:
    if store is None:
        return State.DOWN, f"store {link.store} cannot be reached"
    if source is None:
        return State.DOWN, f"source {link.source} cannot be reached"
    if slot is None and ledger is None:
        return State.DOWN, "never started; `campus-sync run` begins with a snapshot"
    if slot is None or slot.wal_status == "lost":
        return State.GAP, "its log is lost; `campus-sync run` fills the gap by a snapshot"
    running = [part for part in store.snapshots if part.state == "running"]
    if any(part.link == link.name for part in running):
        return State.GAP, "a snapshot is being read"
    if not slot.active:
        return State.DOWN, "nobody reads its slot; start `campus-sync run`"
    if ledger is None:
        return State.GAP, "nothing has been applied yet"
    if lag_ms is not None and lag_ms > objectives.routine_p99_s * 1000:
        return State.BEHIND, f"later than the objective of {objectives.routine_p99_s:g} s"
    if ledger.islands:
        return State.BEHIND, "a stretch is missing and being sent again"
    return State.UP, ""


def _pairs(config: Config, stores: dict[str, StoreFacts], now_us: int) -> tuple[Pair, ...]:
    """Returns the pair of every source that has a local store and a primary link."""
    names = {link.name for link in config.links()}
    incidents = [part for part in _incidents(stores) if part.kind == ONE_SIDED]
    pairs = []
    for source in config.sources:
        local_store = config.local_store(source)
        primary, local = f"{source}>{PRIMARY}", f"{source}>{local_store}"
        if {primary, local} <= names:
            own = [part for part in incidents if part.link in (primary, local)]
            ledgers = {primary: stores.get(PRIMARY), local: stores.get(local_store)}
            pairs.append(_pair(source, ledgers, own, config.objectives.pair_s, now_us))
    return tuple(pairs)


def _pair(
    source: str,
    stores: dict[str, StoreFacts | None],
    incidents: Sequence[Incident],
    pair_s: float,
    now_us: int,
) -> Pair:
    """Returns one pair; `stores` are what is known of its two links' stores, primary first."""
    reached: dict[str, Position | None] = {}
    newest: Conservation | None = None
    for link, facts in stores.items():
        own = [part for part in (facts.ledgers if facts else ()) if part.link == link]
        # The routine lane is complete: an emergency that it has passed has arrived too.
        reached[link] = max((_place(part) for part in own), default=None)
        for part in own:
            if part.lane is Lane.EMERGENCY and (newest is None or _place(part) > _place(newest)):
                newest = part
    waiting = ""
    if newest is not None:
        behind = [x for x, at in reached.items() if at is None or at < _place(newest)]
        waiting = behind[0] if behind else ""
    one_sided_s = max(0.0, (now_us - newest.updated_us) / 1e6) if waiting else 0.0
    lasted_s = [((p.closed_us or now_us) - p.opened_us) / 1e6 + pair_s for p in incidents]
    primary, local = reached
    return Pair(
        source=source,
        primary_link=primary,
        local_link=local,
        newest=None if newest is None else _place(newest),
        primary_reached=reached[primary],
        local_reached=reached[local],
        together=not waiting,
        waiting=waiting,
        one_sided_s=one_sided_s,
        longest_s=max([one_sided_s, *lasted_s]),
        incidents=len(incidents),
        open_incidents=sum(part.state == "open" for part in incidents),
    )


def _place(ledger: Conservation) -> Position:
    return Position(ledger.lsn, ledger.seq)


def _with_totals(ledgers: Sequence[Conservation]) -> tuple[Conservation, ...]:
    """Returns the ledgers with the sum of both lanes after each link's."""
    found = []
    for link in dict.fromkeys(part.link for part in ledgers):
        own = sorted((p for p in ledgers if p.link == link), key=lambda part: part.lane)
        total = Counts()
        for part in own:
            total = total.plus(part.counts)
        swept = sum(part.swept for part in own)
        found += [*own, Conservation(link, None, total, swept, islands=sum(p.islands for p in own))]
    return tuple(found)


def _incidents(stores: dict[str, StoreFacts]) -> tuple[Incident, ...]:
    found = {incident for facts in stores.values() for incident in facts.incidents}
    return tuple(sorted(found, key=lambda part: (part.opened_us, part.link, part.kind)))


def _windows(rows: Sequence[LagRow]) -> list[tuple[str, Lane, int, LagSketch]]:
    """Returns windows with the starts of the pipeline added up."""
    parts: dict[tuple, list[LagSketch]] = collections.defaultdict(list)
    for row in rows:
        parts[row.link, row.lane, row.start_us].append(row.sketch)
    return [(*key, merge_all(sketches)) for key, sketches in sorted(parts.items())]


def _by_lane(rows: Sequence[LagRow]) -> dict[tuple[str, Lane], tuple[LagSketch, int]]:
    """Returns sketch and late rows of each link and lane."""
    parts: dict[tuple[str, Lane], list[LagRow]] = collections.defaultdict(list)
    for row in rows:
        parts[row.link, row.lane].append(row)
    return {
        key: (merge_all(row.sketch for row in some), sum(row.late for row in some))
        for key, some in sorted(parts.items())
    }


# What is asked.

_SOURCE = """\
SELECT pg_current_wal_lsn() - '0/0', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"""
_SLOTS = """\
SELECT slot_name, active, coalesce(wal_status, 'lost'),
    coalesce(pg_current_wal_lsn() - restart_lsn, 0)::bigint,
    coalesce(confirmed_flush_lsn - '0/0', 0)::bigint
FROM pg_replication_slots WHERE database = current_database()"""
_LEDGERS = """\
SELECT p.link, p.lane, p.captured, p.delivered, p.duplicates, p.superseded, p.held, p.dead,
    p.swept, p.lsn, p.seq, p.commit_us, p.watermark_us, p.updated_at,
    (SELECT count(*) FROM sync.island i WHERE (i.link, i.lane) = (p.link, p.lane))
FROM sync.progress p ORDER BY p.link, p.lane"""
_REFUSED = """\
SELECT link, src_table, column_name, reason, count(*) FILTER (WHERE state = 'open'),
    count(*) FILTER (WHERE state = 'replayed')
FROM sync.dead_letter GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4"""
_SNAPSHOTS = "SELECT link, state, reason, started_at, finished_at FROM sync.snapshot ORDER BY 4"
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


def _source_facts(conn: psycopg.Connection) -> SourceFacts:
    wal_lsn, clock_us = conn.execute(_SOURCE).fetchone()
    slots = {name: Slot(*rest) for name, *rest in conn.execute(_SLOTS)}
    return SourceFacts(int(wal_lsn), clock_us, slots)


def _recent_facts(since_us: int) -> Callable[[psycopg.Connection], StoreFacts]:
    def find(conn: psycopg.Connection) -> StoreFacts:
        return dataclasses.replace(_ledger_facts(conn, since_us), lag=_lag_rows(conn, since_us))

    return find


def _all_facts(conn: psycopg.Connection, since_us: int) -> StoreFacts:
    if not _exists(conn, "sync.progress"):
        return _NO_FACTS
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
    )


def _ledger_facts(conn: psycopg.Connection, since_us: int) -> StoreFacts:
    if not _exists(conn, "sync.progress"):
        return _NO_FACTS
    ledgers = tuple(
        Conservation(link, Lane(lane), Counts(*row[:6]), *row[6:11], _us(row[11]), row[12])
        for link, lane, *row in conn.execute(_LEDGERS)
    )
    snapshots = tuple(
        Snapshot(link, state, reason, _us(started), None if done is None else _us(done))
        for link, state, reason, started, done in conn.execute(_SNAPSHOTS)
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
    )


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
