"""Checks of sources that are not PostgreSQL: what would keep their logs from being followed."""

import collections.abc
import json
import typing

from schemas.errors import CampusSyncError
from schemas.mappings import CampusMapping


class LogFinding(typing.NamedTuple):
    """`fatal`: the link would not start, or would lose rows."""

    fatal: bool
    what: str
    remedy: str


def check_log(
    kind: str, dsn: str, options: str, name: str, mapping: CampusMapping | None
) -> list[LogFinding]:
    """Returns what is wrong with a MariaDB source or a topic of Debezium events.

    Changes nothing. `options` is `Source.options`, `name` the campus.
    """
    check = {"mariadb": _check_mariadb, "debezium": _check_topic}[kind]
    try:
        return list(check(dsn, options, name, mapping))
    except CampusSyncError as error:
        what, _, remedy = str(error).partition(" Remedy: ")
        return [LogFinding(True, what, remedy or "check address, account and network.")]


def _check_mariadb(
    dsn: str, options: str, name: str, mapping: CampusMapping | None
) -> collections.abc.Iterator[LogFinding]:
    from transforms.capture.mariadb.source import MariaDbSource

    keys = {table: part.id for table, part in mapping.tables.items()} if mapping else {}
    source = MariaDbSource(dsn, name, keys, None, batch_rows=1, batch_bytes=1)
    wrong, odd = source.preflight()
    for fatal, texts in ((True, wrong), (False, odd)):
        for text in texts:
            what, _, remedy = text.partition(": ")
            yield LogFinding(fatal, what, remedy or text)


def _check_topic(
    dsn: str, options: str, name: str, mapping: CampusMapping | None
) -> collections.abc.Iterator[LogFinding]:
    from transforms.capture.debezium.hints import table_specs
    from transforms.capture.debezium.topic import check_topic, place_of

    given = json.loads(options or "{}")
    if mapping is not None:
        table_specs(mapping, given.get("hints"))
    for found in check_topic(*place_of(dsn), given.get("kafka")):
        yield LogFinding(found.fatal, found.reason, found.remedy)
