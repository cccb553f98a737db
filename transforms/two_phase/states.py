"""What follows what in a two-phase commit: the coordinator's states and recovery's verdicts."""

import enum
import typing
from collections.abc import Mapping

_PREFIX = "campus_sync"
XA_NAME_BYTES_MAX = 64
XID_FORMAT = 0x63616D70  # "camp": tells our XA branches from those of other programs.


class State(enum.StrEnum):
    """Of a transaction; BEGUN stands in no log, the last two are its ends."""

    BEGUN = "begun"
    PREPARING = "preparing"
    COMMIT = "commit"
    ABORT = "abort"
    HELD = "held"  # The log cannot know: a person decides.
    COMMITTED = "committed"
    ABORTED = "aborted"


class Event(enum.StrEnum):
    """What happens to a transaction."""

    ASK = "ask"
    WANT_COMMIT = "want_commit"
    WANT_ABORT = "want_abort"
    DEADLINE = "deadline"
    LOG_WENT_BACK = "log_went_back"
    PRESUME_ABORT = "presume_abort"
    ALL_DONE = "all_done"


_NEXT: dict[tuple[State, Event], State] = {
    (State.BEGUN, Event.ASK): State.PREPARING,
    (State.PREPARING, Event.WANT_COMMIT): State.COMMIT,
    (State.PREPARING, Event.WANT_ABORT): State.ABORT,
    (State.PREPARING, Event.DEADLINE): State.ABORT,
    (State.PREPARING, Event.LOG_WENT_BACK): State.HELD,
    (State.HELD, Event.PRESUME_ABORT): State.ABORT,
    (State.COMMIT, Event.ALL_DONE): State.COMMITTED,
    (State.ABORT, Event.ALL_DONE): State.ABORTED,
}
ENDS = frozenset({State.COMMITTED, State.ABORTED})


def follow(state: State, event: Event) -> State:
    """Returns the next state; the same one where the event changes nothing any more.

    A decision is final: what comes after it is answered with what was decided.
    """
    return _NEXT.get((state, event), state)


class Vote(enum.StrEnum):
    """What a branch answered: PREPARED is a promise, DOWN may mean any of them."""

    PREPARED = "prepared"
    REFUSED = "refused"
    DOWN = "down"


class OnBranchDown(enum.StrEnum):
    """REFUSE: all or none, now. DEGRADE: at those that are there, at the missing ones later."""

    REFUSE = "refuse"
    DEGRADE = "degrade"


def decide(votes: Mapping[str, Vote], on_branch_down: OnBranchDown) -> Event:
    """Returns WANT_COMMIT or WANT_ABORT; a refusal is never degraded."""
    answers = set(votes.values())
    if answers == {Vote.PREPARED}:
        return Event.WANT_COMMIT
    degraded = on_branch_down is OnBranchDown.DEGRADE and answers == {Vote.PREPARED, Vote.DOWN}
    return Event.WANT_COMMIT if degraded else Event.WANT_ABORT


class Identity(typing.NamedTuple):
    """A log: whose branches are ours, and what it can have issued.

    `coordinator` names server and database; `timeline` is the server's, another one since each
    restore or failover; `last` is the last number that was issued.
    """

    coordinator: str
    timeline: int
    last: int


class TransactionId(typing.NamedTuple):
    """Names a transaction of one log. `salt` differs should a restored log issue a number again."""

    timeline: int
    number: int
    salt: str

    def __str__(self) -> str:
        return f"{self.timeline}-{self.number}-{self.salt}"

    @classmethod
    def parse(cls, text: str) -> typing.Self:
        """Raises ValueError where the text is no transaction's name."""
        timeline, number, salt = text.split("-")
        return cls(int(timeline), int(number), salt)


class Xid(typing.NamedTuple):
    """The global name of one branch: `coordinator` and `branch` hold no colon."""

    coordinator: str
    transaction: TransactionId
    branch: str

    @property
    def gtrid(self) -> str:
        """The name that all branches share; at most 64 bytes, XA's limit."""
        return f"{self.coordinator}:{self.transaction}"

    @property
    def gid(self) -> str:
        """The name within PostgreSQL, which has one text; below its 200 bytes."""
        return f"{_PREFIX}:{self.gtrid}:{self.branch}"

    @classmethod
    def parse(cls, gid: str) -> typing.Self | None:
        """Returns what `gid` says, None for a name that is not ours."""
        try:
            prefix, coordinator, transaction, branch = gid.split(":")
            xid = cls(coordinator, TransactionId.parse(transaction), branch)
        except ValueError:
            return None
        return xid if prefix == _PREFIX else None


class Verdict(enum.StrEnum):
    """What recovery does with a prepared branch."""

    LEAVE = "leave"
    COMMIT = "commit"
    ROLL_BACK = "roll_back"
    HOLD = "hold"


_VERDICTS = {
    State.PREPARING: Verdict.LEAVE,
    State.HELD: Verdict.HOLD,
    State.COMMIT: Verdict.COMMIT,
    State.COMMITTED: Verdict.COMMIT,
    State.ABORT: Verdict.ROLL_BACK,
    State.ABORTED: Verdict.ROLL_BACK,
}


def judge(
    logged: State | None, found: TransactionId, here: Identity, issued_again: bool = False
) -> Verdict:
    """Returns what becomes of a branch that was found prepared.

    What the log does not know is rolled back: no decision to commit was ever noted. But not
    where the log has gone back since (a restored backup, a standby that lacked the end): it may
    have known, so such a branch waits for a person.

    Args:
      issued_again: the log has given the number to another transaction. It has gone back then,
        though the timeline is the same: two standbys of one primary, promoted one after the
        other, are on one.
    """
    if logged is not None:
        return _VERDICTS[logged]
    issued_here = found.timeline == here.timeline and found.number <= here.last
    return Verdict.ROLL_BACK if issued_here and not issued_again else Verdict.HOLD
