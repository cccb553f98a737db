"""Time left until a slot, a binlog or a topic loses what a link needs, on real servers."""

import base64
import time

import psycopg
import pytest
import yaml
from confluent_kafka import Producer

from pipelines.sla_report import Observer
from runners.embedded.kafka import KafkaServer
from runners.log_findings import log_findings
from runners.metrics import Recorder
from schemas.clocks import wall_clock_us
from schemas.config import load
from schemas.positions import SEQ_END, Position
from schemas.reports import Health, Risk
from transforms.capture.debezium.topic import before
from transforms.capture.mariadb.state import state
from transforms.deliver import store_schema

pytest_plugins = ["tests.fixtures_mariadb"]

MIB = 1 << 20


class Link:
    """A link that nobody serves: its ledger stands in a store, its log at a source."""

    def __init__(self, folder, source: dict, store: str, **more):
        (folder / "key").write_text(base64.b64encode(bytes(range(32))).decode())
        content = {
            "version": 1,
            "sources": {"main": source},
            "stores": {"primary": {"dsn": store}},
            "dead_letter_key": "file:key",
            **more,
        }
        path = folder / "campuses.yaml"
        path.write_text(yaml.safe_dump(content))
        self.config = load(path)
        self.store = psycopg.connect(store, autocommit=True)
        store_schema.ensure(self.store)

    def reach(self, position: Position, us: int) -> None:
        self.store.execute(
            "INSERT INTO sync.progress (link, lane, lsn, seq, captured, delivered, duplicates,"
            " superseded, held, dead, swept, commit_us, watermark_us)"
            " VALUES ('main>primary', 'routine', %s, %s, 0, 0, 0, 0, 0, 0, 0, %s, %s)"
            " ON CONFLICT (link, lane) DO UPDATE SET lsn = excluded.lsn, seq = excluded.seq,"
            " commit_us = excluded.commit_us, watermark_us = excluded.watermark_us",
            (*position, us, us),
        )


def health_of(observer: Observer) -> Health:
    (link,) = observer.view(wall_clock_us()).links
    return link.health


@pytest.fixture
def slot(make_server, database, tmp_path):
    """A slot of a source that keeps 64 MiB of log for it, or an hour unread."""
    settings = {
        "wal_level": "logical",
        "max_slot_wal_keep_size": "64MB",
        "idle_replication_slot_timeout": "1h",
    }
    server = make_server("source", settings=settings)
    dsn = server.create_database("his")
    source = {"kind": "postgresql", "dsn": dsn, "mapping": "postgresql_his"}
    link = Link(tmp_path, source, database, retention={"warn_s": 1800, "critical_s": 60})
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            "SELECT pg_create_logical_replication_slot('campus_sync_main_primary', 'pgoutput')"
        )
        (lsn,) = conn.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()
        link.reach(Position(lsn, SEQ_END), wall_clock_us())
        yield link, conn


def write(conn: psycopg.Connection, mib: int) -> None:
    for _ in range(mib):
        text = f"SELECT pg_logical_emit_message(false, 'fill', repeat('x', {MIB}))"
        conn.execute(text.encode())


def test_a_slot_is_warned_of_at_the_rate_at_which_log_is_written(slot, tmp_path):
    link, conn = slot
    with Observer(link.config) as observer:
        calm = health_of(observer)
        assert 3500 < calm.seconds_left <= 3600  # Only the hour unread limits it.
        assert calm.log_risk is Risk.NONE
        began = time.monotonic()
        write(conn, 8)
        time.sleep(0.5)
        busy = health_of(observer)
        took_s = time.monotonic() - began
    (spare,) = conn.execute("SELECT safe_wal_size FROM pg_replication_slots").fetchone()
    assert busy.seconds_left == pytest.approx(spare / (8 * MIB / took_s), rel=0.5)
    assert busy.log_risk is Risk.CRITICAL
    # `check` has no job to ask: it looks twice.
    assert log_findings(link.config, 0.2) == []  # The hour unread, and nothing is written.
    link.store.execute("INSERT INTO sync.log_rate VALUES ('main', 1e9, now())")
    assert "main>primary" in log_findings(link.config, 0)[0].what


def test_who_looks_once_knows_the_rate_of_the_running_job(slot):
    link, conn = slot
    risk, until_s = Risk.NONE, time.monotonic() + 30
    with Recorder(link.config, port=0, every_s=0.2):
        while risk is not Risk.CRITICAL:
            assert time.monotonic() < until_s
            write(conn, 1)
            time.sleep(0.1)
            with Observer(link.config) as another:
                risk = health_of(another).log_risk
    with Observer(link.config) as another:
        report = another.report(wall_clock_us())
    assert report.health[0].seconds_left < 60


def test_a_slot_whose_log_is_going_has_no_time_left(slot):
    link, conn = slot
    for _ in range(9):
        write(conn, 8)
        conn.execute("SELECT pg_switch_wal()")
    with Observer(link.config) as observer:
        assert (health_of(observer).seconds_left, health_of(observer).log_risk) == (
            0,
            Risk.CRITICAL,
        )


def test_a_binlog_expires_by_age(make_mariadb, database, tmp_path):
    server = make_mariadb("old", settings={"binlog_expire_logs_seconds": "100000"})
    dsn = server.create_database("his")
    source = {"kind": "mariadb", "dsn": dsn, "mapping": "mariadb_his_gbk"}
    link = Link(tmp_path, source, database)
    found = state(dsn)
    link.reach(Position(found.log_end_lsn, SEQ_END), found.now_us)
    with Observer(link.config) as observer:
        assert health_of(observer).seconds_left == pytest.approx(100_000, abs=5)
        with server.connect("his") as conn, conn.cursor() as cursor:
            cursor.execute("CREATE TABLE t(a INT)")
        late = found.now_us - 90_000_000_000
        link.reach(Position(found.oldest_lsn, SEQ_END), late)
        health = health_of(observer)
    assert health.seconds_left == pytest.approx(10_000, abs=10)
    assert health.log_risk is Risk.CRITICAL


@pytest.fixture(scope="module")
def kafka(tmp_path_factory):
    with KafkaServer(tmp_path_factory.mktemp("kafka") / "server") as server:
        yield server


def test_a_topic_expires_by_age_and_by_size(kafka, database, tmp_path):
    """A thousand records of a kilobyte are unread, of a topic that keeps two megabytes."""
    settings = {"retention.ms": "100000000", "retention.bytes": "2000000"}
    kafka.create_topic("changes", settings=settings)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})

    def put(records: int) -> None:
        for _ in range(records):
            producer.produce("changes", b"x" * 1000, partition=0)
        assert producer.flush(30) == 0

    put(1000)
    source = {
        "kind": "debezium",
        "dsn": f"kafka://{kafka.bootstrap}/changes",
        "mapping": "oracle_his",
    }
    link = Link(tmp_path, source, database)
    now_us = wall_clock_us()
    link.reach(before(1000), now_us)
    with Observer(link.config) as observer:
        assert health_of(observer).seconds_left == pytest.approx(100_000, abs=5)
        link.reach(before(0), now_us - 90_000_000_000)
        assert health_of(observer).seconds_left == pytest.approx(10_000, abs=10)
        put(100)
        health = health_of(observer)
    assert 0 < health.seconds_left < 900  # 900 records of room, and the more the faster.
    assert health.log_risk is Risk.CRITICAL
