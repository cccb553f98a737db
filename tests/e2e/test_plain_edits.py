"""What is folded and carried as sets is what would become of it record by record."""

import random

import psycopg
import pytest

from schemas.batches import Lane
from schemas.siblings import record_from_json
from tests.edited_stores import HOUR_US, PLAN, RULES, EditedStore, agree, settle
from tests.store_rows import StoreRows
from transforms.conflicts.join import join_records
from transforms.deliver.edits.carry_records import Carrier
from transforms.deliver.edits.exchange_records import FOLD_ROWS, Puller
from transforms.deliver.edits.fold_plain import fold_plain
from transforms.deliver.edits.hold_records import Key, Records, pending_keys

_TEXTS = ("x", "诊 断\t\"'\\", "A,B", "B,A", "无", "none", " A ", "A；B", "", "é\x7f", "%{1}", None)
# All that a store holds of edits, but in which order and when it did what.
_HELD = (
    "SELECT record_id, table_name, campus, src_table, seen, record, urgent FROM sync.record",
    "SELECT record_id, table_name, campus, actor, counter, edit FROM sync.version",
    "SELECT id, rule, alarm, assignee, versions, state FROM sync.conflict",
    "SELECT link, kind, detail, state FROM sync.incident",
    "SELECT id FROM sync.edit",
    "SELECT change, distrusted FROM sync.store",
    "SELECT count(DISTINCT change), max(change) FROM sync.record",
)
_COLUMNS = {
    PLAN: ("title", "content", "status", "participants", "follow_up", "written_at"),
    "patient": ("phone", "allergies"),
    "emr_document": ("title", "content", "updated_at"),
    "consultation": ("opinion", "purpose", "consultant", "requested_at"),
}


def state(store: EditedStore) -> dict[str, list]:
    queries = [*_HELD, *(f"SELECT to_jsonb(t) FROM consult.{name} t" for name in _COLUMNS)]
    return {query: sorted(store.own.execute(query).fetchall(), key=str) for query in queries}


def same(one: dict[str, list], other: dict[str, list]) -> None:
    for query, rows in one.items():
        assert rows == other[query], query


def one_by_one(store: EditedStore) -> None:
    Records(store.own, RULES).update(pending_keys(store.own, FOLD_ROWS))


def pull_one_by_one(store: EditedStore, peer: EditedStore) -> None:
    rows = peer.own.execute(
        "SELECT table_name, campus, record_id, src_table, record::text FROM sync.record"
        " WHERE record IS NOT NULL ORDER BY change"
    ).fetchall()
    records = {Key(*row[:3]): record_from_json(row[4]) for row in rows}
    sources = {Key(*row[:3]): row[3] for row in rows}
    Records(store.own, RULES).update(
        records, lambda key, record: join_records(record, records[key]), sources
    )


def edit(store: EditedStore, rng: random.Random, i: int) -> None:
    """Anything a client may do to one of the records."""
    table = rng.choice(list(_COLUMNS))
    record_id, columns = f"{table[0]}{i}", _COLUMNS[table]
    store.as_(f"D{i}", rng.choice(["attending", "consultant", ""]),
              rng.choice(["routine", "routine", "emergency"]))  # fmt: skip
    store.client.execute("SELECT set_config('campus_sync.reason', %s, false)", (f"why {i % 3}",))
    values = {
        c: rng.choice(["2026-11-23 08:00:00.123456+08", "0099-01-01", "infinity", None])
        if c.endswith("_at") else rng.choice(_TEXTS)
        for c in rng.sample(columns, rng.randint(1, min(2, len(columns))))
    }  # fmt: skip
    there = store.row(record_id, "deleted", table=table)
    if there is None and table != "patient":
        store.insert(record_id, table, **values, patient_id="P")
    elif there == (False,) and values.get("status") is None:
        if rng.random() < 0.1 and table != "patient":
            store.delete(record_id, table)
        else:
            store.update(record_id, table, **values)


@pytest.fixture
def pair(postgres_server, request):
    """Makes two stores, `primary` with rows of a source, whose clock is wrong by the parameter."""
    made = []

    def make(skew_us: int) -> list[EditedStore]:
        for name in ("primary", "main"):
            dsn = postgres_server.create_database(f"plain_{next(_numbers)}")
            made.append(EditedStore(name, dsn, skew_us if name == "primary" else 0))
            rows = StoreRows(made[-1].own)
            for i in range(0, 40, 2):
                values = {"name": "名", "phone": "1", "birth_date": "1990-02-28"}
                allergies = ("青霉素", "无", None)[i % 3]
                rows.put("patient", "main", f"p{i}", allergies=allergies, **values)
                rows.put("emr_document", "main", f"e{i}", title="t\n", content="\u2028文 \x1f",
                         written_at="2026-11-23 08:00:00.000001+08")  # fmt: skip
        return made

    yield make
    for store in made:
        store.close()


_numbers = iter(range(1_000))


@pytest.mark.parametrize("skew_us", [0, HOUR_US], ids=["right clocks", "a clock ahead"])
@pytest.mark.parametrize("seed", range(4))
def test_as_sets_or_one_by_one(pair, seed, skew_us):
    a, b = pair(skew_us)
    rng = random.Random(seed)
    plain = learned = 0
    for _ in range(3):
        for i in range(80):
            edit(a if rng.random() < 0.8 else b, rng, i % 40)
        for store in (a, b):
            with store.own.transaction(force_rollback=True):
                plain += len(fold_plain(store.own, RULES, pending_keys(store.own, FOLD_ROWS)))
                one_by_one(store)
                as_sets = state(store)
            one_by_one(store)
            same(as_sets, state(store))
        for store, peer in ((a, b), (b, a)):
            with store.own.transaction(force_rollback=True):
                learned += Puller(store.own, peer.own, RULES).pull().learned
                as_sets = state(store)
            pull_one_by_one(store, peer)
            same(as_sets, state(store))
    assert plain > 60 and learned > 60
    settle([a, b])
    records = "SELECT record_id, table_name, campus, record FROM sync.record ORDER BY 1, 2, 3"
    assert a.own.execute(records).fetchall() == b.own.execute(records).fetchall()


def test_most_of_what_is_usual_is_plain(pair):
    """Else the sets would be small: creating, changing, changing what a source wrote."""
    a, b = pair(0)
    for i in range(6):
        a.insert(f"n{i}", title="t", content="c", participants="D1,D2")
        a.update(f"p{2 * i}", "patient", phone="2")
    for _ in range(2):
        keys = pending_keys(a.own, FOLD_ROWS)
        with a.own.transaction():
            assert fold_plain(a.own, RULES, keys) == set(keys) and len(keys) == 12
        carrier = Carrier(b.own, a.own, RULES)
        with b.own.transaction():
            carrier.stage(Lane.ROUTINE, 0, 1_000, 1_000)
            taken = carrier.take(Lane.ROUTINE)
            assert (taken.learned, taken.to_join, taken.skipped) == (12, [], {})
        for i in range(6):
            a.update(f"n{i}", content="d")
            a.update(f"p{2 * i}", "patient", phone="3")
    with b.own.transaction():
        carrier.stage(Lane.ROUTINE, 0, 1_000, 1_000)
        assert carrier.take(Lane.ROUTINE).learned == 0


def test_what_a_client_holds_is_passed_over(pair):
    a, b = pair(0)
    a.insert("x", title="t")
    a.insert("y", title="t")
    with psycopg.connect(a.dsn) as other:
        other.execute(f"UPDATE consult.{PLAN} SET title = 'u' WHERE record_id = 'x'")
        with a.own.transaction():
            folded = fold_plain(a.own, RULES, pending_keys(a.own, FOLD_ROWS))
        assert folded == {Key(PLAN, "main", "y")}
    settle([a, b])
    assert agree([a, b]) and b.row("x", "title") == ("u",)


def test_what_waited_and_changed_meanwhile_is_staged_once(pair):
    a, b = pair(0)
    a.insert("x", title="t")
    settle([a, b])
    a.update("x", title="u")
    a.fold()
    puller = Puller(b.own, a.own, RULES)
    with psycopg.connect(b.dsn) as other:
        other.execute(f"SELECT FROM consult.{PLAN} WHERE record_id = 'x' FOR UPDATE")
        assert puller.pull().learned == 0
        a.update("x", title="v")
        a.insert("y", title="t")
        a.fold()
        assert puller.pull().learned == 1
    assert puller.pull().learned == 1
    assert b.row("x", "title") == ("v",) and puller.pull() == (0, 0, False)
