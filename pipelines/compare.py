"""Compare sources and stores row by row, by content: the proof that needs no ledger."""

import concurrent.futures
from collections.abc import Callable, Iterator

from pipelines.differences import UNREADABLE, Ends
from schemas.clocks import monotonic_s
from schemas.config import PRIMARY, Config, Link
from schemas.errors import reason
from schemas.reports import Comparison, StoresMatch, TableMatch
from transforms.differing_rows import Found
from transforms.table_sums import FirstLook

SETTLE_S = 15.0
_KEYS_MAX = 20
_AT_ONCE = 3  # Tables.
_KINDS = ("missing", "extra", "different", "refused", "held", "moving")


def compare(
    config: Config,
    show_keys: bool = False,
    settle_s: float = SETTLE_S,
    monotonic: Callable[[], float] = monotonic_s,
) -> Comparison:
    """Reads every row of every mapped table from all sources and stores, and compares digests.

    Independent of what the sync recorded: rows come straight from the tables, through mapping
    and digest only. Safe while changes flow: rows that differ are looked at again once the
    store's ledger has passed what was read, and those that changed since are `moving`. Memory
    is bounded, whatever the tables' size. Behind a topic the database that its `content` names
    is read, and where none is, that campus's rows are compared among the stores only. Records
    that clients have edited are compared among the stores.

    Args:
      show_keys: name some record ids of what differs.
      settle_s: how long a store may take to apply what the source had when it was read, and a
        topic's connector to send it.
    """
    began = monotonic()
    ends = Ends(config, settle_s, monotonic)
    work = [(name, table) for name, side in ends.sources.items() for table in side.tables]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "compare") as pool:
        parts = list(pool.map(lambda place: _compare(ends, *place, show_keys), work))
    down: dict[str, str] = {}
    for part in parts:
        down |= part[2]
    return Comparison(
        tables=tuple(match for part in parts for match in part[0]),
        stores=tuple(match for part in parts for match in part[1]),
        unreachable=tuple(f"{end}: {why}" for end, why in sorted(down.items())),
        rows=ends.rows,
        seconds=monotonic() - began,
    )


def _compare(
    ends: Ends, campus: str, table: str, show_keys: bool
) -> tuple[list[TableMatch], list[StoresMatch], dict[str, str]]:
    first = ends.first_look(campus, table)
    down, matches = dict(first.down), []
    for link in ends.links(campus) if first.source is not None else ():
        if link.store in first.stores:
            try:
                matches.append(_match(ends, link, first, show_keys))
            except UNREADABLE as error:
                down[f"link {link.name}"] = reason(error)
    equal = {match.store for match in matches if match.equal}
    return matches, list(_match_stores(ends, first, equal)), down


def _match(ends: Ends, link: Link, first: FirstLook, show_keys: bool) -> TableMatch:
    theirs = first.stores[link.store]
    found = Found()
    ids, buckets = first.suspects(link.store)
    if ids is None or ids:
        excuses = ends.excuses(link, first.table, first.edited)
        rows = max(first.source.count, theirs.live.count)
        for part in ends.look_closer(link, first.table, ids, buckets, rows, excuses):
            found.extend(part)
    keys = found.keys(_KEYS_MAX) | {"rotten": theirs.rotten_ids[:_KEYS_MAX]}
    return TableMatch(
        store=link.store,
        campus=link.source,
        table=first.table,
        source_rows=first.source.count,
        store_rows=theirs.live.count,
        rotten=theirs.rotten,
        source_digest=first.source.digest.hex(),
        store_digest=theirs.live.digest.hex(),
        keys={kind: tuple(some) for kind, some in keys.items() if some} if show_keys else {},
        **{kind: found.count(kind) for kind in _KINDS},
    )


def _match_stores(ends: Ends, first: FirstLook, proven: set[str]) -> Iterator[StoresMatch]:
    having = [name for name in ends.stores if name in first.stores]
    if PRIMARY in having:
        having = [PRIMARY, *(name for name in having if name != PRIMARY)]
    for other in having[1:]:
        one, two = ends.same_aside(first, having[0], other)
        live = {having[0], other} <= proven or not len(one.live.unequal(two.live))
        yield StoresMatch(
            store=having[0],
            other=other,
            campus=first.campus,
            table=first.table,
            rows=one.live.count + one.edited.count,
            other_rows=two.live.count + two.edited.count,
            live_equal=live and not len(one.edited.unequal(two.edited)),
            tombstones=one.tombstones.count,
            other_tombstones=two.tombstones.count,
            tombstones_equal=not len(one.tombstones.unequal(two.tombstones)),
        )
