"""Three unlike campuses, PostgreSQL, GBK MariaDB and an Oracle's events, into one store."""

import argparse
import collections
import contextlib
import json
import threading

import psycopg
import pytest
import yaml

from pipelines.compare import compare
from pipelines.sla_report import Observer
from pipelines.source_clocks import log_end
from runners.cli import main
from runners.codes import codes
from runners.embedded import world
from runners.embedded.connector import Connector
from runners.embedded.process_tree import identify
from runners.embedded.traffic import Traffic
from runners.preflight import Severity, check
from runners.run import prepare_stores
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.positions import Position
from schemas.reports import State
from tests.faults.harness import QUICK, Link, Network, until
from transforms.capture.debezium.event_stream import read_range

WRONG = {
    "main": {
        *("spo2_above_100", "triage_level_9", "value_nan", "time_infinite"),
        "date_year_294000",
    },
    "east": {"spo2_above_100", "triage_level_9"},
    "west": {"spo2_above_100", "triage_level_9"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unlike")
    world.up(directory, durable=False)
    yield directory
    before = [server["pid"] for server in world.status(directory).values()]
    world.down(directory)
    world.down(directory)
    assert all(identify(pid) is None for pid in before)
    assert not any(server["running"] for server in world.status(directory).values())
    world.remove(directory)


@pytest.fixture(scope="module")
def config(place) -> Config:
    """All three campuses into the platform's store, with patience that fits a test."""
    path = place / "campuses.yaml"
    content = yaml.safe_load(path.read_text())
    content["links"] = [f"{campus}>primary" for campus in world.CAMPUSES]
    content["limits"] = QUICK
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    found = load(path)
    prepare_stores(found)
    return found


@pytest.fixture(scope="module")
def preloaded(config) -> Config:
    with Traffic(config, 5) as traffic:
        traffic.preload(15)
    return config


@pytest.fixture
def campus_c(preloaded) -> Config:
    """The same of campus C alone."""
    sources = {"west": preloaded.sources["west"]}
    return preloaded.model_copy(update={"sources": sources, "links_wanted": ("west>primary",)})


def ask(config: Config, query: str) -> list[tuple]:
    with psycopg.connect(config.stores["primary"].dsn) as connection:
        return connection.execute(query).fetchall()


@contextlib.contextmanager
def links(config: Config):
    with contextlib.ExitStack() as stack:
        for number, link in enumerate(config.links()):
            network = Network(number, lost=0.1, repeated=0.1, waiting=3)
            stack.enter_context(Link(config.settings(link), network))
        yield


def drain(config: Config) -> None:
    """Returns when the store has all that is committed at the campuses now."""
    ends = {name: log_end(source).lsn for name, source in config.sources.items()}

    def reached() -> bool:
        rows = ask(config, "SELECT link, lsn, seq FROM sync.progress WHERE lane = 'routine'")
        found = {link.partition(">")[0]: Position(*at) for link, *at in rows}
        there = all(c in found and found[c].acknowledgeable_lsn >= end for c, end in ends.items())
        return there and not ask(
            config,
            "SELECT FROM sync.island UNION ALL SELECT FROM sync.snapshot WHERE state = 'running'",
        )

    until(reached, 60, lambda: f"{ends}: {ask(config, 'SELECT * FROM sync.progress')}")


def at_campus_c(config: Config):
    """A connection as campus C's own programs have it."""
    return psycopg.connect(config.sources["west"].content, user=world.WRITER, autocommit=True)


def connector(config: Config) -> Connector:
    west = config.sources["west"]
    dsn = psycopg.conninfo.make_conninfo(west.content, user=world.WRITER)
    bootstrap, _, topic = west.dsn.removeprefix("kafka://").partition("/")
    return Connector(dsn, bootstrap, topic)


def send(config: Config) -> int:
    with contextlib.closing(connector(config)) as sender:
        return sender.send()


def test_the_world_is_of_three_kinds_and_ready(place, config):
    status = world.status(place)
    assert list(status) == [
        *("source-main", "source-east", "source-west", "topic-west"),
        *("store-primary", "store-main", "store-east", "store-west"),
    ]
    assert all(server["running"] for server in status.values())
    json.dumps(status)
    assert [source.kind for source in config.sources.values()] == [
        *("postgresql", "mariadb", "debezium")
    ]
    assert [f for f in check(config) if f.severity is Severity.ERROR] == []
    assert not [f for f in check(config) if f.place in ("source east", "source west")]
    elsewhere = config.sources["west"].model_copy(update={"content": config.stores["west"].dsn})
    sources = config.sources | {"west": elsewhere}
    unreadable = check(config.model_copy(update={"sources": sources}))
    assert {f.severity for f in unreadable if f.place == "source west"} == {Severity.WARNING}
    before = {name: server["pid"] for name, server in status.items()}
    world.up(place, durable=False)
    assert {name: server["pid"] for name, server in world.status(place).items()} == before


def test_every_entity_of_every_campus_is_equal_by_content(preloaded):
    """Snapshot, stories, uploads, wrong rows, over a network that loses and repeats."""
    config = preloaded
    with links(config), Traffic(config, 5) as traffic:
        summary = traffic.run(450, 3)
        assert min(summary.by_source.values()) >= 450
        for campus, wrong in WRONG.items():
            assert set(traffic.wrong(campus)) == wrong
        traffic.finish()
        drain(config)
        with Observer(config) as observer:
            view = observer.view(wall_clock_us())
        assert {link.health.state for link in view.links} == {State.UP}, view
    comparison = compare(config, show_keys=True)
    assert comparison.equal, [match for match in comparison.tables if not match.equal]
    filled = collections.Counter(match.campus for match in comparison.tables if match.source_rows)
    assert filled == {"main": 12, "east": 12, "west": 13}  # Campus C has reports, too.
    assert {match.campus for match in comparison.tables if match.refused} == set(world.CAMPUSES)
    with Observer(config) as observer:
        report = observer.report(wall_clock_us(), comparison=comparison)
    assert report.law_holds and report.complete and report.sound


def test_parents_that_come_late_voided_rows_and_unknown_codes(campus_c, place, capsys):
    config = campus_c
    times = "'2026-03-01 08:00:00', '2026-03-01 08:00:00'"
    with links(config), at_campus_c(config) as his:
        his.execute(
            "INSERT INTO \"HIS\".\"LAB_RESULT\" VALUES ('T7', 1, 1, 'BIO0000001', '血钾', '6.8',"
            f" 'mmol/L', 'HH', '3.5-5.3', 1, '4', {times})"
        )
        send(config)
        drain(config)
        result = "SELECT patient_id, value::text FROM consult.lab_result WHERE record_id = 'T7|1|1'"
        assert ask(config, result) == [(None, "6.8")]
        his.execute(
            "INSERT INTO \"HIS\".\"LAB_TEST_MASTER\" VALUES ('T7', 'W7', 1, '生化', NULL, 0, NULL,"
            f" {times}, '4', {times[:21]})"
        )
        his.execute(
            'INSERT INTO "HIS"."PAT_MASTER_INDEX" ("PATIENT_ID", "SEX", "STATUS")'
            " VALUES ('W7', '不明', '1'), ('W8', '女', '1')"
        )
        his.execute("UPDATE \"HIS\".\"PAT_MASTER_INDEX\" SET \"STATUS\" = 'D'"
                    " WHERE \"PATIENT_ID\" = 'W8'")  # fmt: skip
        assert send(config) == 4
        drain(config)
    assert ask(config, result) == [("W7", "6.8")]
    patients = "SELECT record_id, sex, deleted FROM consult.patient WHERE record_id IN ('W7', 'W8')"
    assert sorted(ask(config, patients))[0] == ("W7", None, False)
    assert sorted(ask(config, patients))[1][::2] == ("W8", True)
    assert codes(argparse.Namespace(config=place / "campuses.yaml", json=True)) == 1
    unknown = json.loads(capsys.readouterr().out)
    assert [(row["campus"], row["code"]) for row in unknown] == [("west", "不明")]


def test_what_was_committed_is_sent_whatever_died(campus_c, place):
    """A writer dies behind its commit; a sender dies behind Kafka's answer; the broker dies."""
    config = campus_c
    broker = world.servers(place, durable=False)["topic-west"]
    with links(config), at_campus_c(config) as his:
        his.execute('UPDATE "HIS"."DEPT_DICT" SET "DEPT_NAME" = \'内科\'')
        his.execute('DELETE FROM "HIS"."DEPT_DICT" WHERE "DEPT_CODE" = \'0501\'')
        world.up(place, durable=False)  # Sends what waits.
        assert his.execute("SELECT count(*) FROM redo.change").fetchone() == (0,)
        drain(config)
        assert ask(config, DEPARTMENTS) == [("内科", 16)]
        his.execute('UPDATE "HIS"."DEPT_DICT" SET "DEPT_NAME" = \'外科\'')
        dying = connector(config)
        with pytest.raises(_Died), contextlib.closing(dying):
            dying._flush = _die_behind(dying._flush)
            dying.send()
        his.execute("UPDATE \"HIS\".\"DEPT_DICT\" SET \"DEPT_NAME\" = '儿科'"
                    " WHERE \"DEPT_CODE\" = '0210'")  # fmt: skip
        assert send(config) == 17
        drain(config)
        with Traffic(config, 6) as traffic:
            written = []
            thread = threading.Thread(target=lambda: written.append(traffic.run(70, 3)))
            thread.start()
            broker.kill()
            broker.start()
            thread.join()
        assert written and written[0].by_source["west"] >= 200
        drain(config)
    assert ask(config, DEPARTMENTS) == [("儿科", 1), ("外科", 15)]
    comparison = compare(config, show_keys=True)
    assert comparison.equal, [match for match in comparison.tables if not match.equal]
    assert len(offsets(config)) > 17  # The stretch that was sent twice is in the topic.


DEPARTMENTS = (
    "SELECT name, count(*) FROM consult.department WHERE campus = 'west' AND NOT deleted"
    " GROUP BY 1 ORDER BY 1"
)


class _Died(Exception):
    pass


def _die_behind(action):
    def act() -> None:
        action()
        raise _Died

    return act


def offsets(config: Config) -> list[int]:
    """Where the departments' changes are in the topic."""
    bootstrap, _, topic = config.sources["west"].dsn.removeprefix("kafka://").partition("/")
    found = []
    for some in read_range(bootstrap, topic, 0, 1 << 62, None):
        found += [r.offset for r in some if r.value and b'"table":"DEPT_DICT"' in r.value]
    return found


def test_a_difference_at_campus_c_is_found(campus_c):
    """Content that never went through the topic: the proof is of the tables, not of events."""
    config = campus_c
    with links(config):
        send(config)
        drain(config)  # In a process of its own, no other test has been here.
    with at_campus_c(config) as his:
        his.execute('ALTER TABLE "HIS"."STAFF_DICT" DISABLE TRIGGER note')
        change = 'UPDATE "HIS"."STAFF_DICT" SET "NAME" = %s WHERE "EMP_NO" = %s'
        (name,) = his.execute('SELECT "NAME" FROM "HIS"."STAFF_DICT" WHERE "EMP_NO" = \'D1000\''
                              ).fetchone()  # fmt: skip
        his.execute(change, ["另一个", "D1000"])
        found = compare(config, show_keys=True, settle_s=1)
        his.execute(change, [name, "D1000"])
        his.execute('ALTER TABLE "HIS"."STAFF_DICT" ENABLE TRIGGER note')
    (match,) = (m for m in found.tables if not m.equal)
    assert (match.table, match.different, match.keys["different"]) == ("staff", 1, ("D1000",))


AGAIN = {
    "main": ("his.prescription", "prescription"),
    "east": ("his.JYJG", "lab_result"),
    "west": ("HIS.LAB_RESULT", "lab_result"),
}


@pytest.mark.parametrize("campus", AGAIN)
def test_rows_of_every_kind_of_source_are_read_again(preloaded, place, campus, capsys):
    """A fifth lost, a fifth changed, one that no source has; half of them lean on parents."""
    source, table = AGAIN[campus]
    config = preloaded
    with links(config), Traffic(config, 7) as traffic:
        drain(config)
        with psycopg.connect(config.stores["primary"].dsn, user="postgres") as store:
            store.execute("SET session_replication_role = replica")
            mine = f"FROM consult.{table} WHERE campus = '{campus}' AND src_table = '{source}'"
            fifth = "abs(hashtext(record_id)) % 5"
            lost = store.execute(f"DELETE {mine} AND {fifth} = 0").rowcount
            changed = store.execute(
                f"UPDATE consult.{table} SET patient_id = NULL WHERE ctid IN"
                f" (SELECT ctid {mine} AND NOT deleted AND {fifth} = 1)"
            ).rowcount
            store.execute(f"CREATE TEMP TABLE ghost AS SELECT * {mine} AND NOT deleted LIMIT 1")
            store.execute("UPDATE ghost SET record_id = '9' || record_id")
            store.execute(f"INSERT INTO consult.{table} SELECT * FROM ghost")
        assert lost and changed
        working = threading.Thread(target=lambda: traffic.run(100, 3))
        working.start()
        command = ["reread", campus, "--config", str(place / "campuses.yaml"), "--table", source]
        code = main([*command, "--json"])
        working.join()
        told = json.loads(capsys.readouterr().out)
        assert told["deleted"] == 1 and told["delivered"] >= changed and not told["untold"], told
        assert code == (1 if told["refused"] else 0)
        traffic.finish()
        send(config)
        drain(config)
    comparison = compare(config, show_keys=True)
    assert comparison.equal, [match for match in comparison.tables if not match.equal]
