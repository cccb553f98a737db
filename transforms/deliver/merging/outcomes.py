"""What becomes of the rows of a merge, and why the server refuses one."""

import dataclasses
import enum
import typing

import numpy as np
import psycopg

from schemas.tables import Table
from transforms.deliver.store_schema import constraint_name

# A value of a row's own: 22 data, 23 constraint, 54 too large for an index or a column.
_DATA_CLASSES = ("22", "23", "54")
_REASONS = {
    "22003": "numeric_out_of_range",
    "22008": "time_out_of_range",
    "22021": "invalid_text",
    "22P03": "invalid_value",
    "23502": "not_null_violation",
    "23514": "check_violation",
}


class Outcome(enum.IntEnum):
    """What became of one compacted row."""

    DELIVERED = 0
    DUPLICATE = 1
    SUPERSEDED = 2
    DEAD = 3


class Refusal(typing.NamedTuple):
    """Why row `row` of the compacted batch is dead; `column` is empty where it is not known."""

    row: int
    reason: str
    column: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """`outcomes`: uint8[n] of `Outcome`, by compacted row; `refusals` are the dead ones."""

    outcomes: np.ndarray
    refusals: tuple[Refusal, ...] = ()


class ContendedError(Exception):
    """Other writers changed the same keys each time that they were looked at."""


class ExpressRefused(Exception):
    """The server refused a row that was sent express: the transaction is lost, nothing else."""


class WrongGuess(Exception):
    """The store is not as it was taken to be: nothing was written."""


def is_data(error: psycopg.Error) -> bool:
    """Whether the server refused a row for its content, not the work as a whole."""
    return (error.sqlstate or "")[:2] in _DATA_CLASSES


def refusal_of(error: psycopg.Error, table: Table, row: int) -> Refusal:
    """Returns why the server refused the row, for which `is_data` holds; no value is in it."""
    code = error.sqlstate or ""
    reason = _REASONS.get(code, f"sqlstate_{code.lower()}")
    column = error.diag.column_name or ""
    for candidate in table.columns:
        if error.diag.constraint_name == constraint_name(table.name, candidate.name):
            column = candidate.name
    return Refusal(row, reason, column or _column_in(error.diag.context, table))


def _column_in(context: str | None, table: Table) -> str:
    """Returns the column that the context of a COPY error names, or an empty string.

    The text is the server's and may be translated; only a declared name is taken from it.
    """
    words = set((context or "").split("\n")[0].replace(",", " ").replace(":", " ").split())
    names = [column.name for column in table.columns if column.name in words]
    return names[0] if len(names) == 1 else ""
