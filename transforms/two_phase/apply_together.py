"""Write a set of rows to several stores, all of it at all of them or nothing at any."""

import contextlib
import typing
from collections.abc import Callable, Iterable, Sequence

from schemas.clocks import monotonic_s
from schemas.errors import CampusSyncError, StoreUnavailable
from transforms.two_phase.branches import (
    Branch,
    BranchBusy,
    BranchDown,
    BranchRefused,
    RowsRefused,
    Settled,
)
from transforms.two_phase.decision_log import DecisionLog
from transforms.two_phase.states import (
    XA_NAME_BYTES_MAX,
    Event,
    Identity,
    OnBranchDown,
    State,
    TransactionId,
    Vote,
    Xid,
    decide,
)
from transforms.two_phase.writes import RowSet, TableWrite, encode

_SECONDS_MIN = 0.05


class InDoubt(CampusSyncError):
    """The primary store broke while it decided: recovery will tell which, at all branches alike."""


class Together(typing.NamedTuple):
    """What became of a set.

    Attributes:
      committed: all branches have it or will have it; else none has anything of it.
      reason: why not, or why not everywhere.
      missing: branches that were down and get the set later (degraded): incomplete till then.
      waiting: branches that are prepared and could not be told yet: recovery tells them.
      down: branches that gave no answer, with what was said of them. busy: some only lost to
        another transaction: to be tried again.
      refused: a branch said no. rows_refused: to what is in the rows; others may be taken.
    """

    transaction: TransactionId
    committed: bool
    reason: str = ""
    missing: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    down: tuple[tuple[str, str], ...] = ()
    busy: bool = False
    refused: bool = False
    rows_refused: bool = False


def apply_together(
    log: DecisionLog,
    sets: Iterable[RowSet],
    branches: Sequence[Branch],
    on_branch_down: OnBranchDown = OnBranchDown.REFUSE,
    deadline_s: float = 10.0,
    monotonic: Callable[[], float] = monotonic_s,
    reached: Callable[[str], None] = lambda step: None,
    keep_sessions: bool = False,
) -> Together:
    """Writes `sets` to all `branches`: two phases, decided in `log`.

    Repeated with the same rows, nothing changes: branches compare places in the source's log.
    Locks are held until the decision, for `deadline_s` at most while this process and the log
    live, and else until `recover` is run. Readers of two stores may see one of them a moment
    before the other.

    Args:
      on_branch_down: with DEGRADE, a branch that is down is given the set later by `recover`.
      deadline_s: from the beginning to the decision.
      reached: told of every step behind it, in order: for tests.
      keep_sessions: of branches that have been told the end, for the next set.

    Raises:
      ValueError: the sets cannot be written as one; see `encode`.
      StoreUnavailable: the log is down: nothing was written anywhere.
      InDoubt: it is not known what was decided.
    """
    writes = encode(sets)
    ordered = sorted(branches, key=lambda branch: branch.name)
    names = [branch.name for branch in ordered]
    if not names or len(set(names)) < len(names):
        raise ValueError("a set is written to at least one branch, each named once")
    if any(":" in name or len(name.encode()) > XA_NAME_BYTES_MAX for name in names):
        raise ValueError("a branch's name is too long or holds a colon")
    began = monotonic()
    here, transaction = log.begin(names, deadline_s)
    reached("begun")
    work = _Work(here, transaction, writes, reached)
    try:
        for asked, branch in enumerate(ordered):
            # A share of what is left: one that is down leaves time for the others.
            left = (deadline_s - (monotonic() - began)) / (len(ordered) - asked + 1)
            if work.ask(branch, max(_SECONDS_MIN, left)) is Vote.REFUSED:
                break
        reached("voted")
        state = _decided(log, work, names, on_branch_down)
        reached("decided")
        return _settled(log, work, ordered, state)
    finally:
        for branch in ordered:
            if keep_sessions and branch.name in work.told:
                branch.rest()
            else:
                branch.close()


class _Work:
    """One transaction's way through its branches."""

    def __init__(
        self,
        here: Identity,
        transaction: TransactionId,
        writes: list[TableWrite],
        reached: Callable[[str], None],
    ):
        self.transaction, self.writes, self.reached = transaction, writes, reached
        self._here = here
        self.votes: dict[str, Vote] = {}
        self.told_to_prepare: set[str] = set()
        self.told: set[str] = set()
        self.reasons: list[str] = []
        self.down: list[tuple[str, str]] = []
        self.busy = self.rows_refused = False
        self.missing: tuple[str, ...] = ()

    def xid(self, branch: str) -> Xid:
        return Xid(self._here.coordinator, self.transaction, branch)

    def ask(self, branch: Branch, seconds: float) -> Vote:
        name = branch.name
        self.votes[name] = Vote.DOWN
        try:
            branch.begin(self.xid(name), seconds)
            branch.write(self.writes)
            self.reached(f"written {name}")
            self.told_to_prepare.add(name)
            branch.prepare()
            self.votes[name] = Vote.PREPARED
            self.reached(f"prepared {name}")
        except BranchBusy as error:
            self.busy = True
            self.reasons.append(str(error))
        except BranchDown as error:
            self.down.append((name, str(error)))
            self.reasons.append(str(error))
        except BranchRefused as error:
            self.votes[name] = Vote.REFUSED
            self.rows_refused = isinstance(error, RowsRefused)
            self.reasons.append(str(error))
        return self.votes[name]

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)


def _decided(
    log: DecisionLog, work: _Work, names: Sequence[str], on_branch_down: OnBranchDown
) -> State:
    event = decide(work.votes, on_branch_down)
    if event is Event.WANT_COMMIT:
        work.missing = tuple(n for n in names if work.votes[n] is not Vote.PREPARED)
    try:
        return log.decide(work.transaction, event, work.reason, work.missing, work.writes)
    except StoreUnavailable as error:
        raise InDoubt(
            f"transaction {work.transaction}: {error}. Remedy: campus-sync in-doubt recover, "
            "once the primary store is back."
        ) from None


def _settled(log: DecisionLog, work: _Work, ordered: Sequence[Branch], state: State) -> Together:
    """Tells the branches; what cannot be told now is left to recovery."""
    if state not in (State.COMMIT, State.COMMITTED, State.ABORT, State.ABORTED):
        raise InDoubt(f"transaction {work.transaction}: held. Remedy: campus-sync in-doubt list")
    commit = state in (State.COMMIT, State.COMMITTED)
    done, waiting = [], []
    for branch in ordered:
        if commit and branch.name in work.missing:
            continue
        settled = branch.name not in work.told_to_prepare  # It can hold nothing.
        if not settled and work.votes[branch.name] is not Vote.DOWN:
            with contextlib.suppress(BranchDown, BranchRefused):
                found = branch.settle(work.xid(branch.name), commit)
                if found is Settled.UNKNOWN and commit:  # Nothing changes where it has them.
                    branch.apply(work.writes)
                settled = found is not Settled.HELD
                work.told |= {branch.name} if settled else set()
        (done if settled else waiting).append(branch.name)
        work.reached(f"settled {branch.name}")
    with contextlib.suppress(StoreUnavailable):  # It is decided; recovery finds them done.
        log.note_done(work.transaction, done)
    work.reached("finished")
    reason = work.reason or ("" if commit else "deadline")
    missing = work.missing if commit else ()
    return Together(
        work.transaction,
        commit,
        reason,
        missing,
        tuple(waiting) if commit else (),
        tuple(work.down),
        work.busy,
        Vote.REFUSED in work.votes.values(),
        work.rows_refused,
    )
