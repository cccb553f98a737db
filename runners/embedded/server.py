"""What every server of our own has: a directory, a lock on it, notes, a process and a port."""

import abc
import collections.abc
import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import time
import typing

from runners.embedded.binaries import ServerError, locked
from runners.embedded.ports import free_ports
from runners.embedded.process_tree import ProcessId, send
from runners.embedded.progress import Progress, SlowStep, show_progress

HOST = "127.0.0.1"

_PORT_TRIES = 20
_LOG_BYTES = 20_000


@dataclasses.dataclass(frozen=True)
class ServerStatus:
    """A server as it is now; `port` is None before its first start, `pid` while it is down."""

    running: bool
    port: int | None
    pid: int | None
    nbytes: int


class EmbeddedServer(abc.ABC):
    """A server whose process, port and log are noted in a directory of its own.

    All methods may be called again without harm, and from several processes; none touches a
    server that was not started in this directory.

    Args:
      directory: made if missing; must be empty or of an earlier server.
      port: TCP port; 0 for one that is free, kept over restarts.
      settings: the product's, over the defaults of the subclass; read again at every start.
      progress: called with one line a second where a step takes longer than two.
    """

    product: typing.ClassVar[str]
    _ended: typing.ClassVar[str] = "is not running"
    _poll_s: typing.ClassVar[float] = 0.02
    _port_taken: typing.ClassVar[tuple[str, ...]] = ()  # What the log says then.

    def __init__(
        self,
        directory: str | pathlib.Path,
        port: int = 0,
        settings: collections.abc.Mapping[str, typing.Any] | None = None,
        progress: Progress = show_progress,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.settings = dict(settings or {})
        self._wanted_port = port
        self._progress = progress
        self._process: subprocess.Popen | None = None
        self._log_from = 0  # Where in the log the last start begins.

    def __enter__(self) -> typing.Self:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    @abc.abstractmethod
    def start(self, timeout_s: float = 120.0) -> typing.Self:
        """Starts the server, made first where there is none; returns when it is ready."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Stops the server and returns when it is gone."""

    @property
    def data(self) -> pathlib.Path:
        """The server's data directory."""
        return self.directory / "data"

    @property
    def log(self) -> pathlib.Path:
        """What the server wrote; never a row's content."""
        return self.directory / "server.log"

    @property
    def port(self) -> int:
        """The server's port.

        Raises:
          ServerError: it was never started and no port was asked for.
        """
        port = self._state().get("port") or self._wanted_port
        if not port:
            raise ServerError(f"{self.directory}: was never started. Remedy: `start()` it.")
        return port

    @property
    def process(self) -> ProcessId | None:
        """The server's main process; None while it is down."""
        if self._process is not None:
            self._process.poll()  # Buries it, if it was ours and is dead.
        found = self._state().get("process")
        process = ProcessId(*found) if found else None
        return process if process is not None and process.alive else None

    @property
    def pid(self) -> int | None:
        """Number of the main process; None while it is down."""
        process = self.process
        return process.pid if process else None

    @property
    def running(self) -> bool:
        """Whether the main process lives; it may still be recovering, see `wait_ready`."""
        return self.process is not None

    def status(self, sized: bool = True) -> ServerStatus:
        """Returns the server as it is now; also where nothing was ever made.

        Without `sized`, `nbytes` is 0 and nothing is counted.
        """
        pid = self.pid
        port = self._state().get("port") or self._wanted_port or None
        paths = self.data.rglob("*") if sized and self.data.exists() else ()
        return ServerStatus(pid is not None, port, pid, sum(map(nbytes, paths)))

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Returns when the server accepts connections.

        Raises:
          ServerError: it ended, or is not ready after `timeout_s`.
        """
        began = time.monotonic()
        tell = SlowStep(self._progress)
        what = f"{self.directory.name}: {self.product} is starting"
        while True:
            if not self.running:
                raise self._failure(f"{self.product} {self._ended}")
            if self._says_ready():
                return
            if time.monotonic() - began > timeout_s:
                raise self._failure(f"{self.product} is not ready after {timeout_s:.0f} s")
            tell(what)
            time.sleep(self._poll_s)

    # Below: plumbing, all of it under the directory's lock.

    @abc.abstractmethod
    def _says_ready(self) -> bool:
        """Whether a client would be served now."""

    @contextlib.contextmanager
    def _alone(self) -> collections.abc.Iterator[None]:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.directory / "server.lock"):
                yield
        except OSError as error:
            raise self._os_failure(error) from error

    def _state(self) -> dict:
        try:
            return json.loads((self.directory / "server.json").read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{self.directory / 'server.json'}: cannot be read ({type(error).__name__}). "
                "Remedy: check its permissions; if it is damaged, choose another directory."
            ) from error

    def _note(self, **changes) -> None:
        new = self.directory / "server.json.new"
        new.write_text(json.dumps(self._state() | changes) + "\n")
        new.replace(self.directory / "server.json")

    def _launch(
        self,
        spawn: collections.abc.Callable[[int], None],
        listens: collections.abc.Callable[[], bool],
    ) -> None:
        """Starts the server and waits until it is past its port: another one where taken."""
        known = self._wanted_port or self._state().get("port")
        candidates = free_ports(HOST, bytes(self.directory))
        for attempt in range(_PORT_TRIES):
            spawn(known if known and attempt == 0 else next(candidates))
            while self.running and not listens():
                time.sleep(self._poll_s)
            if self.running:
                return
            if not self._says(*self._port_taken):
                raise self._failure(f"{self.product} does not start")
            if self._wanted_port:
                raise ServerError(
                    f"{self.directory}: port {self._wanted_port} is taken by another program. "
                    f"Remedy: stop it (`ss -ltnp 'sport = :{self._wanted_port}'` names it), "
                    "or choose another port."
                )
        raise self._failure(f"no free port on {HOST}")

    def _send(self, process: ProcessId, number: signal.Signals) -> None:
        try:
            send(process, number)
        except PermissionError:
            raise self._not_ours() from None

    def _not_ours(self) -> ServerError:
        return ServerError(
            f"{self.directory}: the server is another user's. Remedy: do this as that user."
        )

    def _refuse_foreign_data(self) -> None:
        if self.data.exists() and not self._state():
            raise ServerError(
                f"{self.directory}: holds data that was not made here. "
                "Remedy: choose an empty directory."
            )

    def _start_log(self) -> list[str]:
        """What the server, or what makes it, has written since it was last started."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self._log_from)
            return file.read()[-_LOG_BYTES:].decode(errors="replace").splitlines()
        return []

    def _says(self, *signs: str) -> bool:
        return any(sign in line for line in self._start_log() for sign in signs)

    def _failure(self, what: str) -> ServerError:
        return ServerError(f"{self.directory}: {what}. Remedy: see {self.log}.")

    def _os_failure(self, error: OSError) -> ServerError:
        return ServerError(
            f"{error.filename or self.directory}: {error.strerror or type(error).__name__}. "
            "Remedy: check the directory and its parents."
        )


def nbytes(path: pathlib.Path) -> int:
    """Returns a file's size; 0 where it is gone: the server works on."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
