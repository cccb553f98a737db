"""Traffic on a real database: what the seed decides, what the log shows, what survives."""

import collections
import datetime
import itertools
import pathlib
import re
import threading
import time
import types

import psycopg
import pytest

import runners.embedded
from runners.embedded.campus_source import TrafficError
from runners.embedded.changes import KEYS, OTHER_KEYS
from runners.embedded.postgresql_campus import PostgresqlCampus
from runners.embedded.traffic import Traffic
from schemas.clocks import wall_clock_us

DDL = pathlib.Path(runners.embedded.__file__).parent / "hospital.sql"
NOON = int(datetime.datetime(2026, 11, 23, 4, tzinfo=datetime.UTC).timestamp()) * 1_000_000


@pytest.fixture
def hospital(database) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(DDL.read_text(encoding="utf-8"))
        connection.execute("ALTER TABLE lis.result REPLICA IDENTITY FULL")
    return database


@pytest.fixture
def another_hospital(hospital, postgres_server) -> str:
    """A second, empty one."""
    name = psycopg.conninfo.conninfo_to_dict(hospital)["dbname"] + "_too"
    dsn = postgres_server.create_database(name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(DDL.read_text(encoding="utf-8"))
    return dsn


def traffic(dsn: str, seed: int = 1, **arguments) -> Traffic:
    source = types.SimpleNamespace(kind="postgresql", dsn=dsn, mapping="postgresql_his_us_units")
    config = types.SimpleNamespace(sources={"west": source})
    return Traffic(config, seed, writer="postgres", **arguments)


def content(dsn: str) -> dict[str, tuple]:
    with psycopg.connect(dsn) as connection:
        return {
            table: connection.execute(
                f"SELECT count(*), md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {table} t"
            ).fetchone()
            for table in KEYS
        }


def log_of(dsn: str, slot: str) -> list[str]:
    """Returns the row changes since the slot was made, as `test_decoding` shows them."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows = connection.execute(
            "SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL)", [slot]
        ).fetchall()
        connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    return [data for (data,) in rows if data.startswith("table ")]


def open_slot(dsn: str) -> str:
    slot = "seen_" + psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    return slot


def test_same_seed_same_database(hospital, another_hospital):
    for dsn in (hospital, another_hospital):
        clock = itertools.count(NOON, 1000)
        with traffic(dsn, clock=lambda clock=clock: next(clock)) as writer:
            writer.preload(5)
            writer.run(rate=20_000, seconds=0.1)
            writer.backlog("west", 500, 100)
            writer.finish()
    assert content(hospital) == content(another_hospital)
    with traffic(another_hospital) as again:  # Goes on behind what is there: no key twice.
        again.run(rate=1000, seconds=0.3)
    assert content(hospital) != content(another_hospital)


def test_log_shows_what_was_counted(hospital):
    slot = open_slot(hospital)
    with traffic(hospital, seed=3) as writer:
        told = []
        summary = writer.run(6000, 1, emergency_share=0.3, progress=told.append)
        rows = summary.rows + sum(writer.finish().values())
    assert len(log_of(hospital, slot)) == rows
    assert told == sorted(told) and told[-1] == summary.rows
    assert 6000 <= summary.rows < 8500


def test_stories_do_all_that_databases_do(hospital):
    slot = open_slot(hospital)
    source = PostgresqlCampus("west", hospital, "postgresql_his", 3, wall_clock_us, "postgres")
    rows = sum(source.story_step(emergency_share=0.2) for _ in range(3000))
    rows += source.finish_stories()
    source.close()
    log = log_of(hospital, slot)
    assert len(log) == rows == source.rows
    assert source.rolled_back > 0

    operations = collections.Counter(re.findall(r"^table (\S+): (\w+)", "\n".join(log), re.M))
    assert {table for table, _ in operations} == set(KEYS)
    assert operations["his.medical_order", "DELETE"] > 0
    assert any("UPDATE: old-key: order_id" in line for line in log)
    assert any("content[text]:unchanged-toast-datum" in line for line in log)
    assert any("val_num[numeric]:null" in line for line in log)

    # The share is of rows: an emergency's are all those of its patient.
    urgent = set(re.findall(r"INSERT: .*mrn\[[^]]*\]:'(W\d+)' .*'急诊'", "\n".join(log)))
    of_patient = [re.search(r"mrn\[[^]]*\]:'(W\d+)'", line) for line in log]
    known = [found[1] in urgent for found in of_patient if found]
    assert 0.12 < sum(known) / len(known) < 0.28


def test_history_has_a_morning_peak_and_only_finished_visits(hospital):
    with traffic(hospital, clock=lambda: NOON) as writer:
        told = []
        rows = writer.preload(60, progress=told.append)
    with psycopg.connect(hospital) as connection:
        total = sum(
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in (*KEYS, *OTHER_KEYS)
        )
        (morning,) = connection.execute(
            "SELECT avg((extract(hour FROM started_at AT TIME ZONE 'Asia/Shanghai')"
            " BETWEEN 6 AND 10)::int) FROM his.visit WHERE status <> 'open'"
        ).fetchone()
        (future,) = connection.execute(
            "SELECT count(*) FROM lis.result WHERE result_at > %s",
            [datetime.datetime.fromtimestamp(NOON / 1e6, datetime.UTC)],
        ).fetchone()
        (dangling,) = connection.execute(
            "SELECT count(*) FROM lis.result r LEFT JOIN his.visit v USING (visit_no, mrn)"
            " WHERE v.visit_no IS NULL"
        ).fetchone()
    assert rows == {"west": total}
    assert 0 < told[-1] <= total
    assert morning > 0.4
    assert (future, dangling) == (0, 0)


def test_wrong_rows_are_accepted_by_the_source(hospital):
    slot = open_slot(hospital)
    with traffic(hospital) as writer:
        wrong = writer.wrong("west")
    log = "\n".join(log_of(hospital, slot))
    assert sum(wrong.values()) == len(wrong) == 5
    for sign in ("spo2[integer]:250", "triage_level[smallint]:9", "NaN", "infinity", "294000-01"):
        assert log.count(sign) == 1, sign


def test_bulk_transaction_is_one(hospital):
    with traffic(hospital) as writer:
        writer.bulk_transaction("west", 25_000)
        writer.backlog("west", 1000, 250)
    with psycopg.connect(hospital) as connection:
        sizes = connection.execute(
            "SELECT count(*) FROM lis.result GROUP BY xmin::text ORDER BY 1 DESC"
        ).fetchall()
    assert sizes == [(25_000,), (250,), (250,), (250,), (250,)]


def test_broken_connections_lose_and_repeat_nothing(hospital):
    slot = open_slot(hospital)
    with traffic(hospital, seed=5) as writer, psycopg.connect(hospital, autocommit=True) as killer:
        stop, kills = threading.Event(), 0
        summary = []
        thread = threading.Thread(target=lambda: summary.append(writer.run(300, 4)))
        thread.start()
        while not stop.wait(0.2) and thread.is_alive():
            kills += killer.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = 'campus-sync-traffic'"
                " AND datname = current_database()"
            ).fetchone()[0]
        thread.join()
    log = log_of(hospital, slot)
    inserts = [line for line in log if ": INSERT:" in line]
    assert kills > 3
    assert len(set(inserts)) == len(inserts)
    # An update whose answer was lost is done again: the same row, once more.
    assert summary[0].rows <= len(log) <= summary[0].rows + 300


def test_stop_and_shapes(hospital):
    with traffic(hospital) as writer:
        with pytest.raises(ValueError, match="neither"):
            writer.run(100, 1, shape="round")
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        assert writer.run(50, 60, stop=stop).rows < 500
        assert time.monotonic() - began < 20
        assert writer.run(400, 0.5, shape="day").rows >= 200


def test_database_that_is_no_hospital_is_named_with_the_remedy(database):
    with traffic(database) as writer, pytest.raises(TrafficError, match=r"west.*Remedy"):
        writer.run(10, 1)
