"""Beside the ledger: what stood in a source's log at the place where its reader was."""

import psycopg

from transforms.capture.mariadb.anchor import Anchor

_NOTE = """\
INSERT INTO sync.anchor (link, lsn, gtid, noted_at) VALUES (%s, %s, %s, clock_timestamp())
ON CONFLICT (link) DO UPDATE
SET lsn = excluded.lsn, gtid = excluded.gtid, noted_at = excluded.noted_at"""


def read(conn: psycopg.Connection, link: str) -> Anchor | None:
    """Returns what was noted last, or None."""
    row = conn.execute("SELECT lsn, gtid FROM sync.anchor WHERE link = %s", (link,)).fetchone()
    return None if row is None else Anchor(*row)


def note(conn: psycopg.Connection, link: str, anchor: Anchor) -> None:
    """Keeps an anchor in place of the one before.

    It may be beyond the ledger: a log that is the same there is the same before it.
    """
    conn.execute(_NOTE, (link, *anchor))


def forget(conn: psycopg.Connection, link: str) -> None:
    """Removes what was noted: a snapshot begins the link anew."""
    conn.execute("DELETE FROM sync.anchor WHERE link = %s", (link,))
