"""The pool that starts Beam's Python workers, each in a process of its own, when Flink asks.

Flink's side of Beam does not see every death: for a worker that dies before it has connected it
waits for ever, for one that dies before its data connection three minutes. The pool does (ADR
0025).
"""

import json
import logging
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time

import grpc
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker import sdk_worker_main, worker_pool_main

from runners import processes, safe_log
from runners.bundle_costs import spare_bundles
from runners.options import FlinkTuning, SyncOptions
from schemas.errors import CampusSyncError

_READY = "listening on "
_START_S = 60
_OUR_FLAGS = (FlinkTuning, SyncOptions)  # Imported for a worker to know them as flags.
_LOG_VARIABLE = "CAMPUS_SYNC_WORKER_LOG"
_NOTICE_S = 5.0  # The engine stops a worker whose death it has seen within half a second.
_UNNOTICED = 70  # Exit status of a pool.


class WorkerPool(processes.Child):
    """A process that serves Beam's EXTERNAL environment: `address` is its environment_config.

    Pool and workers die with the process that made them. Their output is appended to `log`.
    The pool ends by itself when a worker died and the engine did not notice within seconds: only
    a start of everything helps then.
    """

    def __init__(self, options: PipelineOptions, log: pathlib.Path):
        super().__init__()
        self._log = log
        self._env = {
            **os.environ,
            # Workers import what we import, from where we do.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PIPELINE_OPTIONS": json.dumps(_worker_options(options)),
            _LOG_VARIABLE: str(log),
        }
        self.address = ""

    def launch(self) -> None:
        """Starts the pool without waiting for it."""
        command = [sys.executable, "-m", "runners.workers", "pool"]
        self._process = processes.spawn(command, self._log, self._env, pipe=True)

    def start(self) -> None:
        """Returns when the pool listens.

        Raises:
          CampusSyncError: it does not come up; the text names its log.
        """
        if self._process is None:
            self.launch()
        ready, _, _ = select.select([self._process.stdout], [], [], _START_S)
        line = self._process.stdout.readline().decode() if ready else ""
        if not line.startswith(_READY):
            self.stop()
            raise CampusSyncError(f"the Python workers' pool does not start; see {self._log}")
        self.address = line.removeprefix(_READY).strip()

    def end(self) -> str:
        """Says why a pool that is not alive ended, as far as its exit status tells."""
        if self._process is not None and self._process.poll() == _UNNOTICED:
            return "a Python worker died and Flink did not notice"
        return "the Python workers' pool ended"

    def stop(self) -> None:
        """Ends the pool, and the kernel its workers; returns when the pool is gone."""
        self._end()


def _worker_options(options: PipelineOptions) -> dict:
    return {"default_sdk_harness_log_level": "WARNING"} | {
        name: value
        for name, value in options.get_all_options(drop_default=True).items()
        if isinstance(value, bool | int | float | str | list)
    }


class _Servicer(worker_pool_main.BeamFnExternalWorkerPoolServicer):
    """Beam's pool with our interpreter, options, log and life line, and an eye on its workers.

    Beam's own starts whatever `python` the PATH has, without the pipeline's options, its
    workers outlive a killed pool, and it does not look whether they live.
    """

    def StartWorker(self, start_worker_request, unused_context):
        worker_id = start_worker_request.worker_id
        env = {
            **os.environ,
            "WORKER_ID": worker_id,
            "CONTROL_API_SERVICE_DESCRIPTOR": (
                f'url: "{start_worker_request.control_endpoint.url}"'
            ),
        }
        command = [sys.executable, "-m", "runners.workers", "work"]
        try:
            worker = processes.spawn(command, pathlib.Path(os.environ[_LOG_VARIABLE]), env)
        except OSError as error:
            return beam_fn_api_pb2.StartWorkerResponse(error=type(error).__name__)
        self._worker_processes[worker_id] = worker
        watch = threading.Thread(target=self._watch, args=[worker_id, worker], daemon=True)
        watch.start()
        return beam_fn_api_pb2.StartWorkerResponse()

    def _watch(self, worker_id: str, worker: subprocess.Popen) -> None:
        """Ends the pool if the engine does not stop a worker that died, soon."""
        status = worker.wait()
        if status == 0:  # The engine closed the connection: it knows.
            return
        time.sleep(_NOTICE_S)
        if self._worker_processes.get(worker_id) is worker:
            logging.error("worker %s ended with %s, unnoticed by the engine", worker_id, status)
            os._exit(_UNNOTICED)


def _work() -> None:
    """Serves the engine until it leaves: by a closed connection or a broken one."""
    spare_bundles()
    try:
        sdk_worker_main.main(None)
    except grpc.RpcError:  # Of the control connection, whose end either side sees.
        logging.warning("the engine has left")


def main(argv: list[str]) -> None:
    """Entry point of the pool (`pool`) and of each worker (`work`)."""
    safe_log.guard_process()
    if argv == ["work"]:
        _work()
        return
    address, _server = _Servicer.start(use_process=True)
    print(f"{_READY}{address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    # The kernel kills the workers with us: what they hold is in no ledger, so nothing is lost.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
