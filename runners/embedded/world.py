"""An embedded world: three campuses with their databases, and the consult stores they feed."""

import base64
import collections.abc
import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import typing

import psycopg
import pymysql
import yaml
from confluent_kafka import KafkaException

from runners.embedded.binaries import ServerError
from runners.embedded.campus_b import script
from runners.embedded.campus_c import SCHEMA
from runners.embedded.connector import Connector
from runners.embedded.kafka import KafkaServer
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.oracle_tables import hints, postgresql_script
from runners.embedded.postgres import PostgresServer
from runners.embedded.progress import Progress, SlowStep, show_progress
from runners.embedded.server import EmbeddedServer
from schemas.errors import CampusSyncError

CAMPUSES = ("main", "east", "west")
PRIMARY = "primary"
UNLIKE, POSTGRESQL = "unlike", "postgresql"
WORLDS = (UNLIKE, POSTGRESQL)  # Three unlike campuses, or three of one kind.
SOURCE_DATABASE, STORE_DATABASE = "his", "consult"
WRITER = "hospital"  # Owns the source's tables: who the HIS itself logs in as.
READER = "sync"  # Who campus-sync logs in as: reads a source, owns a store.
CONFIG, KEY = "campuses.yaml", "dead-letter.key"
TOPIC = "campus-west"
_KIND = "campuses"  # The file that says which world it is.
_MAPPINGS = {"west": "postgresql_his_us_units"}
_SQL = pathlib.Path(__file__).parent
# Small, for many servers on one machine: a source serves writes and slots, a store merges.
_SOURCE_SETTINGS = {
    "shared_buffers": "24MB",
    "timezone": "Asia/Shanghai",
    "wal_sender_timeout": "20s",
}
_STORE_SETTINGS = {"shared_buffers": "48MB", "work_mem": "16MB", "max_wal_size": "512MB"}
# Of what stands for an Oracle: its redo log tells when a transaction was committed.
_ORACLE_SETTINGS = {
    "shared_buffers": "24MB",
    "timezone": "Asia/Shanghai",
    "track_commit_timestamp": True,
}
_MARIADB_SETTINGS = {"innodb-buffer-pool-size": "32M", "max-connections": 48}
# Nobody's changes are deleted before a store that was away has read them.
_TOPIC_SETTINGS = {"cleanup.policy": "delete", "retention.ms": "-1"}

World = dict[str, EmbeddedServer]


def kind_of(directory: str | pathlib.Path) -> str | None:
    """Returns which of `WORLDS` is in a directory; None if none is."""
    servers = pathlib.Path(directory).absolute() / "servers"
    try:
        return (servers / _KIND).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        # A world from before there were two kinds.
        return POSTGRESQL if (servers / "source-main").is_dir() else None


def servers(
    directory: str | pathlib.Path, durable: bool = True, campuses: str | None = None
) -> World:
    """Returns the world's servers by name, running or not: `source-main` .. `store-primary` ..

    A campus's source and its store are two servers, as a store that dies must not take the
    source along. A server's port is settled by its first start and then fixed. Of the unlike
    campuses `source-east` is a MariaDB, and `source-west` holds an Oracle's tables, whose
    changes come through Kafka, `topic-west`.

    Args:
      campuses: of `WORLDS`; by default what the directory holds, or would hold.
    """
    place = pathlib.Path(directory).absolute() / "servers"
    unlike = (campuses or kind_of(directory) or UNLIKE) == UNLIKE
    made: World = {}
    for campus in CAMPUSES:
        name = f"source-{campus}"
        settings = _ORACLE_SETTINGS if unlike and campus == "west" else _SOURCE_SETTINGS
        made[name] = _postgresql(place / name, settings, durable)
    if unlike:
        east, west = place / "source-east", place / "topic-west"
        made["source-east"] = MariaDbServer(
            *(east, _port(MariaDbServer(east)), _MARIADB_SETTINGS, durable),
            outlives=True,
            progress=_say_nothing,
        )
        made["topic-west"] = KafkaServer(west, _port(KafkaServer(west)), {}, _say_nothing)
    for store in (PRIMARY, *CAMPUSES):
        name = f"store-{store}"
        made[name] = _postgresql(place / name, _STORE_SETTINGS, durable)
    return made


def _postgresql(place: pathlib.Path, settings: dict, durable: bool) -> PostgresServer:
    return PostgresServer(place, _port(PostgresServer(place)), settings, durable, _say_nothing)


def _port(server: EmbeddedServer) -> int:
    return server.status(sized=False).port or 0


def up(
    directory: str | pathlib.Path,
    durable: bool = True,
    progress: Progress = show_progress,
    campuses: str | None = None,
) -> World:
    """Starts what does not run, makes what does not exist, and returns the running servers.

    The first time it also writes `campuses.yaml`, which is the user's from then on, and
    the dead letters' key (mode 0600). Where one server fails, those that this call started
    are stopped again.

    Args:
      directory: of an earlier world, or without one: made if missing.
      durable: False gives up fsync, for tests.
      progress: called with one line a second once two have gone by.
      campuses: of `WORLDS`; by default what the directory holds, and the unlike ones at first.

    Raises:
      ServerError: what, where and the remedy.
    """
    directory = pathlib.Path(directory).absolute()
    config = directory / CONFIG
    known = kind_of(directory)
    if campuses is not None and known is not None and campuses != known:
        raise ServerError(
            f"{directory}: holds a world of {known} campuses. Remedy: leave `--campuses` out, or "
            "choose another directory."
        )
    if config.exists() and not (directory / "servers").is_dir():
        raise ServerError(
            f"{config}: is of another world. Remedy: choose a directory without this file."
        )
    kind = campuses or known or UNLIKE
    world = servers(directory, durable, kind)
    started = [server for server in world.values() if not server.running]
    try:
        _note_kind(directory / "servers", kind)
        _each(world, _prepare, progress, "ready")
        if kind == UNLIKE:
            _send_what_waits(world)
    except (CampusSyncError, psycopg.Error, pymysql.Error, KafkaException):
        with contextlib.suppress(ServerError):
            _each({s.directory.name: s for s in started}, _stop, progress, "stopped")
        raise
    try:
        _write_once(directory / KEY, base64.b64encode(os.urandom(32)).decode() + "\n", 0o600)
        _write_once(config, config_text(world), 0o644)
    except OSError as error:
        raise ServerError(
            f"{error.filename}: {error.strerror}. Remedy: check the directory's permissions "
            "and free space, then `world up` again."
        ) from error
    return world


def down(directory: str | pathlib.Path, progress: Progress = show_progress) -> None:
    """Stops every server of the world; the data stay. Harmless where nothing runs.

    Raises:
      ServerError: a server is another user's.
    """
    _each(servers(directory), _stop, progress, "stopped")


def remove(directory: str | pathlib.Path, progress: Progress = show_progress) -> None:
    """Stops every server of the world and takes away its data, wherever they are.

    Raises:
      ServerError: a server is another user's.
    """
    down(directory, progress)
    for server in servers(directory).values():
        if isinstance(server, MariaDbServer):
            server.remove()
    shutil.rmtree(pathlib.Path(directory).absolute() / "servers", ignore_errors=True)


def status(directory: str | pathlib.Path) -> dict[str, dict]:
    """Returns each server's `running`, `port`, `pid` and `size_bytes`; None where unknown."""
    found = {}
    for name, server in servers(directory).items():
        now = server.status()
        found[name] = {
            "running": now.running,
            "port": now.port,
            "pid": now.pid,
            "size_bytes": now.nbytes,
        }
    return found


def config_text(world: collections.abc.Mapping[str, EmbeddedServer]) -> str:
    """Returns the content of campuses.yaml for the servers of a world."""
    sources: dict[str, dict[str, typing.Any]] = {
        campus: {
            "kind": "postgresql",
            "dsn": world[f"source-{campus}"].dsn(SOURCE_DATABASE, READER),
            "mapping": _MAPPINGS.get(campus, "postgresql_his"),
            "publication": "campus_sync",
        }
        for campus in CAMPUSES
    }
    if topic := world.get("topic-west"):
        sources["east"] = {
            "kind": "mariadb",
            "dsn": world["source-east"].dsn(SOURCE_DATABASE, READER),
            "mapping": "mariadb_his_gbk",
        }
        sources["west"] = {
            "kind": "debezium",
            "dsn": f"kafka://{topic.bootstrap}/{TOPIC}",
            "mapping": "oracle_his",
            "hints": hints(),
            "commit_times": "seconds",  # As an Oracle's log has them.
            "content": world["source-west"].dsn(SOURCE_DATABASE, READER),
        }
    stores = {
        store: {"dsn": world[f"store-{store}"].dsn(STORE_DATABASE, READER)}
        for store in (PRIMARY, *CAMPUSES)
    }
    content = {
        "version": 1,
        "sources": sources,
        "stores": stores,
        "links": "all",
        "dead_letter_key": f"file:{KEY}",
        "emergency_rules": "default",
    }
    head = "# An embedded world. Every campus feeds the platform's store and every campus's own.\n"
    return head + yaml.safe_dump(content, sort_keys=False, width=200)


def _prepare(server: EmbeddedServer) -> None:
    server.start()
    match server:
        case MariaDbServer():
            _prepare_mariadb(server)
        case KafkaServer():
            _prepare_topic(server)
        case PostgresServer():
            _prepare_postgresql(server)


def _prepare_postgresql(server: PostgresServer) -> None:
    kind = server.directory.name.partition("-")[0]
    with server.connect() as connection:
        _make_role(connection, READER, "LOGIN REPLICATION" if kind == "source" else "LOGIN")
        if kind == "source":
            _make_role(connection, WRITER, "LOGIN")
            _make_database(connection, SOURCE_DATABASE, WRITER)
        else:
            _make_database(connection, STORE_DATABASE, READER)
    if kind == "source":
        # One transaction, so that a start that was cut short is made good by the next.
        with server.connect(SOURCE_DATABASE, WRITER, autocommit=False) as connection:
            if "track_commit_timestamp" in server.settings:
                _make_oracle(connection)
            elif connection.execute("SELECT to_regclass('his.patient')").fetchone()[0] is None:
                connection.execute((_SQL / "hospital.sql").read_text(encoding="utf-8"))
                connection.execute((_SQL / "publish.sql").read_text(encoding="utf-8"))


def _make_oracle(connection: psycopg.Connection) -> None:
    """Makes campus C's tables, for its programs to write and for `compare` to read."""
    known = "SELECT FROM information_schema.schemata WHERE schema_name = %s"
    if not connection.execute(known, [SCHEMA]).rowcount:
        connection.execute(postgresql_script())
        connection.execute(f'GRANT USAGE ON SCHEMA "{SCHEMA}" TO {READER}')
        connection.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA "{SCHEMA}" TO {READER}')


def _prepare_mariadb(server: MariaDbServer) -> None:
    with server.connect() as connection, connection.cursor() as cursor:
        # MariaDB undoes no DDL: every statement may be run again.
        for statement in script():
            cursor.execute(statement)
        for account in (READER, WRITER):
            cursor.execute(f"CREATE USER IF NOT EXISTS '{account}'@'%'")
        cursor.execute(f"GRANT REPLICATION SLAVE, BINLOG MONITOR ON *.* TO '{READER}'@'%'")
        cursor.execute(f"GRANT SELECT ON {SOURCE_DATABASE}.* TO '{READER}'@'%'")
        cursor.execute(f"GRANT ALL ON {SOURCE_DATABASE}.* TO '{WRITER}'@'%'")


def _prepare_topic(server: KafkaServer) -> None:
    if TOPIC not in server.admin().list_topics(timeout=10).topics:
        server.create_topic(TOPIC, settings=_TOPIC_SETTINGS)


def _send_what_waits(world: World) -> None:
    """Sends what the campus committed before whoever sent it was killed."""
    dsn = world["source-west"].dsn(SOURCE_DATABASE, WRITER)
    connector = Connector(dsn, world["topic-west"].bootstrap, TOPIC)
    with contextlib.closing(connector):
        connector.send(begin=False)


def _note_kind(servers: pathlib.Path, kind: str) -> None:
    try:
        servers.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write_once(servers / _KIND, kind + "\n", 0o644)
    except OSError as error:
        raise ServerError(
            f"{error.filename}: {error.strerror}. Remedy: check the directory's permissions."
        ) from error


def _make_role(connection: psycopg.Connection, name: str, options: str) -> None:
    if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount:
        connection.execute(f"CREATE ROLE {name} {options}")


def _make_database(connection: psycopg.Connection, name: str, owner: str) -> None:
    if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
        connection.execute(f"CREATE DATABASE {name} OWNER {owner}")


def _stop(server: EmbeddedServer) -> None:
    server.stop()


def _each(
    world: collections.abc.Mapping[str, EmbeddedServer],
    action: collections.abc.Callable[[EmbeddedServer], None],
    progress: Progress,
    done_word: str,
) -> None:
    """Does it with all servers at once and waits for all; then the first error, if any."""
    tell = SlowStep(progress)
    with concurrent.futures.ThreadPoolExecutor(max(len(world), 1)) as pool:
        pending = {pool.submit(action, server): name for name, server in world.items()}
        while left := [name for future, name in pending.items() if not future.done()]:
            concurrent.futures.wait(pending, timeout=0.2)
            tell(f"{len(world) - len(left)} of {len(world)} servers {done_word}")
    for future in pending:
        future.result()


def _say_nothing(_: str) -> None:
    """Takes single servers' progress: the world tells of all of them in one line."""


def _write_once(path: pathlib.Path, text: str, mode: int) -> None:
    """Writes a file wholly or not at all, unless there is one."""
    if path.exists():
        return
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    new.rename(path)
