"""Pull what a peer store knows: whole records, by its change numbers, joined in one transaction.

A message may be lost, repeated or overtaken, and a record may come round a ring: joining makes
all of that harmless, and a record that teaches nothing gets no new change number, so nothing
echoes. The cursor is the puller's and moves in the transaction of the joins. It holds for one
incarnation of the peer only: one that may have gone back to a backup is read from its beginning.
"""

import functools
import typing

import psycopg

from schemas.batches import Lane
from schemas.conflict_policy import ConflictRules
from schemas.errors import CampusSyncError
from schemas.hlc import us_of
from schemas.siblings import record_from_json
from transforms import postgresql_sessions
from transforms.conflicts.join import join_records
from transforms.deliver.edits.carry_records import Carrier, Wanted
from transforms.deliver.edits.fold_plain import fold_plain
from transforms.deliver.edits.hold_records import SESSION, Records, pending
from transforms.deliver.edits.record_keys import Key

PULL_ROWS = 2_000
FOLD_ROWS = 2_000
_JOIN_ROWS = 500  # Of one transaction, where each is looked into: clients wait for its rows.

# What this store offers, and where its numbers come from, seen at one moment.
_OFFER = """\
SELECT s.name, sync.incarnation(), s.change, s.rules,
    (SELECT max(change) FROM sync.record WHERE urgent) FROM sync.store s"""
_CURSOR = "SELECT incarnation, change FROM sync.exchange WHERE peer = %s AND lane = %s"
# How long ago the newest edit was made that came, by this store's clock.
_LAG_US = """\
CASE WHEN %(edited_us)s::bigint IS NOT NULL
        THEN greatest(0, sync.wall_us() - %(edited_us)s::bigint) END"""
_MOVE = f"""\
INSERT INTO sync.exchange AS x (peer, lane, incarnation, change, received, learned, lag_us,
    lag_us_max)
VALUES (%(peer)s, %(lane)s, %(incarnation)s, %(change)s, %(received)s, %(learned)s,
    coalesce({_LAG_US}, 0), coalesce({_LAG_US}, 0))
ON CONFLICT (peer, lane) DO UPDATE SET incarnation = excluded.incarnation,
    change = excluded.change, received = x.received + excluded.received,
    learned = x.learned + excluded.learned, lag_us = coalesce({_LAG_US}, x.lag_us),
    lag_us_max = greatest(x.lag_us_max, excluded.lag_us_max), moved_at = clock_timestamp()"""


class OtherRules(CampusSyncError):
    """Two stores settle conflicts by different policies: they would never agree."""


_Joins = list[tuple[int, Key, str, str]]  # As `Taken.to_join`.


class Pulled(typing.NamedTuple):
    """`received`: records read from the peer. `learned`: that taught something. `behind`: more
    is to be read at once."""

    received: int
    learned: int
    behind: bool


class Folded(typing.NamedTuple):
    """`changed`: records that are others now. `behind`: more is to be folded at once.

    What came meanwhile is not: each page costs by itself what a hundred edits cost.
    """

    changed: int
    behind: bool


def connect(dsn: str) -> psycopg.Connection:
    """Returns an autocommit connection of the exchange to a store.

    Raises:
      psycopg.OperationalError: the store cannot be reached.
    """
    conn = postgresql_sessions.connect(dsn, application_name="campus_sync_exchange")
    try:
        conn.execute(SESSION)
    except BaseException:
        conn.close()
        raise
    return conn


def fold_pending(conn: psycopg.Connection, rules: ConflictRules, limit: int = FOLD_ROWS) -> Folded:
    """Takes clients' edits into their records: what is plain at once, of the others some.

    Args:
      limit: of how many edits, those of the emergency lane first.

    Raises:
      psycopg.Error, one of `hold_records.PASSING`: what was not committed is folded again.
    """
    keys, full = pending(conn, limit)
    if not keys:
        return Folded(0, False)
    with conn.transaction():
        plain = fold_plain(conn, rules, keys)
    others = [key for key in keys if key not in plain]
    changed = len(plain)
    if some := others[:_JOIN_ROWS]:
        changed += len(Records(conn, rules).update(some, wait=False).learned)
    return Folded(changed, changed > 0 and (full or len(others) > len(some)))


class Puller:
    """Carries what one peer knows into one store, for as long as both connections hold.

    Args:
      conn: to the store; peer: to the other one; both from `connect`.
    """

    def __init__(self, conn: psycopg.Connection, peer: psycopg.Connection, rules: ConflictRules):
        self._conn, self._peer = conn, peer
        self._records = Records(conn, rules)
        self._carrier = Carrier(conn, peer, rules)
        self._rules = rules
        self._ahead: dict[Lane, int] = {}
        self._waiting: dict[Lane, dict[Key, int]] = {lane: {} for lane in Lane}
        self._incarnation = ""

    def pull(self, rows: int = PULL_ROWS) -> Pulled:
        """Pulls some records of both lanes: urgent edits first, and then all, in order.

        The routine lane passes over what the other has brought.

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
        wanted = Wanted(lane, self._incarnation, after, upto, self._express(), limit)
        if not waiting and not self._carrier.offered(wanted):
            self._move(lane, name, upto, 0, {}, 0, [])
            self._ahead[lane] = upto
            return Pulled(0, 0, False)
        with self._conn.transaction():
            page = self._carrier.stage(wanted)
            reached = max(after, page.last)
            if waiting:
                self._carrier.stage_again(waiting)
            taken = self._carrier.take(lane)
            skipped, joins = dict(taken.skipped), taken.to_join
            move = functools.partial(self._move, lane, name, reached, page.rows)
            learned, hlcs = taken.learned, [taken.hlc]
            learned += self._join(joins[:_JOIN_ROWS], lane, skipped, hlcs)
            if len(joins) <= _JOIN_ROWS:
                move(skipped, learned, hlcs)
        for begin in range(_JOIN_ROWS, len(joins), _JOIN_ROWS):
            with self._conn.transaction():
                some = joins[begin : begin + _JOIN_ROWS]
                learned += self._join(some, lane, skipped, hlcs)
                if begin + _JOIN_ROWS >= len(joins):
                    move(skipped, learned, hlcs)
        self._ahead[lane] = reached
        self._waiting[lane] = {key: waiting.get(key, n) for key, n in skipped.items()}
        return Pulled(page.rows, learned, reached < upto)

    def _express(self) -> int:
        """Up to which change the emergency lane has brought all that it is to bring."""
        waiting = self._waiting[Lane.EMERGENCY].values()
        return min([self._ahead[Lane.EMERGENCY], *(change - 1 for change in waiting)])

    def _join(
        self, rows: _Joins, lane: Lane, skipped: dict[Key, int], hlcs: list[int | None]
    ) -> int:
        """Joins records one by one; returns how many learned, notes whom it passed over."""
        if not rows:
            return 0
        records = {key: record_from_json(text) for _, key, _, text in rows}
        updated = self._records.update(
            records,
            lambda key, record: join_records(record, records[key]),
            {key: src_table for _, key, src_table, _ in rows},
            wait=False,
        )
        skipped |= {key: change for change, key, _, _ in rows if key in updated.skipped}
        hlcs += [
            entry.stamp.hlc
            for record in updated.learned.values()
            for entries in record.live.values()
            for entry in entries.values()
            if entry.stamp.lane is lane
        ]
        return len(updated.learned)

    def _move(
        self,
        lane: Lane,
        name: str,
        reached: int,
        received: int,
        skipped: dict[Key, int],
        learned: int,
        hlcs: list[int | None],
    ) -> None:
        """Moves the cursor: what a client holds now is met again, so it stays before that."""
        waiting = self._waiting[lane]
        held = [waiting.get(key, change) - 1 for key, change in skipped.items()]
        self._conn.execute(
            _MOVE,
            {
                "peer": name,
                "lane": lane.value,
                "incarnation": self._incarnation,
                "change": min([reached, *held]),
                "received": received,
                "learned": learned,
                "edited_us": max((us_of(hlc) for hlc in hlcs if hlc is not None), default=None),
            },
        )
