"""A process and its children, told from later processes that were given the same number."""

import collections.abc
import contextlib
import functools
import os
import pathlib
import signal
import time
import typing

_PROC = pathlib.Path("/proc")
_POLL_S = 0.01


class ProcessId(typing.NamedTuple):
    """One process of this machine, for good: numbers are used again, start times are not.

    Attributes:
      pid: its number.
      started_ticks: kernel ticks from boot to its start.
      boot: the boot in which it runs.
    """

    pid: int
    started_ticks: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return identify(self.pid) == self


def identify(pid: int) -> ProcessId | None:
    """Returns who has this number now; None if nobody, or a zombie."""
    fields = _stat(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return ProcessId(pid, int(fields[19]), _boot())


def children_of(pid: int) -> list[ProcessId]:
    """Returns the direct children of a process."""
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields is not None and int(fields[1]) == pid:
                found.append(identify(int(entry.name)))
    return [child for child in found if child is not None]


def send(process: ProcessId, number: signal.Signals) -> bool:
    """Signals the process if it is still the same one; returns whether it was there.

    Raises:
      PermissionError: it is somebody else's.
    """
    with contextlib.suppress(ProcessLookupError):
        if process.alive:
            os.kill(process.pid, number)
            return True
    return False


def freeze(process: ProcessId) -> None:
    """Stops a process (SIGSTOP) and returns when none of its threads runs any more.

    The signal alone is no more than a wish: a thread that runs goes on until it is interrupted.
    """
    if not send(process, signal.SIGSTOP):
        return
    while process.alive and any(state not in "TtZX" for state in _thread_states(process.pid)):
        time.sleep(_POLL_S)


def _thread_states(pid: int) -> list[str]:
    states = []
    with contextlib.suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            if fields := _fields(task):
                states.append(fields[0])
    return states


def kill_tree(process: ProcessId) -> None:
    """Kills a process and its children with SIGKILL and returns when all are gone.

    The parent is stopped first, so that it cannot start another child meanwhile.
    """
    freeze(process)
    if not process.alive:
        return
    family = [*children_of(process.pid), process]
    for member in family:
        send(member, signal.SIGKILL)
    wait_gone(family, float("inf"))


def wait_gone(processes: collections.abc.Sequence[ProcessId], timeout_s: float) -> bool:
    """Waits until none of the processes lives; False if one still does after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while any(process.alive for process in processes):
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)
    return True


def _stat(pid: int) -> list[str] | None:
    return _fields(_PROC / str(pid))


def _fields(task: pathlib.Path) -> list[str] | None:
    """The fields of a task's `stat` after the command's name (which may hold anything)."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


@functools.cache
def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
