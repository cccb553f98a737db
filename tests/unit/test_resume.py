"""Every pair of what a ledger and a slot may say."""

import pytest

from schemas.positions import SEQ_END, Position
from transforms.capture.resume import Known, Reason, SourceRewound, snapshot_reason

LEDGER = Position(100, SEQ_END)


def known(**changes) -> Known:
    base = {
        "ledger": LEDGER,
        "snapshot_lsn": 50,
        "slot_exists": True,
        "slot_lost": False,
        "confirmed_lsn": 101,
        "log_end_lsn": 500,
    }
    return Known(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"confirmed_lsn": 60}, None),
        ({"snapshot_lsn": None}, None),
        ({"ledger": None}, Reason.FIRST),
        ({"ledger": None, "slot_exists": False, "confirmed_lsn": 0}, Reason.FIRST),
        ({"slot_exists": False, "confirmed_lsn": 0}, Reason.SLOT_MISSING),
        ({"slot_lost": True}, Reason.SLOT_INVALIDATED),
        ({"confirmed_lsn": 102}, Reason.LEDGER_BEHIND),
        ({"new_tables": True}, Reason.NEW_TABLES),
        ({"snapshot_lsn": 100}, None),
        ({"snapshot_lsn": 100, "ledger": Position(100, 7)}, Reason.INTERRUPTED),
        ({"snapshot_lsn": 101, "slot_exists": False}, Reason.INTERRUPTED),
        # Inside a transaction the slot may be confirmed up to its commit, not past it.
        ({"ledger": Position(100, 7), "confirmed_lsn": 100}, None),
        ({"ledger": Position(100, 7), "confirmed_lsn": 101}, Reason.LEDGER_BEHIND),
    ],
)
def test_reason(changes, reason):
    assert snapshot_reason(known(**changes)) is reason


def test_a_source_behind_its_ledger_is_refused():
    with pytest.raises(SourceRewound):
        snapshot_reason(known(log_end_lsn=99))
