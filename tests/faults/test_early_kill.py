"""Workers killed within moments of their start: Flink does not see it, the pool does (ADR 0025)."""

import concurrent.futures
import contextlib
import os
import pathlib
import random
import signal
import threading
import time

import grpc
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc

from runners.options import parse
from runners.workers import WorkerPool
from tests.e2e.test_flink import Job, alive, descendants
from tests.faults.harness import seed_of_this_run, until

KILLS = max(4, int(os.environ.get("CAMPUS_SYNC_KILLS", "6")) // 2)
# Five until the pool ends, fifteen of pause after many failures, and the start of all on two
# busy cores; a job that nobody starts anew hangs for three minutes at least.
RECOVERY_S = 120
WORKER = "runners.workers work"
ESTABLISHED = "01"
UNNOTICED_S = 7  # A pool would have ended by then.


def sockets(pid: int) -> int:
    """Returns how many connections a process has to another one."""
    place = pathlib.Path(f"/proc/{pid}")
    lines = (place / "net/tcp").read_text().splitlines()
    lines += (place / "net/tcp6").read_text().splitlines()
    inodes = {fields[9] for line in lines if (fields := line.split())[3] == ESTABLISHED}
    links = set()
    for file in (place / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            links.add(os.readlink(file))
    return sum(f"socket:[{inode}]" in links for inode in inodes)


def wait_for_connection(pid: int) -> None:
    """Returns as soon as a worker has its first connection, and before it has its last."""
    deadline = time.monotonic() + RECOVERY_S
    while not sockets(pid) and time.monotonic() < deadline:
        time.sleep(0.001)


class Early:
    """Seeded moments in the first seconds of a worker's life, of each kind as many."""

    def __init__(self, seed: int):
        self._chance = random.Random(seed)
        self._kinds: list[str] = []

    def wait(self, pid: int) -> str:
        """Returns at the moment to kill the worker, with its name."""
        if not self._kinds:
            self._kinds = ["at once", "when connected", "after that", "some time"]
            self._chance.shuffle(self._kinds)
        kind = self._kinds.pop()
        if kind == "at once":
            time.sleep(self._chance.uniform(0, 0.5))
        elif kind == "some time":
            time.sleep(self._chance.uniform(0, 3))
        else:
            wait_for_connection(pid)
            if kind == "after that":
                time.sleep(self._chance.uniform(0, 0.3))
        return kind


def worker_of(job: Job) -> int | None:
    return next((p for p, c in descendants(job.process.pid).items() if WORKER in c), None)


@pytest.mark.xdist_group("flink")
def test_a_worker_killed_while_it_starts_is_replaced(tmp_path):
    early = Early(seed_of_this_run())
    job = Job(tmp_path, "--restarts_max=1000")
    try:
        job.expect("running")
        job.progress(5)
        killed = worker_of(job)
        os.kill(killed, signal.SIGKILL)
        for number in range(KILLS):
            began = time.monotonic()
            before = killed
            killed = until(
                lambda before=before: (pid := worker_of(job)) != before and pid,
                RECOVERY_S,
                lambda: f"another worker{job.diagnosis()}",
            )
            came = time.monotonic() - began
            kind = early.wait(killed)
            os.kill(killed, signal.SIGKILL)
            print(f"{number + 1}: a worker came within {came:.1f} s, killed {kind}", flush=True)
        job.progress(5, RECOVERY_S)
        numbers = job.numbers()
        assert numbers == list(range(len(numbers)))
        children = descendants(job.process.pid)
        assert len(children) == 3
        job.process.terminate()
        assert job.expect("outcome", 30) == "stopped"
        assert job.process.wait(10) == 0
        assert alive(children) == []
    finally:
        job.close()


def request_to(address: str) -> beam_fn_api_pb2.StartWorkerRequest:
    request = beam_fn_api_pb2.StartWorkerRequest(worker_id="w1")
    request.control_endpoint.url = address
    return request


NOWHERE = request_to("127.0.0.1:9")


@pytest.fixture
def pool(tmp_path):
    """A pool and its service."""
    with (
        WorkerPool(parse([]), tmp_path / "worker.log") as pool,
        grpc.insecure_channel(pool.address) as channel,
    ):
        yield pool, beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)


def started(pool: WorkerPool) -> int:
    return until(
        lambda: next((p for p, c in descendants(pool.pid).items() if WORKER in c), None),
        10,
        "a worker",
    )


def test_a_pool_ends_with_a_worker_that_the_engine_does_not_miss(pool):
    pool, service = pool
    assert not service.StartWorker(NOWHERE).error
    os.kill(started(pool), signal.SIGKILL)
    until(lambda: not pool.alive, 20, "the pool's end")
    assert pool.end() == "a Python worker died and Flink did not notice"


class Engine(beam_fn_api_pb2_grpc.BeamFnControlServicer):
    """An engine that a worker connects to and that has no work; it leaves by an end or a break."""

    def __init__(self):
        self.connected, self.leave = threading.Event(), threading.Event()
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        beam_fn_api_pb2_grpc.add_BeamFnControlServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Control(self, responses, context):
        self.connected.set()
        self.leave.wait()
        return iter(())


@pytest.mark.parametrize("end", ["closed", "broken"])
def test_a_pool_stays_if_the_engine_leaves(pool, end):
    pool, service = pool
    engine = Engine()
    assert not service.StartWorker(request_to(engine.address)).error
    worker = started(pool)
    assert engine.connected.wait(60)
    if end == "closed":
        engine.leave.set()
    else:
        engine.server.stop(0)
    until(lambda: not alive([worker]), 20, "the worker's end")
    engine.leave.set()
    engine.server.stop(0)
    time.sleep(UNNOTICED_S)
    assert pool.alive


def test_a_pool_stays_if_the_engine_stops_its_worker(pool):
    pool, service = pool
    assert not service.StartWorker(NOWHERE).error
    worker = started(pool)
    os.kill(worker, signal.SIGKILL)
    stop = beam_fn_api_pb2.StopWorkerRequest(worker_id="w1")
    assert not service.StopWorker(stop).error
    time.sleep(UNNOTICED_S)
    assert pool.alive
    os.kill(pool.pid, signal.SIGKILL)
    until(lambda: not pool.alive, 5, "the pool's end")
    assert pool.end() == "the Python workers' pool ended"
