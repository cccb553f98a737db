"""What is known of parents and of the children that refer to them, while they are under way."""

import collections
import dataclasses
import typing
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.positions import Position
from schemas.tables import ARROW_TYPES, Kind, Table
from transforms.harmonise.columns import codes_of
from transforms.harmonise.reissue import STORED

# A parent's row as it is kept: lsn, seq, then the values of the columns that children take.
Entry = tuple


class Child(typing.NamedTuple):
    """A row of the store that has a parent: `parent_id` is the parent's record id."""

    record_id: str
    parent_id: str
    remarks: str | None
    lsn: int
    seq: int


class Change(typing.NamedTuple):
    """A parent that is new or other than before; `known`: the store may have its children."""

    key: str
    at: Position
    commit_us: int
    entry: Entry
    known: bool


class Waiting(typing.NamedTuple):
    """A child without its patient: `row`, one row, where its content is at hand."""

    key: str
    at: Position
    remarks: str | None
    row: pa.RecordBatch | None


@dataclasses.dataclass(frozen=True)
class Moved:
    """The parents of one table that changed in a batch, each with its last place in it.

    `refs` as their children have them, in the order of `keys`; `known`: see `Change`.
    """

    keys: list[str]
    refs: pa.Array
    lsn: np.ndarray
    seq: np.ndarray
    known: list[str]


class Parents:
    """What is known of one parent table."""

    def __init__(self, name: str, table: Table, columns: tuple[str, ...]):
        self.name = name
        self.columns = columns
        self.kinds = [table.by_name[column].kind for column in columns]
        self.bits = [1 << table.index[column] for column in columns]
        self.rows: dict[str, Entry | None] = {}  # None: there is no such parent.
        self.begin()

    def begin(self) -> None:
        self.history: list[tuple[str, int, Entry]] = []  # Key, commit time, row; by position.
        self.changes: list[Change] = []
        self._moved: Moved | None = None

    @property
    def moved(self) -> Moved:
        """Who changed in this batch: found once, for all child tables."""
        if self._moved is None:
            last: dict[str, Position] = {}
            for change in self.changes:
                last[change.key] = max(change.at, last.get(change.key, change.at))
            refs = pa.array([f"{self.name} {key}" for key in last], pa.utf8())
            places = np.array(list(last.values()), np.int64).reshape(-1, 2)
            known = sorted({change.key for change in self.changes if change.known})
            self._moved = Moved(list(last), refs, places[:, 0], places[:, 1], known)
        return self._moved

    def learn(self, part: pa.RecordBatch) -> None:
        """Adds the rows of one batch to the history, and finds out which of them matter."""
        live = part.filter(pc.not_equal(part["_op"], pa.scalar(int(Op.DELETE), pa.uint8())))
        names = ("record_id", "_commit_us", "_lsn", "_seq", "_unchanged", "_prev_id")
        meta = [live[name].to_pylist() for name in names]
        values = [_plain(live[name], kind) for name, kind in self._typed()]
        newest: dict[str, Entry | None] = {}
        for key, commit_us, lsn, seq, unchanged, previous, *row in zip(*meta, *values, strict=True):
            before = newest.get(key, self.rows.get(key))
            if unchanged:
                base = newest.get(previous or key, self.rows.get(previous or key))
                for i, bit in enumerate(self.bits):
                    if unchanged & bit:
                        row[i] = base[i + 2] if base else None
            entry = (lsn, seq, *row)
            at = Position(lsn, seq)
            if before is None or before[2:] != entry[2:] or before[:2] >= at:
                self.changes.append(Change(key, at, commit_us, entry, before is not None))
            self.history.append((key, commit_us, entry))
            newest[key] = entry

    def _typed(self) -> list[tuple[str, Kind]]:
        return list(zip(self.columns, self.kinds, strict=True))

    def finish(self, applied: Position, limit: int) -> None:
        """Takes the history in, and lets go of what the store has, if that is much."""
        for key, _, entry in self.history:
            self.rows.pop(key, None)  # To the end: the oldest stand first.
            self.rows[key] = entry
        self.begin()
        if len(self.rows) > limit:
            spare = len(self.rows) - limit * 3 // 4
            gone = [k for k, e in self.rows.items() if e is None or e[:2] <= applied][:spare]
            for key in gone:
                del self.rows[key]

    def at(
        self, ids: pa.Array, lsn: np.ndarray, seq: np.ndarray
    ) -> tuple[dict[str, pa.Array], np.ndarray]:
        """Returns the columns of the parents `ids` as they were before (lsn, seq), row by row.

        And bool[n], which of them there were.
        """
        encoded = ids.dictionary_encode()
        keys = encoded.dictionary.to_pylist()
        entries = [*map(self.rows.get, keys), None]
        places = codes_of(encoded)
        if self.history:
            entries, places = self._as_of(keys, entries, places, lsn, seq)
        taken = pa.array(places)
        columns = {}
        for i, (name, kind) in enumerate(self._typed(), start=2):
            values = [None if entry is None else entry[i] for entry in entries]
            array = pa.array(values, STORED.get(kind, ARROW_TYPES[kind]))
            columns[name] = array.cast(ARROW_TYPES[kind]).take(taken)
        return columns, np.array([entry is not None for entry in entries])[places]

    def _as_of(self, keys, entries, places, lsn, seq):
        """Points each row at the last change of its parent before it, if there is one."""
        code_of = {key: code for code, key in enumerate(keys)}
        past = [(code_of[key], entry) for key, _, entry in self.history if key in code_of]
        if not past:
            return entries, places
        codes = np.array([code for code, _ in past])
        rows = np.flatnonzero(np.isin(places, codes))
        order = np.lexsort(
            (
                np.concatenate([[entry[1] for _, entry in past], seq[rows]]),
                np.concatenate([[entry[0] for _, entry in past], lsn[rows]]),
            )
        )
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        of_past = codes * len(order) + rank[: len(past)]
        by_rank = np.argsort(of_past)
        wanted = places[rows].astype(np.int64) * len(order) + rank[len(past) :]
        before = np.searchsorted(of_past[by_rank], wanted) - 1
        found = by_rank[np.maximum(before, 0)]
        hit = (before >= 0) & (codes[found] == places[rows])
        places = places.astype(np.int64)
        places[rows[hit]] = len(entries) + found[hit]
        return [*entries, *(entry for _, entry in past)], places


class Segment:
    """Rows of one child table that are on their way to the store."""

    def __init__(self, part: pa.RecordBatch, table: Table):
        self.batch: pa.RecordBatch | None = part
        bit = np.uint64(1 << table.index["parent_ref"])
        self.refs = part["parent_ref"]
        self.ids, self.remarks = part["record_id"], part["remarks"]
        self.lsn, self.seq = part["_lsn"].to_numpy(), part["_seq"].to_numpy()
        self.deletes = part["_op"].to_numpy() == Op.DELETE
        self.unknown = (part["_unchanged"].to_numpy() & bit) != 0
        last = np.lexsort((self.seq, self.lsn))[-1]
        self.last = Position(int(self.lsn[last]), int(self.seq[last]))

    def at(self, row: int) -> Position:
        return Position(int(self.lsn[row]), int(self.seq[row]))


class Children:
    """What is under way of one child table, and who waits."""

    def __init__(self, name: str, parent: str, taken: dict[str, str], table: Table):
        self.name, self.parent, self.taken, self.table = name, parent, taken, table
        # Where it shows first that the parent is not there.
        self.mark = "patient_id" if "patient_id" in taken else next(iter(taken))
        self.segments: list[Segment] = []
        self.waiting: dict[str, Waiting] = {}
        self.keys: dict[str, set[str]] = collections.defaultdict(set)  # Parent to who waits.
        self.woken_at: tuple[Position, int] | None = None  # And the commit time of that place.
        self.swept_lsn = 0
        self._before: list[tuple[str, Waiting | None]] = []
        self._segments_before = 0

    def begin(self) -> None:
        """Remembers how things stand, for `abandon`."""
        self._before, self._segments_before = [], len(self.segments)
        self.woken_at = None

    def abandon(self) -> None:
        """Undoes everything since `begin`."""
        del self.segments[self._segments_before :]
        for record_id, waiting in self._before[::-1]:
            self.leave(record_id)
            if waiting is not None:
                self.wait(record_id, waiting)
        self.begin()

    def ref(self, key: str) -> str:
        return f"{self.parent} {key}"

    def wait(self, record_id: str, waiting: Waiting) -> None:
        self.leave(record_id)
        self.waiting[record_id] = waiting
        self.keys[waiting.key].add(record_id)

    def leave(self, record_id: str) -> None:
        known = self.waiting.pop(record_id, None)
        self._before.append((record_id, known))
        if known is not None:
            self.keys[known.key].discard(record_id)
            if not self.keys[known.key]:
                del self.keys[known.key]


def _plain(array: pa.Array, kind: Kind) -> list:
    return array.cast(STORED[kind]).to_pylist() if kind in STORED else array.to_pylist()


def referring(children: Children, moved: Moved) -> list[tuple[str, str]]:
    """Returns `(parent, record)` of the rows on their way that stand before a parent's change."""
    lsn, seq, found = moved.lsn, moved.seq, []
    for segment in children.segments:
        if segment.last.lsn < children.swept_lsn:
            continue
        code = pc.fill_null(pc.index_in(segment.refs, value_set=moved.refs), -1).to_numpy()
        before = (segment.lsn < lsn[code]) | (
            (segment.lsn == lsn[code]) & (segment.seq < seq[code])
        )
        for row in np.flatnonzero((code >= 0) & before).tolist():
            found.append((moved.keys[code[row]], segment.ids[row].as_py()))
    return found


def rows_under_way(
    segments: Sequence[Segment], records: Sequence[str]
) -> dict[str, list[tuple[Position, Segment, int]]]:
    """Returns the rows on their way of some records, in order of position."""
    rows: dict[str, list] = collections.defaultdict(list)
    if not records:
        return rows
    wanted = pa.array(records, pa.utf8())
    for segment in segments:
        mask = pc.is_in(segment.ids, value_set=wanted).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(mask).tolist():
            rows[segment.ids[row].as_py()].append((segment.at(row), segment, row))
    for some in rows.values():
        some.sort(key=lambda found: found[0])
    return rows


def state_before(
    children: Children, change: Change, record: str, rows: dict, stored: dict[str, Child]
) -> Waiting | None:
    """Returns a child as it was just before its parent's change, None if it was none, or gone."""
    past = [found for found in rows.get(record, ()) if found[0] < change.at]
    touched = False
    while past:
        at, segment, row = past.pop()
        if segment.deletes[row] or at.lsn < children.swept_lsn:
            return None
        if segment.unknown[row]:
            touched = True  # What is kept of its content is not the newest.
            continue
        if segment.refs[row].as_py() != children.ref(change.key):
            return None
        content = None
        if touched:
            pass
        elif segment.batch is not None and not segment.batch["_unchanged"][row].as_py():
            content = segment.batch.slice(row, 1)
        elif record in children.waiting and children.waiting[record].at == at:
            content = children.waiting[record].row
        return Waiting(change.key, at, segment.remarks[row].as_py(), content)
    waiting = children.waiting.get(record)
    if waiting is not None and waiting.key == change.key and waiting.at < change.at:
        return waiting._replace(row=None) if touched else waiting
    child = stored.get(record)
    # The store may be ahead of a log that is read again: its guard drops what it has.
    if child is not None and child.parent_id == change.key:
        return Waiting(change.key, Position(child.lsn, child.seq), child.remarks, None)
    return None
