"""Edits by clients are judged by the rules of quality and matched to persons, wherever made."""

import datetime
import random

import psycopg
import pytest

from pipelines.forget import forget_deleted
from schemas.batches import Lane, Op
from schemas.patient_matching import load_matching_rules
from schemas.positions import SEQ_END, START, Position
from schemas.quality_rules import load_quality_rules
from tests.canonical import rows_of
from tests.deliveries import batch_of
from tests.e2e.test_empi import World, human
from tests.edited_stores import PLAN, RULES, EditedStore, agree, config_of, settle
from tests.quality_cases import NOW, NOW_US, lab, row
from tests.store_rows import StoreRows
from transforms.deliver.edits.edit_schema import OWN_SESSION
from transforms.deliver.judging import check_store, link_persons
from transforms.deliver.store import Store

QUALITY, MATCHING = load_quality_rules(), load_matching_rules()
_DAY_US = 86_400_000_000
_HOUR_US = 3_600_000_000
_GARBLED = "寮犱笁寮犱笁寮犱笁"  # UTF-8 read as GBK.
_WHOLE_PLAN = {
    "patient_id": "P1",
    "author": "D1",
    "content": "观察",
    "written_at": NOW - datetime.timedelta(hours=1),
}
_numbers = iter(range(1_000))


class Judged(EditedStore):
    """A store that one campus feeds, whose edits are judged and matched."""

    def __init__(self, name: str, dsn: str):
        super().__init__(name, dsn)
        self.judge = psycopg.connect(dsn, autocommit=True)
        self.judge.execute(OWN_SESSION)
        self.rows = StoreRows(self.judge, name)
        self.rows.reach("main", 1)
        self.as_()

    def close(self) -> None:
        super().close()
        self.judge.close()

    def check(self, now_us: int = NOW_US, **more) -> check_store.Checked:
        return check_store.check_campus(self.judge, f"main>{self.name}", QUALITY, now_us, **more)

    def link(self, whole: bool = False) -> link_persons.Linked:
        return link_persons.link(self.judge, [f"main>{self.name}"], MATCHING, whole)

    def open(self) -> list[tuple]:
        """Record, rule and reason of the open alarms."""
        return [(a[2], a[5], a[7]) for a in check_store.open_alarms(self.judge)]

    def alarms(self) -> list[tuple]:
        """Every alarm that ever was: record, reason, whether settled."""
        query = (
            "SELECT record_id, reason, settled_at IS NOT NULL FROM sync.quality_alarm"
            " ORDER BY noted_at, settled_at IS NULL"
        )
        return self.judge.execute(query).fetchall()

    def restarted(self) -> None:
        """The store has another incarnation, as after a restart."""
        self.own.execute("UPDATE sync.store SET salt = salt + 1")


@pytest.fixture
def stores(postgres_server):
    number = next(_numbers)
    made = [
        Judged(name, postgres_server.create_database(f"judge_{number}_{name}"))
        for name in ("primary", "main")
    ]
    for store in made:
        store.check()  # The first one judges everything; from here on, what changed.
        store.link()
    yield made
    for store in made:
        store.close()


@pytest.fixture
def store(stores):
    return stores[0]


def garbled(record_id: str, what: str = "text_garbled_read_as_gbk") -> tuple:
    return (record_id, 30, what)


# Quality.


def test_an_edit_breaks_a_rule_and_another_one_mends_it(store):
    store.insert("p", **_WHOLE_PLAN)
    store.fold()
    done = store.check()
    assert (done.whole, done.patients, done.rows, done.found) == (False, 1, 1, 0)
    store.update("p", content=_GARBLED)
    store.fold()
    assert store.check().found == 1
    assert store.open() == [garbled("p")]
    (*_, version) = check_store.open_alarms(store.judge)[0]
    assert store.row("p", "version_vector::text") == (version,)
    again = store.check()
    assert (again.patients, again.rows, again.found, again.settled) == (0, 0, 0, 0)
    store.update("p", content="观察三天")
    store.fold()
    done = store.check()
    assert (done.found, done.settled, store.open()) == (0, 1, [])
    store.update("p", content=_GARBLED + "二")  # A newer version, so an alarm of its own.
    store.fold()
    store.check()
    assert store.alarms() == [("p", garbled("p")[2], True), ("p", garbled("p")[2], False)]


def test_each_version_that_is_odd_has_one_alarm(store):
    store.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    for i in range(3):
        store.fold()
        store.check()
        store.update("p", follow_up=f"tel. {i}")
    store.fold()
    store.check()
    assert store.open() == [garbled("p")]
    assert [settled for *_, settled in store.alarms()] == [True, True, True, False]


def test_a_sources_document_that_clients_break_and_mend(store):
    document = row("emr_document", content="正常")[1]
    store.rows.put("emr_document", "main", "d", **document)
    store.check()
    for content, alarms in ((_GARBLED, [garbled("d")]), ("正常", []), (_GARBLED, [garbled("d")])):
        store.update("d", "emr_document", content=content)
        store.fold()
        store.check(judge_rows=False)  # No delivery judges what a client wrote.
        assert store.open() == alarms


def test_an_edit_mends_what_the_source_broke(store):
    document = row("emr_document", content=_GARBLED)[1]
    store.rows.put("emr_document", "main", "d", **document)
    store.check()
    assert store.open() == [garbled("d")]
    store.update("d", "emr_document", content="正常")
    assert store.check().settled == 0  # Not folded yet, and nothing has moved.
    store.fold()
    assert (store.check().settled, store.open()) == (1, [])


def test_an_edit_of_one_row_makes_another_one_odd(store):
    store.rows.put("patient", "main", "1", **row("patient", allergies=None)[1])
    drug = row("prescription", drug_code="J01CA04", drug_name="阿莫西林胶囊")[1]
    store.rows.put("prescription", "main", "r", **drug)
    store.check()
    assert store.open() == []
    store.update("1", "patient", allergies="青霉素")
    store.fold()
    store.check()
    assert store.open() == [("r", 26, "drug_against_allergy")]


def test_a_notice_written_and_removed_by_a_client(store):
    """What is removed leaves no row: its patient is known from its history."""
    critical = lab("2823-3", "7.1", "mmol/L", critical=True, flag="HH", reported_at=NOW)[1]
    store.rows.put("lab_result", "main", "l", **critical)
    later = NOW_US + 2 * _HOUR_US
    unheard = [("l", 25, "critical_value_without_notice")]
    store.check(later)
    assert store.open() == unheard
    noted = row("emr_document", type="危急值报告", written_at=NOW)[1]
    store.insert("n", "emr_document", **noted)
    store.fold()
    store.check(later)
    assert store.open() == []
    store.delete("n", "emr_document")
    store.fold()
    assert store.row("n", "1", table="emr_document") is None
    store.check(later)
    assert store.open() == unheard


def test_what_is_removed_is_blamed_for_nothing(store):
    store.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    store.fold()
    store.check()
    assert store.open() == [garbled("p")]
    store.delete("p")
    store.fold()
    assert (store.check().settled, store.open()) == (1, [])


def test_edits_that_come_by_exchange_count(stores):
    a, b = stores
    b.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    settle(stores)
    for store in stores:
        store.check()
        assert store.open() == [garbled("p")]
    a.update("p", content="观察")
    settle(stores)
    for store in stores:
        assert store.check().settled == 1
        assert store.open() == []
    versions = [
        s.judge.execute("SELECT version FROM sync.quality_alarm").fetchall() for s in stores
    ]
    assert versions[0] == versions[1]  # An alarm is of the same version wherever it is raised.


def test_a_waiting_edit_that_loses_leaves_no_alarm(stores):
    """Both clients change a document; here it is judged before, there the other one stands."""
    a, b = stores
    for store in stores:
        store.rows.put("emr_document", "main", "d", **row("emr_document", content="文")[1])
    b.as_("D2", "superior", "emergency")
    b.update("d", "emr_document", content="正常")
    b.fold()
    a.as_("D1", "trainee", "routine")
    a.update("d", "emr_document", content=_GARBLED)
    a.check()
    assert a.open() == [garbled("d")]  # That is what the store shows.
    settle(stores)
    assert agree(stores) and a.row("d", "content", table="emr_document") == ("正常",)
    a.check()
    assert a.open() == []


def test_a_row_that_its_source_writes_again_after_an_edit(store):
    first = row("patient", phone="1")[1]
    link = Store(store.dsn, "main>primary", "main", None, lambda: 0)

    def deliver(lsn: int, **values) -> None:
        given = {"record_id": "7", "_op": Op.UPDATE, "_lsn": lsn, "_src_table": "his.patient"}
        begin = START if lsn == 10 else Position(lsn - 10, SEQ_END)
        batch = batch_of({"patient": rows_of("patient", [given | first | values])}, begin)
        assert link.apply([batch], Lane.ROUTINE).counts.delivered == 1

    store.judge.execute("DELETE FROM sync.progress")
    deliver(10)
    store.update("7", "patient", phone="2")
    store.fold()
    store.check()
    deliver(20, name=None)
    store.check()
    assert store.open() == [("7", 30, "required_field_missing")]
    store.update("7", "patient", phone="3")
    store.fold()
    store.check()
    assert [settled for *_, settled in store.alarms()] == [True, False]
    deliver(30)
    store.check()
    link.close()
    assert store.open() == [] and store.row("7", "phone", table="patient") == ("3",)


def test_after_a_restart_all_edits_are_judged_again(store):
    store.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    store.insert("q", **_WHOLE_PLAN)
    store.fold()
    store.check()
    before = store.alarms()
    store.restarted()
    done = store.check()
    assert (done.rows, done.found, done.settled) == (2, 0, 0)
    assert store.alarms() == before and store.check().rows == 0


def test_edits_of_a_store_that_went_back_are_judged(store):
    """Its count of changes begins below what was judged."""
    for i in range(5):
        store.insert(f"p{i}", **_WHOLE_PLAN)
    store.fold()
    store.check()
    store.link()
    with store.own.transaction():  # As tables that were restored by hand.
        store.own.execute(f"DELETE FROM consult.{PLAN}")
        store.own.execute("DELETE FROM sync.record")
        store.own.execute("UPDATE sync.store SET change = 0, salt = salt + 1")
    store.insert("q", **_WHOLE_PLAN | {"content": _GARBLED})
    store.fold()
    store.check()
    assert store.open() == [garbled("q")]


def test_forgetting_tombstones_confuses_nothing(stores, tmp_path):
    a, b = stores
    a.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    settle(stores)
    for store in stores:
        store.check()
    b.delete("p")
    settle(stores)
    a.check()  # The other one looks when all is forgotten.
    for store in stores:
        store.own.execute("UPDATE sync.store SET clock_offset_us = %s", (91 * _DAY_US,))
    config = config_of(tmp_path, {store.name: store.dsn for store in stores})
    assert forget_deleted(config, RULES) == 1
    settle(stores)
    for store in stores:
        store.check()
        assert store.open() == []
        store.restarted()
        done = store.check()
        assert (done.found, done.settled) == (0, 0)
    a.insert("p", **_WHOLE_PLAN | {"content": _GARBLED})
    settle(stores)
    for store in stores:
        store.check()
        assert store.open() == [garbled("p")]


@pytest.mark.parametrize("seed", range(3))
def test_judged_step_by_step_is_judged_at_once(stores, seed):
    """Random edits, here and from the other store: open alarms as a first look would raise them."""
    rng = random.Random(seed)
    records = [(PLAN, f"p{i}") for i in range(6)] + [("emr_document", f"d{i}") for i in range(6)]
    texts = ("文", _GARBLED, None)
    for store in stores:
        for i in range(3):
            store.rows.put("emr_document", "main", f"d{i}", **row("emr_document")[1])
    for _ in range(6):
        for _ in range(8):
            store, (table, name) = rng.choice(stores), rng.choice(records)
            values = {"content": rng.choice(texts), "author": rng.choice(["D1", None])}
            if store.row(name, "1", table=table) is None:
                store.insert(name, table, **_WHOLE_PLAN | values)
            elif store.row(name, "deleted", table=table) == (False,) and rng.random() < 0.2:
                store.delete(name, table)
            elif store.row(name, "deleted", table=table) == (False,):
                store.update(name, table, **values)
            if rng.random() < 0.3:
                store.check()
        for store in stores:
            store.fold()
        if rng.random() < 0.7:
            settle(stores)
        for store in stores:
            store.check()
            open_now = check_store.open_alarms(store.judge)
            with store.judge.transaction(force_rollback=True):
                store.judge.execute("TRUNCATE sync.quality_alarm, sync.quality_progress")
                store.check()
                fresh = check_store.open_alarms(store.judge)
            assert [a[:8] + a[9:] for a in sorted(open_now)] == [
                a[:8] + a[9:] for a in sorted(fresh)
            ]


# Persons.


def patient_world(store: Judged) -> World:
    """The patients of three campuses in a store that clients edit."""
    world = World(store.dsn)
    world.conn.execute(OWN_SESSION)
    world.conn.execute("TRUNCATE sync.person_progress")
    return world


def stepwise(world: World) -> link_persons.Linked:
    """Links what changed; the same must come of matching everything."""
    done = world.link()
    state = world.state()
    world.link(whole=True)
    assert world.state() == state
    return done


def test_an_edited_phone_links_and_unlinks_a_review(store):
    world = patient_world(store)
    world.put("main", "M1", id_no=None, birth_date=None)
    world.put("east", "E1", id_no=None, birth_date=None, phone="15400000009")
    stepwise(world)
    reviews = "SELECT count(*) FROM sync.person_review WHERE state = 'open'"
    for phone, expected in (("15400000009", 1), ("15400000008", 0), ("15400000009", 1)):
        store.update("rM1", "patient", phone=phone)
        store.fold()
        done = stepwise(world)
        assert (done.changed, done.whole) == (1, False)
        assert world.conn.execute(reviews).fetchone() == (expected,)
    assert stepwise(world).changed == 0
    world.conn.close()


def test_a_phone_that_became_a_households_by_edits_says_nothing(store):
    world = patient_world(store)
    for i, name in enumerate(("王一", "李二", "张三")):
        world.put("main", f"M{i}", id_no=None, name=name, phone=f"1540000001{i}")
    world.put("east", "E", id_no=None, name="王一", birth_date=None, phone="15400000010")
    stepwise(world)
    assert len(world.state()["reviews"]) == 1
    for i in (1, 2):
        store.update(f"rM{i}", "patient", phone="15400000010")
    store.fold()
    stepwise(world)
    assert world.state()["reviews"] == []
    world.conn.close()


@pytest.mark.parametrize("seed", range(4))
def test_matched_step_by_step_is_matched_at_once(stores, seed):
    """Phones edited at two stores, here and from the other, beside new patients and restarts."""
    rng = random.Random(seed)
    worlds = [patient_world(store) for store in stores]
    worlds[1].rows.store = "primary"
    campuses, phones = ("main", "east", "west"), [f"1540000002{i}" for i in range(4)] + [None]
    known: list[str] = []
    for _ in range(5):
        for _new in range(rng.randint(0, 3)):
            name = f"{len(known)}"
            who = {"name": rng.choice(["王一", "李二"]), "id_no": None, "birth_date": None}
            who |= {"phone": rng.choice(phones)}
            campus = rng.choice(campuses)
            for world in worlds:
                world.put(campus, name, **human(**who))
            known.append(f"r{name}")
        for _ in range(rng.randint(0, 4) if known else 0):
            store = rng.choice(stores)
            store.update(rng.choice(known), "patient", phone=rng.choice(phones))
            if rng.random() < 0.3:
                rng.choice(worlds).link()
        for store in stores:
            store.fold()
        if rng.random() < 0.6:
            settle(stores)
        if rng.random() < 0.2:
            rng.choice(stores).restarted()
            for store in stores:
                store.pullers.clear()
        for world in worlds:
            stepwise(world)
    settle(stores)
    for world in worlds:
        stepwise(world)
    assert agree(stores) and worlds[0].state() == worlds[1].state()
    for world in worlds:
        world.conn.close()
