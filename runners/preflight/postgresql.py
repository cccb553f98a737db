"""Checks of a PostgreSQL source: role, settings, slots, and room for the links' own."""

import collections
import collections.abc
import dataclasses

import psycopg
from psycopg import sql

from runners.preflight.findings import Findings
from runners.preflight.logs import check_log, check_mariadb_tables
from runners.preflight.servers import (
    STATEMENT_MS,
    check_clock,
    check_encoding,
    connect,
    unreachable,
)
from runners.preflight.tables import check_tables
from schemas.config import Config, Link
from schemas.mappings import CampusMapping

_OLDEST_TESTED = 150000
_WAL_NEAR_LOSS = 0.2  # Of max_slot_wal_keep_size: less left is close to losing the slot.


@dataclasses.dataclass(frozen=True)
class Server:
    """What is counted over all sources on one server."""

    system: str
    slots: tuple[int, int]  # Limit and what is free of it.
    senders: tuple[int, int]
    missing_slots: int
    links: int


def check_source(
    config: Config,
    name: str,
    links: list[Link],
    mapping: CampusMapping | None,
    wall_clock: collections.abc.Callable[[], float],
) -> tuple[Findings, Server | None]:
    found = Findings(f"source {name}")
    source = config.sources[name]
    server = None
    if source.kind != "postgresql":
        for fault in check_log(source, name, mapping):
            (found.error if fault.fatal else found.warning)(fault.what, fault.remedy)
        if source.kind == "mariadb" and mapping is not None:
            check_mariadb_tables(source, name, mapping, found)
        return found, None
    try:
        with connect(source.dsn, options=f"-c statement_timeout={STATEMENT_MS}") as connection:
            check_clock(connection, found, wall_clock)
            check_encoding(connection, found)
            server = _check_settings(connection, links, found)
            _check_slots(connection, links, found)
            if mapping is not None:
                check_tables(connection, source.publication, mapping, found)
            may_replicate = _check_role(connection, found)
    except psycopg.Error as error:
        unreachable(source.dsn, error, found)
        return found, server
    if may_replicate:
        _check_replication(source.dsn, found)
    return found, server


def _check_role(connection: psycopg.Connection, found: Findings) -> bool:
    user, replication = connection.execute(
        "SELECT current_user, rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    if not replication:
        statement = sql.SQL("ALTER ROLE {} REPLICATION;").format(sql.Identifier(user))
        found.error(f"{user} may not replicate", statement.as_string(connection))
    return replication


def _check_replication(dsn: str, found: Findings) -> None:
    """A replication connection can be refused where an ordinary one is let in."""
    try:
        with connect(dsn, replication="database") as connection:
            connection.execute("IDENTIFY_SYSTEM")
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        found.error(
            f"no replication connection: {reason[0]}",
            "host DATABASE USER ADDRESS scram-sha-256 in pg_hba.conf, then"
            " SELECT pg_reload_conf();",
        )


def _check_settings(connection: psycopg.Connection, links: list[Link], found: Findings) -> Server:
    names = ("wal_level", "max_replication_slots", "max_wal_senders", "max_slot_wal_keep_size")
    rows = connection.execute(
        "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(names),)
    ).fetchall()
    setting = dict(rows)
    version, standby = connection.execute(
        "SELECT current_setting('server_version_num')::int, pg_is_in_recovery()"
    ).fetchone()
    if version < _OLDEST_TESTED:
        found.warning(
            f"PostgreSQL {version // 10000} is older than what was tested (15)",
            "plan its upgrade; PostgreSQL 14 and older see no more repairs soon.",
        )
    if standby:
        found.error("is a standby", "name the primary server in campuses.yaml.")
    if setting["wal_level"] != "logical":
        found.error(
            f"wal_level is {setting['wal_level']}",
            "ALTER SYSTEM SET wal_level = 'logical';  -- then restart the server",
        )
    if int(setting["max_slot_wal_keep_size"]) < 0:
        found.warning(
            "max_slot_wal_keep_size has no limit: a long outage of a store can fill its disk",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();"
            "  -- at most half of what is free on the log's disk",
        )
    slots = [link.slot for link in links]
    system, used, own, senders = connection.execute(
        "SELECT (SELECT system_identifier::text FROM pg_control_system()),"
        " (SELECT count(*) FROM pg_replication_slots),"
        " (SELECT count(*) FROM pg_replication_slots WHERE slot_name = ANY(%s)),"
        " (SELECT count(*) FROM pg_stat_replication r WHERE NOT EXISTS (SELECT FROM"
        "   pg_replication_slots s WHERE s.active_pid = r.pid"
        "   AND s.slot_name LIKE 'campus\\_sync\\_%%'))",
        (slots,),
    ).fetchone()
    return Server(
        system,
        (slots_max := int(setting["max_replication_slots"]), slots_max - used),
        (senders_max := int(setting["max_wal_senders"]), senders_max - senders),
        len(slots) - own,
        len(slots),
    )


def check_room(
    servers: collections.abc.Mapping[str, list[tuple[str, Server]]],
) -> Findings:
    """Counts slots and senders over all sources of one server."""
    findings = Findings("")
    for entries in servers.values():
        found = Findings(f"source {', '.join(name for name, _ in entries)}")
        first = entries[0][1]
        for what, (limit, free), needed in (
            ("max_replication_slots", first.slots, sum(s.missing_slots for _, s in entries)),
            ("max_wal_senders", first.senders, sum(s.links for _, s in entries)),
        ):
            if free < needed:
                found.error(
                    f"{what} ({limit}) leaves room for {free}, its links need {needed}",
                    f"ALTER SYSTEM SET {what} = {limit + needed - free};"
                    "  -- then restart the server",
                )
        findings += found
    return findings


def _check_slots(connection: psycopg.Connection, links: list[Link], found: Findings) -> None:
    rows = connection.execute(
        "SELECT slot_name, plugin, database, active, active_pid, wal_status, safe_wal_size,"
        " (SELECT setting::bigint << 20 FROM pg_settings WHERE name = 'max_slot_wal_keep_size')"
        " FROM pg_replication_slots WHERE slot_name = ANY(%s)",
        ([link.slot for link in links],),
    ).fetchall()
    slots = {row[0]: row[1:] for row in rows}
    database = connection.execute("SELECT current_database()").fetchone()[0]
    for link in links:
        if link.slot not in slots:
            found.note(
                f"{link.name}: no slot {link.slot} yet: the link begins with a snapshot",
                "nothing to do, but plan for the load of reading every table.",
            )
            continue
        plugin, where, active, pid, status, safe, keep = slots[link.slot]
        if plugin != "pgoutput" or where != database:
            found.error(
                f"{link.name}: slot {link.slot} is not ours ({plugin or 'physical'}, {where})",
                f"SELECT pg_drop_replication_slot('{link.slot}');  -- after asking its owner",
            )
        elif status == "lost":
            found.warning(
                f"{link.name}: slot {link.slot} is lost: the link begins with a snapshot",
                "nothing to do; raise max_slot_wal_keep_size so that it does not happen again.",
            )
        elif status == "unreserved" or (safe is not None and safe < _WAL_NEAR_LOSS * keep):
            found.warning(
                f"{link.name}: slot {link.slot} is about to be lost ({safe or 0} bytes left)",
                "start the link now, or ALTER SYSTEM SET max_slot_wal_keep_size higher and"
                " SELECT pg_reload_conf();",
            )
        elif active:
            found.note(
                f"{link.name}: slot {link.slot} is in use by process {pid}",
                "if no campus-sync should run: SELECT pg_terminate_backend(" + str(pid) + ");",
            )
