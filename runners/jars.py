"""Jars that we run, from Maven: fetched once, checked against a lock, kept in a cache."""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
import typing

from apache_beam.utils.subprocess_server import JavaJarServer

from schemas.errors import CampusSyncError

LOCK_FILE = pathlib.Path(__file__).with_name("flink.lock")
MARIADB_LOCK_FILE = LOCK_FILE.with_name("mariadb.lock")
REPOSITORY_VARIABLE = "CAMPUS_SYNC_MAVEN_REPOSITORY"
CACHE_VARIABLE = "CAMPUS_SYNC_JAR_CACHE"
_THREADS = 8
_TRIES = 3
_STALL_S = 60  # A server that sends nothing for so long is given up.
_QUIET_S = 2  # Progress is shown only where somebody waits longer than this.
_BEAM_LOGGER = logging.getLogger("apache_beam.utils.subprocess_server")

Progress = collections.abc.Callable[[int, int, int, int], None]


class JarsError(CampusSyncError):
    """The libraries could not be fetched or are not what the lock says."""


@dataclasses.dataclass(frozen=True)
class Jar:
    """One line of the lock: Maven coordinates, SHA-256 in hexadecimal, size in bytes."""

    group: str
    artifact: str
    version: str
    sha256: str
    nbytes: int

    @property
    def file_name(self) -> str:
        return JavaJarServer.jar_name(self.artifact, self.version)

    @property
    def coordinates(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"

    def url(self, repository: str) -> str:
        return JavaJarServer.path_to_maven_jar(
            self.artifact, self.group, self.version, repository.rstrip("/")
        )


def read_lock(path: pathlib.Path = LOCK_FILE) -> tuple[Jar, ...]:
    """Returns the jars of a lock file, in class path order."""
    jars = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line and not line.startswith("#"):
            sha256, nbytes, coordinates = line.split()
            group, artifact, version = coordinates.split(":")
            jars.append(Jar(group, artifact, version, sha256, int(nbytes)))
    return tuple(jars)


def make_lock(listing: str, jars_dir: pathlib.Path) -> str:
    """Returns the lines of a lock for resolved jars, for whoever moves to another version.

    `python -m runners.jars LISTING DIRECTORY` prints them.

    Args:
      listing: output of `mvn dependency:list`, `group:artifact:jar:version:scope` lines.
      jars_dir: where `mvn dependency:copy-dependencies` put them.
    """
    lines = []
    for entry in sorted(word for word in listing.split() if word.count(":") == 4):
        group, artifact, _, version, _ = entry.split(":")
        path = jars_dir / JavaJarServer.jar_name(artifact, version)
        lines.append(f"{_sha256(path)} {path.stat().st_size:>9} {group}:{artifact}:{version}\n")
    return "".join(lines)


def default_cache() -> pathlib.Path:
    """Returns the user's jar cache: $CAMPUS_SYNC_JAR_CACHE, else below $XDG_CACHE_HOME."""
    if own := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "campus-sync" / "jars"


def fetch_jars(
    repository: str | None = None,
    cache: pathlib.Path | None = None,
    jars: tuple[Jar, ...] | None = None,
    progress: Progress | None = None,
    what: str = "Flink",
) -> tuple[pathlib.Path, ...]:
    """Returns the paths of all jars, each checked against its SHA-256 just now.

    What the cache holds is not fetched again, so a second start needs no network. One
    process fetches at a time; the others wait and then find the cache filled. A partial or
    wrong download never reaches the cache.

    Args:
      repository: Maven repository, `https://` or `file://`; by default
        $CAMPUS_SYNC_MAVEN_REPOSITORY, else Maven Central.
      cache: directory; by default `default_cache()`.
      jars: by default those of `flink.lock`.
      progress: called about once a second, with files and bytes done and in all, once
        the work has taken two seconds; by default it writes a line to stderr.
      what: the jars' name in that line.

    Raises:
      JarsError: a jar could not be fetched, or its content is not what the lock says.
    """
    jars = read_lock() if jars is None else jars
    cache = default_cache() if cache is None else cache
    repository = (
        repository or os.environ.get(REPOSITORY_VARIABLE) or JavaJarServer.MAVEN_CENTRAL_REPOSITORY
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        missing = _missing(jars, cache, pool)
        if missing:
            with _only_process(cache), _quiet_beam():
                missing = _missing(missing, cache, pool)  # Another process may have been first.
                _fetch(missing, repository, cache, pool, progress or functools.partial(_show, what))
    return tuple(cache / jar.file_name for jar in jars)


def _missing(
    jars: collections.abc.Sequence[Jar],
    cache: pathlib.Path,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> tuple[Jar, ...]:
    good = pool.map(lambda jar: _is_good(cache / jar.file_name, jar), jars)
    return tuple(jar for jar, is_good in zip(jars, good, strict=True) if not is_good)


def _is_good(path: pathlib.Path, jar: Jar) -> bool:
    """Whether the cached file is the locked one; a file that is not is deleted."""
    try:
        if path.stat().st_size == jar.nbytes and _sha256(path) == jar.sha256:
            return True
        path.unlink(missing_ok=True)
    except OSError:  # Not there, or not to be read: fetching says which.
        pass
    return False


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(
    jars: tuple[Jar, ...],
    repository: str,
    cache: pathlib.Path,
    pool: concurrent.futures.ThreadPoolExecutor,
    progress: Progress,
) -> None:
    incoming = pathlib.Path(tempfile.mkdtemp(prefix=".incoming-", dir=cache))
    started = last = time.monotonic()
    done = nbytes = 0
    total = sum(jar.nbytes for jar in jars)
    failures = []
    try:
        tasks = {pool.submit(_fetch_one, jar, repository, cache, incoming): jar for jar in jars}
        while tasks:
            ended, _ = concurrent.futures.wait(tasks, 1, concurrent.futures.FIRST_COMPLETED)
            for task in ended:
                jar = tasks.pop(task)
                if failure := task.result():
                    failures.append(failure)
                    for other in tasks:
                        other.cancel()
                    tasks = {other: jar for other, jar in tasks.items() if not other.cancelled()}
                done, nbytes = done + 1, nbytes + jar.nbytes
            now = time.monotonic()
            if now - started > _QUIET_S and (now - last >= 1 or not tasks):
                last = now
                progress(done, len(jars), nbytes, total)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    if failures:
        raise JarsError("\n".join(sorted(failures)))


def _fetch_one(
    jar: Jar, repository: str, cache: pathlib.Path, incoming: pathlib.Path
) -> str | None:
    """Fetches one jar into the cache; returns what is wrong, or None."""
    url = jar.url(repository)
    failure = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(attempt)
        try:
            path = pathlib.Path(JavaJarServer.local_jar(url, str(incoming)))
        except (OSError, RuntimeError) as error:
            failure = (
                f"{jar.coordinates}: could not be fetched from {url} ({_reason(error)}).\n"
                f"  Remedy: allow the host, or name a mirror in {REPOSITORY_VARIABLE}, or copy "
                f"{jar.file_name} into {cache}."
            )
            continue
        if (found := _sha256(path)) == jar.sha256:
            path.replace(cache / jar.file_name)
            return None
        path.unlink()
        failure = (
            f"{jar.coordinates}: {url} has SHA-256 {found}, the lock says {jar.sha256}; it was "
            f"deleted and not used.\n  Remedy: the mirror or the connection gives another file; "
            f"fetch it from Maven Central, and tell your security team if it differs again."
        )
    return failure


def _reason(error: BaseException) -> str:
    """The innermost cause: Beam wraps it in a paragraph."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(getattr(error, "reason", None) or error) or type(error).__name__


@contextlib.contextmanager
def _only_process(cache: pathlib.Path) -> typing.Iterator[None]:
    """Holds the cache's lock; the kernel lets it go when the process dies."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / ".lock").open("w")
    except OSError as error:
        raise JarsError(
            f"{cache}: {error.strerror}. Remedy: give a writable directory in {CACHE_VARIABLE}."
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(".incoming-*"):  # Of a process that was killed.
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def _quiet_beam() -> typing.Iterator[None]:
    """Beam warns once a jar of what the lock takes care of, and waits without end."""
    level, timeout = _BEAM_LOGGER.level, socket.getdefaulttimeout()
    _BEAM_LOGGER.setLevel(logging.ERROR)
    socket.setdefaulttimeout(_STALL_S)
    try:
        yield
    finally:
        _BEAM_LOGGER.setLevel(level)
        socket.setdefaulttimeout(timeout)


def _show(what: str, done: int, of: int, nbytes: int, total: int) -> None:
    end = "\r" if sys.stderr.isatty() and done < of else "\n"
    print(
        f"Fetching {what}: {done}/{of} files, {nbytes >> 20}/{total >> 20} MiB",
        end=end,
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    _listing, _directory = map(pathlib.Path, sys.argv[1:])
    sys.stdout.write(make_lock(_listing.read_text("utf-8"), _directory))
