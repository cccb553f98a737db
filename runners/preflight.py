"""Preflight: what would go wrong with a configuration, each with the remedy, in seconds."""

import base64
import binascii
import collections
import collections.abc
import concurrent.futures
import dataclasses
import enum
import os
import pathlib
import time
import typing

import psycopg
from psycopg import sql

from runners.preflight_logs import check_log
from schemas.config import PRIMARY, Config, Link, redact
from schemas.emergency_rules import load_rules
from schemas.errors import ConfigError
from schemas.mappings import CampusMapping, load_mapping
from transforms.deliver.store_schema import SCHEMA_VERSION

_CONNECT_S = 2  # libpq takes no less.
_STATEMENT_MS = 2000
_SKEW_S = 1.0
_OLDEST_TESTED = 150000
_KEY_BYTES = 32
_WAL_NEAR_LOSS = 0.2  # Of max_slot_wal_keep_size: less left is close to losing the slot.


class Severity(enum.StrEnum):
    """ERROR forbids a start; WARNING will hurt some day; NOTE is good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Finding(typing.NamedTuple):
    """What is not as it should be: where, what, and a command or SQL that helps."""

    severity: Severity
    place: str
    what: str
    remedy: str

    def to_dict(self) -> dict[str, str]:
        return self._asdict()


class _Findings(list[Finding]):
    """The findings of one place."""

    def __init__(self, place: str):
        super().__init__()
        self._place = place

    def error(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.ERROR, self._place, what, remedy))

    def warning(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.WARNING, self._place, what, remedy))

    def note(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.NOTE, self._place, what, remedy))


@dataclasses.dataclass(frozen=True)
class _Server:
    """What is counted over all sources on one server."""

    system: str
    slots: tuple[int, int]  # Limit and what is free of it.
    senders: tuple[int, int]
    missing_slots: int
    links: int


def check(
    config: Config, wall_clock: collections.abc.Callable[[], float] = time.time
) -> list[Finding]:
    """Returns what would go wrong, errors first; an empty list means ready.

    Changes nothing. Sources and stores are asked in parallel, so it takes about three
    seconds at most, also where some of them are down.

    Args:
      config: from `schemas.config.load`.
      wall_clock: this host's, seconds since 1970.
    """
    files, mappings = _check_files(config)
    links: dict[str, list[Link]] = collections.defaultdict(list)
    for link in config.links():
        links[link.source].append(link)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(links) + len(config.stores))) as pool:
        sources = {
            name: pool.submit(_check_source, config, name, own, mappings.get(name), wall_clock)
            for name, own in links.items()
        }
        wanted = {link.store for link in config.links()} | {PRIMARY}
        stores = [
            pool.submit(_check_store, name, store.dsn, wall_clock)
            for name, store in config.stores.items()
            if name in wanted
        ]
        findings = list(files)
        servers: dict[str, list[tuple[str, _Server]]] = collections.defaultdict(list)
        for name, task in sources.items():
            found, server = task.result()
            findings += found
            if server is not None:
                servers[server.system].append((name, server))
        for task in stores:
            findings += task.result()
    findings += _check_room(servers)
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _check_files(config: Config) -> tuple[_Findings, dict[str, CampusMapping]]:
    """Checks what lies on this host: mappings, rules, key, password files."""
    found = _Findings("files")
    mappings = {}
    for name, source in config.sources.items():
        try:
            mappings[name] = load_mapping(source.mapping)
        except ConfigError as error:
            found.error(str(error), f"correct {source.mapping}.")
    rules = config.emergency_rules
    try:
        load_rules(rules)
    except ConfigError as error:
        found.error(str(error), f"correct {rules}.")
    _check_key(config.dead_letter_key, found)
    for name, end in (*config.sources.items(), *config.stores.items()):
        if end.kind != "postgresql":
            continue
        parts = psycopg.conninfo.conninfo_to_dict(end.dsn)
        passfile = pathlib.Path(str(parts["passfile"])) if parts.get("passfile") else None
        if passfile is not None and not passfile.is_file():
            found.error(f"{name}: password file {passfile} is not there", f"create {passfile}.")
        elif passfile is not None and passfile.stat().st_mode & 0o077:
            found.error(
                f"{name}: libpq ignores password file {passfile}: others may read it",
                f"chmod 600 {passfile}",
            )
    return found, mappings


def _check_key(reference: str, found: _Findings) -> None:
    kind, _, place = reference.partition(":")
    make = "openssl rand -base64 32"
    if kind == "env":
        text = os.environ.get(place)
        remedy = f'export {place}="$({make})", and keep a copy where only the team can read it.'
    else:
        path = pathlib.Path(place)
        try:
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            text = None
        remedy = f"{make} > {place} && chmod 600 {place}, and keep a copy in a safe place."
        if text is not None and path.stat().st_mode & 0o077:
            found.warning(f"others may read the dead letters' key {place}", f"chmod 600 {place}")
    try:
        whole = text is not None and (
            len(base64.b64decode(text.strip(), validate=True)) == _KEY_BYTES
        )
    except binascii.Error:
        whole = False
    if not whole:
        what = "is not 32 bytes in base64" if text else "is missing or cannot be read"
        found.error(f"the dead letters' key {reference} {what}", remedy)


def _connect(dsn: str, **parameters: object) -> psycopg.Connection:
    return psycopg.connect(
        dsn,
        autocommit=True,
        connect_timeout=_CONNECT_S,
        application_name="campus-sync check",
        **parameters,
    )


def _unreachable(dsn: str, error: psycopg.Error, found: _Findings) -> None:
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    found.error(
        f"{redact(dsn)} cannot be reached: {reason}",
        f"psql {redact_command(dsn)} -c 'select 1' from this host; then check the server, "
        "its pg_hba.conf and the network.",
    )


def redact_command(dsn: str) -> str:
    """Returns a connection string to paste behind `psql`, without any password."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    parts = {key: value for key, value in parts.items() if "password" not in key}
    return '"' + psycopg.conninfo.make_conninfo("", **parts) + '"'


def _check_clock(
    connection: psycopg.Connection,
    found: _Findings,
    wall_clock: collections.abc.Callable[[], float],
) -> None:
    before = wall_clock()
    there = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()[0]
    after = wall_clock()
    skew = there - (before + after) / 2
    if abs(skew) - (after - before) / 2 > _SKEW_S:
        side = "ahead of" if skew > 0 else "behind"
        found.warning(
            f"its clock is {abs(skew):.1f} s {side} this host's: measured delays are wrong by it",
            "timedatectl status on both; sudo chronyc makestep",
        )


def _check_store(name: str, dsn: str, wall_clock: collections.abc.Callable[[], float]) -> _Findings:
    found = _Findings(f"store {name}")
    try:
        with _connect(dsn, options=f"-c statement_timeout={_STATEMENT_MS}") as connection:
            _check_clock(connection, found, wall_clock)
            _check_encoding(connection, found)
            _check_store_rights(connection, found)
    except psycopg.Error as error:
        _unreachable(dsn, error, found)
    return found


def _check_encoding(connection: psycopg.Connection, found: _Findings) -> None:
    database, encoding = connection.execute(
        "SELECT current_database(), pg_encoding_to_char(encoding) FROM pg_database"
        " WHERE datname = current_database()"
    ).fetchone()
    if encoding != "UTF8":
        remedy = f"CREATE DATABASE {database}_utf8 ENCODING 'UTF8' TEMPLATE template0;"
        what = f"database {database} is in {encoding}, not UTF8"
        if encoding == "SQL_ASCII":
            found.error(f"{what}: the meaning of its bytes is not known", remedy)
        else:
            found.warning(f"{what}: characters it lacks cannot be carried", remedy)


def _check_store_rights(connection: psycopg.Connection, found: _Findings) -> None:
    row = connection.execute(
        "SELECT current_user, current_database(), pg_is_in_recovery(),"
        " has_database_privilege(current_database(), 'CREATE'),"
        " has_database_privilege(current_database(), 'TEMPORARY'),"
        " to_regclass('sync.schema_version') IS NOT NULL"
    ).fetchone()
    user, database, standby, may_create, may_stage, exists = row
    grant = sql.SQL("GRANT {} ON DATABASE {} TO {};")
    if standby:
        found.error("is a standby, read only", "name the primary server in campuses.yaml.")
    if not may_stage:
        statement = grant.format(
            sql.SQL("TEMPORARY"), sql.Identifier(database), sql.Identifier(user)
        )
        found.error(f"{user} may not make temporary tables", statement.as_string(connection))
    if not exists:
        if not may_create:
            statement = grant.format(
                sql.SQL("CREATE"), sql.Identifier(database), sql.Identifier(user)
            )
            found.error(f"{user} may not create the schema", statement.as_string(connection))
        return
    row = connection.execute("SELECT version FROM sync.schema_version").fetchone()
    version = row[0] if row else 0
    if version > SCHEMA_VERSION:
        found.error(
            f"its schema is version {version}, this software knows {SCHEMA_VERSION}",
            "install the newer campus-sync.",
        )
    elif version < SCHEMA_VERSION:
        found.note(
            f"its schema is version {version} and will be upgraded to {SCHEMA_VERSION}",
            "take a backup first: pg_dump --schema=sync --schema=consult",
        )
    denied = connection.execute(
        "SELECT c.oid::regclass::text FROM pg_class c"
        " WHERE c.relnamespace IN ('consult'::regnamespace, 'sync'::regnamespace)"
        " AND c.relkind = 'r' AND NOT has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE')"
        " ORDER BY 1"
    ).fetchall()
    if denied:
        schemas = sql.SQL(
            "GRANT USAGE ON SCHEMA consult, sync TO {user}; GRANT SELECT, INSERT, UPDATE, DELETE"
            " ON ALL TABLES IN SCHEMA consult, sync TO {user};"
        ).format(user=sql.Identifier(user))
        found.error(f"{user} may not write {denied[0][0]}", schemas.as_string(connection))


def _check_source(
    config: Config,
    name: str,
    links: list[Link],
    mapping: CampusMapping | None,
    wall_clock: collections.abc.Callable[[], float],
) -> tuple[_Findings, _Server | None]:
    found = _Findings(f"source {name}")
    source = config.sources[name]
    server = None
    if source.kind != "postgresql":
        for fault in check_log(source, name, mapping):
            (found.error if fault.fatal else found.warning)(fault.what, fault.remedy)
        return found, None
    try:
        with _connect(source.dsn, options=f"-c statement_timeout={_STATEMENT_MS}") as connection:
            _check_clock(connection, found, wall_clock)
            _check_encoding(connection, found)
            server = _check_settings(connection, links, found)
            _check_slots(connection, links, found)
            if mapping is not None:
                _check_tables(connection, source.publication, mapping, found)
            may_replicate = _check_role(connection, found)
    except psycopg.Error as error:
        _unreachable(source.dsn, error, found)
        return found, server
    if may_replicate:
        _check_replication(source.dsn, found)
    return found, server


def _check_role(connection: psycopg.Connection, found: _Findings) -> bool:
    user, replication = connection.execute(
        "SELECT current_user, rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    if not replication:
        statement = sql.SQL("ALTER ROLE {} REPLICATION;").format(sql.Identifier(user))
        found.error(f"{user} may not replicate", statement.as_string(connection))
    return replication


def _check_replication(dsn: str, found: _Findings) -> None:
    """A replication connection can be refused where an ordinary one is let in."""
    try:
        with _connect(dsn, replication="database") as connection:
            connection.execute("IDENTIFY_SYSTEM")
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        found.error(
            f"no replication connection: {reason[0]}",
            "host DATABASE USER ADDRESS scram-sha-256 in pg_hba.conf, then"
            " SELECT pg_reload_conf();",
        )


def _check_settings(connection: psycopg.Connection, links: list[Link], found: _Findings) -> _Server:
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
    return _Server(
        system,
        (slots_max := int(setting["max_replication_slots"]), slots_max - used),
        (senders_max := int(setting["max_wal_senders"]), senders_max - senders),
        len(slots) - own,
        len(slots),
    )


def _check_room(
    servers: collections.abc.Mapping[str, list[tuple[str, _Server]]],
) -> _Findings:
    """Counts slots and senders over all sources of one server."""
    findings = _Findings("")
    for entries in servers.values():
        found = _Findings(f"source {', '.join(name for name, _ in entries)}")
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


def _check_slots(connection: psycopg.Connection, links: list[Link], found: _Findings) -> None:
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


_TABLES_SQL = """
SELECT n.nspname || '.' || c.relname, c.oid::regclass::text, c.relpersistence, c.relreplident,
    has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE'),
    ARRAY(SELECT a.attname::text FROM pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
    ARRAY(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a
            ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)
          WHERE i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident
            ELSE i.indisprimary END),
    c.reltoastrelid <> 0 AND pg_relation_size(c.reltoastrelid) > 0
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname || '.' || c.relname = ANY(%s)
"""


@dataclasses.dataclass(frozen=True)
class _SourceTable:
    name: str
    quoted: str
    persistence: str
    identity: str
    readable: bool
    columns: list[str]
    key: list[str]
    toasted: bool


def _check_tables(
    connection: psycopg.Connection, publication: str, mapping: CampusMapping, found: _Findings
) -> None:
    rows = connection.execute(_TABLES_SQL, (list(mapping.tables),)).fetchall()
    tables = {row[0]: _SourceTable(*row) for row in rows}
    published = _published(connection, publication, tables, mapping, found)
    user = sql.Identifier(connection.info.user).as_string(connection)
    for name, rule in mapping.tables.items():
        table = tables.get(name)
        if table is None:
            found.error(
                f"table {name} is mapped and does not exist", f"take it out of {mapping.file}."
            )
            continue
        _check_table(table, rule.id, user, found)
    real = {name: columns for name, columns in published.items() if name in tables}
    real |= {name: columns for name, columns in published.items() if name not in mapping.tables}
    for item in mapping.compare_columns(real):
        if item.reason == "missing_table":
            continue  # Told above, with the statement.
        column = f".{item.column}" if item.column else ""
        tell = found.error if item.fatal else found.warning
        tell(f"{item.table}{column}: {item.reason.replace('_', ' ')}", f"{item.remedy}.")
    toasted = sorted(t.name for t in tables.values() if t.toasted and t.identity == "d")
    if toasted:
        statements = " ".join(
            f"ALTER TABLE {tables[name].quoted} REPLICA IDENTITY FULL;" for name in toasted
        )
        found.warning(
            f"long values of {', '.join(toasted)} are not sent when unchanged: such changes have no"
            " emergency copy, and after a refused change an older text stays until compare tells",
            f"{statements}  -- costs log volume",
        )


def _check_table(table: _SourceTable, ids: tuple[str, ...], user: str, found: _Findings) -> None:
    if table.persistence != "p":
        found.error(
            f"{table.name} is not in the log (unlogged)", f"ALTER TABLE {table.quoted} SET LOGGED;"
        )
    if not table.readable:
        schema = table.quoted.partition(".")[0]
        found.error(
            f"{table.name} may not be read by this user",
            f"GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT ON {table.quoted} TO {user};",
        )
    if table.identity == "n" or (table.identity == "d" and not table.key):
        found.error(
            f"{table.name} has no primary key: its updates and deletes fail once published",
            f"ALTER TABLE {table.quoted} ADD PRIMARY KEY ({', '.join(ids)});  -- or, slower:"
            f" ALTER TABLE {table.quoted} REPLICA IDENTITY FULL;",
        )
    elif table.identity != "f" and not set(ids) <= set(table.key):
        found.error(
            f"{table.name}: a delete carries only ({', '.join(table.key)}), the mapping's id is"
            f" ({', '.join(ids)})",
            f"ALTER TABLE {table.quoted} REPLICA IDENTITY FULL;  -- or map id: to the key",
        )


def _published(
    connection: psycopg.Connection,
    publication: str,
    tables: dict[str, _SourceTable],
    mapping: CampusMapping,
    found: _Findings,
) -> dict[str, list[str]]:
    """Returns the published tables with their published columns."""
    name = sql.Identifier(publication).as_string(connection)
    row = connection.execute(
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication"
        " WHERE pubname = %s",
        (publication,),
    ).fetchone()
    if row is None:
        every = ", ".join(tables[table].quoted for table in mapping.tables if table in tables)
        found.error(
            f"no publication {publication}", f"CREATE PUBLICATION {name} FOR TABLE {every};"
        )
        return {}
    if not all(row):
        found.error(
            f"publication {publication} leaves out some kinds of change",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');",
        )
    recent = connection.info.server_version >= 150000
    columns = "p.attnames::text[], p.rowfilter" if recent else "NULL::text[], NULL::text"
    rows = connection.execute(
        f"SELECT p.schemaname || '.' || p.tablename, {columns} FROM pg_publication_tables p"
        " WHERE p.pubname = %s",
        (publication,),
    ).fetchall()
    published = {}
    for table, attributes, row_filter in rows:
        published[table] = attributes or (tables[table].columns if table in tables else [])
        if row_filter:
            found.error(
                f"publication {publication} filters the rows of {table}",
                f"ALTER PUBLICATION {name} DROP TABLE {table};"
                f" ALTER PUBLICATION {name} ADD TABLE {table};",
            )
    for table in mapping.tables:
        if table in tables and table not in published:
            found.error(
                f"{table} is mapped and not in publication {publication}",
                f"ALTER PUBLICATION {name} ADD TABLE {tables[table].quoted};",
            )
    return published
