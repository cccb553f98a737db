"""Links of one source in one process: one reads for all, and none depends on another."""

import contextlib

import psycopg
import pytest

from runners.embedded.postgres import PostgresServer
from schemas.batches import Lane
from tests.faults.harness import CAMPUS, QUICK, SOURCE_SETTINGS, Link, Network, Site, until
from transforms.capture.postgresql import slots

STORES = ("primary", CAMPUS, "east")
NETWORK = Network(1, 0.05, 0.05, 3)
# Holds some thousand rows: who delivers none of them soon reads no more.
SMALL_SPOOL = {"batch_bytes": 50_000, "spool_memory_bytes": 300_000, "spool_disk_bytes": 300_000}
VITAL = (
    "INSERT INTO his.vital_sign (vital_id, mrn, pulse, measured_at)"
    " SELECT g, 'P' || g %% 50, 70 + g %% 20, now() FROM generate_series(%s::int, %s::int) g"
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr("transforms.capture.link_reader._KEEP_SLOT_S", 0.3)
    with contextlib.ExitStack() as stack:
        source, *stores = (
            stack.enter_context(
                PostgresServer(tmp_path / name, settings=SOURCE_SETTINGS, durable=False)
            )
            for name in ("source", *STORES)
        )
        yield Site(tmp_path, source, dict(zip(STORES, stores, strict=True)))


def states(site: Site) -> dict[str, slots.SlotState]:
    dsn = site.config.sources[CAMPUS].dsn
    return {store: slots.state(dsn, site.settings(store).slot) for store in STORES}


def readers(site: Site) -> list[str]:
    """Returns the stores whose links have a stream of their own."""
    return [store for store, state in states(site).items() if state.active]


def one_reads_for_all(site: Site) -> str:
    """Returns who reads, once nobody has a snapshot left to read."""

    def alone() -> str | None:
        found = readers(site)
        through = all(site.snapshots(s)[-1:] == [("first", "done")] for s in STORES)
        return found[0] if len(found) == 1 and through else None

    return until(alone, 60, lambda: f"one reader, not {readers(site)}")


def acknowledged(site: Site) -> None:
    end = site.log_end()
    site.drain()
    until(
        lambda: all(state.confirmed_lsn >= end for state in states(site).values()),
        20,
        lambda: f"all slots at {end}: {states(site)}",
    )


@contextlib.contextmanager
def running(site: Site, stores=STORES):
    with contextlib.ExitStack() as stack:
        yield {s: stack.enter_context(Link(site.settings(s), NETWORK)) for s in stores}


def test_one_link_reads_for_all_and_every_slot_moves(site):
    with site.hospital() as hospital, running(site):
        one_reads_for_all(site)
        for start in range(1, 4000, 500):
            hospital.execute(VITAL, [start, start + 499])
        hospital.execute("UPDATE his.vital_sign SET pulse = 91 WHERE vital_id <= 700")
        hospital.execute("UPDATE his.vital_sign SET vital_id = -vital_id WHERE vital_id <= 60")
        hospital.execute("DELETE FROM his.vital_sign WHERE vital_id % 7 = 0")
        acknowledged(site)
        one_reads_for_all(site)
    site.prove()
    for store in STORES:
        assert site.snapshots(store) == [("first", "done")]
    assert len({site.captured(store) for store in STORES}) == 1


def test_another_link_reads_when_the_reader_ends(site):
    with site.hospital() as hospital, running(site):
        one_reads_for_all(site)
        for start in (1, 1001, 2001):
            hospital.execute(VITAL, [start, start + 999])
            with site.administrator() as administrator:
                administrator.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active"
                )
            one_reads_for_all(site)
        site.drain()
    site.prove()


def test_a_link_that_left_reads_alone_until_it_is_back(site):
    with site.hospital() as hospital, contextlib.ExitStack() as stack:
        with running(site):
            reader = one_reads_for_all(site)
            hospital.execute(VITAL, [1, 1000])
            acknowledged(site)
        others = [store for store in STORES if store != reader]
        stack.enter_context(running(site, others))
        one_reads_for_all(site)
        hospital.execute(VITAL, [1001, 9000])
        until(lambda: all(site.drained(site.log_end(), s) for s in others), 60, "the others")
        stack.enter_context(running(site, [reader]))
        hospital.execute(VITAL, [9001, 9500])
        acknowledged(site)
        one_reads_for_all(site)
    site.prove()


def test_a_store_that_takes_nothing_holds_up_no_other(site):
    site.write_config(limits={**QUICK, **SMALL_SPOOL})
    with site.hospital() as hospital, running(site) as links:
        stuck = one_reads_for_all(site)
        for lane in Lane:
            links[stuck].hold(lane)
        for start in range(1, 20_000, 1000):
            hospital.execute(VITAL, [start, start + 999])
        end = site.log_end()
        for store in set(STORES) - {stuck}:
            until(lambda store=store: site.drained(end, store), 60, f"{store}'s rows")
        assert not site.drained(end, stuck)
        for lane in Lane:
            links[stuck].release(lane)
        acknowledged(site)
        one_reads_for_all(site)
    site.prove()


def drop_a_followers_slot(site: Site) -> tuple[str, str] | None:
    """Returns who reads and whose slot is gone; None if it was just being moved on."""
    reader = one_reads_for_all(site)
    follower = next(store for store in STORES if store != reader)
    with contextlib.suppress(psycopg.errors.ObjectInUse), site.administrator() as admin:
        admin.execute("SELECT pg_drop_replication_slot(%s)", [site.settings(follower).slot])
        return reader, follower
    return None


def test_a_follower_whose_slot_is_lost_fills_the_gap_by_a_snapshot(site):
    with site.hospital() as hospital, running(site):
        one_reads_for_all(site)
        hospital.execute(VITAL, [1, 1000])
        acknowledged(site)
        reader, follower = until(lambda: drop_a_followers_slot(site), 60, "a slot to be free")
        until(
            lambda: site.snapshots(follower)[-1] == ("slot_missing", "done"), 30, "another snapshot"
        )
        hospital.execute(VITAL, [1001, 1200])
        acknowledged(site)
    site.prove()
    assert site.snapshots(reader) == [("first", "done")]
