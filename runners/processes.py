"""Child processes that never outlive us, not even a `kill -9`."""

import abc
import collections.abc
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import typing

# Runs before the child proper: asks the kernel to kill it when its parent dies, and makes sure
# that the parent has not died already. A preexec_fn would fork in a process with gRPC threads.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# The kernel watches the thread that forked, so one thread that lives as long as we forks all.
_FORKER = concurrent.futures.ThreadPoolExecutor(1, "fork")
_LOG_BYTES_MAX = 64 << 20


def spawn(
    command: collections.abc.Sequence[str],
    log: pathlib.Path,
    env: collections.abc.Mapping[str, str] | None = None,
    pipe: bool = False,
) -> subprocess.Popen:
    """Starts a child in a process group of its own that is killed when this process dies.

    Its output is appended to `log` (begun anew, the old one kept as `<log>.1`, beyond 64 MiB);
    with `pipe` its standard output is a pipe instead. A Ctrl-C does not reach it.

    Raises:
      OSError: the program or the log's directory does not exist.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _LOG_BYTES_MAX:
        log.replace(log.with_name(log.name + ".1"))
    with log.open("ab") as file:
        return _FORKER.submit(
            subprocess.Popen,
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipe else file,
            stderr=file,
            env=env,
            start_new_session=True,
        ).result()


def stop(process: subprocess.Popen, grace_s: float = 5.0) -> None:
    """Ends a child: SIGTERM, then SIGKILL after `grace_s`; returns when it is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Child(abc.ABC):
    """One child process of ours that is started and stopped; as a context, both.

    What inherits from it puts what `spawn` returns into `_process`.
    """

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> typing.Self:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @abc.abstractmethod
    def start(self) -> None:
        """Returns when it serves."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Returns when it is gone."""

    def _end(self, grace_s: float = 5.0) -> None:
        if self._process is not None:
            stop(self._process, grace_s)
            self._process = None
