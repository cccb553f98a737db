"""Gather the changes of one table as they come and lay them out as Arrow text columns."""

import operator
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op, Reject
from schemas.positions import Position
from transforms.capture.columns import COLUMNS_MAX, Layout
from transforms.capture.debezium.connect_types import encoding_of
from transforms.capture.debezium.encodings import Ambiguous, Encoding, column_text, text_of
from transforms.capture.debezium.hints import UNKNOWN, TableSpec
from transforms.capture.debezium.record import NotAnEvent, schema_fields
from transforms.capture.debezium.unchanged import Placeholder

# Encodings whose columns, taken as a whole, hold no placeholder: it is no value of theirs.
_NEVER_TEXT = frozenset({"int", "bool", "float", "days", "instant", "clock", "zoned"})
_BYTES = frozenset({"bytes", "hex", "decimal", "bits"})
_AS_IT_IS = Encoding("json")
BAD_VALUE, AMBIGUOUS, PARTIAL_ROW = "bad_value", "ambiguous_value", "partial_row"


class Row(typing.NamedTuple):
    """A change as its event has it.

    Attributes:
      values: JSON values by column; of a delete those of the key count only.
      before: the old row, or None; it may lack columns and may have made-up values in others.
      old_key: JSON values of the key before it changed, or None.
    """

    op: Op
    lsn: int
    seq: int
    commit_us: int
    values: dict[str, typing.Any]
    before: dict[str, typing.Any] | None = None
    old_key: dict[str, typing.Any] | None = None


class TableForm:
    """The form of a table's events for a while: their columns and how they are written.

    Args:
      table: `schema.table`. columns: of the events, in order. schema: the events' Connect schema.

    Raises:
      TooManyColumns: the mapping reads more columns than an unchanged mask has bits.
      NotAnEvent: `bad_schema`.
    """

    def __init__(self, table: str, columns: tuple[str, ...], schema: bytes, spec: TableSpec):
        self.table, self.columns, self.schema = table, columns, schema
        self.spec = spec
        carried = columns
        if len(columns) > COLUMNS_MAX and spec.columns is not None:
            carried = tuple(column for column in columns if column in spec.columns)
        key = tuple(carried.index(column) for column in spec.key)
        self.layout = Layout(table, carried, key, key)
        self.encodings = self._encodings()

    def _encodings(self) -> tuple[Encoding, ...]:
        if self.schema:
            # A form's rows are those after a change; a deleted one has the same columns.
            fields = schema_fields(self.schema, "after") or schema_fields(self.schema, "before")
            try:
                known = {field["field"]: encoding_of(field) for field in fields}
            except (TypeError, KeyError, ValueError, AttributeError):
                raise NotAnEvent("bad_schema") from None
            return tuple(known.get(column, UNKNOWN) for column in self.layout.columns)
        return tuple(self.spec.encodings.get(column, UNKNOWN) for column in self.layout.columns)

    def is_read(self, column: str) -> bool:
        return self.spec.columns is None or column in self.spec.columns


class TableRows:
    """Rows of one form, in order, on their way to a record batch."""

    def __init__(self, form: TableForm, placeholder: Placeholder):
        self._form, self._placeholder = form, placeholder
        self._rows: list[Row] = []
        self._refused: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def form(self) -> TableForm:
        return self._form

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def cut(self, count: int) -> "TableRows":
        """Takes out the first `count` rows and returns them."""
        taken = TableRows(self._form, self._placeholder)
        taken._rows, self._rows = self._rows[:count], self._rows[count:]
        return taken

    def up_to(self, lsn: int) -> int:
        """How many of the rows are at `lsn` or before it."""
        count = len(self._rows)
        while count and self._rows[count - 1].lsn > lsn:
            count -= 1
        return count

    def batch(self) -> tuple[pa.RecordBatch, list[Reject]]:
        """Returns the rows that can be read, and the others as rejects."""
        rows, layout = self._rows, self._form.layout
        self._refused = {}
        ops = np.array([row.op for row in rows], np.uint8)
        deletes = ops == Op.DELETE
        unchanged = np.zeros(len(rows), np.uint64)
        identity = {layout.columns[index] for index in layout.key}
        arrays: list[pa.Array] = []
        contents = [row.values for row in rows]
        for index, column in enumerate(layout.columns):
            values = _values(contents, column)
            key_only = column not in identity and deletes.any()
            if key_only:  # A delete's old row may be made up where it is not the key.
                values = [None if gone else v for gone, v in zip(deletes, values, strict=True)]
            array, kept = self._column(index, column, values)
            mask = kept if not key_only else deletes if kept is None else kept | deletes
            if mask is not None:
                unchanged |= mask.astype(np.uint64) << np.uint64(index)
            arrays.append(array)
        arrays += [self._old_key(index) for index in layout.key]
        fixed = [
            pa.array(ops),
            pa.array([row.lsn for row in rows], pa.int64()),
            pa.array([row.seq for row in rows], pa.int32()),
            pa.array([row.commit_us for row in rows], pa.int64()),
            pa.array(unchanged),
        ]
        batch = pa.RecordBatch.from_arrays([*fixed, *arrays], schema=layout.schema)
        if not self._refused:
            return batch, []
        keep = np.ones(len(rows), np.bool_)
        keep[list(self._refused)] = False
        return batch.filter(pa.array(keep)), self._rejects(unchanged)

    def _column(
        self, index: int, column: str, values: list[typing.Any]
    ) -> tuple[pa.Array, np.ndarray | None]:
        """Returns a column's texts, and where its value is unchanged (None: nowhere)."""
        encoding = self._form.encodings[index]
        array = column_text(encoding, values)
        if array is not None and not self._has_placeholder(encoding, array, values):
            return array, None
        texts: list[str | None] = []
        kept = np.zeros(len(values), np.bool_)
        for at, value in enumerate(values):
            if value is not None and self._placeholder(value):
                value = self._from_before(at, column)
                kept[at] = value is None
                if kept[at] and self._rows[at].op in (Op.INSERT, Op.SNAPSHOT):
                    self._refuse(at, PARTIAL_ROW, column)
            texts.append(self._text(at, column, encoding, value))
        return pa.array(texts, pa.utf8()), kept if kept.any() else None

    def _has_placeholder(
        self, encoding: Encoding, array: pa.Array, values: list[typing.Any]
    ) -> bool:
        """Whether one of the values stands for one that the log does not carry."""
        if encoding.name in _NEVER_TEXT:
            return False
        marks = self._placeholder.marks
        if encoding.name in _BYTES:  # It is base64 or hex, and as such a value too.
            return not marks.isdisjoint(values)
        return pc.any(pc.is_in(array, value_set=pa.array(sorted(marks), pa.utf8()))).as_py()

    def _from_before(self, at: int, column: str) -> typing.Any:
        """The value from a whole old row: it was not changed."""
        value = (self._rows[at].before or {}).get(column)
        return None if self._placeholder(value) else value

    def _text(self, at: int, column: str, encoding: Encoding, value: typing.Any) -> str | None:
        try:
            return text_of(encoding, value)
        except Ambiguous:
            self._refuse(at, AMBIGUOUS, column)
        except ValueError:
            self._refuse(at, BAD_VALUE, column)
        return None

    def _refuse(self, at: int, reason: str, column: str) -> None:
        """Refuses a row, unless nobody reads the column; its first refusal stands."""
        if self._form.is_read(column):
            self._refused.setdefault(at, (reason, column))

    def _old_key(self, index: int) -> pa.Array:
        column, encoding = self._form.layout.columns[index], self._form.encodings[index]
        if all(row.old_key is None for row in self._rows):
            return pa.nulls(len(self._rows), pa.utf8())
        values = [(row.old_key or {}).get(column) for row in self._rows]
        texts = [self._text(at, column, encoding, value) for at, value in enumerate(values)]
        return pa.array(texts, pa.utf8())

    def _rejects(self, unchanged: np.ndarray) -> list[Reject]:
        columns = self._form.layout.columns
        rejects = []
        for at, (reason, column) in sorted(self._refused.items()):
            row, bits = self._rows[at], int(unchanged[at])
            values = {
                name: plain(row.values.get(name))
                for index, name in enumerate(columns)
                if not bits >> index & 1
            }
            old = {f"_old.{name}": plain(value) for name, value in (row.old_key or {}).items()}
            rejects.append(
                Reject(
                    src_table=self._form.table,
                    position=Position(row.lsn, row.seq),
                    op=int(row.op),
                    commit_us=row.commit_us,
                    reason=reason,
                    column=column,
                    row=values | old,
                )
            )
        return rejects


def _values(contents: list[dict[str, typing.Any]], column: str) -> list[typing.Any]:
    try:
        return list(map(operator.itemgetter(column), contents))
    except KeyError:  # A delete may have its key alone.
        return [content.get(column) for content in contents]


def plain(value: typing.Any) -> str | None:
    """Returns a JSON value as it is, as a text."""
    return text_of(_AS_IT_IS, value)
