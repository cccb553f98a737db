"""A spool's bounds: memory, then disk, then nothing more."""

import errno
import os

import pytest

from schemas.positions import Position
from schemas.wire import ChangeBatchCoder
from tests.deliveries import batch_of, lab_results
from transforms.capture.spool import Spool

BATCHES = [
    batch_of(
        {"lab_result": lab_results(100 * i, 100, lsn=1 + i)},
        begin=Position(i, 2**31 - 1),
    )
    for i in range(40)
]


@pytest.fixture
def spool(tmp_path):
    coder = ChangeBatchCoder()
    size = BATCHES[0].nbytes
    made = Spool(4 * size + size // 2, 6 * size, coder.encode, coder.decode, str(tmp_path))
    yield made
    made.close()


def fill(spool: Spool, batches: list) -> list:
    """Appends batches until the spool is full; returns those that it took."""
    kept = []
    for batch in batches:
        if spool.full:
            break
        spool.append(batch)
        kept.append(batch)
    return kept


def test_it_is_full_when_its_disk_is_and_never_much_beyond(spool):
    kept = fill(spool, BATCHES)
    size = BATCHES[0].nbytes
    assert 4 < len(kept) < len(BATCHES)
    assert spool.memory_bytes <= 4 * size + size // 2
    assert 6 * size <= spool.disk_bytes < 8 * size
    assert spool.held_rows == 100 * len(kept)
    assert [spool.take() for _ in kept] == kept


def test_it_has_room_again_once_something_is_acknowledged(spool):
    fill(spool, BATCHES)
    last = spool.held_rows // 100 - 1
    spool.acknowledge(BATCHES[last].end)
    assert not spool.full
    assert (spool.memory_bytes, spool.disk_bytes, spool.held_rows, spool.pending) == (0, 0, 0, 0)
    spool.append(BATCHES[last + 1])
    assert spool.memory_bytes
    assert spool.take() == BATCHES[last + 1]


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_makes_it_full_and_loses_nothing(
    spool, monkeypatch, caplog, refusal
):
    """Reading waits, told with its remedy; once the store has taken some, the disk is tried."""
    size, free = BATCHES[0].nbytes, [2.5 * BATCHES[0].nbytes]

    def pwrite(descriptor, data, offset, write=os.pwrite):
        if not free[0]:
            raise OSError(refusal, os.strerror(refusal))
        written = write(descriptor, data[: int(min(free[0], len(data)))], offset)
        free[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    kept = fill(spool, BATCHES)
    assert spool.full and 4 < len(kept) < 9
    assert spool.memory_bytes <= 5.5 * size
    spool.append(BATCHES[len(kept)])  # What was being read meanwhile.
    kept.append(BATCHES[len(kept)])
    assert "make room there" in caplog.text and len(caplog.records) == 1
    assert [spool.take() for _ in kept] == kept
    patient = BATCHES[0].tables["lab_result"]["patient_id"][0].as_py()
    pinned = spool.pin()
    found = spool.rows_of(pinned, {patient})["lab_result"]
    spool.unpin(pinned)
    assert sum(rows.num_rows for rows in found)
    free[0] = 1 << 30
    spool.acknowledge(kept[-1].end)
    assert not spool.full and spool.memory_bytes == spool.disk_bytes == 0
    fill(spool, BATCHES[len(kept) :])
    assert spool.disk_bytes >= 6 * size


def test_a_patients_rows_are_found_though_they_are_acknowledged_meanwhile(spool, monkeypatch):
    monkeypatch.setattr("transforms.capture.spool._SEGMENT_BYTES", 2 * BATCHES[0].nbytes)
    for batch in BATCHES[:9]:
        spool.append(batch)
    patient = BATCHES[6].tables["lab_result"]["patient_id"][3].as_py()
    expected = [
        rows
        for batch in BATCHES[:9]
        for rows in [batch.tables["lab_result"]]
        if patient in rows["patient_id"].to_pylist()
    ]
    pinned = spool.pin()
    opened = len(os.listdir("/proc/self/fd"))
    spool.acknowledge(BATCHES[8].end)
    assert len(os.listdir("/proc/self/fd")) == opened
    found = spool.rows_of(pinned, {patient})["lab_result"]
    assert len(found) == len(expected) > 0
    assert {part["patient_id"][0].as_py() for part in found} == {patient}
    spool.unpin(pinned)
    assert len(os.listdir("/proc/self/fd")) < opened
    assert spool.rows_of(spool.pin(), {patient}) == {}
