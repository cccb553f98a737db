"""A record as the row of a consult table that shows it, and a source's row as a record."""

import collections.abc
import datetime

import pyarrow as pa

from schemas.batches import Lane
from schemas.conflict_policy import ConflictRules, TablePolicy
from schemas.hlc import us_of
from schemas.positions import SEQ_END, Position
from schemas.siblings import UNSEEN, Record, Stamp, Value, Values
from schemas.tables import ARROW_TYPES, Kind, Table
from schemas.versions import SOURCE_MARK, Dot, source_dot
from transforms.checksum import digest_rows
from transforms.conflicts.edit import source_record
from transforms.conflicts.show import Shown

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def record_of_source(
    campus: str,
    position: Position,
    hlc: int,
    values: Values | None,
    table: TablePolicy,
    rules: ConflictRules,
) -> Record:
    """Returns a source's row as a record, the same at every store.

    The lane is always routine: which copy of a row came first differs between stores.

    Args:
      values: every column, as the store prints it; None for a tombstone.
    """
    dot = Dot(SOURCE_MARK + campus, source_count(campus, position))
    stamp = Stamp(hlc, Lane.ROUTINE, rules.source_role, dot.actor)
    return source_record(dot, stamp, values or {}, table, deleted=values is None)


def source_count(campus: str, position: Position) -> int:
    """Returns the count of a source's row version."""
    return max(
        1, source_dot(campus, position).counter
    )  # Older versions put rows of a lost log at 0.


def record_of_row(
    row: collections.abc.Mapping[str, Value], table: TablePolicy, rules: ConflictRules
) -> Record:
    """Returns what a source alone has written as a record; `row` as `to_jsonb` has it in UTC."""
    if not row["src_table"]:
        return UNSEEN
    values = None if row["deleted"] else {column: row[column] for column in table.group_of}
    position = Position(row["src_lsn"], row["src_seq"])
    return record_of_source(row["campus"], position, row["hlc"], values, table, rules)


def source_position(record: Record, campus: str) -> Position:
    """Returns the newest place in the source's log that a record has seen, or (0, 0)."""
    count = record.seen.get(SOURCE_MARK + campus, 0)
    bits = SEQ_END.bit_length()
    return Position(count >> bits & (1 << 63) - 1, count & SEQ_END)


def source_values(record: Record, campus: str, table: TablePolicy) -> Values | None:
    """Returns what the source said last of every column; None where that is not known any more."""
    said: dict[str, Value] = {}
    for policy in table.groups:
        newest: tuple[int, Values] = (0, {})
        for entry in record.entries(policy.group).values():
            if entry.dot.actor == SOURCE_MARK + campus:
                newest = max(newest, (entry.dot.counter, entry.values), key=lambda n: n[0])
            if entry.base is not None:
                newest = max(newest, (entry.base.counter, entry.base.values), key=lambda n: n[0])
        if not newest[0]:
            return None
        said.update(newest[1])
    return said


def row_of(
    campus: str, record_id: str, record: Record, shown: Shown, src_table: str, level: int
) -> dict[str, object]:
    """Returns the row that shows a record, without its digest."""
    entries = [entry for group in record.live.values() for entry in group.values()]
    newest = max(entries, key=lambda entry: (entry.stamp.hlc, entry.dot))
    position = source_position(record, campus)
    at = _EPOCH + datetime.timedelta(microseconds=us_of(newest.stamp.hlc))
    return {
        "campus": campus,
        "record_id": record_id,
        **shown.values,
        "src_table": src_table,
        "src_lsn": position.lsn,
        "src_seq": position.seq,
        "committed_at": at.isoformat(),
        "hlc": newest.stamp.hlc,
        "lane": "E" if newest.stamp.lane is Lane.EMERGENCY else "R",
        "security_level": level,
        "deleted": shown.deleted,
        "version_vector": dict(record.seen),
    }


def put_digests(table: Table, rows: collections.abc.Sequence[dict[str, object]]) -> None:
    """Gives rows the canonical digest of their content, null where a value has no Arrow form."""
    try:
        digests = digest_rows(table, _arrow(table, rows)).to_pylist()
    except (ValueError, OverflowError, pa.ArrowInvalid):
        if len(rows) == 1:
            rows[0]["digest"] = None
        else:
            for row in rows:
                put_digests(table, [row])
        return
    for row, digest in zip(rows, digests, strict=True):
        row["digest"] = f"\\x{digest.hex()}"


def _arrow(table: Table, rows: collections.abc.Sequence[dict[str, object]]) -> pa.RecordBatch:
    columns = [pa.array([row["record_id"] for row in rows], pa.utf8())]
    for column in table.columns:
        values = [_typed(row[column.name], column.kind) for row in rows]
        columns.append(pa.array(values, ARROW_TYPES[column.kind]))
    return pa.RecordBatch.from_arrays(columns, ["record_id", *table.by_name])


def _typed(value: object, kind: Kind) -> object:
    if isinstance(value, str) and kind is Kind.DATE:
        return datetime.date.fromisoformat(value)
    if isinstance(value, str) and kind is Kind.TIME:
        return datetime.datetime.fromisoformat(value)
    if value is not None and kind is Kind.DECIMAL:
        return str(value)
    return value
