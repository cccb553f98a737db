"""Gather what sources, stores and ledgers say: the live view of every link, and the SLA report."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import psycopg

from pipelines.emergency_pairs import incidents_of, pairs_of
from pipelines.link_health import link_health
from pipelines.log_guard import LogWatch, Rates
from pipelines.sla_facts import (
    POINTS_MAX,
    LagRow,
    Slot,
    SourceFacts,
    StoreFacts,
    all_facts,
    recent_facts,
    source_facts,
)
from schemas.batches import Lane
from schemas.config import PRIMARY, Config, Link, Objectives
from schemas.errors import CampusSyncError
from schemas.positions import lsn_in
from schemas.receipts import Counts
from schemas.reconcile_schedule import Standing, standings
from schemas.reports import (
    LOG_REWOUND,
    SCHEMA_DRIFT,
    SNAPSHOT_WAITS,
    AlarmCount,
    Comparison,
    Conservation,
    Health,
    Incident,
    LagPoint,
    LaneLag,
    Measured,
    Pair,
    Report,
    Snapshot,
    Tending,
)
from schemas.sketches import WINDOW_S, LagSketch, merge_all
from transforms import postgresql_sessions

_TOLD = (SCHEMA_DRIFT, SNAPSHOT_WAITS, LOG_REWOUND)  # Kinds of incident, while they are open.
_RECENT_US = 60_000_000
_CONNECT_TIMEOUT_S = 3
_OPTIONS = "-c statement_timeout=30000 -c default_transaction_read_only=on -c timezone=UTC"


@dataclasses.dataclass(frozen=True)
class LinkView:
    """One link now: its health, its ledgers by lane and its lag in the last minute.

    `snapshot` is what it reads of its source's history, if it does.
    """

    health: Health
    ledgers: dict[Lane, Conservation]
    lag: dict[Lane, LaneLag]
    dead_letters: int
    snapshot: Snapshot | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """All links now. `unreachable` names ends as `source main` or `store primary`.

    `incidents`: open ones of reading, which a person can end.
    """

    at_us: int
    links: tuple[LinkView, ...]
    pairs: tuple[Pair, ...]
    unreachable: tuple[str, ...]
    alarms: tuple[AlarmCount, ...] = ()
    tending: tuple[Tending, ...] = ()
    reconciliations: tuple[Standing, ...] = ()
    incidents: tuple[Incident, ...] = ()


class Observer:
    """Asks every source and store, all at once; keeps its connections. Not thread-safe."""

    def __init__(self, config: Config):
        self._config = config
        self._conns: dict[tuple[str, str], psycopg.Connection] = {}
        ends = len(config.sources) + len(config.stores)
        self._rates = Rates()
        self._watches = {
            name: LogWatch(source)
            for name, source in config.sources.items()
            if source.kind != "postgresql"
        }
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
        sources, stores = self._ask(source_facts, recent_facts(now_us - _RECENT_US))
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
            health = self._health(link, sources, stores, now_us)
            reading = [
                part
                for part in (store.snapshots if store else ())
                if part.link == link.name and part.state == "running"
            ]
            ledgers = {part.lane: part for part in own}
            links.append(LinkView(health, ledgers, lag, sum(dead), (reading or [None])[-1]))
        return View(
            now_us,
            tuple(links),
            pairs_of(self._config, stores, now_us),
            self._unreachable(sources, stores),
            **_named(stores),
            reconciliations=self._reconciliations(primary, now_us),
            incidents=tuple(
                one for one in incidents_of(stores) if one.kind in _TOLD and one.state == "open"
            ),
        )

    def report(
        self, now_us: int, since_us: int = 0, comparison: Comparison | None = None
    ) -> Report:
        """Returns the report of the time since `since_us`; `comparison` comes from `compare`."""
        sources, stores = self._ask(source_facts, functools.partial(all_facts, since_us=since_us))
        primary = stores.get(PRIMARY)
        rows = primary.lag if primary else ()
        links = self._config.links()
        blur_s = {link.name: self._config.sources[link.source].blur_s for link in links}
        known = blur_s.keys()
        store_of = {link.name: stores.get(link.store) for link in links}

        def every(part: str) -> tuple:
            """One kind of fact of every link, each from the store that it feeds."""
            return tuple(
                fact
                for name, store in store_of.items()
                for fact in (getattr(store, part) if store else ())
                if fact.link == name
            )

        pairs = pairs_of(self._config, stores, now_us)
        return Report(
            made_us=now_us,
            from_us=min((row.start_us for row in rows), default=0),
            to_us=max((row.start_us + WINDOW_S * 1_000_000 for row in rows), default=0),
            links=tuple(known_link.name for known_link in links),
            health=tuple(self._health(link, sources, stores, now_us) for link in links),
            lag=tuple(LaneLag.of(*key, *value) for key, value in _by_lane(rows).items()),
            points=lag_points(rows),
            backlog=tuple(p for p in (primary.backlog if primary else ()) if p.link in known),
            conservation=_with_totals(every("ledgers")),
            completeness=every("completeness"),
            gaps=every("gaps"),
            refused=every("refused"),
            holds=every("holds"),
            incidents=incidents_of(stores),
            snapshots=every("snapshots"),
            pairs=pairs,
            objectives=measure_objectives(self._config.objectives, blur_s, rows, pairs),
            unreachable=self._unreachable(sources, stores),
            comparison=comparison,
            **_named(stores),
            reconciliations=self._reconciliations(primary, now_us),
        )

    @property
    def log_rates(self) -> dict[str, float]:
        """How fast the sources' logs grow, by looks of this observer: units a second."""
        return self._rates.all()

    def _health(self, link: Link, sources: dict, stores: dict, now_us: int) -> Health:
        source = sources.get(link.source)
        # Who has only just begun to look knows little: a running job's rate is kept.
        primary = stores.get(PRIMARY)
        known = [self.log_rates, primary.rates if primary else {}]
        rate = max((rates[link.source] for rates in known if link.source in rates), default=None)
        return link_health(link, source, stores.get(link.store), self._config, now_us, rate)

    def _reconciliations(self, primary: StoreFacts | None, now_us: int) -> tuple[Standing, ...]:
        """Nothing where the primary cannot be asked: it is named among the unreachable."""
        if primary is None:
            return ()
        return standings(self._config.reconcile, primary.reconciliations, now_us)

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
        for name, facts in found["source"].items():
            self._rates.look(name, facts.clock_us, facts.total)
            generation = self._config.sources[name].generation
            found["source"][name] = dataclasses.replace(
                facts, wal_lsn=lsn_in(generation, facts.wal_lsn)
            )
        return found["source"], found["store"]

    def _one(self, kind: str, name: str, dsn: str, find: Callable):
        if kind == "source" and self._config.sources[name].kind != "postgresql":
            return self._slotless(name)
        try:
            conn = self._conns.get((kind, name))
            if conn is None or conn.closed:
                conn = self._conns[kind, name] = postgresql_sessions.connect(
                    dsn,
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
            end = self._watches[name].look()
        except CampusSyncError:
            return None
        own = [link.slot for link in self._config.links() if link.source == name]
        slots = dict.fromkeys(own, Slot(True, "none", 0, 0))
        return SourceFacts(end.lsn, end.clock_us, slots, end.units_per_byte, end.total, end.keeping)


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
    objectives: Objectives,
    blur_s: Mapping[str, float],
    rows: Sequence[LagRow],
    pairs: Sequence[Pair],
) -> tuple[Measured, ...]:
    """Returns every objective of every link and pair with what was measured of it.

    Args:
      blur_s: every link, and how much of its lag its source's clock may have added.
    """
    found = []
    limits = {
        Lane.EMERGENCY: ("emergency_p99_ms", objectives.emergency_p99_ms),
        Lane.ROUTINE: ("routine_p99_s", objectives.routine_p99_s * 1000),
    }
    windows: dict[tuple, list[LagSketch]] = collections.defaultdict(list)
    for link, lane, _, sketch in _windows(rows):
        windows[link, lane].append(sketch)
    for link in sorted(blur_s):
        for lane, (name, limit_ms) in limits.items():
            some = [sketch for sketch in windows[link, lane] if sketch.count]
            whole = merge_all(some)
            over = sum(sketch.quantile(0.99) - blur_s[link] * 1000 > limit_ms for sketch in some)
            scale, unit = (1000, "s") if name.endswith("_s") else (1, "ms")
            value = whole.quantile(0.99) / scale if whole.count else None
            share = whole.share_within(limit_ms) if whole.count else None
            blur = blur_s[link] * 1000 / scale
            found.append(
                Measured(
                    name, link, lane, limit_ms / scale, value, unit, len(some), over, share, blur
                )
            )
    for pair in pairs:
        found.append(Measured("pair_s", pair.source, None, objectives.pair_s, pair.longest_s, "s"))
    return tuple(found)


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


def _named(stores: dict[str, StoreFacts]) -> dict[str, tuple]:
    """Returns what stores say of quality and persons, each with the store's name."""
    return {
        "alarms": tuple(
            dataclasses.replace(part, store=name)
            for name, facts in stores.items()
            for part in facts.alarms
        ),
        "tending": tuple(
            dataclasses.replace(facts.tending, store=name)
            for name, facts in stores.items()
            if facts.tending
        ),
    }


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
