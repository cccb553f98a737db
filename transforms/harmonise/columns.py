"""Small steps over columns that every rule is made of: masks, nulls, codes, joined texts."""

import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transforms.join_batches import concat_rows

META = ("_op", "_lsn", "_seq", "_commit_us", "_unchanged")
OLD = "_old."


def source_columns(batch: pa.RecordBatch) -> list[str]:
    """The source's columns in its order: bit i of `_unchanged` is the i-th of these."""
    names = (name for name in batch.schema.names if not name.startswith(OLD))
    return [name for name in names if name not in META]


def by_value(text: pa.Array, rule: typing.Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Applies `rule` to the distinct texts only; returns `text` itself if it changes none."""
    encoded = text.dictionary_encode()
    values = rule(encoded.dictionary)
    return text if values.equals(encoded.dictionary) else values.take(encoded.indices)


def codes_of(encoded: pa.DictionaryArray) -> np.ndarray:
    """Places in the dictionary; null is one beyond the last."""
    return encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()


def joined(parts: list[pa.Array], separator: str) -> pa.Array:
    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, separator)


def nulls(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def null_where(array: pa.Array, mask: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def mask_of(size: int, rows: typing.Sequence[int] | np.ndarray) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[rows] = True
    return mask


def either(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second


def in_order(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Changes of several sources as one batch, by position."""
    if len(parts) == 1:
        return parts[0]
    batch = concat_rows(parts)
    keys = batch.column("_seq").to_numpy(), batch.column("_lsn").to_numpy()
    return batch.take(pa.array(np.lexsort(keys)))
