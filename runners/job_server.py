"""Beam's job server for Flink, in a JVM of our own."""

import collections.abc
import os
import pathlib
import shutil
import time

import grpc
from apache_beam.portability.api import beam_job_api_pb2_grpc
from apache_beam.utils.subprocess_server import pick_port

from runners import processes
from runners.java import find_java
from schemas.errors import CampusSyncError

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
LOCAL = ("[local]", "[auto]")  # Names of the Flink inside.
_READY_S = 60
_POLL_S = 0.25
_MESSAGE_BYTES_MAX = 2**31 - 1


class EngineError(CampusSyncError):
    """The engine cannot run the pipeline; the text says what to do and names the log."""


class FlinkJobServer(processes.Child):
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
        super().__init__()
        self.log = work_dir / "flink.log"
        self._class_path = class_path
        self._work_dir = work_dir
        self._master = "[local]" if master in LOCAL else master
        self._memory = memory
        self._java = java
        self._jvm_options = tuple(jvm_options)
        self._channel: grpc.Channel | None = None
        self.endpoint = ""

    def launch(self) -> None:
        """Starts the JVM without waiting for it.

        Raises:
          JavaMissing: there is no fitting Java.
        """
        java = find_java("Flink", self._java)
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
          EngineError: it does not come up. JavaMissing: no fitting Java.
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
        self._end(grace_s=2.0)
        shutil.rmtree(self._work_dir / "flink.tmp", ignore_errors=True)
