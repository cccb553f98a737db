"""A PostgreSQL source as a link's reader uses it: one slot of pgoutput."""

import contextlib
from collections.abc import Callable, Iterator

from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.capture.postgresql import slots
from transforms.capture.postgresql.pgoutput import PgOutputDecoder
from transforms.capture.postgresql.replication import (
    ReplicationStream,
    SlotInvalidated,
    SlotMissing,
)
from transforms.capture.postgresql.slots import CreatedSlot, SlotState
from transforms.capture.postgresql.snapshot import rows_estimated, snapshot
from transforms.capture.snapshot_part import WHOLE, Rest, SnapshotChanges
from transforms.capture.source_log import Reading, gaps
from transforms.turns import turn

# A source that sends so many messages at once gathers them itself: a pause would hold it up.
_TRICKLE_MESSAGES = 500


class PostgresqlLog:
    """`SourceLog` over a logical replication slot of the link's own (ADR 0003)."""

    sweeps_all = resumes = True
    known_again = False

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        monotonic: Callable[[], float],
        waiting: Callable[[str], None],
    ):
        self._settings, self._monotonic, self._waiting = settings, monotonic, waiting
        self._mapping = mapping
        self._keys = {name: table.id for name, table in mapping.tables.items()}
        self._whole = tuple(self._keys)
        self._followed = self._keys

    def require_covered(self) -> dict[str, str]:
        settings = self._settings
        there = slots.columns(settings.source_dsn, self._keys)
        if there:
            slots.ensure_publication_covers(settings.source_dsn, settings.publication, there)
        return self._drift(there)

    def drift(self) -> dict[str, str]:
        return self._drift(slots.columns(self._settings.source_dsn, self._keys))

    def _drift(self, there: dict[str, dict[str, str]]) -> dict[str, str]:
        found = self._mapping.drift(there)
        # Of a table whose rows the log does not name, changes cannot be told apart: all of it is
        # passed over, until a snapshot reads it.
        keys = {name: self._keys[name] for name in there if name not in found}
        unnamed = slots.unnamed(self._settings.source_dsn, keys)
        self._followed = {name: key for name, key in self._keys.items() if name not in unnamed}
        found |= {
            name: f"its replica identity lacks {', '.join(columns)}: give it a primary key of "
            "these columns, or REPLICA IDENTITY FULL"
            for name, columns in unnamed.items()
        }
        self._whole = tuple(name for name in self._keys if name not in found)
        return found

    def state(self, applied: Position | None) -> SlotState:
        return slots.state(self._settings.source_dsn, self._settings.slot)

    def memberships(self) -> dict[str, str]:
        settings = self._settings
        return slots.memberships(settings.source_dsn, settings.publication, self._followed)

    @contextlib.contextmanager
    def create(self, after: Position) -> Iterator[CreatedSlot]:
        dsn, slot = self._settings.source_dsn, self._settings.slot
        slots.drop(dsn, slot)
        with slots.create(dsn, slot, self._waiting) as created:
            yield created

    def view(self, lsn: int) -> contextlib.AbstractContextManager[CreatedSlot]:
        return slots.view(self._settings.source_dsn, self._settings.slot, lsn)

    def rows_estimated(self) -> int:
        return rows_estimated(self._settings.source_dsn, self._whole)

    def snapshot(self, point: CreatedSlot, rest: Rest = WHOLE) -> Iterator[SnapshotChanges]:
        settings = self._settings
        return snapshot(
            settings.source_dsn,
            point,
            self._whole,
            batch_rows=settings.limits.snapshot_batch_rows,
            batch_bytes=settings.limits.batch_bytes,
            keys={name: self._keys[name] for name in self._whole},
            publication=settings.publication,
            rest=rest,
        )

    def advance(self, lsn: int) -> None:
        with gaps(SlotMissing, SlotInvalidated):
            slots.advance(self._settings.source_dsn, self._settings.slot, lsn)

    def open(self, start: Position, acknowledged_lsn: int) -> "_Stream":
        return _Stream(self._settings, self._followed, start, acknowledged_lsn, self._monotonic)


class _Stream:
    def __init__(self, settings: LinkSettings, keys, start: Position, acknowledged: int, monotonic):
        limits = settings.limits
        self._limits, self._monotonic = limits, monotonic
        self._decoder = PgOutputDecoder(limits.batch_rows, limits.batch_bytes, start, keys)
        self._beat_at = monotonic()
        with gaps(SlotMissing, SlotInvalidated):
            self._stream = ReplicationStream(
                settings.source_dsn, settings.slot, settings.publication, acknowledged
            )

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, timeout_s: float) -> Reading:
        with gaps(SlotMissing, SlotInvalidated):
            read = self._stream.read(self._limits.batch_bytes, timeout_s)
        now = self._monotonic()
        with turn(len(read.payloads)):
            taken = self._decoder.feed(read.payloads)
            if read.caught_up:
                taken += self._decoder.flush()
            beat = now - self._beat_at >= self._limits.heartbeat_s
            if read.caught_up and not read.payloads and beat:
                # An idle source moves its ledger, watermark and slot too (trap 1).
                self._beat_at = now
                taken += self._decoder.flush(read.wal_end, read.server_us)
        trickle = read.caught_up and 0 < len(read.payloads) < _TRICKLE_MESSAGES
        behind_us = read.sent_us - taken[-1].commit_us_max if taken and read.payloads else 0
        return Reading(taken, read.caught_up, trickle, behind_us)

    def acknowledge(self, lsn: int) -> None:
        self._stream.acknowledge(lsn)

    def keep_alive(self) -> None:
        self._stream.keep_alive()
