"""Tell what of a link's source cannot be followed as it is, by an incident in its store."""

import logging
from collections.abc import Mapping

import psycopg

from schemas.reports import SCHEMA_DRIFT
from transforms.deliver import sla_store

_LOGGER = logging.getLogger(__name__)


def note(conn: psycopg.Connection, link: str, drift: Mapping[str, str]) -> None:
    """Makes the link's open incident say what `SourceLog.drift` found; closes it for nothing."""
    text = " | ".join(f"{table} {why}" for table, why in sorted(drift.items()))
    if sla_store.keep_incident(conn, link, SCHEMA_DRIFT, text):
        _LOGGER.error("link %s: held, the others flow: %s", link, text)
