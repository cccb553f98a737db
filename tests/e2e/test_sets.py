"""Sets of rows arrive at two PostgreSQL stores and a MariaDB all or none, in both lanes."""

import collections.abc
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from pipelines.in_doubt import recover_all
from pipelines.sla_report import Observer
from runners.cli import main
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from schemas.batches import Lane
from schemas.clocks import wall_clock_us
from schemas.reports import SET_DIVIDED, SETS_APART, SETS_WAIT, State
from tests.faults.harness import SOURCE_SETTINGS, Network, drop_slots, seed_of_this_run, until
from tests.set_sites import RESULT, ROOT, WEST, SetLink, SetSite, Watcher, prescribe
from tests.two_phase_sites import PREPARED

KILLS = int(os.environ.get("CAMPUS_SYNC_CRASHES", "6"))
STORES = ("primary", "east")
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> collections.abc.Iterator[dict]:
    folder = tmp_path_factory.mktemp("sets")
    made: dict = {WEST: MariaDbServer(folder / WEST, durable=False)}
    with contextlib.ExitStack() as stack:
        stack.callback(made[WEST].remove)
        for name in ("source", *STORES):
            settings = SOURCE_SETTINGS | PREPARED
            made[name] = PostgresServer(folder / name, settings=settings, durable=False)
            stack.callback(shutil.rmtree, made[name].data, ignore_errors=True)
            stack.callback(made[name].kill)
        for server in made.values():
            server.start()
        yield made


@pytest.fixture
def site(servers, tmp_path) -> collections.abc.Iterator[SetSite]:
    for server in servers.values():
        server.start()
    stores = {name: servers[name] for name in STORES}
    made = SetSite(tmp_path, servers["source"], stores, servers[WEST], f"_{next(_NUMBERS)}")
    yield made
    for server in servers.values():
        server.start()
    with made.administrator() as connection:
        drop_slots(connection)


@contextlib.contextmanager
def running(site: SetSite, *network) -> collections.abc.Iterator[dict[str, SetLink]]:
    with contextlib.ExitStack() as stack:
        links = {}
        for store in STORES:
            links[store] = stack.enter_context(SetLink(site.settings(store), *network))
        for store in STORES:
            until(lambda store=store: site.snapshots(store)[-1:], 60, "a snapshot")
            until(lambda store=store: site.snapshots(store)[-1][1] == "done", 60, "its end")
        yield links


def incidents(site: SetSite, store: str) -> list[tuple[str, str]]:
    query = "SELECT kind, state FROM sync.incident ORDER BY id"
    return site.ask(store, query)


def assert_equal(site: SetSite) -> None:
    """Asserts that all three have the same and hold nothing back."""
    found = site.content()
    assert found["primary"] == found["east"] == found[WEST]
    assert site.prepared() == []


def test_sets_arrive_as_one_by_either_lane(site):
    seed = seed_of_this_run()
    whole = {f"R{n}": {1, 2, 3} for n in range(30)}
    urgent = "SELECT count(DISTINCT patient_id), count(*) FROM consult.lab_result WHERE lane = 'E'"
    with (
        running(site, Network(seed, 0.2, 0.2, 5)) as links,
        site.hospital() as hospital,
        Watcher(site, whole) as watcher,
    ):
        for link in links.values():
            link.hold(Lane.ROUTINE)
        for number in range(30):
            mrn = f"M{number}"
            with hospital.transaction():
                # An item before the critical one and one behind it, all of one commit.
                for value in ("4.1", "7.9" if number % 3 == 0 else "4.2", "4.3"):
                    hospital.execute(RESULT, (mrn, f"钾 {number}", value))
            prescribe(hospital, f"R{number}", mrn=mrn)
        # The siblings of a critical value go with it, and are one set at the MariaDB too.
        for name in site.servers:
            until(lambda n=name: tuple(site.ask(n, urgent)[0]) == (10, 30), 30, "emergencies")
        for link in links.values():
            link.release(Lane.ROUTINE)
        site.drain()
        query = "SELECT captured FROM sync.progress WHERE lane = 'emergency'"
        for name in STORES:
            until(lambda n=name: site.ask(n, query) == [(60,)], 30, "the emergency lane's end")
    assert watcher.looks and not watcher.partial
    assert site.lines(WEST) == whole
    assert_equal(site)
    site.prove()
    for store in STORES:
        # What this process brought counts as delivered, with its lag, and once: by the lane that
        # came first to its store.
        lanes = site.facts(store)["progress"]
        assert sum(lane["delivered"] for lane in lanes) == 180, lanes
        assert sum(lane["captured"] for lane in lanes) == 240, lanes
        assert sum(r.rows_per_commit.sum() for r in links[store].receipts) == 180
        assert incidents(site, store) == []


def test_a_change_of_one_line_never_overtakes_its_set(site):
    """A network that loses and reorders batches shows nobody the changed line alone."""
    seed = seed_of_this_run()
    whole = {f"R{n}": {1, 2} for n in range(60)}
    with (
        running(site, Network(seed, 0.2, 0.2, 5)),
        site.hospital() as hospital,
        Watcher(site, whole) as watcher,
    ):
        for number in whole:
            prescribe(hospital, number, ("0.5", "0.5"))
            time.sleep(0.01)  # Not of one batch, most of them.
            hospital.execute(
                "UPDATE his.prescription SET dose = 0.75 WHERE rx_no = %s AND line_no = 1",
                (number,),
            )
        site.drain()
    assert watcher.looks and not watcher.partial
    assert site.lines(WEST) == whole
    assert_equal(site)
    site.prove()


@pytest.mark.parametrize("victim", ["east", WEST])
def test_refused_sets_are_nowhere_and_all_follows(site, victim):
    later = {f"W{number}" for number in range(20)}
    whole = {number: {1, 2, 3} for number in {"R1", "R2", "R3"} | later}
    with (
        running(site) as links,
        site.hospital() as hospital,
        Watcher(site, whole) as watcher,
    ):
        prescribe(hospital, "R1")
        site.drain()
        site.servers[victim].kill()
        watcher.forbidden |= {"R2", "R3"} | later
        prescribe(hospital, "R2", mrn="M2")
        with hospital.transaction():
            hospital.execute(RESULT, ("M3", "钾", "7.9"))  # An emergency.
            for line in (1, 2, 3):
                hospital.execute(
                    "INSERT INTO his.prescription (rx_no, line_no, mrn, updated_at)"
                    " VALUES ('R3', %s, 'M3', now())",
                    (line,),
                )
        hospital.execute(
            "INSERT INTO his.visit (visit_no, mrn, status, updated_at)"
            " VALUES ('V1', 'M2', 'open', now())"
        )
        waits = [(SETS_WAIT, "open")]
        until(lambda: waits[0] in incidents(site, "primary"), 30, "an incident")
        for number in later:  # They wait behind it, and end no incident.
            prescribe(hospital, number)
            time.sleep(0.05)
        assert incidents(site, "primary") == waits
        with Observer(site.config) as observer:
            view = observer.view(wall_clock_us())
        (health,) = (x.health for x in view.links if x.health.link == "main>primary")
        assert health.state is not State.UP and f"branch {victim}" in health.why, health
        assert "Remedy: start it" in health.why
        before = watcher.looks
        until(lambda: watcher.looks > before + 30, 30, "looks")
        assert site.ask("primary", "SELECT count(*) FROM consult.lab_result") == [(0,)]
        watcher.forbidden.clear()
        site.servers[victim].start()
        site.drain()
        until(lambda: site.lines(WEST) == whole, 30, "all at the MariaDB")
        until(lambda: incidents(site, "primary")[-1][1] == "closed", 30, "the incident ends")
    assert links and not watcher.partial and not watcher.broken
    assert_equal(site)
    site.prove()


def test_degraded_sets_are_completed(site, capsys):
    site.configure(mode="degrade")
    with running(site), site.hospital() as hospital:
        for victim, number in (("east", "R1"), (WEST, "R2")):
            site.servers[victim].kill()
            prescribe(hospital, number)
            others = [name for name in site.servers if name != victim]
            until(
                lambda n=number, o=others: all(site.lines(name).get(n) == {1, 2, 3} for name in o),
                30,
                "the others have it",
            )
            assert main(["in-doubt", "list", "--config", str(site.path), "--json"]) == 1
            unfinished = json.loads(capsys.readouterr().out)["unfinished"]
            # Who has just come back may be passed over once more, and its link writes it again.
            assert unfinished and {one["state"] for one in unfinished} == {"commit"}
            assert all(victim in one["incomplete_at"] for one in unfinished)
            site.servers[victim].start()
            until(lambda: recover_all(site.config).clean, 30, "recovery completes it")
            assert site.lines(victim)[number] == {1, 2, 3}
        site.drain()
    assert_equal(site)
    site.prove()


def test_the_primary_down_degrades_to_store_by_store(site):
    """Nobody can decide then; a campus goes on, and the primary's own link tells all later."""
    site.configure(mode="degrade")
    with running(site), site.hospital() as hospital:
        prescribe(hospital, "R1")
        site.drain()
        site.servers["primary"].kill()
        prescribe(hospital, "R2")
        until(lambda: site.lines("east").get("R2") == {1, 2, 3}, 30, "the campus has it")
        assert incidents(site, "east") == [(SETS_APART, "open")]
        assert "R2" not in site.lines(WEST)
        site.servers["primary"].start()
        site.drain()
        until(lambda: site.lines(WEST).get("R2") == {1, 2, 3}, 30, "the MariaDB has it")
        prescribe(hospital, "R3")
        site.drain()
        assert incidents(site, "east") == [(SETS_APART, "closed")]
    until(lambda: recover_all(site.config).clean, 30, "nothing is left")
    assert_equal(site)
    site.prove()


def test_a_bad_line_is_a_dead_letter_and_holds_up_nothing(site):
    with running(site) as links, site.hospital() as hospital:
        for link in links.values():
            link.hold(Lane.ROUTINE)
        prescribe(hospital, "R1")
        prescribe(hospital, "R2", ("0.5", "-1", "0.5", "0.25"))
        prescribe(hospital, "R3")
        time.sleep(0.5)
        for link in links.values():
            link.release(Lane.ROUTINE)
        site.drain()
    expected = {"R1": {1, 2, 3}, "R2": {1, 3, 4}, "R3": {1, 2, 3}}
    for name in site.servers:
        assert site.lines(name) == expected, name
    for store in STORES:
        letters = site.ask(store, "SELECT reason, column_name FROM sync.dead_letter")
        assert letters == [("check_violation", "dose")]
        assert (SET_DIVIDED, "closed") in incidents(site, store)
    # The whole ones were written as one: their places are in one transaction each at a time.
    assert_equal(site)
    site.prove()


def test_values_that_the_log_does_not_carry_go_store_by_store(site, caplog):
    with site.administrator() as owner:
        owner.execute("ALTER TABLE lis.result REPLICA IDENTITY DEFAULT")
        owner.execute("ALTER TABLE lis.result ALTER val_txt SET STORAGE EXTERNAL")
    with running(site), site.hospital() as hospital:
        hospital.execute(RESULT, ("M1", "血培养", "4.1"))
        hospital.execute("UPDATE lis.result SET val_txt = repeat('x', 20000)")
        site.drain()
        hospital.execute("UPDATE lis.result SET status = 'corrected'")  # The text is not logged.
        site.drain()
        query = "SELECT status, length(value_text) FROM consult.lab_result"
        assert [site.ask(name, query) for name in STORES] == [[("corrected", 20000)]] * 2
        assert "REPLICA IDENTITY FULL" in caplog.text
        hospital.execute("UPDATE lis.result SET val_txt = repeat('y', 20000)")
        site.drain()
    assert_equal(site)
    site.prove()


STEPS = (
    "begun",
    *(f"{step} {name}" for name in ("east", "primary", WEST) for step in ("written", "prepared")),
    "voted",
    "decided",
    *(f"settled {name}" for name in ("east", "primary", WEST)),
    "finished",
)


def test_killed_at_any_step_all_or_none(site):
    """`CAMPUS_SYNC_CRASHES=26` goes through all steps and modes; seed on failure."""
    chance = random.Random(seed_of_this_run())
    cases = [(step, mode) for step in STEPS for mode in ("refuse", "degrade")]
    cases = [case for _ in range(-(-KILLS // len(cases))) for case in chance.sample(cases, 26)]
    numbers = itertools.count(1)
    whole: dict[str, set[int]] = {}
    with running(site):
        site.drain()  # History goes to each store by itself.
    with site.hospital() as hospital, Watcher(site, whole) as watcher:
        for step, mode in cases[:KILLS]:
            site.configure(mode=mode, deadline_s=2)
            with worker(site, step, chance.randint(1, 4)) as process:
                deadline = time.monotonic() + 60
                while process.poll() is None:
                    number = f"R{next(numbers)}"
                    whole[number] = set(range(1, chance.randint(2, 5)))
                    urgent = chance.random() < 0.3
                    with hospital.transaction():
                        if urgent:
                            hospital.execute(RESULT, (number, "钾", "7.9"))
                        for line in sorted(whole[number]):
                            hospital.execute(
                                "INSERT INTO his.prescription (rx_no, line_no, mrn, dose,"
                                " updated_at) VALUES (%s, %s, %s, 0.5, now())",
                                (number, line, number),
                            )
                    time.sleep(chance.uniform(0, 0.1))
                    assert time.monotonic() < deadline, f"{step} was not reached"
            until(site.quiet, 30, "sessions of a dead worker end")
            until(lambda: recover_all(site.config).clean, 30, "recovery")
            assert site.prepared() == []
            seen = site.content()
            assert seen["primary"] == seen["east"] == seen[WEST], (step, mode)
        site.configure()
        with running(site):
            site.drain()
    assert not watcher.partial, watcher.partial[:3]
    for name in site.servers:
        assert site.lines(name) == whole
    assert_equal(site)
    site.prove()
    print(f"{KILLS} kills, {len(whole)} prescriptions, {watcher.looks} looks")


@contextlib.contextmanager
def worker(site: SetSite, die_at: str, times: int) -> collections.abc.Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "tests.set_sites", str(site.path), die_at]
    with subprocess.Popen([*command, str(times)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_without_sets_nothing_is_asked(site):
    site.configure(sets=[])
    assert site.settings().sets is None
    with running(site) as links, site.hospital() as hospital:
        prescribe(hospital, "R1")
        site.drain()
    assert links and site.ask(WEST, "SELECT count(*) FROM prescription") == [(0,)]
    assert site.ask("primary", "SELECT count(*) FROM sync.two_phase") == [(0,)]
    assert site.ask("primary", "SELECT DISTINCT lane FROM consult.prescription") == [("R",)]


def test_run_writes_sets_on_flink(site):
    command = [sys.executable, "-m", "runners.cli", "run", "--no-check", "--config"]
    with (site.folder / "run.log").open("wb") as log:
        job = subprocess.Popen([*command, str(site.path)], cwd=ROOT, stdout=log, stderr=log)
    try:
        for store in STORES:
            done = lambda s=store: site.snapshots(s)[-1:] == [("first", "done")]  # noqa: E731
            until(done, 180, lambda: (site.folder / "run.log").read_text()[-2000:])
        with site.hospital() as hospital:
            for number in range(12):
                prescribe(hospital, f"R{number}", mrn=f"M{number}")
                value = "7.9" if number % 4 == 0 else "4.1"
                hospital.execute(RESULT, (f"M{number}", "钾", value))
        site.drain(120)
    finally:
        job.terminate()
        job.wait(90)
    assert site.lines(WEST) == {f"R{number}": {1, 2, 3} for number in range(12)}
    assert_equal(site)
    site.prove()
