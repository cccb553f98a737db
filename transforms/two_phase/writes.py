"""A set of canonical rows that is written as one, in the form that any branch can write."""

import dataclasses
import functools
import json
import typing
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from schemas.batches import Lane, Op
from schemas.conflict_policy import EDITED_AT_STORES
from schemas.entities import TABLES
from schemas.hlc import stamp_of
from schemas.tables import Kind, Table
from transforms.deliver.merging.merge_wire import LANE_CODES
from transforms.deliver.store_schema import DELIVERED_SYNC_COLUMNS

_SYNC_NAMES = tuple(name for name, _, _ in DELIVERED_SYNC_COLUMNS)
# What is written here may overtake what the routine lane brings: no base for a row behind it.
_EXPRESS = LANE_CODES[Lane.EMERGENCY].decode()


@dataclasses.dataclass(frozen=True)
class RowSet:
    """Rows of one campus that belong together: canonical table to rows (`Table.arrow_schema`).

    Every row is whole, has its digest (a tombstone may have neither) and its place in the source's
    log, by which stores tell older from newer; each key comes once. `lane` is noted in the rows.
    """

    campus: str
    tables: Mapping[str, pa.RecordBatch] = dataclasses.field(repr=False)
    lane: Lane = Lane.EMERGENCY


@dataclasses.dataclass(frozen=True)
class TableWrite:
    """Rows of one table, in the order of their keys: column to JSON value, text for most kinds.

    `bare` rows are tombstones: a store keeps what it has of the row's content.
    """

    table: str
    bare: bool
    rows: list[dict[str, typing.Any]] = dataclasses.field(repr=False)

    @functools.cached_property
    def rows_json(self) -> str:
        """The rows as an array of JSON objects."""
        return json.dumps(self.rows)


def encode(sets: Iterable[RowSet]) -> list[TableWrite]:
    """Returns what to write, in one order for all, so that two of them do not lock crosswise.

    Raises:
      ValueError: a set is empty or breaks the contract of `RowSet`, or its table is one that
        clients edit: such rows converge by their versions and are written by deliveries alone.
    """
    found: dict[tuple[str, bool], dict[tuple[str, str], dict]] = {}
    for rows_of in sets:
        for name, batch in rows_of.tables.items():
            if name not in TABLES or name in EDITED_AT_STORES:
                raise ValueError(f"{name} is not a table of sets that are written as one")
            for row, bare in _plain(TABLES[name], rows_of.campus, rows_of.lane, batch):
                key = (row["record_id"], row["campus"])
                if any(key in found.get((name, kind), ()) for kind in (False, True)):
                    raise ValueError(f"a key of {name} comes twice in one set")
                found.setdefault((name, bare), {})[key] = row
    if not found:
        raise ValueError("a set that is written as one has no rows")
    return [
        TableWrite(name, bare, [rows[key] for key in sorted(rows)])
        for (name, bare), rows in sorted(found.items())
    ]


def to_json(writes: Sequence[TableWrite]) -> list[list]:
    """Returns `writes` as plain JSON."""
    return [[write.table, write.bare, write.rows] for write in writes]


def from_json(content: Sequence[Sequence]) -> list[TableWrite]:
    """Returns what `to_json` was given."""
    return [TableWrite(*part) for part in content]


@functools.lru_cache
def names_of(table: Table, bare: bool = False) -> tuple[str, ...]:
    """Returns the columns that a write gives; of `bare` rows those that it changes, too."""
    own = () if bare else tuple(column.name for column in table.columns)
    sync = tuple(name for name in _SYNC_NAMES if not (bare and name == "digest"))
    return ("campus", "record_id", *own, *sync)


def _plain(
    table: Table, campus: str, lane: Lane, batch: pa.RecordBatch
) -> Iterable[tuple[dict, bool]]:
    partial = batch["_unchanged"].to_numpy() != 0
    if (partial & (batch["_op"].to_numpy() != Op.DELETE)).any():
        raise ValueError(f"a row of {table.name} is not whole")
    lane_code = LANE_CODES[lane].decode()
    kinds = {column.name: column.kind for column in table.columns}
    values = {name: _values(kind, batch[name]) for name, kind in kinds.items()}
    commits = batch["_commit_us"].cast(pa.timestamp("us", "UTC")).cast(pa.string()).to_pylist()
    given = ("record_id", "_op", "_lsn", "_seq", "_commit_us", "_src_table", "_digest")
    for i, (record_id, op, lsn, seq, us, src_table, digest) in enumerate(
        zip(*(batch[name].to_pylist() for name in given), strict=True)
    ):
        gone = op == Op.DELETE
        if digest is None and not gone:
            raise ValueError(f"a row of {table.name} has no digest")
        row = {"campus": campus, "record_id": record_id}
        row |= {name: column[i] for name, column in values.items()}
        row |= dict(
            zip(
                _SYNC_NAMES,
                (
                    *(src_table, lsn, seq, commits[i], stamp_of(us)),
                    _EXPRESS if gone else lane_code,
                    table.level,
                ),
                strict=False,
            )
        )
        row |= {"digest": digest and digest.hex(), "deleted": gone}
        bare = gone and digest is None
        yield {name: row[name] for name in names_of(table, bare)}, bare


def _values(kind: Kind, column: pa.Array) -> list:
    if kind in (Kind.DATE, Kind.TIME):
        column = column.cast(pa.string())
    return column.to_pylist()
