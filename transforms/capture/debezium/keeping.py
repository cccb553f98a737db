"""What a Kafka topic keeps: how old and how large it may become."""

import dataclasses
from collections.abc import Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from transforms.capture.debezium.topic import (
    PARTITION,
    TopicClient,
    bounds,
    client_settings,
    unavailable,
)

_SAMPLE = 50  # Records at the end of the topic, whose size is taken for that of all.
_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True)
class TopicKeeping:
    """A topic's own limits, -1 in Kafka's words being None here.

    Attributes:
      expire_s: age at which records go. size_max: bytes that are kept.
      record_bytes: mean size of the newest records as sent, 0 of an empty topic; what compression
        spares is not counted, so that a warning by size comes early rather than late.
    """

    expire_s: float | None
    size_max: int | None
    record_bytes: float


def topic_keeping(
    bootstrap: str, topic: str, kafka: Mapping[str, str] | None = None
) -> TopicKeeping:
    """Returns what the topic keeps; records are sampled only where size removes them.

    Raises:
      SourceUnavailable, TopicMissing: as they say.
    """
    settings = TopicClient(bootstrap, topic, kafka).settings()
    if "delete" not in settings.get("cleanup.policy", "delete"):
        return TopicKeeping(None, None, 0.0)
    age_ms = int(settings.get("retention.ms", -1))
    size = int(settings.get("retention.bytes", -1))
    record = _record_bytes(bootstrap, topic, kafka) if size >= 0 else 0.0
    expire_s = age_ms / 1000 if age_ms >= 0 else None
    return TopicKeeping(expire_s, size if size >= 0 else None, record)


def _record_bytes(bootstrap: str, topic: str, kafka: Mapping[str, str] | None) -> float:
    settings = {**client_settings(bootstrap, kafka), "group.id": "campus_sync"}
    consumer = Consumer({**settings, "enable.auto.commit": False, "enable.partition.eof": True})
    try:
        low, high = bounds(consumer, bootstrap, topic)
        if low >= high:
            return 0.0
        first = max(low, high - _SAMPLE)
        consumer.assign([TopicPartition(topic, PARTITION, first)])
        records = consumer.consume(high - first, timeout=_TIMEOUT_S)
        sound = [one for one in records if not one.error()]
        sizes = [len(one.value() or b"") + len(one.key() or b"") for one in sound]
    except KafkaException as error:
        raise unavailable(bootstrap, topic, error.args[0]) from error
    finally:
        consumer.close()
    return sum(sizes) / len(sizes) if sizes else 0.0
