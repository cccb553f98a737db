"""Conditions on columns as the emergency rules ask them: each a mask, with null as False."""

import collections.abc

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.emergency_rules import Rule
from schemas.entities import TABLES

_DECIMAL = r"^[-+]?[0-9]+(\.[0-9]+)?$"


def first(*layers: tuple[Rule, np.ndarray]) -> np.ndarray:
    """Returns the first rule of each row whose mask is set."""
    found = np.zeros(layers[0][1].size, np.uint8)
    for rule, mask in reversed(layers):
        found[mask] = rule
    return found


def words(words: collections.abc.Iterable[str]) -> pa.Array:
    """Returns words as a set to look values up in."""
    return pa.array(list(words), pa.utf8())


def ints(rows: pa.RecordBatch, column: str) -> np.ndarray:
    """Returns a column of integers."""
    return rows.column(column).to_numpy()


def true(mask: pa.BooleanArray) -> np.ndarray:
    """Returns bool[n], null as False."""
    if mask.null_count:
        mask = pc.fill_null(mask, False)
    return mask.to_numpy(zero_copy_only=False)


def is_in(rows: pa.RecordBatch, column: str, words: pa.Array) -> np.ndarray:
    """Returns bool[n]: the column's text is one of `words`."""
    return true(pc.is_in(rows.column(column), value_set=words))


def valid(rows: pa.RecordBatch, column: str) -> np.ndarray:
    """Returns bool[n]: the column is not null."""
    return true(pc.is_valid(rows.column(column)))


def missing(rows: pa.RecordBatch, table: str, column: str) -> np.ndarray:
    """Returns bool[n]: null because the campus says nothing, not because it is unchanged."""
    bit = np.uint64(1 << TABLES[table].index[column])
    return ~valid(rows, column) & ((ints(rows, "_unchanged") & bit) == 0)


def among(values: pa.Array, levels: collections.abc.Iterable[int]) -> np.ndarray:
    """Returns bool[n]: the number is one of `levels`."""
    return true(pc.is_in(values, value_set=pa.array(list(levels), pa.int64())))


def floats(values: pa.Array) -> np.ndarray:
    """Returns float64[n] of numbers or of their text; NaN for null and for any other text."""
    if pa.types.is_string(values.type):
        try:
            values = pc.cast(values, pa.float64())
        except pa.ArrowInvalid:
            numeric = pc.fill_null(pc.match_substring_regex(values, _DECIMAL), False)
            nothing = pa.scalar(None, pa.utf8())
            values = pc.cast(pc.if_else(numeric, values, nothing), pa.float64())
    elif values.null_count:
        values = pc.cast(values, pa.float64())
    return values.to_numpy(zero_copy_only=False)
