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
from transforms.conflicts.stored_rows import record_of_source, source_values
from transforms.deliver.edits.hold_records import Key, Records

_ANY = "SELECT FROM sync.record WHERE campus = %s AND table_name = %s LIMIT 1"
_EDITED = """\
SELECT record_id FROM sync.record WHERE table_name = %s AND campus = %s
    AND record_id = ANY (%s)"""
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
        place = (self._campus, self._table.name)
        if self._conn.execute(_ANY, place, prepare=True).rowcount == 0:  # The usual case.
            return None
        ids = record_ids.to_pylist()
        rows = self._conn.execute(_EDITED, (self._table.name, self._campus, ids), prepare=True)
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
        policy = rules.tables[self._table.name]
        given = self._canonical(values)
        facts = {}
        names = ("record_id", "_lsn", "_seq", "_op", "_unchanged", "_src_table")
        for place, (record_id, lsn, seq, op, mask, src_table) in enumerate(
            zip(*(rows[name].to_pylist() for name in names), strict=True)
        ):
            said = None if op == Op.DELETE else given[place]
            key = Key(self._table.name, self._campus, record_id)
            facts[key] = (Position(lsn, seq), hlcs[place], said, mask, src_table)
        found: dict[Key, int | None] = {}

        def step(key: Key, record: Record) -> Record:
            position, hlc, said, mask, _ = facts[key]
            seen = record.seen.get(SOURCE_MARK + self._campus, 0)
            if said is not None and mask:
                before = source_values(record, self._campus, policy)
                said = before and said | {
                    name: before[name]
                    for bit, name in enumerate(self._table.by_name)
                    if mask >> bit & 1
                }
            lost = said is None and facts[key][2] is not None
            arriving = record_of_source(self._campus, position, hlc, said, policy, rules)
            (count,) = arriving.seen.values()
            found[key] = (count > seen) - (count < seen)
            if count > seen and lost:
                found[key] = None
            return record if count <= seen or lost else join_records(record, arriving)

        sources = {key: fact[-1] for key, fact in facts.items()}
        Records(self._conn, rules).update(facts, step, sources)
        return [found.get(key) for key in facts]

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

    def _canonical(self, values: list[list[Value]]) -> list[dict[str, Value]]:
        given = [
            dict(zip(self._table.by_name, row, strict=True)) for row in zip(*values, strict=True)
        ]
        query = _CANONICAL.format(self._table.name).encode()
        rows = self._conn.execute(query, (json.dumps(given),)).fetchall()
        return [{name: row[name] for name in self._table.by_name} for (row,) in rows]

    def _rules(self) -> ConflictRules:
        """Returns the policies that the store is open with: those of whoever carries its edits."""
        found = self._conn.execute(_POLICIES).fetchone()
        if found is None or found[0] is None:
            return load_conflict_rules()
        return conflict_rules_of(found[0])
