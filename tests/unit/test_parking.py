"""Batches that stay in their worker: found by their ticket there, and nowhere else."""

import dataclasses

import pytest

from schemas.batches import ChangeBatch, Lane
from schemas.errors import SealBrokenError
from schemas.positions import SEQ_END, START, Position
from schemas.wire import ChangeBatchCoder, seal, verify
from tests.canonical import rows_of
from transforms.parking import Parking

CODER = ChangeBatchCoder()
LINK = "main>primary"


def batch(lsn: int = 5, lane: Lane = Lane.ROUTINE) -> ChangeBatch:
    rows = rows_of("patient", [{"name": "王小东"}, {"name": "李雷"}])
    begin = Position(lsn - 1, SEQ_END) if lsn > 1 else START
    return ChangeBatch(LINK, lane, begin, Position(lsn, SEQ_END), 2, 11, 10, 12, {"patient": rows})


def travelled(stub: ChangeBatch) -> ChangeBatch:
    return CODER.decode(CODER.encode(stub))


def test_a_stub_stands_for_its_batch_and_carries_no_row():
    parking, whole = Parking(b"a" * 16), batch()
    stub = travelled(parking.park(whole))
    verify(stub)
    assert (stub.rows, stub.nbytes, stub.captured) == (whole.rows, whole.nbytes, whole.captured)
    assert (stub.link, stub.lane, stub.begin, stub.end) == (
        whole.link, whole.lane, whole.begin, whole.end
    )  # fmt: skip
    assert "王小东".encode() not in CODER.encode(stub)
    claimed = parking.claim(stub)
    assert claimed.tables is whole.tables
    parking.verify(claimed)
    assert parking.claim(stub) is claimed


def test_a_batch_by_value_passes_through():
    parking, whole = Parking(b"a" * 16), seal(batch())
    assert parking.claim(whole) is whole
    parking.verify(whole)
    with pytest.raises(SealBrokenError):
        parking.verify(dataclasses.replace(whole, captured=3))


def test_another_process_claims_nothing():
    stub = Parking(b"a" * 16).park(batch())
    assert Parking(b"b" * 16).claim(stub) is None


def test_neither_a_stub_nor_a_foreign_token_is_sound():
    here, there = Parking(b"a" * 16), Parking(b"b" * 16)
    stub = here.park(batch())
    for unsound in (stub, there.claim(there.park(batch()))):
        with pytest.raises(SealBrokenError):
            here.verify(unsound)


def test_what_the_ledger_holds_is_let_go_of_in_its_own_lane():
    parking = Parking(b"a" * 16)
    stubs = [parking.park(batch(lsn)) for lsn in (1, 2, 3)]
    urgent = parking.park(batch(1, Lane.EMERGENCY))
    parking.release(LINK, Lane.ROUTINE, Position(2, SEQ_END))
    assert [parking.claim(stub) is None for stub in stubs] == [True, True, False]
    assert parking.claim(urgent) is not None
    parking.clear(LINK, Lane.ROUTINE)
    assert parking.claim(stubs[2]) is None
