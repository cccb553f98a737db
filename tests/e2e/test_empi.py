"""One patient across campuses on real PostgreSQL: linked, reviewed, parted, shown, step by step."""

import argparse
import base64
import collections
import concurrent.futures
import datetime
import json
import random

import psycopg
import pytest
import yaml

from pipelines import empi
from runners.patients import patients
from schemas.config import load
from schemas.errors import ConfigError
from schemas.patient_matching import load_matching_rules
from tests.faults.harness import until
from tests.population import CAMPUSES, batch_of, id_no, population
from tests.store_rows import StoreRows
from transforms.deliver import store_schema
from transforms.deliver.judging import link_persons
from transforms.deliver.judging.link_persons import Decision, link, pair_of
from transforms.match_patients import match

RULES = load_matching_rules()
BIRTH = datetime.date(1980, 5, 6)
LINKS = [f"{campus}>primary" for campus in CAMPUSES]
SECRET = "王秘密"


def human(**changes) -> dict:
    """A patient's row."""
    row = {"name": SECRET, "sex": "1", "birth_date": BIRTH, "phone": "15400000001"}
    return row | {"id_no": id_no(BIRTH, "1")} | changes


class World:
    """One store and what is in it."""

    def __init__(self, dsn: str):
        self.conn = psycopg.connect(dsn, autocommit=True)
        store_schema.ensure(self.conn)
        self.rows = StoreRows(self.conn)
        for campus in CAMPUSES:
            self.rows.reach(campus, 1)

    def put(self, campus: str, patient: str, deleted: bool = False, **changes) -> None:
        values = {"patient_id": patient, **human(**changes)}
        self.rows.put("patient", campus, f"r{patient}", deleted, **values)

    def link(self, whole: bool = False) -> link_persons.Linked:
        return link(self.conn, LINKS, RULES, whole)

    def decide(self, kind: str, one: tuple, other: tuple, us: int = 1) -> None:
        pair = pair_of(one, other)
        link_persons.put_decisions(self.conn, [Decision(kind, pair, "dr", "seen", us)])

    def groups(self) -> set[frozenset]:
        found = collections.defaultdict(set)
        for person, *record in self.conn.execute(
            "SELECT person_id, campus, patient_id FROM sync.person_record"
        ):
            found[person].add(tuple(record))
        return {frozenset(group) for group in found.values()}

    def state(self) -> dict[str, list]:
        """What must be the same however it came about."""
        return {
            "records": self.conn.execute(
                "SELECT campus, patient_id, person_id, own_id, excluded, keys"
                " FROM sync.person_record ORDER BY 1, 2"
            ).fetchall(),
            "links": self.conn.execute(
                "SELECT campus, patient_id, other_campus, other_patient_id, who, why, score,"
                " evidence FROM sync.person_link WHERE until IS NULL ORDER BY 1, 2, 3, 4"
            ).fetchall(),
            "reviews": self.conn.execute(
                "SELECT review_id, why, score, evidence FROM sync.person_review"
                " WHERE state = 'open' ORDER BY 1"
            ).fetchall(),
        }


@pytest.fixture
def world(database):
    made = World(database)
    yield made
    made.conn.close()


@pytest.fixture
def worlds(postgres_server, _database_numbers):
    made = [
        World(postgres_server.create_database(f"empi_{next(_database_numbers)}")) for _ in range(2)
    ]
    yield made
    for one in made:
        one.conn.close()


def test_link_review_and_new(world):
    world.put("main", "M1")
    world.put("east", "E1", phone=None)
    world.put("west", "W1", id_no=None)
    world.put("west", "W2", name="李另人", id_no=id_no(BIRTH, "1", 9), phone="15400000002")
    done = world.link()
    assert done.whole and (done.links, done.reviews) == (1, 2)
    assert world.groups() == {
        frozenset({("main", "M1"), ("east", "E1")}),
        frozenset({("west", "W1")}),
        frozenset({("west", "W2")}),
    }
    again = world.link()
    assert (again.changed, again.links, again.unlinks, again.moved, again.reviews) == (0,) * 5
    assert not again.whole
    (evidence,) = world.conn.execute("SELECT evidence FROM sync.person_link").fetchone()
    assert evidence == {
        "id_no": "equal", "name": "equal", "birth_date": "equal", "sex": "equal"
    }  # fmt: skip
    names = empi.person(world.conn, "west/W1").missing
    assert names["campuses_without_data"] == ["east", "main"]
    assert "patient" not in names["entities_lacking"] and "visit" in names["entities_lacking"]
    assert names["campuses_late"] == list(CAMPUSES)


def test_what_a_person_decides_stays(world):
    """An unlink is kept against the rules, against a third record, and can be taken back."""
    a, b, c = ("east", "E1"), ("main", "M1"), ("west", "W1")
    for campus, patient in (a, b):
        world.put(campus, patient)
    world.link()
    person = empi.person(world.conn, "main/M1").person_id
    world.decide("unlink", a, b)
    assert world.link().unlinks == 1
    assert world.groups() == {frozenset({a}), frozenset({b})}
    world.put("main", "M1", phone="15400000009")
    world.link()
    assert len(world.groups()) == 2
    world.put(*c)  # It would join both: it joins one, the other waits for a person.
    done = world.link()
    assert done.held == 1
    assert world.groups() == {frozenset({a, c}), frozenset({b})}
    (review,) = empi.open_reviews(world.conn)
    assert (review.why, review.pair) == ("held", (*b, *c))
    assert empi.person(world.conn, person).person_id == person  # E1's, the smallest.
    world.decide("link", a, b, us=2)
    world.link()
    assert world.groups() == {frozenset({a, b, c})}
    assert empi.open_reviews(world.conn) == []
    past = world.conn.execute(
        "SELECT patient_id, why FROM sync.person_past ORDER BY until, patient_id"
    ).fetchall()
    assert past == [("M1", "regrouped"), ("M1", "regrouped"), ("W1", "regrouped")][: len(past)]
    ended = "SELECT count(*) FROM sync.person_link WHERE until IS NOT NULL"
    assert world.conn.execute(ended).fetchone() == (1,)
    world.link(whole=True)
    assert world.groups() == {frozenset({a, b, c})}


def test_a_decision_that_comes_while_it_works_is_left_for_the_next_run(world, database):
    a, b = ("main", "M1"), ("east", "E1")
    world.put(*a)
    world.put(*b)
    assert world.link().links == 1
    world.put("main", "M2", name="某某", phone="15400000002", id_no=None)
    asks = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    with (
        psycopg.connect(database) as guard,
        psycopg.connect(database, autocommit=True) as other,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        guard.execute("LOCK TABLE sync.person_past")  # Wanted after it has read the decisions.
        working = pool.submit(world.link)
        pid = world.conn.info.backend_pid
        until(lambda: other.execute(asks, [pid]).rowcount, 30, "the run's wait")
        link_persons.put_decisions(other, [Decision("unlink", pair_of(a, b), "dr", "seen", 1)])
        guard.rollback()
        assert working.result(30).unlinks == 0
    assert world.link().unlinks == 1
    assert {frozenset({a}), frozenset({b})} < world.groups()


def test_a_person_keeps_the_earlier_id_as_another_name(world):
    world.put("main", "M1")
    world.link()
    before = empi.person(world.conn, "main/M1").person_id
    world.put("east", "E1")
    world.link()
    found = empi.person(world.conn, before)
    assert found.person_id != before
    assert found.person_id == empi.person(world.conn, "main/M1").person_id
    world.put("east", "E1", deleted=True)
    world.link()
    assert empi.person(world.conn, found.person_id).person_id == before
    assert empi.person(world.conn, before).person_id == before


def test_changes_and_deletes_undo_links(world):
    world.put("main", "M1")
    world.put("east", "E1")
    world.link()
    assert len(world.groups()) == 1
    world.put("east", "E1", birth_date=datetime.date(1980, 5, 7))
    assert world.link().unlinks == 1
    assert [review.why for review in empi.open_reviews(world.conn)] == ["similar"]
    world.put("east", "E1")
    assert world.link().links == 1 and empi.open_reviews(world.conn) == []
    world.put("east", "E1", deleted=True)
    assert world.link().unlinks == 1
    assert world.groups() == {frozenset({("main", "M1")})}
    world.rows.put("patient", "main", "rM1", **human(), patient_id="M2")  # A new number.
    world.link()
    assert world.groups() == {frozenset({("main", "M2")})}


def test_a_phone_that_becomes_a_households_is_no_evidence_any_more(world):
    lost = {"name": "王?密"}
    world.put("main", "M1")
    world.put("east", "E1", **lost)
    assert world.link().links == 1  # The phone makes up for the lost character.
    for i, name in enumerate(("张一", "张二", "张三")):
        world.put("west", f"W{i}", name=name, id_no=None, birth_date=datetime.date(1950, 1, i + 1))
    done = world.link()
    assert done.unlinks == 1 and not done.whole
    state = world.state()
    world.link(whole=True)
    assert world.state() == state
    for i in range(3):
        world.put("west", f"W{i}", deleted=True)
    assert world.link().links == 1


@pytest.mark.parametrize("seed", range(6))
def test_in_whatever_order_every_store_finds_the_same(worlds, seed):
    """Records come singly and in batches, change, go, and people decide: both stores agree, and
    with matching everything at once."""
    rng = random.Random(seed)
    drawn = population(150, seed).rows()
    keys = [(row["campus"], row["patient_id"]) for row in drawn]
    decisions = []
    for i in range(30):
        one, other = rng.sample(keys, 2) if i % 3 else _similar(drawn, rng)
        kind = "link" if i % 2 else "unlink"
        decisions.append(Decision(kind, pair_of(one, other), "dr", "seen", i))
    for world in worlds:
        _live_through(world, drawn, decisions, random.Random(rng.random()))
    first, second = (world.state() for world in worlds)
    for part in first:
        assert first[part] == second[part], f"seed {seed}: {part}"
    assert worlds[0].link(whole=True).moved == 0
    assert worlds[0].state() == first, f"seed {seed}"
    stand: dict = {}
    for one in sorted(decisions, key=lambda one: (one.decided_us, one.decision_id)):
        stand[one.pair] = one.kind
    linked, apart = (
        [(pair[:2], pair[2:]) for pair, kind in stand.items() if kind == wanted]
        for wanted in ("link", "unlink")
    )
    matched = match(RULES, batch_of(drawn), linked, apart)
    f = matched.features
    by_number = collections.defaultdict(set)
    for i, key in enumerate(zip(f.campus.to_pylist(), f.patient_id.to_pylist(), strict=True)):
        by_number[int(matched.person[i])].add(key)
    assert worlds[0].groups() == {frozenset(group) for group in by_number.values()}


def _similar(rows: list[dict], rng: random.Random) -> tuple:
    one = rng.choice(rows)
    others = [
        row
        for row in rows
        if row is not one and row["birth_date"] == one["birth_date"] and one["birth_date"]
    ]
    other = rng.choice(others or [row for row in rows if row is not one])
    return tuple((row["campus"], row["patient_id"]) for row in (one, other))


def _live_through(world: World, rows: list[dict], decisions: list, rng: random.Random) -> None:
    """Lets rows and decisions come to a store in an order of its own, with detours."""
    rows, decisions = list(rows), list(decisions)
    rng.shuffle(rows)
    rng.shuffle(decisions)
    while rows or decisions:
        for _ in range(rng.randint(1, 60)):
            if rows and rng.random() < 0.9:
                row = dict(rows.pop())
                campus, patient = row.pop("campus"), row.pop("patient_id")
                if rng.random() < 0.1:  # First as somebody else, or gone for a while.
                    world.put(campus, patient, deleted=rng.random() < 0.5)
                    world.link() if rng.random() < 0.3 else None
                world.rows.put("patient", campus, f"r{patient}", patient_id=patient, **row)
            elif decisions:
                link_persons.put_decisions(world.conn, [decisions.pop()])
        world.link(whole=rng.random() < 0.1)
    world.link()


def test_replayed_and_snapshotted_rows_are_met(world):
    """Rows that come late with an old position are not passed over."""
    world.put("main", "M1")
    world.put("main", "M2", name="别人", id_no=None, phone=None)
    world.link()
    old = human() | {"patient_id": "E1"}
    world.rows.reach("east", 5000)
    world.link()
    world.rows.put("patient", "east", "rE1", **old)
    world.rows.reach("east", 5000)
    assert world.link().changed == 0
    world.conn.execute(
        "INSERT INTO sync.dead_letter (letter_id, link, lane, src_table, lsn, seq, op,"
        " committed_at, reason, column_name, key_id, sealed, state, replayed_at) VALUES ('x',"
        " 'east>primary', 'routine', 't', 1000, 1, 'I', now(), 'r', 'c', 'k', '', 'replayed',"
        " clock_timestamp())"
    )
    assert world.link().links == 1


def test_twenty_thousand_records_and_a_morning_of_changes(world):
    """The measured population: no wrong link in a store either, and small runs stay small."""
    drawn = population(3000, 5)
    for campus in CAMPUSES:
        rows = [row for row in drawn.rows() if row["campus"] == campus]
        many = [{"record_id": f"r{row['patient_id']}", **row} for row in rows]
        world.rows.put_many("patient", campus, many)
    world.link()
    for members in world.groups():
        assert len({drawn.person_of[key] for key in members}) == 1
    for row in drawn.rows()[:50]:
        row["phone"] = "15499999999"
        changed = {name: value for name, value in row.items() if name != "campus"}
        world.rows.put("patient", row["campus"], f"r{row['patient_id']}", **changed)
    done = world.link()
    assert done.changed == 50 and done.matched < 600 and not done.whole
    state = world.state()
    world.link(whole=True)
    assert world.state() == state


# The verb.


@pytest.fixture
def campus_file(tmp_path, worlds, postgres_server):
    """Two stores that three campuses feed, of which only the stores are there."""
    (tmp_path / "key").write_text(base64.b64encode(bytes(range(32))).decode())
    (tmp_path / "key").chmod(0o600)
    dsns = [world.conn.info.dsn for world in worlds]
    source = {"kind": "postgresql", "mapping": "postgresql_his"}
    content = {
        "version": 1,
        "sources": {c: source | {"dsn": f"postgresql://x@127.0.0.1:1/{c}"} for c in CAMPUSES},
        "stores": {"primary": {"dsn": dsns[0]}, "main": {"dsn": dsns[1]}},
        "dead_letter_key": "file:key",
    }
    path = tmp_path / "campuses.yaml"
    path.write_text(yaml.safe_dump(content))
    worlds[1].rows.store = "main"
    for campus in CAMPUSES:
        worlds[1].rows.reach(campus, 1)
    return path


def run(path, action: str, *what: str, **more) -> int:
    given = {"who": "dr.li", "why": None, "reveal": False, "json": False} | more
    return patients(argparse.Namespace(config=path, action=action, what=list(what), **given))


def test_review_decide_and_show(campus_file, worlds, capsys):
    for world in worlds:
        world.put("main", "M1")
        world.put("east", "E1", id_no=None)
    assert run(campus_file, "match") == 0
    capsys.readouterr()
    assert run(campus_file, "review", json=True) == 0
    (review,) = json.loads(capsys.readouterr().out)["reviews"]
    assert review["evidence"]["name"] == "equal"
    assert run(campus_file, "review") == 0
    assert "1 pairs wait" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="needs a reason"):
        run(campus_file, "link", review["id"])
    assert run(campus_file, "link", review["id"][:8], why="asked the patient") == 0
    for world in worlds:
        assert world.groups() == {frozenset({("main", "M1"), ("east", "E1")})}
        row = world.conn.execute("SELECT who, why FROM sync.person_link WHERE until IS NULL")
        assert row.fetchone() == ("dr.li", "asked the patient")
    capsys.readouterr()
    assert run(campus_file, "show", "main/M1") == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown and "15400000001" not in shown and "M1" not in shown
    assert "no data from: west" in shown and "by dr.li" in shown
    assert run(campus_file, "unlink", "main/M1", why="another one") == 0
    for world in worlds:
        assert len(world.groups()) == 2
    with pytest.raises(ConfigError, match="person of its own"):
        run(campus_file, "unlink", "main/M1", why="again")


def test_reveal_needs_the_key_and_a_guarded_output(campus_file, worlds, capsys):
    worlds[0].put("main", "M1")
    worlds[1].put("main", "M1")
    run(campus_file, "match")
    with pytest.raises(ConfigError, match="no terminal"):
        run(campus_file, "show", "main/M1", reveal=True)
    capsys.readouterr()
    assert run(campus_file, "show", "main/M1", reveal=True, json=True) == 0
    assert json.loads(capsys.readouterr().out)["identities"][0]["name"] == SECRET
    worlds[0].conn.execute(
        "INSERT INTO sync.dead_letter (letter_id, link, lane, src_table, lsn, seq, op,"
        " committed_at, reason, column_name, key_id, sealed) VALUES ('x', 'l', 'routine', 't', 1,"
        " 1, 'I', now(), 'r', 'c', 'otherkey', '')"
    )
    with pytest.raises(ConfigError, match="sealed nothing here"):
        run(campus_file, "show", "main/M1", reveal=True, json=True)
    (campus_file.parent / "key").unlink()
    with pytest.raises(ConfigError, match="no such key file"):
        run(campus_file, "show", "main/M1", reveal=True, json=True)


def test_a_store_that_was_away_learns_what_was_decided(campus_file, worlds):
    for world in worlds:
        world.put("main", "M1")
        world.put("east", "E1")
    run(campus_file, "match")
    worlds[0].decide("unlink", ("main", "M1"), ("east", "E1"))
    found = empi.link_stores(load(campus_file), RULES)
    assert [store.why for store in found] == ["", ""]
    for world in worlds:
        assert len(world.groups()) == 2
