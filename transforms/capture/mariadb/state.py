"""What a source says of its log and of our rights: for resuming, preflight and the guard."""

import contextlib
import dataclasses
from collections.abc import Collection

import pymysql

from transforms.capture.mariadb.dsn import Server, parse_dsn
from transforms.capture.mariadb.places import (
    FIRST_OFFSET,
    border,
    file_number,
    last_before_transaction,
    place_of,
)
from transforms.capture.mariadb.session import clock_us, is_mariadb, session, variables
from transforms.capture.retention import Retention

_DAY_S = 86_400
_SETTINGS = (
    "log_bin",
    "binlog_format",
    "binlog_row_image",
    "binlog_row_metadata",
    "binlog_row_value_options",
    "binlog_transaction_compression",
    "binlog_expire_logs_seconds",
    "binlog_expire_logs_auto_purge",
    "expire_logs_days",
    "max_binlog_total_size",
    "gtid_mode",
    "gtid_domain_id",
    "lower_case_table_names",
    "server_id",
    "server_uid",
    "server_uuid",
    "version",
)


@dataclasses.dataclass(frozen=True)
class LogFile:
    """A binlog file as the server lists it: its number and size in bytes."""

    number: int
    size: int


@dataclasses.dataclass(frozen=True)
class LogState:
    """A source's log, settings and our rights, as they are now.

    Attributes:
      logging: False leaves the rest of the log empty.
      base: name of the log files before the dot.
      files: oldest first.
      log_end_lsn: greatest lsn that is applied when the whole log is.
      oldest_lsn: border at the beginning of what is kept.
      do_databases, ignore_databases: the server's filters of what it logs.
      settings: global variables by name, those that the server has.
      grants: rights as the server tells them, upper case.
      identity: equal as long as it is the same server that writes the same log.
      now_us: the source's clock.
    """

    server: Server
    mariadb: bool
    logging: bool
    base: str
    files: tuple[LogFile, ...]
    log_end_lsn: int
    oldest_lsn: int
    do_databases: frozenset[str]
    ignore_databases: frozenset[str]
    settings: dict[str, str]
    grants: tuple[str, ...]
    identity: str
    now_us: int

    def keeps(self, lsn: int) -> bool:
        """Whether the log from `lsn` on is still there, or not yet written."""
        return lsn >= self.oldest_lsn

    def logs(self, database: str) -> bool:
        """Whether changes in this database are logged at all."""
        if self.do_databases:
            return database in self.do_databases
        return database not in self.ignore_databases

    @property
    def fold(self) -> bool:
        """Whether table names ignore case."""
        return self.settings.get("lower_case_table_names", "0") != "0"

    def growth(self, before: "LogState") -> float:
        """Returns the bytes a second that the log grew by since an earlier look."""
        place = place_of(before.log_end_lsn)
        sizes = {file.number: file.size for file in self.files if file.number >= place.file}
        grown = sum(sizes.values()) - (place.offset if place.file in sizes else 0)
        elapsed_s = (self.now_us - before.now_us) / 1e6
        return max(0, grown) / elapsed_s if elapsed_s > 0 else 0.0

    def retention(self, lsn: int, commit_us: int, bytes_per_s: float) -> Retention:
        """Returns what `retention.seconds_left` needs for a link that stands at `lsn`.

        `commit_us` is the newest commit that it has applied.
        """
        place = place_of(lsn)
        needed = sum(file.size for file in self.files if file.number >= place.file)
        behind = place != place_of(self.log_end_lsn)
        return Retention(
            expire_s=_expire_s(self.settings),
            behind_s=max(0.0, (self.now_us - commit_us) / 1e6) if behind else 0.0,
            size_max=int(self.settings.get("max_binlog_total_size", 0)) or None,
            needed_bytes=needed,
            bytes_per_s=bytes_per_s,
        )


def state(dsn: str) -> LogState:
    """Returns the source as it is now.

    Raises:
      SourceUnavailable: no connection.
      RightsMissing: this account may not see the log's state.
    """
    server = parse_dsn(dsn)
    with session(server) as cursor:
        settings = variables(cursor, _SETTINGS)
        end, do, ignore = _log_end(cursor)
        files: tuple[LogFile, ...] = ()
        if end is not None:
            cursor.execute("SHOW BINARY LOGS")
            files = tuple(LogFile(file_number(row[0]), int(row[1])) for row in cursor.fetchall())
        cursor.execute("SHOW GRANTS")
        grants = tuple(str(row[0]).upper() for row in cursor.fetchall())
        base = end[0].rpartition(".")[0] if end else ""
        return LogState(
            server=server,
            mariadb=is_mariadb(cursor),
            logging=end is not None,
            base=base,
            files=files,
            log_end_lsn=_end_lsn(*end) if end else 0,
            oldest_lsn=border(files[0].number, FIRST_OFFSET) if files else 0,
            do_databases=do,
            ignore_databases=ignore,
            settings=settings,
            grants=grants,
            identity=_identity(settings, base),
            now_us=clock_us(cursor),
        )


def _log_end(
    cursor: pymysql.cursors.Cursor,
) -> tuple[tuple[str, int] | None, frozenset[str], frozenset[str]]:
    """Returns file and offset of the log's end, if there is one, and the filters."""
    for command in ("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS"):  # The second since MySQL 8.4.
        with contextlib.suppress(pymysql.err.ProgrammingError):
            cursor.execute(command)
            row = cursor.fetchone()
            if row is None:
                return None, frozenset(), frozenset()
            filters = [frozenset(filter(None, str(text or "").split(","))) for text in row[2:4]]
            return (str(row[0]), int(row[1])), filters[0], filters[1]
    return None, frozenset(), frozenset()


def _end_lsn(file: str, offset: int) -> int:
    return last_before_transaction(border(file_number(file), offset))


def _identity(settings: dict[str, str], base: str) -> str:
    unique = settings.get("server_uuid") or settings.get("server_uid", "")
    parts = (unique, settings.get("server_id", ""), settings.get("gtid_domain_id", ""), base)
    return "/".join(parts)


def _expire_s(settings: dict[str, str]) -> float | None:
    if settings.get("binlog_expire_logs_auto_purge", "ON").upper() in ("OFF", "0"):
        return None
    seconds = float(settings.get("binlog_expire_logs_seconds", 0) or 0)
    days = float(settings.get("expire_logs_days", 0) or 0)
    return seconds or days * _DAY_S or None


def tables_of(dsn: str, tables: Collection[str], fold: bool) -> dict[str, str]:
    """Returns which of the tables (`database.table`) exist, with their storage engine.

    Raises:
      SourceUnavailable: no connection.
    """
    databases = sorted({name.partition(".")[0] for name in tables})
    if not databases:
        return {}
    marks = ", ".join(["%s"] * len(databases))
    with session(dsn) as cursor:
        cursor.execute(
            "SELECT TABLE_SCHEMA, TABLE_NAME, ENGINE FROM information_schema.TABLES"
            f" WHERE TABLE_TYPE = 'BASE TABLE' AND TABLE_SCHEMA IN ({marks})",
            databases,
        )
        rows = cursor.fetchall()
    found = {f"{schema}.{name}": str(engine or "") for schema, name, engine in rows}
    if fold:
        found = {name.casefold(): engine for name, engine in found.items()}
        return {name: found[name.casefold()] for name in tables if name.casefold() in found}
    return {name: found[name] for name in tables if name in found}


def columns_of(dsn: str, tables: Collection[str], fold: bool) -> dict[str, dict[str, str]]:
    """Returns the columns, to their types, of those tables (`database.table`) that exist.

    Raises:
      SourceUnavailable: no connection.
    """
    found: dict[str, dict[str, str]] = {}
    with session(dsn) as cursor:
        for name in tables:
            # One at a time: the server then opens these tables and no others.
            cursor.execute(
                "SELECT TABLE_NAME, COLUMN_NAME, COLUMN_TYPE FROM information_schema.COLUMNS"
                " WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s ORDER BY ORDINAL_POSITION",
                name.split(".", 1),
            )
            rows = cursor.fetchall()
            if rows and (fold or str(rows[0][0]) == name.partition(".")[2]):
                found[name] = {str(column): str(kind) for _, column, kind in rows}
    return found


def rows_estimated(dsn: str, tables: Collection[str]) -> int:
    """Returns about how many rows the tables (`database.table`) have, as their engine says.

    Raises:
      SourceUnavailable: no connection.
    """
    found = 0
    with session(dsn) as cursor:
        for table in tables:
            cursor.execute(
                "SELECT coalesce(sum(TABLE_ROWS), 0) FROM information_schema.TABLES"
                " WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s",
                table.split(".", 1),
            )
            found += int(cursor.fetchone()[0])
    return found
