"""Take over what other clocks say of records."""

import collections.abc

import psycopg

from schemas.conflict_policy import ConflictRules
from schemas.hlc import HybridClock

SKEW = "clock_distrusted"  # A kind of incident.

_CLOCK = """\
SELECT name, sync.wall_us(), (SELECT last_value FROM sync.hlc), distrusted,
    name || '.' || sync.incarnation() FROM sync.store"""
_ADOPT = "SELECT setval('sync.hlc', %(stamp)s) FROM sync.hlc WHERE last_value < %(stamp)s"
_DISTRUST = f"""\
WITH told AS (UPDATE sync.store SET distrusted = ARRAY(
        SELECT DISTINCT unnest(distrusted || %(actors)s::text[]) ORDER BY 1))
INSERT INTO sync.incident (link, kind, detail) SELECT actor, '{SKEW}',
    'its stamps are ahead by more than the bound: mend that clock' FROM unnest(%(actors)s::text[])
    AS actor"""


def ask_clock(conn: psycopg.Connection) -> psycopg.Cursor:
    """Asks for the store's clock, for `take_stamps`."""
    return conn.execute(_CLOCK)


def take_stamps(
    conn: psycopg.Connection,
    rules: ConflictRules,
    stamps: collections.abc.Iterable[tuple],
    clock: psycopg.Cursor | None = None,
) -> None:
    """Takes over what other clocks say, within the bound; tells of those beyond it.

    Args:
      stamps: (hlc, actor). Of each actor the greatest within the bound, and the greatest, will do.
      clock: what `ask_clock` asked for in this transaction; by default it is asked now.
    """
    _, wall_us, latest, distrusted, actor = (clock or ask_clock(conn)).fetchone()
    hybrid = HybridClock(lambda: wall_us, rules.skew_bound_us, latest, distrusted)
    for stamp, who in sorted(stamps):
        if who != actor:
            hybrid.witness(stamp, who)
    if hybrid.latest > latest:
        conn.execute(_ADOPT, {"stamp": hybrid.latest})
    if new := sorted(hybrid.distrusted - set(distrusted)):
        conn.execute(_DISTRUST, {"actors": new})
