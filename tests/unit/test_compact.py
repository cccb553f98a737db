"""Compaction against a naive reading of the same changes, row by row."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Op
from schemas.entities import VISIT
from tests.canonical import rows_of
from transforms.deliver.merging.compact import compact, every_column

KEYS = ["a", "b", "c"]
COLUMNS = ["visit_no", "status", "triage_level"]
UNKNOWN = object()

change = st.fixed_dictionaries(
    {
        "op": st.sampled_from([Op.INSERT, Op.UPDATE, Op.UPDATE, Op.DELETE, Op.SNAPSHOT]),
        "key": st.sampled_from(KEYS),
        "prev": st.none() | st.sampled_from([*KEYS, "elsewhere"]),
        "unchanged": st.sets(st.sampled_from(COLUMNS)),
        "level": st.integers(1, 4),
    }
)


def rows_from(changes: list[dict]) -> pa.RecordBatch:
    rows = []
    for i, one in enumerate(changes):
        row = {"_op": int(one["op"]), "_lsn": 1 + i // 2, "_seq": i + 1, "record_id": one["key"]}
        if one["op"] is Op.UPDATE:
            row["unchanged"] = one["unchanged"]
            row["_prev_id"] = one["prev"]
        if one["op"] is not Op.DELETE:
            given_ = {"visit_no": f"v{i}", "status": f"s{i}", "triage_level": one["level"]}
            row |= {k: v for k, v in given_.items() if k not in row.get("unchanged", ())}
        rows.append(row)
    return rows_of("visit", rows)


def naive(changes: list[dict]) -> dict[str, tuple[dict, str]]:
    """Key to (values, record_id of the stored row that unknown ones are in)."""
    last: dict[str, tuple[dict, str]] = {}
    for i, one in enumerate(changes):
        full = {"visit_no": f"v{i}", "status": f"s{i}", "triage_level": one["level"]}
        missing = set()
        if one["op"] is Op.DELETE:
            missing = set(COLUMNS)
        elif one["op"] is Op.UPDATE:
            missing = one["unchanged"]
        rekeyed = one["op"] is Op.UPDATE and one["prev"] is not None
        origin = one["prev"] if rekeyed else one["key"]
        known, base = last.get(origin, (dict.fromkeys(COLUMNS, UNKNOWN), origin))
        values = {c: known[c] if c in missing else full[c] for c in COLUMNS}
        last[one["key"]] = (values, base)
    return last


@given(st.lists(change, max_size=12))
def test_as_read_row_by_row(changes):
    got = compact(VISIT, rows_from(changes))
    wanted = naive(changes)
    rows = got.rows.to_pylist()
    assert [row["record_id"] for row in rows] == sorted(wanted)
    assert got.superseded == len(changes) - len(wanted)
    assert got.duplicates == 0
    for row, base in zip(rows, got.base_id.to_pylist(), strict=True):
        values, origin = wanted[row["record_id"]]
        for column in COLUMNS:
            unknown = bool(row["_unchanged"] >> VISIT.index[column] & 1)
            assert unknown == (values[column] is UNKNOWN), column
            assert row[column] == (None if unknown else values[column])
        assert (base is None) == (row["_unchanged"] == 0)
        if any(values[column] is UNKNOWN for column in COLUMNS):
            assert base == origin


@given(st.lists(change, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(changes, chance):
    rows = rows_from(changes)
    order = list(range(len(changes)))
    chance.shuffle(order)
    assert compact(VISIT, rows.take(pa.array(order))).rows.equals(compact(VISIT, rows).rows)


def test_the_same_change_twice_is_a_duplicate():
    rows = rows_from([{"op": Op.INSERT, "key": "a", "level": 1}] * 1)
    got = compact(VISIT, pa.Table.from_batches([rows, rows]).combine_chunks().to_batches()[0])
    assert (got.rows.num_rows, got.superseded, got.duplicates) == (1, 0, 1)


def test_a_filled_row_loses_its_digest_and_a_whole_one_keeps_it():
    rows = rows_of(
        "visit",
        [
            {"record_id": "a", "status": "open", "_digest": bytes(32)},
            {"record_id": "b", "status": "open", "_digest": bytes(32)},
            {"record_id": "b", "_op": int(Op.UPDATE), "unchanged": ["status"]},
        ],
    )
    got = compact(VISIT, rows)
    assert got.rows["_digest"].is_null().to_pylist() == [False, True]
    assert got.rows["status"].to_pylist() == ["open", "open"]
    assert got.fresh.tolist() == [True, True]


def test_a_tombstone_keeps_what_came_before_it():
    first = {"record_id": "a", "status": "open", "bed": "7"}
    gone = {"record_id": "a", "_op": int(Op.DELETE), "patient_id": None}
    (row,) = compact(VISIT, rows_of("visit", [first, gone])).rows.to_pylist()
    assert (row["_op"], row["_unchanged"], row["bed"]) == (Op.DELETE, 0, "7")
    (row,) = compact(VISIT, rows_of("visit", [gone])).rows.to_pylist()
    assert row["_unchanged"] == every_column(VISIT)


def test_fresh_tells_what_the_first_change_of_a_key_was():
    def op(key: str, kind: Op, **more) -> dict:
        return {"record_id": key, "_op": int(kind), **more}

    rows = [
        op("new", Op.INSERT),
        op("new", Op.UPDATE),
        op("old", Op.UPDATE),
        op("moved", Op.UPDATE, _prev_id="was"),
        op("again", Op.DELETE),
        op("again", Op.INSERT),
    ]
    got = compact(VISIT, rows_of("visit", rows))
    fresh = dict(zip(got.rows["record_id"].to_pylist(), got.fresh.tolist(), strict=True))
    assert fresh == {"new": True, "old": False, "moved": True, "again": False}


def test_distinct_rows_come_back_as_they_are_but_in_key_order():
    rows = rows_of("visit", [{"record_id": key} for key in "bac"])
    got = compact(VISIT, rows)
    assert got.rows["record_id"].to_pylist() == ["a", "b", "c"]
    assert np.array_equal(got.rows["_seq"].to_numpy(), [2, 1, 3])
    assert got.base_id.null_count == 3
