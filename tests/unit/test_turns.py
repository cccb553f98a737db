"""Small work takes turns; large work, and work that may wait, holds up nobody."""

import contextlib
import threading

import pytest

from transforms.turns import SMALL_ROWS, turn

SOON_S = 0.2


def passes(rows: int, waits: bool) -> bool:
    """Whether such work goes on while another thread has its turn."""
    done = threading.Event()

    def work():
        with turn(rows, waits):
            done.set()

    thread = threading.Thread(target=work)
    with turn(1):
        thread.start()
        passed = done.wait(SOON_S)
    thread.join()
    assert done.is_set()
    return passed


@pytest.mark.parametrize(
    ("rows", "waits", "passed"),
    [(1, False, False), (SMALL_ROWS, False, False), (SMALL_ROWS + 1, False, True), (1, True, True)],
)
def test_who_waits_for_a_turn(rows, waits, passed):
    assert passes(rows, waits) is passed


def test_a_turn_ends_with_an_error():
    with contextlib.suppress(ValueError), turn(1):
        raise ValueError
    with turn(1):
        pass
