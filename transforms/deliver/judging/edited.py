"""Which records that clients edit have changed in a store since it was last looked at.

`sync.record.change` tells: whoever reads up to a number has read all below it (ADR 0019). It
counts edits made here, those that came by exchange, and sources' rows that met them.
"""

import typing

import psycopg

_REACHED = "SELECT change, sync.incarnation() FROM sync.store"
# By the numbers alone: to the planner a campus looks as if it led to few records.
WHERE = "e.change > %(edited)s AND e.campus || '' = %(campus)s"


class Edits(typing.NamedTuple):
    """Records with a change number above `after` are new; `reached`, which is of `incarnation`,
    is what to go on from. Records beyond it are met again next time."""

    after: int
    reached: int
    incarnation: str

    @property
    def any(self) -> bool:
        """Whether something may have changed, at whatever campus."""
        return self.reached > self.after


def edits_since(conn: psycopg.Connection, change: int, incarnation: str) -> Edits:
    """Returns what to look at, to be asked before the rows are.

    All of it where the store was started again: it may have gone back to a backup.

    Args:
      change, incarnation: of `Edits.reached` the time before; 0 and an empty text for never.
    """
    found = conn.execute(_REACHED).fetchone()
    if found is None:  # Not open for edits yet.
        return Edits(0, 0, "")
    reached, now = found
    return Edits(change if now == incarnation else 0, reached, now)
