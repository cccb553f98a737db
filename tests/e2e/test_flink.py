"""Flink for real: it runs, survives kills of each part, stops in seconds, leaves nothing behind."""

import contextlib
import json
import os
import pathlib
import queue
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from apache_beam.utils.subprocess_server import pick_port

from runners.flink_job import error_class
from runners.jars import fetch_jars
from runners.java import JavaMissing, find_java
from runners.job_server import OPENED
from runners.processes import spawn, stop
from tests.e2e.flink_job import ledger_of

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("flink")  # Two at a time starve each other.


def descendants(pid: int) -> dict[int, str]:
    """Returns the living descendants of a process with their command lines."""
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in map(int, task.read_text().split()):
                    command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
                    found[child] = command.replace(b"\0", b" ").decode(errors="replace")
                    todo.append(child)
    return found


def alive(pids) -> list[int]:
    living = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                living.append(pid)
    return living


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Job:
    """flink_job.py as a child process."""

    def __init__(self, directory: pathlib.Path, *flags: str):
        self.dir = directory
        self.ledger = directory / "ledger"
        self.ledger.write_text("")
        self.events: queue.Queue = queue.Queue()
        self.errors = (directory / "stderr").open("w+")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.e2e.flink_job"),
                *("--ledger", str(self.ledger), "--dir", str(directory / "work"), *flags),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.events.put(tuple(json.loads(line)))

    def expect(self, kind: str, seconds: float = 90) -> str:
        """Waits for an event and returns its detail."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found, detail = self.events.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no `{kind}`; {self.diagnosis()}") from None
            if found == kind:
                return detail

    def numbers(self) -> list[int]:
        return [line["n"] for line in ledger_of(str(self.ledger))]

    def progress(self, more: int = 20, seconds: float = 60) -> None:
        target = len(self.numbers()) + more
        until(lambda: len(self.numbers()) >= target, seconds, f"{target}; {self.diagnosis()}")

    def child(self, word: str) -> int:
        return until(
            lambda: next((p for p, c in descendants(self.process.pid).items() if word in c), None),
            30,
            f"a process with {word}",
        )

    def diagnosis(self) -> str:
        text = ""
        for name in ("stderr", "work/worker.log", "work/flink.log"):
            with contextlib.suppress(OSError):
                text += f"\n== {name}\n{(self.dir / name).read_text()[-1500:]}"
        return text

    def close(self) -> None:
        children = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._listener.join()
        self.errors.close()
        until(lambda: not alive(children), 10, f"end of {children}")


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start(*flags: str) -> Job:
        jobs.append(Job(tmp_path, *flags))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def test_recovers_from_kills_and_leaves_nothing_when_killed_itself(start):
    job = start()
    job.expect("running")
    job.progress()
    for word in ("workers work", "FlinkJobServerDriver", "workers pool", "workers work"):
        os.kill(job.child(word), signal.SIGKILL)
        job.progress(seconds=90)
    numbers = job.numbers()
    assert numbers == list(range(len(numbers)))
    readers = {line["pid"] for line in ledger_of(str(job.ledger))}
    assert len(readers) >= 4

    children = descendants(job.process.pid)
    assert len(children) == 3
    job.process.kill()
    until(lambda: not alive(children), 5, f"end of {children}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_in_seconds(start, number):
    job = start()
    job.expect("running")
    job.progress(5)
    children = descendants(job.process.pid)
    began = time.monotonic()
    job.process.send_signal(number)
    assert job.expect("outcome", 15) == "stopped"
    assert job.process.wait(10) == 0
    assert time.monotonic() - began < 10
    assert alive(children) == []
    job.errors.seek(0)
    # Beam's own import comes before ours here, and its warning with it.
    assert [line for line in job.errors if "apitools not found" not in line] == []


def test_a_signal_while_starting_stops_it_too(start):
    job = start()
    job.expect("starting")
    job.process.terminate()
    assert job.expect("outcome", 30) == "stopped"
    assert job.process.wait(10) == 0


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_elements_of_20_megabytes_pass(start, workers):
    job = start("--nbytes=20000000", "--pause_s=0.5", f"--workers={workers}")
    job.expect("running")
    job.progress(3)
    assert ledger_of(str(job.ledger))[2]["bytes"] == 20_000_000


def test_gives_up_after_failures_and_prints_no_content(start):
    job = start("--secret=ZHANG-SAN", "--restarts_max=1", "--number_of_execution_retries=0")
    details = [job.expect("failed"), job.expect("failed")]
    assert job.process.wait(30) != 0
    job.errors.seek(0)
    text = job.errors.read()
    assert "EngineError: the pipeline failed 2 times" in text
    assert "campus-sync check" in text
    assert "worker.log" in text
    assert all("ValueError" in detail for detail in details)
    for log in sorted((job.dir / "work").glob("*.log")):
        text += log.read_text()
    assert "withheld" in text
    assert "ZHANG" not in text + "".join(details)


@pytest.fixture
def cluster(tmp_path):
    """A standalone Flink: a job manager and a task manager in processes of their own."""
    rest, rpc = pick_port(None, None)
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "flink-conf.yaml").write_text(
        f"""\
jobmanager.rpc.address: 127.0.0.1
jobmanager.rpc.port: {rpc}
rest.address: 127.0.0.1
rest.port: {rest}
taskmanager.host: 127.0.0.1
taskmanager.numberOfTaskSlots: 1
"""
    )
    memory = {
        "cpu.cores": "1",
        "memory.task.heap.size": "300m",
        "memory.task.off-heap.size": "0b",
        "memory.framework.heap.size": "128m",
        "memory.framework.off-heap.size": "128m",
        "memory.network.min": "64m",
        "memory.network.max": "64m",
        "memory.managed.size": "32m",
        "memory.jvm-metaspace.size": "256m",
        "memory.jvm-overhead.min": "128m",
        "memory.jvm-overhead.max": "128m",
    }
    java = [
        find_java("Flink"),
        "-Xmx500m",
        *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED),
        *("-cp", os.pathsep.join(map(str, fetch_jars()))),
    ]
    runtime, common = "org.apache.flink.runtime", ("--configDir", str(conf))
    manager = f"{runtime}.entrypoint.StandaloneSessionClusterEntrypoint"
    worker = f"{runtime}.taskexecutor.TaskManagerRunner"
    sizes = [f"-Dtaskmanager.{key}={value}" for key, value in memory.items()]
    log = tmp_path / "cluster.log"
    parts = [
        spawn([*java, manager, *common, "--executionMode", "cluster"], log),
        spawn([*java, worker, *common, *sizes], log),
    ]
    url = f"http://127.0.0.1:{rest}"

    def ask(path: str) -> dict:
        try:
            return json.loads(urllib.request.urlopen(url + path, timeout=5).read())
        except OSError:
            return {}

    until(lambda: ask("/overview").get("slots-available"), 90, "a cluster with a slot")
    yield f"127.0.0.1:{rest}", lambda: [j["state"] for j in ask("/jobs/overview")["jobs"]]
    for part in parts:
        stop(part)


def test_a_cluster_runs_the_job_and_loses_it_when_we_stop(start, cluster):
    master, states = cluster
    job = start(f"--flink_master={master}")
    job.expect("running")
    job.progress(10, seconds=90)
    assert states() == ["RUNNING"]
    job.process.terminate()
    assert job.expect("outcome", 30) == "stopped"
    assert states() == ["CANCELED"]


def test_a_cluster_that_is_not_there_is_named(start):
    job = start("--flink_master=127.0.0.1:9", "--restarts_max=0")
    assert "127.0.0.1:9 does not answer" in job.expect("failed")


def test_java_is_looked_for_and_its_version_checked(tmp_path, monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert find_java("Flink")
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(JavaMissing, match=r"is version 8.*install Java 17"):
        find_java("Flink", str(old))
    with pytest.raises(JavaMissing, match=r"is not there.*install Java 17"):
        find_java("Flink", str(tmp_path / "none"))
    (tmp_path / "bin").mkdir()
    old.rename(tmp_path / "bin" / "java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(JavaMissing, match="is version 8"):
        find_java("Flink")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "java.lang.RuntimeException: Error received from SDK harness: Traceback (most recent"
            " call last):\n  File x, line 1, in y\npsycopg.errors.UniqueViolation_Error: Key"
            " (mrn)=(M1)\n\n\tat org.apache.beam.X.y(X.java:1)",
            "psycopg.errors.UniqueViolation_Error",
        ),
        ("java.io.IOException: disk of Zhang", "java.io.IOException"),
        ("nothing known", ""),
    ],
)
def test_only_the_class_of_an_error_is_shown(text, shown):
    assert error_class(text) == shown
