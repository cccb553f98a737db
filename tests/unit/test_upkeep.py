"""Work that repeats beside the job: its share, what it tells, and how it ends."""

import logging
import queue
import threading
import time

import psycopg
from hypothesis import given
from hypothesis import strategies as st

from runners.upkeep import SHARE_MAX, Repeated, pause_s
from schemas.errors import StoreUnavailable

SOON_S = 10.0


@given(st.floats(0, 1e4), st.floats(0.01, 1e3))
def test_work_never_takes_more_than_its_share(took_s, every_s):
    rest_s = pause_s(took_s, every_s)
    assert rest_s >= every_s
    assert took_s / (took_s + rest_s) <= SHARE_MAX + 1e-9


def test_what_is_wrong_is_told_once_and_then_that_it_goes_on(caplog):
    outcomes = ["down", "down", StoreUnavailable("away"), psycopg.OperationalError("host"), "", ""]
    left, done = iter(outcomes), threading.Event()

    def work() -> str:
        one = next(left, None)
        if one is None:
            done.set()
            return ""
        if isinstance(one, Exception):
            raise one
        return one

    with (
        caplog.at_level(logging.WARNING, "runners.upkeep"),
        Repeated("quality", work, 0.001, threading.Lock()),
    ):
        assert done.wait(SOON_S)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "quality: down",
        "quality: away",
        "quality: OperationalError",  # A database's own words may quote a row.
        "quality: goes on",
    ]


def test_one_thing_is_done_at_a_time():
    gate, inside, overlaps = threading.Lock(), queue.Queue(1), []
    rounds = threading.Semaphore(0)

    def work() -> str:
        try:
            inside.put_nowait(None)
        except queue.Full:
            overlaps.append(1)
        time.sleep(0.002)
        inside.get_nowait()
        rounds.release()
        return ""

    with Repeated("a", work, 0.001, gate), Repeated("b", work, 0.001, gate):
        for _ in range(10):
            assert rounds.acquire(timeout=SOON_S)
    assert not overlaps


def test_stopping_does_not_wait_for_the_next_round():
    done = threading.Event()
    began = time.monotonic()
    with Repeated("slow", lambda: done.set() or "", 3600, threading.Lock()):
        assert done.wait(SOON_S)
    assert time.monotonic() - began < SOON_S
