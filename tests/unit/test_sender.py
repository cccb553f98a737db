"""Go-back-N over a runner that loses, repeats and reorders."""

import dataclasses
import itertools
import math
import random

import pytest

from schemas.batches import ChangeBatch, Lane, ParkingTicket
from schemas.positions import SEQ_END, START, Position
from transforms.capture.sender import LaneSender
from transforms.capture.spool import Spool
from transforms.parking import Parking


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def batch(begin: Position, end: Position) -> ChangeBatch:
    return ChangeBatch("a>b", Lane.ROUTINE, begin, end, 0, 0, 0, 0, {})


def chain(count: int) -> list[ChangeBatch]:
    ends = [START, *(Position(10 * i, SEQ_END) for i in range(1, count + 1))]
    return [batch(a, b) for a, b in itertools.pairwise(ends)]


def sender_of(clock: Clock, **changes) -> LaneSender:
    spool = Spool(1 << 20, 1 << 20, encode=None, decode=None)
    settings = {"in_flight_rows": 10, "in_flight_batches": 100, "gather_rows": 1, "gather_s": 0.0}
    return LaneSender(spool, monotonic=clock, resend_s=5.0, **{**settings, **changes})


def delivering(clock: Clock) -> tuple[Parking, LaneSender, ChangeBatch]:
    """Returns a sender that asks this parking, and its batch, which is just being delivered."""
    here = Parking(bytes(16), clock)
    sender = sender_of(clock, worked_at=lambda end: here.worked_at("a>b", Lane.ROUTINE, end))
    sender.add(chain(1)[0])
    sent = sender.next()
    here.begun([sent])
    return here, sender, sent


def test_gathers_small_batches_until_the_oldest_has_waited():
    clock = Clock()
    sender = sender_of(clock, gather_rows=100, gather_s=0.1)
    for change in chain(3):
        sender.add(change)
    assert sender.next() is None
    clock.now_s = 0.1
    joined = sender.next()
    assert (joined.begin, joined.end) == (START, Position(30, SEQ_END))
    assert sender.next() is None


def test_sends_again_when_the_ledger_stands_still():
    clock = Clock()
    sender = sender_of(clock)
    sender.add(chain(1)[0])
    first = sender.next()
    clock.now_s = 4.9
    assert sender.next() is None
    clock.now_s = 5.0
    assert sender.next() == first
    assert sender.resends == 1


def test_patience_grows_with_what_was_sent_in_vain_and_ends_with_it():
    clock = Clock()
    sender = sender_of(clock)
    first, second = chain(2)
    sender.add(first)
    assert sender.next() == first
    again = []
    for tenth in range(1, 600):
        clock.now_s = tenth / 10
        if sender.next() is not None:
            again.append(clock.now_s)
    assert again == [5, 15, 35, 55]
    sender.on_ledger(first.end)
    sender.add(second)
    assert sender.next() == second
    clock.now_s += 5
    assert sender.next() == second


def test_a_lost_store_is_not_sent_to_and_gets_everything_again_when_it_returns():
    clock = Clock()
    sender = sender_of(clock)
    first, second = chain(2)
    sender.add(first)
    assert sender.next() == first
    sender.on_store_lost()
    sender.add(second)
    assert sender.next() is None
    sender.on_ledger(START)
    again = sender.next()
    assert (again.begin, again.end) == (first.begin, second.end)


@pytest.mark.parametrize("seed", range(200))
def test_everything_arrives_over_a_runner_that_loses_repeats_and_reorders(seed):
    """A ledger that applies only what joins on reaches the end of the log."""
    rng = random.Random(seed)
    clock = Clock()
    sender = sender_of(clock, gather_s=rng.choice([0.0, 0.3]))
    log = chain(rng.randint(1, 40))
    waiting = list(log)
    network: list[ChangeBatch] = []
    islands: list[ChangeBatch] = []
    ledger = START
    for _step in range(5000):
        clock.now_s += rng.random() * 0.5
        if waiting and rng.random() < 0.7:
            sender.add(waiting.pop(0))
        if (sent := sender.next()) is not None and rng.random() < 0.7:
            network += [sent] * rng.choice([1, 1, 2])
        rng.shuffle(network)
        while network and rng.random() < 0.6:
            islands.append(network.pop())
        joined = True
        while joined:
            joined = [i for i in islands if i.begin <= ledger < i.end]
            ledger = max([ledger, *(i.end for i in joined)])
        if rng.random() < 0.05:
            sender.on_store_lost()
        elif rng.random() < 0.5:
            sender.on_ledger(ledger)
        if ledger == log[-1].end and not waiting:
            break
    assert ledger == log[-1].end, f"seed {seed}"
    sender.on_ledger(ledger)
    assert sender.idle, f"seed {seed}"


def test_doubts_only_what_was_sent_in_vain():
    clock = Clock()
    sender = sender_of(clock)
    *lost, fresh = chain(3)
    for change in lost:
        sender.add(change)
    sent = sender.next()
    assert not sender.doubts(sent)
    clock.now_s = 5.0
    assert sender.doubts(sender.next())
    sender.on_ledger(sent.end)
    sender.add(fresh)
    assert not sender.doubts(sender.next())


def test_does_not_doubt_what_a_lost_store_refused():
    clock = Clock()
    sender = sender_of(clock)
    sender.add(chain(1)[0])
    sent = sender.next()
    sender.on_store_lost()
    sender.on_ledger(START)
    assert not sender.doubts(sent)


def test_sends_no_sliver_of_a_backlog():
    """With credit for less than a full batch it waits for the ledger, not for a little room."""
    clock = Clock()
    sender = sender_of(clock, in_flight_rows=10, gather_rows=6)
    for change in chain(20):
        sender.add(dataclasses.replace(change, ticket=ParkingTicket("", 0, 3, 0)))
    first = sender.next()
    assert first.end == Position(20, SEQ_END)
    assert sender.next() is None
    sender.on_ledger(first.end)
    assert sender.next().end == Position(40, SEQ_END)


def test_what_is_being_delivered_here_is_not_sent_again():
    """However long its store takes; what was delivered in vain is lost again."""
    clock = Clock()
    here, sender, sent = delivering(clock)
    clock.now_s = 1000.0
    assert sender.next() is None
    here.ended([sent], None)
    assert sender.next() == sent


def test_what_was_applied_here_waits_longer_for_the_ledgers_word():
    """A store that crashes may still forget it: the ledger alone acknowledges."""
    clock = Clock()
    here, sender, sent = delivering(clock)
    clock.now_s = 100.0
    here.ended([sent], sent.end)
    clock.now_s = 119.9
    assert sender.next() is None
    clock.now_s = 120.0
    assert sender.next() == sent


def test_a_batch_beyond_what_was_applied_was_in_vain():
    here = Parking(bytes(16), Clock())
    first, second = chain(2)
    here.begun([first, second])
    here.ended([first, second], first.end)
    worked = [here.worked_at("a>b", Lane.ROUTINE, one.end) for one in (first, second)]
    assert worked == [0.0, -math.inf]
    here.release("a>b", Lane.ROUTINE, first.end)
    assert here.worked_at("a>b", Lane.ROUTINE, first.end) == -math.inf


def test_what_waits_for_a_slow_store_is_gathered():
    """A batch costs a store far away seconds: few large ones, and no engine's buffers fill."""
    clock = Clock()
    sender = sender_of(clock, in_flight_rows=1000, in_flight_batches=2)
    log = chain(10)
    sent = []
    for change in log:
        sender.add(change)
        sent += filter(None, [sender.next()])
    assert [one.end for one in sent] == [log[0].end, log[1].end]
    sender.on_ledger(log[0].end)
    rest = sender.next()
    assert (rest.begin, rest.end) == (log[1].end, log[-1].end)
    assert sender.next() is None
