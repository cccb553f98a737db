"""Look up what a row takes from its parent's row, whatever the order in which the two arrive.

A child that comes first arrives without its patient, marked `awaiting_parent`; when the parent
comes, or comes to another patient, its children are issued again at the parent's position. What
is known of parents is a cache: the store holds the rest, so that nothing is lost at a restart.
Decisions and their reasons: docs/adr/0014-late-parents.md.
"""

import collections
import typing
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op, RawChanges
from schemas.mappings import CampusMapping
from schemas.positions import SEQ_END, START, Position
from transforms.harmonise.columns import in_order
from transforms.harmonise.reissue import Reissue, awaits, reissued_rows
from transforms.harmonise.relatives import (
    Child,
    Children,
    Entry,
    Parents,
    Segment,
    Waiting,
    referring,
    rows_under_way,
    state_before,
)

CACHED_MAX = 200_000


class Store(typing.Protocol):
    """Where rows are that are no longer on their way. Deleted children are none."""

    def parents(self, table: str, columns: Sequence[str], ids: Sequence[str]) -> dict[str, Entry]:
        """Returns (lsn, seq, values of canonical `columns`) by id, of those that there are.

        Times are microseconds since 1970, dates days. A deleted parent counts.
        """

    def children(self, table: str, parent: str, ids: Sequence[str]) -> list[Child]:
        """Returns the live rows of source table `table` that refer to the parents `ids`."""

    def awaiting(self, table: str, parent: str) -> list[Child]:
        """Returns those that have no patient although they refer to a parent."""


class Lookups:
    """Parents and waiting children of one link; state of its reader, one thread's.

    `store` and what the reader reads again from the ledger's position are all that a restart
    needs: `acknowledged` tells which of it is in the store.

    Args:
      mapping: names the parents.
      store: the consult store of the link; None: only what was learned is known.
      follow: issue children again when their parent changes. Without, a batch is resolved as it
        is: for comparing and for replaying single changes.
      cached_max: parents kept of each table beside those that the store has not.
    """

    def __init__(
        self,
        mapping: CampusMapping,
        store: Store | None = None,
        follow: bool = True,
        cached_max: int = CACHED_MAX,
    ):
        self._store, self._follow, self._limit = store, follow, cached_max
        self._applied: Position = START
        self._parents: dict[str, Parents] = {}
        self._children: dict[str, Children] = {}
        taken_from: dict[str, list[str]] = collections.defaultdict(list)
        for name, source in mapping.tables.items():
            if source.parent is None:
                continue
            taken = {c: rule.parent for c, rule in source.columns.items() if rule.parent}
            parent = source.parent.table
            self._children[name] = Children(name, parent, taken, source.canonical)
            taken_from[parent] += taken.values()
        for parent, columns in taken_from.items():
            table = mapping.tables[parent].canonical
            self._parents[parent] = Parents(parent, table, tuple(dict.fromkeys(columns)))
        self._loaded = store is None
        self._doubtful = store is not None

    @property
    def waiting(self) -> int:
        """How many rows are known to wait for their parent."""
        return sum(len(children.waiting) for children in self._children.values())

    @property
    def crowded(self) -> bool:
        """Whether far more parents are on their way than are to be kept: read on later."""
        return any(len(parents.rows) > 2 * self._limit for parents in self._parents.values())

    def acknowledged(self, applied: Position) -> None:
        """Tells how far the store's routine ledger has come; call it before each `apply`."""
        self._applied = max(self._applied, applied)
        for children in self._children.values():
            children.segments = [s for s in children.segments if s.last > applied]

    def doubt(self) -> None:
        """Has the store asked again who waits: after a replay, or now and then."""
        self._loaded, self._doubtful = self._store is None, self._store is not None
        for parents in self._parents.values():
            under_way = {k: e for k, e in parents.rows.items() if e and e[:2] > self._applied}
            parents.rows = under_way

    # What harmonising calls, in this order.

    def begin(self, raw: RawChanges) -> None:
        """Begins a batch."""
        for children in self._children.values():
            children.begin()
        for name, position in raw.sweeps:
            if name in self._children:
                children = self._children[name]
                children.swept_lsn = max(children.swept_lsn, position.lsn)
                for record_id, waiting in list(children.waiting.items()):
                    if waiting.at.lsn < position.lsn:
                        children.leave(record_id)
        if not self._follow:
            return
        if not self._loaded:
            self._load()
        # Only between two transactions there is a place that no change of a child can have.
        if self._doubtful and raw.end.seq == SEQ_END:
            self._doubtful = False
            self._wake(raw)

    def resolve(
        self, name: str, ids: pa.Array, lsn: np.ndarray, seq: np.ndarray
    ) -> tuple[dict[str, pa.Array], np.ndarray, str]:
        """Returns the columns that the rows of table `name` take from their parents.

        Null where the parent is not known; then bool[n], which rows wait for theirs, and the
        column to remark on.

        Args:
          ids: the parents' record ids, utf8[n]; null has no parent.
          lsn, seq: int[n], the rows' own positions: a parent counts as it was before.
        """
        children = self._children[name]
        self._ask(children.parent, [key for key in pc.unique(ids).to_pylist() if key is not None])
        columns, found = self._parents[children.parent].at(ids, lsn, seq)
        taken = {own: columns[theirs] for own, theirs in children.taken.items()}
        if "patient_id" in taken:  # A parent that waits itself is as good as none.
            found &= taken["patient_id"].is_valid().to_numpy(zero_copy_only=False)
        waits = ids.is_valid().to_numpy(zero_copy_only=False) & ~found
        return taken, waits, children.mark

    def settle(self, name: str, part: pa.RecordBatch | None) -> tuple[pa.RecordBatch | None, int]:
        """Returns a source table's rows with those that are issued again, and how many these are.

        To be called for every table of the mapping, parents first.
        """
        count = 0
        if name in self._children and self._follow:
            children = self._children[name]
            if part is not None:
                children.segments.append(Segment(part, children.table))
            again = self._again(children)
            count = len(again)
            if again:
                rows = reissued_rows(children.table, children.taken, again, part)
                part = rows if part is None else in_order([part, rows])
                children.segments.append(Segment(rows, children.table))
            if part is not None:
                self._note_waiting(children, part)
            for segment in children.segments:
                segment.batch = None  # The spool may put it on disk: only its keys stay here.
        if name in self._parents and part is not None:
            if self._follow:
                # Also of what is new here: the key may have been another's before.
                self._ask(name, pc.unique(part["record_id"]).to_pylist())
            self._parents[name].learn(part)
        return part, count

    def finish(self) -> None:
        """Ends a batch."""
        for parents in self._parents.values():
            parents.finish(self._applied, self._limit)

    def abandon(self) -> None:
        """Takes back everything since `begin`: the batch was not harmonised."""
        for parents in self._parents.values():
            parents.begin()
        for children in self._children.values():
            children.abandon()
        self.doubt()

    # Below: plumbing.

    def _ask(self, table: str, ids: Sequence[str]) -> None:
        """Makes sure that of `ids` everything is known that there is."""
        parents = self._parents[table]
        missing = [key for key in ids if key not in parents.rows]
        if not missing:
            return
        found = {}
        if self._store is not None:
            found = self._store.parents(table, parents.columns, missing)
        for key in missing:
            parents.rows[key] = found.get(key)

    def _load(self) -> None:
        self._loaded = True
        for name, children in self._children.items():
            for child in self._store.awaiting(name, children.parent):
                if child.record_id not in children.waiting:
                    at = Position(child.lsn, child.seq)
                    waiting = Waiting(child.parent_id, at, child.remarks, None)
                    children.wait(child.record_id, waiting)

    def _wake(self, raw: RawChanges) -> None:
        """Has those looked at who wait: their parent may have come by another way than the log."""
        for children in self._children.values():
            self._ask(children.parent, list(children.keys))
            children.woken_at = (Position(raw.end.lsn, SEQ_END), raw.commit_us_max)

    def _again(self, children: Children) -> list[Reissue]:
        """Returns what is to be issued again of one child table."""
        parents = self._parents[children.parent]
        found = self._of_changes(children, parents) if parents.changes else []
        if children.woken_at is not None:
            at, commit_us = children.woken_at
            moving = {*rows_under_way(children.segments, list(children.waiting))}
            moving |= {one.record_id for one in found}
            newest = parents.rows | {key: entry for key, _, entry in parents.history}
            for record, known in children.waiting.items():
                entry = newest.get(known.key)
                if record in moving or entry is None or not self._settles(children, entry):
                    continue
                found.append(self._reissue(children, record, entry, at, commit_us, known))
        return found

    def _of_changes(self, children: Children, parents: Parents) -> list[Reissue]:
        """Whom each change of a parent concerns: every child that referred to it just before."""
        if not (children.segments or children.keys or self._store):
            return []
        moved = parents.moved
        by_key: dict[str, set[str]] = collections.defaultdict(set)
        for key in children.keys.keys() & set(moved.keys) if children.keys else ():
            by_key[key] |= children.keys[key]
        for key, record in referring(children, moved):
            by_key[key].add(record)
        stored = self._stored(children, moved.known)
        for child in stored.values():
            by_key[child.parent_id].add(child.record_id)
        if not by_key:
            return []
        rows = rows_under_way(children.segments, sorted(set().union(*by_key.values())))
        found = []
        for change in (change for change in parents.changes if change.key in by_key):
            for record in sorted(by_key[change.key]):
                known = state_before(children, change, record, rows, stored)
                if known is not None:
                    found.append(
                        self._reissue(
                            children, record, change.entry, change.at, change.commit_us, known
                        )
                    )
        return found

    def _stored(self, children: Children, keys: list[str]) -> dict[str, Child]:
        if not keys or self._store is None:
            return {}
        found = self._store.children(children.name, children.parent, keys)
        return {child.record_id: child for child in found if child.lsn >= children.swept_lsn}

    def _reissue(
        self,
        children: Children,
        record: str,
        entry: Entry,
        at: Position,
        commit_us: int,
        known: Waiting,
    ) -> Reissue:
        parents = self._parents[children.parent]
        values = {
            own: (entry[2 + parents.columns.index(theirs)])
            for own, theirs in children.taken.items()
        }
        ref = children.ref(known.key)
        waits = None if self._settles(children, entry) else children.mark
        return Reissue(
            record, children.name, at, commit_us, ref, values, known.remarks, waits, known.row
        )

    def _settles(self, children: Children, entry: Entry) -> bool:
        """Whether a parent's row tells its children what they wait for."""
        patient = children.taken.get("patient_id")
        columns = self._parents[children.parent].columns
        return patient is None or entry[2 + columns.index(patient)] is not None

    def _note_waiting(self, children: Children, part: pa.RecordBatch) -> None:
        """Brings up to date who waits, after a batch: the last row of each record counts."""
        refs, remarks = part["parent_ref"], part["remarks"]
        open_rows, marked = refs.is_valid().to_numpy(zero_copy_only=False), awaits(remarks)
        if marked is None:
            open_rows &= False
        else:
            open_rows &= marked
            open_rows &= part["_op"].to_numpy() != Op.DELETE
        new = part["record_id"].filter(pa.array(open_rows))
        if not len(new) and not children.waiting:
            return
        known = pa.concat_arrays([pa.array(children.waiting, pa.utf8()), new])
        some = pc.is_in(part["record_id"], value_set=known).to_numpy(zero_copy_only=False)
        bit = 1 << children.table.index["parent_ref"]
        head = len(children.parent) + 1
        for row in np.flatnonzero(some).tolist():
            record = part["record_id"][row].as_py()
            at = Position(part["_lsn"][row].as_py(), part["_seq"][row].as_py())
            if open_rows[row]:
                whole = not part["_unchanged"][row].as_py()
                content = part.take(pa.array([row])) if whole else None
                key = refs[row].as_py()[head:]
                children.wait(record, Waiting(key, at, remarks[row].as_py(), content))
            elif part["_op"][row].as_py() != Op.DELETE and part["_unchanged"][row].as_py() & bit:
                known = children.waiting.get(record)
                if known is not None:
                    children.wait(record, known._replace(at=at, row=None))
            else:
                children.leave(record)
