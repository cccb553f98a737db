"""Where the log of a source that is not PostgreSQL ends, and what its clock says."""

import typing

from schemas.clocks import wall_clock_us
from schemas.config import Source


class LogEnd(typing.NamedTuple):
    """Attributes:
    lsn: everything committed now lies before it. clock_us: the source's clock.
    units_per_byte: of the distance between two lsns; 0 where it is no length.
    """

    lsn: int
    clock_us: int
    units_per_byte: int


def log_end(source: Source) -> LogEnd:
    """Returns the end of a MariaDB source's log or of a topic.

    Raises:
      CampusSyncError: it cannot be reached.
    """
    if source.kind == "mariadb":
        from transforms.capture.mariadb.places import UNITS_PER_BYTE, border_at
        from transforms.capture.mariadb.state import state

        found = state(source.dsn)
        return LogEnd(border_at(found.log_end_lsn), found.now_us, UNITS_PER_BYTE)
    from transforms.capture.debezium.topic import place_of, topic_state

    topic = topic_state(*place_of(source.dsn), source.kafka)
    return LogEnd(topic.newest.lsn, wall_clock_us(), 0)
