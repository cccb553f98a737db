"""A consult store as a link delivers to it: one connection, each work a transaction."""

import contextlib
import logging
import typing
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import psycopg
import pyarrow as pa

from schemas import wire
from schemas.batches import ChangeBatch, Lane
from schemas.entities import TABLES
from schemas.errors import SealBrokenError, StoreUnavailable
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from transforms.deliver import ledger, mend_rows
from transforms.deliver.delivery import Delivery
from transforms.deliver.edits.edit_schema import OWN_SESSION
from transforms.deliver.merging import merge
from transforms.deliver.merging.merge import TableMerger
from transforms.deliver.merging.outcomes import ContendedError, ExpressRefused
from transforms.deliver.merging.trim import new_parts
from transforms.deliver.replay_letter import Retrial, Settled, settle
from transforms.deliver.sets.claims import Claims
from transforms.deliver.sets.commit_sets import CommitSets
from transforms.deliver.sets.lacking_sets import lacking_sets
from transforms.seal_dead_letters import Sealer

_LOGGER = logging.getLogger(__name__)

_T = typing.TypeVar("_T")
_ATTEMPTS = 5  # Of one transaction, where another lane's locks crossed ours.
_RETRYABLE = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    ContendedError,
    ExpressRefused,
)
_SESSION = f"""\
SET default_transaction_isolation = 'read committed'; {OWN_SESSION};
SET TimeZone = 'UTC';
-- Safe, as rows and ledger are lost together or not at all and `ledger.read` tells only what
-- is on disk: a commit does not wait for it (trap 3).
SET synchronous_commit = off;
-- A worker that vanished must not hold the ledger's lock.
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
SET idle_in_transaction_session_timeout = '60s'; SET lock_timeout = '30s'"""


class Store:
    """One link's way into its consult store, over one connection; not thread-safe.

    Opens its connection when first needed and again after it broke. The session is set up in
    one place, `_connected`: what it is to run as (a replication origin) belongs there.

    Args:
      dsn: libpq connection string of the store.
      link: `source>store`. campus: the source's name, noted in every row.
      sealer: seals what the store refuses.
      now_us: microseconds since 1970.
      verify: raises SealBrokenError where a batch is not as it was sealed.
      claims: what this process has written of sets for the store: delivered, not duplicates.
      in_order: tables with rows that are not applied before all that was sent before them.
    """

    def __init__(
        self,
        dsn: str,
        link: str,
        campus: str,
        sealer: Sealer,
        now_us: Callable[[], int],
        verify: Callable[[ChangeBatch], None] = wire.verify,
        claims: Claims | None = None,
        in_order: Collection[str] = (),
    ):
        self._dsn = dsn
        self._link = link
        self._campus = campus
        self._sealer = sealer
        self._now_us = now_us
        self._verify = verify
        self._claims = claims
        self._in_order = in_order
        self._conn: psycopg.Connection | None = None
        self._mergers: dict[tuple[str, Lane], TableMerger] = {}

    def close(self) -> None:
        """Closes the connection; the store may be used again."""
        conn, self._conn = self._conn, None
        self._mergers.clear()
        if conn is not None:
            conn.close()

    def apply(self, batches: Sequence[ChangeBatch], lane: Lane) -> Receipt:
        """Applies what is new in `batches` of one lane and moves its ledger: all or nothing.

        In any order, split and number of times that batches come, the store ends with the
        same rows, and every change is counted once, when its range is first applied. A batch
        beyond the ledger is applied as an island, unless it needs what is missing before it
        (unchanged columns, the end of a snapshot) or has tables `in_order`: it is then left to be
        sent again, as is one whose seal is broken. Rows that the store refuses become dead letters.

        Returns:
          The receipt; `applied` is False where nothing was new, and its counts are then zero.

        Raises:
          StoreUnavailable: nothing was written; send again when the store is back.
          ConservationBroken: nothing was written; the batch's count is not that of its content.
        """
        sound = self._sound(batches, lane)
        names = {name for batch in sound for name in batch.tables}
        return self._persistently(
            names,
            lane,
            lambda conn, attempt: self._delivery(conn, sound, lane, express=attempt == 1),
        )

    def lacking_sets(
        self,
        batches: Sequence[ChangeBatch],
        lane: Lane,
        kinds: Sequence[Sequence[str]],
        by_commit: bool,
    ) -> list[CommitSets] | None:
        """Returns the sets in `batches` of which the store lacks a row; see `lacking_sets`.

        Raises:
          StoreUnavailable: it cannot be asked.
        """
        sound = self._sound(batches, lane)
        return self.do(
            lambda conn: lacking_sets(conn, self._link, self._campus, sound, lane, kinds, by_commit)
        )

    def do(self, work: Callable[[psycopg.Connection], _T]) -> _T:
        """Does something else over the store's connection, outside of any transaction.

        Raises:
          StoreUnavailable: the store broke.
        """
        return self._persistently((), Lane.ROUTINE, lambda conn, _: work(conn))

    def replay(self, retrial: Retrial) -> Settled | None:
        """Tries a dead letter's change again: row, letter and counts, all or nothing.

        Safe while batches are applied elsewhere; replayed again, nothing happens.

        Returns:
          What became of it, or None: the letter was not open any more.

        Raises:
          StoreUnavailable: nothing was written; try again when the store is back.
        """
        return self._persistently(
            (retrial.table,) if retrial.rows is not None else (),
            retrial.lane,
            lambda conn, _: settle(
                conn, self._link, self._campus, retrial, self._merger, self._sealer
            ),
        )

    def mend(self, table: str, rows: pa.RecordBatch) -> Counts:
        """Delivers rows of the source again, where a reconciliation found the store otherwise.

        Raises:
          StoreUnavailable: nothing was written; try again when the store is back.
        """
        return self._persistently(
            (table,),
            Lane.ROUTINE,
            lambda conn, _: mend_rows.mend(
                conn, self._link, self._campus, table, rows, self._merger
            ),
        )

    def _persistently(
        self, names: Iterable[str], lane: Lane, work: Callable[[psycopg.Connection, int], _T]
    ) -> _T:
        """Does one transaction, again where another writer's crossed it; `names`: its tables."""
        try:
            conn = self._connected()
            for name in names:
                self._merger(name, lane)
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return work(conn, attempt)
                except _RETRYABLE:
                    conn.execute("ROLLBACK")
                    if attempt == _ATTEMPTS:
                        raise
        except ContendedError:
            raise StoreUnavailable(f"{self._place()}: other writers kept its rows") from None
        except psycopg.Error as error:
            self.close()  # Ends the transaction, whatever state it was in.
            raise ledger.unavailable(self._place(), error) from None
        except BaseException:
            self.close()
            raise

    def _sound(self, batches: Sequence[ChangeBatch], lane: Lane) -> list[ChangeBatch]:
        sound = [batch for batch in batches if self._is_sound(batch)]
        for batch in sound:
            if batch.link != self._link or batch.lane is not lane:
                raise ValueError(f"a batch of {batch.link} {batch.lane} for {self._link} {lane}")
        return sound

    def _delivery(self, conn, batches: list[ChangeBatch], lane: Lane, express: bool) -> Receipt:
        before = ledger.lock(conn, self._link, lane)
        parts, after = new_parts(batches, before, self._in_order)
        if not parts:
            conn.execute("ROLLBACK")
            return _nothing(self._link, lane, before.position, batches)
        with self._claims or contextlib.nullcontext() as claims:
            place = (self._link, self._campus, lane)
            delivery = Delivery(conn, *place, parts, before, after, claims)
            self._write(delivery, lane, express)
        return delivery.receipt(self._now_us())

    def _write(self, delivery: Delivery, lane: Lane, express: bool) -> None:
        mergers = {name: self._merger(name, lane) for name in delivery.tables}
        for merger in mergers.values():
            merger.begin()
        delivery.write_rows(mergers, express)
        delivery.sweep(lambda name: self._merger(name, lane))
        delivery.finish(self._sealer)

    def _is_sound(self, batch: ChangeBatch) -> bool:
        try:
            self._verify(batch)
        except SealBrokenError:
            _LOGGER.error("link %s: a %s batch broke its seal", self._link, batch.lane)
            return False
        return True

    def _connected(self) -> psycopg.Connection:
        if self._conn is None or self._conn.closed:
            self._mergers.clear()
            conn = ledger.connect(self._dsn)
            try:
                merge.prepare(conn)
                conn.execute(_SESSION)
            except BaseException:
                conn.close()
                raise
            self._conn = conn
        return self._conn

    def _merger(self, table: str, lane: Lane) -> TableMerger:
        merger = self._mergers.get((table, lane))
        if merger is None:
            merger = TableMerger(self._conn, TABLES[table], self._campus, lane)
            self._mergers[table, lane] = merger
        return merger

    def _place(self) -> str:
        return f"store of {self._link} at {ledger.server_of(self._dsn)}"


def _nothing(link: str, lane: Lane, at: Position, batches: Sequence[ChangeBatch]) -> Receipt:
    watermark_us = max((batch.watermark_us for batch in batches), default=0)
    none = np.empty(0, np.int64)
    return Receipt(link, lane, at, False, Counts(), 0, watermark_us, none, none)
