"""Hospital traffic into the sources: seeded, paced, and as awkward as real hospitals are."""

import collections.abc
import concurrent.futures
import dataclasses
import threading
import time

import numpy as np

from runners.embedded.campus_source import CampusSource, TrafficError
from runners.embedded.knowledge import HOURS
from runners.embedded.postgresql_campus import PostgresqlCampus
from runners.embedded.world import WRITER
from schemas.clocks import wall_clock_us

Progress = collections.abc.Callable[[int], None]
_STORY_RATE_MAX = 200  # Single-row work of one source a second; beyond, the laboratory's bulk.
_STORY_SHARE = 0.6  # Of a slow source's rows.
_UPLOAD_ROWS = (200, 2000)
_UPLOAD_EVERY_S = 8.0  # At a rate at which that is within `_UPLOAD_ROWS`.
_PROGRESS_S = 0.1

__all__ = ["Traffic", "TrafficError", "TrafficSummary"]


@dataclasses.dataclass(frozen=True)
class TrafficSummary:
    """What a run wrote: committed row changes, by source, and transactions; and how long."""

    rows: int
    by_source: dict[str, int]
    transactions: int
    rolled_back: int
    seconds: float


class Traffic:
    """Writes invented hospital traffic to every source of a configuration.

    ::

        with Traffic(load("world/campuses.yaml"), seed=1) as traffic:
            traffic.preload(patients=200)              # History, before the first sync.
            traffic.run(rate=200, seconds=30)          # Paced; emergencies among it.
            traffic.wrong("main")                      # What must end as dead letters.
            traffic.bulk_transaction("east", 300_000)  # One transaction.
            traffic.finish()                           # Everybody is signed off.

    What is written is decided by the seed, the calls and what the seed has written to the
    database before; times come from the clock, nothing else does. Every source has its own
    chance, so their threads' order does not matter.

    Args:
      config: with `sources` (`kind`, `dsn`, `mapping`, `content`), as from
        `schemas.config.load`.
      seed: 0 .. 999,999.
      clock: microseconds since 1970, for the times in rows.
      writer: role that owns the hospital's tables.
    """

    def __init__(
        self,
        config,
        seed: int = 1,
        clock: collections.abc.Callable[[], int] = wall_clock_us,
        writer: str = WRITER,
    ):
        self._config, self._seed, self._clock, self._writer = config, seed, clock, writer
        self._sources: dict[str, CampusSource] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Traffic":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        for source in self._sources.values():
            source.close()

    def preload(self, patients: int = 1000, progress: Progress | None = None) -> dict[str, int]:
        """Writes a month of history of `patients` patients into each source.

        Returns rows by source. `progress` is called with all rows so far.

        Raises:
          TrafficError: a source cannot be written.
        """
        tell = _Sum(progress)
        return self._each(lambda source: source.preload(patients, tell.add))

    def run(
        self,
        rate: float,
        seconds: float,
        emergency_share: float = 0.05,
        shape: str = "flat",
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> TrafficSummary:
        """Writes `rate * seconds` row changes, evenly to all sources, and returns when done.

        Singly and in small transactions up to a rate, the rest as the laboratory's uploads
        and their validation, 200 to 2,000 rows at once. A machine that cannot keep up takes
        longer; the content is the same.

        Args:
          rate: row changes a second, all sources together.
          seconds: how long.
          emergency_share: of the row changes, those of patients under emergency, as far as
            single-row work reaches.
          shape: `flat`, or `day`: a hospital's day in `seconds`, with its morning peak.
          progress: called with the row changes so far, ten times a second at most.
          stop: once set, the run ends early.

        Raises:
          TrafficError: a source cannot be written for a minute.
          ValueError: an unknown shape.
        """
        total, began = int(rate * seconds), time.monotonic()
        sources = [self._source(name) for name in self._config.sources]
        shares = {s.name: (total + i) // len(sources) for i, s in enumerate(sources)}
        before = [(s.transactions, s.rolled_back) for s in sources]
        tell, stop = _Sum(progress), stop or threading.Event()
        due = _due(shape, seconds, began)

        def work(source: CampusSource) -> int:
            rows, done = shares[source.name], False
            try:
                written = _work(source, rows, rows / seconds, emergency_share, due, tell.add, stop)
                done = True
            finally:
                if not done:
                    stop.set()  # The others need not go on alone.
            return written

        by_source = self._each(work)
        tell.finish()
        counts = zip(sources, before, strict=True)
        more = [(s.transactions - was[0], s.rolled_back - was[1]) for s, was in counts]
        transactions, rolled_back = map(sum, zip(*more, strict=True))
        seconds_taken = time.monotonic() - began
        rows = sum(by_source.values())
        return TrafficSummary(rows, by_source, transactions, rolled_back, seconds_taken)

    def finish(self) -> dict[str, int]:
        """Runs every begun story to its end, so that nobody is left under emergency.

        Returns row changes by source.
        """
        return self._each(lambda source: source.finish_stories())

    def bulk_transaction(
        self, source: str, rows: int = 300_000, progress: Progress | None = None
    ) -> None:
        """Inserts `rows` laboratory results into one source in one transaction.

        Raises:
          the database's own error: the connection broke; nothing of it was committed, or all.
        """
        self._source(source).bulk_transaction(rows, _Sum(progress).add)

    def backlog(
        self, source: str, rows: int, tx_rows: int, progress: Progress | None = None
    ) -> None:
        """Inserts `rows` results in transactions of `tx_rows`, unpaced, without waiting for
        the disk: for measurements. `progress` is called with the rows so far."""
        self._source(source).backlog(rows, tx_rows, _Sum(progress).add)

    def wrong(self, source: str) -> dict[str, int]:
        """Writes rows that the source accepts and that must become dead letters.

        Returns how many, by what is wrong: `spo2_above_100` and `triage_level_9`, which the
        store's plausible ranges refuse; of a PostgreSQL also `value_nan`, `time_infinite` and
        `date_year_294000`, which no canonical value can hold.
        """
        return self._source(source).wrong()

    def _source(self, name: str) -> CampusSource:
        with self._lock:
            if name not in self._sources:
                self._sources[name] = self._open(name, self._config.sources[name])
            return self._sources[name]

    def _open(self, name: str, source) -> CampusSource:
        """Returns the writer of a source's kind; libraries are loaded as needed."""
        given = (source.mapping, self._seed, self._clock, self._writer)
        if source.kind == "postgresql":
            return PostgresqlCampus(name, source.dsn, *given)
        if source.kind == "mariadb":
            from runners.embedded.mariadb_campus import MariadbCampus

            return MariadbCampus(name, source.dsn, *given)
        if source.content is None:
            raise TrafficError(
                f"source {name}: a topic is written by its connector alone. Remedy: name the "
                "database behind it as `content`, if it is of an embedded world."
            )
        from runners.embedded.oracle_campus import OracleCampus

        return OracleCampus(name, source.dsn, source.content, *given)

    def _each(self, action: collections.abc.Callable[[CampusSource], int]) -> dict[str, int]:
        """Does it with every source at once; returns its results, or raises the first error."""
        names = list(self._config.sources)
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            pending = [pool.submit(lambda name: action(self._source(name)), n) for n in names]
        return {name: future.result() for name, future in zip(names, pending, strict=True)}


class _Sum:
    """Adds up what several threads have written and tells it now and then."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._lock = threading.Lock()
        self._rows, self._told = 0, 0.0

    def add(self, rows: int) -> None:
        with self._lock:
            self._rows += rows
            if self._progress is not None and time.monotonic() - self._told >= _PROGRESS_S:
                self._told = time.monotonic()
                self._progress(self._rows)

    def finish(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress(self._rows)


def _work(
    source: CampusSource,
    total: int,
    rate: float,
    emergency_share: float,
    due: collections.abc.Callable[[float], float],
    tell: Progress,
    stop: threading.Event,
) -> int:
    """One source's part of a run; which transaction comes next does not depend on time."""
    bulk_share = 1 - min(rate * _STORY_SHARE, _STORY_RATE_MAX) / rate if rate else 0.0
    low, high = _UPLOAD_ROWS
    high = int(min(max(rate * bulk_share * _UPLOAD_EVERY_S, low), high))
    size = low
    done = bulk_done = 0
    while done < total:
        if stop.wait(max(due(done / total) - time.monotonic(), 0)):
            break
        if bulk_done + size <= bulk_share * (done + size) and done + size <= total:
            rows = source.bulk(size)
            bulk_done += rows
            size = source.upload_size(low, high)
        else:
            rows = source.story_step(emergency_share)
        done += rows
        tell(rows)
    return done


def _due(shape: str, seconds: float, began: float) -> collections.abc.Callable[[float], float]:
    """Returns when (by the monotonic clock) a fraction of a run's rows is due."""
    if shape not in ("flat", "day"):
        raise ValueError(f"shape {shape!r} is neither `flat` nor `day`")
    hours = np.array(HOURS, dtype=float) if shape == "day" else np.ones(24)
    done = np.concatenate([[0.0], np.cumsum(hours)]) / hours.sum()
    at = np.linspace(began, began + seconds, 25)
    return lambda fraction: float(np.interp(fraction, done, at))
