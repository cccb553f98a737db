"""The canonical tables, declared once: DDL, merge SQL, digests and documents derive from them."""

import dataclasses
import enum
import functools

import pyarrow as pa

from schemas.batches import CHANGE_FIELDS


class Kind(enum.StrEnum):
    """A canonical type: its Arrow form in a batch and its PostgreSQL form in a consult store."""

    TEXT = "text"
    INT = "int"
    DECIMAL = "decimal"
    BOOL = "bool"
    DATE = "date"
    TIME = "time"


# DECIMAL travels as normalised text (no exponent, no sign of zero, no trailing fractional
# zeros): exact, equal for equal values on every database, and what the digest covers.
ARROW_TYPES = {
    Kind.TEXT: pa.utf8(),
    Kind.INT: pa.int64(),
    Kind.DECIMAL: pa.utf8(),
    Kind.BOOL: pa.bool_(),
    Kind.DATE: pa.date32(),
    Kind.TIME: pa.timestamp("us", tz="UTC"),
}
POSTGRES_TYPES = {
    Kind.TEXT: "text",
    Kind.INT: "bigint",
    Kind.DECIMAL: "numeric",
    Kind.BOOL: "boolean",
    Kind.DATE: "date",
    Kind.TIME: "timestamptz",
}


class Policy(enum.StrEnum):
    """What settles two concurrent versions (DOMAIN.md 4)."""

    SINGLE_WRITER = "single_writer"


@dataclasses.dataclass(frozen=True)
class Column:
    """One canonical column.

    Attributes:
      name: snake_case, unit last where the unit is fixed.
      kind: canonical type.
      doc: one line for the data dictionary.
      unit: UCUM unit of the value, where it is fixed.
      level: sensitivity 1 (public) .. 5 (attending staff only), GB/T 39725-2020.
      standard: data element or value set that it follows, where one does.
      min: smallest plausible value that the store accepts (a CHECK), or None.
      max: largest one.
    """

    name: str
    kind: Kind
    doc: str
    unit: str | None = None
    level: int = 3
    standard: str | None = None
    min: float | None = None
    max: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """One canonical table. Its key in a store is (campus, record_id).

    `record_id` is the source's primary key as text (columns joined by `|`), unique
    in one campus and table.

    Attributes:
      name: the entity, singular.
      doc: one line.
      columns: after `record_id`, in digest order: append only, never reorder.
      patient: the column with the campus's patient number, by which escalation follows.
      event_time: the column that says when it happened clinically, or None.
      policy: what settles concurrent versions.
      level: the sensitivity of a row.
      standard: the messages and resources that it corresponds to.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    patient: str = "patient_id"
    event_time: str | None = None
    policy: Policy = Policy.SINGLE_WRITER
    level: int = 4
    standard: str = ""

    @functools.cached_property
    def by_name(self) -> dict[str, Column]:
        return {column.name: column for column in self.columns}

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Column name to its bit in a batch's `_unchanged` mask."""
        return {column.name: i for i, column in enumerate(self.columns)}

    @functools.cached_property
    def arrow_schema(self) -> pa.Schema:
        """Schema of a harmonised batch of this table; see `schemas.batches`."""
        data = [pa.field(c.name, ARROW_TYPES[c.kind]) for c in self.columns]
        return pa.schema([*CHANGE_FIELDS, pa.field("record_id", pa.utf8(), False), *data])
