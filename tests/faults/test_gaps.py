"""Holes in the log: each is found, filled by a snapshot, and told with its reason."""

import contextlib
import shutil
import time

import psycopg
import pytest
import yaml

from runners.embedded.postgres import PostgresServer
from runners.embedded.traffic import Traffic
from schemas.batches import Lane
from schemas.positions import START, Position, own_lsn
from schemas.reports import LOG_REWOUND
from tests.edited_stores import EditedStore
from tests.faults.harness import (
    CAMPUS,
    QUICK,
    SOURCE_SETTINGS,
    VITAL,
    Link,
    Network,
    Site,
    drop_slot,
    seed_of_this_run,
    until,
    wait_until_free,
)
from tests.set_sites import RESULT
from transforms.capture.postgresql import slots
from transforms.deliver import store_schema

SMALL_LOG = {"max_slot_wal_keep_size": "2MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
# Holds some thousand rows: a snapshot that nobody takes off it comes to a stop.
SMALL_SPOOL = {"batch_bytes": 50_000, "spool_memory_bytes": 300_000, "spool_disk_bytes": 300_000}
NETWORK = Network(1, 0.1, 0.1, 4)

PATIENTS = (
    "INSERT INTO his.patient (pid, mrn, name, phone, updated_at)"
    " SELECT g, 'P' || g, 'old', '13800000000', now() FROM generate_series(1, 2) g"
)


@pytest.fixture
def site(tmp_path):
    with contextlib.ExitStack() as stack:
        source, store = (
            stack.enter_context(
                PostgresServer(tmp_path / name, settings=SOURCE_SETTINGS | settings, durable=False)
            )
            for name, settings in (("source", SMALL_LOG), ("primary", {}))
        )
        yield Site(tmp_path, source, {"primary": store})
    for server in (source, store):
        shutil.rmtree(server.data, ignore_errors=True)


def first_run(site: Site, rows: int = 1000) -> None:
    """Carries some rows, so that the link has a past; no reader is left."""
    with site.hospital() as hospital:
        hospital.execute(VITAL, [1, rows // 2])
        with Link(site.settings()):
            site.drain()
            hospital.execute(VITAL, [rows // 2 + 1, rows])
            drain_and_acknowledge(site)
    wait_until_free(site.config.sources[CAMPUS].dsn, site.settings().slot, 10)
    assert site.snapshots() == [("first", "done")]


def drain_and_acknowledge(site: Site) -> None:
    """Returns when the source, too, has been told that all of now is in the store."""
    end = own_lsn(site.log_end())
    site.drain()
    until(lambda: slot_of(site).confirmed_lsn >= end, 10, "the slot's advance")


def slot_of(site: Site) -> slots.SlotState:
    return slots.state(site.config.sources[CAMPUS].dsn, site.settings().slot)


def change_in_the_gap(site: Site) -> None:
    with site.hospital() as hospital:
        hospital.execute("DELETE FROM his.vital_sign WHERE vital_id <= 100")
        hospital.execute("UPDATE his.vital_sign SET pulse = 71 WHERE vital_id <= 200")
        hospital.execute("UPDATE his.vital_sign SET vital_id = -vital_id WHERE vital_id <= 110")
        hospital.execute(VITAL, [2001, 2100])


def fill(site: Site, reason: str, more: int = 1) -> None:
    """Runs the link until the gap is filled; asserts what it says of it, and equal contents."""
    with Link(site.settings(), NETWORK), site.hospital() as hospital:
        hospital.execute(VITAL, [3001, 3100])
        site.drain()
        hospital.execute("DELETE FROM his.vital_sign WHERE vital_id = 3001")
        site.drain()
    site.prove()
    found = site.snapshots()
    assert found[-more:] == [(reason, "done")] * more
    assert {state for _, state in found} == {"done"}


def tombstones(site: Site) -> int:
    with site.store() as store:
        query = "SELECT count(*) FROM consult.vital_sign WHERE deleted"
        return store.execute(query).fetchone()[0]


def test_a_slot_that_was_dropped(site):
    first_run(site)
    slots.drop(site.config.sources[CAMPUS].dsn, site.settings().slot)
    change_in_the_gap(site)
    fill(site, "slot_missing")
    assert tombstones(site) == 111


def test_a_slot_that_is_dropped_under_the_reader(site):
    with Link(site.settings(), NETWORK), site.hospital() as hospital:
        hospital.execute(VITAL, [1, 1000])
        site.drain()
        drop_from_under_the_reader(site)
        change_in_the_gap(site)
        until(lambda: site.snapshots()[-1][0] == "slot_missing", 60, "another snapshot")
        site.drain()
    site.prove()
    assert tombstones(site) == 110


def drop_from_under_the_reader(site: Site) -> None:
    """Drops the slot in the moment that its reader is thrown out, however often that takes."""
    slot = site.settings().slot

    def dropped() -> bool:
        administrator.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active"
        )
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            administrator.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            return True
        return False

    with site.administrator() as administrator:
        until(dropped, 20, "the drop")


def test_a_slot_whose_log_is_gone(site):
    first_run(site)
    change_in_the_gap(site)
    with site.administrator() as administrator:
        for _ in range(4):
            administrator.execute("CREATE TABLE x (); DROP TABLE x")
            administrator.execute("SELECT pg_switch_wal()")
            administrator.execute("CHECKPOINT")
    assert slot_of(site).lost
    fill(site, "slot_invalidated")
    assert tombstones(site) == 111


def copy_of(server: PostgresServer, name: str) -> None:
    """Keeps a cold copy of a server's data."""
    server.stop()
    shutil.copytree(server.data, server.directory / name)
    server.start()


def restore(server: PostgresServer, name: str) -> None:
    """Puts the copy in the place of the server's data, as after a disaster."""
    server.kill()
    owner = server.data.stat()
    shutil.rmtree(server.data)
    shutil.copytree(server.directory / name, server.data)
    for path in (server.data, *server.data.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    server.data.chmod(0o700)
    server.start()


@pytest.mark.parametrize("meanwhile", ["stopped", "running"])
def test_a_store_restored_from_an_older_copy(site, meanwhile):
    first_run(site)
    copy_of(site.store_servers["primary"], "copy")
    with Link(site.settings(), NETWORK), site.hospital() as hospital:
        change_in_the_gap(site)
        drain_and_acknowledge(site)
        reached = site.progress()
        if meanwhile == "running":
            restore(site.store_servers["primary"], "copy")
            assert site.progress() < reached
            hospital.execute(VITAL, [4001, 4010])
            until(lambda: site.snapshots()[-1][0] == "ledger_behind", 60, "a snapshot")
            site.drain()
    if meanwhile == "stopped":
        restore(site.store_servers["primary"], "copy")
        assert site.progress() < reached
    fill(site, "ledger_behind")
    assert tombstones(site) == 111


def test_a_store_that_fails_over_while_a_snapshot_is_delivered(site):
    """The reader survives and knows more than the new primary of which numbers were given out."""
    site.write_config(limits=QUICK | {"batch_rows": 200, "snapshot_rows_s": 1500})
    with site.hospital() as hospital:
        # On a busy machine much of it is given out before we look.
        hospital.execute(VITAL, [1, 20_000])
        with Link(site.settings()) as link:
            until(lambda: (site.progress() or START) > START, 60, "some rows")
            link.hold(Lane.ROUTINE)
            behind = given_out(site)
            # The rows behind them move up, to numbers that were given out.
            gone = "DELETE FROM his.vital_sign WHERE vital_id BETWEEN %s AND %s"
            hospital.execute(gone, [behind + 1, behind + 1500])
            until(lambda: given_out(site) > behind + 2000, 60, "more rows")
            set_snapshot_back(site, behind)
            link.release(Lane.ROUTINE)
            site.drain()
    site.prove()
    assert site.snapshots() == [("first", "done"), ("interrupted", "done")]


def given_out(site: Site) -> int:
    return site.facts()["snapshot"][-1]["last_seq"]


def set_snapshot_back(site: Site, seq: int) -> None:
    """Leaves of a running snapshot's notes what an asynchronous standby had at number `seq`."""
    others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    server = site.store_servers["primary"]
    with server.connect(f"consult{site.name}") as store, store.transaction():
        store.execute("UPDATE sync.snapshot SET last_seq = %s", [seq])
        store.execute("DELETE FROM sync.snapshot_part WHERE seq > %s", [seq])
        store.execute(f"SELECT pg_terminate_backend(pid) {others}")


def test_a_store_emptied_under_a_running_link(site):
    with Link(site.settings(), NETWORK), site.hospital() as hospital:
        site.drain()
        hospital.execute(VITAL, [1, 1000])
        drain_and_acknowledge(site)
        with site.store() as store:
            store.execute("DROP SCHEMA consult, sync CASCADE")
            store_schema.ensure(store)
        hospital.execute(VITAL, [1001, 1100])
        until(lambda: site.snapshots()[-1:] == [("first", "done")], 60, "a snapshot")
        site.drain()
    site.prove()


def mapping_without(site: Site, table: str) -> str:
    """Writes the campus's mapping without one table; returns its name for campuses.yaml."""
    with open(site.config.sources[CAMPUS].mapping, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    del content["tables"][table]
    (site.folder / "less.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    return "less.yaml"


@pytest.mark.parametrize("published_by", ["the administrator", "nobody"])
def test_a_table_that_joins_later(site, published_by):
    site.write_config(mapping=mapping_without(site, "his.visit"))
    with site.administrator() as administrator:
        administrator.execute("ALTER PUBLICATION campus_sync DROP TABLE his.visit")
    first_run(site)
    with site.hospital() as hospital:
        hospital.execute(
            "INSERT INTO his.visit (visit_no, mrn, updated_at)"
            " SELECT 'V' || g, 'P1', now() FROM generate_series(1, 500) g"
        )
    if published_by == "the administrator":
        with site.administrator() as administrator:
            administrator.execute("ALTER PUBLICATION campus_sync ADD TABLE his.visit")
    else:
        let_the_reader_publish(site)
    site.write_config()
    fill(site, "new_tables")
    with site.store() as store:
        assert store.execute("SELECT count(*) FROM consult.visit").fetchone() == (500,)


def let_the_reader_publish(site: Site) -> None:
    with site.administrator() as administrator:
        administrator.execute("GRANT hospital TO sync")


def test_a_table_that_left_the_publication_for_a_while(site):
    """What was written without being published is in no log that the link reads."""
    let_the_reader_publish(site)
    first_run(site)
    with site.administrator() as administrator:
        administrator.execute("ALTER PUBLICATION campus_sync DROP TABLE his.vital_sign")
    change_in_the_gap(site)
    fill(site, "new_tables")
    assert tombstones(site) == 111


def test_a_source_that_dies_in_the_middle_of_a_snapshot(site):
    """A full spool holds the snapshot up; the last time the whole worker goes with the source.

    Each time it goes on where it was, by a later view, and the log has the rest.
    """
    site.write_config(limits=QUICK | SMALL_SPOOL)
    with site.hospital() as hospital:
        hospital.execute(VITAL, [1, 12_000])
    for number in range(2):
        with Link(site.settings(), NETWORK) as link:
            reached = site.progress() or START
            until(lambda reached=reached: (site.progress() or START) > reached, 60, "some rows")
            link.hold(Lane.ROUTINE)
            time.sleep(0.5)
            site.source_server.kill()
            site.source_server.start()
            with site.hospital() as hospital:
                hospital.execute("DELETE FROM his.vital_sign WHERE vital_id %% 5 = %s", [number])
            if number == 0:
                link.release(Lane.ROUTINE)
                until(lambda: resumes(site), 60, "another reading")
    with Link(site.settings(), NETWORK):
        site.drain()
    site.prove()
    assert site.snapshots() == [("first", "done")]
    assert resumes(site) >= 2


def resumes(site: Site) -> int:
    """How often the newest snapshot was gone on with."""
    return site.facts()["snapshot"][-1]["resumes"]


def restore_source(site: Site) -> None:
    restore(site.source_server, "copy")
    assert site.log_end() < site.progress().lsn


@pytest.mark.parametrize("meanwhile", ["stopped", "running"])
def test_a_source_restored_from_a_backup_is_refused(site, caplog, meanwhile):
    """Its new changes would look older than what the store has: nobody would ever see them."""
    first_run(site)
    copy_of(site.source_server, "copy")
    with Link(site.settings()), site.hospital() as hospital:
        hospital.execute(VITAL, [1001, 21_000])
        site.drain()
        if meanwhile == "running":
            restore_source(site)
            refused(site, caplog)
    if meanwhile == "stopped":
        restore_source(site)
        with Link(site.settings()):
            refused(site, caplog)


def refused(site: Site, caplog) -> None:
    reached, before = site.progress(), site.captured()
    with site.hospital() as hospital:
        hospital.execute(VITAL, [50_001, 50_002])
    until(lambda: "restored from a backup" in caplog.text, 30, "the refusal")
    assert "raise the source's `generation`" in caplog.text
    time.sleep(1)
    assert (site.progress(), site.captured()) == (reached, before)
    with site.store() as store:
        query = "SELECT FROM consult.vital_sign WHERE record_id = '50001'"
        assert store.execute(query).rowcount == 0


@pytest.mark.parametrize("meanwhile", ["stopped", "running"])
def test_a_source_that_kept_its_slot_but_lost_its_tail(site, caplog, monkeypatch, meanwhile):
    """Grown past what was lost its log looks like one that never went back, but what it says of
    that stretch is new: the store would count it as applied long ago."""
    monkeypatch.setattr("transforms.capture.link_reader._BACKOFF_MAX_S", 0.5)
    first_run(site)
    copy_of(site.source_server, "copy")
    with contextlib.ExitStack() as stack, Link(site.settings()), site.hospital() as hospital:
        hospital.execute(VITAL, [1001, 6000])
        site.drain()
        if meanwhile == "running":
            restore_source(site)
            until(lambda: "restored from a backup" in caplog.text, 30, "the refusal")
            stack.enter_context(site.hospital()).execute(VITAL, [7001, 7001])
    if meanwhile == "stopped":
        restore_source(site)
        with Link(site.settings()):
            until(lambda: "restored from a backup" in caplog.text, 30, "the refusal")
        with site.hospital() as hospital:
            hospital.execute(VITAL, [7001, 7001])
    assert open_incidents(site) == [LOG_REWOUND]
    end = site.progress().lsn
    until(lambda: write_log(site, 1) or site.log_end() > end, 30, "a longer log")
    with Link(site.settings()):
        site.drain()
    site.prove()
    assert site.snapshots() == [("first", "done"), ("rewound", "done")]
    assert tombstones(site) == 5000
    assert open_incidents(site) == []


@pytest.mark.parametrize("beyond", ["island", "set"])
def test_a_source_that_lost_what_is_beyond_the_ledger(site, caplog, monkeypatch, beyond):
    """It failed over: its slot and its tail are gone, of which the store has more than its ledger
    says. A snapshot below that would leave the lost row for ever."""
    monkeypatch.setattr("transforms.capture.link_reader._BACKOFF_MAX_S", 0.5)
    site.write_config(limits=QUICK | {"resend_routine_s": 600.0})
    first_run(site)
    copy_of(site.source_server, "copy")
    link = Link(site.settings())
    link.hold(Lane.ROUTINE)
    with link, site.hospital() as hospital:
        hospital.execute(VITAL, [1001, 1002])
        until(lambda: link.waiting(Lane.ROUTINE), 30, "a batch")
        link.lose_next(Lane.ROUTINE)
        write_log(site, 1)
        hospital.execute(VITAL, [5001, 5001])
        end = site.log_end()
        link.release(Lane.ROUTINE)
        until(lambda: (found := islands(site)) and found[-1].lsn >= end, 30, "an island")
    if beyond == "set":  # Written to all stores at once, it leaves no island.
        with site.store() as store:
            store.execute("DELETE FROM sync.island")
    restore(site.source_server, "copy")
    drop_slot(site.config.sources[CAMPUS].dsn, site.settings().slot, 10)
    assert site.progress().lsn <= site.log_end() < end
    with Link(site.settings()), site.hospital() as hospital:
        until(lambda: "restored from a backup" in caplog.text, 30, "the refusal")
        assert site.snapshots() == [("first", "done")]
        write_log(site, 2)
        hospital.execute(VITAL, [6001, 6001])
        site.drain()
    site.prove()
    assert site.snapshots() == [("first", "done"), ("slot_missing", "done")]
    assert tombstones(site) == 1


def open_incidents(site: Site) -> list[str]:
    with site.store() as store:
        return [k for (k,) in store.execute("SELECT kind FROM sync.incident WHERE state = 'open'")]


def islands(site: Site) -> list[Position]:
    """Returns where they end."""
    return [Position(row["end_lsn"], row["end_seq"]) for row in site.facts()["island"]]


def write_log(site: Site, megabytes: int) -> None:
    """Lengthens the source's log."""
    with site.administrator() as administrator:
        message = "SELECT pg_logical_emit_message(true, '', repeat('x', 1000000))"
        for _ in range(megabytes):
            administrator.execute(message)


def test_a_restored_source_begins_another_log(site):
    """The remedy that the refusal names makes both ends equal again, also where clients edit."""
    first_run(site)
    with site.hospital() as hospital:
        hospital.execute(PATIENTS)
    store = site.store_servers["primary"]
    edited = EditedStore("primary", store.dsn(f"consult{site.name}"))
    with Link(site.settings()):
        site.drain()
        for number in ("1", "2"):
            edited.update(number, table="patient", phone="13900000000")
        assert edited.fold() == 2
        drain_and_acknowledge(site)
    copy_of(site.source_server, "copy")
    with Link(site.settings()), site.hospital() as hospital:
        hospital.execute(VITAL, [1001, 21_000])
        hospital.execute("UPDATE his.patient SET name = 'lost'")
        hospital.execute("INSERT INTO his.vital_sign (vital_id, mrn, spo2) VALUES (0, 'P1', 1000)")
        site.drain()
    assert len(site.open_letters()) == 1
    restore_source(site)
    site.write_config(source={"generation": 1})
    change_in_the_gap(site)
    with site.hospital() as hospital:
        hospital.execute("UPDATE his.patient SET name = 'new' WHERE mrn = 'P1'")
    fill(site, "new_log")
    assert tombstones(site) > 0
    assert site.open_letters() == []
    shown = [edited.row(number, "name", "phone", table="patient") for number in ("1", "2")]
    assert shown == [("new", "13900000000"), ("old", "13900000000")]
    with site.hospital() as hospital:
        hospital.execute("UPDATE his.patient SET name = 'later'")
    with Link(site.settings()):
        site.drain()
    assert edited.row("2", "name", "phone", table="patient") == ("later", "13900000000")
    assert [reason for reason, _ in site.snapshots()] == ["first", "new_log"]
    edited.close()


def test_a_log_of_before_is_refused(site, caplog):
    """A file that says less than it did names another server, or was itself restored."""
    site.write_config(source={"generation": 2})
    first_run(site)
    site.write_config(source={"generation": 1})
    with Link(site.settings()):
        refused(site, caplog)


def test_emergencies_that_were_lost_with_their_reader_are_not_missed(site):
    """The routine lane has brought them; nobody would ever send their own copy again."""
    site.write_config(limits=QUICK | {"resend_emergency_s": 600.0})
    first_run(site)
    with Link(site.settings()) as link, site.hospital() as hospital:
        link.hold(Lane.EMERGENCY)
        for number in range(3):
            hospital.execute(RESULT, (f"P{number}", "钾", "7.9"))
            until(lambda n=number: link.waiting(Lane.EMERGENCY) > n, 30, "an emergency")
        link.lose_next(Lane.EMERGENCY)
        link.release(Lane.EMERGENCY)
        end = site.log_end()
        until(lambda: site.progress().acknowledgeable_lsn >= end, 30, "the routine lane")
        until(lambda: not link.waiting(Lane.EMERGENCY), 30, "the other two")
    assert not site.drained(end)
    with Link(site.settings()):
        site.drain()
    site.prove()


def test_all_at_once(site):
    """A gap that is met while another one is being filled, under traffic, on a bad network."""
    seed = seed_of_this_run()
    network = Network(seed, 0.2, 0.2, 5)
    with Traffic(site.config, seed) as traffic:
        traffic.preload(60)
        with Link(site.settings(), network):
            until(lambda: site.progress(), 60, "some rows")
            traffic.run(rate=300, seconds=1)
        for end in ("slot", "source", "slot"):
            if end == "slot":
                drop_slot(site.config.sources[CAMPUS].dsn, site.settings().slot, 10)
            else:
                site.source_server.kill()
                site.source_server.start()
            traffic.run(rate=300, seconds=1)
            reached = site.progress()
            with Link(site.settings(), network):
                until(lambda reached=reached: site.progress() > reached, 60, "some rows")
        with Link(site.settings(), network):
            traffic.run(rate=300, seconds=1)
            site.drain()
    site.prove()
    assert site.progress(lane=Lane.EMERGENCY)


def test_a_table_that_leaves_the_publication_of_a_running_link(site, monkeypatch):
    """Nothing in the stream tells: the link looks by itself, stands still and says what to do."""
    monkeypatch.setattr("transforms.capture.link_reader._LOOK_AT_PUBLICATION_S", 0.5)
    monkeypatch.setattr("transforms.capture.link_reader._BACKOFF_MAX_S", 1.0)
    with Link(site.settings(), NETWORK), site.hospital() as hospital:
        hospital.execute(VITAL, [1, 1000])
        site.drain()
        with site.administrator() as administrator:
            administrator.execute("ALTER PUBLICATION campus_sync DROP TABLE his.vital_sign")
            change_in_the_gap(site)
            time.sleep(2)
            administrator.execute("ALTER PUBLICATION campus_sync ADD TABLE his.vital_sign")
        until(lambda: site.snapshots()[-1] == ("new_tables", "done"), 60, "a snapshot")
        site.drain()
    site.prove()
    assert tombstones(site) == 110
