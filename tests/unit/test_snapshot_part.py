"""What is left of a snapshot: tables, and the key that one goes on behind."""

import io

import pytest
from rich.console import Console

from pipelines.sla_report import LinkView, View
from runners.status import render
from schemas.links import Limits
from schemas.positions import SEQ_END, Position
from schemas.reports import Health, Snapshot, State
from transforms.capture.resume import Known, Reason, can_resume, snapshot_reason
from transforms.capture.snapshot_part import WHOLE, Rest, SnapshotChanges, nothing_left

REST = Rest(900, frozenset({"his.a"}), "his.b", {"k": b"7", "n": "张".encode()})


def test_tables_that_are_left():
    assert REST.of(["his.a", "his.b", "his.c"]) == ["his.b", "his.c"]
    assert WHOLE.of(["his.a"]) == ["his.a"]


@pytest.mark.parametrize(
    ("table", "columns", "key"),
    [
        ("his.b", ["n", "k"], ("张".encode(), b"7")),
        ("his.b", ["k"], None),  # The primary key was changed: it begins anew.
        ("his.b", ["k", "n", "m"], None),
        ("his.b", [], None),
        ("his.c", ["k", "n"], None),
    ],
)
def test_a_table_goes_on_behind_a_key_of_its_order_only(table, columns, key):
    assert REST.after(table, columns) == key


def test_the_end_of_a_snapshot_of_which_nothing_is_left():
    end = nothing_left(50, REST)
    assert (end.begin, end.end) == (Position(50, 900), Position(50, SEQ_END))
    assert (end.captured, end.table, end.ended, end.last_seq) == (0, "", False, 900)


def test_a_part_ends_its_table_with_its_sweep():
    place = (Position(1, 1), Position(1, 2), 1, 0, {})
    assert SnapshotChanges(*place, sweeps=(("t", Position(1, 0)),), table="t").ended
    assert not SnapshotChanges(*place, table="t").ended


@pytest.mark.parametrize(
    ("changes", "resumes"),
    [
        ({}, True),
        ({"ledger": None}, True),  # Nothing of it has arrived yet.
        ({"confirmed_lsn": 51}, True),
        ({"confirmed_lsn": 52}, False),  # Somebody else read on.
        ({"slot_exists": False}, False),
        ({"slot_lost": True}, False),
        ({"missed": True}, False),
        ({"log_end_lsn": 49}, False),
        ({"ledger": Position(50, SEQ_END)}, False),
        ({"snapshot_lsn": None}, False),
    ],
)
def test_when_it_is_gone_on_with(changes, resumes):
    base = {
        "ledger": Position(50, 7),
        "snapshot_lsn": 50,
        "slot_exists": True,
        "slot_lost": False,
        "confirmed_lsn": 51,
        "log_end_lsn": 500,
    }
    known = Known(**{**base, **changes})
    assert can_resume(known) is resumes
    if known.ledger == Position(50, 7) and known.log_end_lsn == 500 and known.snapshot_lsn:
        assert snapshot_reason(known) is Reason.INTERRUPTED  # Else it begins anew.


def test_a_throttled_batch_is_of_a_second_at_most():
    assert Limits().snapshot_batch_rows == Limits().batch_rows
    assert Limits(snapshot_rows_s=300).snapshot_batch_rows == 300
    assert Limits(batch_rows=100, snapshot_rows_s=300).snapshot_batch_rows == 100


def test_the_time_left():
    reading = Snapshot("a>b", "running", "first", 0, None, 250, 1000, 50.0)
    assert reading.seconds_left == 15
    assert Snapshot("a>b", "running", "first", 0, None, 250).seconds_left is None
    assert Snapshot("a>b", "running", "first", 0, None, 1200, 1000, 50.0).seconds_left == 0


def test_status_says_how_far_a_history_is_read():
    reading = Snapshot("a>b", "running", "first", 0, None, 1_500_000, 2_000_000, 12_500.0, 3)
    health = Health("a>b", State.BEHIND)
    view = View(0, (LinkView(health, {}, {}, 0, reading),), (), ())
    console = Console(width=200, file=io.StringIO())
    console.print(render(view))
    said = " ".join(console.file.getvalue().replace("\N{NARROW NO-BREAK SPACE}", "").split())
    assert (
        "a>b: reads history, 1500000 rows of about 2000000 (75.00 %), 12500 rows/s, 40 s left,"
        " gone on with 3 times"
    ) in said
