"""Read one partition of Kafka from a given offset on, and never commit: the ledger does."""

import typing
from collections.abc import Callable, Iterator, Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from schemas.clocks import monotonic_s
from schemas.errors import CampusSyncError
from schemas.positions import NEW_LOG_REMEDY, Position
from transforms.capture.debezium.record import Record
from transforms.capture.debezium.topic import (
    PARTITION,
    TopicClient,
    before,
    bounds,
    client_settings,
    needed_offset,
    topic_state,
    unavailable,
)

_FETCH_MAX = 1000  # Messages a call, so that a batch is not much larger than its bound.
_LOOK_S = 5.0
_PREFETCH_KB = 16_384
_FETCH_BYTES = 4 << 20


class RetentionGap(CampusSyncError):
    """The topic no longer has what comes next: it must be read anew from a snapshot (trap 6)."""


class TopicRecreated(CampusSyncError):
    """The topic is another one than that which was read: its offsets mean other events."""


class Fetched(typing.NamedTuple):
    """What one `EventStream.read` found.

    Attributes:
      records: in order of offset.
      next_offset: everything committed before it has been handed out.
      caught_up: nothing more could be read without waiting.
      at_end: the broker said that there is nothing more.
    """

    records: list[Record]
    next_offset: int
    caught_up: bool
    at_end: bool


class EventStream:
    """The committed records of a topic of one partition, from a position on. Not thread-safe.

    No consumer group is joined and no offset committed: a second reader disturbs nothing, and
    what was read counts only once the store's ledger has it. Memory is bounded by
    16 MB of prefetched records and the batch.

    Args:
      bootstrap, topic: `host:port[,host:port]`, and the topic's name.
      start: as `DebeziumDecoder` counts; what follows it is read.
      topic_id: of the topic that `start` was counted in, as `TopicState` has it; empty if it is
        not known.
      kafka: further settings of librdkafka (TLS, SASL).

    Raises:
      SourceUnavailable: no answer. TopicMissing, TopicNotOnePartition: as they say.
      RetentionGap: what follows `start` is no longer there.
      TopicRecreated: the topic has another id, or ends before `start`.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        start: Position,
        topic_id: str = "",
        kafka: Mapping[str, str] | None = None,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._bootstrap, self._topic = bootstrap, topic
        self._monotonic = monotonic
        self._client = TopicClient(bootstrap, topic, kafka)
        self.topic_id = self._client.topic_id()
        if topic_id and topic_id != self.topic_id:
            raise self._recreated()
        self._failure: KafkaError | None = None
        self._next = needed_offset(start)
        self._at_end = False
        self._looked_at = monotonic()
        self._consumer = Consumer(
            {
                **client_settings(bootstrap, kafka),
                "group.id": "campus_sync",  # Needed by the client, never joined.
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "check.crcs": True,
                "queued.max.messages.kbytes": _PREFETCH_KB,
                "fetch.message.max.bytes": _FETCH_BYTES,
                "fetch.wait.max.ms": 100,
                # After its memory was full the client would else wait a second.
                "fetch.queue.backoff.ms": 5,
                "error_cb": self._take_error,
            }
        )
        try:
            self._check(start)
            self._consumer.assign([TopicPartition(topic, PARTITION, self._next)])
        except (CampusSyncError, KafkaException):
            self._consumer.close()
            raise

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._consumer.close()

    def read(self, max_rows: int, max_bytes: int, timeout_s: float) -> Fetched:
        """Returns what has come, until a bound is reached; waits only for the first record.

        Raises:
          SourceUnavailable: the brokers are gone.
          RetentionGap, TopicRecreated, TopicMissing: as they say.
        """
        self._look()
        records: list[Record] = []
        size = 0
        # `consume` waits until it has all that it was asked for: wait for the first alone.
        first = self._consumer.poll(timeout_s)
        messages = [] if first is None else [first]
        while messages:
            for message in messages:
                record = self._record(message)
                if record is not None:
                    records.append(record)
                    size += len(record.value or b"") + len(record.key or b"")
            if len(records) >= max_rows or size >= max_bytes:
                break
            messages = self._consumer.consume(min(_FETCH_MAX, max_rows - len(records)), 0.0)
        caught_up = not messages
        if self._failure is not None:
            raise unavailable(self._bootstrap, self._topic, self._failure)
        return Fetched(records, self._next, caught_up, self._at_end)

    def _check(self, start: Position) -> None:
        low, high = bounds(self._consumer, self._bootstrap, self._topic)
        if self._next > high:
            raise self._recreated()
        if self._next < low:
            raise self._gap()

    def _look(self) -> None:
        """Looks now and then whether it is still the same topic; offsets do not tell."""
        now = self._monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            if self._client.topic_id() != self.topic_id:
                raise self._recreated()

    def _record(self, message: Message) -> Record | None:
        error = message.error()
        if error is None:
            self._next, self._at_end = message.offset() + 1, False
            headers = message.headers() or ()
            return Record(message.offset(), message.key(), message.value(), headers)
        if error.code() == KafkaError._PARTITION_EOF:
            # Behind the last record may stand marks of transactions.
            self._next, self._at_end = max(self._next, message.offset()), True
            return None
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            low, _ = bounds(self._consumer, self._bootstrap, self._topic)
            raise self._gap() if self._next < low else self._recreated()
        if error.code() == KafkaError._LOG_TRUNCATION:
            raise self._recreated()
        raise unavailable(self._bootstrap, self._topic, error)

    def _take_error(self, error: KafkaError) -> None:
        """Remembers that no broker answers: the client itself would go on trying in silence."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self._failure = error

    def _gap(self) -> RetentionGap:
        return RetentionGap(
            f"topic {self._topic} has no more the changes from offset {self._next} on: they were "
            "deleted before they were read. Remedy: let the connector take a new snapshot (an "
            "ad-hoc blocking snapshot of all tables, or `snapshot.mode=always` at its next "
            "start), and raise the topic's retention.ms."
        )

    def _recreated(self) -> TopicRecreated:
        return TopicRecreated(
            f"topic {self._topic} was deleted and made again, or lost its end: offset "
            f"{getattr(self, '_next', 0)} in it is another event than before. {NEW_LOG_REMEDY} "
            "Let the connector take a new snapshot before."
        )


def read_range(
    bootstrap: str,
    topic: str,
    first: int,
    end: int,
    kafka: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
    monotonic: Callable[[], float] = monotonic_s,
) -> Iterator[list[Record]]:
    """Yields the committed records with offsets from `first` to before `end`, as far as there are.

    What retention has deleted of the range is not there; nothing else is left out.

    Raises:
      SourceUnavailable: nothing came for `timeout_s`. See `EventStream`.
    """
    oldest = topic_state(bootstrap, topic, kafka).oldest
    start = max(before(first), oldest)
    if start.lsn >= end:
        return
    with EventStream(bootstrap, topic, start, "", kafka, monotonic) as stream:
        deadline = monotonic() + timeout_s
        while True:
            fetched = stream.read(10_000, 8 << 20, 1.0)
            records = [record for record in fetched.records if record.offset < end]
            if records:
                deadline = monotonic() + timeout_s
                yield records
            if fetched.next_offset >= end or (fetched.caught_up and fetched.at_end):
                return
            if monotonic() > deadline:
                raise unavailable(bootstrap, topic, None)
