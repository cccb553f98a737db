"""Mend the rows in which a store differs from its source, by the rules of every delivery."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipelines.differences import Ends
from schemas.config import Link
from schemas.reconciliation import DIFFERING
from transforms.deliver.mend_rows import as_changes, as_tombstones
from transforms.deliver.store import Store
from transforms.differing_rows import Excuses, Found
from transforms.row_sets import Rows
from transforms.seal_dead_letters import Sealer
from transforms.set_sums import hash_ids

PATIENCE_S = 30.0  # With transactions of the source that are under way.
_TOGETHER = 20_000
UNDER_WAY = "TransactionsUnderWay"


def mend(
    ends: Ends, link: Link, table: str, found: Found, excuses: Excuses, now_us: Callable[[], int]
) -> tuple[int, str]:
    """Delivers again what differs; returns how many rows no longer do, and why not all, or "".

    Rows are read anew, in a view of which it is known where in the log it stands: they get that
    position, so that a change which the view has not seen wins, before or after. What the view
    does not have becomes a tombstone, at every store: they are to agree on deletions too.

    Raises:
      psycopg.Error, SourceUnavailable: an end cannot be read. StoreUnavailable: nor written.
    """
    mended = 0
    rows, extra = found.rows(*DIFFERING), found.rows("extra").hashes
    for start in range(0, len(rows), _TOGETHER):
        chosen = np.zeros(len(rows), np.bool_)
        chosen[start : start + _TOGETHER] = True
        some = rows.where(chosen)
        if not _deliver(ends, link, table, some, np.isin(some.hashes, extra), now_us):
            return mended, UNDER_WAY
        left = ends.look(link, table, some.ids.to_pylist(), None, excuses)
        mended += len(some) - sum(left.count(kind) for kind in DIFFERING)
    return mended, ""


def _deliver(
    ends: Ends, link: Link, table: str, rows: Rows, extra: np.ndarray, now_us: Callable[[], int]
) -> bool:
    side = ends.sources[link.source]
    present: list[str] = []
    with Stores(ends, link.source, now_us) as stores:
        with side.reading(PATIENCE_S) as view:
            if view.given_lsn is None:
                return False
            for part in view.changes(table, rows.ids.to_pylist()):
                if part.num_rows:
                    changes = as_changes(table, part, view.given_lsn, view.taken_us)
                    stores.of(link).mend(table, changes)
                    present += part["record_id"].to_pylist()
        # The view may lack a row only because the mapping refuses it.
        refused = np.fromiter(side.refused.get(table, ()), np.uint64)
        absent = ~np.isin(rows.hashes, hash_ids(pa.array(present, pa.utf8())))
        gone = rows.where(extra & absent & ~np.isin(rows.hashes, refused))
        if len(gone):
            sources = gone.src_tables.cast(pa.utf8())
            deletions = as_tombstones(table, gone.ids, sources, view.given_lsn, view.taken_us)
            for each in ends.links(link.source):
                stores.of(each).mend(table, deletions)
    return True


class Stores:
    """The stores of a campus's links, opened when they are needed."""

    def __init__(self, ends: Ends, campus: str, now_us: Callable[[], int]):
        self._config, self._campus, self._now_us = ends.config, campus, now_us
        self._open: dict[str, Store] = {}

    def __enter__(self) -> "Stores":
        return self

    def __exit__(self, *_) -> None:
        for store in self._open.values():
            store.close()

    def of(self, link: Link) -> Store:
        if link.name not in self._open:
            dsn = self._config.stores[link.store].dsn
            sealer = Sealer(self._config.dead_letter_key)
            self._open[link.name] = Store(dsn, link.name, self._campus, sealer, self._now_us)
        return self._open[link.name]
