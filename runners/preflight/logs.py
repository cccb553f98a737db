"""Checks of sources that are not PostgreSQL: what would keep their logs from being followed."""

import collections.abc
import typing

import psycopg

from runners.preflight.findings import Findings
from runners.preflight.servers import connect
from runners.preflight.tables import check_columns
from schemas.config import Source, redact
from schemas.errors import CampusSyncError
from schemas.mappings import CampusMapping

_READABLE = """\
SELECT table_schema || '.' || table_name, array_agg(column_name::text)
FROM information_schema.column_privileges
WHERE privilege_type = 'SELECT' GROUP BY 1"""


class LogFinding(typing.NamedTuple):
    """`fatal`: the link would not start, or would lose rows."""

    fatal: bool
    what: str
    remedy: str


def check_log(source: Source, name: str, mapping: CampusMapping | None) -> list[LogFinding]:
    """Returns what is wrong with a MariaDB source or a topic of Debezium events.

    Changes nothing. `name` is the campus.
    """
    check = {"mariadb": _check_mariadb, "debezium": _check_topic}[source.kind]
    try:
        return list(check(source, name, mapping))
    except CampusSyncError as error:
        what, _, remedy = str(error).partition(" Remedy: ")
        return [LogFinding(True, what, remedy or "check address, account and network.")]


def _check_mariadb(
    source: Source, name: str, mapping: CampusMapping | None
) -> collections.abc.Iterator[LogFinding]:
    from transforms.capture.mariadb.source import MariaDbSource

    keys = {table: part.id for table, part in mapping.tables.items()} if mapping else {}
    log = MariaDbSource(source.dsn, name, keys, None, batch_rows=1, batch_bytes=1)
    wrong, odd = log.preflight(log.columns())
    for fatal, texts in ((True, wrong), (False, odd)):
        for text in texts:
            what, _, remedy = text.partition(": ")
            yield LogFinding(fatal, what, remedy or text)


def check_mariadb_tables(
    source: Source, name: str, mapping: CampusMapping, found: Findings
) -> None:
    """Holds the tables of a MariaDB source that answers against its mapping."""
    from transforms.capture.mariadb.source import MariaDbSource

    keys = {table: part.id for table, part in mapping.tables.items()}
    log = MariaDbSource(source.dsn, name, keys, None, batch_rows=1, batch_bytes=1)
    try:
        there = log.columns()
    except CampusSyncError:
        return  # `check_log` has told.
    for table in mapping.tables.keys() - there.keys():
        found.held(
            f"table {table} does not exist, or this account may not SELECT from it",
            f"GRANT SELECT ON {table} to it, or take it out of {mapping.file}.",
        )
    check_columns(mapping, there, found)


def _check_topic(
    source: Source, name: str, mapping: CampusMapping | None
) -> collections.abc.Iterator[LogFinding]:
    from transforms.capture.debezium.hints import table_specs
    from transforms.capture.debezium.topic import check_topic, place_of

    if mapping is not None:
        table_specs(mapping, source.hints)
    for found in check_topic(*place_of(source.dsn), source.kafka):
        yield LogFinding(found.fatal, found.reason, found.remedy)
    if source.content is not None and mapping is not None:
        yield from _check_content(source.content, mapping)


def _check_content(dsn: str, mapping: CampusMapping) -> collections.abc.Iterator[LogFinding]:
    """Only `compare` reads it: nothing that is wrong with it keeps a link from running."""
    try:
        with connect(dsn) as connection:
            columns = dict(connection.execute(_READABLE).fetchall())
    except psycopg.Error as error:
        what = f"its content at {redact(dsn)} cannot be read ({type(error).__name__})"
        yield LogFinding(False, what, "correct `content`, or remove it: `compare` alone needs it.")
        return
    for table, part in mapping.tables.items():
        if lacking := sorted(set(part.needed) - set(columns.get(table, ()))):
            what = f"its content: {table} lacks {', '.join(lacking)}, or they may not be read"
            yield LogFinding(False, what, "GRANT SELECT, or correct `content`.")
