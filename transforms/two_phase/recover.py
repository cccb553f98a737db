"""Settle what a crash has left in doubt: by the log's decisions, at our own branches only."""

import dataclasses
from collections.abc import Callable, Sequence

from transforms.two_phase.branches import Branch, BranchDown, BranchRefused, Settled
from transforms.two_phase.decision_log import DecisionLog, Logged
from transforms.two_phase.states import Identity, State, TransactionId, Verdict, judge


@dataclasses.dataclass
class Recovered:
    """What one run has done: transactions, once for every branch that it did it at.

    Attributes:
      committed, rolled_back: were prepared. completed: got a set that they had missed.
      left: prepared, and not to be touched now: undecided before the deadline, or another
        session still has it. held: of before the log went back, for a person to decide.
      down: branches that gave no answer, and what they said.
      unfinished: transactions that are not finished behind it.
    """

    committed: list[tuple[str, TransactionId]] = dataclasses.field(default_factory=list)
    rolled_back: list[tuple[str, TransactionId]] = dataclasses.field(default_factory=list)
    completed: list[tuple[str, TransactionId]] = dataclasses.field(default_factory=list)
    left: list[tuple[str, TransactionId]] = dataclasses.field(default_factory=list)
    held: list[tuple[str, TransactionId]] = dataclasses.field(default_factory=list)
    down: dict[str, str] = dataclasses.field(default_factory=dict)
    unfinished: list[Logged] = dataclasses.field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is left to do, at any branch."""
        return not (self.left or self.held or self.down or self.unfinished)


def recover(
    log: DecisionLog,
    branches: Sequence[Branch],
    presume_abort: bool = False,
    reached: Callable[[str], None] = lambda step: None,
) -> Recovered:
    """Settles every branch that is prepared and decided, and completes what was degraded.

    May run at any time, beside coordinators and beside itself, be broken off and be repeated. A
    transaction behind its deadline is aborted first. A prepared branch that the log does not
    know is rolled back (presumed abort), unless the log has gone back since: then it is held.

    Args:
      presume_abort: a person has decided that what is held shall be rolled back.
      reached: told of every step behind it: for tests.

    Raises:
      StoreUnavailable: the log is down; what was settled stays settled.
    """
    found = Recovered()
    here = log.identity()
    log.expire(here)
    if presume_abort:
        log.presume_abort()
    reached("expired")
    # Read before the branches are asked: what was decided by then and is prepared nowhere later
    # has been settled.
    decided = [one for one in log.unfinished() if one.state in (State.COMMIT, State.ABORT)]
    for branch in branches:
        try:
            _recover_branch(log, here, branch, decided, found, presume_abort, reached)
        except (BranchDown, BranchRefused) as error:
            found.down[branch.name] = str(error)
        finally:
            branch.close()
    log.forget()
    found.unfinished = log.unfinished()
    return found


def _recover_branch(
    log: DecisionLog,
    here: Identity,
    branch: Branch,
    decided: Sequence[Logged],
    found: Recovered,
    presume_abort: bool,
    reached: Callable[[str], None],
) -> None:
    name = branch.name
    still: set[TransactionId] = set()
    committed: set[TransactionId] = set()
    for xid in branch.prepared(here.coordinator):
        # Asked behind the branch: the newest decision. `here` may be older than what was begun
        # since, but that the log knows.
        logged = log.state_of(xid.transaction)
        again = logged is None and log.issued_again(xid.transaction)
        verdict = judge(logged, xid.transaction, here, again)
        if verdict is Verdict.HOLD:
            log.hold(xid.transaction, name)
            if presume_abort:
                log.presume_abort()
                verdict = Verdict.ROLL_BACK
        settles = verdict in (Verdict.COMMIT, Verdict.ROLL_BACK)
        settled = branch.settle(xid, verdict is Verdict.COMMIT) if settles else Settled.HELD
        if settled is Settled.HELD:
            still.add(xid.transaction)
            (found.held if verdict is Verdict.HOLD else found.left).append((name, xid.transaction))
            continue
        if verdict is Verdict.COMMIT and settled is Settled.DONE:
            committed.add(xid.transaction)
        (found.committed if verdict is Verdict.COMMIT else found.rolled_back).append(
            (name, xid.transaction)
        )
        reached(f"settled {name}")
    for one in decided:
        if one.branches.get(name) not in ("asked", "missing") or one.id in still:
            continue
        if one.state is State.COMMIT and one.id not in committed:
            # One that was asked has them, or has failed over to a standby that lacks its promise.
            branch.apply(one.content)
            if one.branches[name] == "missing":
                found.completed.append((name, one.id))
            reached(f"completed {name}")
        log.note_done(one.id, [name])
        reached(f"noted {name}")
