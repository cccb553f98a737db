"""What a link's reader asks of a source's log, whatever kind of database it is."""

import contextlib
import typing
from collections.abc import Iterator

from schemas.batches import RawChanges
from schemas.errors import CampusSyncError
from schemas.positions import Position
from transforms.capture.postgresql.slots import SlotState
from transforms.capture.snapshot_part import WHOLE, Rest


class GapFound(CampusSyncError):
    """The log no longer holds what comes next: the reader joins anew, by a snapshot."""


class Reading(typing.NamedTuple):
    """What one `LogStream.read` found.

    Attributes:
      taken: complete stretches of the log, each joining on to the one before.
      caught_up: nothing more could be read without waiting.
      trickle: so little came that waiting a moment for more costs less than it saves.
      behind_us: how long before it was read the newest of it was committed.
    """

    taken: list[RawChanges]
    caught_up: bool
    trickle: bool = False
    behind_us: int = 0


@contextlib.contextmanager
def gaps(*errors: type[CampusSyncError]) -> Iterator[None]:
    """Raises GapFound where a source's own library says by one of `errors` that there is one."""
    try:
        yield
    except errors as error:
        raise GapFound(str(error)) from error


class LogStream(typing.Protocol):
    """The changes behind a position; not thread-safe. A context manager that ends it."""

    def __enter__(self) -> typing.Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self, timeout_s: float) -> Reading:
        """Returns what has come; waits only for the first. An idle source gives heartbeats.

        Raises:
          SourceUnavailable: the connection is lost. GapFound: see there.
        """
        ...

    def acknowledge(self, lsn: int) -> None:
        """Tells the source that everything committed before `lsn` is applied."""
        ...

    def keep_alive(self) -> None:
        """To be called every few seconds while nothing is read."""
        ...


class SnapshotPoint(typing.Protocol):
    """A consistent view of the source: all before `lsn`, nothing after it.

    One of `SourceLog.view` has some of what comes after, nothing after `view_lsn`.
    """

    @property
    def lsn(self) -> int: ...

    @property
    def view_lsn(self) -> int | None: ...


class SourceLog(typing.Protocol):
    """One link's source.

    Attributes:
      sweeps_all: whether a snapshot ends with a sweep of every mapped table.
      resumes: whether a snapshot that broke off can be gone on with, by `view`.
      known_again: whether a log that went back is told from the old one when it has grown past it.
    """

    sweeps_all: bool
    resumes: bool
    known_again: bool

    def require_covered(self) -> dict[str, str]:
        """Makes sure that all mapped tables that are there are in the log; returns `drift`.

        Raises:
          CampusSyncError: they are not, with the remedy.
        """
        ...

    def drift(self) -> dict[str, str]:
        """Returns mapped tables that cannot be followed as they are now, and why.

        They are gone, or lack a column that the mapping needs. Snapshots pass them over.
        """
        ...

    def state(self, applied: Position | None) -> SlotState:
        """Returns the log as it is now, for a reader that has come to `applied`."""
        ...

    def memberships(self) -> dict[str, str]:
        """Returns a text for each mapped table in the log: equal while none of it was missed."""
        ...

    def create(self, after: Position) -> contextlib.AbstractContextManager[SnapshotPoint]:
        """Yields a view later than `after`, from which on the log can be read."""
        ...

    def view(self, lsn: int) -> contextlib.AbstractContextManager[SnapshotPoint]:
        """Yields the source as it is now, for what a snapshot at `lsn` has left to read."""
        ...

    def rows_estimated(self) -> int | None:
        """Returns about how many rows the mapped tables have; None: nobody knows."""
        ...

    def snapshot(self, point: typing.Any, rest: Rest = WHOLE) -> Iterator[RawChanges]:
        """Yields every row of the mapped tables at the point of an open `create` or `view`.

        Those that `resumes` yield `SnapshotChanges`, of what is left.
        """
        ...

    def advance(self, lsn: int) -> None:
        """Tells the source that everything committed before `lsn` is applied, with no stream open.

        Raises:
          SourceUnavailable: no connection. GapFound: what comes next is not kept any more.
        """
        ...

    def open(self, start: Position, acknowledged_lsn: int) -> LogStream:
        """Opens the changes behind `start`; those before `acknowledged_lsn` are all applied."""
        ...
