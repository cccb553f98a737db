"""Compare, report and their store on real PostgreSQL: proof by content, and what it must find."""

import argparse
import base64
import dataclasses
import json
import pathlib
import socket
import time
import urllib.request

import apache_beam as beam
import numpy as np
import psycopg
import pytest
from apache_beam.testing.test_pipeline import TestPipeline as BeamTestPipeline
from prometheus_client import generate_latest

from pipelines.compare import compare
from pipelines.emergency_pairs import PairWatch
from pipelines.sla_report import Observer, gather
from runners.metrics import Recorder
from runners.status import status
from schemas.batches import Lane
from schemas.config import Config, Link, load
from schemas.mappings import load_mapping
from schemas.positions import START, Position
from schemas.receipts import Counts, Receipt
from schemas.reports import ONE_SIDED, Fill, Health, State, comparison_to_json, to_csv, to_json
from schemas.wire import seal
from transforms.capture.interpret import Interpreter
from transforms.capture.postgresql import slots
from transforms.capture.postgresql.snapshot import snapshot
from transforms.capture.prepare import Preparer
from transforms.deliver import ledger, sla_store
from transforms.deliver.store import Store
from transforms.measure_lag import LagWindow, measure
from transforms.seal_dead_letters import Sealer

NOW_US = 1_790_000_000_000_000
SQL = pathlib.Path(__file__).parents[2] / "runners" / "embedded" / "hospital.sql"
PATIENTS = """\
INSERT INTO his.patient (pid, mrn, name, sex_code, birth_date, phone, abo, updated_at)
SELECT i, 'M' || i, '张' || i, (i %% 2 + 1)::text, date '1950-01-01' + i, '154' || i, 'A',
    timestamptz '2026-01-01 08:00+08' + i * interval '1 second'
FROM generate_series(1, %s) i"""
VITALS = """\
INSERT INTO his.vital_sign (vital_id, mrn, visit_no, temp_c, pulse, sbp, measured_at)
SELECT i, 'M' || i, 'V' || i, 36.5, 70 + i %% 20, 120, timestamptz '2026-01-01 08:00+08'
FROM generate_series(1, %s) i"""


class Campus:
    """One source and two stores; links are carried by snapshots, without a runner."""

    def __init__(self, folder: pathlib.Path, source: str, primary: str, local: str):
        (folder / "key").write_text(base64.b64encode(bytes(range(32))).decode())
        (folder / "key").chmod(0o600)
        path = folder / "campuses.yaml"
        path.write_text(
            f"""
version: 1
sources:
  main: {{kind: postgresql, dsn: "{source}", mapping: postgresql_his}}
stores:
  primary: {{dsn: "{primary}"}}
  main: {{dsn: "{local}"}}
dead_letter_key: file:key
objectives: {{emergency_p99_ms: 100}}
"""
        )
        self.config: Config = load(path)
        self.source = psycopg.connect(source, autocommit=True)
        self.source.execute(SQL.read_text())
        self.source.execute(PATIENTS, (200,))
        self.source.execute(VITALS, (50,))
        self.stores = {}
        for name, dsn in (("primary", primary), ("main", local)):
            self.stores[name] = ledger.connect(dsn)

    def close(self) -> None:
        for slot in self.source.execute("SELECT slot_name FROM pg_replication_slots").fetchall():
            self.source.execute("SELECT pg_drop_replication_slot(%s)", slot)
        for conn in (self.source, *self.stores.values()):
            conn.close()

    def log_end(self) -> int:
        (lsn,) = self.source.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
        return int(lsn)

    def carry(self, link: Link, reason: str = "first") -> list[Receipt]:
        """Reads the source whole and applies it to the link's store."""
        settings = self.config.settings(link)
        conn = self.stores[link.store]
        state = ledger.escalations(conn, link.source)
        mapping = load_mapping(settings.mapping)
        interpreter = Interpreter(settings, mapping, state)
        preparer = Preparer(settings)
        sealer = Sealer(settings.key_ref)
        store = Store(settings.store_dsn, link.name, link.source, sealer, lambda: NOW_US)
        begin = ledger.read(conn, link.name).routine or START
        slots.drop(settings.source_dsn, link.slot)
        receipts = []
        with slots.create(settings.source_dsn, link.slot) as created:
            ledger.begin_snapshot(conn, link.name, created.lsn, reason)
            for raw in snapshot(
                settings.source_dsn,
                created,
                tuple(mapping.tables),
                batch_rows=1000,
                batch_bytes=1 << 20,
            ):
                stretch = interpreter.interpret(raw, begin)
                batch = seal(preparer.finish(preparer.routine(stretch, NOW_US)))
                receipts.append(store.apply([batch], Lane.ROUTINE))
                begin = raw.end
        store.close()
        return receipts

    def carry_all(self) -> None:
        for link in self.config.links():
            self.carry(link)


@pytest.fixture
def campus(tmp_path, postgres_server, request):
    name = request.node.name.partition("[")[0][:40]
    dsns = [postgres_server.create_database(f"{name}_{end}") for end in ("s", "p", "l")]
    made = Campus(tmp_path, *dsns)
    made.carry_all()
    yield made
    made.close()


def of(comparison, store: str, table: str):
    return next(m for m in comparison.tables if (m.store, m.table) == (store, table))


def test_equal_everywhere(campus):
    comparison = compare(campus.config)
    assert comparison.equal, comparison_to_json(comparison)
    assert comparison.rows == 3 * 250
    patient = of(comparison, "primary", "patient")
    assert (patient.source_rows, patient.store_rows) == (200, 200)
    assert patient.source_digest == patient.store_digest != "00" * 32
    fed = {
        part.table for part in load_mapping(campus.config.sources["main"].mapping).tables.values()
    }
    assert len(comparison.tables) == 2 * len(fed)
    assert all(match.equal for match in comparison.stores)


def test_every_kind_of_difference_is_found_counted_and_named(campus):
    primary = campus.stores["primary"]
    primary.execute("DELETE FROM consult.patient WHERE record_id IN ('7', '8')")
    primary.execute("UPDATE consult.patient SET name = 'x' WHERE record_id = '9'")
    primary.execute(
        "CREATE TEMP TABLE t AS SELECT * FROM consult.patient WHERE record_id = '10';"
        "UPDATE t SET record_id = 'ghost'; INSERT INTO consult.patient SELECT * FROM t"
    )
    plain = compare(campus.config, settle_s=0)
    match = of(plain, "primary", "patient")
    # A row whose content or id was changed in place no longer has its stored digest.
    assert (match.missing, match.extra, match.different, match.rotten) == (2, 1, 1, 2)
    assert not plain.equal
    assert match.keys == {}
    assert of(plain, "main", "patient").equal
    assert "ghost" not in comparison_to_json(plain)
    assert [m.live_equal for m in plain.stores if m.table == "patient"] == [False]

    named = of(compare(campus.config, show_keys=True, settle_s=0), "primary", "patient")
    assert set(named.keys["missing"]) == {"7", "8"}
    assert named.keys["extra"] == ("ghost",)
    assert named.keys["different"] == ("9",)
    assert set(named.keys["rotten"]) == {"9", "ghost"}


def test_a_stored_digest_that_rotted_is_found_though_the_content_is_right(campus):
    campus.stores["main"].execute(
        "UPDATE consult.patient SET digest = set_byte(digest, 31, get_byte(digest, 31) # 1)"
        " WHERE record_id = '5'"
    )
    match = of(compare(campus.config, settle_s=0), "main", "patient")
    assert (match.rotten, match.missing, match.extra, match.different) == (1, 0, 0, 0)
    assert not match.equal


def test_rows_refused_by_mapping_and_by_store_are_accounted_for(campus):
    """A pulse that no person has: the store's CHECK refuses it, the source keeps it."""
    campus.source.execute("UPDATE his.vital_sign SET pulse = 100000 WHERE vital_id = 3")
    for link in campus.config.links():
        campus.carry(link, "slot_missing")
    open_letters = campus.stores["primary"].execute(
        "SELECT count(*) FROM sync.dead_letter WHERE state = 'open'"
    )
    assert open_letters.fetchone()[0] == 1
    comparison = compare(campus.config, settle_s=0)
    match = of(comparison, "primary", "vital_sign")
    assert (match.refused, match.missing, match.different) == (1, 0, 0)
    assert comparison.equal, comparison_to_json(comparison)


def test_without_the_key_a_refused_row_is_a_difference(campus, tmp_path):
    campus.source.execute("UPDATE his.vital_sign SET pulse = 100000 WHERE vital_id = 3")
    campus.carry(campus.config.links()[0], "slot_missing")
    (tmp_path / "key").unlink()
    match = of(compare(campus.config, settle_s=0), "primary", "vital_sign")
    assert match.refused == 0
    assert not match.equal


def test_rows_of_a_held_truncate_are_accounted_for(campus):
    campus.source.execute("TRUNCATE his.vital_sign")
    primary = campus.stores["primary"]
    primary.execute(
        "INSERT INTO sync.hold (id, link, kind, src_table, lsn, seq)"
        " VALUES ('h', 'main>primary', 'truncate', 'his.vital_sign', %s, 1)",
        (campus.log_end(),),
    )
    match = of(compare(campus.config, settle_s=0), "primary", "vital_sign")
    assert (match.held, match.extra) == (50, 0)
    assert of(compare(campus.config, settle_s=0), "main", "vital_sign").extra == 50


def test_tombstones_must_agree_since_all_stores_follow_the_log(campus):
    """A deletion that one store missed shows even where no row is live."""
    lsn = campus.log_end()
    for conn in campus.stores.values():
        conn.execute("UPDATE sync.progress SET lsn = %s", (lsn + 1000,))
    campus.source.execute("DELETE FROM his.patient WHERE pid = 1")
    campus.stores["primary"].execute(
        "UPDATE consult.patient SET deleted = true, src_lsn = %s WHERE record_id = '1'",
        (lsn + 500,),
    )
    campus.stores["main"].execute("DELETE FROM consult.patient WHERE record_id = '1'")
    comparison = compare(campus.config, settle_s=0)
    pair = next(m for m in comparison.stores if m.table == "patient")
    assert pair.live_equal
    assert (pair.tombstones, pair.other_tombstones, pair.tombstones_equal) == (1, 0, False)
    assert not comparison.equal


def test_changes_under_way_are_not_differences(campus):
    """The store has a row that the source's reading did not: it came later."""
    links = campus.config.links()
    campus.source.execute("UPDATE his.patient SET name = '新' WHERE pid = 4")
    behind = of(compare(campus.config, settle_s=0.2), "primary", "patient")
    assert (behind.different, behind.moving) == (1, 0)
    for link in links:
        campus.carry(link, "slot_missing")
    assert compare(campus.config).equal


def test_an_end_that_is_down_is_named_and_nothing_is_called_equal(campus):
    stores = dict(campus.config.stores)
    gone = stores["main"].dsn.replace("dbname=", "dbname=no_").rsplit("/", 1)
    stores["main"] = stores["main"].model_copy(update={"dsn": gone[0] + "/nowhere"})
    config = campus.config.model_copy(update={"stores": stores})
    comparison = compare(config, settle_s=0)
    assert not comparison.equal
    assert [end.split(":")[0] for end in comparison.unreachable] == ["store main"]
    assert of(comparison, "primary", "patient").equal
    report = gather(config, NOW_US)
    assert report.unreachable == ("store main",)
    assert not report.sound
    assert {h.link: h.state for h in report.health}["main>main"] is State.DOWN


def window(rows: int, start_us: int, lag_ms: float, lane=Lane.EMERGENCY) -> LagWindow:
    receipt = Receipt(
        "main>primary",
        lane,
        Position(1, 1),
        True,
        Counts(rows, rows),
        start_us,
        start_us - 7,
        np.array([start_us - round(lag_ms * 1000)]),
        np.array([rows]),
        late=rows // 10,
    )
    measured = measure(receipt)
    return LagWindow(
        "main>primary", lane, start_us, rows, measured.late, measured.sketch, measured.counts, 1
    )


def test_windows_that_come_again_change_nothing_and_starts_add_up(campus):
    primary = campus.stores["primary"]
    sla_store.ensure(primary)
    start = NOW_US // 10_000_000 * 10_000_000
    early, whole = window(10, start, 20), window(30, start, 40)
    for panes in ([early], [whole], [whole], [early], [whole, early]):
        sla_store.put_windows(primary, panes, "first")
    report = gather(campus.config, NOW_US)
    lag = {(part.link, part.lane): part for part in report.lag}
    assert lag["main>primary", "emergency"].rows == 30
    assert lag["main>primary", "emergency"].p99_ms == pytest.approx(40, rel=0.01)
    assert lag["main>primary", "emergency"].late == 3
    sla_store.put_windows(primary, [early], "second")
    assert sum(part.rows for part in gather(campus.config, NOW_US).points) == 40
    assert sla_store.prune(primary, start + 93 * 86_400_000_000) == 4
    assert gather(campus.config, NOW_US).points == ()


def test_report_of_a_sound_campus(campus):
    primary = campus.stores["primary"]
    sla_store.ensure(primary)
    start = NOW_US // 10_000_000 * 10_000_000
    panes = [window(100, start, 30), window(100, start + 10_000_000, 150)]
    sla_store.put_windows(primary, [*panes, window(5, start, 900, Lane.ROUTINE)], "first")
    report = gather(campus.config, NOW_US, comparison=compare(campus.config))
    assert report.law_holds
    assert report.complete
    assert report.stores_equal
    assert report.sound
    assert report.total == Counts(500, 500)
    assert {part.fill for part in report.completeness} == {Fill.EQUAL}
    assert [snap.state for snap in report.snapshots] == ["done", "done"]
    breach = next(m for m in report.breaches)
    assert (breach.objective, breach.windows, breach.windows_over) == ("emergency_p99_ms", 2, 1)
    assert breach.share_within == pytest.approx(0.5)
    assert all(h.state is State.DOWN and "slot" in h.why for h in report.health)
    assert json.loads(to_json(report))["verdict"]["sound"] is True
    assert "conservation.csv" in to_csv(report)


def test_a_short_window_an_island_and_an_unbalanced_ledger_are_told(campus):
    primary = campus.stores["primary"]
    primary.execute(
        "UPDATE sync.manifest SET store_count = store_count - 1 WHERE table_name = 'patient'"
    )
    report = gather(campus.config, NOW_US)
    assert not report.complete
    short = [part for part in report.completeness if part.fill is Fill.SHORT]
    assert [(part.link, part.table) for part in short] == [("main>primary", "patient")]
    assert report.gaps[0].source_changes == report.gaps[0].store_changes + 1

    primary.execute("ALTER TABLE sync.progress DROP CONSTRAINT progress_law")
    primary.execute("UPDATE sync.progress SET delivered = delivered - 1")
    assert not gather(campus.config, NOW_US).law_holds


def test_a_one_sided_emergency_becomes_an_incident_and_closes(campus):
    primary = campus.stores["primary"]
    sla_store.ensure(primary)
    put = (
        "INSERT INTO sync.progress (link, lane, lsn, seq, captured, delivered, duplicates,"
        " superseded, held, dead, swept, commit_us, watermark_us)"
        " SELECT link, 'emergency', %s, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM sync.progress"
    )
    newest = campus.log_end() + 10
    primary.execute(put, (newest,))
    watch = PairWatch(campus.config.objectives.pair_s)
    with Observer(campus.config) as observer:
        (pair,) = observer.view(NOW_US).pairs
        assert (pair.together, pair.waiting) == (False, "main>main")
        assert not watch.late(pair, NOW_US)
        # A newer emergency does not put the incident off.
        primary.execute("UPDATE sync.progress SET lsn = lsn + 10 WHERE lane = 'emergency'")
        (pair,) = observer.view(NOW_US).pairs
        assert watch.late(pair, NOW_US + 11_000_000)
        assert sla_store.set_incident(primary, pair.waiting, ONE_SIDED, "waits")
        assert not sla_store.set_incident(primary, pair.waiting, ONE_SIDED, "waits")
        (pair,) = observer.view(NOW_US).pairs
        assert pair.open_incidents == 1
        # The routine lane is complete: what it has passed has arrived.
        campus.stores["main"].execute("UPDATE sync.progress SET lsn = %s", (newest + 10,))
        (pair,) = observer.view(NOW_US).pairs
        assert pair.together
        assert not watch.late(pair, NOW_US + 12_000_000)
    assert sla_store.close_incident(primary, "main>main", ONE_SIDED)
    (measured,) = [m for m in gather(campus.config, NOW_US).objectives if m.objective == "pair_s"]
    assert not measured.met


def test_health_samples_make_the_backlog(campus):
    primary = campus.stores["primary"]
    sla_store.ensure(primary)
    health = Health("main>primary", State.UP, "", 10, 20, 30, "reserved", True)
    for second in range(3):
        samples = [dataclasses.replace(health, backlog_bytes=second)]
        sla_store.put_health(primary, NOW_US + second * 1_000_000, samples)
    report = gather(campus.config, NOW_US)
    assert [point.backlog_bytes for point in report.backlog] == [0, 1, 2]


def test_panes_reach_the_primary_and_wait_while_it_is_down(campus, postgres_server):
    """As a worker runs it: bundles of panes, a primary that refuses, then takes them all."""
    now = [NOW_US]
    dsn = campus.config.stores["primary"].dsn
    fn = sla_store._WriteFn(dsn, "first", lambda: now[0])
    start = NOW_US // 10_000_000 * 10_000_000

    def bundle(*panes):
        for pane in panes:
            fn.process(pane)
        fn.finish_bundle()

    def rows() -> int:
        return sum(point.rows for point in gather(campus.config, NOW_US).points)

    bundle(window(3, start, 10), window(2, start, 10))
    assert rows() == 3
    primary = campus.stores["primary"]
    primary.execute("ALTER TABLE sync.lag RENAME TO lag_away")
    fn.teardown()
    fn._conn = None
    bundle(window(5, start, 10))
    primary.execute("ALTER TABLE sync.lag_away RENAME TO lag")
    bundle(window(7, start + 10_000_000, 10))
    assert rows() == 3, "it is not asked again before some seconds have gone by"
    now[0] += 6_000_000
    bundle()
    assert rows() == 12
    fn.teardown()


def test_the_pipeline_writes_what_it_measured(campus):
    start = NOW_US // 10_000_000 * 10_000_000
    dsn = campus.config.stores["primary"].dsn
    with BeamTestPipeline("BundleBasedDirectRunner") as root:
        panes = root | beam.Create([window(4, start, 20), window(9, start, 20)])
        panes | sla_store.WriteLag(dsn, "first", lambda: NOW_US)
    (lag,) = gather(campus.config, NOW_US).lag
    assert lag.rows == 9


def test_the_recorder_exports_samples_and_opens_incidents(campus):
    """Looks thrice: one-sided, one-sided for too long, together again."""
    now = [NOW_US]
    newest = campus.log_end() + 10
    campus.stores["primary"].execute(
        "INSERT INTO sync.progress (link, lane, lsn, seq, captured, delivered, duplicates,"
        " superseded, held, dead, swept, commit_us, watermark_us)"
        " VALUES ('main>primary', 'emergency', %s, 1, 4, 4, 0, 0, 0, 0, 0, 0, 0)",
        (newest,),
    )
    incidents = "SELECT link, kind, state FROM sync.incident"
    recorder = Recorder(campus.config, now_us=lambda: now[0])
    with Observer(campus.config) as observer:
        recorder.record(observer)
        assert campus.stores["primary"].execute(incidents).fetchall() == []
        now[0] += 11_000_000
        recorder.record(observer)
        recorder.record(observer)
        opened = [("main>main", ONE_SIDED, "open")]
        assert campus.stores["primary"].execute(incidents).fetchall() == opened
        assert campus.stores["main"].execute(incidents).fetchall() == []
        campus.stores["main"].execute("UPDATE sync.progress SET lsn = %s", (newest,))
        now[0] += 1_000_000
        recorder.record(observer)
    closed = [("main>main", ONE_SIDED, "closed")]
    assert campus.stores["primary"].execute(incidents).fetchall() == closed
    assert len(gather(campus.config, now[0]).backlog) == 6
    text = generate_latest(recorder.registry).decode()
    assert 'outcome="captured"} 250.0' in text


def test_the_endpoint_answers_while_it_is_open(campus):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Recorder(campus.config, port=port, every_s=0.05):
        deadline = time.monotonic() + 20
        text = ""
        while "campus_sync_link_state" not in text and time.monotonic() < deadline:
            time.sleep(0.05)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                text = answer.read().decode()
    assert 'campus_sync_open_dead_letters{link="main>main"} 0.0' in text


def test_status_once_is_json_that_says_every_link(campus, capsys, tmp_path):
    options = argparse.Namespace(config=tmp_path / "campuses.yaml", once=True, json=True)
    assert status(options) == 1  # Nobody reads the slots.
    shown = json.loads(capsys.readouterr().out)
    assert [link["health"]["link"] for link in shown["links"]] == ["main>primary", "main>main"]
    assert shown["links"][0]["ledgers"]["routine"]["counts"]["captured"] == 250
    options.json = False
    assert status(options) == 1
    assert "campus-sync run" in capsys.readouterr().out
