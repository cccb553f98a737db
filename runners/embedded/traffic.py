"""Hospital traffic into the sources: seeded, paced, and as awkward as real hospitals are."""

import collections.abc
import concurrent.futures
import dataclasses
import itertools
import threading
import time

import numpy as np

from runners.embedded.campus_source import CampusSource, TrafficError
from runners.embedded.knowledge import HOURS
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
      config: with `sources` (`dsn`, `mapping`), as from `schemas.config.load`.
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
        names = list(self._config.sources)
        total, began = int(rate * seconds), time.monotonic()
        due = _due(shape, seconds, began)
        tell, stop = _Sum(progress), stop or threading.Event()
        before = {name: dataclasses.asdict(self._source(name).counts()) for name in names}
        shares = {name: (total + i) // len(names) for i, name in enumerate(names)}

        def work(source: CampusSource) -> int:
            rows = shares[source.name]
            try:
                return _work(source, rows, rows / seconds, emergency_share, due, tell.add, stop)
            except BaseException:
                stop.set()  # The others need not go on alone.
                raise

        by_source = self._each(work)
        tell.finish()
        after = [self._source(name).counts() for name in names]
        return TrafficSummary(
            sum(by_source.values()),
            by_source,
            sum(c.transactions - before[n]["transactions"] for n, c in zip(names, after, strict=True)),
            sum(c.rolled_back - before[n]["rolled_back"] for n, c in zip(names, after, strict=True)),
            time.monotonic() - began,
        )
