"""What `check` says beside preflight: rule files, and log that may be gone before it is read."""

import time

from pipelines.sla_report import Observer
from runners.preflight import Finding, Severity
from runners.upkeep import Rules
from runners.words import log_warnings
from schemas.clocks import wall_clock_us
from schemas.config import Config
from schemas.errors import ConfigError

_BETWEEN_LOOKS_S = 1.0
_REMEDY = (
    "start `campus-sync run` so that the link reads on; let the source keep more log: "
    "max_slot_wal_keep_size and idle_replication_slot_timeout of PostgreSQL, "
    "binlog_expire_logs_seconds and max_binlog_total_size of MariaDB, retention.ms and "
    "retention.bytes of the topic."
)


def more_findings(config: Config) -> list[Finding]:
    """Returns mistakes in rule files, and links that lose their log soon; changes nothing."""
    found = []
    try:
        Rules.load(config)
    except ConfigError as error:
        found.append(Finding(Severity.ERROR, "rules", str(error), "correct the file."))
    return [*found, *log_findings(config)]


def log_findings(config: Config, between_s: float = _BETWEEN_LOOKS_S) -> list[Finding]:
    """Returns links whose source may soon remove log that they need; two looks tell its rate.

    Not even the last minute forbids a start: only running mends it.
    """
    with Observer(config) as observer:
        view = observer.view(wall_clock_us())
        if any(link.ledgers for link in view.links):
            time.sleep(between_s)
            view = observer.view(wall_clock_us())
    return [
        Finding(Severity.WARNING, "log", text, _REMEDY)
        for text, _ in log_warnings([link.health for link in view.links])
    ]
