"""Which rows of a campus a store has got since it was last looked at."""

import typing

import psycopg

from schemas.positions import START, Position

_REACHED = """\
SELECT
    (SELECT lsn FROM sync.progress WHERE link = %(link)s AND lane = 'routine'),
    (SELECT seq FROM sync.progress WHERE link = %(link)s AND lane = 'routine'),
    (SELECT max(lsn) FROM sync.progress WHERE link = %(link)s),
    (SELECT min(lsn) FROM sync.snapshot WHERE link = %(link)s AND started_at >= %(at)s),
    (SELECT min(lsn) FROM sync.dead_letter WHERE link = %(link)s AND replayed_at >= %(at)s)"""


class Changed(typing.NamedTuple):
    """Rows of (after, ...] with `src_lsn <= last_lsn` are new; `reached` is what to go on from.

    Rows beyond `reached`, which came by the emergency lane, are met again next time.
    """

    after: Position
    last_lsn: int
    reached: Position

    @property
    def names(self) -> dict[str, int]:
        """Values of `WHERE` below."""
        return {"after_lsn": self.after.lsn, "after_seq": self.after.seq, "last": self.last_lsn}


# The first comparison is for the index of block ranges, the second is exact.
WHERE = (
    "r.src_lsn >= %(after_lsn)s AND r.src_lsn <= %(last)s"
    " AND (r.src_lsn, r.src_seq) > (%(after_lsn)s, %(after_seq)s)"
)


def changed(conn: psycopg.Connection, link: str, known: Position | None, known_at) -> Changed:
    """Returns what to look at, to be asked before the rows are.

    What came with an old position is met too: replayed dead letters, a snapshot that began
    since, a source that was read from its beginning again.

    Args:
      known: `Changed.reached` of the time before, None for never; known_at: its time (aware).
    """
    row = conn.execute(_REACHED, {"link": link, "at": known_at}).fetchone()
    lsn, seq, last, snapshot, letter = row
    reached = START if lsn is None else Position(lsn, seq)
    after = START if known is None or known > reached else known
    for other in (snapshot, letter):
        if other is not None and other <= after.lsn:
            after = Position(other - 1, 0)
    return Changed(after, reached.lsn if last is None else last, reached)
