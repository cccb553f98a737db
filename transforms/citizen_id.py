"""Citizen identity numbers (GB 11643) over columns: form, check digit, birth date and sex."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transforms.parse_text import text_buffers

_WEIGHTS = np.array([7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2])
_CHECK = np.frombuffer(b"10X98765432", np.uint8)
_LONG, _SHORT = 18, 15
_CENTURY = np.frombuffer(b"19", np.uint8)  # Numbers of 15 digits were given before 1999.


@dataclasses.dataclass(frozen=True)
class CitizenIds:
    """What numbers say; arrays are one a row.

    Attributes:
      present: there is a text that is not blank.
      formed: 18 characters, or the 15 digits of before 1999, with a date in them.
      checked: formed, with a check digit; one of 15 digits has none.
      valid: checked, and the check digit is right.
      birth_days: days since 1970-01-01 that the number tells (int64), 0 where not formed.
      male: the digit before the check digit is odd.
      texts: uint8[n, 18], upper case; zeros where not formed.
    """

    present: np.ndarray
    formed: np.ndarray
    checked: np.ndarray
    valid: np.ndarray
    birth_days: np.ndarray
    male: np.ndarray
    texts: np.ndarray


def read_citizen_ids(array: pa.Array) -> CitizenIds:
    """Returns what a column of identity numbers (utf8) says; a null is not present.

    Blanks around a number are passed over, and a small x is a capital one.
    """
    trimmed = pc.utf8_upper(pc.utf8_trim_whitespace(array))
    offsets, data, valid = text_buffers(trimmed)
    lengths = np.diff(offsets)
    present = lengths > 0
    if len(valid):
        present &= valid
    texts = np.zeros((len(array), _LONG), np.uint8)
    long, short = present & (lengths == _LONG), present & (lengths == _SHORT)
    texts[long] = _gather(data, offsets, long, _LONG)
    if short.any():
        digits = _gather(data, offsets, short, _SHORT)
        texts[short, :6] = digits[:, :6]
        texts[short, 6:8] = _CENTURY
        texts[short, 8:17] = digits[:, 6:]
        texts[short, 17] = ord("0")
    numbers = texts.astype(np.int64) - ord("0")
    is_digit = (numbers >= 0) & (numbers <= 9)
    formed = (long | short) & is_digit[:, :17].all(axis=1)
    formed &= is_digit[:, 17] | (texts[:, 17] == ord("X"))
    numbers[~formed] = 0
    days, is_date = _days(numbers)
    formed &= is_date
    right = texts[:, 17] == _CHECK[(numbers[:, :17] @ _WEIGHTS) % 11]
    texts[~formed] = 0
    return CitizenIds(
        present=present,
        formed=formed,
        checked=formed & long,
        valid=formed & long & right,
        birth_days=np.where(formed, days, 0),
        male=formed & (numbers[:, 16] % 2 == 1),
        texts=texts,
    )


def _gather(data: np.ndarray, offsets: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """uint8[k, size]: the texts of the rows in the mask, each `size` bytes."""
    starts = offsets[:-1][rows].astype(np.int64)
    return data[starts[:, None] + np.arange(size)] if len(starts) else np.empty((0, size), np.uint8)


def _days(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Days since 1970-01-01 of digits 7 to 14, and whether they are a date from 1800 on."""
    year = numbers[:, 6:10] @ np.array([1000, 100, 10, 1])
    month = numbers[:, 10:12] @ np.array([10, 1])
    day = numbers[:, 12:14] @ np.array([10, 1])
    possible = (year >= 1800) & (month >= 1) & (month <= 12) & (day >= 1)
    months = np.where(possible, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    first = months.astype("datetime64[D]")
    length = ((months + 1).astype("datetime64[D]") - first).astype(np.int64)
    possible &= day <= length
    days = first.astype(np.int64) + day - 1
    return days, possible
