"""A topic of Debezium events as a link's reader uses it (ADR 0013)."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import SEQ_END, START, Position
from transforms.capture.debezium.event_stream import RetentionGap, TopicRecreated
from transforms.capture.debezium.hints import table_specs
from transforms.capture.debezium.source import DebeziumSource, DebeziumStream, SnapshotMissing
from transforms.capture.debezium.topic import TopicState
from transforms.capture.slots import SlotState
from transforms.capture.source_log import GapFound, Reading

_LOGGER = logging.getLogger(__name__)

_TRICKLE_ROWS = 500


@dataclasses.dataclass(frozen=True)
class _Start:
    lsn: int
    taken_us: int


class DebeziumLog:
    """`SourceLog` over one partition of Kafka, which a connector fills.

    The snapshot is the connector's own, in the topic before its changes: joining means to read
    on from where it begins.
    """

    sweeps_all = False  # A table that was empty, or not read, has no event that says which.

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        now_us: Callable[[], int],
        monotonic: Callable[[], float],
    ):
        self._settings, self._now_us = settings, now_us
        self._tables = tuple(mapping.tables)
        place = urlsplit(settings.source_dsn)
        options = json.loads(settings.source_options or "{}")
        self._source = DebeziumSource(
            place.netloc,
            place.path.strip("/"),
            table_specs(mapping, options.get("hints")),
            batch_rows=settings.limits.batch_rows,
            batch_bytes=settings.limits.batch_bytes,
            sweep=True,
            kafka=options.get("kafka"),
            monotonic=monotonic,
        )
        self._topic: TopicState | None = None

    def require_covered(self) -> None:
        self._topic = self._source.state()

    def state(self, applied: Position | None) -> SlotState:
        topic = self._topic = self._source.state()
        return SlotState(
            exists=True,
            log_end_lsn=topic.newest.lsn,
            lost=applied is not None and applied < topic.oldest,
        )

    def memberships(self) -> dict[str, str]:
        topic_id = (self._topic or self._source.state()).topic_id
        return dict.fromkeys(self._tables, topic_id)

    @contextlib.contextmanager
    def create(self, after: Position) -> Iterator[_Start]:
        topic = self._source.state()
        try:
            found = self._source.snapshot_start()
        except SnapshotMissing:
            if topic.oldest != START:
                raise
            yield _Start(START.lsn, self._now_us())  # Every change that ever was is there.
            return
        missing = sorted(set(self._tables) - set(found.tables))
        if missing:
            _LOGGER.warning(
                "link %s: no rows of %s in the snapshot of the topic: empty, or not read by the "
                "connector",
                self._settings.name,
                ", ".join(missing),
            )
        yield _Start(found.position.lsn, self._now_us())

    def snapshot(self, point: _Start) -> Iterator[RawChanges]:
        if point.lsn > START.lsn:
            yield RawChanges(START, Position(point.lsn, SEQ_END), 0, 0, {})

    def open(self, start: Position, acknowledged_lsn: int) -> "_Stream":
        topic_id = self._topic.topic_id if self._topic is not None else ""
        with _gaps():
            return _Stream(self._source.stream(start, topic_id), self._settings, self._now_us)


class _Stream:
    def __init__(self, stream: DebeziumStream, settings: LinkSettings, now_us: Callable[[], int]):
        self._stream, self._limits, self._now_us = stream, settings.limits, now_us

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, timeout_s: float) -> Reading:
        limits = self._limits
        with _gaps():
            taken = self._stream.read(limits.batch_rows, limits.batch_bytes, timeout_s)
        rows = sum(raw.captured for raw in taken)
        behind_us = max(0, self._now_us() - taken[-1].commit_us_max) if rows else 0
        caught_up = self._stream.caught_up
        return Reading(taken, caught_up, caught_up and 0 < rows < _TRICKLE_ROWS, behind_us)

    def acknowledge(self, lsn: int) -> None:
        """Does nothing: retention alone deletes."""

    def keep_alive(self) -> None:
        """Does nothing: an assigned partition stays ours."""


@contextlib.contextmanager
def _gaps() -> Iterator[None]:
    try:
        yield
    except (RetentionGap, TopicRecreated) as error:
        raise GapFound(str(error)) from error
