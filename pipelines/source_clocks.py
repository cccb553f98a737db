"""Where the log of a source ends, of whatever kind it is, and what its clock says."""

import typing

import psycopg

from schemas.clocks import wall_clock_us
from schemas.config import Source
from schemas.errors import SourceUnavailable
from schemas.positions import lsn_in
from transforms import postgresql_sessions

_POSTGRESQL = """\
SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint,
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"""


class LogEnd(typing.NamedTuple):
    """Attributes:
    lsn: everything committed now lies before it. clock_us: the source's clock.
    units_per_byte: of the distance between two lsns; 0 where it is no length.
    """

    lsn: int
    clock_us: int
    units_per_byte: int


def log_end(source: Source) -> LogEnd:
    """Returns the end of a database's log or of a topic, as a place of its generation.

    Raises:
      CampusSyncError: it cannot be reached.
    """
    end = _own_end(source)
    return end._replace(lsn=lsn_in(source.generation, end.lsn))


def _own_end(source: Source) -> LogEnd:
    if source.kind == "postgresql":
        try:
            with postgresql_sessions.connect(source.dsn) as connection:
                return LogEnd(*connection.execute(_POSTGRESQL).fetchone(), 1)
        except psycopg.Error as error:
            raise SourceUnavailable(f"the source: {type(error).__name__}.") from error
    if source.kind == "mariadb":
        from transforms.capture.mariadb.places import UNITS_PER_BYTE, border_at
        from transforms.capture.mariadb.state import state

        found = state(source.dsn)
        return LogEnd(border_at(found.log_end_lsn), found.now_us, UNITS_PER_BYTE)
    from transforms.capture.debezium.topic import place_of, topic_state

    topic = topic_state(*place_of(source.dsn), source.kafka)
    return LogEnd(topic.newest.lsn, wall_clock_us(), 0)
