"""A spool's bounds: memory, then disk, then nothing more."""

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


def test_it_is_full_when_its_disk_is_and_never_much_beyond(spool):
    kept = []
    for batch in BATCHES:
        if spool.full:
            break
        spool.append(batch)
        kept.append(batch)
    size = BATCHES[0].nbytes
    assert 4 < len(kept) < len(BATCHES)
    assert spool.memory_bytes <= 4 * size + size // 2
    assert 6 * size <= spool.disk_bytes < 8 * size
    assert spool.held_rows == 100 * len(kept)
    assert [spool.take() for _ in kept] == kept


def test_it_has_room_again_once_something_is_acknowledged(spool):
    for batch in BATCHES:
        if spool.full:
            break
        spool.append(batch)
    last = spool.held_rows // 100 - 1
    spool.acknowledge(BATCHES[last].end)
    assert not spool.full
    assert (spool.memory_bytes, spool.disk_bytes, spool.held_rows, spool.pending) == (0, 0, 0, 0)
    spool.append(BATCHES[last + 1])
    assert spool.memory_bytes
    assert spool.take() == BATCHES[last + 1]
