"""Runs pipelines on Apache Flink: starts the engine, supervises it, leaves nothing behind."""

import collections.abc
import contextlib
import dataclasses
import enum
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
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
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.utils.subprocess_server import pick_port

from runners import flink_cluster, jars, processes, safe_log
from runners.options import SyncOptions
from runners.pulse import read_at_pulse
from runners.workers import WorkerPool
from schemas.errors import CampusSyncError, ConfigError

JAVA_VERSIONS = (11, 17)  # What Flink 1.19 runs on; tested with 17.
_MAIN_CLASS = "org.apache.beam.runners.flink.FlinkJobServerDriver"
OPENED = (  # To reflection, which Flink's serialisers use.
    "java.lang",
    "java.lang.invoke",
    "java.time",
    "java.util",
    "java.util.concurrent",
    "java.nio",
    "sun.net.util",
)
_LOCAL = ("[local]", "[auto]")
_READY_S = 60
_CANCEL_S = 5  # A job that is not gone by then goes with its JVM.
_POLL_S = 0.25
_MESSAGES_S = 3
_TAIL_BYTES = 64 << 10
_HEALTHY_S = 60  # A job that ran so long had no part in an earlier failure.
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_MESSAGE_BYTES_MAX = 2**31 - 1

State = beam_job_api_pb2.JobState
_ENDED = frozenset((State.DONE, State.DRAINED, State.FAILED, State.CANCELLED, State.STOPPED))


class EngineError(CampusSyncError):
    """The engine cannot run the pipeline; the text says what to do and names the log."""


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


def find_java(java: str | None = None) -> str:
    """Returns the path of a Java that Flink runs on: `java`, $JAVA_HOME's, or the PATH's.

    Raises:
      EngineError: there is none, or it is of another version.
    """
    home = os.environ.get("JAVA_HOME")
    wanted = java or (os.path.join(home, "bin", "java") if home else "java")
    path = shutil.which(wanted)
    remedy = (
        "Remedy: install Java 17 (Debian: `apt-get install openjdk-17-jre-headless`; RHEL: "
        "`dnf install java-17-openjdk-headless`) and name it by --java or JAVA_HOME."
    )
    if path is None:
        raise EngineError(f"Flink needs Java 17 and `{wanted}` is not there. {remedy}")
    answer = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30)
    found = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    version = int(found[1]) if found else 0
    if version not in JAVA_VERSIONS:
        raise EngineError(f"Flink needs Java 17 and {path} is version {version or '?'}. {remedy}")
    return path


class FlinkJobServer:
    """Beam's job server in a JVM of its own, with a Flink inside unless `master` names one.

    The JVM dies with this process, however this one ends. Its output goes to `log`.
    """

    def __init__(
        self,
        class_path: collections.abc.Sequence[pathlib.Path],
        work_dir: pathlib.Path,
        master: str = "[local]",
        memory: str = "1g",
        java: str | None = None,
        jvm_options: collections.abc.Sequence[str] = (),
    ):
        self.log = work_dir / "flink.log"
        self._class_path = class_path
        self._work_dir = work_dir
        self._master = "[local]" if master in _LOCAL else master
        self._memory = memory
        self._java = java
        self._jvm_options = tuple(jvm_options)
        self._process: subprocess.Popen | None = None
        self._channel: grpc.Channel | None = None
        self.endpoint = ""

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

    def launch(self) -> None:
        """Starts the JVM without waiting for it.

        Raises:
          EngineError: there is no fitting Java.
        """
        java = find_java(self._java)
        port, artifact_port, expansion_port = pick_port(None, None, None)
        self.endpoint = f"127.0.0.1:{port}"
        scratch = self._work_dir / "flink.tmp"
        shutil.rmtree(scratch, ignore_errors=True)  # Of a run that was killed.
        scratch.mkdir(parents=True)
        arguments = self._work_dir / "flink.args"
        class_path = os.pathsep.join(str(jar) for jar in self._class_path)
        arguments.write_text(f'-cp "{class_path}"\n', encoding="utf-8")
        command = [
            java,
            f"-Xmx{self._memory}",
            # It moves bytes and waits: what a hotter compiler or collector gains is less than
            # they take from two cores while a backlog drains.
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            "-XX:+ExitOnOutOfMemoryError",  # Half dead is worse: the supervisor sees an exit.
            *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED),
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
            f"-Djava.io.tmpdir={scratch}",
            *self._jvm_options,
            f"@{arguments}",
            _MAIN_CLASS,
            *("--job-host", "127.0.0.1"),
            *("--job-port", str(port)),
            *("--artifact-port", str(artifact_port)),
            *("--expansion-port", str(expansion_port)),
            *("--artifacts-dir", str(scratch)),
            *("--flink-master", self._master),
        ]
        self._process = processes.spawn(command, self.log)

    def start(self) -> None:
        """Returns when the job server answers.

        Raises:
          EngineError: no fitting Java, or it does not come up.
        """
        if self._process is None:
            self.launch()
        self._channel = grpc.insecure_channel(
            self.endpoint,
            options=[
                ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
            ],
        )
        ready = grpc.channel_ready_future(self._channel)
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                ready.result(timeout=_POLL_S)
                return
            except grpc.FutureTimeoutError:
                if self.alive and time.monotonic() < deadline:
                    continue
                self.stop()
                raise EngineError(
                    f"Flink's JVM does not start; the reason stands at the end of {self.log}. "
                    f"Often there is less memory free than --flink_memory={self._memory} needs."
                ) from None

    def jobs(self) -> beam_job_api_pb2_grpc.JobServiceStub:
        """Returns a stub of Beam's job service."""
        return beam_job_api_pb2_grpc.JobServiceStub(self._channel)

    def stop(self) -> None:
        """Ends the JVM; returns when it is gone."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            processes.stop(self._process, grace_s=2.0)
            self._process = None
        shutil.rmtree(self._work_dir / "flink.tmp", ignore_errors=True)


class _Failed(Exception):
    """One attempt has failed and another may succeed; the text is safe to print."""


class _Job:
    """One submitted pipeline: its state, its cancellation, the class of its last error."""

    def __init__(self, pipeline: beam.Pipeline, jobs: beam_job_api_pb2_grpc.JobServiceStub):
        self._jobs = jobs
        self._result = pipeline.run()
        self._id = self._result._job_id
        self._error = ""
        self._listener = threading.Thread(target=self._listen, name="flink-messages", daemon=True)
        self._listener.start()

    def error(self) -> str:
        """Class of the newest error of an ended job; not its text, which may quote a patient's."""
        self._listener.join(_MESSAGES_S)  # The messages may come a moment after the state.
        return self._error

    def state(self) -> int:
        """Raises grpc.RpcError if the job server does not answer."""
        request = beam_job_api_pb2.GetJobStateRequest(job_id=self._id)
        return self._jobs.GetState(request, timeout=_CANCEL_S).state

    def cancel(self) -> None:
        """Asks the job to end and waits for it, a few seconds at most."""
        with contextlib.suppress(grpc.RpcError):
            if self.state() in _ENDED:
                return
            request = beam_job_api_pb2.CancelJobRequest(job_id=self._id)
            self._jobs.Cancel(request, timeout=_CANCEL_S)
            deadline = time.monotonic() + _CANCEL_S
            while time.monotonic() < deadline and self.state() not in _ENDED:
                time.sleep(_POLL_S / 5)

    def close(self) -> None:
        """Ends what Beam started in this process for the job."""
        self._result._cleanup()

    def _listen(self) -> None:
        request = beam_job_api_pb2.JobMessagesRequest(job_id=self._id)
        with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: channel closed.
            for message in self._jobs.GetMessageStream(request):
                text = message.message_response.message_text
                importance = message.message_response.importance
                if importance == beam_job_api_pb2.JobMessage.JOB_MESSAGE_ERROR:
                    self._error = error_class(text) or self._error


def error_class(text: str) -> str:
    """Returns the innermost exception class that an engine's message names, or ""."""
    python = text.rpartition("Traceback (most recent call last)")[2]
    found = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Timeout))\b", python, re.M)
    if not found:
        found = re.findall(r"([A-Za-z_][\w.$]*(?:Error|Exception))\b", text)
    return found[-1] if found else ""


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
    ):
        self._build = build
        self._options = options
        self._sync = options.view_as(SyncOptions)
        self._work_dir = work_dir
        self._stop = stop
        self._report = report
        self._jitter = jitter
        self._attempt = 0
        self._running_since: float | None = None
        self._log_begin = 0
        self._own_environment = False
        master = options.view_as(FlinkRunnerOptions).flink_master
        self._cluster = None if master in _LOCAL else master
        google = options.view_as(GoogleCloudOptions)  # Where Beam keeps every job's name.
        google.job_name = google.job_name or flink_cluster.job_name(work_dir)

    def run(self) -> Outcome:
        self._check()
        class_path = jars.fetch_jars(self._sync.maven_repository)
        find_java(self._sync.java)
        failures = 0
        while True:
            self._attempt += 1
            self._running_since = None
            try:
                return self._run_once(class_path)
            except _Failed as failure:
                since = self._running_since
                healthy = since is not None and time.monotonic() - since >= _HEALTHY_S
                failures = 1 if healthy else failures + 1
                self._report(Event("failed", self._attempt, str(failure)))
                if failures > self._sync.restarts_max:
                    raise EngineError(
                        f"the pipeline failed {failures} times within {_HEALTHY_S} s of its "
                        f"start; the last time: {failure}. Nothing is lost: the ledgers say "
                        f"where to go on. Remedy: run `campus-sync check`, then see "
                        f"{self._work_dir / 'worker.log'} and {self._work_dir / 'flink.log'}."
                    ) from None
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] * (0.5 + self._jitter())
                if self._stop.wait(pause):
                    return Outcome.STOPPED

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
            server.launch()
            try:
                pool = self._pool(stack)
                server.start()
            except CampusSyncError as error:
                raise _Failed(str(error)) from None
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
        if portable.environment_type and self._attempt == 1:
            self._own_environment = True
        if self._own_environment:
            return None
        pool = WorkerPool(self._options, self._work_dir / "worker.log")
        stack.callback(pool.stop)
        pool.start()
        portable.environment_type = "EXTERNAL"
        portable.environment_config = pool.address
        return pool

    def _submit(self, server: FlinkJobServer) -> _Job:
        self._options.view_as(PortableOptions).job_endpoint = server.endpoint
        pipeline = beam.Pipeline(runner=PortableRunner(), options=self._options)
        self._build(pipeline)
        if self._sync.read == "pulse":
            read_at_pulse(pipeline)
        try:
            return _Job(pipeline, server.jobs())
        except grpc.RpcError as error:
            raise _Failed(f"Flink did not take the pipeline ({error.code().name})") from None

    def _watch(self, job: _Job, server: FlinkJobServer, pool: WorkerPool | None) -> Outcome:
        while not self._stop.wait(_POLL_S):
            if not server.alive:
                raise _Failed("Flink's JVM ended")
            if pool is not None and not pool.alive:
                raise _Failed("the Python workers' pool ended")
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
            if state in _ENDED:
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

    Returns:
      DONE or STOPPED; either way no process is left.

    Raises:
      EngineError: no Java, or more than `--restarts_max` failures in a row.
      JarsError: the engine's libraries cannot be had.
    """
    with _logging_to(work_dir / "job.log"), _stopped_by_signals(stop) as event:
        return _Supervisor(build, options, work_dir, event, report, jitter).run()


@contextlib.contextmanager
def _logging_to(path: pathlib.Path) -> typing.Iterator[None]:
    """Sends what libraries log in this process to a file, for the time of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
