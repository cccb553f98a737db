"""Checks of sources that are not PostgreSQL: what would keep their logs from being followed."""

import collections.abc
import typing

from schemas.config import Source
from schemas.errors import CampusSyncError
from schemas.mappings import CampusMapping


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
    wrong, odd = log.preflight()
    for fatal, texts in ((True, wrong), (False, odd)):
        for text in texts:
            what, _, remedy = text.partition(": ")
            yield LogFinding(fatal, what, remedy or text)


def _check_topic(
    source: Source, name: str, mapping: CampusMapping | None
) -> collections.abc.Iterator[LogFinding]:
    from transforms.capture.debezium.hints import table_specs
    from transforms.capture.debezium.topic import check_topic, place_of

    if mapping is not None:
        table_specs(mapping, source.hints)
    for found in check_topic(*place_of(source.dsn), source.kafka):
        yield LogFinding(found.fatal, found.reason, found.remedy)
