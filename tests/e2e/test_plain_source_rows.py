"""A source's rows that meet edited records: joined as sets or one by one, it is the same."""

import datetime
import itertools
import os
import random
import re

import pyarrow as pa
import pytest

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.hlc import stamp_of
from schemas.siblings import ROW
from tests.both_ways import both_ways
from tests.canonical import COMMIT_US, rows_of
from tests.edited_stores import HOUR_US, PLAN, RULES, EditedStore, settle
from tests.store_rows import StoreRows
from transforms.deliver.edits.join_plain import NOT_PLAIN, PlainRows
from transforms.deliver.edits.join_source_rows import SourceRows, join_each
from transforms.deliver.merging.merge_wire import texts_of

SEEDS = int(os.environ.get("CAMPUS_SYNC_SEEDS", "4"))
_FROM_SOURCE = ("patient", "emr_document", "consultation")
_COLUMNS = {
    PLAN: ("title", "content", "status", "participants", "follow_up", "written_at"),
    "patient": ("phone", "allergies"),
    "emr_document": ("title", "content", "updated_at"),
    "consultation": ("opinion", "purpose", "consultant", "requested_at"),
}
_TEXTS = ("x", "A,B", "无", "文 \x1f", "\u2028", "", None)


def edit(store: EditedStore, rng: random.Random, i: int) -> None:
    """Anything a client may do to one of the records."""
    table = rng.choice(list(_COLUMNS))
    record_id, columns = f"{table[0]}{i}", _COLUMNS[table]
    store.as_(f"D{i}", rng.choice(["attending", "consultant", ""]),
              rng.choice(["routine", "routine", "emergency"]))  # fmt: skip
    values = {
        c: rng.choice(["2026-11-23 08:00:00.123456+08", "0099-01-01", "infinity", None])
        if c.endswith("_at") else rng.choice((*_TEXTS, "B,A", "A；无", " A"))
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
def pair(postgres_server):
    """Makes two stores, `primary` with rows of a source, whose clock is wrong by the parameter."""
    made = []

    def make(skew_us: int) -> list[EditedStore]:
        for name in ("primary", "main"):
            dsn = postgres_server.create_database(f"source_rows_{next(_numbers)}")
            made.append(EditedStore(name, dsn, skew_us if name == "primary" else 0))
        rows = StoreRows(made[0].own)
        for i in range(0, 40, 2):
            allergies = ("青霉素", "无", None)[i % 3]
            values = {"name": "名", "phone": "1", "birth_date": "1990-02-28"}
            rows.put("patient", "main", f"p{i}", allergies=allergies, **values)
            rows.put("emr_document", "main", f"e{i}", title="t\n", content="\u2028文 \x1f",
                     written_at="2026-11-23 08:00:00.000001+08")  # fmt: skip
        for i in range(30):  # Beside odd edits of few records the usual one of many.
            rows.put("patient", "main", f"q{i}", name="名", phone="1", allergies="无")
        return made

    yield make
    for store in made:
        store.close()


_numbers = itertools.count()


def rows_for(store: EditedStore, table: str, rng: random.Random, lsn: int) -> pa.RecordBatch:
    """Makes changes of edited records: what was said before, what is shown, and other things."""
    known = store.own.execute(
        "SELECT r.record_id, to_jsonb(t) FROM sync.record r LEFT JOIN"
        f" consult.{table} t USING (record_id, campus) WHERE r.table_name = %s ORDER BY 1",
        (table,),
    ).fetchall()
    schema = TABLES[table].arrow_schema
    texts = [c.name for c in TABLES[table].columns if schema.field(c.name).type == pa.utf8()]
    rows = []
    for i, (record_id, shown) in enumerate(
        rng.sample(known, k=rng.randint(len(known) // 2, len(known)))
    ):
        row = {"record_id": record_id, "_seq": i + 1, "_op": Op.UPDATE}
        row["_lsn"] = lsn if rng.random() < 0.9 else rng.randint(1, 2000)
        row |= store_said(store, table, record_id)
        for name in rng.sample(texts, rng.choice([0, 0, 1, 2])):
            row[name] = rng.choice(_TEXTS)
        for name in _COLUMNS[table]:
            if shown and name in texts and rng.random() < 0.05:
                row[name] = shown[name]
        odd = rng.random()
        if odd < 0.05:
            row["_op"] = Op.DELETE
        elif odd < 0.1:
            row["unchanged"] = [rng.choice(texts)]
        rows.append(row)
    return rows_of(table, rows)


def store_said(store: EditedStore, table: str, record_id: str) -> dict:
    """Returns what the source said last, as far as an edit of it is still there."""
    (record,) = store.own.execute(
        "SELECT record FROM sync.record WHERE record_id = %s AND table_name = %s",
        (record_id, table),
    ).fetchone()
    said = {}
    for one in (record or {"edits": []})["edits"]:
        for written in (of for group, of in one["wrote"].items() if group != ROW):
            of = written["values"] if one["dot"][0] == "@main" else written.get("base", [0, {}])[1]
            said |= {name: typed(value) for name, value in of.items()}
    return said


def typed(value):
    """Returns a JSON value as Arrow takes it: times, where they have a form there."""
    if isinstance(value, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T", value):
        return datetime.datetime.fromisoformat(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return datetime.date.fromisoformat(value)
    return None if value == "infinity" else value


@pytest.mark.parametrize("skew_us", [0, HOUR_US], ids=["right clocks", "a clock ahead"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_as_sets_or_one_by_one(pair, seed, skew_us):
    """`CAMPUS_SYNC_SEEDS=40 python -m pytest tests/e2e/test_plain_source_rows.py` tries more."""
    a, b = pair(skew_us)
    rng = random.Random(seed)
    plain = 0
    for round_ in range(4):
        for i in range(round_, 30, 3):
            a.update(f"q{i}", "patient", phone=rng.choice(("2", "3")))
        for i in range(60):
            edit(a if rng.random() < 0.8 else b, rng, i % 40)
        if rng.random() < 0.7:
            settle([a, b])
        for table in _FROM_SOURCE:
            rows = rows_for(a, table, rng, 5000 + round_ * 10)
            # Over an hour, so that time decides, too; and before what the store's clock says.
            us = COMMIT_US + rng.choice([-HOUR_US, 0, HOUR_US])
            hlcs = [stamp_of(us + i) for i in range(rows.num_rows)]
            values = [texts_of(rows[name]) for name in TABLES[table].by_name]
            plain += _judge(a, table, rows, hlcs, values)
    assert plain >= 15


def _judge(store: EditedStore, table: str, rows: pa.RecordBatch, hlcs: list, values: list) -> int:
    """Joins rows both ways; returns how many were plain."""
    declared, found = TABLES[table], []
    source = SourceRows(store.own, declared, "main")
    said = source.said(rows, hlcs, values)

    def as_sets() -> None:
        found.append(source.join(rows, hlcs, values))

    def each() -> None:
        with store.own.transaction():
            found.append(join_each(store.own, RULES, declared, "main", rows, said))

    with store.own.transaction(force_rollback=True):
        looked = PlainRows(store.own, RULES, declared, "main").look(said).tolist()
    both_ways(store, as_sets, each)
    sets, single = found
    assert sets == single
    assert all(one in (NOT_PLAIN, verdict) for one, verdict in zip(looked, sets, strict=True))
    return looked.count(1)
