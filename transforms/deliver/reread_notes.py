"""How far rows have been read again, kept beside the ledger of each link that they go to."""

import dataclasses
import json

import psycopg

from schemas.errors import CampusSyncError
from schemas.reread import Note, Phase, Span, Tally

_LOCK = "SELECT pg_try_advisory_lock(hashtextextended('reread ' || %s || ' ' || %s, 0))"
_READ = "SELECT phase, behind, tally FROM sync.reread WHERE link = %s AND span = %s"
_WRITE = """\
INSERT INTO sync.reread (link, span, phase, behind, tally) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (link, span) DO UPDATE SET phase = excluded.phase, behind = excluded.behind,
    tally = excluded.tally, noted_at = now(),
    begun_at = CASE WHEN sync.reread.phase = 'done' THEN now() ELSE sync.reread.begun_at END"""
_PROGRESS = "SELECT FROM sync.progress WHERE link = %s AND lane = 'routine'"


class AlreadyRunning(CampusSyncError):
    """The same rows are being read again by another process."""


def hold(conn: psycopg.Connection, link: str, span: Span) -> None:
    """Makes sure that the link has begun, and that nobody else reads the span for it again.

    Holds for as long as the connection.

    Raises:
      CampusSyncError: the link was never run. AlreadyRunning: as it says.
    """
    if conn.execute(_PROGRESS, (link,)).fetchone() is None:
        raise CampusSyncError(
            f"link {link} has no ledger: nothing was delivered by it yet. Remedy: `campus-sync "
            "run` reads its source whole first."
        )
    if not conn.execute(_LOCK, (link, span.name)).fetchone()[0]:
        raise AlreadyRunning(
            f"link {link}: these rows of {span.table} are being read again by another process. "
            "Remedy: wait until it has ended; pg_locks of the store shows its advisory lock."
        )


def read(conn: psycopg.Connection, link: str, span: Span) -> Note | None:
    """Returns how far a span has come; None: it was never begun, or it has ended."""
    row = conn.execute(_READ, (link, span.name)).fetchone()
    if row is None or row[0] == Phase.DONE:
        return None
    behind = {column: bytes.fromhex(value) for column, value in row[1].items()}
    return Note(Phase(row[0]), behind, Tally(**row[2]))


def write(conn: psycopg.Connection, link: str, span: Span, note: Note) -> None:
    """Notes how far a span has come: on disk no sooner than what was delivered before."""
    behind = json.dumps({column: value.hex() for column, value in note.behind.items()})
    tally = json.dumps(dataclasses.asdict(note.tally))
    conn.execute(_WRITE, (link, span.name, note.phase, behind, tally))
