"""Rows of a hospital's own system that meet records which clients have edited: joined, not merged.

Rows that nobody edited never come here: for them this costs one look at a small index a batch.
"""

import json

import numpy as np
import psycopg
import pyarrow as pa

from schemas.batches import Op
from schemas.conflict_policy import ConflictRules, conflict_rules_of, load_conflict_rules
from schemas.positions import Position
from schemas.siblings import Record, Value
from schemas.tables import Table
from schemas.versions import SOURCE_MARK
from transforms.conflicts.join import join_records
from transforms.conflicts.stored_rows import record_of_source, source_count, source_values
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.join_plain import NOT_PLAIN, PlainRows, Said
from transforms.deliver.edits.record_keys import Key

# What a client has just created has no record yet.
_ANY = """\
(SELECT FROM sync.record WHERE campus = %(campus)s AND table_name = %(table)s LIMIT 1) UNION ALL
(SELECT FROM sync.edit WHERE campus = %(campus)s AND table_name = %(table)s LIMIT 1)"""
_EDITED = """\
SELECT record_id FROM sync.record WHERE table_name = %(table)s AND campus = %(campus)s
    AND record_id = ANY (%(ids)s)
UNION SELECT record_id FROM sync.edit WHERE table_name = %(table)s AND campus = %(campus)s
    AND record_id = ANY (%(ids)s)"""
_ALIVE = """\
SELECT record_id FROM sync.record WHERE table_name = %s AND campus = %s AND src_table = %s
ORDER BY record_id"""
_POLICIES = "SELECT policies FROM sync.store"
# As a row of the table prints them: equal values have equal texts at every store.
_CANONICAL = "SELECT to_jsonb(t) FROM json_populate_recordset(NULL::consult.{}, %s) AS t"


class SourceRows:
    """Joins rows of one campus and table with edited records, in the caller's transaction."""

    def __init__(self, conn: psycopg.Connection, table: Table, campus: str):
        self._conn, self._table, self._campus = conn, table, campus

    def edited(self, record_ids: pa.Array) -> np.ndarray | None:
        """Returns which of these records clients have edited; None for none."""
        place = {"campus": self._campus, "table": self._table.name}
        if self._conn.execute(_ANY, place, prepare=True).rowcount == 0:  # The usual case.
            return None
        ids = record_ids.to_pylist()
        rows = self._conn.execute(_EDITED, place | {"ids": ids}, prepare=True)
        if rows.rowcount == 0:
            return None
        known = {record_id for (record_id,) in rows}
        return np.fromiter((record_id in known for record_id in ids), np.bool_, len(ids))

    def join(
        self, rows: pa.RecordBatch, hlcs: list[int], values: list[list[Value]]
    ) -> list[int | None]:
        """Joins rows; returns for each 1 if it was news, 0 if the record had seen just it, -1 if
        a later one, None if it cannot be joined: it leaves columns out of which nothing is known
        any more, or the record's versions are not whole.

        All at once, so that the store's count of changes is locked at the end and not meanwhile.

        Args:
          rows: compacted changes. hlcs: their stamps. values: by column, as text for PostgreSQL.
        """
        rules = self._rules()
        said = self.said(rows, hlcs, values)
        plain = PlainRows(self._conn, rules, self._table, self._campus)
        verdicts = plain.look(said)
        found: list[int | None] = verdicts.tolist()
        others = np.flatnonzero(verdicts == NOT_PLAIN)
        if len(others):
            some = rows.take(pa.array(others))
            joined = join_each(
                self._conn, rules, self._table, self._campus, some, [said[i] for i in others]
            )
            for place, verdict in zip(others.tolist(), joined, strict=True):
                found[place] = verdict
        plain.write()
        return found

    def said(self, rows: pa.RecordBatch, hlcs: list[int], values: list[list[Value]]) -> list[Said]:
        names = ("record_id", "_lsn", "_seq", "_op", "_unchanged", "_src_table")
        return [
            Said(
                record_id,
                src_table,
                lsn,
                seq,
                source_count(self._campus, Position(lsn, seq)),
                hlc,
                op != Op.DELETE and not mask,
                dict(zip(self._table.by_name, row, strict=True)),
            )
            for record_id, lsn, seq, op, mask, src_table, hlc, row in zip(
                *(rows[name].to_pylist() for name in names),
                hlcs,
                zip(*values, strict=True),
                strict=True,
            )
        ]

    def sweep(self, src_table: str, lsn: int, hlc: int) -> int:
        """Tells edited records that the source has them no more; returns how many learned it."""
        rules = self._rules()
        policy = rules.tables[self._table.name]
        rows = self._conn.execute(_ALIVE, (self._table.name, self._campus, src_table)).fetchall()
        if not rows:
            return 0
        gone = record_of_source(self._campus, Position(lsn, 0), hlc, None, policy, rules)
        keys = [Key(self._table.name, self._campus, record_id) for (record_id,) in rows]
        step = lambda _, record: join_records(record, gone)  # noqa: E731
        return len(Records(self._conn, rules).update(keys, step).learned)

    def _rules(self) -> ConflictRules:
        """Returns the policies that the store is open with: those of whoever carries its edits."""
        found = self._conn.execute(_POLICIES).fetchone()
        if found is None or found[0] is None:
            return load_conflict_rules()
        return conflict_rules_of(found[0])


def join_each(
    conn: psycopg.Connection,
    rules: ConflictRules,
    table: Table,
    campus: str,
    rows: pa.RecordBatch,
    said: list[Said],
) -> list[int | None]:
    """Joins rows one by one; returns as `SourceRows.join`.

    Args:
      rows: as `said`, for what is not told there: operations and masks.
    """
    policy = rules.tables[table.name]
    query = _CANONICAL.format(table.name).encode()
    given = conn.execute(query, (json.dumps([one.row for one in said]),)).fetchall()
    masks, ops = rows["_unchanged"].to_pylist(), rows["_op"].to_pylist()
    facts = {}
    for one, op, mask, (row,) in zip(said, ops, masks, given, strict=True):
        content = None if op == Op.DELETE else {name: row[name] for name in table.by_name}
        facts[Key(table.name, campus, one.record_id)] = (one, content, mask)
    found: dict[Key, int | None] = {}

    def step(key: Key, record: Record) -> Record:
        one, content, mask = facts[key]
        seen = record.seen.get(SOURCE_MARK + campus, 0)
        whole = content
        if content is not None and mask:
            before = source_values(record, campus, policy)
            whole = before and content | {
                name: before[name] for bit, name in enumerate(table.by_name) if mask >> bit & 1
            }
        lost = whole is None and content is not None
        found[key] = None if one.count > seen and lost else (one.count > seen) - (one.count < seen)
        if one.count <= seen or lost:
            return record
        place = Position(one.lsn, one.seq)
        arriving = record_of_source(campus, place, one.hlc, whole, policy, rules)
        return join_records(record, arriving)

    sources = {key: one.src_table for key, (one, _, _) in facts.items()}
    Records(conn, rules).update(facts, step, sources)
    return [found.get(key) for key in facts]
