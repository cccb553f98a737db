"""Find the rows in which a source and its stores differ, while changes flow."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import psycopg
import pyarrow as pa

from pipelines.source_sides import side_of
from schemas.batches import DeadLetter
from schemas.config import Config, Link
from schemas.errors import (
    ConfigError,
    DeadLetterDamagedError,
    SourceUnavailable,
    reason,
)
from schemas.positions import Position
from schemas.reconciliation import DIFFERING
from transforms.deliver.edits.edit_schema import EDITED
from transforms.differing_rows import LSN_MAX, Excuses, Found, differences
from transforms.row_sets import (
    Reading,
    Rows,
    StoreSide,
    concat,
)
from transforms.seal_dead_letters import Sealer
from transforms.set_sums import BUCKETS, Sketch, Sums, hash_id, hash_ids
from transforms.table_sums import FirstLook, StoreSums

UNREADABLE = (psycopg.Error, SourceUnavailable)
_GROUP_ROWS = 1_000_000  # Of one side, looked at together where buckets differ: 50 bytes each.
_BY_IDS_MAX = 50_000  # Beyond, reading whole tables is faster than asking for rows.
_ROUNDS = 4
_POLL_S = 0.1
_FIRST_WAIT_S = 2.0  # The first pass may find too much: the second one waits in earnest.
_CONNECTOR_POLL_S = 0.5

_FOLLOWED = """\
SELECT coalesce((SELECT max(lsn) FROM sync.snapshot WHERE link = %(link)s), 0),
    coalesce((SELECT lsn FROM sync.progress WHERE link = %(link)s AND lane = 'routine'), 0)"""
_REACHED = "SELECT lsn, seq FROM sync.progress WHERE link = %s AND lane = 'routine'"
_ANYWHERE = """\
SELECT greatest((SELECT max(lsn) FROM sync.progress WHERE link = %s),
    (SELECT max(end_lsn) FROM sync.island WHERE link = %s), 0)"""
_LETTERS = """\
SELECT letter_id, src_table, lsn, seq, ascii(op::text),
    (extract(epoch FROM committed_at) * 1000000)::bigint, reason, column_name, key_id, sealed
FROM sync.dead_letter WHERE link = %s AND state = 'open'"""
_HOLDS = """\
SELECT src_table, max(lsn) FROM sync.hold WHERE link = %s AND state = 'open' GROUP BY 1"""
_RECORDS = "SELECT to_regclass('sync.record')"
_EDITED = """\
SELECT record_id FROM sync.record WHERE campus = %(campus)s AND table_name = %(table)s
UNION ALL SELECT record_id FROM sync.edit WHERE campus = %(campus)s AND table_name = %(table)s"""


class Ends:
    """The sources and stores of a configuration, as they are compared; may be used by threads.

    Attributes:
      sources: all of them by campus. stores: by name. unseen: campuses whose content is not to be
        had, because only a connector sees the database behind their topic.
      rows: how many have been read.
    """

    def __init__(self, config: Config, settle_s: float, monotonic: Callable[[], float]):
        self.config = config
        self.sources = {name: side_of(name, source) for name, source in config.sources.items()}
        topics = {name: s for name, s in config.sources.items() if s.kind == "debezium"}
        self.unseen = {name for name, source in topics.items() if source.content is None}
        self.stores = {name: StoreSide(name, store.dsn) for name, store in config.stores.items()}
        self.rows = 0
        self._followed_later = topics.keys() - self.unseen
        self._settle_s, self._monotonic = settle_s, monotonic
        self._behind: set[str] = set()
        self._slow: set[str] = set()
        self._lock = threading.Lock()

    def links(self, campus: str) -> list[Link]:
        return [link for link in self.config.links() if link.source == campus]

    def behind(self, link: str) -> bool:
        """Whether the link's ledger has not come to what was read, and is no longer waited for."""
        return link in self._behind

    def counted(self, rows: Iterable[Rows]) -> Iterator[Rows]:
        for part in rows:
            with self._lock:
                self.rows += len(part)
            yield part

    def followed(self, campus: str) -> tuple[int, int]:
        """Returns the stretch of a campus's log that every store has followed: (after, to].

        What was deleted before a store's last snapshot, that store may never have met. Stores
        that do not answer are passed over.
        """
        after, to = 0, LSN_MAX
        for link in self.links(campus):
            with contextlib.suppress(psycopg.Error), self.stores[link.store].connect() as conn:
                begun, reached = conn.execute(_FOLLOWED, {"link": link.name}).fetchone()
                after, to = max(after, begun), min(to, reached)
        return after, to

    def edited(self, campus: str, table: str) -> np.ndarray:
        """Returns hashes of the record ids that clients have edited at some store (uint64[n])."""
        found = [np.empty(0, np.uint64)]
        for link in self.links(campus):
            with contextlib.suppress(psycopg.Error), self.stores[link.store].connect() as conn:
                if conn.execute(_RECORDS).fetchone()[0] is None:
                    continue
                cursor = conn.execute(_EDITED, {"campus": campus, "table": table})
                while rows := cursor.fetchmany(10_000):
                    found.append(hash_ids(pa.array([row[0] for row in rows], pa.utf8())))
        return np.unique(np.concatenate(found))

    # The first pass: everything, summed.

    def first_look(self, campus: str, table: str) -> FirstLook:
        """Sums a campus's table at its source and at all its stores, at the same time.

        Every store is read as it was when its ledger had just passed the source's view, so that
        what differs by traffic is what changed within that moment.
        """
        down: dict[str, str] = {}
        followed, edited = self.followed(campus), self.edited(campus, table)
        links = self.links(campus)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1 + len(links)))
            source, covered_lsn = None, None
            if campus not in self.unseen:
                try:
                    view = stack.enter_context(self.sources[campus].reading())
                    covered_lsn = view.covered_lsn
                    source = pool.submit(self._sum_source, view, table, edited)
                except UNREADABLE as error:
                    down[f"source {campus}"] = reason(error)
            stores = {
                link.store: pool.submit(self._sum_store, link, table, edited, followed, covered_lsn)
                for link in links
            }
            sums, sketch = self._result(source, f"source {campus}", down) or (None, None)
            made = {
                name: self._result(future, f"store {name}", down) for name, future in stores.items()
            }
        made = {name: sums for name, sums in made.items() if sums is not None}
        return FirstLook(campus, table, sums, sketch, made, edited, down)

    def _result(self, future, end: str, down: dict[str, str]):
        try:
            return None if future is None else future.result()
        except UNREADABLE as error:
            down[end] = reason(error)
            return None

    def _sum_source(self, view: Reading, table: str, edited: np.ndarray) -> tuple[Sums, Sketch]:
        sums, sketch = Sums(), Sketch()
        for rows in self.counted(view.rows(table)):
            own = rows.where(~np.isin(rows.hashes, edited)) if len(edited) else rows
            sums.add(own.hashes, own.words)
            sketch.add(own.words, own.ids)
        return sums, sketch

    def _sum_store(
        self,
        link: Link,
        table: str,
        edited: np.ndarray,
        followed: tuple[int, int],
        covered_lsn: int | None,
    ) -> StoreSums:
        sums = StoreSums()
        side = self.stores[link.store]
        with side.connect() as conn:
            awaited = covered_lsn is not None and link.name not in self._slow
            if awaited and not self._reaches(conn, link.name, covered_lsn, _FIRST_WAIT_S):
                self._slow.add(link.name)
            for rows in self.counted(side.rows(conn, link.source, table)):
                sums.add(rows, edited, followed)
        return sums

    # The second pass: row by row.

    def look_closer(
        self,
        link: Link,
        table: str,
        ids: Collection[str] | None,
        buckets: np.ndarray,
        rows: int,
        excuses: Excuses,
    ) -> Iterator[Found]:
        """Yields how rows differ: of some ids, or of buckets where `ids` is None.

        A row counts as differing where two looks in a row said so, each at a later view of the
        source and once the store's ledger had passed it. Memory is bounded: of `rows`, which the
        larger side has, so many buckets are looked at together as hold a million. Of these hashes
        and digests are compared first, and only rows that are unlike are taken whole.
        """
        if ids is not None:
            yield self._settled(link, table, list(ids), None, excuses)
            return
        together = max(1, _GROUP_ROWS * BUCKETS // max(rows, 1))
        for start in range(0, len(buckets), together):
            wanted = np.zeros(BUCKETS, np.bool_)
            wanted[buckets[start : start + together]] = True
            unlike = self._unlike(link, table, wanted)
            if len(unlike):
                yield self._settled(
                    link, table, None, lambda hashes, u=unlike: np.isin(hashes, u), excuses
                )

    def _unlike(self, link: Link, table: str, buckets: np.ndarray) -> np.ndarray:
        """Returns hashes of ids of rows that the ends do not have alike (uint64[n]).

        Args:
          buckets: where to look (bool[BUCKETS]).
        """

        def pick(rows: Iterable[Rows]) -> tuple[np.ndarray, np.ndarray]:
            hashes, words = [np.empty(0, np.uint64)], [np.empty((0, 4), np.uint64)]
            for part in self.counted(rows):
                chosen = part.live & buckets[part.hashes & np.uint64(BUCKETS - 1)]
                rotten.append(part.hashes[chosen & part.rotten])
                hashes.append(part.hashes[chosen])
                words.append(part.words[chosen])
            return np.concatenate(hashes), np.concatenate(words)

        rotten: list[np.ndarray] = []
        store = self.stores[link.store]
        with self.sources[link.source].reading() as reading:
            mine, my_words = pick(reading.rows(table))
        with store.connect() as conn:
            self.wait(conn, link.name, reading.covered_lsn)
            theirs, their_words = pick(store.rows(conn, link.source, table))
        _, i, j = np.intersect1d(mine, theirs, return_indices=True)
        lone = np.ones(len(mine), np.bool_), np.ones(len(theirs), np.bool_)
        lone[0][i] = lone[1][j] = False
        differing = mine[i[(my_words[i] != their_words[j]).any(axis=1)]]
        return np.unique(np.concatenate([mine[lone[0]], theirs[lone[1]], differing, *rotten]))

    def _settled(
        self, link: Link, table: str, ids: list[str] | None, wanted, excuses: Excuses
    ) -> Found:
        settled = Found()
        before = None  # Hashes of what differed at the last look.
        patience_s = self._settle_s if link.source in self._followed_later else 0
        deadline = self._monotonic() + patience_s
        looks = 0
        while True:
            found = self.look(link, table, ids, wanted, excuses)
            looks += 1
            settled.extend(found.take("refused", "held", "edited"))
            rows = found.rows()
            same = before is not None and np.isin(rows.hashes, before).all()
            waiting = self._monotonic() < deadline
            if not len(rows):
                return settled
            if not waiting and (looks >= _ROUNDS or (same and not found.count("moving"))):
                break
            if waiting:
                time.sleep(_CONNECTOR_POLL_S)
            before = found.rows(*DIFFERING).hashes
            ids, wanted = _next(rows)
        for kind in DIFFERING:
            part = found.rows(kind)
            twice = np.isin(part.hashes, before)
            for name, mask in ((kind, twice), ("moving", ~twice)):
                if mask.any():
                    settled.add(name, part.where(mask))
        settled.extend(found.take("moving"))
        return settled

    def look(
        self,
        link: Link,
        table: str,
        ids: Collection[str] | None,
        wanted: Callable[[np.ndarray], np.ndarray] | None,
        excuses: Excuses,
    ) -> Found:
        """Reads rows from both ends, the source first: those of `ids`, or whose hashes are
        `wanted`."""

        def pick(rows: Iterable[Rows]) -> Rows:
            parts = (
                part if wanted is None else part.where(wanted(part.hashes))
                for part in self.counted(rows)
            )
            return concat([part for part in parts if len(part)])

        store = self.stores[link.store]
        with self.sources[link.source].reading() as reading:
            mine = pick(reading.rows(table, ids))
        with store.connect() as conn:
            self.wait(conn, link.name, reading.covered_lsn)
            theirs = pick(store.rows(conn, link.source, table, ids))
            (reached_lsn,) = conn.execute(_ANYWHERE, (link.name, link.name)).fetchone()
        refused = self.sources[link.source].refused.get(table, ())
        known = np.fromiter(refused, np.uint64, len(refused))
        excuses = dataclasses.replace(excuses, refused=np.union1d(excuses.refused, known))
        return differences(mine, theirs, reading.read_lsn, excuses, reached_lsn)

    def excuses(self, link: Link, table: str, edited: np.ndarray | None = None) -> Excuses:
        """Returns what accounts for rows of a table that differ.

        A letter tells its row only to who has the key; without it nothing is excused.
        """
        side = self.sources[link.source]
        refused = set(side.refused.get(table, ()))
        sealer = Sealer(self.config.dead_letter_key)
        with self.stores[link.store].connect() as conn:
            for row in conn.execute(_LETTERS, (link.name,)):
                try:
                    found = side.id_of(sealer.open(DeadLetter(*row)))
                except (ConfigError, DeadLetterDamagedError):
                    continue
                if found is not None and found[0] == table:
                    refused.add(hash_id(found[1]))
            held = dict(conn.execute(_HOLDS, (link.name,)).fetchall())
        if edited is None:
            edited = self.edited(link.source, table)
        return Excuses(np.array(sorted(refused), np.uint64), held, edited)

    def wait(self, conn: psycopg.Connection, link: str, lsn: int) -> None:
        """Waits until the link's ledger has reached `lsn`; a link that did not is not waited for
        again."""
        if self._reaches(conn, link, lsn, 0 if link in self._behind else self._settle_s):
            self._behind.discard(link)
        else:
            self._behind.add(link)

    def _reaches(self, conn: psycopg.Connection, link: str, lsn: int, within_s: float) -> bool:
        deadline = self._monotonic() + within_s
        while True:
            row = conn.execute(_REACHED, (link,)).fetchone()
            if row is not None and Position(*row).acknowledgeable_lsn >= lsn:
                return True
            if self._monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)

    # Stores among themselves.

    def aside(self, campus: str, table: str, store: str) -> tuple[Sums, Sums]:
        """Returns a store's tombstones and edited rows as they are now, without reading others."""
        sums, edited = StoreSums(), self.edited(campus, table)
        span, side = self.followed(campus), self.stores[store]
        with side.connect() as conn:
            only = f"(deleted OR {EDITED.format('')})"
            for rows in self.counted(side.rows(conn, campus, table, only=only)):
                sums.add(rows, edited, span)
        return sums.tombstones, sums.edited

    def same_aside(self, look: FirstLook, one: str, other: str) -> tuple[StoreSums, StoreSums]:
        """Returns two stores' sums, tombstones and edited rows read again where they are unlike:
        a row may have come back between, or an edit be on its way."""
        first, second = look.stores[one], look.stores[other]
        for _ in range(_ROUNDS):
            tombstones = first.tombstones.unequal(second.tombstones)
            if not len(tombstones) and not len(first.edited.unequal(second.edited)):
                break
            first, second = (
                dataclasses.replace(sums, tombstones=found[0], edited=found[1])
                for sums, found in (
                    (sums, self.aside(look.campus, look.table, name))
                    for sums, name in ((first, one), (second, other))
                )
            )
        return first, second


def _next(rows: Rows) -> tuple[list[str] | None, Callable[[np.ndarray], np.ndarray] | None]:
    """Returns how to find the same rows again: by their ids, or many by their hashes."""
    if len(rows) <= _BY_IDS_MAX:
        return rows.ids.to_pylist(), None
    return None, lambda hashes: np.isin(hashes, rows.hashes)
