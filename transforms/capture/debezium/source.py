"""A topic of Debezium events as a link's source: its state, and a stream of `RawChanges`."""

import typing
from collections.abc import Callable, Mapping

from schemas.batches import RawChanges
from schemas.clocks import monotonic_s
from schemas.positions import Position
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.event_stream import EventStream, RetentionGap, read_range
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import NotAnEvent, Record, Source, parse
from transforms.capture.debezium.topic import TopicState, before, needed_offset, topic_state
from transforms.capture.debezium.unchanged import DEFAULT

LOOK_BACK = 100_000  # Events; a connector stores its offsets once a minute.
_OPEN_S = 1.0  # An end of a transaction comes at once, or not before the connector is back.


class SnapshotMissing(RetentionGap):
    """The topic holds no whole snapshot from which the link could be filled."""


class SnapshotStart(typing.NamedTuple):
    """Where a snapshot begins, and the tables of which it or a later one has rows.

    A mapped table that is not among them was empty, or was not read.
    """

    position: Position
    tables: tuple[str, ...]


class DebeziumStream:
    """The changes behind a position, with what came before it in memory (docs/adr/0013).

    Args:
      stream, decoder: both at the same position. monotonic: a clock.
    """

    def __init__(
        self,
        stream: EventStream,
        decoder: DebeziumDecoder,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._stream, self._decoder, self._monotonic = stream, decoder, monotonic
        self._open_since: float | None = None
        self.caught_up = False

    def __enter__(self) -> "DebeziumStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def position(self) -> Position:
        """Where the last `RawChanges` ended."""
        return self._decoder.position

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The columns of the tables that were met, as their newest rows were told."""
        return self._decoder.columns

    @property
    def topic_id(self) -> str:
        """To be kept beside the ledger and given to the next `DebeziumSource.stream`."""
        return self._stream.topic_id

    @property
    def duplicates(self) -> int:
        """Events left out since the start, since the connector had sent them before."""
        return self._decoder.duplicates

    @property
    def rewinds(self) -> int:
        """See `Replays`: worth a warning when it grows."""
        return self._decoder.replays.rewinds

    def read(self, max_rows: int, max_bytes: int, timeout_s: float) -> list[RawChanges]:
        """Returns what has come, each joined to the one before; waits only for the first.

        Where nothing more is there, all that is complete is returned, and the position moves
        over what holds no change: heartbeats, and marks of Kafka's own transactions.

        Raises:
          SourceUnavailable, RetentionGap, TopicRecreated, TopicMissing, FlattenedEvents: see
            `EventStream` and `DebeziumDecoder`.
        """
        fetched = self._stream.read(max_rows, max_bytes, timeout_s)
        self.caught_up = fetched.caught_up
        taken = self._decoder.feed(fetched.records)
        if fetched.caught_up:
            taken += self._decoder.flush(fetched.next_offset, whole=not self._is_stuck(fetched))
        else:
            self._open_since = None
        return taken

    def acknowledge(self, position: Position) -> None:
        """Does nothing: retention alone deletes, and nothing is kept for a reader."""

    def keep_alive(self) -> None:
        """Does nothing: a partition that is assigned, not subscribed to, stays ours."""

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()

    def _is_stuck(self, fetched) -> bool:
        """Whether a transaction has waited in vain for its end: its rows shall not wait."""
        now = self._monotonic()
        if not self._decoder.open or fetched.records:
            self._open_since = now
            return False
        if self._open_since is None:
            self._open_since = now
        return now - self._open_since >= _OPEN_S


class DebeziumSource:
    """What a link needs of its source, when that is a topic of Debezium events.

    Args:
      bootstrap, topic, kafka: see `EventStream`.
      tables, batch_rows, batch_bytes, sweep, unavailable: see `DebeziumDecoder`.
      look_back: events before a start that are read again, to know what comes twice.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        tables: Mapping[str, TableSpec],
        *,
        batch_rows: int,
        batch_bytes: int,
        sweep: bool = False,
        unavailable: str = DEFAULT,
        look_back: int = LOOK_BACK,
        kafka: Mapping[str, str] | None = None,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._bootstrap, self._topic, self._kafka = bootstrap, topic, kafka
        self._tables, self._limits = tables, (batch_rows, batch_bytes)
        self._sweep, self._unavailable = sweep, unavailable
        self._look_back, self._monotonic = look_back, monotonic

    def state(self) -> TopicState:
        """Returns the topic's id and the oldest and newest positions that can be read from.

        Raises:
          SourceUnavailable, TopicMissing, TopicNotOnePartition: as they say.
        """
        return topic_state(self._bootstrap, self._topic, self._kafka)

    def stream(self, start: Position, topic_id: str = "") -> DebeziumStream:
        """Opens the changes behind `start`, in memory of those before.

        Raises:
          see `EventStream`.
        """
        stream = EventStream(
            self._bootstrap, self._topic, start, topic_id, self._kafka, self._monotonic
        )
        try:
            return DebeziumStream(stream, self._decoder(start), self._monotonic)
        except BaseException:
            stream.close()
            raise

    def snapshot_start(self) -> "SnapshotStart":
        """Returns where the first whole snapshot in the topic begins: a link is filled from there.

        It reads the whole topic. Every change behind the beginning is in it, since retention
        deletes from the front.

        Raises:
          SnapshotMissing: there is none whose beginning is still there.
        """
        found: int | None = None
        tables: dict[str, None] = {}
        inside = True  # Whether in a snapshot; at the topic's front its beginning may be gone.
        low = self.state().oldest.lsn
        for records in self._range(low, 1 << 62):
            for record in records:
                source = _change_source(record)
                if source is None:
                    continue
                whole, marker = source
                first = record.offset == 0 or marker.snapshot == "first" or not inside
                if whole and first and found is None:
                    found = record.offset
                if whole and found is not None:
                    tables[marker.name] = None
                inside = whole and marker.snapshot != "last"
        if found is None:
            raise SnapshotMissing(
                f"topic {self._topic} holds no whole snapshot. Remedy: let the connector take one "
                "(an ad-hoc blocking snapshot of all tables, or `snapshot.mode=always` at its "
                "next start) with the topic's retention longer than it takes to read."
            )
        return SnapshotStart(before(found), tuple(tables))

    def _decoder(self, start: Position) -> DebeziumDecoder:
        """Makes a decoder and lets it see what stands before `start`.

        Where `start` is inside a snapshot whose end is to be swept, that is all of the snapshot.
        """
        end, back = needed_offset(start), self._look_back
        while True:
            decoder = DebeziumDecoder(
                *self._limits,
                start,
                self._tables,
                sweep=self._sweep,
                unavailable=self._unavailable,
            )
            first = max(0, end - back)
            for records in self._range(first, end):
                decoder.remember(records)
            if not (self._sweep and decoder.lacks_snapshot_begin) or first == 0:
                return decoder
            back *= 4

    def _range(self, first: int, end: int):
        return read_range(self._bootstrap, self._topic, first, end, self._kafka)


def _change_source(record: Record) -> tuple[bool, Source] | None:
    """Whether a change is a row of a whole snapshot, and its source; None for no change."""
    if record.value is None:
        return None
    try:
        payload = parse(record).payload
    except NotAnEvent:
        return None
    if payload.op is None or payload.source is None:
        return None
    return payload.op == "r" and payload.source.snapshot != "incremental", payload.source
