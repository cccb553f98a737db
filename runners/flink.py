"""Runs pipelines on Apache Flink: starts the engine, supervises it, leaves nothing behind."""

import collections.abc
import contextlib
import dataclasses
import enum
import logging
import os
import pathlib
import random
import shutil
import signal
import threading
import time
import typing

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
)
from apache_beam.runners.portability.portable_runner import PortableRunner

from runners import flink_cluster, jars, safe_log
from runners.flink_job import ENDED, FlinkJob, State, error_class
from runners.java import find_java
from runners.job_server import LOCAL, EngineError, FlinkJobServer
from runners.options import SyncOptions
from runners.pulse import read_at_pulse
from runners.workers import WorkerPool
from schemas.errors import CampusSyncError, ConfigError

_POLL_S = 0.25
_TAIL_BYTES = 64 << 10
_HEALTHY_S = 60  # A job that ran so long had no part in an earlier failure.
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_ROOM_BYTES = 32 << 20  # A start writes 22 MB, and takes them away with it.
_ROOM_S = 30  # How long room is waited for before a start is tried all the same.


class Outcome(enum.StrEnum):
    """How a run ended: the pipeline's sources ended, or it was asked to stop."""

    DONE = "done"
    STOPPED = "stopped"


@dataclasses.dataclass(frozen=True)
class Event:
    """What the supervisor reports: `kind` is starting, running, failed, stopping or ended."""

    kind: str
    attempt: int
    detail: str = ""


class _Failed(Exception):
    """One attempt has failed and another may succeed; the text is safe to print."""


class _Supervisor:
    """Keeps one pipeline running until it ends, is stopped, or fails too often."""

    def __init__(
        self,
        build: collections.abc.Callable[[beam.Pipeline], object],
        options: PipelineOptions,
        work_dir: pathlib.Path,
        stop: threading.Event,
        report: collections.abc.Callable[[Event], None],
        jitter: collections.abc.Callable[[], float],
        wait_for_room: bool = False,
        free_bytes: collections.abc.Callable[[pathlib.Path], int] | None = None,
    ):
        self._build = build
        self._options = options
        self._sync = options.view_as(SyncOptions)
        self._work_dir = work_dir
        self._stop = stop
        self._report = report
        self._jitter = jitter
        self._wait_for_room = wait_for_room
        self._free_bytes = free_bytes or (lambda path: shutil.disk_usage(path).free)
        self._attempt = 0
        self._running_since: float | None = None
        self._log_begin = 0
        # Whether the user runs the workers.
        self._own_environment = bool(options.view_as(PortableOptions).environment_type)
        master = options.view_as(FlinkRunnerOptions).flink_master
        self._cluster = None if master in LOCAL else master
        google = options.view_as(GoogleCloudOptions)  # Where Beam keeps every job's name.
        google.job_name = google.job_name or flink_cluster.job_name(work_dir)

    def run(self) -> Outcome:
        self._check()
        class_path = jars.fetch_jars(self._sync.maven_repository)
        find_java("Flink", self._sync.java)
        failures = 0
        while True:
            self._attempt += 1
            self._running_since = None
            try:
                return self._run_once(class_path)
            except _Failed as failure:
                why = str(failure)
                starved = not self._has_room()
                if starved:
                    why = f"no room in {self._work_dir}. Remedy: make room. What failed: {why}"
                self._report(Event("failed", self._attempt, why))
                if starved and self._wait_for_room:
                    # Starting anew does not help, and giving up would outlast a full disk.
                    self._await_room()
                else:
                    since = self._running_since
                    healthy = since is not None and time.monotonic() - since >= _HEALTHY_S
                    failures = 1 if healthy else failures + 1
                    self._pause(failures, why)
                if self._stop.is_set():
                    return Outcome.STOPPED

    def _pause(self, failures: int, why: str) -> None:
        """Waits before another start.

        Raises:
          EngineError: there were too many failures.
        """
        if failures > self._sync.restarts_max:
            raise EngineError(
                f"the pipeline failed {failures} times within {_HEALTHY_S} s of its "
                f"start; the last time: {why}. Nothing is lost: the ledgers say "
                f"where to go on. Remedy: run `campus-sync check`, then see "
                f"{self._work_dir / 'worker.log'} and {self._work_dir / 'flink.log'}."
            ) from None
        self._stop.wait(_BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] * (0.5 + self._jitter()))

    def _has_room(self) -> bool:
        try:
            return self._free_bytes(self._work_dir) >= _ROOM_BYTES
        except OSError:  # Then room is not what is missing.
            return True

    def _await_room(self) -> None:
        """Returns when there is room, or after a while: what a start needs is an estimate."""
        for _ in range(_ROOM_S):
            if self._stop.wait(1.0) or self._has_room():
                return

    def _check(self) -> None:
        flink = self._options.view_as(FlinkRunnerOptions)
        if self._sync.read == "pulse" and flink.parallelism not in (-1, 1):
            raise ConfigError(
                "--read=pulse needs --parallelism=1: every task would read each source. "
                "Remedy: leave --parallelism away; links run in parallel all the same."
            )

    def _run_once(self, class_path: tuple[pathlib.Path, ...]) -> Outcome:
        self._report(Event("starting", self._attempt))
        log = self._work_dir / "worker.log"
        self._log_begin = log.stat().st_size if log.exists() else 0
        master = self._options.view_as(FlinkRunnerOptions).flink_master
        server = FlinkJobServer(
            class_path, self._work_dir, master, self._sync.flink_memory, self._sync.java
        )
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            try:
                server.launch()
                pool = self._pool(stack)
                server.start()
            except CampusSyncError as error:
                raise _Failed(str(error)) from None
            except OSError as error:
                raise self._unwritten(error) from None
            if self._stop.is_set():
                return Outcome.STOPPED
            if self._cluster:
                self._cancel_on_cluster()  # A run that was killed may have left one.
                stack.callback(self._cancel_on_cluster)
            job = self._submit(server)
            stack.callback(job.close)
            stack.callback(job.cancel)
            return self._watch(job, server, pool)

    def _cancel_on_cluster(self) -> None:
        name = self._options.view_as(GoogleCloudOptions).job_name
        try:
            flink_cluster.cancel_jobs(self._cluster, name)
        except CampusSyncError as error:
            raise _Failed(str(error)) from None

    def _worker_error(self) -> str:
        """Class of the newest exception that a worker of this attempt logged, or ""."""
        try:
            with (self._work_dir / "worker.log").open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_begin if self._log_begin <= size else 0, size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return error_class(text) if safe_log.WITHHELD in text or "Traceback" in text else ""

    def _pool(self, stack: contextlib.ExitStack) -> WorkerPool | None:
        """Returns the pool of worker processes, or None where Beam or the user runs them."""
        portable = self._options.view_as(PortableOptions)
        if self._sync.workers == "thread":
            portable.environment_type = "LOOPBACK"
            return None
        if self._own_environment:
            return None
        pool = WorkerPool(self._options, self._work_dir / "worker.log")
        stack.callback(pool.stop)
        pool.start()
        portable.environment_type = "EXTERNAL"
        portable.environment_config = pool.address
        return pool

    def _submit(self, server: FlinkJobServer) -> FlinkJob:
        self._options.view_as(PortableOptions).job_endpoint = server.endpoint
        pipeline = beam.Pipeline(runner=PortableRunner(), options=self._options)
        self._build(pipeline)
        if self._sync.read == "pulse":
            read_at_pulse(pipeline)
        try:
            return FlinkJob(pipeline, server.jobs())
        except grpc.RpcError as error:
            raise _Failed(f"Flink did not take the pipeline ({error.code().name})") from None
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> _Failed:
        # Where a write fails, the error does not name the file.
        return _Failed(_no_room(error.filename or self._work_dir, error))

    def _watch(self, job: FlinkJob, server: FlinkJobServer, pool: WorkerPool | None) -> Outcome:
        while not self._stop.wait(_POLL_S):
            if not server.alive:
                raise _Failed("Flink's JVM ended")
            if pool is not None and not pool.alive:
                raise _Failed(pool.end())
            try:
                state = job.state()
            except grpc.RpcError as error:
                raise _Failed(f"Flink does not answer ({error.code().name})") from None
            if state == State.RUNNING and self._running_since is None:
                self._running_since = time.monotonic()
                self._report(Event("running", self._attempt))
            if state in (State.DONE, State.DRAINED):
                self._report(Event("ended", self._attempt))
                return Outcome.DONE
            if state in ENDED:
                error = self._worker_error() or job.error()
                cause = f": {error}" if error else ""
                raise _Failed(f"the job is {State.Enum.Name(state)}{cause}")
        self._report(Event("stopping", self._attempt))
        return Outcome.STOPPED


def run_on_flink(
    build: collections.abc.Callable[[beam.Pipeline], object],
    options: PipelineOptions,
    work_dir: pathlib.Path,
    stop: threading.Event | None = None,
    report: collections.abc.Callable[[Event], None] = lambda event: None,
    jitter: collections.abc.Callable[[], float] = random.random,
    wait_for_room: bool = False,
) -> Outcome:
    """Runs a pipeline on Flink until its sources end or it is asked to stop.

    If a worker, the JVM or the job dies, all are started anew after a pause that doubles; the
    ledgers in the stores say where each link goes on, so nothing of the engine's is kept.

    Args:
      build: wires the pipeline; called once an attempt.
      options: from `options.parse`; `--flink_master host:port` uses a cluster.
      work_dir: `flink.log`, `worker.log` and this process's `job.log` go there.
      stop: ends the run when set. Without it, and in the main thread, SIGINT and SIGTERM do;
        a second SIGINT does not wait for the job's end.
      report: hears of each start, failure and end, from this thread.
      jitter: 0..1, spreads the pauses of many installations.
      wait_for_room: failures while the disk of `work_dir` is full are not counted.

    Returns:
      DONE or STOPPED; either way no process is left.

    Raises:
      EngineError: more than `--restarts_max` failures in a row, or no `work_dir` can be made.
      JavaMissing: no Java.
      JarsError: the engine's libraries cannot be had.
    """
    with _logging_to(work_dir / "job.log"), _stopped_by_signals(stop) as event:
        return _Supervisor(build, options, work_dir, event, report, jitter, wait_for_room).run()


def _no_room(where: object, error: OSError) -> str:
    what = error.strerror or type(error).__name__
    return f"{where}: {what}. Remedy: make room there, or let this user write there."


@contextlib.contextmanager
def _logging_to(path: pathlib.Path) -> typing.Iterator[None]:
    """Sends what libraries log in this process to a file, for the time of a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(_no_room(path.parent, error)) from None
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(safe_log.SafeFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event | None) -> typing.Iterator[threading.Event]:
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stop or threading.Event()
        return
    event = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number, frame):
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
