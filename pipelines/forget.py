"""Forget the content of records that were deleted long ago, once every store knows that."""

import collections.abc
import contextlib
import dataclasses

import psycopg

from schemas.batches import Lane
from schemas.config import PRIMARY, Config
from schemas.conflict_policy import ConflictRules
from schemas.errors import CampusSyncError
from schemas.hlc import stamp_of
from schemas.siblings import DELETED, ROW, Record, Stamp
from schemas.versions import EMPTY, SOURCE_MARK, VersionVector, from_text
from transforms.conflicts.tombstones import forget, may_forget
from transforms.deliver.edits.exchange_records import connect
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.record_keys import Key, names_of, same_key

_PAGE = 500
_EDITOR = "campus-sync"
_REASON = "deleted for longer than the longest outage; known so at every store"
_WALL = "SELECT sync.wall_us() FROM sync.store"
_STAMP = "SELECT sync.tick(), name || '.' || sync.incarnation(), distrusted FROM sync.store"
# What a source has is no candidate: its content is the source's to keep.
_CANDIDATES = f"""\
SELECT r.table_name, r.campus, r.record_id FROM sync.record r
WHERE (r.record_id, r.table_name, r.campus) > (%(id)s, %(table)s, %(campus)s)
    AND r.record @> '{{"edits": [{{"wrote": {{"{ROW}": {{"values": {{"{DELETED}": true}}}}}}}}]}}'
    AND jsonb_path_exists(r.record, '$.edits.wrote.keyvalue() ? (@.key != "{ROW}")')
    AND (jsonb_path_query_first(r.record, '$.edits ? (exists(@.wrote."{ROW}")).hlc'))::bigint
        < %(before)s
    AND NOT EXISTS (SELECT FROM jsonb_object_keys(r.seen) AS k(actor)
        WHERE k.actor ^@ '{SOURCE_MARK}')
ORDER BY r.record_id, r.table_name, r.campus LIMIT {_PAGE}"""
_SEEN = f"""\
SELECT r.table_name, r.campus, r.record_id, (r.record -> 'seen')::text
FROM unnest(%(ids)s::text[], %(tables)s::text[], %(campuses)s::text[])
    AS k(record_id, table_name, campus) JOIN sync.record r ON {same_key("r", "k")}
WHERE r.record IS NOT NULL"""


def kept_for(config: Config, rules: ConflictRules) -> ConflictRules:
    """Returns the rules with the time for which this configuration keeps deleted content."""
    wanted_us = round((config.forget_days or 0) * 86_400_000_000)
    longer = max(wanted_us, rules.longest_outage_us)
    return dataclasses.replace(rules, longest_outage_us=longer)


def forget_deleted(config: Config, rules: ConflictRules) -> int:
    """Forgets, in the primary store, the content of what was deleted; returns of how many records.

    It is an edit, so the exchange carries it to the others; the history keeps every version.
    Every store that is configured must be reached and say that it has seen all that the primary
    has seen of a record: else the record waits. By the slowest of the stores' clocks.

    Raises:
      CampusSyncError: a store cannot be reached; nothing was forgotten.
      psycopg.Error: what was forgotten until then stays forgotten.
    """
    rules = kept_for(config, rules)
    with contextlib.ExitStack() as stack:
        conns = {
            name: stack.enter_context(contextlib.closing(_connected(name, store.dsn)))
            for name, store in config.stores.items()
        }
        walls = {name: conn.execute(_WALL).fetchone() for name, conn in conns.items()}
        if None in walls.values():  # One was never opened, so it has not seen anything yet.
            return 0
        now_us = min(wall_us for (wall_us,) in walls.values())
        conn = conns.pop(PRIMARY)
        forgotten, last = 0, Key("", "", "")
        while keys := _candidates(conn, last, stamp_of(now_us - rules.longest_outage_us)):
            known = [_seen(other, keys) for other in conns.values()]
            forgotten += _forget(conn, keys, known, rules, now_us)
            last = keys[-1]
        return forgotten


def _connected(name: str, dsn: str) -> psycopg.Connection:
    try:
        return connect(dsn)
    except psycopg.OperationalError:
        raise CampusSyncError(f"store {name} cannot be reached: nothing is forgotten") from None


def _candidates(conn: psycopg.Connection, last: Key, before: int) -> list[Key]:
    names = {"id": last.record_id, "table": last.table, "campus": last.campus, "before": before}
    return [Key(*row) for row in conn.execute(_CANDIDATES.encode(), names)]


def _seen(conn: psycopg.Connection, keys: list[Key]) -> dict[Key, VersionVector]:
    rows = conn.execute(_SEEN.encode(), names_of(keys))
    return {Key(*row[:3]): from_text(row[3]) for row in rows}


def _forget(
    conn: psycopg.Connection,
    keys: list[Key],
    known: collections.abc.Sequence[collections.abc.Mapping[Key, VersionVector]],
    rules: ConflictRules,
    now_us: int,
) -> int:
    def step(key: Key, record: Record) -> Record:
        acknowledged = {str(i): seen.get(key, EMPTY) for i, seen in enumerate(known)}
        if not may_forget(record, rules.tables[key.table], rules, acknowledged, now_us):
            return record
        hlc, actor, distrusted = conn.execute(_STAMP).fetchone()
        trusted = tuple(sorted(distrusted))
        stamp = Stamp(hlc, Lane.ROUTINE, "", _EDITOR, False, _REASON, trusted)
        return forget(record, actor, stamp)

    return len(Records(conn, rules).update(keys, step, wait=False).learned)
