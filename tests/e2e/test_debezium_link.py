"""A campus seen through Debezium: from a real Kafka into a real store, over restarts and gaps."""

import pathlib

import pytest
from confluent_kafka import Producer, TopicPartition

from pipelines.replay import Became, letters, replay
from runners.embedded.kafka import KafkaServer
from schemas.positions import SEQ_END, Position, own_position
from tests.debezium_events import load as recorded
from tests.faults.harness import Link, Network, until
from tests.one_link import OneLink

MAPPING = """\
version: 1
description: An Oracle's patients, by LogMiner and Debezium
zone: +08:00
code_lists:
  sex: {codes: {男: 1, 女: 2, M: 1, F: 2}}
  abo: {codes: {A: A, B: B, O: O, AB: AB}}
tables:
  LAB.PAT_MASTER_INDEX:
    table: patient
    id: PATIENT_ID
    columns:
      patient_id: PATIENT_ID
      name: NAME
      sex: {from: SEX, codes: sex}
      birth_date: {from: DATE_OF_BIRTH, formats: ['%Y-%m-%dT%H:%M:%S', '%Y-%m-%d %H:%M:%S']}
      id_no: ID_NO
      abo: {from: BLOOD_TYPE, codes: abo}
    absent: [allergies, phone, rh, updated_at]
    ignore: [INP_NO]
"""
# What tests/debezium_made_up.py tells of these patients: three in the snapshot, one renamed, one
# whose key changes, two added.
PATIENTS = ["P000000", "P000002", "P000013", "P000014", "P900001"]


@pytest.fixture(scope="module")
def kafka(tmp_path_factory):
    with KafkaServer(tmp_path_factory.mktemp("kafka") / "server") as server:
        yield server


@pytest.fixture
def campus(kafka, database, tmp_path, request):
    topic = "".join(c if c.isalnum() else "-" for c in request.node.name)
    kafka.create_topic(topic)
    return Campus(kafka, database, tmp_path, topic)


class Campus(OneLink):
    """A topic, the store that it feeds, and the link between them."""

    def __init__(self, kafka: KafkaServer, store: str, folder: pathlib.Path, topic: str):
        self.kafka, self.topic = kafka, topic
        source = {
            "kind": "debezium",
            "dsn": f"kafka://{kafka.bootstrap}/{topic}",
            "mapping": "campus_c.yaml",
            # What an event without a schema does not tell.
            "hints": {"LAB.PAT_MASTER_INDEX": {"DATE_OF_BIRTH": "millis"}},
        }
        super().__init__(folder, store, "west", source, {"campus_c.yaml": MAPPING})

    def put(self, records) -> None:
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap, "acks": "all"})
        for record in records:
            headers = list(record.headers)
            producer.produce(self.topic, record.value, record.key, headers=headers, partition=0)
        assert producer.flush(30) == 0

    def forget_before(self, offset: int) -> None:
        admin, place = self.kafka.admin(), TopicPartition(self.topic, 0, offset)
        admin.delete_records([place])[place].result(30)

    def patients(self) -> list[str]:
        query = "SELECT record_id FROM consult.patient WHERE NOT deleted ORDER BY 1"
        return [row[0] for row in self.ask(query)]

    def reached(self) -> int:
        query = "SELECT lsn FROM sync.progress WHERE lane = 'routine'"
        lsn = next((row[0] for row in self.ask(query)), 0)
        return own_position(self.config.sources["west"].generation, Position(lsn, SEQ_END)).lsn

    def follow(self, offset: int, network: Network | None = None) -> None:
        """Runs the link until everything before `offset` is applied."""
        with Link(self.settings, network or Network()):
            until(lambda: self.reached() >= offset, 60, lambda: str(self.ask(_PROGRESS)))


_PROGRESS = "SELECT lane, lsn, captured, delivered, dead FROM sync.progress"


@pytest.mark.parametrize("name", ["oracle", "oracle_plain"])
def test_the_store_has_what_the_events_tell(campus, name):
    records = recorded(name)
    campus.put(records)
    campus.follow(len(records), Network(1, lost=0.2, repeated=0.2, waiting=4))
    assert campus.patients() == PATIENTS
    (name, sex, born) = campus.ask(
        "SELECT name, sex, birth_date IS NOT NULL FROM consult.patient WHERE record_id = 'P000000'"
    )[0]
    assert (name, born) == ("改名", True)
    assert sex in ("1", "2")
    assert campus.ask("SELECT count(*) FROM sync.dead_letter") == [(0,)]
    (counts,) = campus.ask(
        "SELECT captured, delivered + duplicates + superseded + held + dead FROM sync.progress"
        " WHERE lane = 'routine'"
    )
    assert counts[0] == counts[1] > 0


def test_goes_on_where_the_ledger_stands(campus):
    records = recorded("oracle")
    for end in (5, 9, len(records)):
        campus.put(records[campus.reached() : end])
        campus.follow(end)
    assert campus.patients() == PATIENTS
    assert len(campus.ask("SELECT FROM sync.snapshot")) == 1


def test_a_column_that_no_event_has_is_told_with_what_the_mapping_should_say(campus, monkeypatch):
    monkeypatch.setattr("transforms.capture.link_reader._LOOK_AT_PUBLICATION_S", 0.5)
    mapping = campus.folder / "campus_c.yaml"
    right = mapping.read_text(encoding="utf-8")
    mapping.write_text(right.replace("name: NAME\n", "name: NAME_OF_OLD\n"), encoding="utf-8")
    records = recorded("oracle")
    campus.put(records)
    told = "SELECT detail FROM sync.incident WHERE (kind, state) = ('schema_drift', 'open')"
    with Link(campus.settings):
        until(lambda: campus.reached() >= len(records), 60, lambda: str(campus.ask(_PROGRESS)))
        until(lambda: campus.ask(told), 20, "an incident")
    ((detail,),) = campus.ask(told)
    assert "LAB.PAT_MASTER_INDEX lacks NAME_OF_OLD" in detail and "columns: name: NAME" in detail
    assert campus.ask("SELECT DISTINCT reason FROM sync.dead_letter") == [("missing_column",)]
    mapping.write_text(right, encoding="utf-8")
    list(replay(campus.config, letters(campus.config)[0]))
    assert campus.patients() == PATIENTS
    with Link(campus.settings):
        until(lambda: not campus.ask(told), 20, "its end")


def test_records_that_were_refused_whole_are_replayed(campus):
    """The mapping named a key that no event has: every record is a letter until it is mended."""
    right = (campus.folder / "campus_c.yaml").read_text(encoding="utf-8")
    wrong = right.replace("    id: PATIENT_ID\n", "    id: PATIENT_KEY\n")
    (campus.folder / "campus_c.yaml").write_text(wrong, encoding="utf-8")
    records = recorded("oracle")
    campus.put(records)
    campus.follow(len(records))
    assert campus.patients() == []
    reasons = campus.ask("SELECT DISTINCT reason FROM sync.dead_letter")
    assert reasons == [("missing_key",)]
    (campus.folder / "campus_c.yaml").write_text(right, encoding="utf-8")
    filed, _ = letters(campus.config)
    became = {result.became for result in replay(campus.config, filed)}
    assert became <= {Became.DELIVERED, Became.DUPLICATE, Became.SUPERSEDED}, became
    assert list(replay(campus.config, letters(campus.config)[0])) == []
    assert campus.patients() == PATIENTS  # One of them by a delete and an insert (trap 5).
    (name,) = campus.ask("SELECT name FROM consult.patient WHERE record_id = 'P000000'")
    assert name == ("改名",)
    (counts,) = campus.ask(
        "SELECT captured, delivered + duplicates + superseded + held + dead FROM sync.progress"
        " WHERE lane = 'routine'"
    )
    assert counts[0] == counts[1] > 0
    assert campus.ask("SELECT count(*) FROM sync.dead_letter WHERE state = 'open'") == [(0,)]


def test_a_gap_is_filled_by_the_next_snapshot_in_the_topic(campus):
    """Retention deletes what was not read yet; the connector's new snapshot holds it."""
    records = recorded("oracle")
    campus.put(records[:9])
    campus.follow(9)
    campus.put(records[9:])
    campus.put(records[:9])  # The connector reads all tables again.
    campus.forget_before(len(records))
    campus.follow(len(records) + 9)
    assert campus.patients() == ["P000000", "P000001", "P000002"]
    reasons = campus.ask("SELECT reason FROM sync.snapshot ORDER BY lsn")
    assert reasons == [("first",), ("slot_invalidated",)]


def test_a_topic_made_again_is_another_log_once_a_person_says_so(campus, caplog):
    records = recorded("oracle")
    campus.put(records)
    campus.follow(len(records))
    campus.kafka.delete_topic(campus.topic)
    campus.kafka.create_topic(campus.topic)
    campus.put(records[:5])
    with Link(campus.settings):
        until(lambda: "raise the source's `generation`" in caplog.text, 30, "the refusal")
    campus.configure(generation=1)
    for end in (5, 9):
        campus.put(records[campus.reached() or 5 : end])
        campus.follow(end)
    assert {"P000000", "P000001", "P000002"} <= set(campus.patients())
    reasons = campus.ask("SELECT reason FROM sync.snapshot ORDER BY lsn")
    assert reasons == [("first",), ("new_log",)]
