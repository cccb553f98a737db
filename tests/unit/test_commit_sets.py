"""What belongs together of a delivery's rows, who may be asked, and whose delivery it was."""

import collections
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from apache_beam.internal import pickler
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Lane, Op
from schemas.entities import TABLES
from schemas.links import LinkSettings, SetSettings
from tests.canonical import rows_of
from transforms.checksum import with_digests
from transforms.deliver.deliver import DeliverEmergency
from transforms.deliver.merging.outcomes import Outcome
from transforms.deliver.sets.claims import Brought, Claims
from transforms.deliver.sets.commit_sets import (
    commit_sets,
    keys_of,
    of_keys,
    row_set,
    writable,
)
from transforms.deliver.sets.source_sets import SourceSets, source_sets
from transforms.deliver.sets.write_sets import _pieces
from transforms.two_phase.writes import encode

KINDS = (("prescription",), ("lab_report", "lab_result"))


def tables_of(**rows: list[dict]) -> dict[str, pa.RecordBatch]:
    return {name: with_digests(TABLES[name], rows_of(name, some)) for name, some in rows.items()}


def members(sets) -> list[set[tuple[str, str]]]:
    """Returns (table, record_id) of each set, in their order."""
    found = collections.defaultdict(set)
    for name, rows in sets.tables.items():
        for number, key in zip(sets.numbers[name], rows["record_id"].to_pylist(), strict=True):
            found[int(number)].add((name, key))
    return [found[number] for number in range(sets.count)]


ROW = st.tuples(
    st.sampled_from(["prescription", "lab_report", "lab_result", "visit"]),
    st.integers(1, 4),
    st.sampled_from(["P1", "P2", None]),
    st.sampled_from([Op.INSERT, Op.SNAPSHOT, Op.DELETE]),
)


@given(st.lists(ROW, max_size=30), st.booleans())
def test_sets_are_commit_patient_and_kind(rows, by_commit):
    given_rows = collections.defaultdict(list)
    for i, (table, lsn, patient, op) in enumerate(rows):
        row = {"record_id": str(i), "_lsn": lsn, "_seq": i, "patient_id": patient, "_op": int(op)}
        given_rows[table].append(row)
    sets = commit_sets(tables_of(**given_rows), KINDS, by_commit)
    expected = collections.defaultdict(set)
    live = [
        (i, table, lsn if by_commit else 0, patient)
        for i, (table, lsn, patient, op) in enumerate(rows)
        if table != "visit" and op is not Op.SNAPSHOT
    ]
    kind_of = {name: kind for kind in KINDS for name in kind}
    glued = {(lsn, kind_of[table]) for _, table, lsn, patient in live if patient is None}
    for i, table, lsn, patient in live:
        who = None if (lsn, kind_of[table]) in glued else patient
        expected[lsn, kind_of[table], who].add((table, str(i)))
    assert sorted(map(sorted, members(sets))) == sorted(map(sorted, expected.values()))
    assert sets.rows_by_set().tolist() == [len(part) for part in members(sets)]
    half = sets.count // 2
    parts = [keys_of(sets.between(0, half)), keys_of(sets.between(half, sets.count))]
    assert parts == [
        sorted(key for part in members(sets)[:half] for key in part),
        sorted(key for part in members(sets)[half:] for key in part),
    ]


def test_rows_that_lean_on_the_store_and_deletions_behind_them_go_the_ordinary_way():
    sets = commit_sets(
        tables_of(
            prescription=[
                {"record_id": "a", "_lsn": 1},
                {"record_id": "b", "_lsn": 2, "_op": int(Op.UPDATE), "unchanged": ["drug_name"]},
                {"record_id": "c", "_lsn": 3},
                # The deletion of `b` keeps content that is still to come; `d` is of its commit.
                {"record_id": "b", "_lsn": 4, "_op": int(Op.DELETE), "patient_id": None},
                {"record_id": "d", "_lsn": 4},
                {"record_id": "c", "_lsn": 5, "_op": int(Op.DELETE), "patient_id": None},
                {"record_id": "e", "_lsn": 6, "dose": "1e3"},
            ]
        ),
        KINDS,
        True,
    )
    assert writable(sets).tolist() == [True, False, True, False, True, False]
    assert [len(part) for part in members(sets.chosen(writable(sets)))] == [1, 1, 1]


def test_the_newest_of_a_key_is_written_and_a_deletion_keeps_what_was_there():
    tables = tables_of(
        prescription=[
            {"record_id": "a", "_lsn": 1, "drug_name": "x"},
            {"record_id": "a", "_lsn": 2, "_op": int(Op.UPDATE), "drug_name": "y"},
            {"record_id": "b", "_lsn": 1, "drug_name": "z"},
            {"record_id": "b", "_lsn": 3, "_op": int(Op.DELETE)},
            {"record_id": "c", "_lsn": 3, "_op": int(Op.DELETE)},
        ]
    )
    whole, bare = encode([row_set("main", Lane.ROUTINE, tables)])
    assert [(r["record_id"], r["drug_name"], r["deleted"], r["lane"]) for r in whole.rows] == [
        ("a", "y", False, "R"),
        # It may have overtaken others: as a base it counts no more than an express copy.
        ("b", "z", True, "E"),
    ]
    assert whole.rows[1]["digest"]
    assert bare.bare and [row["record_id"] for row in bare.rows] == ["c"]
    assert keys_of(of_keys(tables, [("prescription", "a")])) == [("prescription", "a")]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [(0, 1)]),
        ([400, 600, 1], [(0, 2), (2, 3)]),
        ([1, 5000, 1], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_pieces_are_of_whole_sets(sizes, expected):
    assert list(_pieces(np.array(sizes, np.int64))) == expected


def test_what_was_brought_is_claimed_once_and_given_back_by_a_failure():
    rows = tables_of(prescription=[{"record_id": str(i), "_lsn": i} for i in range(4)])
    part = rows["prescription"]
    brought = Brought(rows_max=3)
    brought.note("prescription", part)
    outcomes = np.full(4, Outcome.DUPLICATE, np.uint8)
    claims, other = Claims(brought), Claims(brought)
    with pytest.raises(ZeroDivisionError), claims:
        assert claims.delivered("prescription", part, outcomes).tolist() == [1, 0, 0, 0]
        raise ZeroDivisionError
    with claims:
        assert claims.delivered("prescription", part, outcomes).tolist() == [1, 0, 0, 0]
    brought.note("prescription", part)  # Written again, by the other lane.
    with other:
        assert other.delivered("prescription", part, outcomes).tolist()[1:] == [1, 1, 1]


def test_a_worker_gets_what_it_needs_and_no_connection():
    sets = SetSettings(KINDS, True, 5.0, "host=a", (("primary", "host=a"), ("east", "host=b")))
    settings = LinkSettings("main>east", "main", "east", *[""] * 7, sets=sets)
    fn = pickler.loads(pickler.dumps(DeliverEmergency(settings)._fn))
    assert fn._settings == settings
    assert source_sets(fn._settings) is source_sets(settings)
    assert source_sets(settings) is not source_sets(dataclasses.replace(settings, source="west"))


def test_who_gave_no_answer_is_left_alone_for_a_while_that_grows():
    now = 0.0
    shared = SourceSets(monotonic=lambda: now)
    pauses = []
    for _ in range(6):
        shared.note("east", "no answer")
        began = now
        while shared.down():
            now += 0.25
        pauses.append(now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    shared.note("east", "no answer")
    shared.note("east")
    assert shared.down() == {}
