"""Two-phase commit over real servers: crashes at every step, frozen servers, refused rows."""

import base64
import collections.abc
import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import threading

import psycopg
import pytest
import yaml

from pipelines.in_doubt import look, recover_quietly, write_together
from runners.cli import main
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from runners.embedded.world import READER
from runners.preflight.two_phase import check_two_phase
from runners.upkeep import Repeated
from schemas.batches import Lane, Op
from schemas.config import TwoPhase, load
from schemas.entities import TABLES
from schemas.errors import ConfigError, StoreUnavailable
from schemas.positions import START
from tests.canonical import rows_of
from tests.deliveries import batch_of
from tests.faults.harness import seed_of_this_run, until
from tests.fixtures_postgres import TEST_SETTINGS
from tests.two_phase_sites import PREPARED, Coordinators, Sites, branches_of, sets_of
from transforms.checksum import with_digests
from transforms.deliver import store_schema
from transforms.deliver.store import Store
from transforms.seal_dead_letters import Sealer
from transforms.two_phase.apply_together import InDoubt, apply_together
from transforms.two_phase.decision_log import DecisionLog
from transforms.two_phase.postgresql_branch import PostgresBranch
from transforms.two_phase.states import XID_FORMAT, OnBranchDown, State, Xid
from transforms.two_phase.writes import RowSet, encode

CRASHES = int(os.environ.get("CAMPUS_SYNC_CRASHES", "20"))
NAMES = ("east", "primary", "west")
STEPS = (
    "begun",
    *(f"{step} {name}" for name in NAMES for step in ("written", "prepared")),
    "voted",
    "decided",
    *(f"settled {name}" for name in NAMES),
    "finished",
)
RECOVERY_STEPS = ("expired", *(f"{step} {name}" for name in NAMES for step in ("settled", "noted")))


@pytest.fixture(scope="module")
def three_stores(tmp_path_factory) -> collections.abc.Iterator[Sites]:
    folder = tmp_path_factory.mktemp("two_phase")
    settings = TEST_SETTINGS | PREPARED
    with contextlib.ExitStack() as stack:
        west = MariaDbServer(folder / "west", durable=False)
        stack.callback(west.remove)
        servers = []
        for name in ("primary", "east"):
            servers.append(PostgresServer(folder / name, settings=settings, durable=False))
            stack.callback(shutil.rmtree, servers[-1].data, ignore_errors=True)
            stack.callback(servers[-1].kill)
        for server in (*servers, west):
            server.start()
        yield Sites(*servers, west)


@pytest.fixture
def sites(three_stores) -> collections.abc.Iterator[Sites]:
    """Three stores without rows; a test may kill and freeze them."""
    three_stores.start()
    three_stores.clear()
    yield three_stores
    for server in three_stores.servers.values():
        server.thaw()


def matrix() -> list[tuple[str, str, str, str]]:
    """Every (who is killed, at which step, policy, at which step of recovery again)."""
    cases = [
        (victim, step, policy.value, "")
        for victim in ("coordinator", *NAMES)
        for step in STEPS
        for policy in OnBranchDown
    ]
    again = itertools.product(("prepared west", "decided"), RECOVERY_STEPS)
    return cases + [("coordinator", step, "refuse", later) for step, later in again]


def test_every_crash_ends_all_or_none(sites):
    """`CAMPUS_SYNC_CRASHES=200` goes through the whole matrix and again; seed on failure."""
    chance = random.Random(seed_of_this_run())
    cases = []
    while len(cases) < CRASHES:
        cases += chance.sample(matrix(), len(matrix()))
    expected: list[tuple] = []
    ended = {True: 0, False: 0}
    with Coordinators() as coordinators:
        for number, (victim, step, policy, later) in enumerate(cases[:CRASHES], 1):
            case = f"{number}: {victim} at {step!r}, {policy}, then {later!r}"
            if victim == "coordinator":
                assert coordinators.run(sites.dsns, number, policy, step), case
            else:
                crash_a_server(sites, number, victim, step, policy)
            if later:
                sites.pass_deadline()
                assert coordinators.run(sites.dsns, 0, policy, later), case
            sites.heal()
            before, expected = expected, sites.content()
            new = [row for row in expected if row[2] == number]
            assert len(new) in (0, 6), case  # Three lines, a report and its two items.
            if not new:
                assert expected == before, case
            decided = STEPS.index(step) >= STEPS.index("decided")
            if victim == "coordinator":
                assert bool(new) == decided, case
            ended[bool(new)] += 1
            sites.assert_free()
    print(f"{CRASHES} crashes: {ended[True]} ended with all, {ended[False]} with none")
    assert all(ended.values())


def crash_a_server(sites: Sites, number: int, victim: str, step: str, policy: str) -> None:
    def reached(now: str) -> None:
        if now == step:
            sites.servers[victim].kill()

    with contextlib.suppress(InDoubt, StoreUnavailable):
        sites.apply(number, OnBranchDown(policy), deadline_s=60.0, reached=reached)


def test_a_frozen_branch_is_refused_in_time_or_gets_it_later(sites):
    """A frozen server answers no limit of its own: the client's side has to end it."""
    for number, name in enumerate(("east", "west"), 1):
        server = sites.servers[name]

        def reached(step: str, server=server, name=name) -> None:
            if step == f"written {name}":
                server.freeze()

        done = sites.apply(number, deadline_s=6.0, reached=reached)
        assert not done.committed and f"branch {name}" in done.reason, done
        server.thaw()
        sites.heal()
        assert sites.content() == []
        sites.assert_free()
    sites.servers["east"].freeze()
    done = sites.apply(3, OnBranchDown.DEGRADE, deadline_s=30.0)
    assert (done.committed, done.missing) == (True, ("east",)), done
    (one,) = sites.recover().unfinished
    assert (one.state, one.branches["east"]) == (State.COMMIT, "missing")
    sites.servers["east"].thaw()
    sites.heal()
    assert len(sites.content()) == 6
    sites.assert_free()


def lines_of(row: dict) -> RowSet:
    rows = with_digests(TABLES["prescription"], rows_of("prescription", [row]))
    return RowSet("main", {"prescription": rows})


def test_a_set_that_one_store_refuses_is_nowhere(sites):
    bad = {"record_id": "1", "dose": "-1", "_lsn": 9}
    sets = [
        RowSet(
            "main",
            {"prescription": with_digests(TABLES["prescription"], rows_of("prescription", [bad]))},
        )
    ]
    done = sites.apply(1, OnBranchDown.DEGRADE, sets=sets)
    assert not done.committed and "CheckViolation (23514)" in done.reason
    fine = "9." + "1" * 31  # More places than MariaDB keeps: rounding would be silent.
    row = {"record_id": "1", "dose": fine, "_lsn": 9}
    done = sites.apply(1, OnBranchDown.DEGRADE, sets=[lines_of(row)])
    assert not done.committed and "prescription.dose" in done.reason
    assert sites.content() == []
    sites.assert_free()


def test_repeated_older_and_withdrawn_rows(sites):
    assert sites.apply(2).committed
    first = sites.content()
    for number in (2, 1):  # The same again, and an older version of the report.
        assert sites.apply(number).committed
    after = sites.content()
    assert [row for row in after if row[2] == 2] == first
    assert {row[1] for row in after if row[2] == 1} == {"1-1", "1-2", "1-3"}
    gone = rows_of("lab_report", [{"record_id": "R", "_lsn": 3, "_op": int(Op.DELETE)}])
    assert sites.apply(3, sets=[RowSet("main", {"lab_report": gone})]).committed
    for name, table in (("east", "consult.lab_report"), ("west", "lab_report")):
        query = f"SELECT deleted, name, lane FROM {table} WHERE record_id = 'R'"
        (row,) = sites.ask(query, name)
        assert (bool(row[0]), row[1], row[2]) == (True, "血生化 2", "E")
    sites.assert_free()


def test_a_branch_that_another_session_holds_is_left_until_it_ends(sites):
    """MariaDB answers `unknown XID` to others as long as the preparing session lives."""
    with contextlib.closing(DecisionLog(sites.dsns["primary"])) as log:
        here, transaction = log.begin(["east", "west"], 60.0)
    east, _, west = branches_of({name: sites.dsns[name] for name in NAMES})
    for branch in (east, west):
        branch.begin(Xid(here.coordinator, transaction, branch.name), 30.0)
        branch.write(encode(sets_of(1)))
        branch.prepare()
    assert sites.recover().left == [("east", transaction), ("west", transaction)]
    sites.pass_deadline()
    found = sites.recover()
    assert (found.rolled_back, found.left) == ([("east", transaction)], [("west", transaction)])
    west.close()
    east.close()
    sites.heal()
    assert sites.content() == []
    sites.assert_free()


class Died(Exception):
    """The coordinator is gone."""


@pytest.mark.parametrize("dies", [False, True])
def test_a_branch_that_lost_its_promise_gets_the_set_nevertheless(sites, dies):
    """As a standby looks that was promoted without the end of the log."""

    def reached(step: str) -> None:
        if step == "decided":
            ((gid,),) = sites.ask("SELECT gid FROM pg_prepared_xacts", "east")
            sites.ask(f"ROLLBACK PREPARED '{gid}'", "east")
            if dies:
                raise Died

    with pytest.raises(Died) if dies else contextlib.nullcontext():
        done = sites.apply(1, reached=reached)
        assert (done.committed, done.waiting) == (True, ())
    if dies:
        sites.heal()
    assert len(sites.content()) == 6
    sites.assert_free()


def test_a_coordinator_that_wakes_up_late_is_told_the_decision(sites):
    """It stands still with everything prepared; the servers and recovery do not wait for it."""

    def reached(step: str) -> None:
        if step == "voted":
            sites.pass_deadline()
            # MariaDB ends its silent session, and the branch can be settled by others.
            until(lambda: sites.recover().clean, 30, lambda: repr(sites.recover()))
            sites.assert_free()

    done = sites.apply(1, deadline_s=8.0, reached=reached)
    assert (done.committed, done.reason, done.waiting) == (False, "deadline", ())
    assert sites.content() == []
    sites.assert_free()


def test_prepared_transactions_of_others_are_not_touched(sites):
    with sites.servers["east"].connect("consult", autocommit=False) as conn:
        conn.execute("CREATE TABLE other (v int)")
        conn.execute("PREPARE TRANSACTION 'campus_sync:somebody:1-1-a:east'")
    with sites.servers["west"].connect("consult") as conn, conn.cursor() as cursor:
        cursor.execute("CREATE TABLE other (v INT)")
        for verb in ("START", "END", "PREPARE"):
            cursor.execute(f"XA {verb} 'somebody:1-1-a','west',{XID_FORMAT}")
            if verb == "START":
                cursor.execute("INSERT INTO other VALUES (1)")
    assert sites.recover().clean
    assert sites.ask("SELECT gid FROM pg_prepared_xacts", "east")
    assert sites.ask("XA RECOVER", "west")
    sites.ask("ROLLBACK PREPARED 'campus_sync:somebody:1-1-a:east'", "east")
    sites.ask(f"XA ROLLBACK 'somebody:1-1-a','west',{XID_FORMAT}", "west")


def test_the_routine_lane_finds_the_rows_there(sites):
    """What was written together comes again by the ordinary way: duplicates, and the law holds."""
    assert sites.apply(1).committed
    batch = batch_of(dict(sets_of(1)[0].tables), START)
    store = Store(sites.dsns["east"], "main>primary", "main", Sealer("env:NONE"), lambda: 0)
    receipt = store.apply([batch], Lane.ROUTINE)
    store.close()
    assert receipt.applied
    assert (receipt.counts.captured, receipt.counts.duplicates) == (3, 3)
    query = "SELECT source_count, store_count FROM sync.manifest"
    assert sites.ask(query, "east") == [(3, 3)]


@pytest.fixture
def campuses(sites, tmp_path) -> pathlib.Path:
    """A campuses.yaml of the three stores; its source is never asked."""
    (tmp_path / "key").write_text(base64.b64encode(bytes(32)).decode())
    (tmp_path / "key").chmod(0o600)
    content = {
        "version": 1,
        "sources": {
            "main": {
                "kind": "postgresql",
                "dsn": sites.dsns["primary"].replace("/consult", "/his"),
                "mapping": "postgresql_his",
            }
        },
        "stores": {name: {"dsn": sites.dsns[name]} for name in ("primary", "east")},
        "links": ["main>primary"],
        "dead_letter_key": "file:key",
        "two_phase": {
            "mode": "degrade",
            "deadline_s": 30,
            "branches": {"west": sites.dsns["west"]},
        },
    }
    path = tmp_path / "campuses.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_command_lists_and_recovers(sites, campuses, capsys):
    def said(*words: str) -> tuple[int, dict]:
        code = main(["in-doubt", *words, "--config", str(campuses), "--json"])
        return code, json.loads(capsys.readouterr().out)

    config = load(campuses)
    assert said("list") == (0, {"unfinished": [], "not_in_the_log": [], "down": {}})
    sites.servers["west"].kill()
    done = write_together(config, sets_of(1))
    assert (done.committed, done.missing) == (True, ("west",))
    code, found = said("list")
    (one,) = found["unfinished"]
    assert code == 1 and list(found["down"]) == ["west"]
    assert (one["state"], one["incomplete_at"]) == ("commit", ["west"])
    assert main(["in-doubt", "list", "--config", str(campuses)]) == 1
    assert "west missing" in capsys.readouterr().out
    assert "branch west" in recover_quietly(config)
    sites.servers["west"].start()
    code, found = said("recover")
    assert code == 0
    assert found["completed"] == [{"branch": "west", "transaction": str(done.transaction)}]
    assert main(["in-doubt", "recover", "--config", str(campuses)]) == 0
    assert capsys.readouterr().out == "nothing is left in doubt\n"
    assert recover_quietly(config) == "" and len(sites.content()) == 6
    sites.assert_free()


def test_a_timer_recovers(sites, campuses):
    """As `run` does it; beside it, other sets are written."""
    config = load(campuses)
    sites.servers["west"].kill()
    assert write_together(config, sets_of(1)).missing == ("west",)
    sites.servers["west"].start()
    work = functools.partial(recover_quietly, config)
    with Repeated("two-phase recovery", work, 0.1, threading.Lock()):
        assert write_together(config, sets_of(2)).committed
        until(lambda: not look(config).unfinished, 30, "the timer completes the set")
    assert {row[1] for row in sites.content()} == {
        *("R", "R-1", "R-2"),
        *(f"{number}-{line}" for number in (1, 2) for line in (1, 2, 3)),
    }
    sites.assert_free()


@pytest.mark.parametrize("number", ["not issued yet", "issued again"])
def test_a_log_taken_back_holds_what_it_has_forgotten(sites, campuses, capsys, number):
    """As after a restored backup: a branch may be committed elsewhere, so a person decides."""
    config = load(campuses)
    sites.ask("DELETE FROM sync.two_phase_log", "primary")
    with contextlib.closing(DecisionLog(sites.dsns["primary"])) as log:
        here, transaction = log.begin(["east"], 60.0)
    (branch,) = branches_of({"east": sites.dsns["east"]})
    branch.begin(Xid(here.coordinator, transaction, "east"), 30.0)
    branch.write(encode(sets_of(1)))
    branch.prepare()
    branch.close()
    sites.ask("TRUNCATE sync.two_phase CASCADE; UPDATE sync.two_phase_log SET last = 0", "primary")
    assert look(config).attention
    if number == "issued again":
        assert sites.apply(3, sets=sets_of(3)[:1]).committed
    before = sites.content()
    for _ in range(2):  # Once it issues numbers again, it still knows.
        assert main(["in-doubt", "recover", "--config", str(campuses)]) == 1
        assert "Held: the log has gone back" in capsys.readouterr().out
        assert sites.apply(2, deadline_s=2.0).committed is False  # Its rows are locked.
        sites.pass_deadline()
    assert main(["in-doubt", "recover", "--presume-abort", "--config", str(campuses)]) == 0
    assert sites.content() == before
    sites.assert_free()


def test_preflight_says_what_is_missing(sites, campuses):
    config = load(campuses)

    def errors() -> dict[str, str]:
        return {
            finding.place + ": " + finding.what.split(":")[0]: finding.remedy
            for findings in check_two_phase(config)
            for finding in findings
        }

    # The tests' servers trade durability for speed, and are told so.
    power_cut = [
        "two-phase branch east: fsync or full_page_writes is off",
        "two-phase branch primary: fsync or full_page_writes is off",
        "two-phase branch west: innodb_flush_log_at_trx_commit or sync_binlog is not 1",
    ]
    assert list(errors()) == power_cut
    west = sites.servers["west"]
    administrator = west.connect("consult")
    with administrator, administrator.cursor() as cursor:
        try:
            cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1, GLOBAL sync_binlog = 1")
            cursor.execute(f"REVOKE UPDATE ON consult.* FROM {READER}@'%'")
            ((what, remedy),) = [item for item in errors().items() if "west" in item[0]]
            assert "may not read and write patient" in what
            cursor.execute(remedy.rstrip(";"))
            cursor.execute("ALTER TABLE visit RENAME hidden")
            ((what, remedy),) = [item for item in errors().items() if "west" in item[0]]
            assert "lacks the canonical table visit" in what
            cursor.execute(remedy.rstrip(";"))
            assert list(errors()) == power_cut[:2]
        finally:
            cursor.execute("DROP TABLE IF EXISTS hidden")
            cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2, GLOBAL sync_binlog = 0")
    sites.servers["west"].kill()
    ((what, remedy),) = [item for item in errors().items() if "west" in item[0]]
    assert "127.0.0.1" in what and "mariadb -h" in remedy


def test_a_server_that_cannot_prepare_refuses_and_is_found(make_server, tmp_path):
    server = make_server("small", settings={"max_prepared_transactions": 0})
    dsn = server.create_database("consult")
    with psycopg.connect(dsn, autocommit=True) as conn:
        store_schema.ensure(conn)
    branch = PostgresBranch("primary", dsn, 5.0)
    log = DecisionLog(dsn)
    done = apply_together(log, sets_of(1), [branch])
    log.close()
    assert not done.committed and "(55000)" in done.reason
    (tmp_path / "campuses.yaml").write_text(
        f"""\
version: 1
sources: {{main: {{kind: postgresql, dsn: "{server.dsn("his")}", mapping: postgresql_his}}}}
stores: {{primary: {{dsn: "{dsn}"}}}}
dead_letter_key: "env:KEY"
two_phase: {{mode: refuse}}
"""
    )
    (found,) = check_two_phase(load(tmp_path / "campuses.yaml"))
    assert found[0].what.startswith("max_prepared_transactions is 0")
    off = load(tmp_path / "campuses.yaml").model_copy(update={"two_phase": TwoPhase(mode=False)})
    assert check_two_phase(off) == []
    with pytest.raises(ConfigError, match="mode is off"):
        write_together(off, sets_of(1))
