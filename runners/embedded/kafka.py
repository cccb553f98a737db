"""A Kafka broker of our own, made in a directory and gone with it."""

import os
import pathlib
import signal
import socket
import subprocess
import time

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from runners.embedded.ports import free_ports
from runners.embedded.process_tree import identify, kill_tree, send, wait_gone
from runners.embedded.server import HOST, EmbeddedServer
from runners.jars import fetch_jars, read_lock
from runners.java import find_java

LOCK_FILE = pathlib.Path(__file__).parents[1] / "kafka.lock"
_CLUSTER = "Y2FtcHVzLXN5bmMtdGVzdA"  # A cluster's id is 16 bytes in base64; ours says what it is.
_POLL_S = 0.05
_HEAP = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_SETTINGS: dict[str, str | int] = {
    "process.roles": "broker,controller",
    "node.id": 1,
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    # One broker holds the only copy of everything.
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 1,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 1,
    "share.coordinator.state.topic.replication.factor": 1,
    "share.coordinator.state.topic.min.isr": 1,
    "group.initial.rebalance.delay.ms": 0,
    # A killed broker's own earlier life must first be given up by its controller.
    "broker.heartbeat.interval.ms": 500,
    "broker.session.timeout.ms": 2500,
}


class KafkaServer(EmbeddedServer):
    """A Kafka broker and its controller in one process (KRaft), with its data in a directory.

    ::

        with KafkaServer("/tmp/x/kafka") as server:
            server.create_topic("campus")
            stream = EventStream(server.bootstrap, "campus", START)
            server.kill()      # SIGKILL.
            server.start()     # Recovers; same port, same data.

    It listens on 127.0.0.1 only, for anyone on this machine: it is for invented data. It
    outlives this process until `stop()`; another process with the same directory can take it
    over. All methods may be called again without harm. Needs Java 17 or later.

    Args:
      directory: made if missing; must be empty or of an earlier broker.
      port: TCP port; 0 for one that is free, kept over restarts.
      settings: the broker's, over the defaults here; read again at every start.
      progress: called with one line a second where a step takes longer than two.
    """

    product = "Kafka"
    _ended = "ended"
    _poll_s = _POLL_S

    @property
    def bootstrap(self) -> str:
        """What clients connect to, `host:port`."""
        return f"{HOST}:{self.port}"

    def start(self, timeout_s: float = 120.0) -> "KafkaServer":
        """Starts the broker, made first where there is none; returns when it answers.

        Raises:
          ServerError: it cannot be made or started. JarsError: its libraries cannot be fetched.
        """
        with self._alone():
            if not self.running:
                self._spawn()
            self.wait_ready(timeout_s)
        return self

    def stop(self, timeout_s: float = 20.0) -> None:
        """Stops the broker, by force after `timeout_s`, and returns when it is gone."""
        process = self.process
        if process is not None:
            send(process, signal.SIGCONT)
            send(process, signal.SIGTERM)
            if not wait_gone([process], timeout_s):
                kill_tree(process)
        if self._process is not None:
            self._process.wait()

    def kill(self) -> None:
        """Kills the broker with SIGKILL; returns when it is gone."""
        process = self.process
        if process is not None:
            kill_tree(process)
        if self._process is not None:
            self._process.wait()

    def admin(self) -> AdminClient:
        """Returns a new client for the broker's own matters."""
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def create_topic(
        self, name: str, partitions: int = 1, settings: dict[str, str] | None = None
    ) -> None:
        """Creates a topic and returns when it has a leader.

        Raises:
          KafkaException: there is one already.
        """
        admin = self.admin()
        topic = NewTopic(name, partitions, 1, config=settings or {})
        admin.create_topics([topic])[name].result(timeout=30)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = admin.list_topics(name, timeout=10).topics[name].partitions
            if len(found) == partitions and all(p.leader >= 0 for p in found.values()):
                return
            time.sleep(_POLL_S)
        raise self._failure(f"topic {name} gets no leader")

    def delete_topic(self, name: str) -> None:
        """Deletes a topic and returns when it is gone."""
        admin = self.admin()
        admin.delete_topics([name])[name].result(timeout=30)
        while name in admin.list_topics(timeout=10).topics:
            time.sleep(_POLL_S)

    def _spawn(self) -> None:
        java, jars = find_java("Kafka"), fetch_jars(jars=read_lock(LOCK_FILE), what="Kafka")
        ports = free_ports(HOST, bytes(self.directory))
        port = self._state().get("port") or self._wanted_port or next(ports)
        controller = next(candidate for candidate in ports if candidate != port)
        config = self._write_settings(port, controller)
        command = [java, *_HEAP, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        command += ["-cp", os.pathsep.join(map(str, jars))]
        with self.log.open("ab") as log:
            if not (self.directory / "data" / "meta.properties").exists():
                tool = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", str(config)]
                done = subprocess.run([*command, *tool], stdout=log, stderr=log, check=False)
                if done.returncode:
                    raise self._failure("Kafka's storage cannot be made")
            self._process = subprocess.Popen(
                [*command, "kafka.Kafka", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )
        self._note(port=port, process=identify(self._process.pid))

    def _write_settings(self, port: int, controller: int) -> pathlib.Path:
        settings = {
            **_SETTINGS,
            **self.settings,
            "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "log.dirs": str(self.directory / "data"),
        }
        path = self.directory / "server.properties"
        path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return path

    def _says_ready(self) -> bool:
        # The client speaks of every refused connection on stderr: ask it once there is one.
        try:
            socket.create_connection((HOST, self.port), 1).close()
            return bool(self.admin().list_topics(timeout=2).brokers)
        except (OSError, KafkaException):
            return False
