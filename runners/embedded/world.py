"""An embedded world: three campuses with their databases, and the consult stores they feed."""

import base64
import collections.abc
import concurrent.futures
import contextlib
import os
import pathlib

import psycopg
import yaml

from runners.embedded.binaries import ServerError
from runners.embedded.postgres import PostgresServer
from runners.embedded.progress import Progress, SlowStep, show_progress

CAMPUSES = ("main", "east", "west")
PRIMARY = "primary"
SOURCE_DATABASE, STORE_DATABASE = "his", "consult"
WRITER = "hospital"  # Owns the source's tables: who the HIS itself logs in as.
READER = "sync"  # Who campus-sync logs in as: reads a source, owns a store.
CONFIG, KEY = "campuses.yaml", "dead-letter.key"
_MAPPINGS = {"west": "postgresql_his_us_units"}
_SQL = pathlib.Path(__file__).parent
# Small, for seven servers on one machine: a source serves writes and slots, a store merges.
_SOURCE_SETTINGS = {
    "shared_buffers": "24MB",
    "timezone": "Asia/Shanghai",
    "wal_sender_timeout": "20s",
}
_STORE_SETTINGS = {"shared_buffers": "48MB", "work_mem": "16MB", "max_wal_size": "512MB"}


def servers(directory: str | pathlib.Path, durable: bool = True) -> dict[str, PostgresServer]:
    """Returns the world's servers by name, running or not: `source-main` .. `store-primary` ..

    A campus's source and its store are two servers, as a store that dies must not take the
    source along. A server's port is settled by its first start and then fixed.
    """
    place = pathlib.Path(directory).absolute() / "servers"
    kinds = {f"source-{campus}": _SOURCE_SETTINGS for campus in CAMPUSES}
    kinds |= {f"store-{store}": _STORE_SETTINGS for store in (PRIMARY, *CAMPUSES)}
    made = {}
    for name, settings in kinds.items():
        port = PostgresServer(place / name).status(sized=False).port or 0
        made[name] = PostgresServer(place / name, port, settings, durable, _say_nothing)
    return made


def up(
    directory: str | pathlib.Path, durable: bool = True, progress: Progress = show_progress
) -> dict[str, PostgresServer]:
    """Starts what does not run, makes what does not exist, and returns the running servers.

    The first time it also writes `campuses.yaml`, which is the user's from then on, and
    the dead letters' key (mode 0600). Where one server fails, those that this call started
    are stopped again.

    Args:
      directory: of an earlier world, or without one: made if missing.
      durable: False gives up fsync, for tests.
      progress: called with one line a second once two have gone by.

    Raises:
      ServerError: what, where and the remedy.
    """
    directory = pathlib.Path(directory).absolute()
    config = directory / CONFIG
    if config.exists() and not (directory / "servers").is_dir():
        raise ServerError(
            f"{config}: is of another world. Remedy: choose a directory without this file."
        )
    world = servers(directory, durable)
    started = [server for server in world.values() if not server.running]
    try:
        _each(world, _prepare, progress, "ready")
    except (ServerError, psycopg.Error):
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


def config_text(world: collections.abc.Mapping[str, PostgresServer]) -> str:
    """Returns the content of campuses.yaml for the servers of a world."""
    sources = {
        campus: {
            "kind": "postgresql",
            "dsn": world[f"source-{campus}"].dsn(SOURCE_DATABASE, READER),
            "mapping": _MAPPINGS.get(campus, "postgresql_his"),
            "publication": "campus_sync",
        }
        for campus in CAMPUSES
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


def _prepare(server: PostgresServer) -> None:
    server.start()
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
            if connection.execute("SELECT to_regclass('his.patient')").fetchone()[0] is None:
                connection.execute((_SQL / "hospital.sql").read_text(encoding="utf-8"))
                connection.execute((_SQL / "publish.sql").read_text(encoding="utf-8"))


def _make_role(connection: psycopg.Connection, name: str, options: str) -> None:
    if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).rowcount:
        connection.execute(f"CREATE ROLE {name} {options}")


def _make_database(connection: psycopg.Connection, name: str, owner: str) -> None:
    if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
        connection.execute(f"CREATE DATABASE {name} OWNER {owner}")


def _stop(server: PostgresServer) -> None:
    server.stop()


def _each(
    world: collections.abc.Mapping[str, PostgresServer],
    action: collections.abc.Callable[[PostgresServer], None],
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
