"""One pipeline that was submitted to a job server: its state, its end, its last error."""

import contextlib
import re
import threading
import time

import apache_beam as beam
import grpc
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

_CANCEL_S = 5  # A job that is not gone by then goes with its JVM.
_POLL_S = 0.05
_MESSAGES_S = 3

State = beam_job_api_pb2.JobState
ENDED = frozenset((State.DONE, State.DRAINED, State.FAILED, State.CANCELLED, State.STOPPED))


class FlinkJob:
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
            if self.state() in ENDED:
                return
            request = beam_job_api_pb2.CancelJobRequest(job_id=self._id)
            self._jobs.Cancel(request, timeout=_CANCEL_S)
            deadline = time.monotonic() + _CANCEL_S
            while time.monotonic() < deadline and self.state() not in ENDED:
                time.sleep(_POLL_S)

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
