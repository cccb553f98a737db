"""The rows of one source table while they are worked on, and the canonical columns they become."""

import collections
import dataclasses
import functools
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.tables import Table
from transforms import parse_text
from transforms.harmonise import damaged_text
from transforms.harmonise.columns import either, mask_of, null_where, source_columns
from transforms.harmonise.reissue import AWAITING

_REMARK_CHARS = 64  # Of a text as written; a code is shorter.


class Note(typing.NamedTuple):
    """What passed and should be seen.

    `unknown_code`, `unknown_column`, `unknown_unit`, `unread_range`; `bad_int` and the like where
    the mapping notes them; `awaiting_parent`; the damages of `damaged_text.Damage`.
    """

    src_table: str
    column: str
    what: str


class UnknownCode(typing.NamedTuple):
    """A code that a dictionary lacks, for a person to add; a longer one than 64 is cut."""

    code_list: str
    code: str
    src_table: str
    column: str


@dataclasses.dataclass(frozen=True)
class Tally:
    """What is counted while rows are worked on."""

    notes: collections.Counter[Note]
    unknown_codes: collections.Counter[UnknownCode]


class Rows:
    """The rows of one source table while they are worked on."""

    def __init__(self, name: str, batch: pa.RecordBatch, tally: Tally):
        self.name = name
        self.batch = batch
        self._tally = tally
        self.size = batch.num_rows
        self.columns = source_columns(batch)
        self.ops = batch.column("_op").to_numpy()
        bits = batch.column("_unchanged").to_numpy()
        self._bits = bits if bits.any() else None
        self._cleaned: dict[str, pa.Array] = {}
        self._broken: np.ndarray | None = None
        self.deletes: np.ndarray | None = None
        self.refused: dict[int, tuple[str, str]] = {}
        self._remarks: list[tuple[str, str, np.ndarray, pa.Array]] = []

    def __getitem__(self, column: str) -> pa.Array:
        return self._cleaned[column] if column in self._cleaned else self.batch.column(column)

    @property
    def all_sent(self) -> bool:
        """Whether no source column of any row is unchanged."""
        return self._bits is None

    def clean(self, column: str, mask: np.ndarray) -> None:
        """Makes a source column null in `mask`: texts that no later step may meet."""
        self._cleaned[column] = null_where(self[column], mask)

    def unchanged(self, column: str | None) -> np.ndarray | None:
        """bool[n] of the rows in which a source column is unchanged, or None if in none."""
        if self._bits is None or column is None:
            return None
        mask = (self._bits >> np.uint64(self.columns.index(column))) & np.uint64(1)
        return mask.astype(np.bool_) if mask.any() else None

    def refuse(self, mask: np.ndarray, reason: str, column: str, key: bool = False) -> None:
        """Refuses the rows in `mask`; a row's first refusal stands.

        A delete needs its key only: it is refused for that, not for the content it takes away.
        """
        if not mask.any():
            return
        if not key and self.deletes is not None:
            spared = mask & self.deletes
            self._broken = spared if self._broken is None else self._broken | spared
            mask = mask & ~self.deletes
        for row in np.flatnonzero(mask).tolist():
            self.refused.setdefault(row, (reason, column))

    def key_only(self, keys: tuple[str, ...]) -> np.ndarray | None:
        """bool[n] of the deletes that bring no content, or none that can be read."""
        if self.deletes is None:
            return None
        places = pa.array(np.flatnonzero(self.deletes))
        whole = np.zeros(len(places), np.bool_)
        for column in self.columns:
            if column not in keys:
                whole |= self[column].take(places).is_valid().to_numpy(zero_copy_only=False)
        mask = self.deletes.copy()
        mask[self.deletes] = ~whole
        return mask if self._broken is None else mask | self._broken

    def note(self, column: str, what: str, count: int) -> None:
        if count:
            self._tally.notes[Note(self.name, column, what)] += int(count)

    def remark(self, column: str, canonical: str, what: str, mask: np.ndarray, text: pa.Array):
        """Notes what is odd in the rows `mask` of a source column, and marks the rows with it.

        Args:
          canonical: the column that is null or raw for it. text: as written, utf8[n].
        """
        if self.deletes is not None:
            mask = mask & ~self.deletes
        if mask.any():
            self.note(column, what, int(np.count_nonzero(mask)))
            self._remarks.append((canonical, what, mask, text))

    def invalid(
        self, noted: bool, bad: np.ndarray, reason: str, column: str, canonical: str, text: pa.Array
    ) -> None:
        """Refuses the rows `bad`, or notes them and lets their null pass."""
        if not noted:
            self.refuse(bad, reason, column)
        else:
            self.remark(column, canonical, reason, bad, text)

    def unknown_codes(self, column: str, code_list: str, counts: dict[str, int]) -> None:
        """Counts codes that are in no dictionary."""
        for code, count in counts.items():
            key = UnknownCode(code_list, code[:_REMARK_CHARS], self.name, column)
            self._tally.unknown_codes[key] += count

    @property
    def remarked(self) -> bool:
        """Whether there is any remark."""
        return bool(self._remarks)

    def remarks(self, table: Table) -> pa.Array:
        """All remarks: utf8[n], a line each, `what column: text`; first that the parent lacks."""
        nothing = pa.nulls(self.size, pa.utf8())
        marked = functools.reduce(np.logical_or, (mask for _, _, mask, _ in self._remarks))
        at = pa.array(np.flatnonzero(marked))
        lines = []
        for canonical, what, mask, text in sorted(
            self._remarks, key=lambda one: (one[1] != AWAITING, table.index[one[0]], one[1])
        ):
            raw = pc.utf8_slice_codeunits(text.take(at), 0, _REMARK_CHARS)
            raw = pc.replace_substring_regex(pc.fill_null(raw, ""), r"[\r\n]+", " ")
            line = pc.binary_join_element_wise(f"{what} {canonical}: ", raw, "")
            lines.append(null_where(line, ~mask[marked]))
        joined = pc.binary_join_element_wise(*lines, "\n", null_handling="skip")
        return pc.replace_with_mask(nothing, pa.array(marked), joined)


class Outputs:
    """Canonical columns as they are made, with the rows in which each is unchanged."""

    def __init__(self, size: int):
        self._size = size
        self.arrays: dict[str, pa.Array] = {}
        self.unchanged: dict[str, np.ndarray] = {}

    def put(self, column: str, array: pa.Array, unchanged: np.ndarray | None) -> None:
        if unchanged is not None:
            array = null_where(array, unchanged)
            self.unchanged[column] = unchanged
        self.arrays[column] = array

    def keep_only(self, rows: np.ndarray, columns: frozenset[str]) -> None:
        """Makes all columns but `columns` unchanged in the rows `rows` (bool[n])."""
        for column, array in self.arrays.items():
            if column not in columns:
                before = self.unchanged.get(column)
                self.put(column, array, rows if before is None else rows | before)

    def bits(self, table: Table) -> pa.Array | None:
        """The `_unchanged` masks, or None if nothing is unchanged."""
        if not self.unchanged:
            return None
        bits = np.zeros(self._size, np.uint64)
        for column, mask in self.unchanged.items():
            bits |= mask.astype(np.uint64) << np.uint64(table.index[column])
        return pa.array(bits)


def check_text(rows: Rows, column: str, limit: int, key: bool, words: bool) -> None:
    """Refuses texts that no consult store can hold, with NUL or too long; notes damaged words."""
    array = rows[column]
    offsets, data, _ = parse_text.text_buffers(array)
    used = data[offsets[0] : offsets[-1]]
    bad = []
    signs = damaged_text.survey(used)
    if signs & damaged_text.NUL:
        holders = np.searchsorted(offsets, offsets[0] + np.flatnonzero(used == 0), "right") - 1
        bad.append(("nul_byte", mask_of(rows.size, holders)))
    if len(used) > limit:
        bad.append(("oversized", np.diff(offsets) > limit))
    for reason, mask in bad:
        rows.refuse(mask, reason, column, key)
        rows.clean(column, mask)
    if words and signs & ~damaged_text.NUL:
        for what, count in damaged_text.count_damage(array, signs).items():
            rows.note(column, what, count)


def all_or_refused(rows: Rows, columns: typing.Sequence[str]) -> np.ndarray | None:
    """Where all `columns` are unchanged; refuses the rows in which only some are."""
    masks = [rows.unchanged(column) for column in columns]
    some = functools.reduce(either, masks)
    if some is None:
        return None
    none = np.zeros(rows.size, np.bool_)
    all_of = functools.reduce(np.logical_and, (none if m is None else m for m in masks))
    rows.refuse(some & ~all_of, "partial_row", columns[0])
    return some
