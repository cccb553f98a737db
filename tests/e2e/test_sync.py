"""A link from source to store without an engine: everything arrives, in spite of the network."""

import contextlib
import itertools
import json
import pathlib
import random
import subprocess
import sys
import threading
import time

import psycopg
import pytest

from runners.embedded.postgres import PostgresServer
from runners.embedded.traffic import Traffic
from schemas.batches import Lane
from schemas.positions import SEQ_END
from tests.faults.harness import (
    CAMPUS,
    SOURCE_SETTINGS,
    Link,
    Network,
    Site,
    drop_slots,
    seed_of_this_run,
    until,
)
from tests.faults.history import History
from transforms.capture.postgresql import slots

ROOT = pathlib.Path(__file__).parents[2]
LONG_TEXT_BYTES = 20_000  # Stored out of line: unchanged, it is not in the log.
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    place = tmp_path_factory.mktemp("sync")
    with contextlib.ExitStack() as stack:
        made = [
            PostgresServer(place / name, settings=SOURCE_SETTINGS, durable=False)
            for name in ("source", "store")
        ]
        yield [stack.enter_context(server) for server in made]


@pytest.fixture
def site(servers, tmp_path):
    source, store = servers
    made = Site(tmp_path, source, {"primary": store}, f"_{next(_NUMBERS)}")
    yield made
    with made.administrator() as connection:
        drop_slots(connection)


class Witness:
    """Counts a source's changes by a slot of its own: PostgreSQL's word, not the reader's."""

    def __init__(self, site: Site):
        self._connection = site.administrator()
        self._slot = f"witness{site.name}"
        make = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
        self._connection.execute(make, [self._slot])

    def count(self) -> int:
        """Returns row changes since the last time; a changed key is two, a truncated table one."""
        query = (
            "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL,"
            " 'proto_version', '1', 'publication_names', 'campus_sync')"
        )
        found = 0
        for (message,) in self._connection.execute(query, [self._slot]).fetchall():
            kind = message[:1]
            found += kind in b"IUD"
            # Old keys are sent where they changed; under FULL these tests change none.
            found += kind == b"U" and message[5:6] == b"K"
            found += int.from_bytes(message[1:5]) if kind == b"T" else 0
        return found

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def witness(site):
    made = Witness(site)
    yield made
    made.close()


def stored(site: Site, table: str, columns: str, where: str = "true") -> list[tuple]:
    with site.store() as connection:
        query = f"SELECT {columns} FROM consult.{table} WHERE {where} ORDER BY record_id"
        return connection.execute(query).fetchall()


def snapshotted(site: Site) -> None:
    until(lambda: site.snapshots()[-1:] and site.snapshots()[-1][1] == "done", 60, "a snapshot")


NETWORKS = {
    "sound": Network(),
    "bad": Network(lost=0.4, repeated=0.4, waiting=20),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_traffic_arrives_whole_over_any_network(site, witness, network):
    seed = seed_of_this_run()
    bad = NETWORKS[network]
    with Traffic(site.config, seed) as traffic:
        before = traffic.preload(40)[CAMPUS]
        assert witness.count() == before
        with Link(site.settings(), Network(seed, bad.lost, bad.repeated, bad.waiting)) as link:
            until(lambda: site.progress(), 60, "a first delivery")
            history = History(site.hospital, {"primary": site.store}, seed)
            history.start()
            with contextlib.closing(history):
                traffic.run(rate=400, seconds=3, emergency_share=0.2)
                wrong = traffic.wrong(CAMPUS)
                history.finish_writing()
                site.drain()
                assert history.finish() == []
            assert link.sent[Lane.EMERGENCY] and link.sent[Lane.ROUTINE]
    assert site.captured() == before + witness.count()
    site.prove()
    with site.store() as store:
        letters = store.execute("SELECT count(DISTINCT (lsn, seq)) FROM sync.dead_letter")
        assert letters.fetchone() == (len(wrong),)
    assert site.snapshots() == [("first", "done")]


def test_restarts_lose_nothing(site, witness):
    """Readers end again and again, in the snapshot too, and what was under way is gone."""
    seed = seed_of_this_run()
    chance = random.Random(seed)
    stop = threading.Event()
    with Traffic(site.config, seed) as traffic:
        traffic.preload(60)
        writer = threading.Thread(
            target=traffic.run, kwargs={"rate": 300, "seconds": 60, "stop": stop}
        )
        writer.start()
        for number in range(8):
            with Link(site.settings(), Network(seed + number, 0.2, 0.2, 5)):
                time.sleep(chance.uniform(0.1, 2.0))
        stop.set()
        writer.join()
    with Link(site.settings()):
        site.drain()
    site.prove()
    reasons = [reason for reason, _ in site.snapshots()]
    assert set(reasons) <= {"first", "interrupted"}


CRITICAL = (
    "INSERT INTO lis.result (result_id, mrn, loinc, item_name, val_num, unit, status, result_at,"
    " updated_at) VALUES (gen_random_uuid(), %s, '2823-3', '钾', 7.9, 'mmol/L', 'final', now(),"
    " now())"
)
CALM = CRITICAL.replace("7.9", "4.1")


def test_emergencies_overtake_and_bring_what_waits_until_signed_off(site):
    with Link(site.settings()) as link, site.hospital() as hospital:
        snapshotted(site)
        hospital.execute(CALM, ["M0"])
        site.drain()
        link.hold(Lane.ROUTINE)
        reached = site.progress()
        # A backlog that fills the credit, and in it one calm result of the patient to be.
        hospital.execute(CALM, ["M1"])
        hospital.execute(
            CALM.replace(
                "VALUES (gen_random_uuid(), %s,", "SELECT gen_random_uuid(), 'B' || g,"
            ).removesuffix(")")
            + " FROM generate_series(1, 20000) g"
        )
        began = time.monotonic()
        hospital.execute(CRITICAL, ["M1"])
        until(lambda: len(stored(site, "lab_result", "1", "patient_id = 'M1'")) == 2, 20, "both")
        print(f"emergency behind 20,000 rows: {time.monotonic() - began:.2f} s")
        # Whatever follows of this patient comes too; of others nothing does.
        hospital.execute(CALM, ["M1"])
        hospital.execute(CALM, ["M2"])
        until(lambda: len(stored(site, "lab_result", "1", "patient_id = 'M1'")) == 3, 20, "more")
        assert stored(site, "lab_result", "lane", "patient_id = 'M1'") == [("E",)] * 3
        assert stored(site, "lab_result", "1", "patient_id = 'M2' OR patient_id LIKE 'B%%'") == []
        assert site.progress() == reached
        hospital.execute(
            "INSERT INTO his.visit (visit_no, mrn, visit_class, status, updated_at)"
            " VALUES ('V1', 'M1', 'EMER', 'open', now())"
        )
        hospital.execute("UPDATE his.visit SET status = 'signed_off', updated_at = now()")
        until(lambda: stored(site, "visit", "status") == [("signed_off",)], 20, "the sign-off")
        hospital.execute(CALM, ["M1"])
        hospital.execute(CRITICAL, ["M3"])
        until(lambda: stored(site, "lab_result", "1", "patient_id = 'M3'"), 20, "another")
        assert len(stored(site, "lab_result", "1", "patient_id = 'M1'")) == 3
        link.release(Lane.ROUTINE)
        site.drain()
    assert len(stored(site, "lab_result", "1", "patient_id = 'M1'")) == 4
    site.prove()


def test_an_emergency_that_only_the_routine_lane_delivered_is_still_one(site):
    """The worker ends before the copy arrives: the next one must know the patient."""
    with Link(site.settings()) as link, site.hospital() as hospital:
        snapshotted(site)
        link.hold(Lane.EMERGENCY)
        hospital.execute(CRITICAL, ["M1"])
        site.drain()
        assert site.progress(lane=Lane.EMERGENCY) is None
    with Link(site.settings()) as link, site.hospital() as hospital:
        # A log at rest has no heartbeats, and the server's own records may be 15 s apart.
        hospital.execute("SELECT pg_logical_emit_message(true, 'nobody', 'reads this')")
        until(lambda: link.reader.watermark_us, 20, "a heartbeat")
        link.hold(Lane.ROUTINE)
        hospital.execute(CALM, ["M1"])
        until(lambda: len(stored(site, "lab_result", "1", "patient_id = 'M1'")) == 2, 20, "both")
        link.release(Lane.ROUTINE)
        site.drain()
    site.prove()


def test_truncate_is_held_and_reported(site, witness):
    with Link(site.settings(), Network(1, 0.2, 0.2, 5)), site.hospital() as hospital:
        snapshotted(site)
        for number in range(5):
            hospital.execute(CALM, [f"M{number}"])
        hospital.execute("TRUNCATE lis.result, his.diagnosis")
        hospital.execute(CALM, ["M9"])
        site.drain()
    found = site.prove()
    held = {match.table: match.held for match in found.tables if match.held}
    assert held == {"lab_result": 5}
    assert len(stored(site, "lab_result", "1", "NOT deleted")) == 6
    facts = site.facts()
    assert [(h["kind"], h["state"]) for h in facts["hold"]] == [("truncate", "open")] * 2
    (routine,) = (p for p in facts["progress"] if p["lane"] == "routine")
    assert (routine["held"], routine["captured"]) == (2, witness.count())


def test_a_column_added_in_the_middle_stops_nothing(site):
    with Link(site.settings(), Network(1, 0.2, 0.2, 5)), site.hospital() as hospital:
        snapshotted(site)
        hospital.execute(CALM, ["M1"])
        hospital.execute("ALTER TABLE lis.result ADD COLUMN analyser text DEFAULT 'A1'")
        hospital.execute(CALM, ["M2"])
        hospital.execute("UPDATE lis.result SET val_num = 4.5, analyser = 'A2'")
        hospital.execute("ALTER TABLE lis.result ALTER COLUMN item_name TYPE text")
        hospital.execute("UPDATE lis.result SET val_num = 4.6 WHERE mrn = 'M1'")
        with hospital.transaction():
            hospital.execute("UPDATE lis.result SET val_num = 4.7 WHERE mrn = 'M1'")
            hospital.execute("ALTER TABLE lis.result DROP COLUMN analyser")
            hospital.execute("UPDATE lis.result SET val_num = 4.8 WHERE mrn = 'M1'")
        site.drain()
    site.prove()
    values = stored(site, "lab_result", "patient_id, value::text")
    assert sorted(values) == [("M1", "4.8"), ("M2", "4.5")]


LARGE = """
import json, pathlib, resource, sys, time
from schemas.config import load
from tests.faults.harness import Link
import dataclasses, psycopg

path, slot, dsn, first, rows = sys.argv[1:]
config = load(path)
(link,) = config.links()
settings = dataclasses.replace(config.settings(link), slot=slot)
def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def stored():
    with psycopg.connect(settings.store_dsn) as store:
        return store.execute("SELECT captured FROM sync.progress WHERE lane = 'routine'").fetchone()
with Link(settings) as running:
    while not (stored() or (0,))[0] >= int(first):
        time.sleep(0.05)
    before, began = rss(), time.monotonic()
    print("ready", flush=True)
    while stored()[0] < int(first) + int(rows):
        time.sleep(0.2)
    print(json.dumps([rss() - before, time.monotonic() - began]))
"""
FIRST_ROWS, LARGE_ROWS = 30_000, 300_000
LARGE_LIMITS = {
    "batch_rows": 5000,
    "batch_bytes": 4 << 20,
    "in_flight_rows": 20_000,
    "spool_memory_bytes": 8 << 20,
    "spool_disk_bytes": 2 << 30,
    "resend_routine_s": 20.0,
}


def test_a_transaction_of_300_000_rows_needs_bounded_memory(site):
    """180 MB of log in one transaction take no more memory than a tenth of it had taken."""
    site.write_config(limits=LARGE_LIMITS)
    results = (
        "INSERT INTO lis.result (result_id, mrn, loinc, val_txt, status, updated_at)"
        " SELECT gen_random_uuid(), 'M' || g %% 5000, '600-7', repeat('阴性 ', 55), 'final', now()"
        " FROM generate_series(1, %s) g"
    )
    with site.hospital() as hospital:
        command = [sys.executable, "-c", LARGE, site.path, site.settings().slot]
        command += [site.config.stores["primary"].dsn, str(FIRST_ROWS), str(LARGE_ROWS)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            try:
                hospital.execute(results, [FIRST_ROWS])
                assert child.stdout.readline() == "ready\n"
                hospital.execute(results, [LARGE_ROWS])
                growth_kib, seconds = json.loads(child.stdout.readline())
            finally:
                child.terminate()
    print(f"{LARGE_ROWS} rows in {seconds:.1f} s, {growth_kib >> 10} MiB more")
    assert growth_kib < 256 << 10
    site.prove()


def test_an_idle_source_moves_slot_ledger_and_watermark(site):
    with Link(site.settings()), site.hospital() as hospital:
        snapshotted(site)
        hospital.execute("CREATE TABLE his.audit (v text)")
        site.drain()
        slot = site.settings().slot
        dsn = site.config.sources[CAMPUS].dsn
        before, slot_before = site.facts()["progress"][0], slots.state(dsn, slot)
        hospital.execute(
            "INSERT INTO his.audit SELECT repeat('x', 900) FROM generate_series(1, 20000)"
        )
        end = site.log_end()
        until(lambda: slots.state(dsn, slot).confirmed_lsn >= end, 20, "the slot's advance")
        until(
            lambda: site.facts()["progress"][0]["watermark_us"] > before["watermark_us"],
            20,
            "a newer watermark",
        )
        assert slot_before.confirmed_lsn < end
        assert site.progress().seq == SEQ_END
        hospital.execute(CALM, ["M1"])
        site.drain()
    site.prove()


@pytest.mark.parametrize("identity", ["FULL", "DEFAULT"])
def test_long_texts_that_do_not_change_are_kept(site, identity):
    seed = seed_of_this_run()
    chance = random.Random(seed)
    with site.hospital() as hospital:
        hospital.execute(f"ALTER TABLE emr.document REPLICA IDENTITY {identity}")

        def text() -> str:
            return chance.randbytes(LONG_TEXT_BYTES // 2).hex()

        def write(doc: int) -> None:
            hospital.execute(
                "INSERT INTO emr.document (doc_id, mrn, status, content, updated_at)"
                " VALUES (%s, %s, 'draft', %s, now())",
                [doc, f"M{doc}", text()],
            )

        for doc in range(10):
            write(doc)
        with Link(site.settings(), Network(seed, 0.2, 0.2, 5)):
            snapshotted(site)
            for step in range(150):
                doc = chance.randrange(12)
                kind = chance.choice(["status", "status", "title", "content", "key", "delete"])
                if kind == "delete":
                    hospital.execute("DELETE FROM emr.document WHERE doc_id = %s", [doc])
                    if chance.random() < 0.8:
                        write(doc)
                elif kind == "key":
                    hospital.execute(
                        "UPDATE emr.document SET doc_id = doc_id + 1000 WHERE doc_id = %s", [doc]
                    )
                    hospital.execute("DELETE FROM emr.document WHERE doc_id = %s", [doc + 1000])
                else:
                    value = text() if kind == "content" else f"{kind[:1]} {step}"
                    hospital.execute(
                        f"UPDATE emr.document SET {kind} = %s, updated_at = now()"
                        " WHERE doc_id = %s",
                        [value, doc],
                    )
            site.drain()
        kept = hospital.execute("SELECT count(content) FROM emr.document").fetchone()[0]
    site.prove()
    assert len(stored(site, "emr_document", "1", "NOT deleted AND content IS NOT NULL")) == kept


def test_changed_keys_end_where_they_end_in_the_source(site):
    seed = seed_of_this_run()
    chance = random.Random(seed)
    visit = (
        "INSERT INTO his.visit (visit_no, mrn, status, updated_at) VALUES (%s, %s, 'open', now())"
    )
    move = "UPDATE his.visit SET visit_no = %s WHERE visit_no = %s"
    line = "UPDATE his.prescription SET line_no = line_no + %s, rx_no = rx_no || %s"
    with site.hospital() as hospital:
        for number in range(20):
            hospital.execute(visit, [f"V{number}", f"M{number}"])
        hospital.execute(
            "INSERT INTO his.prescription (rx_no, line_no, mrn, updated_at)"
            " SELECT 'R' || g / 4, g % 4, 'M1', now() FROM generate_series(1, 40) g"
        )
        with Link(site.settings(), Network(seed, 0.2, 0.2, 5)):
            snapshotted(site)
            for step in range(80):
                one, other = (f"V{chance.randrange(20)}" for _ in range(2))
                with contextlib.suppress(psycopg.errors.UniqueViolation), hospital.transaction():
                    if step % 4 == 0:  # Two visits exchange their numbers.
                        for old, new in ((one, "X"), (other, one), ("X", other)):
                            hospital.execute(move, [new, old])
                    elif step % 4 == 1:
                        hospital.execute("DELETE FROM his.visit WHERE visit_no = %s", [other])
                        hospital.execute(move, [other, one])
                    else:
                        hospital.execute(move, [other, one])
                        hospital.execute(
                            "INSERT INTO his.visit (visit_no, mrn, status, updated_at)"
                            " VALUES (%s, %s, 'open', now()) ON CONFLICT DO NOTHING",
                            [one, f"N{step}"],
                        )
            hospital.execute(line, [10, "x"])
            hospital.execute(line + " WHERE line_no < 12", [-10, "y"])
            site.drain()
    site.prove()
