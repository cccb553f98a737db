"""Checks of what two-phase commit needs: prepared transactions, XA, durability, rights."""

import psycopg
import pymysql

from runners.preflight.findings import Findings
from runners.preflight.servers import STATEMENT_MS, connect, unreachable
from schemas.config import OFF, Config
from schemas.entities import TABLES
from transforms.capture.mariadb.dsn import parse_dsn
from transforms.capture.mariadb.session import opened
from transforms.two_phase.mariadb_branch import mariadb_ddl

_XA_SINCE = (10, 5)  # From here on a prepared branch outlives its session.
_TIMEOUT_S = 2
_OLD_S = 3600.0
_POSTGRESQL = """\
SELECT current_setting('max_prepared_transactions')::int, current_setting('fsync')::bool,
    current_setting('full_page_writes')::bool, pg_is_in_recovery(),
    (SELECT count(*) FROM pg_prepared_xacts),
    (SELECT count(*) FROM pg_prepared_xacts WHERE prepared < now() - make_interval(secs => %s))"""
_MARIADB = """\
SELECT @@version, @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog, @@read_only"""
_TABLES = "SELECT table_name, engine FROM information_schema.tables WHERE table_schema = DATABASE()"


def check_two_phase(config: Config) -> list[Findings]:
    """Returns a list of findings for each branch; none where two-phase commit is off."""
    if config.two_phase.mode == OFF:
        return []
    stores = [_check_postgresql(name, store.dsn) for name, store in config.stores.items()]
    return stores + [_check_mariadb(name, dsn) for name, dsn in config.two_phase.branches.items()]


def _check_postgresql(name: str, dsn: str) -> Findings:
    found = Findings(f"two-phase branch {name}")
    try:
        with connect(dsn, options=f"-c statement_timeout={STATEMENT_MS}") as connection:
            row = connection.execute(_POSTGRESQL, (_OLD_S,)).fetchone()
    except psycopg.Error as error:
        unreachable(dsn, error, found)
        return found
    most, fsync, pages, standby, prepared, old = row
    if standby:
        found.error("is a standby: it prepares nothing", "name the primary server.")
    if most == 0:
        found.error(
            "max_prepared_transactions is 0: it cannot prepare",
            "ALTER SYSTEM SET max_prepared_transactions = 64; then restart the server.",
        )
    elif prepared >= most // 2:
        found.warning(
            f"{prepared} of max_prepared_transactions = {most} are in use",
            "campus-sync in-doubt list; SELECT gid, prepared, owner FROM pg_prepared_xacts;",
        )
    if not fsync or not pages:
        found.error(
            "fsync or full_page_writes is off: a power cut loses what it promised",
            "ALTER SYSTEM SET fsync = on; ALTER SYSTEM SET full_page_writes = on;"
            " SELECT pg_reload_conf();",
        )
    if old:
        found.warning(
            f"{old} transactions have been prepared for more than an hour: they hold locks and"
            " stop vacuum",
            "campus-sync in-doubt recover for ours; ask the owner of others.",
        )
    return found


def _check_mariadb(name: str, dsn: str) -> Findings:
    found = Findings(f"two-phase branch {name}")
    server = parse_dsn(dsn)
    try:
        connection = opened(server, connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S)
        with connection, connection.cursor() as cursor:
            cursor.execute(_MARIADB)
            _check_settings(*cursor.fetchone(), found)
            cursor.execute("XA RECOVER")
            cursor.execute(_TABLES)
            _check_tables(dict(cursor.fetchall()), found)
            _check_rights(cursor, found)
    except (pymysql.Error, OSError) as error:
        code = error.args[0] if error.args else ""
        found.error(
            f"{server.place} cannot be used: {type(error).__name__} ({code})",
            f"mariadb -h {server.host} -P {server.port} -u {server.user} {server.database}"
            " -e 'XA RECOVER' from this host; then check the server, the account and the network.",
        )
    return found


def _check_settings(version, flush, log_bin, sync, read_only, found: Findings) -> None:
    numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    if "mariadb" not in version.lower() or numbers < _XA_SINCE:
        found.error(
            f"is {version}: a prepared branch would not outlive its session",
            "upgrade to MariaDB 10.5 or newer.",
        )
    if flush != 1 or (log_bin and sync != 1):
        found.error(
            "innodb_flush_log_at_trx_commit or sync_binlog is not 1: a power cut loses what it"
            " promised",
            "SET GLOBAL innodb_flush_log_at_trx_commit = 1, GLOBAL sync_binlog = 1; and write both"
            " into its configuration file.",
        )
    if read_only:
        found.error("is read only", "name the server that is written to.")


def _check_tables(engines: dict[str, str], found: Findings) -> None:
    lacking = [table for table in TABLES if table not in engines]
    if lacking:
        found.error(
            f"lacks the canonical table {lacking[0]}", f"{mariadb_ddl(TABLES[lacking[0]])};"
        )
    for table in TABLES:
        if engines.get(table, "InnoDB") != "InnoDB":
            found.error(
                f"table {table} is {engines[table]}, which knows no transactions",
                f"ALTER TABLE `{table}` ENGINE = InnoDB;",
            )


def _check_rights(cursor: pymysql.cursors.Cursor, found: Findings) -> None:
    cursor.execute("SELECT CURRENT_USER(), DATABASE()")
    user, database = cursor.fetchone()
    quoted = "@".join(f"'{part}'" for part in user.rsplit("@", 1))
    try:
        for table in TABLES:
            # Nothing is written: no row is asked for. It fails where a right is missing.
            cursor.execute(f"UPDATE `{table}` SET campus = campus WHERE FALSE")
            cursor.execute(f"INSERT INTO `{table}` SELECT * FROM `{table}` WHERE FALSE")
    except pymysql.err.OperationalError:
        found.error(
            f"{user} may not read and write {table}",
            f"GRANT SELECT, INSERT, UPDATE ON `{database}`.* TO {quoted};",
        )
    except pymysql.err.ProgrammingError:
        return  # The table is missing: said above.
