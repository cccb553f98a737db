"""Prometheus metrics of every link, read from the ledgers; and the recorder of health and pairs."""

import collections
import logging
import threading
from collections.abc import Callable, Iterator

import psycopg
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipelines.emergency_pairs import PairWatch
from pipelines.sla_report import Observer, View
from schemas.clocks import wall_clock_us
from schemas.config import PRIMARY, Config
from schemas.reconcile_schedule import State as RunState
from schemas.reports import ONE_SIDED, Pair, Risk, State
from transforms import postgresql_sessions
from transforms.deliver import sla_store

_LOGGER = logging.getLogger(__name__)

_EVERY_S = 5.0
_CONNECT_TIMEOUT_S = 3
_OUTCOMES = ("captured", "delivered", "duplicates", "superseded", "held", "dead")
_RISKS = {Risk.NONE: 0, Risk.WARNING: 1, Risk.CRITICAL: 2}
_QUANTILES = (("0.5", "p50_ms"), ("0.9", "p90_ms"), ("0.99", "p99_ms"), ("0.999", "p999_ms"))


class LinkCollector(Collector):
    """Metrics of the newest view; labels are names of links and lanes, never ids of anything."""

    def __init__(self):
        self._view: View | None = None

    def show(self, view: View) -> None:
        """Replaces the view that is exported."""
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view
        if view is None:
            return
        yield _gauge("sampled_timestamp_seconds", "When these were read.", [((), view.at_us / 1e6)])
        yield _gauge(
            "unreachable_ends", "Sources and stores without answer.", [((), len(view.unreachable))]
        )
        yield from _health(view)
        yield from _lanes(view)
        yield from _quality(view)
        yield from _reconciliations(view)
        yield _gauge(
            "pair_one_sided_seconds",
            "For how long one of two stores lacks an emergency that the other has.",
            [((pair.source,), pair.one_sided_s) for pair in view.pairs],
            ("source",),
        )


def _health(view: View) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "campus_sync_link_state", "1 for the state that the link is in.", labels=("link", "state")
    )
    for link in view.links:
        for state in State:
            states.add_metric((link.health.link, state.value), link.health.state is state)
    yield states
    for name, field, scale, text in (
        ("backlog_bytes", "backlog_bytes", 1, "Log of the source not yet applied."),
        ("retained_log_bytes", "retained_bytes", 1, "Log that the source keeps for the slot."),
        ("watermark_lag_seconds", "watermark_lag_ms", 1e-3, "How far the store is behind."),
        (
            "log_seconds_left",
            "seconds_left",
            1,
            "Until the source may remove log that the link needs, if it stood still.",
        ),
    ):
        values = [(part.health.link, getattr(part.health, field)) for part in view.links]
        known = [((link,), value * scale) for link, value in values if value is not None]
        yield _gauge(name, text, known, ("link",))
    yield _gauge(
        "log_risk",
        "1 if log that the link needs may soon be gone, 2 if very soon.",
        [((part.health.link,), _RISKS[part.health.log_risk]) for part in view.links],
        ("link",),
    )
    open_letters = [((part.health.link,), part.dead_letters) for part in view.links]
    yield _gauge("open_dead_letters", "Dead letters not replayed.", open_letters, ("link",))


def _quality(view: View) -> Iterator[Metric]:
    alarms = collections.Counter()
    for part in view.alarms:
        alarms[part.store, part.campus, str(part.rule)] += part.open
    yield _gauge(
        "open_quality_alarms", "Open alarms.", sorted(alarms.items()), ("store", "campus", "rule")
    )
    reviews = [((part.store,), part.reviews_open) for part in view.tending]
    yield _gauge(
        "open_patient_reviews", "Pairs of records that wait for a person.", reviews, ("store",)
    )
    for name, field, text in (
        ("quality_age_seconds", "judged_us", "Since the store was last judged."),
        ("matching_age_seconds", "matched_us", "Since its patients were last matched."),
    ):
        known = [
            ((part.store,), max(0, view.at_us - us) / 1e6)
            for part in view.tending
            if (us := getattr(part, field)) is not None
        ]
        yield _gauge(name, text, known, ("store",))


def _reconciliations(view: View) -> Iterator[Metric]:
    jobs, label = view.reconciliations, ("job",)
    ended = [one for one in jobs if one.ended_us is not None]
    for name, text, values in (
        (
            "overdue_seconds",
            "For how long a moment has had no run that left a report; 0 within an hour.",
            [((one.job.value,), one.overdue_s) for one in jobs],
        ),
        (
            "running",
            "1 while one runs.",
            [((one.job.value,), one.running_us is not None) for one in jobs],
        ),
        (
            "ended_timestamp_seconds",
            "When the last one ended.",
            [((one.job.value,), one.ended_us / 1e6) for one in ended],
        ),
        (
            "sound",
            "1 if the last one left nothing unlike.",
            [((one.job.value,), one.result == RunState.SOUND) for one in ended],
        ),
        (
            "differing_rows",
            "Rows that the last one found unlike.",
            [((one.job.value,), one.differing) for one in ended],
        ),
        (
            "mended_rows",
            "Rows that the last one mended.",
            [((one.job.value,), one.mended) for one in ended],
        ),
    ):
        yield _gauge(f"reconciliation_{name}", text, values, label)


def _lanes(view: View) -> Iterator[Metric]:
    changes = CounterMetricFamily(
        "campus_sync_changes",
        "Row changes by outcome; captured is the sum of the others.",
        labels=("link", "lane", "outcome"),
    )
    late = GaugeMetricFamily(
        "campus_sync_recent_late_rows",
        "Rows of the last minute behind the watermark.",
        labels=("link", "lane"),
    )
    lag = GaugeMetricFamily(
        "campus_sync_lag_seconds",
        "Commit to visible, rows of the last minute.",
        labels=("link", "lane", "quantile"),
    )
    islands = GaugeMetricFamily(
        "campus_sync_islands", "Stretches applied beyond a gap.", labels=("link", "lane")
    )
    for link in view.links:
        for lane, ledger in link.ledgers.items():
            place = (ledger.link, lane.value)
            for outcome in _OUTCOMES:
                changes.add_metric((*place, outcome), getattr(ledger.counts, outcome))
            islands.add_metric(place, ledger.islands)
        for lane, measured in link.lag.items():
            place = (measured.link, lane.value)
            late.add_metric(place, measured.late)
            for quantile, field in _QUANTILES:
                lag.add_metric((*place, quantile), getattr(measured, field) / 1000)
    yield from (changes, islands, lag, late)


def _gauge(name: str, text: str, values, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(f"campus_sync_{name}", text, labels=labels)
    for place, value in values:
        family.add_metric(place, value)
    return family


class Recorder:
    """Looks at every link every few seconds for as long as it is open, in a thread of its own.

    Exports what it sees as metrics, keeps samples of health in the primary, and opens and
    closes the incidents of one-sided emergencies (ADR 0006) in the store that has them.

    Args:
      port: of the endpoint, 0 for none; None: as configured. host: where it listens.
    """

    def __init__(
        self,
        config: Config,
        port: int | None = None,
        host: str = "127.0.0.1",
        every_s: float = _EVERY_S,
        now_us: Callable[[], int] = wall_clock_us,
    ):
        self._config = config
        self._port = config.metrics_port if port is None else port
        self._host = host
        self._every_s = every_s
        self._now_us = now_us
        self._watch = PairWatch(config.objectives.pair_s)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._server = None
        self._primary: psycopg.Connection | None = None
        self.collector = LinkCollector()
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)

    def __enter__(self) -> "Recorder":
        if self._port:
            self._server, _ = start_http_server(self._port, self._host, registry=self.registry)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        self._thread.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _run(self) -> None:
        with Observer(self._config) as observer:
            while not self._stopping.is_set():
                self.record(observer)
                self._stopping.wait(self._every_s)
        self._forget()

    def record(self, observer: Observer) -> None:
        """Looks once."""
        view = observer.view(self._now_us())
        self.collector.show(view)
        try:
            if self._primary is None:
                self._primary = self._connect(PRIMARY)
                sla_store.ensure(self._primary)
            sla_store.put_health(self._primary, view.at_us, [link.health for link in view.links])
            sla_store.put_rates(self._primary, view.at_us, observer.log_rates)
        except psycopg.Error as error:
            _LOGGER.warning("health is not recorded, SQLSTATE %s", error.sqlstate)
            self._forget()
        for pair in view.pairs:
            late = self._watch.late(pair, view.at_us)
            if late or (pair.together and pair.open_incidents):
                self._note(pair, late)

    def _note(self, pair: Pair, late: bool) -> None:
        """Opens or closes the incident, in the store that has the emergency."""
        for link in (pair.primary_link, pair.local_link):
            store = link.rpartition(">")[2]
            try:
                with self._connect(store) as conn:
                    if late and link != pair.waiting:
                        detail = f"{link} has an emergency that {pair.waiting} has not"
                        sla_store.set_incident(conn, pair.waiting, ONE_SIDED, detail)
                    elif not late:
                        for waited in (pair.primary_link, pair.local_link):
                            sla_store.close_incident(conn, waited, ONE_SIDED)
            except psycopg.Error as error:
                _LOGGER.warning("incident at %s: SQLSTATE %s", store, error.sqlstate)

    def _connect(self, store: str) -> psycopg.Connection:
        return postgresql_sessions.connect(
            self._config.stores[store].dsn,
            connect_timeout=_CONNECT_TIMEOUT_S,
            options="-c statement_timeout=5000 -c lock_timeout=3000",
            application_name="campus_sync_recorder",
        )

    def _forget(self) -> None:
        if self._primary is not None:
            self._primary.close()
            self._primary = None
