"""Checks of a consult store: rights, encoding, the schema's version."""

import collections
import collections.abc

import psycopg
from psycopg import sql

from runners.preflight.findings import Findings
from runners.preflight.servers import (
    STATEMENT_MS,
    check_clock,
    check_encoding,
    connect,
    unreachable,
)
from transforms.deliver.store_schema import SCHEMA_VERSION


def check_store(name: str, dsn: str, wall_clock: collections.abc.Callable[[], float]) -> Findings:
    found = Findings(f"store {name}")
    try:
        with connect(dsn, options=f"-c statement_timeout={STATEMENT_MS}") as connection:
            check_clock(connection, found, wall_clock)
            check_encoding(connection, found)
            _check_store_rights(connection, found)
    except psycopg.Error as error:
        unreachable(dsn, error, found)
    return found


def _check_store_rights(connection: psycopg.Connection, found: Findings) -> None:
    row = connection.execute(
        "SELECT current_user, current_database(), pg_is_in_recovery(),"
        " has_database_privilege(current_database(), 'CREATE'),"
        " has_database_privilege(current_database(), 'TEMPORARY'),"
        " to_regclass('sync.schema_version') IS NOT NULL"
    ).fetchone()
    user, database, standby, may_create, may_stage, exists = row
    grant = sql.SQL("GRANT {} ON DATABASE {} TO {};")
    if standby:
        found.error("is a standby, read only", "name the primary server in campuses.yaml.")
    if not may_stage:
        statement = grant.format(
            sql.SQL("TEMPORARY"), sql.Identifier(database), sql.Identifier(user)
        )
        found.error(f"{user} may not make temporary tables", statement.as_string(connection))
    if not exists:
        if not may_create:
            statement = grant.format(
                sql.SQL("CREATE"), sql.Identifier(database), sql.Identifier(user)
            )
            found.error(f"{user} may not create the schema", statement.as_string(connection))
        return
    row = connection.execute("SELECT version FROM sync.schema_version").fetchone()
    version = row[0] if row else 0
    if version > SCHEMA_VERSION:
        found.error(
            f"its schema is version {version}, this software knows {SCHEMA_VERSION}",
            "install the newer campus-sync.",
        )
    elif version < SCHEMA_VERSION:
        found.note(
            f"its schema is version {version} and will be upgraded to {SCHEMA_VERSION}",
            "take a backup first: pg_dump --schema=sync --schema=consult",
        )
    denied = connection.execute(
        "SELECT c.oid::regclass::text FROM pg_class c"
        " WHERE c.relnamespace IN ('consult'::regnamespace, 'sync'::regnamespace)"
        " AND c.relkind = 'r' AND NOT has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE')"
        " ORDER BY 1"
    ).fetchall()
    if denied:
        schemas = sql.SQL(
            "GRANT USAGE ON SCHEMA consult, sync TO {user}; GRANT SELECT, INSERT, UPDATE, DELETE"
            " ON ALL TABLES IN SCHEMA consult, sync TO {user};"
        ).format(user=sql.Identifier(user))
        found.error(f"{user} may not write {denied[0][0]}", schemas.as_string(connection))
