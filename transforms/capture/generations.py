"""A source's later logs: each later than the one before, whatever its own places are (ADR 0030)."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import RawChanges
from schemas.positions import SEQ_END, Position, generation_of, lsn_in, own_position
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.snapshot_part import WHOLE, Rest
from transforms.capture.source_log import LogStream, Reading, SnapshotPoint, SourceLog


@dataclasses.dataclass(frozen=True)
class _Point:
    """A `SnapshotPoint` of a log, and what the source itself calls it."""

    own: SnapshotPoint
    lsn: int
    view_lsn: int | None


class LaterLog:
    """`SourceLog` whose places lie behind all those of the source's logs before it.

    Args:
      log: the source as it is, by its own places. generation: of 1 or more.
    """

    def __init__(self, log: SourceLog, generation: int):
        self._log, self._generation = log, generation
        self.sweeps_all, self.resumes = log.sweeps_all, log.resumes
        self.known_again = log.known_again

    def _own_lsn(self, lsn: int) -> int:
        return own_position(self._generation, Position(lsn, SEQ_END)).lsn

    def require_covered(self) -> dict[str, str]:
        return self._log.require_covered()

    def drift(self) -> dict[str, str]:
        return self._log.drift()

    def state(self, applied: Position | None) -> SlotState:
        ours = applied is not None and generation_of(applied.lsn) == self._generation
        found = self._log.state(own_position(self._generation, applied) if ours else None)
        return dataclasses.replace(
            found,
            log_end_lsn=lsn_in(self._generation, found.log_end_lsn),
            confirmed_lsn=lsn_in(self._generation, found.confirmed_lsn),
        )

    def memberships(self) -> dict[str, str]:
        return self._log.memberships()

    @contextlib.contextmanager
    def create(self, after: Position) -> Iterator[_Point]:
        with self._log.create(own_position(self._generation, after)) as point:
            yield self._point(point)

    @contextlib.contextmanager
    def view(self, lsn: int) -> Iterator[_Point]:
        with self._log.view(self._own_lsn(lsn)) as point:
            yield self._point(point)

    def _point(self, point: SnapshotPoint) -> _Point:
        view = point.view_lsn
        view = None if view is None else lsn_in(self._generation, view)
        return _Point(point, lsn_in(self._generation, point.lsn), view)

    def rows_estimated(self) -> int | None:
        return self._log.rows_estimated()

    def snapshot(self, point: _Point, rest: Rest = WHOLE) -> Iterator[RawChanges]:
        for raw in self._log.snapshot(point.own, rest):
            yield in_generation(self._generation, raw)

    def advance(self, lsn: int) -> None:
        self._log.advance(self._own_lsn(lsn))

    def open(self, start: Position, acknowledged_lsn: int) -> "_LaterStream":
        stream = self._log.open(
            own_position(self._generation, start), self._own_lsn(acknowledged_lsn)
        )
        return _LaterStream(stream, self._generation, self._own_lsn)


class _LaterStream:
    def __init__(self, stream: LogStream, generation: int, own: typing.Callable[[int], int]):
        self._stream, self._generation, self._own_lsn = stream, generation, own

    def __enter__(self) -> typing.Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def read(self, timeout_s: float) -> Reading:
        found = self._stream.read(timeout_s)
        return found._replace(taken=[in_generation(self._generation, raw) for raw in found.taken])

    def acknowledge(self, lsn: int) -> None:
        self._stream.acknowledge(self._own_lsn(lsn))

    def keep_alive(self) -> None:
        self._stream.keep_alive()


def in_generation(generation: int, raw: RawChanges) -> RawChanges:
    """Returns changes by the source's own places as changes of its log of a generation."""

    def at(position: Position) -> Position:
        return Position(lsn_in(generation, position.lsn), position.seq)

    return dataclasses.replace(
        raw,
        begin=at(raw.begin),
        end=at(raw.end),
        tables={name: _rows_in(generation, rows) for name, rows in raw.tables.items()},
        truncates=tuple((table, at(place)) for table, place in raw.truncates),
        sweeps=tuple((table, at(place)) for table, place in raw.sweeps),
        rejects=tuple(
            dataclasses.replace(reject, position=at(reject.position)) for reject in raw.rejects
        ),
    )


def _rows_in(generation: int, rows: pa.RecordBatch) -> pa.RecordBatch:
    index = rows.schema.get_field_index("_lsn")
    lsn = pc.add(rows.column(index), pa.scalar(lsn_in(generation, 0), pa.int64()))
    return rows.set_column(index, rows.schema.field(index), lsn)
