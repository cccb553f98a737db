"""Checks of a PostgreSQL source's tables: published, whole, with an identity."""

import dataclasses

import psycopg
from psycopg import sql

from runners.preflight.findings import Findings
from schemas.mappings import CampusMapping

_TABLES_SQL = """
SELECT n.nspname || '.' || c.relname, c.oid::regclass::text, c.relpersistence, c.relreplident,
    has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE'),
    ARRAY(SELECT a.attname::text FROM pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
    ARRAY(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a
            ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)
          WHERE i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident
            ELSE i.indisprimary END),
    c.reltoastrelid <> 0 AND pg_relation_size(c.reltoastrelid) > 0
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname || '.' || c.relname = ANY(%s)
"""

_TYPES_SQL = """
SELECT n.nspname || '.' || c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attrelid = ANY (%s::regclass[]) AND a.attnum > 0 AND NOT a.attisdropped
"""


@dataclasses.dataclass(frozen=True)
class _SourceTable:
    name: str
    quoted: str
    persistence: str
    identity: str
    readable: bool
    columns: list[str]
    key: list[str]
    toasted: bool


def check_tables(
    connection: psycopg.Connection, publication: str, mapping: CampusMapping, found: Findings
) -> None:
    rows = connection.execute(_TABLES_SQL, (list(mapping.tables),)).fetchall()
    tables = {row[0]: _SourceTable(*row) for row in rows}
    published = _published(connection, publication, tables, mapping, found)
    user = sql.Identifier(connection.info.user).as_string(connection)
    for name, rule in mapping.tables.items():
        table = tables.get(name)
        if table is None:
            found.held(
                f"table {name} is mapped and does not exist", f"take it out of {mapping.file}."
            )
            continue
        _check_table(table, rule.id, user, found)
    types = _types(connection, tables)
    real = {
        name: {column: types.get((name, column), "") for column in columns}
        for name, columns in published.items()
        if name in tables or name not in mapping.tables
    }
    # What is missing is told above, with the statement.
    check_columns(mapping, real, found)
    toasted = sorted(t.name for t in tables.values() if t.toasted and t.identity == "d")
    if toasted:
        statements = " ".join(
            f"ALTER TABLE {tables[name].quoted} REPLICA IDENTITY FULL;" for name in toasted
        )
        found.warning(
            f"long values of {', '.join(toasted)} are not sent when unchanged: such changes have no"
            " emergency copy, and after a refused change an older text stays until compare tells",
            f"{statements}  -- costs log volume",
        )


def check_columns(mapping: CampusMapping, real: dict[str, dict[str, str]], found: Findings) -> None:
    """Holds the columns of tables, to their types, against a mapping; absent tables not."""
    for item in mapping.compare_columns(real):
        if item.reason == "missing_table":
            continue
        column = f".{item.column}" if item.column else ""
        tell = found.warning
        if item.fatal:
            tell = found.held if item.reason == "missing_column" else found.error
        tell(f"{item.table}{column}: {item.reason.replace('_', ' ')}", f"{item.remedy}.")


def _types(
    connection: psycopg.Connection, tables: dict[str, _SourceTable]
) -> dict[tuple[str, str], str]:
    rows = connection.execute(_TYPES_SQL, ([table.quoted for table in tables.values()],))
    return {(name, column): kind for name, column, kind in rows}


def _check_table(table: _SourceTable, ids: tuple[str, ...], user: str, found: Findings) -> None:
    if table.persistence != "p":
        found.error(
            f"{table.name} is not in the log (unlogged)", f"ALTER TABLE {table.quoted} SET LOGGED;"
        )
    if not table.readable:
        schema = table.quoted.partition(".")[0]
        found.error(
            f"{table.name} may not be read by this user",
            f"GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT ON {table.quoted} TO {user};",
        )
    if table.identity == "n" or (table.identity == "d" and not table.key):
        found.held(
            f"{table.name} has no primary key: its updates and deletes fail once published",
            f"ALTER TABLE {table.quoted} ADD PRIMARY KEY ({', '.join(ids)});  -- or, slower:"
            f" ALTER TABLE {table.quoted} REPLICA IDENTITY FULL;",
        )
    elif table.identity != "f" and {*ids} & {*table.columns} - {*table.key}:
        found.held(
            f"{table.name}: a delete carries only ({', '.join(table.key)}), the mapping's id is"
            f" ({', '.join(ids)})",
            f"ALTER TABLE {table.quoted} REPLICA IDENTITY FULL;  -- or map id: to the key",
        )


def _published(
    connection: psycopg.Connection,
    publication: str,
    tables: dict[str, _SourceTable],
    mapping: CampusMapping,
    found: Findings,
) -> dict[str, list[str]]:
    """Returns the published tables with their published columns."""
    name = sql.Identifier(publication).as_string(connection)
    row = connection.execute(
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication"
        " WHERE pubname = %s",
        (publication,),
    ).fetchone()
    if row is None:
        every = ", ".join(tables[table].quoted for table in mapping.tables if table in tables)
        found.error(
            f"no publication {publication}", f"CREATE PUBLICATION {name} FOR TABLE {every};"
        )
        return {}
    if not all(row):
        found.error(
            f"publication {publication} leaves out some kinds of change",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');",
        )
    recent = connection.info.server_version >= 150000
    columns = "p.attnames::text[], p.rowfilter" if recent else "NULL::text[], NULL::text"
    rows = connection.execute(
        f"SELECT p.schemaname || '.' || p.tablename, {columns} FROM pg_publication_tables p"
        " WHERE p.pubname = %s",
        (publication,),
    ).fetchall()
    published = {}
    for table, attributes, row_filter in rows:
        published[table] = attributes or (tables[table].columns if table in tables else [])
        if row_filter:
            found.error(
                f"publication {publication} filters the rows of {table}",
                f"ALTER PUBLICATION {name} DROP TABLE {table};"
                f" ALTER PUBLICATION {name} ADD TABLE {table};",
            )
    for table in mapping.tables:
        if table in tables and table not in published:
            found.error(
                f"{table} is mapped and not in publication {publication}",
                f"ALTER PUBLICATION {name} ADD TABLE {tables[table].quoted};",
            )
    return published
