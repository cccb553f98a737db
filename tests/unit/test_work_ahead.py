"""Working ahead: each batch once, in order, and each outcome with its own pane."""

import threading

import numpy as np
import pytest

from schemas.batches import ChangeBatch, Lane
from schemas.positions import SEQ_END, START, Position
from schemas.receipts import Counts, Receipt
from transforms.deliver.work_ahead import Outcome, WorkAhead
from transforms.parking import Parking

LINK = "main>primary"
NONE = np.empty(0, np.int64)


def end_of(i: int) -> Position:
    return Position(i, SEQ_END) if i else START


class Ledger:
    """Applies what joins on to what it has, as a store does; tells when it has come so far."""

    def __init__(self, count: int, most: int = 8):
        self._parking = Parking(b"a" * 16)
        self.stubs = [
            self._parking.park(
                ChangeBatch(LINK, Lane.ROUTINE, end_of(i), end_of(i + 1), 0, 0, 0, 0, {})
            )
            for i in range(count)
        ]
        self.applied: list[Position] = []
        self.down = self.broken = False
        self._moved = threading.Condition()
        self.work = WorkAhead(
            "ahead", self._apply, lambda at: self._parking.following(LINK, Lane.ROUTINE, at), most
        )

    def _apply(self, batches) -> Outcome:
        if self.broken:
            raise ZeroDivisionError
        if self.down:
            return Outcome(None, refused=len(batches))
        with self._moved:
            assert batches[0].begin == (self.applied[-1] if self.applied else START)
            self.applied += [batch.end for batch in batches]
            self._moved.notify_all()
        at = self.applied[-1]
        return Outcome(Receipt(LINK, Lane.ROUTINE, at, True, Counts(), 0, 0, NONE, NONE))

    def wait_for(self, count: int) -> None:
        with self._moved:
            assert self._moved.wait_for(lambda: len(self.applied) >= count, 10)

    def pane(self, i: int) -> list[Position | None]:
        outcomes = self.work.outcomes((self.stubs[i],))
        return [outcome.receipt and outcome.receipt.progress for outcome in outcomes]


@pytest.fixture
def ledger():
    made = []

    def make(*args) -> Ledger:
        made.append(Ledger(*args))
        return made[-1]

    yield make
    for one in made:
        one.work.close()


def test_what_follows_is_applied_before_its_pane_comes(ledger):
    store = ledger(5)
    assert store.pane(0) == [end_of(1)]
    store.wait_for(5)
    assert [store.pane(i) for i in range(1, 5)] == [[end_of(i)] for i in range(2, 6)]
    assert store.applied == [end_of(i) for i in range(1, 6)]


def test_no_more_is_kept_than_may_be_and_it_goes_on_as_panes_come(ledger):
    store = ledger(6, 2)
    for i in range(6):
        store.wait_for(min(3 + i - 1, 6) if i else 0)
        assert len(store.applied) <= i + 2
        assert store.pane(i) == [end_of(i + 1)]
    assert len(store.applied) == 6


def test_nothing_is_done_ahead_where_that_is_not_wanted(ledger):
    store = ledger(3, 0)
    for i in range(3):
        assert store.pane(i) == [end_of(i + 1)]
        assert len(store.applied) == i + 1


def test_what_the_store_could_not_take_ahead_is_tried_with_its_pane(ledger):
    store = ledger(3, 1)
    store.pane(0)
    store.wait_for(2)
    store.down = True
    assert store.pane(1) == [end_of(2)]
    assert store.pane(2) == [None]
    store.down = False
    assert store.pane(2) == [end_of(3)]


def test_a_fault_meets_the_caller(ledger, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda told: None)  # The thread's own end.
    store = ledger(3, 1)
    store.pane(0)
    store.wait_for(2)
    store.broken = True
    assert store.pane(1) == [end_of(2)]
    with pytest.raises(ZeroDivisionError):
        store.pane(2)


def test_a_lost_pane_holds_nothing_up(ledger):
    store = ledger(5, 2)
    store.pane(0)
    store.wait_for(3)
    assert store.pane(2) == [end_of(3)]  # Its own, though the pane before was lost.
    store.wait_for(5)
    assert [store.pane(i) for i in (3, 4)] == [[end_of(4)], [end_of(5)]]
