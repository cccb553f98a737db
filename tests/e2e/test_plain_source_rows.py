"""A source's rows that meet edited records: joined as sets or one by one, it is the same."""

import datetime
import os
import random
import re

import pyarrow as pa
import pytest

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.hlc import stamp_of
from schemas.siblings import ROW
from tests.canonical import COMMIT_US, rows_of
from tests.e2e.test_plain_edits import _COLUMNS, edit, pair, same, state  # noqa: F401
from tests.edited_stores import HOUR_US, RULES, EditedStore, settle
from tests.store_rows import StoreRows
from transforms.deliver.edits.join_plain import NOT_PLAIN, PlainRows
from transforms.deliver.edits.join_source_rows import SourceRows, join_each
from transforms.deliver.merging.merge_wire import texts_of

SEEDS = int(os.environ.get("CAMPUS_SYNC_SEEDS", "4"))
_FROM_SOURCE = ("patient", "emr_document", "consultation")
_TEXTS = ("x", "A,B", "无", "文 \x1f", "\u2028", "", None)


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


def arguments(table: str, rows: pa.RecordBatch) -> tuple:
    hlcs = [stamp_of(us) for us in rows["_commit_us"].to_pylist()]
    return rows, hlcs, [texts_of(rows[name]) for name in TABLES[table].by_name]


@pytest.mark.parametrize("skew_us", [0, HOUR_US], ids=["right clocks", "a clock ahead"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_as_sets_or_one_by_one(pair, seed, skew_us):  # noqa: F811
    a, b = pair(skew_us)
    rng = random.Random(seed)
    plain = 0
    usual = StoreRows(a.own)
    for i in range(30):  # Beside odd edits of few records the usual one of many.
        usual.put("patient", "main", f"q{i}", name="名", phone="1", allergies="无")
    for round_ in range(4):
        for i in range(round_, 30, 3):
            a.update(f"q{i}", "patient", phone=rng.choice(("2", "3")))
        for i in range(60):
            edit(a if rng.random() < 0.8 else b, rng, i % 40)
        if rng.random() < 0.7:
            settle([a, b])
        for table in _FROM_SOURCE:
            # Over an hour, so that time decides, too; and before what the store's clock says.
            us = COMMIT_US + rng.choice([-HOUR_US, 0, HOUR_US])
            rows = rows_for(a, table, rng, 5000 + round_ * 10)
            place = rows.schema.get_field_index("_commit_us")
            times = pa.array([us + i for i in range(rows.num_rows)], pa.int64())
            rows = rows.set_column(place, rows.schema.field(place), times)
            source = SourceRows(a.own, TABLES[table], "main")
            given = arguments(table, rows)
            with a.own.transaction(force_rollback=True):
                verdicts = source.join(*given)
                as_sets = state(a)
            said = source.said(*given)
            with a.own.transaction(force_rollback=True):
                looked = PlainRows(a.own, RULES, TABLES[table], "main").look(said)
                plain += int((looked == 1).sum())
                assert all(
                    one in (NOT_PLAIN, verdict)
                    for one, verdict in zip(looked.tolist(), verdicts, strict=True)
                )
            with a.own.transaction():
                each = join_each(a.own, RULES, TABLES[table], "main", rows, said)
            assert verdicts == each
            same(as_sets, state(a))
    assert plain >= 15
