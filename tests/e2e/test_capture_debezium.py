"""Debezium events from a real Kafka: restarts, kills, gaps, repeats, and topics that lie."""

import dataclasses
import time

import pytest
from confluent_kafka import Producer, TopicPartition

from runners.embedded.kafka import KafkaServer
from schemas.batches import RawChanges
from schemas.errors import SourceUnavailable
from schemas.positions import SEQ_END, START, Position
from tests.debezium_events import Topic, field, load
from tests.raw_changes import rows_of
from transforms.capture.debezium.event_stream import EventStream, RetentionGap, TopicRecreated
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import Record
from transforms.capture.debezium.source import DebeziumSource, SnapshotMissing
from transforms.capture.debezium.topic import (
    TopicMissing,
    TopicNotOnePartition,
    check_topic,
    topic_state,
)

DEADLINE_S = 60
KEYS = {"his.patient": ("pid",), "his.result": ("result_id",), "his.kinds": ("id",)}
SPECS = {table: TableSpec(key) for table, key in KEYS.items()}
TABLE = "his.t"
FIELDS, ONE = {TABLE: [field("id", "int32"), field("v", "int32")]}, {TABLE: TableSpec(("id",))}


@pytest.fixture(scope="module")
def kafka(tmp_path_factory):
    with KafkaServer(tmp_path_factory.mktemp("kafka") / "server") as server:
        yield server


@dataclasses.dataclass
class Fed:
    """A topic of the test's own, and what is put into it."""

    server: KafkaServer
    name: str

    def put(self, records: list[Record], **settings) -> None:
        producer = Producer({"bootstrap.servers": self.server.bootstrap, "acks": "all"} | settings)
        if "transactional.id" in settings:
            producer.init_transactions(30)
            producer.begin_transaction()
        for record in records:
            headers = list(record.headers)
            producer.produce(self.name, record.value, record.key, headers=headers, partition=0)
        assert producer.flush(30) == 0
        self.producer = producer  # A transaction ends with its producer.

    def source(self, specs=None, **options) -> DebeziumSource:
        limits = {"batch_rows": 1000, "batch_bytes": 1 << 20}
        return DebeziumSource(self.server.bootstrap, self.name, specs or SPECS, **limits | options)

    def forget_before(self, offset: int) -> None:
        admin = self.server.admin()
        place = TopicPartition(self.name, 0, offset)
        admin.delete_records([place])[place].result(30)


@pytest.fixture
def fed(kafka, request) -> Fed:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    kafka.create_topic(name)
    return Fed(kafka, name)


def read(stream, end: int | None = None) -> list[RawChanges]:
    """Reads until the position is behind offset `end`, by default until nothing more is there."""
    batches: list[RawChanges] = []
    deadline = time.monotonic() + DEADLINE_S
    while stream.position.lsn < end if end is not None else not stream.caught_up:
        assert time.monotonic() < deadline
        batches += stream.read(1000, 1 << 20, 0.5)
    return batches


def change(topic: Topic, number: int, identity: int = 1, op: str = "u") -> Record:
    after = {"id": identity, "v": number}
    return topic.change(op, TABLE, None, after, {"txId": number, "lsn": number, "ts_ms": number})


def test_a_restart_from_any_position_gives_the_same_rows(fed):
    records = load("postgresql")
    fed.put(records)
    source = fed.source()
    with source.stream(START) as stream:
        whole = rows_of(read(stream, len(records)))
    assert len(whole) > 20
    with fed.source(batch_rows=2).stream(START) as stream:
        positions = [raw.end for raw in read(stream, len(records))]
    assert len(positions) > 15
    for position in positions:
        with source.stream(position) as stream:
            again = rows_of(read(stream, len(records)))
        assert again == [row for row in whole if (row["_lsn"], row["_seq"]) > position]


def test_a_killed_broker_loses_and_doubles_nothing(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    records = [change(topic, i, i) for i in range(1, 401)]
    fed.put(records[:200])
    source = fed.source(ONE, batch_rows=50)
    stream = source.stream(START)
    batches = stream.read(60, 1 << 20, 5.0)
    fed.server.kill()
    with pytest.raises(SourceUnavailable):
        for _ in range(DEADLINE_S):
            batches += stream.read(60, 1 << 20, 1.0)
    position = stream.position
    stream.close()
    fed.server.start()
    fed.put(records[200:])
    with source.stream(position) as stream:
        batches += read(stream, 400)
    assert [raw.begin for raw in batches[1:]] == [raw.end for raw in batches[:-1]]
    assert [row["v"] for row in rows_of(batches)] == [str(i) for i in range(1, 401)]


def test_what_the_connector_sends_again_is_left_out_also_by_a_new_reader(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    first = [change(topic, i) for i in range(1, 11)]
    fed.put(first)
    with fed.source(ONE).stream(START) as stream:
        read(stream, 10)
        position, topic_id = stream.position, stream.topic_id
        fed.put([*first[4:], change(topic, 11)])  # Killed; it goes on from what it had stored.
        assert [row["v"] for row in rows_of(read(stream, 17))] == ["11"]
        assert (stream.duplicates, stream.rewinds) == (6, 0)
    with fed.source(ONE).stream(position, topic_id) as stream:
        assert [row["v"] for row in rows_of(read(stream, 17))] == ["11"]
        stream.acknowledge(stream.position)
        stream.keep_alive()


def test_a_gap_is_told_and_filled_from_the_next_snapshot(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    fed.put([change(topic, i, i) for i in range(1, 21)])
    fed.forget_before(10)
    source = fed.source(ONE, sweep=True)
    assert source.state().oldest == Position(10, SEQ_END)
    source.stream(Position(10, SEQ_END)).close()
    for lost in (START, Position(9, SEQ_END), Position(10, 1)):
        with pytest.raises(RetentionGap, match="new snapshot"):
            source.stream(lost)
    with pytest.raises(SnapshotMissing, match="snapshot"):
        source.snapshot_start()
    marks = ["first", "true", "last"]
    rows = [
        topic.change("r", TABLE, None, {"id": i, "v": 50}, {"snapshot": mark})
        for i, mark in enumerate(marks)
    ]
    fed.put([*rows, change(topic, 51)])
    start = source.snapshot_start()
    assert (start.position, start.tables) == (Position(20, SEQ_END), (TABLE,))
    with source.stream(start.position) as stream:
        batches = read(stream, 24)
    assert [row["v"] for row in rows_of(batches)] == ["50", "50", "50", "51"]
    assert [raw.sweeps for raw in batches if raw.sweeps] == [((TABLE, Position(21, 0)),)]
    # Restarted within the snapshot, it still knows where that began.
    with fed.source(ONE, sweep=True, look_back=1).stream(Position(22, SEQ_END)) as stream:
        batches = read(stream, 24)
    assert [raw.sweeps for raw in batches if raw.sweeps] == [((TABLE, Position(21, 0)),)]


def test_what_is_deleted_under_a_running_reader_is_told(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    wide = "x" * 100_000
    fields = {TABLE: [*FIELDS[TABLE], field("w", "string")]}
    topic.fields = fields
    records = [
        topic.change("c", TABLE, None, {"id": i, "v": i, "w": wide}, {"txId": i, "lsn": i})
        for i in range(400)
    ]
    fed.put(records)
    with EventStream(fed.server.bootstrap, fed.name, START) as stream:
        assert stream.read(1, 1, 10.0).records
        fed.forget_before(399)  # Far behind what the client has fetched ahead.
        with pytest.raises(RetentionGap):
            for _ in range(DEADLINE_S):
                stream.read(50, 1 << 20, 1.0)


def test_a_topic_made_again_is_another_one(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    fed.put([change(topic, i) for i in range(1, 6)])
    now = [0.0]
    source = fed.source(ONE, monotonic=lambda: now[0])
    stream = source.stream(START)
    read(stream, 5)
    position, topic_id = stream.position, stream.topic_id
    fed.server.delete_topic(fed.name)
    with pytest.raises(TopicMissing, match="does not exist"):
        source.stream(position)
    fed.server.create_topic(fed.name)
    with pytest.raises(TopicRecreated):
        source.stream(position)  # Shorter than what was read of it.
    fed.put([change(topic, i) for i in range(1, 11)])
    with pytest.raises(TopicRecreated, match="generation"):
        source.stream(position, topic_id)  # Long enough, but another.
    now[0] += 60
    with pytest.raises((TopicRecreated, TopicMissing, SourceUnavailable)):
        stream.read(10, 1000, 1.0)
    stream.close()


def test_only_what_kafka_s_own_transactions_committed_is_read(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    records = [change(topic, i) for i in range(1, 10)]
    fed.put(records[:2], **{"transactional.id": "a"})
    with fed.source(ONE).stream(START) as stream:
        assert read(stream) == []  # Open.
        fed.producer.commit_transaction(30)
        assert [row["v"] for row in rows_of(read(stream, 2))] == ["1", "2"]
        fed.put(records[2:4], **{"transactional.id": "a"})
        fed.producer.abort_transaction(30)
        fed.put(records[4:5])
        assert [row["v"] for row in rows_of(read(stream, 7))] == ["5"]
        end = stream.position
    assert end == topic_state(fed.server.bootstrap, fed.name).newest == Position(7, SEQ_END)


def test_the_position_moves_over_marks_and_heartbeats_while_nothing_happens(fed):
    topic = Topic("oracle", FIELDS, {TABLE: ("id",)})
    topic.heartbeat(5)
    fed.put(topic.records, **{"transactional.id": "b"})
    fed.producer.commit_transaction(30)
    with fed.source(ONE).stream(START) as stream:
        batches = read(stream, 2)  # The heartbeat and the transaction's mark.
    assert [(raw.captured, raw.commit_us_max) for raw in batches][-1] == (0, 5000)
    assert batches[-1].end == Position(2, SEQ_END)


def test_a_transaction_that_stays_open_is_not_kept_back(fed):
    topic = Topic("mysql", FIELDS, {TABLE: ("id",)})
    topic.boundary("BEGIN", "a")
    topic.change("c", TABLE, None, {"id": 1, "v": 1})
    fed.put(topic.records)
    with fed.source(ONE).stream(START) as stream:
        began = time.monotonic()
        assert rows_of(read(stream, 2))
        assert 0.5 < time.monotonic() - began < 10


def test_a_reader_leaves_no_trace_and_disturbs_no_other(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    fed.put([change(topic, i, i) for i in range(1, 101)])
    with fed.source(ONE).stream(START) as one, fed.source(ONE).stream(START) as other:
        assert len(rows_of(read(one, 100))) == len(rows_of(read(other, 100))) == 100
        groups = fed.server.admin().list_consumer_groups().result(30)
        assert [group.group_id for group in groups.valid] == []


def test_a_read_is_bounded(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    records = [change(topic, i, i) for i in range(1, 101)]
    fed.put(records)
    size = len(records[0].value) + len(records[0].key)
    with EventStream(fed.server.bootstrap, fed.name, START) as stream:
        first = stream.read(7, 1 << 30, 10.0)
        assert (len(first.records), first.next_offset, first.caught_up) == (7, 7, False)
        rest = []
        while not first.caught_up:
            first = stream.read(1000, 1 << 30, 10.0)
            rest += first.records
        assert [record.offset for record in rest] == list(range(7, 100))
    with EventStream(fed.server.bootstrap, fed.name, START) as stream:
        few = stream.read(1000, size, 10.0).records
        assert sum(len(r.value) for r in few) < size + (1 << 21)


def test_a_change_is_read_as_soon_as_it_is_there(fed):
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)})
    with fed.source(ONE).stream(START) as stream:
        read(stream)
        took = []
        for i in range(1, 21):
            fed.put([change(topic, i, i)])
            began = time.monotonic()
            assert rows_of(read(stream, i))
            took.append(time.monotonic() - began)
    assert sorted(took)[10] < 0.3


def test_a_topic_of_several_partitions_is_refused_with_the_remedy(kafka):
    kafka.create_topic("wide", partitions=3, settings={"cleanup.policy": "compact"})
    with pytest.raises(TopicNotOnePartition, match="RegexRouter"):
        EventStream(kafka.bootstrap, "wide", START)
    found = {finding.reason: finding for finding in check_topic(kafka.bootstrap, "wide")}
    assert found["several_partitions"].fatal
    assert found["compacted"].fatal
    assert "RegexRouter" in found["several_partitions"].remedy


def test_preflight_looks_at_retention(kafka):
    short = {"retention.ms": "3600000", "retention.bytes": "1000000"}
    kafka.create_topic("brief", settings=short)
    found = check_topic(kafka.bootstrap, "brief")
    assert [(f.reason, f.fatal) for f in found] == [
        ("short_retention", False),
        ("retention_by_size", False),
    ]
    kafka.create_topic("long", settings={"retention.ms": "-1"})
    assert check_topic(kafka.bootstrap, "long") == []
    with pytest.raises(TopicMissing, match="Remedy"):
        check_topic(kafka.bootstrap, "nowhere")


def test_a_broker_that_is_not_there_is_told():
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1:9"):
        topic_state("127.0.0.1:9", "t", {"socket.connection.setup.timeout.ms": "1000"})
