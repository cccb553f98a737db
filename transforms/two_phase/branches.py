"""What a two-phase commit asks of a store, whatever its make, and how a store fails."""

import abc
import enum
import math
import typing
from collections.abc import Sequence

from schemas.errors import CampusSyncError
from transforms.two_phase.states import Xid
from transforms.two_phase.writes import TableWrite

APPLICATION = "campus_sync two-phase"
_KEPT_S = 1.0  # So long a session that was kept may take to say that it lives.


class BranchDown(CampusSyncError):
    """A store gives no answer or cannot take the rows now; what it has done is not known."""


class BranchBusy(BranchDown):
    """Another transaction has what this one needs: asked again soon, the store may take it."""


class BranchRefused(CampusSyncError):
    """A store will not take these rows, or this account, however often it is asked."""


class RowsRefused(BranchRefused):
    """A store will not take one of these rows for what is in it; it may take the others."""


class Settled(enum.Enum):
    """What became of an order to commit or to roll back."""

    DONE = enum.auto()
    HELD = enum.auto()  # Another session has it in hand; it is still prepared.
    # It was settled before, or the store failed over to a standby that lacks it.
    UNKNOWN = enum.auto()


class Branch(typing.Protocol):
    """One store in a two-phase commit: a session of its own, opened when needed.

    Every method answers within the seconds given to `begin` or at construction, and raises
    BranchDown where the store does not, BranchRefused where it says no. A session that ends
    before `prepare` leaves nothing behind; what was prepared stays until it is settled.
    """

    name: str

    def begin(self, xid: Xid, seconds: float) -> None:
        """Opens the transaction of `xid`; the server ends it by itself after `seconds`."""

    def write(self, writes: Sequence[TableWrite]) -> None:
        """Writes all rows that are newer than the store's; older and equal ones change nothing."""

    def prepare(self) -> None:
        """Makes the open transaction survive everything until it is settled."""

    def settle(self, xid: Xid, commit: bool) -> Settled:
        """Commits or rolls back; called again, it changes nothing."""

    def prepared(self, coordinator: str) -> list[Xid]:
        """Returns all that this store holds prepared for this coordinator and branch."""

    def apply(self, writes: Sequence[TableWrite]) -> None:
        """Writes as `write` does, in an ordinary transaction, and commits."""

    def rest(self) -> None:
        """Keeps the session, which holds nothing, for the next `begin`."""

    def close(self) -> None:
        """Ends the session; the branch may be used again."""


class BranchSession(abc.ABC):
    """What branches have alike: a name, one transaction at a time, a session opened when needed."""

    def __init__(self, name: str, seconds: float):
        self.name = name
        self._seconds = seconds
        self._conn: typing.Any = None
        self._xid: Xid | None = None

    def begin(self, xid: Xid, seconds: float) -> None:
        """As `Branch` has it. A session that was kept may be gone: then there is a new one."""
        self._xid = xid
        if self._conn is not None:
            self._seconds = min(seconds, _KEPT_S)
            try:
                self._begin(xid, seconds)
                self._seconds = seconds
                return
            except BranchDown:
                seconds = max(seconds - _KEPT_S, seconds / 2)
        self._seconds = seconds
        self._begin(xid, seconds)

    @abc.abstractmethod
    def _begin(self, xid: Xid, seconds: float) -> None:
        """Opens the transaction over the session or a new one, with these limits."""

    def settle(self, xid: Xid, commit: bool) -> Settled:
        """As `Branch` has it."""
        known = self._conn is not None
        try:
            return self._settle(xid, commit)
        except BranchDown:
            if not known:
                raise
            return self._settle(xid, commit)  # The server had only ended the idle session.

    @abc.abstractmethod
    def _settle(self, xid: Xid, commit: bool) -> Settled:
        """Settles once, over the session or a new one."""


def whole_seconds(seconds: float, at_least: int = 1) -> int:
    """Returns `seconds` for settings that know no fractions."""
    return max(at_least, math.ceil(seconds))
