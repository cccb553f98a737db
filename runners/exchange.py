"""Carries edits between all consult stores while it is open: a thread a store, and one a pair."""

import collections.abc
import contextlib
import logging
import threading
import typing

import psycopg
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.clocks import jitter, monotonic_s
from schemas.config import Config
from schemas.conflict_policy import ConflictRules, load_conflict_rules
from schemas.errors import CampusSyncError, told
from transforms.deliver import store_schema
from transforms.deliver.edits.exchange_records import Puller, connect, fold_pending
from transforms.deliver.edits.hold_records import PASSING
from transforms.deliver.edits.open_store import open_store
from transforms.tell_once import TellOnce

_LOGGER = logging.getLogger(__name__)

# Asked for, not told by NOTIFY: a client may edit in a transaction that it prepares, which must
# not notify, and a notification takes a lock of the whole server at each commit.
POLL_S = 0.2
_WAIT_MAX_S = 10.0
_COUNT_S = 5.0
_GOODBYE_S = 5.0

Pair = tuple[str, str]  # The store that learns, and the one that it asks.


class Exchange(contextlib.ExitStack):
    """Folds clients' edits in and pulls them from store to store, until it is closed.

    Killed at any moment it loses nothing: edits, records and cursors are in the stores.

    Args:
      rules: by default those that the configuration names. pairs: who asks whom, likewise.

    Attributes:
      collector: Prometheus' view of open conflicts and of the lag between stores.
    """

    def __init__(
        self,
        config: Config,
        rules: ConflictRules | None = None,
        pairs: collections.abc.Sequence[Pair] | None = None,
    ):
        super().__init__()
        self._rules = rules or load_conflict_rules(config.conflict_rules)
        stores = {name: store.dsn for name, store in config.stores.items()}
        self.collector = ConflictCollector()
        self._works = [
            _Work(f"edits of store {name}", self._fold(name, dsn)) for name, dsn in stores.items()
        ]
        for one, other in config.exchange_pairs() if pairs is None else pairs:
            pull = self._pull(one, stores[one], stores[other])
            self._works.append(_Work(f"store {one} asks {other}", pull))

    def __enter__(self) -> typing.Self:
        super().__enter__()
        self.callback(self._stop)
        for work in self._works:
            work.start()
        return self

    def _stop(self) -> None:
        for work in self._works:
            work.stopping.set()
        for work in self._works:
            work.join(_GOODBYE_S)

    def _fold(self, name: str, dsn: str) -> "_Begin":
        def begin(stack: contextlib.ExitStack) -> _Turn:
            conn = self._opened(stack, name, dsn)
            counted_s = [0.0]

            def turn() -> bool:
                if monotonic_s() - counted_s[0] > _COUNT_S:
                    self.collector.look(name, conn)
                    counted_s[0] = monotonic_s()
                return fold_pending(conn, self._rules).behind

            return turn

        return begin

    def _opened(self, stack: contextlib.ExitStack, name: str, dsn: str) -> psycopg.Connection:
        conn = stack.enter_context(contextlib.closing(connect(dsn)))
        store_schema.ensure(conn)
        open_store(conn, name, self._rules)
        return conn

    def _pull(self, name: str, dsn: str, peer_dsn: str) -> "_Begin":
        def begin(stack: contextlib.ExitStack) -> _Turn:
            conn = self._opened(stack, name, dsn)
            peer = stack.enter_context(contextlib.closing(connect(peer_dsn)))
            puller = Puller(conn, peer, self._rules)
            return lambda: puller.pull().behind

        return begin


_Turn = collections.abc.Callable[[], bool]  # Whether there is more to do at once.
_Begin = collections.abc.Callable[[contextlib.ExitStack], _Turn]


class _Work(threading.Thread):
    """Takes turns over connections of its own, opened again after whatever broke them."""

    def __init__(self, name: str, begin: _Begin):
        super().__init__(name=name, daemon=True)
        self._begin = begin
        self.stopping = threading.Event()
        self._tell = TellOnce(_LOGGER, name)
        self._failures = 0

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                with contextlib.ExitStack() as stack:
                    self._take_turns(self._begin(stack))
            except (CampusSyncError, psycopg.Error) as error:
                self._tell(told(error))
            self._failures += 1
            wait_s = min(_WAIT_MAX_S, POLL_S * 2 ** min(self._failures, 8))
            self.stopping.wait(wait_s * (0.5 + jitter() / 2))

    def _take_turns(self, turn: _Turn) -> None:
        while not self.stopping.is_set():
            try:
                more = turn()
            except PASSING:
                self.stopping.wait(POLL_S * (1 + jitter()))
                continue
            self._failures = 0
            self._tell("")
            if not more:
                self.stopping.wait(POLL_S)


class ConflictCollector(Collector):
    """Open conflicts by store, table and alarm, and the lag of edits by pair and lane."""

    _OPEN = (
        "SELECT table_name, alarm, count(*) FROM sync.conflict WHERE state = 'open' GROUP BY 1, 2"
    )
    _LAG = "SELECT peer, lane, lag_us, received FROM sync.exchange"

    def __init__(self):
        self._seen: dict[str, tuple[list[tuple], list[tuple]]] = {}

    def look(self, store: str, conn: psycopg.Connection) -> None:
        """Counts in one store."""
        found = (conn.execute(self._OPEN).fetchall(), conn.execute(self._LAG).fetchall())
        self._seen[store] = found

    def collect(self) -> collections.abc.Iterator[Metric]:
        conflicts = GaugeMetricFamily(
            "campus_sync_open_conflicts",
            "Conflicts that wait for a person.",
            labels=("store", "table", "alarm"),
        )
        lag = GaugeMetricFamily(
            "campus_sync_edit_lag_seconds",
            "How long the newest edits took from one store to another.",
            labels=("store", "peer", "lane"),
        )
        received = GaugeMetricFamily(
            "campus_sync_edit_records",
            "Records read from another store.",
            labels=("store", "peer", "lane"),
        )
        for store, (counts, lags) in sorted(self._seen.items()):
            for *place, count in counts:
                conflicts.add_metric((store, *place), count)
            for peer, lane, lag_us, count in lags:
                lag.add_metric((store, peer, lane), lag_us / 1e6)
                received.add_metric((store, peer, lane), count)
        yield from (conflicts, lag, received)
