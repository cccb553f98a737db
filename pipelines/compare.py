"""Compare sources and stores row by row, by content: the proof that needs no ledger."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import psycopg

from pipelines.source_clocks import log_end
from schemas.batches import DeadLetter
from schemas.clocks import monotonic_s
from schemas.config import PRIMARY, Config, Link, Source
from schemas.errors import (
    CampusSyncError,
    ConfigError,
    DeadLetterDamagedError,
    SourceUnavailable,
)
from schemas.positions import Position
from schemas.reports import Comparison, StoresMatch, TableMatch
from transforms.row_sets import (
    BUCKETS,
    MariadbSide,
    Reading,
    Rows,
    SourceSide,
    StoreSide,
    Sums,
    concat,
    hash_id,
)
from transforms.seal_dead_letters import Sealer

SETTLE_S = 15.0
_GROUP_ROWS = 1_000_000  # Of one side, looked at together where buckets differ: 200 bytes each.
_KEYS_MAX = 20
_ROUNDS = 3
_POLL_S = 0.1
_CONNECTOR_POLL_S = 0.5
_KINDS = ("missing", "extra", "different", "refused", "held", "moving")

_FOLLOWED = """\
SELECT coalesce((SELECT max(lsn) FROM sync.snapshot WHERE link = %(link)s), 0),
    coalesce((SELECT lsn FROM sync.progress WHERE link = %(link)s AND lane = 'routine'), 0)"""
_REACHED = "SELECT lsn, seq FROM sync.progress WHERE link = %s AND lane = 'routine'"
_LETTERS = """\
SELECT letter_id, src_table, lsn, seq, ascii(op::text),
    (extract(epoch FROM committed_at) * 1000000)::bigint, reason, column_name, key_id, sealed
FROM sync.dead_letter WHERE link = %s AND state = 'open'"""
_HOLDS = """\
SELECT src_table, max(lsn) FROM sync.hold WHERE link = %s AND state = 'open' GROUP BY 1"""


@dataclasses.dataclass(frozen=True)
class Excuses:
    """What accounts for rows that differ.

    Attributes:
      refused: hashes of the record ids whose change is a dead letter or would be (uint64[n]).
      held: by source table, the LSN up to which its rows wait for a person.
    """

    refused: np.ndarray
    held: dict[str, int]


class Found:
    """Rows that differ, by kind."""

    def __init__(self):
        self.hashes: dict[str, np.ndarray] = {}
        self.keys: dict[str, list[str]] = {}

    def add(self, kind: str, rows: Rows) -> None:
        known = self.hashes.get(kind)
        self.hashes[kind] = rows.hashes if known is None else np.append(known, rows.hashes)
        keys = self.keys.setdefault(kind, [])
        keys += rows.ids.slice(0, max(0, _KEYS_MAX - len(keys))).to_pylist()

    def take(self, kind: str) -> np.ndarray:
        """Returns the rows of a kind and forgets them."""
        self.keys.pop(kind, None)
        return self.hashes.pop(kind, np.empty(0, np.uint64))

    def extend(self, other: "Found") -> None:
        for kind, hashes in other.hashes.items():
            known = self.hashes.get(kind)
            self.hashes[kind] = hashes if known is None else np.append(known, hashes)
            keys = self.keys.setdefault(kind, [])
            keys += other.keys[kind][: _KEYS_MAX - len(keys)]

    def count(self, kind: str) -> int:
        return len(self.hashes.get(kind, ()))


@dataclasses.dataclass(frozen=True)
class StoreSums:
    """One campus's rows of one table in one store.

    `rotten` counts live rows whose stored digest is not their content's; `rotten_keys` are
    some of their ids. Tombstones are those of the stretch of log that every store has followed.
    """

    live: Sums
    tombstones: Sums
    rotten: int
    rotten_keys: tuple[str, ...]


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
    is read, and where none is, that campus's rows are compared among the stores only.

    Args:
      show_keys: name some record ids of what differs.
      settle_s: how long a store may take to apply what the source had when it was read, and a
        topic's connector to send it.
    """
    return _Compare(config, show_keys, settle_s, monotonic).run()


def differences(mine: Rows, theirs: Rows, read_lsn: int, excuses: Excuses) -> Found:
    """Returns how a store's rows differ from the source's; both are sets of distinct ids.

    Args:
      mine: the source's, all live. theirs: the store's, with tombstones.
      read_lsn: of the source, before it was read: later changes of the store are `moving`.
    """
    found = Found()
    gone = theirs.where(~theirs.live)
    theirs = theirs.where(theirs.live)

    def sort(kind: str, rows: Rows, moving: np.ndarray) -> None:
        refused = np.isin(rows.hashes, excuses.refused)
        held = np.zeros(len(rows), np.bool_)
        if kind == "extra" and excuses.held:
            up_to = [excuses.held.get(name, -1) for name in rows.src_tables.to_pylist()]
            held = rows.lsn <= np.array(up_to, np.int64)
        for name, mask in (
            ("refused", refused),
            ("held", held & ~refused),
            ("moving", moving & ~held & ~refused),
            (kind, ~moving & ~held & ~refused),
        ):
            if mask.any():
                found.add(name, rows.where(mask))

    _, i, j = np.intersect1d(mine.hashes, theirs.hashes, return_indices=True)
    unlike = (mine.words[i] != theirs.words[j]).any(axis=1)
    both = _chosen(theirs, j[unlike])
    sort("different", both, both.lsn > read_lsn)
    extra = _others(theirs, j)
    sort("extra", extra, extra.lsn > read_lsn)
    missing = _others(mine, i)
    later = gone.hashes[gone.lsn > read_lsn]
    sort("missing", missing, np.isin(missing.hashes, later))
    return found


class TopicSide(SourceSide):
    """A source whose changes come from a topic, and its content from the database behind it.

    The database does not say how far its connector has come: what the topic held before the view
    is in it, and what the view holds and the topic did not have yet is only to be waited for.
    """

    def __init__(self, campus: str, source: Source):
        super().__init__(campus, source.content or "", source.mapping)
        self._source = source

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Yields one consistent view of the database, at places of the topic.

        Raises:
          psycopg.Error: of the database. SourceUnavailable: the topic does not answer.
        """
        read_lsn = self._topic_end()
        with super().reading() as found:
            yield dataclasses.replace(found, read_lsn=read_lsn, covered_lsn=self._topic_end())

    def _topic_end(self) -> int:
        try:
            return log_end(self._source).lsn
        except CampusSyncError as error:
            raise SourceUnavailable(str(error)) from error


def _side(name: str, source: Source) -> SourceSide:
    if source.kind == "debezium":
        return TopicSide(name, source)
    return (MariadbSide if source.kind == "mariadb" else SourceSide)(
        name, source.dsn, source.mapping
    )


class _Compare:
    def __init__(self, config: Config, show_keys: bool, settle_s: float, monotonic):
        self._config = config
        self._show_keys = show_keys
        self._settle_s = settle_s
        self._monotonic = monotonic
        self._sources = {name: _side(name, source) for name, source in config.sources.items()}
        topics = {name: s for name, s in config.sources.items() if s.kind == "debezium"}
        # Where only a connector sees the database behind a topic, its stores are compared alone.
        self._unseen = {name for name, source in topics.items() if source.content is None}
        self._followed_later = topics.keys() - self._unseen
        self._stores = {name: StoreSide(name, store.dsn) for name, store in config.stores.items()}
        self._down: dict[str, str] = {}
        self._behind: set[str] = set()
        self._rows = 0
        self._lock = threading.Lock()

    def run(self) -> Comparison:
        began = self._monotonic()
        sources, stores = self._sum_all()
        matches = []
        for link in self._config.links():
            try:
                matches += self._match_link(link, sources, stores)
            except (psycopg.Error, SourceUnavailable) as error:
                self._down[f"link {link.name}"] = _reason(error)
        pairs = list(self._match_stores(stores, matches))
        return Comparison(
            tables=tuple(matches),
            stores=tuple(pairs),
            unreachable=tuple(f"{end}: {why}" for end, why in sorted(self._down.items())),
            rows=self._rows,
            seconds=self._monotonic() - began,
        )

    # The first reading: everything, summed.

    def _sum_all(self) -> tuple[dict, dict]:
        """Sums every table of every end, the ends at the same time.

        Returns `Sums` by (campus, table) and `StoreSums` by (store, campus, table).
        """
        followed = self._followed()
        sources: dict[tuple, Sums] = {}
        stores: dict[tuple, StoreSums] = {}

        def sum_source(side: SourceSide) -> None:
            for table in side.tables:
                sums = Sums()
                with side.reading() as reading:
                    for rows in self._counted(reading.rows(table)):
                        sums.add(rows.hashes, rows.words)
                sources[side.campus, table] = sums

        def sum_store(side: StoreSide) -> None:
            with side.connect() as conn:
                for link in self._config.links():
                    for table in (
                        self._sources[link.source].tables if link.store == side.name else ()
                    ):
                        rows = self._counted(side.rows(conn, link.source, table))
                        key = (side.name, link.source, table)
                        stores[key] = _sum_store(rows, followed[link.source], self._show_keys)

        ends = [
            (f"source {name}", sum_source, side)
            for name, side in self._sources.items()
            if name not in self._unseen
        ]
        ends += [(f"store {name}", sum_store, side) for name, side in self._stores.items()]
        with concurrent.futures.ThreadPoolExecutor(len(ends), "compare") as pool:
            for end, future in [(end, pool.submit(work, side)) for end, work, side in ends]:
                try:
                    future.result()
                except (psycopg.Error, SourceUnavailable) as error:
                    self._down[end] = _reason(error)
        return sources, stores

    def _counted(self, rows: Iterable[Rows]) -> Iterator[Rows]:
        for part in rows:
            with self._lock:
                self._rows += len(part)
            yield part

    def _followed(self) -> dict[str, tuple[int, int]]:
        """Returns by campus the stretch of its log that every store has followed: (after, to].

        What was deleted before a store's last snapshot, that store may never have met.
        """
        spans = dict.fromkeys(self._sources, (0, 2**63 - 1))
        for link in self._config.links():
            try:
                with self._stores[link.store].connect() as conn:
                    begun, reached = conn.execute(_FOLLOWED, {"link": link.name}).fetchone()
            except psycopg.Error as error:
                self._down[f"store {link.store}"] = _reason(error)
                continue
            after, to = spans[link.source]
            spans[link.source] = (max(after, begun), min(to, reached))
        return spans

    # The second reading: what differs.

    def _match_link(self, link: Link, sources: dict, stores: dict) -> Iterator[TableMatch]:
        refused: dict[str, set[int]] | None = None
        held: dict[str, int] = {}
        for table in self._sources[link.source].tables:
            mine = sources.get((link.source, table))
            theirs = stores.get((link.store, link.source, table))
            if mine is None or theirs is None:
                continue
            found = Found()
            buckets = mine.unequal(theirs.live)
            if len(buckets):
                if refused is None:
                    refused, held = self._excuses(link)
                hashes = np.array(sorted(refused.get(table, ())), np.uint64)
                excuses = Excuses(hashes, held)
                for group in _groups(buckets, mine.rows, theirs.live.rows):
                    found.extend(self._look_closer(link, table, group, excuses))
            keys = dict(found.keys) | {"rotten": list(theirs.rotten_keys)}
            yield TableMatch(
                store=link.store,
                campus=link.source,
                table=table,
                source_rows=mine.count,
                store_rows=theirs.live.count,
                rotten=theirs.rotten,
                source_digest=mine.digest.hex(),
                store_digest=theirs.live.digest.hex(),
                keys={k: tuple(v) for k, v in keys.items() if v} if self._show_keys else {},
                **{kind: found.count(kind) for kind in _KINDS},
            )

    def _excuses(self, link: Link) -> tuple[dict[str, set[int]], dict[str, int]]:
        """Returns what dead letters (hashes by table) and holds (LSN by source table) account for.

        A letter tells its row only to who has the key; without it nothing is excused.
        """
        side = self._sources[link.source]
        refused = {table: set(hashes) for table, hashes in side.refused.items()}
        sealer = Sealer(self._config.dead_letter_key)
        with self._stores[link.store].connect() as conn:
            for row in conn.execute(_LETTERS, (link.name,)):
                try:
                    found = side.id_of(sealer.open(DeadLetter(*row)))
                except (ConfigError, DeadLetterDamagedError):
                    continue
                if found is not None:
                    refused.setdefault(found[0], set()).add(hash_id(found[1]))
            held = dict(conn.execute(_HOLDS, (link.name,)).fetchall())
        return refused, held

    def _look_closer(self, link: Link, table: str, buckets: np.ndarray, excuses: Excuses) -> Found:
        """Returns the differences in some buckets, looking again at rows that were moving."""
        wanted = np.zeros(BUCKETS, np.bool_)
        wanted[buckets] = True
        found = self._look(link, table, lambda hashes: wanted[hashes & (BUCKETS - 1)], excuses)
        if link.source in self._followed_later:
            found = self._after_the_connector(link, table, found, excuses)
        for _ in range(_ROUNDS - 1):
            moving = found.take("moving")
            if not len(moving):
                break
            found.extend(self._look(link, table, lambda h, m=moving: np.isin(h, m), excuses))
        return found

    def _after_the_connector(self, link: Link, table: str, found: Found, excuses: Excuses) -> Found:
        """Looks again at what differs until the connector has had `settle_s` to send it."""
        deadline = self._monotonic() + self._settle_s
        while self._monotonic() < deadline:
            kinds = ("missing", "extra", "different", "moving")
            hashes = np.concatenate([found.take(kind) for kind in kinds])
            if not len(hashes):
                break
            time.sleep(_CONNECTOR_POLL_S)
            found.extend(self._look(link, table, lambda h, m=hashes: np.isin(h, m), excuses))
        return found

    def _look(
        self,
        link: Link,
        table: str,
        wanted: Callable[[np.ndarray], np.ndarray],
        excuses: Excuses,
    ) -> Found:
        """Reads the rows whose hashes are `wanted` from both ends, the source first."""

        def pick(rows: Iterable[Rows]) -> Rows:
            parts = [part.where(wanted(part.hashes)) for part in self._counted(rows)]
            return concat([part for part in parts if len(part)])

        source, store = self._sources[link.source], self._stores[link.store]
        with source.reading() as reading:
            mine = pick(reading.rows(table))
        with store.connect() as conn:
            self._wait(conn, link.name, reading.covered_lsn)
            theirs = pick(store.rows(conn, link.source, table))
        return differences(mine, theirs, reading.read_lsn, excuses)

    def _wait(self, conn: psycopg.Connection, link: str, lsn: int) -> None:
        """Waits until the link's ledger has reached `lsn`; a link that did not is not waited for
        again."""
        deadline = self._monotonic() + (0 if link in self._behind else self._settle_s)
        while True:
            row = conn.execute(_REACHED, (link,)).fetchone()
            if row is not None and Position(*row).acknowledgeable_lsn >= lsn:
                return
            if self._monotonic() >= deadline:
                self._behind.add(link)
                return
            time.sleep(_POLL_S)

    # Stores among themselves.

    def _match_stores(self, stores: dict, matches: list[TableMatch]) -> Iterator[StoresMatch]:
        proven = {(m.store, m.campus, m.table) for m in matches if m.equal}
        for campus, side in self._sources.items():
            for table in side.tables:
                having = [name for name in self._stores if (name, campus, table) in stores]
                if PRIMARY in having:
                    having = [PRIMARY, *(name for name in having if name != PRIMARY)]
                for other in having[1:]:
                    first, second = (stores[name, campus, table] for name in (having[0], other))
                    both = {(name, campus, table) for name in (having[0], other)}
                    live = both <= proven or not len(first.live.unequal(second.live))
                    first, second = self._same_tombstones(campus, table, having[0], other, stores)
                    yield StoresMatch(
                        store=having[0],
                        other=other,
                        campus=campus,
                        table=table,
                        rows=stores[having[0], campus, table].live.count,
                        other_rows=stores[other, campus, table].live.count,
                        live_equal=live,
                        tombstones=first.count,
                        other_tombstones=second.count,
                        tombstones_equal=not len(first.unequal(second)),
                    )

    def _same_tombstones(self, campus: str, table: str, one: str, other: str, stores: dict):
        """Returns both stores' tombstones, read again where a row may have come back between."""
        found = [stores[name, campus, table].tombstones for name in (one, other)]
        for _ in range(_ROUNDS - 1):
            if not len(found[0].unequal(found[1])):
                break
            span = self._followed()[campus]
            found = []
            for name in (one, other):
                with self._stores[name].connect() as conn:
                    rows = self._counted(self._stores[name].rows(conn, campus, table))
                    found.append(_sum_store(rows, span, False).tombstones)
        return found


def _sum_store(rows: Iterable[Rows], followed: tuple[int, int], show_keys: bool) -> StoreSums:
    live, tombstones, rotten, keys = Sums(), Sums(), 0, []
    for part in rows:
        live.add(part.hashes[part.live], part.words[part.live])
        gone = part.hashes[~part.live & (part.lsn > followed[0]) & (part.lsn <= followed[1])]
        tombstones.add(gone, np.repeat(gone[:, None], 4, axis=1))
        if part.rotten.any():
            rotten += int(part.rotten.sum())
            if show_keys:
                ids = part.where(part.rotten).ids
                keys += ids.slice(0, max(0, _KEYS_MAX - len(keys))).to_pylist()
    return StoreSums(live, tombstones, rotten, tuple(keys))


def _groups(buckets: np.ndarray, *rows: np.ndarray) -> list[np.ndarray]:
    """Splits buckets so that no side has more than `_GROUP_ROWS` rows in a group, one bucket
    at least."""
    largest = np.maximum.reduce([side[buckets] for side in rows])
    return np.split(buckets, np.flatnonzero(np.diff(np.cumsum(largest) // _GROUP_ROWS)) + 1)


def _chosen(rows: Rows, places: np.ndarray) -> Rows:
    mask = np.zeros(len(rows), np.bool_)
    mask[places] = True
    return rows.where(mask)


def _others(rows: Rows, places: np.ndarray) -> Rows:
    mask = np.ones(len(rows), np.bool_)
    mask[places] = False
    return rows.where(mask)


def _reason(error: Exception) -> str:
    """Returns what may be shown of an error: class and SQLSTATE, never its text."""
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''}".strip()
