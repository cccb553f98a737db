"""Write the sets of a delivery to all stores of its source, all or none, before it is applied."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import psycopg
from apache_beam.metrics import Metrics

from schemas.batches import ChangeBatch, Lane
from schemas.errors import StoreUnavailable
from schemas.links import LinkSettings, SetSettings
from schemas.reports import SET_DIVIDED, SETS_APART, SETS_WAIT
from transforms.deliver import sla_store
from transforms.deliver.sets.commit_sets import (
    CommitSets,
    Rows,
    keys_of,
    of_keys,
    row_set,
    writable,
)
from transforms.deliver.sets.source_sets import source_sets
from transforms.deliver.store import Store
from transforms.tell_once import TellOnce
from transforms.two_phase.apply_together import InDoubt, Together, apply_together
from transforms.two_phase.branches import Branch, BranchDown
from transforms.two_phase.decision_log import DecisionLog
from transforms.two_phase.mariadb_branch import MariaDbBranch
from transforms.two_phase.postgresql_branch import PostgresBranch
from transforms.two_phase.states import OnBranchDown

_LOGGER = logging.getLogger(__name__)

# Rows of one two-phase commit, if no single set is larger: so long others wait for their locks.
_ROWS_MAX = 1000
_ATTEMPTS = 3  # Where another transaction had the same rows.
# Halving what a branch refuses finds the bad row of a thousand in ten commits; where many are bad,
# the rest goes the ordinary way rather than holding up the link.
_REFUSALS_MAX = 200
_LOG = ""  # Stands for the log among those that may be down.


class SetsWait(StoreUnavailable):
    """Sets cannot be written now: nobody has anything of them; send the batch again."""


class SetWriter:
    """One link's and lane's gate: what is a set goes to all stores first. Not thread-safe.

    The delivery that follows finds the rows in its store. Sets that cannot be written as one are
    left to it: rows that a store refuses for their content become dead letters there.

    Attributes:
      names: the tables whose rows are parts of sets.
    """

    def __init__(self, settings: LinkSettings, lane: Lane):
        self._settings, self._sets, self._lane = settings, settings.sets, lane
        self.names = frozenset(name for kind in self._sets.tables for name in kind)
        # Of a Debezium topic, places tell events apart, not commits; batches end with a commit.
        self._by_commit = settings.source_kind != "debezium"
        self._shared = source_sets(settings)
        self._log = DecisionLog(self._sets.log_dsn)
        # The primary's own link never writes apart: it is the one that tells the MariaDBs.
        self._of_log = settings.store_dsn == self._sets.log_dsn
        self._branches = _branches(self._sets)
        self._refusals_left = 0
        self._divided: list[str] = []
        self._apart = ""
        self._told_of_unknown = False
        self._keeps = TellOnce(_LOGGER, f"link {settings.name}")  # What keeps incidents from it.
        self._trouble: bool | None = None  # None: a worker before this one may have had some.
        self._written = Metrics.counter("sets", f"{lane}_written_total")
        self._ordinary = Metrics.counter("sets", f"{lane}_not_as_one_total")

    def close(self) -> None:
        """Ends its sessions; it may be used again."""
        self._log.close()
        for branch in self._branches:
            branch.close()

    def bring(self, store: Store, batches: Sequence[ChangeBatch]) -> None:
        """Writes the sets in `batches` that the link's store lacks to all stores.

        Repeated, or done by another link of the source before, it only looks. When it returns,
        the batches may be applied.

        Raises:
          SetsWait: with `mode: refuse`, a store is down; or one takes no sets at all.
          StoreUnavailable: the link's own store cannot be asked.
        """
        if not any(batch.tables.keys() & self.names for batch in batches):
            return
        self._refusals_left, self._divided, self._apart = _REFUSALS_MAX, [], ""
        try:
            lacking = self._lacking(store, batches)
            if lacking:
                self._write_in_turn(store, batches, lacking)
        except SetsWait as error:
            self._tell(store, SETS_WAIT, str(error))
            raise
        # A batch whose turn has not come, or that came before, does not end what others wait for.
        if lacking is not None:
            self._tell_what_came(store)

    def _write_in_turn(
        self, store: Store, batches: Sequence[ChangeBatch], lacking: list[CommitSets]
    ) -> None:
        writing = self._shared.writing[self._lane]
        waits = not writing.acquire(blocking=False)
        if waits:
            writing.acquire()
        try:
            # Whom it waited for may have written the same.
            for sets in (self._lacking(store, batches) or ()) if waits else lacking:
                self._write(sets)
        finally:
            writing.release()

    def _lacking(self, store: Store, batches: Sequence[ChangeBatch]) -> list[CommitSets] | None:
        lacking = store.lacking_sets(batches, self._lane, self._sets.tables, self._by_commit)
        self._shared.note(self._settings.store)  # It has just answered.
        if self._of_log:
            self._shared.note(_LOG)
        return lacking

    def _write(self, sets: CommitSets) -> None:
        fit = writable(sets)
        if unknown := sets.count - int(fit.sum()):
            self._ordinary.inc(unknown)
            if not self._told_of_unknown:
                self._told_of_unknown = True
                _LOGGER.warning(
                    "link %s: sets with values that the log does not carry are written store by "
                    "store. Remedy: REPLICA IDENTITY FULL, or a full row image, for %s",
                    self._settings.name,
                    ", ".join(sorted(self.names)),
                )
        sets = sets.chosen(fit)
        for first, stop in _pieces(sets.rows_by_set()):
            self._write_some(sets, first, stop)

    def _write_some(self, sets: CommitSets, first: int, stop: int) -> None:
        """Writes some sets as one; halves them where a branch refuses what is in a row."""
        rows = sets.between(first, stop)
        if self._refusals_left <= 0:
            self._give_up(rows, stop - first)
        elif self._together(rows):
            self._written.inc(stop - first)
        elif stop - first > 1:
            middle = (first + stop) // 2
            self._write_some(sets, first, middle)
            self._write_some(sets, middle, stop)
        else:
            self._give_up(rows, 1)
            self._write_keys(rows, keys_of(rows))

    def _write_keys(self, rows: Rows, keys: list[tuple[str, str]]) -> None:
        """Writes what is left of a refused set: every row that all take, the others to none."""
        if len(keys) < 2 or self._refusals_left <= 0:
            return
        middle = len(keys) // 2
        for half in (keys[:middle], keys[middle:]):
            if not self._together(of_keys(rows, half)):
                self._write_keys(rows, half)

    def _give_up(self, rows: Rows, count: int) -> None:
        self._ordinary.inc(count)
        name, part = next(iter(rows.items()))
        at = f"{part['_src_table'][0].as_py()} at {part['_lsn'][0].as_py()}"
        self._divided.append(f"{count} of {name}, the first from {at}")

    def _together(self, rows: Rows) -> bool:
        """Writes rows to all; returns whether that is done, False where a row is refused.

        Raises:
          SetsWait: not now.
        """
        down = self._shared.down()
        if down and (_LOG in down or not self._sets.degrade):
            return self._without(next(iter(down.values())), _LOG in down)
        policy = OnBranchDown.DEGRADE if self._sets.degrade else OnBranchDown.REFUSE
        given = row_set(self._settings.source, self._lane, rows)
        branches = [_Absent(b.name, down[b.name]) if b.name in down else b for b in self._branches]
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                done = apply_together(
                    self._log,
                    [given],
                    branches,
                    policy,
                    self._sets.deadline_s,
                    keep_sessions=True,
                )
            except InDoubt as error:
                raise SetsWait(f"sets wait: {error}") from None
            except StoreUnavailable as error:
                self._shared.note(_LOG, str(error))
                return self._without(str(error), True)
            self._learn(done, down, given.tables)
            if done.committed:
                return True
            if done.rows_refused:
                self._refusals_left -= 1
                return False
            if not done.busy or done.down or done.refused or attempt == _ATTEMPTS:
                raise SetsWait(_waits(done))
        raise AssertionError  # The last attempt has returned or raised.

    def _without(self, why: str, log: bool) -> bool:
        """Nobody can be asked: as one, or store by store where the log is down and may be."""
        if not (self._sets.degrade and log) or self._of_log:
            raise SetsWait(f"sets wait: {why}. {_REMEDY_DOWN}")
        self._apart = f"sets are written store by store: {why}. Remedy: start the primary store."
        return True

    def _learn(self, done: Together, skipped: dict[str, str], rows: Rows) -> None:
        self._shared.note(_LOG)
        why = dict(done.down)
        for branch in self._branches:
            if branch.name not in skipped:
                self._shared.note(branch.name, why.get(branch.name, ""))
        if done.committed:
            for name, _ in self._sets.stores:
                if name not in done.missing:
                    for table, part in rows.items():
                        self._shared.brought(name).note(table, part)

    def _tell_what_came(self, store: Store) -> None:
        """Notes at the store what a person should know of, and that sets go on."""
        if self._divided:
            detail = "; ".join(self._divided[:3]) + (" ..." if self._divided[3:] else "")
            detail = f"sets not written as one, since a store refuses a row: {detail}"
            _LOGGER.warning("link %s: %s", self._settings.name, detail)
            link = self._settings.name
            store.do(lambda conn: sla_store.note_past(conn, link, SET_DIVIDED, detail))
        if self._apart:
            self._tell(store, SETS_APART, self._apart)
        elif self._trouble is not False:
            store.do(self._close_incidents)
            self._trouble = False

    def _close_incidents(self, conn: psycopg.Connection) -> None:
        for kind in (SETS_WAIT, SETS_APART):
            sla_store.close_incident(conn, self._settings.name, kind)

    def _tell(self, store: Store, kind: str, detail: str) -> None:
        self._trouble = True
        try:
            store.do(lambda c: sla_store.set_incident(c, self._settings.name, kind, detail))
            self._keeps("")
        except StoreUnavailable as error:
            self._keeps(str(error))


_REMEDY_DOWN = (
    "Remedy: start it; with `two_phase: {mode: degrade}` the others would get the sets at once."
)


def _waits(done: Together) -> str:
    if done.refused:
        return f"sets wait: {done.reason}. Remedy: campus-sync check"
    if done.down:
        return f"sets wait: {'; '.join(why for _, why in done.down)}. {_REMEDY_DOWN}"
    return f"sets wait: {done.reason}. They are tried again by themselves."


class _Absent:
    """A branch that gave no answer a moment ago."""

    def __init__(self, name: str, why: str):
        self.name, self._why = name, why

    def begin(self, xid, seconds) -> None:
        raise BranchDown(self._why)

    def close(self) -> None:
        pass


def _branches(sets: SetSettings) -> list[Branch]:
    stores = [PostgresBranch(name, dsn, sets.deadline_s) for name, dsn in sets.stores]
    return stores + [MariaDbBranch(name, dsn, sets.deadline_s) for name, dsn in sets.branches]


def _pieces(rows_by_set: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields ranges of sets of about _ROWS_MAX rows, of one set at least."""
    first = rows = 0
    for number, more in enumerate(rows_by_set.tolist()):
        if number > first and rows + more > _ROWS_MAX:
            yield first, number
            first, rows = number, 0
        rows += more
    if first < len(rows_by_set):
        yield first, len(rows_by_set)
