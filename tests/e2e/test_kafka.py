"""The embedded Kafka: it comes, stays, survives a kill and goes."""

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from runners.embedded.binaries import ServerError
from runners.embedded.kafka import LOCK_FILE, KafkaServer
from runners.jars import read_lock


def test_the_lock_names_every_jar_once():
    jars = read_lock(LOCK_FILE)
    assert len(jars) == len({jar.file_name for jar in jars}) == 45
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in jars)
    names = {(jar.artifact, jar.version) for jar in jars}
    assert {("kafka_2.13", "4.4.0"), ("slf4j-simple", "1.7.36")} <= names


def test_what_was_written_is_there_after_a_kill_and_another_process_can_take_over(tmp_path):
    with pytest.raises(ServerError, match="never started"):
        _ = KafkaServer(tmp_path / "server").port
    with KafkaServer(tmp_path / "server") as server:
        server.create_topic("t")
        producer = Producer({"bootstrap.servers": server.bootstrap, "acks": "all"})
        producer.produce("t", b"value")
        assert producer.flush(30) == 0
        port = server.port
        server.kill()
        assert not server.running
        other = KafkaServer(tmp_path / "server")
        other.start()
        other.start()
        assert (other.port, server.running) == (port, True)
        place = TopicPartition("t", 0)
        consumer = Consumer({"bootstrap.servers": other.bootstrap, "group.id": "g"})
        assert consumer.get_watermark_offsets(place, timeout=10) == (0, 1)
        consumer.close()
        other.delete_topic("t")
        other.stop()
        assert not server.running
        other.stop()


def test_a_broker_that_cannot_start_says_where_to_look(tmp_path):
    server = KafkaServer(tmp_path / "server", settings={"num.partitions": "none"})
    with pytest.raises(ServerError, match=r"server\.log"):
        server.start()
    server.stop()
