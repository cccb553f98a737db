"""What of a delivery's rows belongs together: by commit, patient and kind of set."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Lane, Op
from schemas.entities import TABLES
from schemas.tables import Kind
from transforms.deliver.merging.base_rows import made_whole
from transforms.deliver.merging.compact import compact
from transforms.two_phase.writes import RowSet

Rows = dict[str, pa.RecordBatch]
_NOBODY = -1  # Stands for all patients of a commit.
_CANONICAL_DECIMAL = r"^-?[0-9]+(\.[0-9]+)?$"


@dataclasses.dataclass(frozen=True)
class CommitSets:
    """Sets 0 .. count - 1, older commits first.

    Attributes:
      tables: the rows of all sets; numbers: of which set each row is, int64[n].
    """

    tables: Rows
    numbers: Mapping[str, np.ndarray]
    count: int

    def rows_by_set(self) -> np.ndarray:
        """Returns int64[count]."""
        sizes = np.zeros(self.count, np.int64)
        for numbers in self.numbers.values():
            sizes += np.bincount(numbers, minlength=self.count)
        return sizes

    def between(self, first: int, stop: int) -> Rows:
        """Returns the rows of sets first .. stop - 1, in log order within each table."""
        masks = {name: (n >= first) & (n < stop) for name, n in self.numbers.items()}
        return _filtered(self.tables, masks)

    def chosen(self, wanted: np.ndarray) -> "CommitSets":
        """Returns some of the sets, numbered anew; `wanted`: bool[count]."""
        if wanted.all():
            return self
        number = np.cumsum(wanted) - 1
        masks = {name: wanted[n] for name, n in self.numbers.items()}
        tables = _filtered(self.tables, masks)
        numbers = {name: number[self.numbers[name][masks[name]]] for name in tables}
        return CommitSets(tables, numbers, int(wanted.sum()))


def commit_sets(tables: Rows, kinds: Sequence[Sequence[str]], by_commit: bool) -> CommitSets:
    """Returns the sets in the rows of one stretch of the log.

    A set is what one commit says of one patient in the tables of one kind; of all its patients
    where it does not name the patient of each row, as deletes seldom do. History, which a
    snapshot reads, is in none.

    Args:
      kinds: the tables of each kind. by_commit: whether equal places are one commit; else what
        there is of a patient is one set, since the log does not tell where a commit ends.
    """
    parts, places = {}, []
    for kind, names in enumerate(kinds):
        for name in names:
            rows = tables.get(name)
            if rows is None:
                continue
            rows = rows.filter(pc.not_equal(rows["_op"], pa.scalar(int(Op.SNAPSHOT), pa.uint8())))
            if rows.num_rows:
                parts[name] = rows
                places.append((np.full(rows.num_rows, kind), rows))
    if not parts:
        return CommitSets({}, {}, 0)
    kind = np.concatenate([of for of, _ in places])
    lsn = np.concatenate([rows["_lsn"].to_numpy() for _, rows in places])
    if not by_commit:
        lsn = np.zeros_like(lsn)
    patient = _patients(parts)
    nameless = np.unique(np.stack([lsn, kind], 1)[patient == _NOBODY], axis=0)
    for at in nameless:
        patient[(lsn == at[0]) & (kind == at[1])] = _NOBODY
    order = np.lexsort((patient, kind, lsn))
    key = np.stack([lsn, kind, patient], 1)[order]
    begins = np.concatenate([[True], (key[1:] != key[:-1]).any(axis=1)])
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(begins) - 1
    ends = np.cumsum([rows.num_rows for rows in parts.values()])[:-1]
    by_table = dict(zip(parts, np.split(numbers, ends), strict=True))
    return CommitSets(parts, by_table, int(begins.sum()))


def writable(sets: CommitSets) -> np.ndarray:
    """Returns bool[count]: sets that can be written ahead of what is before them.

    The others hold a row whose unchanged values only a store knows, or a deletion of such a row:
    a delivery writes them in their order.
    """
    unfit = np.zeros(sets.count, np.bool_)
    for name, rows in sets.tables.items():
        unfit[sets.numbers[name][~_whole(name, rows)]] = True
    before = -1
    while before != (before := int(unfit.sum())) and before:
        _spread(sets, unfit)
    return ~unfit


def _spread(sets: CommitSets, unfit: np.ndarray) -> None:
    """Adds sets with a deletion of a row that is in an unfit one: a deleted row keeps its content,
    and that is still to come, or to move to another key."""
    for name, rows in sets.tables.items():
        numbers = sets.numbers[name]
        mine = pa.array(unfit[numbers])
        keys = pc.unique(
            pa.concat_arrays(
                [rows["record_id"].filter(mine), rows["_prev_id"].filter(mine).drop_null()]
            )
        )
        hit = pc.is_in(rows["record_id"], value_set=keys).to_numpy(zero_copy_only=False)
        unfit[numbers[hit & (rows["_op"].to_numpy() == Op.DELETE)]] = True


def row_set(campus: str, lane: Lane, tables: Rows) -> RowSet:
    """Returns what is to be written of the rows of writable sets: the newest of each key."""
    newest = {}
    for name, rows in tables.items():
        ready = made_whole(None, TABLES[name], campus, compact(TABLES[name], rows)).ready
        newest[name] = ready.rows
    return RowSet(campus, newest, lane)


def keys_of(tables: Rows) -> list[tuple[str, str]]:
    """Returns table and record_id of every row, each once, in one order."""
    found = ((name, pc.unique(rows["record_id"]).tolist()) for name, rows in tables.items())
    return sorted((name, key) for name, keys in found for key in keys)


def of_keys(tables: Rows, keys: Sequence[tuple[str, str]]) -> Rows:
    """Returns the rows of these keys."""
    masks = {}
    for name, rows in tables.items():
        wanted = pa.array([key for table, key in keys if table == name], pa.utf8())
        found = pc.is_in(rows["record_id"], value_set=wanted)
        masks[name] = found.to_numpy(zero_copy_only=False)
    return _filtered(tables, masks)


def _filtered(tables: Rows, masks: Mapping[str, np.ndarray]) -> Rows:
    return {
        name: rows if masks[name].all() else rows.filter(pa.array(masks[name]))
        for name, rows in tables.items()
        if masks[name].any()
    }


def _patients(tables: Rows) -> np.ndarray:
    """Returns a number for the patient of each row, _NOBODY where the row names none."""
    named = []
    for name, rows in tables.items():
        column = TABLES[name].patient
        bit = np.uint64(1 << TABLES[name].index[column])
        known = (rows["_unchanged"].to_numpy() & bit) == 0
        named.append(pc.if_else(pa.array(known), rows[column], pa.scalar(None, pa.utf8())))
    codes = pa.concat_arrays(named).dictionary_encode().indices
    return pc.fill_null(codes, _NOBODY).to_numpy().astype(np.int64)


def _whole(name: str, rows: pa.RecordBatch) -> np.ndarray:
    """Returns bool[n]: all of the row is known, and is what any store reads alike."""
    whole = (rows["_unchanged"].to_numpy() == 0) & rows["_digest"].is_valid().to_numpy(
        zero_copy_only=False
    )
    for column in _decimals(name):
        plain = pc.match_substring_regex(rows[column], _CANONICAL_DECIMAL)
        whole &= pc.fill_null(plain, True).to_numpy(zero_copy_only=False)
    return whole | (rows["_op"].to_numpy() == Op.DELETE)


@functools.cache
def _decimals(name: str) -> tuple[str, ...]:
    return tuple(c.name for c in TABLES[name].columns if c.kind is Kind.DECIMAL)
