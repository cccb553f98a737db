"""Two-phase commit: what follows what, and all or none behind any interleaving of crashes."""

import contextlib
import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.errors import StoreUnavailable
from tests.canonical import rows_of
from tests.two_phase_model import ModelBranch, ModelLog, ModelStore
from transforms.checksum import with_digests
from transforms.two_phase.apply_together import InDoubt, apply_together
from transforms.two_phase.mariadb_branch import mariadb_ddl
from transforms.two_phase.recover import recover
from transforms.two_phase.states import (
    ENDS,
    Event,
    Identity,
    OnBranchDown,
    State,
    TransactionId,
    Verdict,
    Vote,
    Xid,
    decide,
    follow,
    judge,
)
from transforms.two_phase.writes import RowSet, encode, from_json, to_json

NAMES = ("east", "primary", "west")
DECIDED = (State.COMMIT, State.ABORT, State.COMMITTED, State.ABORTED)


def a_set(number: int, lines: int = 2) -> RowSet:
    """A prescription of so many lines."""
    rows = [
        {"record_id": f"{number}-{i}", "prescription_no": str(number), "line_no": i, "_lsn": number}
        for i in range(1, lines + 1)
    ]
    return RowSet(
        "main",
        {"prescription": with_digests(TABLES["prescription"], rows_of("prescription", rows))},
    )


def ids_of(number: int) -> set[str]:
    return {f"{number}-1", f"{number}-2"}


# --- Pure rules.


@pytest.mark.parametrize("state", list(State))
def test_every_pair_of_state_and_event_has_an_answer(state):
    for event in Event:
        after = follow(state, event)
        if state in ENDS:
            assert after is state
        if state in DECIDED:  # A decision never turns into the other one.
            assert ("commit" in after) == ("commit" in state)
    assert follow(State.PREPARING, Event.DEADLINE) is State.ABORT
    assert follow(State.COMMIT, Event.DEADLINE) is State.COMMIT


@pytest.mark.parametrize("policy", list(OnBranchDown))
@pytest.mark.parametrize("votes", list(itertools.product(Vote, repeat=3)))
def test_commit_needs_all_or_with_degrade_all_that_are_there(votes, policy):
    event = decide(dict(zip(NAMES, votes, strict=True)), policy)
    allowed = {Vote.PREPARED} | ({Vote.DOWN} if policy is OnBranchDown.DEGRADE else set())
    wanted = set(votes) <= allowed and Vote.PREPARED in votes
    assert (event is Event.WANT_COMMIT) == wanted


def test_what_the_log_does_not_know_is_aborted_unless_it_has_gone_back():
    here = Identity("c", 2, 10)
    assert judge(None, TransactionId(2, 10, "a"), here) is Verdict.ROLL_BACK
    assert judge(None, TransactionId(2, 11, "a"), here) is Verdict.HOLD
    assert judge(None, TransactionId(1, 3, "a"), here) is Verdict.HOLD
    assert judge(None, TransactionId(2, 10, "a"), here, issued_again=True) is Verdict.HOLD
    for state in (State.COMMIT, State.COMMITTED):
        assert judge(state, TransactionId(1, 3, "a"), here) is Verdict.COMMIT
    assert judge(State.PREPARING, TransactionId(2, 3, "a"), here) is Verdict.LEAVE


@hypothesis.given(
    timeline=st.integers(0, 2**31),
    number=st.integers(0, 2**62),
    branch=st.from_regex(r"\A[A-Za-z][A-Za-z0-9_-]{0,23}\Z"),
)
def test_names_are_read_back_and_fit(timeline, number, branch):
    xid = Xid("0123456789ab", TransactionId(timeline, number, "89abcdef"), branch)
    assert Xid.parse(xid.gid) == xid
    assert len(xid.gtrid) <= 64 and len(xid.gid) < 200


@pytest.mark.parametrize("gid", ["", "x", "other:c:1-2-a:b", "campus_sync:c:1-2:b", "a:b:c:d:e"])
def test_names_of_others_are_not_ours(gid):
    assert Xid.parse(gid) is None


# --- Sets.


def test_a_set_is_written_in_the_order_of_its_keys_and_survives_json():
    gone = rows_of("lab_result", [{"record_id": "9", "_op": int(Op.DELETE)}])
    sets = [a_set(2), a_set(1), RowSet("east", {"lab_result": gone})]
    writes = encode(sets)
    assert [(write.table, write.bare) for write in writes] == [
        ("lab_result", True), ("prescription", False)
    ]  # fmt: skip
    keys = [row["record_id"] for row in writes[1].rows]
    assert keys == sorted(keys) and len(keys) == 4
    row = writes[1].rows[0]
    assert row["line_no"] == 1 and row["src_lsn"] == 1 and len(row["digest"]) == 64
    assert row["committed_at"] == "2026-03-01 08:00:00.000000Z"
    assert from_json(to_json(writes)) == writes


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        ([], "no rows"),
        ([a_set(1), a_set(1)], "comes twice"),
        ([RowSet("main", {"patient": rows_of("patient", [{}])})], "not a table"),
        ([RowSet("main", {"visit": rows_of("visit", [{}])})], "no digest"),
        (
            [RowSet("main", {"visit": rows_of("visit", [{"unchanged": ("bed",)}])})],
            "not whole",
        ),
    ],
)
def test_what_cannot_be_written_as_one_is_refused(sets, what):
    with pytest.raises(ValueError, match=what):
        encode(sets)


def test_every_canonical_table_has_a_mariadb_form():
    for table in TABLES.values():
        ddl = mariadb_ddl(table)
        assert all(f"`{column.name}`" in ddl for column in table.columns)


# --- Crashes.


class Crash(BaseException):
    """The process is gone: nothing behind it runs, and its sessions with it."""


class World:
    """Three stores and a log; `happens` says what goes on behind each step of a coordinator."""

    def __init__(self, events):
        self.stores = [ModelStore(name) for name in NAMES]
        self.log = ModelLog()
        self._events = iter(events)
        self.told: dict[int, bool] = {}

    def branches(self) -> list[ModelBranch]:
        return [ModelBranch(store) for store in self.stores]

    def reached(self, step: str) -> None:
        for event, which in next(self._events, ()):
            store = self.stores[which]
            if event == "crash":
                raise Crash
            if event == "kill":
                store.crash()
            elif event == "start":
                store.start()
            elif event == "standby":
                store.fail_over()
            elif event == "log":
                self.log.up = not self.log.up
            elif event == "half":
                store.prepares_then_dies = not store.prepares_then_dies
            elif event == "refuse":
                store.refuses = not store.refuses
            else:  # Another process recovers while this one stands still.
                self.log.pass_deadline()
                with contextlib.suppress(StoreUnavailable, Crash):
                    recover(self.log, self.branches(), reached=self.reached)

    def apply(self, number: int, policy: OnBranchDown) -> None:
        with contextlib.suppress(StoreUnavailable, InDoubt, Crash):
            done = apply_together(
                self.log,
                [a_set(number)],
                self.branches(),
                policy,
                monotonic=lambda: 0.0,
                reached=self.reached,
            )
            self.told[number] = done.committed

    def heal(self) -> None:
        self._events = iter(())
        self.log.up = True
        for store in self.stores:
            store.prepares_then_dies = store.refuses = False
            store.start()
        self.log.pass_deadline()
        recover(self.log, self.branches())
        found = recover(self.log, self.branches())  # Once more for what it met half way.
        assert found.clean, found


EVENT = st.tuples(
    st.sampled_from(
        ["crash", "kill", "start", "standby", "log", "half", "refuse", "recover", "recover"]
    ),
    st.integers(0, len(NAMES) - 1),
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    events=st.lists(st.lists(EVENT, max_size=2), max_size=30),
    policies=st.lists(st.sampled_from(list(OnBranchDown)), min_size=1, max_size=3),
)
def test_any_interleaving_of_crashes_and_recoveries_ends_all_or_none(events, policies):
    world = World(events)
    for number, policy in enumerate(policies, 1):
        world.apply(number, policy)
    world.heal()
    for number in range(1, len(policies) + 1):
        held = [ids_of(number) & store.rows.keys() for store in world.stores]
        assert held in ([set()] * 3, [ids_of(number)] * 3)
        if number in world.told:
            assert bool(held[0]) == world.told[number], "the caller was told otherwise"
    assert not any(store.held for store in world.stores)


@pytest.mark.parametrize("crash", [False, True])
def test_a_branch_that_fails_over_behind_its_promise_gets_the_set(crash):
    """By the coordinator that goes on, or by recovery where that is dead."""
    behind = [("standby", 2), ("crash", 0)][: 2 if crash else 1]
    world = World([[], [], [], [], [], [], [], [], behind])
    world.apply(1, OnBranchDown.REFUSE)
    assert not world.stores[2].held
    assert world.told.get(1) is (None if crash else True)
    if crash:
        assert not world.stores[0].rows
        recover(world.log, world.branches())
    assert [store.rows.keys() for store in world.stores] == [ids_of(1)] * 3


def test_a_degraded_set_is_marked_and_completed_later():
    world = World([])
    world.stores[2].crash()
    done = apply_together(
        world.log, [a_set(1)], world.branches(), OnBranchDown.DEGRADE, monotonic=lambda: 0.0
    )
    assert (done.committed, done.missing) == (True, ("west",))
    found = recover(world.log, world.branches())
    assert not found.clean and found.unfinished[0].branches["west"] == "missing"
    world.stores[2].start()
    found = recover(world.log, world.branches())
    assert found.clean and found.completed == [("west", done.transaction)]
    assert [store.rows.keys() for store in world.stores] == [ids_of(1)] * 3


def test_a_log_that_has_gone_back_holds_until_a_person_decides():
    world = World([[], [], [], [], [], [("crash", 0)]])
    world.apply(1, OnBranchDown.REFUSE)
    assert world.stores[0].held
    world.log = ModelLog()  # As of a backup from before.
    world.log.here = Identity("coordinator", 2, 0)
    found = recover(world.log, world.branches())
    assert found.held and not found.rolled_back and world.stores[0].held
    found = recover(world.log, world.branches())
    assert found.held
    found = recover(world.log, world.branches(), presume_abort=True)
    recover(world.log, world.branches())
    assert not world.stores[0].held and not any(store.rows for store in world.stores)


def test_a_log_that_has_gone_back_on_the_same_timeline_holds_too():
    """The second standby of one primary issues the numbers again that the first one issued."""
    world = World([[], [], [], [], [], [("crash", 0)]])
    world.apply(1, OnBranchDown.REFUSE)
    (lost,) = world.stores[0].held
    world.log = ModelLog()
    other = world.log.begin(["west"], 60.0)[1]._replace(salt="another")
    world.log.rows = {other: dataclasses.replace(*world.log.rows.values(), id=other)}
    found = recover(world.log, world.branches())
    assert {one for _, one in found.held} == {lost.transaction} and not found.rolled_back
    assert world.stores[0].held
