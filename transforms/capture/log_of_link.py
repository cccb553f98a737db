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
) -> SourceLog:
    """Returns the log of a link's source; its places are of the generation that is asked for."""
    log = _own_log(settings, mapping, now_us, monotonic)
    if not settings.generation:
        return log
    return LaterLog(log, settings.generation)


def _own_log(
    settings: LinkSettings,
    mapping: CampusMapping,
    now_us: Callable[[], int],
    monotonic: Callable[[], float],
) -> SourceLog:
    """Returns a source by its kind; libraries are loaded as needed."""
    match settings.source_kind:
        case "postgresql":
            from transforms.capture.postgresql_log import PostgresqlLog

            return PostgresqlLog(settings, mapping, monotonic)
        case "mariadb":
            from transforms.capture.mariadb_log import MariadbLog

            return MariadbLog(settings, mapping, now_us, monotonic)
        case "debezium":
            from transforms.capture.debezium_log import DebeziumLog

            return DebeziumLog(settings, mapping, now_us, monotonic)
    raise ValueError(f"source kind {settings.source_kind}")
