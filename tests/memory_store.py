"""A consult store in memory: guarded by position, filling in what is unchanged; and its parents."""

from collections.abc import Iterable

import pyarrow as pa

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.mappings import CampusMapping
from schemas.tables import Kind
from transforms.harmonise.lookups import Child

_STORED = {Kind.TIME: pa.int64(), Kind.DATE: pa.int32()}


class MemoryStore:
    """What a store holds after batches, as `transforms.harmonise.lookups.Store` asks for it.

    Attributes:
      rows: by canonical table and record id: columns, `_at`, `_src_table`, `_deleted`.
      refused: updates whose unchanged values are nowhere.
    """

    def __init__(self, mapping: CampusMapping):
        self._mapping = mapping
        self.rows: dict[str, dict[str, dict]] = {}
        self.refused: list[tuple[str, str]] = []

    def apply(self, tables: dict[str, pa.RecordBatch]) -> None:
        for name, batch in tables.items():
            stored = self.rows.setdefault(name, {})
            for row in batch.to_pylist():
                self._put(name, stored, row)

    def _put(self, name: str, stored: dict[str, dict], row: dict) -> None:
        at = (row["_lsn"], row["_seq"])
        key = row["record_id"]
        known = stored.get(key)
        if known is not None and known["_at"] >= at:
            return
        meta = {"_at": at, "_src_table": row["_src_table"], "_deleted": row["_op"] == Op.DELETE}
        columns = TABLES[name].by_name
        if row["_op"] == Op.DELETE:
            # A tombstone keeps what the store has; it brings nothing.
            stored[key] = (known or dict.fromkeys(columns)) | meta
            return
        bits = row["_unchanged"]
        base = stored.get(row["_prev_id"]) if row["_prev_id"] else known
        if bits and base is None:
            self.refused.append((name, key))
            return
        content = {c: base[c] if bits >> i & 1 else row[c] for c, i in TABLES[name].index.items()}
        stored[key] = content | meta

    def live(self, name: str) -> dict[str, dict]:
        """Returns the rows that are not deleted: record id to its columns."""
        return {
            key: {c: v for c, v in row.items() if c[0] != "_"}
            for key, row in self.rows.get(name, {}).items()
            if not row["_deleted"]
        }

    # What lookups ask.

    def parents(self, table: str, columns, ids: Iterable[str]) -> dict[str, tuple]:
        canonical = self._mapping.tables[table].canonical
        rows = self.rows.get(canonical.name, {})
        here = [key for key in ids if key in rows and rows[key]["_src_table"] == table]
        kinds = [(column, canonical.by_name[column].kind) for column in columns]
        return {
            key: (*rows[key]["_at"], *(_stored(rows[key][c], kind) for c, kind in kinds))
            for key in here
        }

    def children(self, table: str, parent: str, ids: Iterable[str]) -> list[Child]:
        refs = {f"{parent} {key}" for key in ids}
        return [c for c in self._children(table, parent) if f"{parent} {c.parent_id}" in refs]

    def awaiting(self, table: str, parent: str) -> list[Child]:
        marked = self._children(table, parent)
        return [c for c in marked if (c.remarks or "").startswith("awaiting_parent")]

    def _children(self, table: str, parent: str) -> list[Child]:
        canonical = self._mapping.tables[table].canonical
        return [
            Child(key, row["parent_ref"][len(parent) + 1 :], row["remarks"], *row["_at"])
            for key, row in self.rows.get(canonical.name, {}).items()
            if row["_src_table"] == table and row["parent_ref"] and not row["_deleted"]
        ]


def _stored(value, kind: Kind):
    if value is None or kind not in _STORED:
        return value
    kinds = {Kind.TIME: pa.timestamp("us", tz="UTC"), Kind.DATE: pa.date32()}
    return pa.array([value], kinds[kind]).cast(_STORED[kind])[0].as_py()
