"""How long each source keeps the log that its links still need, measured at the current rate."""

import dataclasses
import typing
from collections.abc import Callable

from schemas.clocks import wall_clock_us
from schemas.config import Source
from schemas.positions import Position
from transforms.capture.retention import Rate, Retention

_KEEPING_EVERY_US = 60_000_000  # How often a topic's settings and the size of records are asked.


class Keeping(typing.Protocol):
    """What one source keeps of its log."""

    def retention(
        self, slot: str, applied: Position, applied_us: int, per_s: float
    ) -> Retention | None:
        """Returns what is kept for a link; None where nobody knows.

        Args:
          slot: the link's. applied: its ledger. applied_us: everything committed until then is
            applied. per_s: units of log a second, as `LogFacts.total` counts them.
        """
        ...


class LogFacts(typing.NamedTuple):
    """The log of a source that is not PostgreSQL, now.

    Attributes:
      lsn: everything committed now lies before it. clock_us: the source's clock.
      units_per_byte: of the distance between two lsns; 0 where it is no length.
      total: how much log there has been in all, in units of its own.
    """

    lsn: int
    clock_us: int
    units_per_byte: int
    total: int
    keeping: Keeping


@dataclasses.dataclass(frozen=True)
class SlotKeeping:
    """A PostgreSQL slot: what it retains, may still retain, and for how long unread.

    Attributes:
      safe_bytes: that may be written before log is removed under it; None: no limit.
      idle_s, idle_max_s: for how long nobody has read it, and may not; None: no limit.
    """

    retained_bytes: int
    safe_bytes: int | None
    in_danger: bool
    idle_s: float
    idle_max_s: float | None

    def left(self, per_s: float) -> Retention:
        """Returns what is kept for the slot's link."""
        spare = 0 if self.in_danger else self.safe_bytes
        size_max = None if spare is None else self.retained_bytes + max(0, spare)
        return Retention(self.idle_max_s, self.idle_s, size_max, self.retained_bytes, per_s)


@dataclasses.dataclass(frozen=True)
class SlotsKeeping:
    """`Keeping` of a PostgreSQL source, by its slots."""

    slots: dict[str, SlotKeeping]

    def retention(self, slot, applied, applied_us, per_s) -> Retention | None:
        found = self.slots.get(slot)
        return None if found is None else found.left(per_s)


@dataclasses.dataclass(frozen=True)
class _BinlogKeeping:
    state: typing.Any  # transforms.capture.mariadb.state.LogState

    def retention(self, slot, applied, applied_us, per_s) -> Retention:
        return self.state.retention(applied.lsn, applied_us, per_s)


@dataclasses.dataclass(frozen=True)
class _TopicKeeping:
    keeping: typing.Any  # transforms.capture.debezium.keeping.TopicKeeping
    newest: Position
    needed_offset: Callable[[Position], int]
    now_us: int

    def retention(self, slot, applied, applied_us, per_s) -> Retention:
        kept = self.keeping
        left = self.newest.lsn - self.needed_offset(applied)
        behind_s = max(0.0, (self.now_us - applied_us) / 1e6) if left > 0 else 0.0
        needed = round(max(0, left) * kept.record_bytes)
        return Retention(kept.expire_s, behind_s, kept.size_max, needed, per_s * kept.record_bytes)


class LogWatch:
    """Looks at one source that is not PostgreSQL, again and again. Not thread-safe.

    Raises (`look`):
      CampusSyncError: it cannot be reached.
    """

    def __init__(self, source: Source, now_us: Callable[[], int] = wall_clock_us):
        self._source, self._now_us = source, now_us
        self._total, self._before = 0, None
        self._kept, self._kept_us = None, 0

    def look(self) -> LogFacts:
        """Returns the source's log as it is now."""
        return self._binlog() if self._source.kind == "mariadb" else self._topic()

    def _binlog(self) -> LogFacts:
        from transforms.capture.mariadb.places import UNITS_PER_BYTE, border_at
        from transforms.capture.mariadb.state import state

        found = state(self._source.dsn)
        if self._before is not None:
            elapsed_s = (found.now_us - self._before.now_us) / 1e6
            self._total += round(found.growth(self._before) * max(0.0, elapsed_s))
        self._before = found
        return LogFacts(
            border_at(found.log_end_lsn),
            found.now_us,
            UNITS_PER_BYTE,
            self._total,
            _BinlogKeeping(found),
        )

    def _topic(self) -> LogFacts:
        from transforms.capture.debezium.keeping import topic_keeping
        from transforms.capture.debezium.topic import needed_offset, place_of, topic_state

        place = (*place_of(self._source.dsn), self._source.kafka)
        topic, now_us = topic_state(*place), self._now_us()
        if self._kept is None or now_us - self._kept_us > _KEEPING_EVERY_US:
            self._kept, self._kept_us = topic_keeping(*place), now_us
        keeping = _TopicKeeping(self._kept, topic.newest, needed_offset, now_us)
        return LogFacts(topic.newest.lsn, now_us, 0, topic.newest.lsn, keeping)


class Rates:
    """How fast each source's log grows, from looks that come by."""

    def __init__(self):
        self._rates: dict[str, Rate] = {}

    def look(self, source: str, at_us: int, total: int) -> float | None:
        """Notes a look; returns units a second, None before the second look."""
        rate = self._rates.setdefault(source, Rate())
        rate.look(at_us, total)
        return rate.per_s

    def all(self) -> dict[str, float]:
        """Returns what is known, by source."""
        return {name: rate.per_s for name, rate in self._rates.items() if rate.per_s is not None}
