"""MariaDB servers of our own, made in a directory and gone with it."""

import collections.abc
import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys

import pymysql

from runners.embedded.binaries import Account, ServerError, server_account
from runners.embedded.mariadb_programs import MariaDbPrograms, programs
from runners.embedded.process_tree import ProcessId, freeze, identify, kill_tree, wait_gone
from runners.embedded.progress import Progress, show_progress
from runners.embedded.server import HOST, EmbeddedServer, nbytes
from runners.processes import spawn

SUPERUSER = "root"

_DATA_SHELF = pathlib.Path("/var/tmp/campus-sync-mariadb")
# Small, for several servers on one machine. Rows are logged with their columns' names.
_SETTINGS: dict[str, str | int] = {
    "bind-address": HOST,
    "skip-name-resolve": 1,
    "ssl": 0,  # Its own certificate would take it seconds to make at every start.
    "server-id": 1,
    "log-bin": "binlog",
    "binlog-format": "ROW",
    "binlog-row-metadata": "FULL",
    "gtid-strict-mode": 1,
    "character-set-server": "utf8mb4",
    "performance-schema": 0,
    "innodb-buffer-pool-size": "48M",
    "innodb-log-file-size": "32M",
    "innodb-undo-tablespaces": 0,
    "aria-log-file-size": "8M",
    "max-connections": 64,
    "max-allowed-packet": "64M",
    "default-time-zone": "+08:00",
    "log-warnings": 1,  # Not of connections that come and go.
}
_DURABLE = {"sync-binlog": 1, "innodb-flush-log-at-trx-commit": 1}
# A killed server loses nothing committed either way: what it wrote is with the kernel.
_NOT_DURABLE = {"sync-binlog": 0, "innodb-flush-log-at-trx-commit": 2}
_MAKING = {
    "innodb-log-file-size": "32M",
    "innodb-undo-tablespaces": 0,
    "innodb-data-file-path": "ibdata1:4M:autoextend",
    "aria-log-file-size": "8M",
    "enforce-storage-engine": "",
    "log-warnings": 0,
}
_REMEDIES = (
    ("No space left on device", "free space on this file system, or choose another directory."),
    ("Permission denied", "check who owns the directory; start it again as that user."),
    ("unknown variable", "correct the name in `settings`."),
    ("unknown option", "correct the name in `settings`."),
    ("error while loading shared libraries", "install the system library that is named."),
    ("Cannot allocate memory", "free memory, or give a smaller innodb-buffer-pool-size."),
)
# Becomes the account, and asks the kernel for death with its parent after that, since a change of
# account forgets it.
_LAUNCHER = """
import ctypes, os, sys
parent, uid, gid, *command = sys.argv[1:]
if int(uid) >= 0:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
if int(parent):
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(parent):
        sys.exit(1)
os.chdir("/")
os.umask(0o077)
os.execv(command[0], command)
"""


class MariaDbServer(EmbeddedServer):
    """A MariaDB 11.4 server with its data in a directory of its own.

    ::

        with MariaDbServer("/tmp/x/server", durable=False) as server:
            with server.connect() as connection:
                connection.cursor().execute("CREATE DATABASE his CHARACTER SET gbk")
            reader = Reader(server.dsn("his"))
            server.kill()      # SIGKILL.
            server.start()     # Recovers; same port, same data.

    It logs rows with full metadata and GTIDs and listens on 127.0.0.1 only. **Anyone on this
    machine may log in as `root` without a password**: it is for invented data. It ends with
    the process that started it, however that ends, unless `outlives`. Started by root, it
    runs as an account that owns nothing, and its data stand in /var/tmp where that account
    cannot walk to the directory: `remove` takes them away too. All methods may be called
    again without harm, and from several processes; none touches a server that was not
    started in this directory.

    Args:
      directory: made if missing; must be empty or of an earlier server.
      port: TCP port; 0 for one that is free, kept over restarts unless taken meanwhile.
      settings: options of `mariadbd` without `--`, over the defaults here; read at every start.
      durable: False trades survival of a power cut for speed.
      outlives: it runs on when this process ends, until `stop()`.
      progress: called with one line a second where a step takes longer than two.
    """

    product = "MariaDB"
    _port_taken = (
        "Can't start server: Bind on TCP/IP port",
        "Do you already have another server",
    )

    def __init__(
        self,
        directory: str | pathlib.Path,
        port: int = 0,
        settings: collections.abc.Mapping[str, str | int] | None = None,
        durable: bool = True,
        outlives: bool = False,
        progress: Progress = show_progress,
    ):
        super().__init__(directory, port, settings, progress)
        self.durable, self.outlives = durable, outlives

    @property
    def data(self) -> pathlib.Path:
        """MariaDB's data directory, with the binlog in it; not always below `directory`."""
        return pathlib.Path(self._state().get("data") or self.directory / "data")

    def dsn(self, database: str, user: str = SUPERUSER, password: str = "") -> str:
        """Returns the connection string of a database; see transforms/capture/mariadb/dsn.py."""
        secret = f":{password}" if password else ""
        return f"mariadb://{user}{secret}@{HOST}:{self.port}/{database}"

    def connect(
        self, database: str | None = None, user: str = SUPERUSER, **arguments
    ) -> pymysql.Connection:
        """Returns a new connection, by default in autocommit."""
        given = {"charset": "utf8mb4", "autocommit": True, "ssl_disabled": True} | arguments
        return pymysql.connect(host=HOST, port=self.port, user=user, database=database, **given)

    def start(self, timeout_s: float = 120.0) -> "MariaDbServer":
        """Starts the server, made first where there is none; returns when it is ready.

        Raises:
          ServerError: it cannot be made or started; what, where and the remedy.
          JarsError: its programs could not be fetched.
        """
        with self._alone():
            if not self.running:
                self._refuse_foreign_data()
                account = server_account(self.data)
                found = programs(account)
                if not self._state().get("made"):
                    self._make(found, account)
                self._launch(
                    lambda port: self._spawn(found, account, port),
                    lambda: self._says("ready for connections"),
                )
            self.wait_ready(timeout_s)
        return self

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stops the server and returns when it is gone; after `timeout_s` it is killed.

        Raises:
          ServerError: the server is another user's.
        """
        if not self.directory.exists():
            return
        with self._alone():
            process = self.process
            if process is not None:
                self._send(process, signal.SIGCONT)  # A frozen server hears nothing else.
                self._send(process, signal.SIGTERM)
                wait_gone([process], timeout_s)
            self._kill(self.process)

    def kill(self) -> None:
        """Kills the server with SIGKILL; returns when it is gone."""
        if self.directory.exists():
            with self._alone():
                self._kill(self.process)

    def remove(self) -> None:
        """Kills the server and takes away its data, wherever they are; log and notes stay."""
        if self.directory.exists():
            self.kill()
            with self._alone():
                shutil.rmtree(self.data, ignore_errors=True)
                self._note(made=False)

    def restart(self) -> "MariaDbServer":
        """Stops and starts; new `settings` take effect."""
        self.stop()
        return self.start()

    def freeze(self) -> None:
        """Stops the server where it stands (SIGSTOP): connections hang, none breaks."""
        if process := self.process:
            freeze(process)

    def thaw(self) -> None:
        """Lets a frozen server go on."""
        if process := self.process:
            self._send(process, signal.SIGCONT)

    def create_database(self, name: str, charset: str = "gbk") -> str:
        """Creates an empty database and returns its connection string.

        Raises:
          pymysql.err.ProgrammingError: there is one already.
        """
        quoted = name.replace("`", "``")
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE `{quoted}` CHARACTER SET {charset}")
        return self.dsn(name)

    # Below: plumbing, all of it under the directory's lock.

    def _says_ready(self) -> bool:
        with contextlib.suppress(pymysql.Error):
            self.connect(connect_timeout=1).close()
            return True
        return False

    def _make(self, found: MariaDbPrograms, account: Account) -> None:
        """Makes data directory and system tables; what an earlier try left is thrown away."""
        data = self.directory / "data"
        if account.uid is not None:
            self.directory.chmod(0o711)
            if not _can_walk(data.parent, account):
                data = _shelf(self.directory)
        self._note(data=str(data))
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        if account.uid is not None:
            os.chown(data, account.uid, account.gid)
        command = [*self._program(found), "--bootstrap", *_options(_MAKING)]
        self._log_from = nbytes(self.log)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                _launched(command, account, 0),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
            process.communicate(found.making)
        if process.returncode != 0:
            raise self._failure("MariaDB's system tables could not be made")
        self._note(made=True)

    def _program(self, found: MariaDbPrograms) -> list[str]:
        return [
            str(found.server),
            "--no-defaults",
            f"--lc-messages-dir={found.share}",
            f"--character-sets-dir={found.share / 'charsets'}",
            f"--datadir={self.data}",
            # In a shared one, two servers name their files alike.
            f"--tmpdir={self.data}",
        ]

    def _spawn(self, found: MariaDbPrograms, account: Account, port: int) -> None:
        settings = {**_SETTINGS, **(_DURABLE if self.durable else _NOT_DURABLE), **self.settings}
        command = [
            *self._program(found),
            f"--port={port}",
            "--socket=mariadb.sock",
            *_options(settings),
        ]
        self._log_from = nbytes(self.log)
        if self.outlives:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    _launched(command, account, 0),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        else:
            self._process = spawn(_launched(command, account, os.getpid()), self.log)
        self._note(port=port, process=identify(self._process.pid))

    def _kill(self, process: ProcessId | None) -> None:
        if process is not None:
            try:
                kill_tree(process)
            except PermissionError:
                raise self._not_ours() from None
        if self._process is not None:
            self._process.wait()

    def _failure(self, what: str) -> ServerError:
        lines = self._start_log()
        said, remedy = "", f"see {self.log}."
        for line in lines:
            if "[ERROR]" in line:
                said = line.partition("[ERROR]")[2].strip()
        for line in lines:
            found = [text for sign, text in _REMEDIES if sign in line]
            if found:
                remedy = found[0]
                break
        return ServerError(f"{self.directory}: {what}{said and f': {said}'}. Remedy: {remedy}")


def _options(settings: collections.abc.Mapping[str, str | int]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _launched(command: list[str], account: Account, parent: int) -> list[str]:
    uid = -1 if account.uid is None else account.uid
    numbers = [str(parent), str(uid), str(account.gid or 0)]
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *numbers, *command]


def _can_walk(directory: pathlib.Path, account: Account) -> bool:
    """Whether the account may go to the directory by its path."""
    for place in (directory, *directory.parents):
        found = place.stat()
        if not found.st_mode & (0o100 if found.st_uid == account.uid else 0o001):
            return False
    return True


def _shelf(directory: pathlib.Path) -> pathlib.Path:
    """Returns where root keeps the data of a server whose directory the account cannot reach."""
    _DATA_SHELF.mkdir(mode=0o711, exist_ok=True)
    found = _DATA_SHELF.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise PermissionError(13, "is not a directory of root's own", str(_DATA_SHELF))
    return _DATA_SHELF / hashlib.sha256(bytes(directory)).hexdigest()[:16]
