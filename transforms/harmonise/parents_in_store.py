"""Ask a consult store for parents and for the rows that refer to them."""

import collections
from collections.abc import Callable, Sequence

import psycopg
from psycopg import sql

from schemas.mappings import CampusMapping
from schemas.tables import Kind
from transforms.deliver import ledger
from transforms.harmonise.lookups import Child, Entry
from transforms.harmonise.reissue import AWAITING

# As `transforms.harmonise.reissue.STORED` keeps them.
_FORMS = {
    Kind.TIME: "(extract(epoch FROM {0}) * 1000000)::bigint",
    Kind.DATE: "{0} - date '1970-01-01'",
    Kind.DECIMAL: "{0}::text",
}
# By these an index may serve; see docs/adr/0014-late-parents.md.
_LIVE_CHILDREN = sql.SQL(
    "SELECT record_id, parent_ref, remarks, src_lsn, src_seq FROM {table}"
    " WHERE campus = %(campus)s AND src_table = %(src_table)s AND NOT deleted"
)


class StoreConnection:
    """A connection to a store, in autocommit, opened when it is asked for and it is not open."""

    def __init__(self, dsn: str):
        self._dsn = dsn
        self._open: psycopg.Connection | None = None

    def __call__(self) -> psycopg.Connection:
        """Returns it.

        Raises:
          psycopg.Error: the store cannot be reached.
        """
        if self._open is None or self._open.closed:
            self._open = ledger.connect(self._dsn)
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


class StoreParents:
    """A `transforms.harmonise.lookups.Store` on the consult store of a link.

    Args:
      connection: returns a connection in autocommit, open as long as it is of use; asked for at
        every question, so that the caller may replace it.
      campus: whose rows. mapping: tells which canonical table a source table feeds.

    Every method raises psycopg.Error as the server or the connection says.
    """

    def __init__(
        self, connection: Callable[[], psycopg.Connection], campus: str, mapping: CampusMapping
    ):
        self._connection, self._campus, self._mapping = connection, campus, mapping

    def parents(self, table: str, columns: Sequence[str], ids: Sequence[str]) -> dict[str, Entry]:
        canonical = self._mapping.tables[table].canonical
        forms = [
            sql.SQL(_FORMS.get(canonical.by_name[name].kind, "{0}")).format(sql.Identifier(name))
            for name in columns
        ]
        query = sql.SQL(
            "SELECT record_id, src_lsn, src_seq, {forms} FROM {table}"
            " WHERE record_id = ANY(%(ids)s) AND campus = %(campus)s AND src_table = %(src_table)s"
        ).format(forms=sql.SQL(", ").join(forms), table=sql.Identifier("consult", canonical.name))
        rows = self._rows(query, table, ids=list(ids))
        return {key: tuple(values) for key, *values in rows}

    def children(self, table: str, parent: str, ids: Sequence[str]) -> list[Child]:
        refs = [f"{parent} {key}" for key in ids]
        query = self._children_of(table) + sql.SQL(" AND parent_ref = ANY(%(refs)s)")
        return self._read(query, table, parent, refs=refs)

    def awaiting(self, table: str, parent: str) -> list[Child]:
        query = self._children_of(table) + sql.SQL(f" AND remarks ^@ '{AWAITING}'")
        return self._read(query, table, parent)

    def _children_of(self, table: str) -> sql.Composed:
        name = self._mapping.tables[table].canonical.name
        return _LIVE_CHILDREN.format(table=sql.Identifier("consult", name))

    def _read(self, query: sql.Composed, table: str, parent: str, **more) -> list[Child]:
        head = len(parent) + 1
        return [
            Child(key, ref[head:], remarks, lsn, seq)
            for key, ref, remarks, lsn, seq in self._rows(query, table, **more)
            if ref is not None
        ]

    def _rows(self, query: sql.Composed, table: str, **more) -> collections.abc.Iterable[tuple]:
        arguments = {"campus": self._campus, "src_table": table, **more}
        return self._connection().execute(query, arguments).fetchall()
