"""Read a span of a source table again while changes flow, and deliver what stores have otherwise.

Each stretch is read in a view whose place in the log is known and merged at that place, as mending
does (ADR 0021, 0027): a newer change wins, whether it comes before or after.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psycopg
import pyarrow as pa

from pipelines.differences import Ends
from pipelines.mend import PATIENCE_S, Stores
from schemas.config import Link
from schemas.errors import CampusSyncError, SourceUnavailable, StoreUnavailable, reason
from schemas.receipts import Counts
from schemas.reread import Key, Note, Phase, Span, Tally
from transforms.deliver import ledger, reread_notes
from transforms.deliver.mend_rows import as_changes, as_tombstones
from transforms.row_sets import Reading, concat, words_of
from transforms.set_sums import hash_id, hash_ids

_ROWS_FIRST, _ROWS_MAX = 1_000, 10_000
_BYTES = 8 << 20  # Of one stretch, by the size of the rows before.
_IDS = 10_000
_SLICES_S = 0.25  # A throttled stretch is of no more than so long.
_NEXT_IDS = """\
SELECT record_id FROM consult.{table} WHERE campus = %s AND src_table = %s AND NOT deleted
    AND record_id > %s ORDER BY record_id LIMIT %s"""


class SourceBusy(CampusSyncError):
    """No view of the source has a known place: transactions that were under way do not end."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be read again.

    Attributes:
      stores: that rows go to; deletions go to all stores of the campus, which agree on them.
      rows_s: read no faster, of source and stores; 0: as fast as it goes.
      anew: begin at the first row, wherever an earlier reading has come to.
    """

    campus: str
    span: Span
    stores: tuple[str, ...]
    rows_s: int = 0
    anew: bool = False


class Progress(typing.NamedTuple):
    """How far it is.

    Attributes:
      expected: about how many rows there are, as the source's planner takes it.
      resumed: rows that an earlier reading had read already.
    """

    phase: Phase
    tally: Tally
    expected: int
    resumed: int


class Reread:
    """One reading of a span, whole or what an earlier one has left.

    Args:
      tell: is told how far it is. now_us: microseconds since 1970. monotonic: seconds, never
        going back. sleep: waits so many seconds.
    """

    def __init__(
        self,
        ends: Ends,
        task: Task,
        tell: Callable[[Progress], None],
        now_us: Callable[[], int],
        monotonic: Callable[[], float],
        sleep: Callable[[float], None],
    ):
        self._ends, self._task, self._tell = ends, task, tell
        self._now_us, self._monotonic, self._sleep = now_us, monotonic, sleep
        self._span, self._side = task.span, ends.sources[task.campus]
        self._table = self._side.part(task.span.table).table
        self._links = [link for link in ends.links(task.campus) if link.store in task.stores]
        self._tally, self._expected, self._resumed = Tally(), 0, 0

    @property
    def finds_deletions(self) -> bool:
        """Whether what the source no longer has can be told: not by a column that went with it."""
        return not self._span.column

    def run(self) -> Progress:
        """Reads and delivers all that is left; returns what came of it, all readings together.

        Killed, or stopped by an error, it goes on where it was when it is run again.

        Raises:
          ConfigError: the table cannot be read by spans, or the span is none of it.
          SourceBusy, SourceUnavailable, StoreUnavailable: try again.
          AlreadyRunning, CampusSyncError: as they say.
        """
        try:
            with (
                contextlib.ExitStack() as stack,
                Stores(self._ends, self._task.campus, self._now_us) as self._stores,
            ):
                self._notes = {
                    link: stack.enter_context(contextlib.closing(self._connected(link)))
                    for link in self._links
                }
                note = self._begun()
                with self._view() as view:
                    self._expected = view.spans(self._span).estimated()
                if note.phase is Phase.ROWS:
                    self._read_rows(note.behind)
                    note = self._note(Phase.GONE, {})
                if self.finds_deletions:
                    self._find_gone(note.behind)
                self._note(Phase.DONE, {})
        except psycopg.Error as error:
            raise SourceUnavailable(f"source {self._task.campus}: {reason(error)}") from error
        return self._progress(Phase.DONE)

    def _connected(self, link: Link) -> psycopg.Connection:
        with self._asking(link):
            return ledger.connect(self._ends.config.stores[link.store].dsn)

    def _begun(self) -> Note:
        """Returns where to go on: where every store is; if one is nowhere, at the beginning."""
        found = []
        for link, conn in self._notes.items():
            reread_notes.hold(conn, link.name, self._span)
            found.append(reread_notes.read(conn, link.name, self._span))
        if self._task.anew or None in found:
            return self._note(Phase.ROWS, {})
        order = list(Phase)
        note = min(found, key=lambda n: (order.index(n.phase), n.tally.rows, n.tally.ids))
        self._tally = dataclasses.replace(note.tally)
        self._resumed = note.tally.rows
        return note

    # The source's rows.

    def _read_rows(self, behind: Key | None) -> None:
        most = self._at_most(_ROWS_FIRST)
        while behind is not None:
            began = self._monotonic()
            with self._view() as view:
                spans = view.spans(self._span)
                stretch = view.stretch(self._span, spans, behind, most)
                live: set[str] = set()
                for rows in stretch.rows:
                    live |= set(rows["record_id"].to_pylist())
                    self._deliver(view, rows)
                quiet = [key for key in stretch.ids if key not in live]
                self._settle(view, sorted(self._shown(quiet)))
            self._tally.rows += len(stretch.ids)
            behind = stretch.behind
            if behind is not None:
                self._note(Phase.ROWS, behind)
            if stretch.ids:
                fitting = _BYTES * len(stretch.ids) // max(stretch.size, 1)
                most = self._at_most(max(1, min(_ROWS_MAX, fitting)))
            self._pause(len(stretch.ids), began)

    def _deliver(self, view: Reading, rows: pa.RecordBatch) -> None:
        """Delivers the rows of one batch that a store has otherwise, to that store."""
        if not rows.num_rows:
            return
        changes = as_changes(self._table, rows, view.given_lsn, view.taken_us)
        for link in self._links:
            unlike = changes.filter(pa.array(self._unlike(link, changes)))
            if unlike.num_rows:
                self._count(self._stores.of(link).mend(self._table, unlike), unlike.num_rows)

    def _count(self, counts: Counts, rows: int) -> None:
        self._tally.delivered += counts.delivered
        self._tally.superseded += counts.superseded + counts.duplicates
        self._tally.refused += rows - counts.captured

    def _unlike(self, link: Link, changes: pa.RecordBatch) -> np.ndarray:
        """Tells which rows a store does not have with this content, live and sound (bool[n])."""
        ids = changes["record_id"]
        mine, words = hash_ids(ids), words_of(changes["_digest"])
        side = self._ends.stores[link.store]
        with self._asking(link), side.connect() as conn:
            found = side.rows(conn, self._task.campus, self._table, ids.to_pylist())
            theirs = concat(list(found))
        theirs = theirs.where(theirs.live & ~theirs.rotten)
        _, i, j = np.intersect1d(mine, theirs.hashes, return_indices=True)
        unlike = np.ones(len(mine), np.bool_)
        unlike[i[(words[i] == theirs.words[j]).all(axis=1)]] = False
        return unlike

    # What the source does not have.

    def _find_gone(self, behind: Key) -> None:
        """Holds the stores' ids of this source table against the source, in the stores' order."""
        last = behind.get("", b"").decode()
        most = self._at_most(_IDS)
        while True:
            began = self._monotonic()
            ids, ended = self._next_ids(last, most)
            with self._view() as view:
                self._settle(view, self._gone(view, ids))
            self._tally.ids += len(ids)
            if ended:
                return
            last = ids[-1]
            self._note(Phase.GONE, {"": last.encode()})
            self._pause(len(ids), began)

    def _gone(self, view: Reading, ids: Sequence[str]) -> list[str]:
        """Returns which of the stores' ids lie in the span and are no row of this source table."""
        prefix = self._side.part(self._span.table).id_prefix
        own = [key for key in ids if key.startswith(prefix)]
        told = view.spans(self._span).held_against([key[len(prefix) :] for key in own])
        gone = {prefix + key for key in told.gone}
        untold = {*ids} - {*own} | {prefix + key for key in told.untold}
        if untold and not (self._span.low or self._span.high):
            gone |= untold  # In the span whatever they are; `_settle` looks whether they are there.
        elif untold:
            for rows in view.changes(self._table, sorted(untold)):
                untold -= set(rows["record_id"].to_pylist())
            refused = self._side.refused.get(self._table, set())
            self._tally.untold += sum(hash_id(key) not in refused for key in untold)
        return sorted(gone)

    def _next_ids(self, behind: str, most: int) -> tuple[list[str], bool]:
        """Returns the next record ids that any store shows, and whether there are no more."""
        query = _NEXT_IDS.format(table=self._table)
        found, borders = set(), []
        for link in self._links:
            wanted = (self._task.campus, self._span.table, behind, most)
            with self._asking(link), self._ends.stores[link.store].connect() as conn:
                ids = [key for (key,) in conn.execute(query, wanted)]
            found |= set(ids)
            if len(ids) == most:
                borders.append(ids[-1])
        if not borders:
            return sorted(found), True
        return sorted(key for key in found if key <= min(borders)), False

    def _settle(self, view: Reading, ids: Sequence[str]) -> None:
        """Ends the records that no source table has; delivers those that one has.

        What a mapping refuses is there: its absence is no deletion.
        """
        present: set[str] = set()
        if ids:
            for rows in view.changes(self._table, ids):
                present |= set(rows["record_id"].to_pylist())
                self._deliver(view, rows)
        refused = self._side.refused.get(self._table, set())
        self._tally.refused += len(refused)
        gone = [key for key in ids if key not in present and hash_id(key) not in refused]
        self._side.refused.clear()
        if not gone:
            return
        sources = pa.array([self._span.table] * len(gone), pa.utf8())
        place = (view.given_lsn, view.taken_us)
        deletions = as_tombstones(self._table, pa.array(gone, pa.utf8()), sources, *place)
        links = self._ends.links(self._task.campus)
        found = [self._stores.of(link).mend(self._table, deletions) for link in links]
        self._tally.deleted += max(counts.delivered for counts in found)

    def _shown(self, ids: Sequence[str]) -> set[str]:
        """Returns which records any store shows as of this source table."""
        found: set[str] = set()
        for link in self._links if ids else ():
            side = self._ends.stores[link.store]
            with self._asking(link), side.connect() as conn:
                for rows in side.rows(conn, self._task.campus, self._table, ids):
                    shown = rows.where(rows.live)
                    pairs = zip(shown.ids.to_pylist(), shown.src_tables.to_pylist(), strict=True)
                    found |= {key for key, source in pairs if source == self._span.table}
        return found

    # Views, notes and pace.

    @contextlib.contextmanager
    def _view(self) -> Iterator[Reading]:
        with self._side.reading(PATIENCE_S) as view:
            if view.given_lsn is None:
                raise SourceBusy(
                    f"source {self._task.campus}: transactions that were under way did not end in "
                    f"{PATIENCE_S:.0f} s, so no place in the log is known for what is read. "
                    "Remedy: end them, or wait, and give the same command: it goes on."
                )
            yield view

    @contextlib.contextmanager
    def _asking(self, link: Link) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            server = ledger.server_of(self._ends.config.stores[link.store].dsn)
            raise StoreUnavailable(
                f"store {link.store} at {server}: {reason(error)}. Remedy: name the others with "
                "--store, or give the same command again once it answers: it goes on."
            ) from error

    def _note(self, phase: Phase, behind: Key) -> Note:
        note = Note(phase, behind, self._tally)
        for link, conn in self._notes.items():
            with self._asking(link):
                reread_notes.write(conn, link.name, self._span, note)
        self._tell(self._progress(phase))
        return note

    def _progress(self, phase: Phase) -> Progress:
        tally = dataclasses.replace(self._tally)
        return Progress(phase, tally, self._expected, self._resumed)

    def _at_most(self, rows: int) -> int:
        return min(rows, max(1, int(self._task.rows_s * _SLICES_S))) if self._task.rows_s else rows

    def _pause(self, rows: int, began: float) -> None:
        if self._task.rows_s:
            left_s = rows / self._task.rows_s - (self._monotonic() - began)
            if left_s > 0:
                self._sleep(left_s)
