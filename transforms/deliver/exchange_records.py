"""Pull what a peer store knows: whole records, by its change numbers, joined in one transaction.

A message may be lost, repeated or overtaken, and a record may come round a ring: joining makes
all of that harmless, and a record that teaches nothing gets no new change number, so nothing
echoes. The cursor is the puller's and moves in the transaction of the joins. It holds for one
incarnation of the peer only: one that may have gone back to a backup is read from its beginning.
"""

import collections.abc
import typing

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import ConflictRules
from schemas.errors import CampusSyncError
from schemas.hlc import us_of
from schemas.siblings import Record, record_from_json
from transforms.conflicts.join import join_records
from transforms.deliver.hold_records import SESSION, Key, Records, names_of

PULL_ROWS = 500
_FOLD_ROWS = 500
_CONNECT = {"connect_timeout": 5}

# What this store offers, and where its numbers come from, seen at one moment.
_OFFER = """\
SELECT s.name, sync.incarnation(), s.change, s.rules,
    (SELECT max(change) FROM sync.record WHERE urgent) FROM sync.store s"""
_CHANGED = """\
SELECT change, table_name, campus, record_id, src_table, record::text FROM sync.record
WHERE {} change > %(after)s AND change <= %(upto)s ORDER BY change LIMIT %(limit)s"""
_AGAIN = """\
SELECT r.change, r.table_name, r.campus, r.record_id, r.src_table, r.record::text
FROM unnest(%(ids)s::text[], %(tables)s::text[], %(campuses)s::text[])
    AS k(record_id, table_name, campus) JOIN sync.record r ON
    (r.record_id, r.table_name, r.campus) = (k.record_id, k.table_name, k.campus)"""
_CURSOR = "SELECT incarnation, change FROM sync.exchange WHERE peer = %s AND lane = %s"
_MOVE = """\
INSERT INTO sync.exchange AS x (peer, lane, incarnation, change, received, learned, lag_us,
    lag_us_max)
VALUES (%(peer)s, %(lane)s, %(incarnation)s, %(change)s, %(received)s, %(learned)s,
    coalesce(%(lag_us)s, 0), coalesce(%(lag_us)s, 0))
ON CONFLICT (peer, lane) DO UPDATE SET incarnation = excluded.incarnation,
    change = excluded.change, received = x.received + excluded.received,
    learned = x.learned + excluded.learned, lag_us = coalesce(%(lag_us)s, x.lag_us),
    lag_us_max = greatest(x.lag_us_max, excluded.lag_us_max), moved_at = clock_timestamp()"""


class OtherRules(CampusSyncError):
    """Two stores settle conflicts by different policies: they would never agree."""


class _Row(typing.NamedTuple):
    change: int
    key: Key
    src_table: str
    record: Record


class Pulled(typing.NamedTuple):
    """`received`: records read from the peer. `learned`: that taught something. `behind`: more
    is to be read at once."""

    received: int
    learned: int
    behind: bool


def connect(dsn: str) -> psycopg.Connection:
    """Returns an autocommit connection of the exchange to a store.

    Raises:
      psycopg.OperationalError: the store cannot be reached.
    """
    conn = psycopg.connect(
        dsn, autocommit=True, application_name="campus_sync_exchange", **_CONNECT
    )
    try:
        conn.execute(SESSION)
    except BaseException:
        conn.close()
        raise
    return conn


def fold_pending(conn: psycopg.Connection, rules: ConflictRules, keys: list[Key]) -> int:
    """Takes clients' edits into their records; returns how many records changed."""
    return len(Records(conn, rules).update(keys[:_FOLD_ROWS], wait=False).learned)


class Puller:
    """Carries what one peer knows into one store, for as long as both connections hold.

    Args:
      conn: to the store; peer: to the other one; both from `connect`.
    """

    def __init__(self, conn: psycopg.Connection, peer: psycopg.Connection, rules: ConflictRules):
        self._conn, self._peer = conn, peer
        self._records = Records(conn, rules)
        self._rules = rules
        self._ahead: dict[Lane, int] = {}
        self._waiting: dict[Lane, dict[Key, int]] = {lane: {} for lane in Lane}
        self._incarnation = ""

    def pull(self, rows: int = PULL_ROWS) -> Pulled:
        """Pulls some records of both lanes: urgent edits first, and then all, in order.

        The routine lane is complete by itself; the emergency lane is an express copy.

        Raises:
          OtherRules: the two stores settle by different policies; nothing was read.
          psycopg.Error: what was not committed is read again.
        """
        offer = self._peer.execute(_OFFER).fetchone()
        if offer is None:  # Never opened: it has no edits.
            return Pulled(0, 0, False)
        name, incarnation, upto, rules, urgent = offer
        if bytes(rules) != self._rules.digest:
            raise OtherRules(
                f"store {name} settles conflicts by other policies than these. Remedy: give every "
                "`run` the same version and the same conflict rules, and start them again."
            )
        if incarnation != self._incarnation:
            self._begin(name, incarnation)
        done = [self._pull(Lane.EMERGENCY, name, urgent or 0, rows)]
        done.append(self._pull(Lane.ROUTINE, name, upto, rows))
        received, learned = (sum(part[i] for part in done) for i in (0, 1))
        return Pulled(received, learned, any(part.behind for part in done))

    def _begin(self, name: str, incarnation: str) -> None:
        for lane in Lane:
            known = self._conn.execute(_CURSOR, (name, lane.value)).fetchone()
            same = known is not None and known[0] == incarnation
            self._ahead[lane] = known[1] if same else 0
            self._waiting[lane].clear()
        self._incarnation = incarnation

    def _pull(self, lane: Lane, name: str, upto: int, limit: int) -> Pulled:
        after, waiting = self._ahead[lane], self._waiting[lane]
        if after >= upto and not waiting:
            return Pulled(0, 0, False)
        found = self._read(lane, after, upto, limit) if after < upto else []
        reached = found[-1].change if len(found) == limit else max(after, upto)
        again = self._read_again(list(waiting)) if waiting else []
        rows = {row.key: row for row in (*again, *found)}
        received = len(found)
        with self._conn.transaction():
            updated = self._records.update(
                rows,
                lambda key, record: join_records(record, rows[key].record),
                {key: row.src_table for key, row in rows.items()},
                wait=False,
            )
            # What a client holds now is met again: the cursor stays before it.
            skipped = {key: waiting.get(key, rows[key].change) for key in updated.skipped}
            self._conn.execute(
                _MOVE,
                {
                    "peer": name,
                    "lane": lane.value,
                    "incarnation": self._incarnation,
                    "change": min([reached, *(change - 1 for change in skipped.values())]),
                    "received": received,
                    "learned": len(updated.learned),
                    "lag_us": self._lag_us(updated.learned, lane),
                },
            )
        self._ahead[lane], self._waiting[lane] = reached, skipped
        return Pulled(received, len(updated.learned), reached < upto)

    def _lag_us(self, learned: collections.abc.Mapping[Key, Record], lane: Lane) -> int | None:
        """How long ago the newest edit was made that came, by this store's clock."""
        stamps = [
            entry.stamp.hlc
            for record in learned.values()
            for entries in record.live.values()
            for entry in entries.values()
            if entry.stamp.lane is lane
        ]
        if not stamps:
            return None
        (wall_us,) = self._conn.execute("SELECT sync.wall_us()").fetchone()
        return max(0, wall_us - us_of(max(stamps)))

    def _read(self, lane: Lane, after: int, upto: int, limit: int) -> list[_Row]:
        urgent = "urgent AND" if lane is Lane.EMERGENCY else ""
        names = {"after": after, "upto": upto, "limit": limit}
        return list(map(_row, self._peer.execute(_CHANGED.format(urgent).encode(), names)))

    def _read_again(self, keys: list[Key]) -> list[_Row]:
        return list(map(_row, self._peer.execute(_AGAIN, names_of(keys))))


def _row(row: tuple) -> _Row:
    change, table, campus, record_id, src_table, text = row
    return _Row(change, Key(table, campus, record_id), src_table, record_from_json(text))
