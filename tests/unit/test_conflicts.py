"""Concurrent edits: the laws of the join, each policy in both orders, the rules pair by pair."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Lane
from schemas.conflict_policy import ORDER, load_conflict_rules
from schemas.errors import WireFormatError
from schemas.hlc import stamp_of
from schemas.siblings import (
    ROW,
    UNSEEN,
    Dot,
    Entry,
    Stamp,
    record_from_json,
    record_to_json,
)
from schemas.versions import Order, compare
from transforms.conflicts.edit import edit_record, source_record
from transforms.conflicts.join import join_records
from transforms.conflicts.judge import decide
from transforms.conflicts.show import show
from transforms.conflicts.tombstones import forget, may_forget

RULES = load_conflict_rules()
NOW = 1_800_000_000_000_000
MINUTE = 60_000_000


def stamp(minutes=0.0, role="attending", lane=Lane.ROUTINE, editor="D1", **more) -> Stamp:
    return Stamp(stamp_of(NOW + round(minutes * MINUTE)), lane, role, editor, **more)


class Clinic:
    """A record of one table at several stores, in few words."""

    def __init__(self, table: str):
        self.table = RULES.tables[table]

    def edit(self, record, store, changed, at=0.0, *, deleted=False, seen=None, **who):
        made = stamp(at, **who)
        return edit_record(
            record, f"{store}.1", made, changed, self.table, RULES, deleted=deleted, seen=seen
        )

    def create(self, store="a", at=0.0, **values):
        return self.edit(UNSEEN, store, dict.fromkeys(self.table.group_of) | values, at)

    def source(self, count, at=0.0, **values):
        row = dict.fromkeys(self.table.group_of) | values
        return source_record(Dot("@main", count), stamp(at), row, self.table)

    def show(self, record):
        return show(record, self.table, RULES)

    def both_orders(self, base, one, other):
        """Joins two edits of `base` in both orders; returns the one result."""
        first = join_records(join_records(base, one), other)
        second = join_records(join_records(base, other), one)
        assert record_to_json(first) == record_to_json(second)
        assert self.show(first).values == self.show(second).values
        return first

    def group(self, record, group):
        return self.show(record).groups[group]


# The laws, over states that stores can reach.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["edit", "edit", "edit", "decide", "delete", "source", "forget", "join"]),
        st.integers(0, 2),
        st.integers(0, 30),
        st.sampled_from([*RULES.roles, ""]),
        st.sampled_from(["phone", "name", "allergies", "remarks"]),
    ),
    max_size=14,
)


def reachable(steps) -> list:
    """Returns every state that three stores pass through: each step is done at one of them."""
    clinic = Clinic("patient")
    base = clinic.create(phone="0", allergies="无")
    held, states, counts = [base] * 3, [base], itertools.count(1)
    for kind, store, number, role, column in steps:
        record, name = held[store], "abc"[store]
        if kind == "join":
            record = join_records(record, held[number % 3])
        elif kind == "source":
            row = {"phone": f"p{number % 3}", "allergies": "青霉素", "name": "王"}
            record = join_records(record, clinic.source(next(counts), number, **row))
        elif kind == "forget":
            record = forget(record, f"{name}.1", stamp(number))
        else:
            changed = {} if kind == "delete" else {column: f"{column}{number}"}
            sights = {g: v.full_sight for g, v in clinic.show(record).groups.items()}
            decides = kind == "decide"
            made = {"role": role, "decides": decides}
            seen = sights if decides else None
            gone = kind == "delete"
            record = clinic.edit(record, name, changed, number, deleted=gone, seen=seen, **made)
        held[store] = record
        states.append(record)
    return states


@given(STEPS, st.data())
def test_the_join_is_associative_commutative_and_idempotent(steps, data):
    states = st.sampled_from(reachable(steps))
    a, b, c = data.draw(states), data.draw(states), data.draw(states)
    assert join_records(a, a) is a
    assert record_to_json(join_records(a, b)) == record_to_json(join_records(b, a))
    left = join_records(join_records(a, b), c)
    right = join_records(a, join_records(b, c))
    assert record_to_json(left) == record_to_json(right)


@given(STEPS, st.data())
def test_vectors_alone_say_which_record_is_the_result(steps, data):
    """What the set-based path in SQL rests on: who has seen all of another is the join."""
    states = st.sampled_from(reachable(steps))
    a, b = data.draw(states), data.draw(states)
    order = compare(a.seen, b.seen)
    joined = record_to_json(_joined_by_entries(a, b))
    assert (order in (Order.BEFORE, Order.EQUAL)) == (joined == record_to_json(b))
    assert (order in (Order.AFTER, Order.EQUAL)) == (joined == record_to_json(a))


def _joined_by_entries(a, b):
    """The join without its short cuts: by an extra edit on each side, neither covers the other."""
    extra = [Dot("x.1", 1), Dot("y.1", 1)]
    sides = [r._replace(seen={**r.seen, d.actor: 1}) for r, d in zip((a, b), extra, strict=True)]
    joined = join_records(*sides)
    seen = {actor: n for actor, n in joined.seen.items() if actor not in ("x.1", "y.1")}
    return joined._replace(seen=seen)


@given(STEPS)
def test_a_record_survives_its_text(steps):
    for record in reachable(steps):
        text = record_to_json(record)
        again = record_from_json(text)
        assert record_to_json(again) == text
        assert Clinic("patient").show(again) == Clinic("patient").show(record)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seen": {}, "edits": [{}]}', '{"seen": 3}'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(WireFormatError):
        record_from_json(text)


# The rules, pair by pair.

PLAN = RULES.tables["treatment_plan"].by_group["plan"]


def entry(actor, text, *, archived=False, **who):
    values = {"content": text, "status": "archived" if archived else "signed"}
    return Entry(Dot(actor, 1), stamp(**who), values)


E, R = Lane.EMERGENCY, Lane.ROUTINE
# One, the other, the winner (0, 1 or None: a person), and by which rule.
PAIRS = [
    ({"archived": True, "role": "trainee"}, {"lane": E, "role": "superior"}, 0, "archived"),
    ({"archived": True}, {"archived": True, "role": "superior"}, 1, "role"),
    ({"lane": E, "role": "trainee"}, {"lane": R, "role": "superior"}, 0, "emergency"),
    ({"lane": E, "role": "attending"}, {"lane": R, "role": "consultant"}, 0, "emergency"),
    ({"lane": E, "role": "consultant"}, {"lane": R, "role": "attending"}, None, "person"),
    ({"lane": E, "role": "consultant"}, {"lane": R, "role": "superior"}, 0, "emergency"),
    ({"lane": E, "role": "consultant"}, {"lane": E, "role": "attending"}, 1, "role"),
    ({"role": "superior"}, {"role": "attending", "minutes": 60}, 0, "role"),
    ({"role": "attending"}, {"role": "consultant"}, 0, "role"),
    ({"role": "consultant"}, {"role": "trainee"}, 0, "role"),
    ({"role": "trainee"}, {"role": ""}, 0, "role"),
    ({"minutes": 5.1}, {}, 0, "time"),
    ({"minutes": 5}, {}, None, "person"),
    ({"minutes": -60}, {}, 1, "time"),
    ({"minutes": 60, "distrusted": ("b.1",)}, {}, None, "person"),
    ({"minutes": 60}, {"distrusted": ("a.1",)}, None, "person"),
    ({"minutes": 60, "distrusted": ("c.1",)}, {}, 0, "time"),
]


@pytest.mark.parametrize(("one", "other", "winner", "rule"), PAIRS)
def test_each_pair_is_settled_by_the_first_rule_that_tells_them_apart(one, other, winner, rule):
    pair = [entry("a.1", "one", **one), entry("b.1", "other", **other)]
    for order in (pair, pair[::-1]):
        found, by = decide(order, ORDER, PLAN, RULES)
        assert (found, by) == (None if winner is None else pair[winner], rule)


def test_a_source_stamps_rows_so_time_never_speaks_for_it():
    source = Entry(Dot("@main", 1), stamp(60), {"content": "source"})
    edit = entry("a.1", "edit")
    assert decide([source, edit], ORDER, PLAN, RULES) == (None, "person")
    late = entry("a.1", "edit", minutes=120)
    assert decide([source, late], ORDER, PLAN, RULES) == (late, "time")


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=2, max_size=5), st.randoms())
def test_the_winner_is_of_the_set_not_of_its_order(kinds, rng):
    roles = [*RULES.roles]
    entries = [
        entry(f"s{i}.1", f"{i}", role=roles[role], lane=E if lane > 2 else R, minutes=at * 4)
        for i, (role, lane, at) in enumerate(kinds)
    ]
    winner = decide(entries, ORDER, PLAN, RULES)
    shuffled = entries[:]
    rng.shuffle(shuffled)
    assert decide(shuffled, ORDER, PLAN, RULES) == winner


# DESIGN.md, decision 8.


def test_discarding_a_loser_at_once_would_make_two_orders_two_results():
    """b; a concurrent with b, b wins; c after a, concurrent with b, ranked below b."""
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0")
    b = clinic.edit(base, "b", {"content": "b"}, 1, role="superior")
    a = clinic.edit(base, "a", {"content": "a"}, 2, role="attending")
    c = clinic.edit(a, "a", {"content": "c"}, 3, role="trainee")
    results = set()
    for order in itertools.permutations([a, b, c]):
        held = base
        for version in order:
            held = join_records(held, version)
        results.add(record_to_json(held))
        view = clinic.group(held, "plan")
        assert view.values["content"] == "b"
        assert [e.values["content"] for e in view.entries] == ["b", "c"]
    assert len(results) == 1


# Every kind of policy, in both orders of arrival.


def test_groups_are_settled_apart():
    clinic = Clinic("patient")
    base = clinic.create(phone="1", name="王")
    one = clinic.edit(base, "b", {"phone": "2"})
    other = clinic.edit(base, "c", {"name": "汪"})
    shown = clinic.show(clinic.both_orders(base, one, other))
    assert (shown.values["phone"], shown.values["name"]) == ("2", "汪")
    assert not shown.conflicts


def test_never_and_lock():
    clinic = Clinic("patient")
    base = clinic.create(abo="A", name="王")
    one = clinic.edit(base, "b", {"abo": "B", "name": "汪"}, lane=E, role="superior")
    other = clinic.edit(base, "c", {"abo": "O", "name": "黄"}, 60)
    record = clinic.both_orders(base, one, other)
    shown = clinic.show(record)
    assert shown.values["abo"] is None and shown.values["name"] == "汪"
    found = {conflict.group: conflict for conflict in shown.conflicts}
    assert found["blood"].locked and found["blood"].alarm == "emergency" and found["blood"].open
    assert found["identity"].open and found["identity"].assignee == "empi office"
    # An ordinary edit decides neither; a person does both.
    later = clinic.edit(record, "a", {"abo": "AB", "name": "王二"}, 90)
    assert {c.group for c in clinic.show(later).conflicts} >= {"blood", "identity"}
    assert len(clinic.group(later, "blood").entries) == 3
    seen = {g: v.full_sight for g, v in clinic.show(later).groups.items()}
    done = clinic.edit(later, "a", {"abo": "B", "name": "汪"}, 95, seen=seen, decides=True)
    assert not [c for c in clinic.show(done).conflicts if c.open]
    assert clinic.show(done).values["abo"] == "B"
    assert clinic.show(join_records(done, other)).values == clinic.show(done).values


def test_a_decision_does_not_cover_what_it_did_not_see():
    clinic = Clinic("patient")
    base = clinic.create(name="王")
    one, other, third = (clinic.edit(base, s, {"name": s}) for s in "bcd")
    laid = clinic.show(clinic.both_orders(base, one, other))
    seen = {g: v.full_sight for g, v in laid.groups.items()}
    met = join_records(join_records(one, other), third)
    done = clinic.edit(met, "a", {"name": "decided"}, seen=seen, decides=True)
    view = clinic.group(done, "identity")
    assert {e.values["name"] for e in view.entries} == {"decided", "d"} and view.conflict.open


def test_newest():
    clinic = Clinic("patient")
    base = clinic.create(phone="1")
    one = clinic.edit(base, "b", {"phone": "2"}, 1, role="superior", lane=E)
    other = clinic.edit(base, "c", {"phone": "3"}, 10, role="trainee")
    shown = clinic.show(clinic.both_orders(base, one, other))
    assert shown.values["phone"] == "3" and not shown.conflicts
    close = clinic.edit(base, "c", {"phone": "3"}, 3)
    (conflict,) = clinic.show(clinic.both_orders(base, one, close)).conflicts
    assert conflict.group == "phone" and conflict.open
    same = clinic.edit(base, "c", {"phone": "2"}, 3)
    assert not clinic.show(clinic.both_orders(base, one, same)).conflicts


def test_branches_are_kept_until_an_edit_that_has_them_before_it():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0")
    expert = clinic.edit(base, "b", {"content": "expert"}, role="consultant")
    doctor = clinic.edit(base, "c", {"content": "doctor"}, role="attending")
    record = clinic.both_orders(base, expert, doctor)
    (conflict,) = clinic.show(record).conflicts
    assert (conflict.rule, conflict.open, conflict.alarm) == ("role", False, "alarm")
    assert len(conflict.dots) == 2
    urgent = clinic.edit(base, "b", {"content": "expert"}, role="consultant", lane=E)
    record = clinic.both_orders(base, urgent, doctor)
    (conflict,) = clinic.show(record).conflicts
    assert conflict.open and clinic.show(record).values["content"] == "expert"
    after = clinic.edit(record, "b", {"content": "expert 2"}, 1, role="consultant", lane=E)
    view = clinic.group(after, "plan")
    assert {e.values["content"] for e in view.entries} == {"expert 2", "doctor"}
    assert view.conflict.open


def test_what_is_archived_beats_every_edit_and_is_said_to_be():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0", status="signed")
    one = clinic.edit(base, "b", {"status": "archived"}, role="trainee")
    other = clinic.edit(base, "c", {"content": "late"}, 60, role="superior", lane=E)
    shown = clinic.show(clinic.both_orders(base, one, other))
    assert shown.archived and shown.values["content"] == "0"
    assert shown.conflicts[0].rule == "archived" and not shown.conflicts[0].open
    assert not clinic.show(other).archived


def test_union_keeps_the_positive_and_asks_before_it_takes_out():
    clinic = Clinic("patient")
    base = clinic.create(allergies="无")
    one = clinic.edit(base, "b", {"allergies": "青霉素"})
    other = clinic.edit(base, "c", {"allergies": "无, 头孢"})
    record = clinic.both_orders(base, one, other)
    assert clinic.show(record).values["allergies"] == "头孢；青霉素"
    denied = clinic.edit(record, "b", {"allergies": "头孢"}, 1)
    again = clinic.both_orders(
        record, denied, clinic.edit(record, "c", {"allergies": "头孢；青霉素；虾"})
    )
    view = clinic.group(again, "allergies")
    assert view.values["allergies"] == "头孢；虾；青霉素"
    assert view.conflict.open and view.conflict.drops == ("青霉素",)
    seen = {"allergies": view.full_sight}
    decided = clinic.edit(again, "a", {"allergies": "头孢；虾"}, 2, seen=seen, decides=True)
    view = clinic.group(join_records(decided, one), "allergies")
    assert view.values["allergies"] == "头孢；虾" and not view.conflict


def test_a_late_form_does_not_take_out_what_it_never_showed():
    clinic = Clinic("treatment_plan")
    base = clinic.create(participants="D1")
    opened = {g: v.sight for g, v in clinic.show(base).groups.items()}
    record = clinic.edit(base, "a", {"participants": "D1,D2"})
    saved = clinic.edit(record, "a", {"participants": "D1,D3"}, seen=opened)
    view = clinic.group(saved, "participants")
    assert view.values["participants"] == "D1,D2,D3" and not view.conflict


def test_two_clients_of_one_store_are_concurrent_if_neither_saw_the_other():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0")
    opened = {g: v.sight for g, v in clinic.show(base).groups.items()}
    row = {column: None for column, group in clinic.table.group_of.items() if group == "plan"}
    first = clinic.edit(base, "a", row | {"content": "first"}, 1)
    second = clinic.edit(first, "a", row | {"content": "second"}, 2, seen=opened)
    view = clinic.group(second, "plan")
    assert {e.values["content"] for e in view.entries} == {"first", "second"}
    assert view.conflict.open and second.seen == {"a.1": 3}


def test_hold_both_shows_a_stop_at_once():
    clinic = Clinic("prescription")
    base = clinic.create(status="active", dose="1")
    stop = clinic.edit(base, "b", {"status": "stopped"}, role="trainee")
    dose = clinic.edit(base, "c", {"dose": "2"}, 60, role="superior", lane=E)
    shown = clinic.show(clinic.both_orders(base, stop, dose))
    assert (shown.values["status"], shown.values["dose"]) == ("stopped", "1")
    assert shown.conflicts[0].open and len(shown.conflicts[0].dots) == 2


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("arrived", "answered", "answered"),
        ("requested", "signed_off", "signed_off"),
        ("arrived", "arrived", "arrived"),
        (None, "arrived", "arrived"),
        ("arrived", "cancelled", None),
    ],
)
def test_states_go_forward(one, other, shown):
    clinic = Clinic("consultation")
    base = clinic.create(status="requested")
    left = clinic.edit(base, "b", {"status": one}, role="superior")
    right = clinic.edit(base, "c", {"status": other})
    view = clinic.group(clinic.both_orders(base, left, right), "status")
    if shown is None:
        assert view.conflict.open
    else:
        assert view.values["status"] == shown and not (view.conflict and view.conflict.open)


def test_immutable_and_owner():
    clinic = Clinic("patient")
    source = clinic.source(1, patient_id="M1", remarks="ours")
    edit = clinic.edit(source, "a", {"patient_id": "M2", "remarks": "mine"})
    view = clinic.group(edit, "number")
    assert view.values["patient_id"] == "M1" and view.conflict.open
    view = clinic.group(edit, "upkeep")
    assert view.values["remarks"] == "ours" and view.conflict is None
    assert {e.values["remarks"] for e in view.entries} == {"ours", "mine"}


# The hospital's own system, which learns of no edit.


def test_a_source_that_repeats_itself_undoes_no_edit():
    clinic = Clinic("patient")
    base = clinic.source(1, 0, phone="1", name="王")
    edit = clinic.edit(base, "a", {"phone": "2"}, 1)
    again = clinic.source(2, 60, phone="1", name="汪")
    for record in (join_records(edit, again), join_records(again, edit)):
        shown = clinic.show(record)
        assert (shown.values["phone"], shown.values["name"]) == ("2", "汪")
        assert not shown.conflicts
    news = clinic.show(join_records(edit, clinic.source(3, 60, phone="3", name="汪")))
    assert news.values["phone"] in ("2", "3") and news.conflicts[0].open


def test_whichever_rows_of_the_source_a_store_met_it_holds_the_same():
    clinic = Clinic("patient")
    rows = [clinic.source(n, n, phone=str(n)) for n in (1, 2, 3)]
    edit = clinic.edit(rows[0], "a", {"phone": "9"}, 1)
    held = set()
    for chosen in ([0, 1, 2], [2], [2, 1, 0], [0, 2, 2, 1]):
        record = edit
        for n in chosen:
            record = join_records(record, rows[n])
        held.add(record_to_json(record))
    assert len(held) == 1


# Deletions.


def test_a_deletion_against_a_change_is_a_persons_to_settle():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0")
    gone = clinic.edit(base, "b", {}, 60, deleted=True, role="superior", lane=E)
    kept = clinic.edit(base, "c", {"content": "1"})
    record = clinic.both_orders(base, gone, kept)
    shown = clinic.show(record)
    assert not shown.deleted and shown.values["content"] == "1"
    assert [c.group for c in shown.conflicts if c.open] == [ROW]
    assert clinic.show(clinic.edit(gone, "b", {}, 61, deleted=True)).deleted
    staff = Clinic("staff")
    base = staff.create(name="a")
    record = join_records(
        staff.edit(base, "b", {}, deleted=True), staff.edit(base, "c", {"name": "b"})
    )
    assert staff.show(record).deleted and not staff.show(record).conflicts[0].open


def test_nothing_old_brings_back_what_was_deleted_nor_what_was_forgotten():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0", participants="D1")
    gone = clinic.edit(base, "b", {}, deleted=True)
    left = forget(gone, "c.1", stamp(1))
    assert set(left.live) == {ROW} and len(record_to_json(left)) < 300
    for record in (gone, left):
        assert clinic.show(join_records(record, base)).deleted
        assert clinic.show(join_records(base, record)).deleted
    anew = clinic.edit(join_records(left, base), "a", {"content": "new"}, 2)
    assert anew.seen["a.1"] == 2
    shown = clinic.show(join_records(anew, gone))
    assert not shown.deleted and shown.values["content"] == "new"
    assert shown.values["participants"] is None


def test_when_content_may_go():
    clinic = Clinic("treatment_plan")
    base = clinic.create(content="0")
    gone = clinic.edit(base, "b", {}, 1, deleted=True)
    late = NOW + RULES.longest_outage_us + 2 * MINUTE
    heard = {"a": gone.seen, "c": gone.seen}

    def may(record, acknowledged=heard, now_us=late):
        return may_forget(record, clinic.table, RULES, acknowledged, now_us)

    assert may(gone)
    assert not may(base) and not may(UNSEEN)
    assert not may(gone, now_us=late - 2 * MINUTE)
    assert not may(gone, {"a": gone.seen, "c": {}})
    assert not may(gone, {"a": gone.seen, "c": base.seen})
    assert not may(forget(gone, "b.1", stamp(2)))
    disputed = join_records(gone, clinic.edit(base, "c", {"content": "1"}))
    assert not may(disputed, {})
    fed = Clinic("patient")
    row = fed.source(1, phone="1")
    assert not may_forget(fed.edit(row, "a", {}, deleted=True), fed.table, RULES, {}, late)
