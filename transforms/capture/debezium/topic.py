"""What a Kafka topic is like now, and whether it can be a link's source."""

import dataclasses
import typing
import urllib.parse
from collections.abc import Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from schemas.errors import CampusSyncError, SourceUnavailable
from schemas.positions import SEQ_END, Position

PARTITION = 0
_TIMEOUT_S = 10.0
# A hospital's long holiday: what a consult store may be down without a new snapshot.
_RETENTION_MS_MIN = 7 * 24 * 3_600_000
_GONE = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError.UNKNOWN_TOPIC_ID,
    KafkaError._UNKNOWN_PARTITION,
)
_ONE_PARTITION = (
    "route all tables of the connector into one topic of one partition, so that their order is "
    "kept: `transforms=route`, `transforms.route.type=org.apache.kafka.connect.transforms."
    "RegexRouter`, `transforms.route.regex=.*`, `transforms.route.replacement={topic}`"
)


class TopicMissing(CampusSyncError):
    """The topic does not exist, or this client may not see it."""


class TopicNotOnePartition(CampusSyncError):
    """The topic has several partitions: Kafka keeps no order among them."""


@dataclasses.dataclass(frozen=True)
class TopicState:
    """A topic as it is now.

    Attributes:
      topic_id: another one after the topic was deleted and made again; empty where the broker
        is too old to tell.
      oldest: the earliest position from which everything later can still be read.
      newest: the end of what is committed.
    """

    topic_id: str
    oldest: Position
    newest: Position


class TopicFinding(typing.NamedTuple):
    """What preflight has to say. `fatal`: rows would be lost or out of order."""

    reason: str
    fatal: bool
    remedy: str


def place_of(dsn: str) -> tuple[str, str]:
    """Returns bootstrap servers and topic of `kafka://host:port/topic`."""
    parts = urllib.parse.urlsplit(dsn)
    return parts.netloc, parts.path.strip("/")


def client_settings(bootstrap: str, kafka: Mapping[str, str] | None) -> dict[str, typing.Any]:
    """Returns what every client here is made with; `kafka` are librdkafka's own settings.

    Secrets stay where `kafka` refers to (`ssl.key.location`, `sasl.*` by a callback or a file).
    """
    return {
        "bootstrap.servers": bootstrap,
        "client.id": "campus_sync",
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 1000,
        "allow.auto.create.topics": False,
        # It would write on stderr; what matters is raised.
        "log_level": 0,
        **(kafka or {}),
    }


def unavailable(bootstrap: str, topic: str, error: KafkaError | None) -> CampusSyncError:
    """Returns the error for what a client said; None: it waited in vain."""
    if error is not None and error.code() in _GONE:
        return TopicMissing(
            f"topic {topic} on {bootstrap} does not exist. Remedy: create it with one partition "
            "and start the connector, or correct the name."
        )
    if error is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return TopicMissing(
            f"topic {topic} on {bootstrap} may not be read. Remedy: grant Read and Describe."
        )
    cause = error.name() if error is not None else "no answer"
    return SourceUnavailable(f"Kafka at {bootstrap} cannot be reached or broke off: {cause}.")


class TopicClient:
    """Asks a broker about one topic. Not thread-safe.

    Raises (all methods):
      SourceUnavailable: no answer. TopicMissing: as it says.
    """

    def __init__(self, bootstrap: str, topic: str, kafka: Mapping[str, str] | None = None):
        self._bootstrap, self._topic = bootstrap, topic
        self._admin = AdminClient(client_settings(bootstrap, kafka))

    def topic_id(self) -> str:
        """Returns the topic's id.

        Raises:
          TopicNotOnePartition: as it says.
        """
        described = self._described()
        if len(described.partitions) != 1:
            raise TopicNotOnePartition(
                f"topic {self._topic} has {len(described.partitions)} partitions: changes of one "
                f"row could arrive out of order. Remedy: {_ONE_PARTITION.format(topic=self._topic)}"
                "; create the topic anew and let the connector take a new snapshot."
            )
        return str(described.topic_id or "")

    def findings(self) -> list[TopicFinding]:
        """Returns what is wrong or unwise in the topic's settings."""
        found = []
        if len(self._described().partitions) != 1:
            remedy = _ONE_PARTITION.format(topic=self._topic)
            found.append(TopicFinding("several_partitions", True, remedy))
        settings = self.settings()
        if "compact" in settings.get("cleanup.policy", ""):
            remedy = "set cleanup.policy=delete: compaction takes changes and deletes away"
            found.append(TopicFinding("compacted", True, remedy))
        retention_ms = int(settings.get("retention.ms", -1))
        if 0 <= retention_ms < _RETENTION_MS_MIN:
            remedy = f"set retention.ms to {_RETENTION_MS_MIN} or more: a store may be down so long"
            found.append(TopicFinding("short_retention", False, remedy))
        if int(settings.get("retention.bytes", -1)) >= 0:
            remedy = "set retention.bytes=-1: one large transaction could push unread changes out"
            found.append(TopicFinding("retention_by_size", False, remedy))
        return found

    def _described(self) -> typing.Any:
        topics = TopicCollection([self._topic])
        return self._result(
            self._admin.describe_topics(topics, request_timeout=_TIMEOUT_S)[self._topic]
        )

    def settings(self) -> dict[str, str]:
        """Returns the topic's settings by name, the broker's defaults among them."""
        resource = ConfigResource(ResourceType.TOPIC, self._topic)
        futures = self._admin.describe_configs([resource], request_timeout=_TIMEOUT_S)
        entries = self._result(futures[resource])
        return {name: entry.value for name, entry in entries.items() if entry.value is not None}

    def _result(self, future) -> typing.Any:
        try:
            return future.result(timeout=_TIMEOUT_S + 1)
        except KafkaException as error:
            raise unavailable(self._bootstrap, self._topic, error.args[0]) from error
        except TimeoutError as error:
            raise unavailable(self._bootstrap, self._topic, None) from error


def bounds(consumer: Consumer, bootstrap: str, topic: str) -> tuple[int, int]:
    """Returns the first offset that the topic still has, and the one after its last.

    Raises:
      SourceUnavailable, TopicMissing: as they say.
    """
    place = TopicPartition(topic, PARTITION)
    try:
        found = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S, cached=False)
    except KafkaException as error:
        raise unavailable(bootstrap, topic, error.args[0]) from error
    if found is None:
        raise unavailable(bootstrap, topic, None)
    return found


def topic_state(bootstrap: str, topic: str, kafka: Mapping[str, str] | None = None) -> TopicState:
    """Returns the topic as it is now.

    Raises:
      SourceUnavailable, TopicMissing, TopicNotOnePartition: as they say.
    """
    topic_id = TopicClient(bootstrap, topic, kafka).topic_id()
    settings = {**client_settings(bootstrap, kafka), "group.id": "campus_sync"}
    consumer = Consumer({**settings, "isolation.level": "read_committed"})
    try:
        low, high = bounds(consumer, bootstrap, topic)
    finally:
        consumer.close()
    return TopicState(topic_id, before(low), before(high))


def check_topic(
    bootstrap: str, topic: str, kafka: Mapping[str, str] | None = None
) -> list[TopicFinding]:
    """Returns what preflight has to say of a link's topic, each with its remedy.

    Raises:
      SourceUnavailable, TopicMissing: as they say.
    """
    return TopicClient(bootstrap, topic, kafka).findings()


def before(offset: int) -> Position:
    """Returns the position at which everything before `offset` was applied."""
    return Position(offset, SEQ_END)


def needed_offset(position: Position) -> int:
    """Returns the first offset that reading on from `position` needs."""
    return position.lsn if position.seq == SEQ_END else position.lsn - 1
