"""Find the log that a link reads: by the kind of its source, and of the generation wanted."""

from collections.abc import Callable

from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from transforms.capture.generations import LaterLog
from transforms.capture.source_log import SourceLog


def log_of(
    settings: LinkSettings,
    mapping: CampusMapping,
    now_us: Callable[[], int],
    monotonic: Callable[[], float],
    waiting: Callable[[str], None] = lambda _: None,
) -> SourceLog:
    """Returns the log of a link's source, its places of the generation that is asked for.

    `waiting` is called each second while the source makes a snapshot's beginning wait, with
    words for what; it may raise to give up.

    Libraries are loaded as the kind needs them.
    """
    log: SourceLog
    match settings.source_kind:
        case "postgresql":
            from transforms.capture.postgresql_log import PostgresqlLog

            log = PostgresqlLog(settings, mapping, monotonic, waiting)
        case "mariadb":
            from transforms.capture.mariadb_log import MariadbLog

            log = MariadbLog(settings, mapping, now_us, monotonic)
        case "debezium":
            from transforms.capture.debezium_log import DebeziumLog

            log = DebeziumLog(settings, mapping, now_us, monotonic)
        case kind:
            raise ValueError(f"source kind {kind}")
    return LaterLog(log, settings.generation) if settings.generation else log
