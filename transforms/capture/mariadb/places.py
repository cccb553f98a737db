"""Places in a binlog as numbers of `Position.lsn`, and back."""

import typing

from schemas.errors import CampusSyncError
from schemas.positions import OWN_BITS

# A place is (file number, offset, kind) in OWN_BITS. At one offset come first the border, which
# ends all that starts before; then snapshots, each newer than the one before though the log has
# not grown; then the transaction that starts there.
# 16 GiB a file: the server's own positions have 32 bits, and a long transaction exceeds them.
KIND_BITS, OFFSET_BITS = 6, 34
FILE_SHIFT = KIND_BITS + OFFSET_BITS
TRANSACTION = (1 << KIND_BITS) - 1
UNITS_PER_BYTE = 1 << KIND_BITS  # Of the distance between two lsns of one file.
FILE_NUMBER_MAX = (1 << (OWN_BITS - FILE_SHIFT)) - 1
FIRST_OFFSET = 4  # Before it stands the file's magic number.


class LogPlaceInvalid(CampusSyncError):
    """A binlog file's name or size is beyond what a position can hold."""


class Place(typing.NamedTuple):
    """An offset in the binlog file of a number."""

    file: int
    offset: int


def border(file: int, offset: int) -> int:
    """Returns the lsn of the log up to `offset`: after all that starts before it.

    Raises:
      LogPlaceInvalid: file or offset are too large.
    """
    if not 0 <= file <= FILE_NUMBER_MAX or not 0 <= offset < 1 << OFFSET_BITS:
        raise LogPlaceInvalid(
            f"binlog file {file} at {offset} is beyond what is supported: files up to number "
            f"{FILE_NUMBER_MAX} and of less than 16 GiB."
        )
    return file << FILE_SHIFT | offset << KIND_BITS


def border_at(lsn: int) -> int:
    """Returns the border at the place of `lsn`: where a ledger stands that has all before it."""
    return lsn - lsn % UNITS_PER_BYTE


def transaction(file: int, offset: int) -> int:
    """Returns the lsn of the transaction whose first event starts at `offset`.

    Raises:
      LogPlaceInvalid: as for `border`.
    """
    return border(file, offset) | TRANSACTION


def last_before_transaction(lsn: int) -> int:
    """Returns the greatest lsn at the place of `lsn` that is not a transaction's."""
    return lsn | TRANSACTION - 1 if not is_transaction(lsn) else lsn - 1


def next_snapshot(lsn: int, after: int) -> int | None:
    """Returns the lsn of a snapshot at the border `lsn`, greater than `after`; None if none is."""
    found = max(lsn, after) + 1
    return found if found <= last_before_transaction(lsn) else None


def place_of(lsn: int) -> Place:
    """Returns where the log must be read from to go on after, or inside of, `lsn`."""
    return Place(lsn >> FILE_SHIFT, (lsn & ((1 << FILE_SHIFT) - 1)) >> KIND_BITS)


def is_transaction(lsn: int) -> bool:
    """Returns whether `lsn` is of a transaction, rather than of a border or a snapshot."""
    return lsn & TRANSACTION == TRANSACTION


def file_number(name: str) -> int:
    """Returns the number of a binlog file, e.g. 7 of `binlog.000007`.

    Raises:
      LogPlaceInvalid: the name does not end in a number.
    """
    digits = name.rpartition(".")[2]
    if not (digits.isascii() and digits.isdigit()):
        raise LogPlaceInvalid("a binlog file's name does not end in a number.")
    return int(digits)


def file_name(base: str, number: int) -> str:
    """Returns the name of a binlog file: `base` is what stands before the dot."""
    return f"{base}.{number:06d}"


def describe(lsn: int, base: str = "binlog") -> str:
    """Returns `lsn` in the words of the source, e.g. `binlog.000007:1234`."""
    place = place_of(lsn)
    return f"{file_name(base, place.file)}:{place.offset}"
