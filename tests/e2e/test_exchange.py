"""Edits at two and three real stores: carried, joined, agreed upon, in any order and shape."""

import concurrent.futures
import contextlib
import itertools
import random
import shutil
import subprocess
import threading
import time

import psycopg
import pytest

from runners.exchange import Exchange
from schemas.batches import Lane, Op
from schemas.conflict_policy import DEFAULT_PATH, load_conflict_rules
from schemas.positions import SEQ_END, START, Position
from tests.canonical import rows_of
from tests.deliveries import batch_of
from tests.edited_stores import (
    HOUR_US,
    PLAN,
    RULES,
    EditedStore,
    agree,
    config_of,
    settle,
)
from tests.faults.harness import until
from transforms.deliver.edits.exchange_records import Puller
from transforms.deliver.edits.hold_records import PASSING
from transforms.deliver.edits.open_store import open_store
from transforms.deliver.store import Store

RING = ((0, 1), (1, 2), (2, 0))
CHAIN = ((0, 1), (1, 0), (1, 2), (2, 1))
MESH = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))


@pytest.fixture
def stores(postgres_server, request):
    """Three stores in one server; the parameter is how wrong their clocks are."""
    skews = getattr(request, "param", (0, 0, 0))
    number = next(_numbers)
    made = [
        EditedStore(name, postgres_server.create_database(f"exchange_{number}_{name}"), skew)
        for name, skew in zip(("primary", "main", "east"), skews, strict=False)
    ]
    yield made
    for store in made:
        store.close()


_numbers = iter(range(1_000))


@pytest.mark.parametrize("pairs", [RING, CHAIN, MESH], ids=["ring", "chain", "mesh"])
def test_an_edit_reaches_all_and_nothing_echoes(stores, pairs):
    stores[0].insert("p", title="t", participants="A")
    settle(stores, pairs)
    assert agree(stores)
    assert [store.row("p", "title", "participants") for store in stores] == [("t", "A")] * 3
    numbers = [store.own.execute("SELECT change FROM sync.store").fetchone() for store in stores]
    assert numbers == [(1,)] * 3
    assert settle(stores, pairs) == 1


@pytest.mark.parametrize(
    "exchange",
    [["primary<>main", "main<>east"], ["primary>main", "main>east", "east>primary"]],
    ids=["chain", "ring"],
)
def test_edits_go_the_ways_that_the_configuration_names(stores, tmp_path, exchange):
    config = config_of(tmp_path, {store.name: store.dsn for store in stores})
    config = config.model_copy(update={"exchange": tuple(exchange)})
    stores[0].insert("p", title="t")
    stores[2].insert("q", title="u")
    with Exchange(config):
        until(lambda: all(s.row("p", "1") and s.row("q", "1") for s in stores), 20, "all have both")
    asked = {
        (store.name, peer)
        for store in stores
        for (peer,) in store.own.execute("SELECT peer FROM sync.exchange")
    }
    assert asked == set(config.exchange_pairs())


@pytest.mark.parametrize("stores", [(0, HOUR_US, -HOUR_US)], indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_stores_that_were_cut_off_agree_in_any_order(stores, seed):
    rng = random.Random(seed)
    for i in range(8):
        stores[0].insert(f"p{i}", title="t", content="0", participants="A", follow_up="1")
    settle(stores)
    for step in range(60):
        store, name = rng.choice(stores), f"p{rng.randrange(8)}"
        store.as_(f"D{step}", rng.choice(["attending", "consultant", "trainee"]),
                  rng.choice(["routine", "routine", "emergency"]))  # fmt: skip
        kind = rng.random()
        if kind < 0.1:
            store.delete(name)
        elif store.row(name, "1") is None:
            with contextlib.suppress(psycopg.errors.RaiseException):
                store.insert(name, title=f"again {step}")
        else:
            column = rng.choice(["content", "participants", "follow_up"])
            store.update(name, **{column: f"A,{step}" if column == "participants" else str(step)})
        if rng.random() < 0.5:
            store.fold()
        if rng.random() < 0.2:
            a, b = rng.sample(stores, 2)
            b.fold()
            a.pull(b)
    settle(stores, rng.choice([RING, CHAIN, MESH]))
    assert agree(stores), f"seed {seed}"
    assert stores[0].open_conflicts() == stores[1].open_conflicts() > 0


def test_both_versions_stay_and_a_rule_or_a_person_decides(stores):
    a, b, _ = stores
    a.insert("p", title="t", content="0")
    settle(stores)
    a.as_("C1", "consultant", "emergency")
    b.as_("D1", "attending", "routine")
    a.update("p", content="from a")
    b.update("p", content="from b")
    settle(stores)
    assert agree(stores)
    rows = a.own.execute("SELECT state, rule, assignee, versions FROM sync.conflict").fetchall()
    assert rows == [("open", "person", "attending", 2)]
    incidents = "SELECT kind, state FROM sync.incident WHERE kind = 'conflict'"
    assert b.own.execute(incidents).fetchall() == [("conflict", "open")]
    kept = (
        "SELECT edit #>> '{wrote,plan,values,content}' FROM sync.version"
        " WHERE edit -> 'wrote' ? 'plan'"
    )
    for store in stores:
        assert {"0", "from a", "from b"} >= {r[0] for r in store.own.execute(kept)} >= {"from b"}


def test_a_distrusted_clock_is_told_and_does_not_drag_others(stores):
    a, b, _ = stores
    a.own.execute("UPDATE sync.store SET clock_offset_us = %s", (2 * HOUR_US,))
    a.insert("p", title="t")
    settle(stores)
    (told,) = b.own.execute("SELECT link FROM sync.incident").fetchone()
    assert told.startswith("primary.")
    b.insert("q", title="t")
    ahead = "SELECT hlc FROM consult.treatment_plan WHERE record_id = %s"
    settle(stores)
    hlc_a, hlc_b = (a.own.execute(ahead, (name,)).fetchone()[0] for name in "pq")
    assert hlc_a - hlc_b > (HOUR_US // 1000) << 16
    settle(stores)
    assert agree(stores)


def test_a_client_that_holds_a_row_holds_up_no_other(stores):
    a, b, _ = stores
    for name in ("p", "q", "r"):
        a.insert(name, title="t")
    settle(stores)
    with psycopg.connect(b.dsn) as idle:
        idle.execute(f"UPDATE consult.{PLAN} SET title = 'mine' WHERE record_id = 'p'")
        for name in ("p", "q", "r"):
            a.update(name, follow_up="2")
        a.fold()
        assert b.pull(a) == 2
        assert b.row("r", "follow_up") == ("2",)
        cursor = "SELECT change FROM sync.exchange WHERE peer = 'primary' AND lane = 'routine'"
        held = b.own.execute(cursor).fetchone()[0]
        assert held == a.own.execute("SELECT change FROM sync.store").fetchone()[0] - 3
    assert b.pull(a) == 1
    settle(stores)
    assert agree(stores)
    assert a.row("p", "title", "follow_up") == ("mine", "2")


def test_both_lanes_can_be_seen_and_urgent_edits_overtake(stores):
    a, b, _ = stores
    for i in range(30):
        a.insert(f"p{i}", title="t")
    a.as_("D1", "attending", "emergency")
    a.insert("urgent", title="t")
    a.fold()
    puller = Puller(b.own, a.own, RULES)
    first = puller.pull(rows=5)
    assert first.behind and b.row("urgent", "lane") == ("E",)
    while puller.pull(rows=5).behind:
        pass
    rows = b.own.execute(
        "SELECT lane, received, learned, lag_us_max > 0 FROM sync.exchange ORDER BY lane"
    ).fetchall()
    assert rows == [("emergency", 1, 1, True), ("routine", 30, 30, True)]


# A hospital's own rows.


def delivered(store: EditedStore, *changes: tuple[int, Op, dict], known: bool = False) -> None:
    link = Store(store.dsn, "main>primary", "main", None, lambda: 0)
    for lsn, op, values in changes:
        row = {"record_id": "77", "_op": op, "_lsn": lsn, "_src_table": "his.patient", **values}
        rows = rows_of("patient", [row])
        begin = START if lsn == 10 else Position(lsn - 10, SEQ_END)
        receipt = link.apply([batch_of({"patient": rows}, begin)], Lane.ROUTINE)
        counts = receipt.counts
        assert counts.balanced and (counts.duplicates if known else counts.delivered) == 1
    link.close()


FIRST = (10, Op.INSERT, {"patient_id": "77", "name": "n", "phone": "1", "allergies": "青霉素"})
SECOND = (20, Op.UPDATE, {"patient_id": "77", "name": "m", "phone": "1", "allergies": "青霉素"})
THIRD = (30, Op.DELETE, {})


@pytest.mark.parametrize("edit_first", [True, False], ids=["edit first", "source first"])
def test_a_sources_row_and_an_edit_in_both_orders(stores, edit_first):
    a, b, _ = stores
    for store in (a, b):
        delivered(store, FIRST)
    if not edit_first:
        delivered(a, SECOND)
    a.as_("D1", "attending")
    a.update("77", table="patient", phone="2", allergies="青霉素；花粉")
    if edit_first:
        delivered(a, SECOND)
    settle(stores)
    delivered(b, SECOND, known=True)  # It has come from another store.
    settle(stores)
    assert agree(stores)
    for store in stores:
        row = store.row("77", "name", "phone", "allergies", "src_lsn", table="patient")
        assert row == ("m", "2", "花粉；青霉素", 20)
    assert not a.open_conflicts()


def test_the_source_repeats_a_value_that_was_edited_and_then_has_its_own(stores):
    a, b, _ = stores
    delivered(a, FIRST)
    a.update("77", table="patient", phone="2")
    delivered(a, SECOND)  # Says the old number again, as whole rows do.
    a.fold()
    assert a.row("77", "phone", table="patient") == ("2",)
    (now_us,) = a.own.execute("SELECT sync.wall_us()").fetchone()
    third = {**SECOND[2], "phone": "3", "_commit_us": now_us}
    delivered(a, (30, Op.UPDATE, third))
    settle(stores)
    assert a.open_conflicts() == b.open_conflicts() == 1  # Two phones, and no clock decides.
    assert agree(stores)


def test_a_source_that_deletes_an_edited_row_leaves_it_in_sight_until_a_person_decides(stores):
    a, b, _ = stores
    delivered(a, FIRST)
    delivered(b, FIRST, SECOND)
    a.update("77", table="patient", phone="2")
    a.fold()
    delivered(b, THIRD)
    settle(stores)
    assert agree(stores)
    for store in stores:
        assert store.row("77", "deleted", "phone", table="patient") == (False, "2")
        assert store.open_conflicts() >= 1


def test_a_link_joins_rows_by_the_policies_that_its_store_is_open_with(stores, tmp_path):
    """Its worker has no file of them: here a phone is the source's own, whoever edits it."""
    a = stores[0]
    text = DEFAULT_PATH.read_text()
    own = "kind: owner, columns: [phone]"
    (tmp_path / "ours.yaml").write_text(
        text.replace("kind: newest, by: [time], columns: [phone]", own)
    )
    ours = load_conflict_rules(tmp_path / "ours.yaml")
    delivered(a, FIRST)
    a.update("77", table="patient", phone="2")
    a.fold()
    open_store(a.own, "primary", ours)
    delivered(a, (20, Op.UPDATE, {**FIRST[2], "phone": "3"}))
    assert a.row("77", "phone", table="patient") == ("3",)


# Backups.


def test_a_store_that_went_back_to_its_backup_gets_its_edits_again(stores, postgres_server):
    a, b, _ = stores
    a.insert("p", title="1")
    settle(stores)
    name = a.own.info.dbname
    copy = f"{name}_copy"
    for store in stores:
        store.pullers.clear()
    a.close()
    with postgres_server.connect() as admin:
        admin.execute(f"CREATE DATABASE {copy} TEMPLATE {name}")
    again = EditedStore("primary", a.dsn)
    again.update("p", title="2")
    again.insert("q", title="new")
    settle([again, b])
    again.update("p", title="lost with the disk")
    actor = next(iter(again.record("q").seen))
    again.close()
    b.pullers.clear()
    restored = EditedStore("primary", postgres_server.dsn(copy))
    assert restored.row("p", "title") == ("1",)
    restored.insert("r", title="after")  # Its first edit since: under another actor.
    restored.update("p", follow_up="3")
    stores[0] = restored
    settle(stores)
    assert agree(stores)
    for store in stores:
        assert store.row("p", "title", "follow_up") == ("2", "3")
        assert store.row("q", "title") == ("new",)
        assert store.row("r", "title") == ("after",)
    assert next(iter(restored.record("r").seen)) != actor


def test_a_restored_data_directory_is_another_incarnation(make_server, tmp_path):
    server = make_server("primary")
    other = make_server("main")
    dsn = server.create_database("consult")
    a, b = EditedStore("primary", dsn), EditedStore("main", other.create_database("consult"))
    a.insert("p", title="1")
    settle([a, b])
    before = a.client.execute("SELECT sync.incarnation()").fetchone()
    a.close()
    server.stop()
    backup = tmp_path / "backup"
    subprocess.run(["cp", "-a", server.data, backup], check=True)
    server.start()
    b.pullers.clear()
    a = EditedStore("primary", server.dsn("consult"))
    for i in range(5):
        a.update("p", title=f"after the backup {i}")
        a.insert(f"n{i}", title="n")
    settle([a, b])
    a.close()
    server.stop("immediate")
    shutil.rmtree(server.data)
    shutil.move(backup, server.data)
    server.start()
    a = EditedStore("primary", server.dsn("consult"))
    assert a.client.execute("SELECT sync.incarnation()").fetchone() != before
    for i in range(5):  # The same count of edits as were lost, and other ones.
        a.insert(f"m{i}", title="m")
    a.update("p", follow_up="x")
    b.pullers.clear()
    settle([a, b])
    assert agree([a, b])
    assert a.row("p", "title", "follow_up") == ("after the backup 4", "x")
    counts = "SELECT count(*) FROM consult.treatment_plan"
    assert a.own.execute(counts).fetchone() == b.own.execute(counts).fetchone() == (11,)
    a.close()
    b.close()


def test_clients_and_a_link_at_the_same_rows_at_once(stores):
    """Neither waits for ever, nothing is lost, and every change of the source is counted once."""
    a, b, _ = stores
    ids = [str(i) for i in range(12)]

    def batch(lsn: int, op: Op = Op.UPDATE):
        rows = [
            {"record_id": i, "_op": op, "_lsn": lsn, "_seq": n + 1, "name": f"n{lsn}", "phone": "0"}
            for n, i in enumerate(ids)
        ]
        begin = START if lsn == 10 else Position(lsn - 1, SEQ_END)
        return batch_of({"patient": rows_of("patient", rows)}, begin)

    link = Store(a.dsn, "main>primary", "main", None, lambda: 0)
    link.apply([batch(10, Op.INSERT)], Lane.ROUTINE)
    stopping = threading.Event()
    added: dict[str, set[str]] = {i: set() for i in ids}

    def edit() -> None:
        with psycopg.connect(a.dsn, autocommit=True) as client:
            for n in itertools.count():
                if stopping.is_set():
                    return
                name = ids[n * 5 % len(ids)]
                client.execute(
                    "UPDATE consult.patient SET allergies = concat_ws('；', allergies, %s::text)"
                    " WHERE record_id = %s",
                    (f"a{n}", name),
                )
                added[name].add(f"a{n}")
                time.sleep(0.02)

    def exchange() -> None:
        while not stopping.is_set():
            with contextlib.suppress(*PASSING):
                a.fold()
                b.pull(a)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = [pool.submit(edit), pool.submit(exchange)]
        for lsn in range(11, 26):
            receipt = link.apply([batch(lsn)], Lane.ROUTINE)
            assert receipt.counts.balanced and receipt.counts.captured == len(ids)
        stopping.set()
        for one in work:
            one.result(30)
    link.close()
    settle(stores)
    assert agree(stores)
    assert sum(map(len, added.values())) > 12
    for store in stores:
        for name in ids:
            row = store.row(name, "name", "allergies", "src_lsn", table="patient")
            assert row[0] == "n25" and row[2] == 25
            assert set((row[1] or "").split("；")) - {""} == added[name]


def test_a_value_that_the_log_left_out_is_what_the_source_said_last(stores):
    a, b, _ = stores
    delivered(a, FIRST)
    a.update("77", table="patient", phone="2", allergies="青霉素；花粉")
    delivered(a, (20, Op.UPDATE, {"name": "m", "unchanged": ("phone", "allergies", "abo")}))
    settle(stores)
    assert agree(stores)
    assert b.row("77", "name", "phone", "allergies", table="patient") == ("m", "2", "花粉；青霉素")
    assert not b.open_conflicts()


def test_what_a_snapshot_did_not_find_is_a_deletion_among_versions(stores):
    a, b, _ = stores
    delivered(a, FIRST)
    a.update("77", table="patient", phone="2")
    link = Store(a.dsn, "main>primary", "main", None, lambda: 0)
    sweeps = (("his.patient", Position(50, 0)),)
    end = batch_of({}, Position(10, SEQ_END), Position(50, SEQ_END), sweeps=sweeps)
    receipt = link.apply([end], Lane.ROUTINE)
    link.close()
    assert receipt.counts.balanced
    settle(stores)
    assert agree(stores)
    assert b.row("77", "deleted", "phone", table="patient") == (False, "2")
    assert b.open_conflicts() >= 1
