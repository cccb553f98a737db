"""The SQL of a table's merge: derived from its declaration, the same for every store."""

import functools
from collections.abc import Sequence

import pyarrow as pa

from schemas.conflict_policy import EDITED_AT_STORES
from schemas.tables import ARROW_TYPES, POSTGRES_TYPES, Kind, Table
from transforms.deliver.edits.edit_schema import EDITED
from transforms.deliver.store_schema import DELIVERED_SYNC_COLUMNS, quoted

# What a driver's value of `MergeSql.base` is, before it is cast to the column's type.
FETCHED_TYPES = {
    **ARROW_TYPES,
    Kind.DATE: pa.int32(),
    Kind.TIME: pa.int64(),
}


@functools.cache
def stored_names(table: Table) -> tuple[str, ...]:
    """Returns the columns that a delivery writes, quoted, campus and record id first."""
    own = [quoted(column.name) for column in table.columns]
    sync = [name for name, _, _ in DELIVERED_SYNC_COLUMNS]
    return ("campus", "record_id", *own, *sync)


def _shape(table: Table) -> list[tuple[str, str]]:
    """Every column but the campus with its type, as an express row has them."""
    own = [(quoted(column.name), POSTGRES_TYPES[column.kind]) for column in table.columns]
    sync = [(name, kind.split()[0]) for name, kind, _ in DELIVERED_SYNC_COLUMNS]
    return [("record_id", "text"), *own, *sync]


def _fetched(table: Table) -> list[str]:
    """Select expressions that give every column in a form that Arrow takes, free of zones."""
    forms = {
        Kind.DECIMAL: "t.{0}::text",
        Kind.DATE: "t.{0} - date '1970-01-01'",
        Kind.TIME: "(extract(epoch FROM t.{0}) * 1000000)::bigint",
    }
    return [forms.get(c.kind, "t.{0}").format(quoted(c.name)) for c in table.columns]


class MergeSql:
    """One table's statements; `merge_sql` makes them once."""

    def __init__(self, table: Table):
        target, stage = f"consult.{table.name}", f"stage_{table.name}"
        names = ", ".join(stored_names(table))
        # Should a client edit a row after it was looked for, the guess was wrong.
        edited = table.name in EDITED_AT_STORES
        self._unedited = f" AND NOT {EDITED.format('t.')}" if edited else ""
        # In a store COPY is the fastest insert by far: pages are filled and logged whole.
        self.copy_target = f"COPY {target} ({names}) FROM STDIN (FORMAT binary)".encode()
        self.copy_stage = f"COPY {stage} ({names}, unchanged) FROM STDIN (FORMAT binary)".encode()
        self.create_stage = (
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {stage} (LIKE {target}, unchanged bigint)"
            " ON COMMIT DELETE ROWS"
        )
        self.clear_stage = f"TRUNCATE {stage}"
        plain = [f"{name} = s.{name}" for name in stored_names(table)[2:]]
        self.update = self._update(target, stage, plain)
        self.update_known = self._update(target, stage, self._known(table))
        shape = ", ".join(f"{name} {kind}" for name, kind in _shape(table))
        put = (
            f"INSERT INTO {target} AS t ({names}) SELECT %s, {', '.join(stored_names(table)[1:])}"
            f" FROM json_to_recordset(%s) AS s ({shape})"
        )
        self.put = self._upsert(put, stored_names(table)[2:])
        self.put_tombstone = self._upsert(
            put, [n for n in stored_names(table)[2 + len(table.columns) :] if n != "digest"]
        )
        # Found by the key's index, one by one, whatever the planner thinks: of a table without
        # statistics it thinks that few rows are the campus's, and compares each with every key.
        self.look = (
            "SELECT array_agg((k.place - 1)::int4), array_agg(t.src_lsn), array_agg(t.src_seq)"
            " FROM unnest(%s) WITH ORDINALITY AS k (record_id, place) CROSS JOIN LATERAL"
            f" (SELECT src_lsn, src_seq FROM {target} WHERE record_id = k.record_id"
            " AND campus = %s OFFSET 0) AS t"
        )
        self.base = (
            f"SELECT k.place - 1, t.src_lsn, t.src_seq, {', '.join(_fetched(table))}"
            f" FROM unnest(%s) WITH ORDINALITY AS k (record_id, place) JOIN {target} AS t"
            " ON t.record_id = k.record_id AND t.campus = %s"
            # A tombstone of the emergency lane may have overtaken changes of what it keeps.
            " WHERE NOT t.deleted OR (t.digest IS NOT NULL AND t.lane = 'R')"
            " ORDER BY t.record_id FOR UPDATE OF t"
        )
        self.sweep = (
            f"UPDATE {target} SET deleted = true, src_lsn = %(lsn)s, src_seq = 0,"
            " committed_at = to_timestamp(%(us)s / 1e6), hlc = %(hlc)s, lane = %(lane)s"
            " WHERE campus = %(campus)s AND src_table = %(src_table)s"
            " AND src_lsn < %(lsn)s AND NOT deleted" + self._unedited.replace("t.", "")
        )

    def _update(self, target: str, stage: str, assignments: list[str]) -> str:
        return (
            f"UPDATE {target} AS t SET {', '.join(assignments)} FROM {stage} AS s"
            " WHERE t.record_id = s.record_id AND t.campus = s.campus"
            " AND (t.src_lsn, t.src_seq) < (s.src_lsn, s.src_seq)" + self._unedited
        )

    def _upsert(self, put: str, names: Sequence[str]) -> str:
        return (
            f"{put} ON CONFLICT (record_id, campus) DO UPDATE"
            f" SET {', '.join(f'{name} = excluded.{name}' for name in names)}"
            f" WHERE (t.src_lsn, t.src_seq) < (excluded.src_lsn, excluded.src_seq){self._unedited}"
            " RETURNING t.record_id"
        )

    @staticmethod
    def _known(table: Table) -> list[str]:
        """Assigns known columns only: a kept value keeps its place out of line, too (trap 8)."""
        own = [
            f"{name} = CASE WHEN s.unchanged & {1 << bit} = 0 THEN s.{name} ELSE t.{name} END"
            for bit, name in enumerate(quoted(column.name) for column in table.columns)
        ]
        sync = [
            f"{name} = s.{name}" for name in stored_names(table)[2 + len(own) :] if name != "digest"
        ]
        digest = (
            "digest = CASE WHEN s.unchanged = 0 OR s.digest IS NOT NULL"
            " THEN s.digest ELSE t.digest END"
        )
        return [*own, *sync, digest]


@functools.cache
def merge_sql(table: Table) -> MergeSql:
    """Returns the statements of a table."""
    return MergeSql(table)
