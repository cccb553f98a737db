"""A topic of Debezium events as a link's reader uses it (ADR 0013)."""

import contextlib
import functools
import json
import logging
import typing
from collections.abc import Callable, Iterator

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import SEQ_END, START, Position
from transforms.capture.debezium.event_stream import RetentionGap, TopicRecreated
from transforms.capture.debezium.hints import table_specs
from transforms.capture.debezium.source import DebeziumSource, DebeziumStream, SnapshotMissing
from transforms.capture.debezium.topic import TopicState, place_of
from transforms.capture.polled_stream import PolledStream
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.snapshot_part import WHOLE, Rest
from transforms.capture.source_log import gaps

_LOGGER = logging.getLogger(__name__)

_gaps = functools.partial(gaps, RetentionGap, TopicRecreated)


class _Start(typing.NamedTuple):
    lsn: int
    view_lsn: None = None


class DebeziumLog:
    """`SourceLog` over one partition of Kafka, which a connector fills.

    The snapshot is the connector's own, in the topic before its changes: joining means to read
    on from where it begins.
    """

    sweeps_all = False  # A table that was empty, or not read, has no event that says which.
    resumes = False
    known_again = True  # By its topics' ids.

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        now_us: Callable[[], int],
        monotonic: Callable[[], float],
    ):
        self._settings, self._now_us = settings, now_us
        self._mapping, self._tables = mapping, tuple(mapping.tables)
        self._columns: dict[str, tuple[str, ...]] = {}
        self._stream: DebeziumStream | None = None
        options = json.loads(settings.source_options or "{}")
        self._source = DebeziumSource(
            *place_of(settings.source_dsn),
            table_specs(mapping, options.get("hints")),
            batch_rows=settings.limits.batch_rows,
            batch_bytes=settings.limits.batch_bytes,
            sweep=True,
            kafka=options.get("kafka"),
            monotonic=monotonic,
        )
        self._topic: TopicState | None = None

    def require_covered(self) -> dict[str, str]:
        """Asks nobody: what a topic must be, `state` refuses it for, and what is in it the
        connector alone decides. Returns as `drift`."""
        return self.drift()

    def drift(self) -> dict[str, str]:
        """Returns what the tables that have been met lack by their events: the connector alone
        sees the tables."""
        if self._stream is not None:
            self._columns |= self._stream.columns
        met = {
            name: dict.fromkeys(columns, "")
            for name, columns in self._columns.items()
            if name in self._mapping.tables
        }
        return {name: why for name, why in self._mapping.drift(met).items() if name in met}

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
            yield _Start(START.lsn)  # Every change that ever was is there.
            return
        missing = sorted(set(self._tables) - set(found.tables))
        if missing:
            _LOGGER.warning(
                "link %s: no rows of %s in the snapshot of the topic: empty, or not read by the "
                "connector",
                self._settings.name,
                ", ".join(missing),
            )
        yield _Start(found.position.lsn)

    def view(self, lsn: int) -> contextlib.AbstractContextManager[_Start]:
        raise NotImplementedError("the connector takes its snapshot, and goes on with it")

    def rows_estimated(self) -> None:
        return None

    def snapshot(self, point: _Start, rest: Rest = WHOLE) -> Iterator[RawChanges]:
        if point.lsn > START.lsn:
            yield RawChanges(START, Position(point.lsn, SEQ_END), 0, 0, {})

    def advance(self, lsn: int) -> None:
        """Does nothing: the log is deleted by age or size alone."""

    def open(self, start: Position, acknowledged_lsn: int) -> PolledStream:
        topic_id = self._topic.topic_id if self._topic is not None else ""
        with _gaps():
            stream = self._stream = self._source.stream(start, topic_id)
        limits = self._settings.limits

        def read(timeout_s: float) -> list[RawChanges]:
            with _gaps():
                return stream.read(limits.batch_rows, limits.batch_bytes, timeout_s)

        return PolledStream(stream, read, self._now_us)
