"""A Flink cluster that others run: finds and cancels our jobs on it, by its REST interface."""

import hashlib
import http.client
import json
import pathlib
import socket
import time
import urllib.error
import urllib.request

from schemas.errors import CampusSyncError

_TIMEOUT_S = 5
_GONE_S = 10
_ENDED = ("FINISHED", "CANCELED", "FAILED")


def job_name(work_dir: pathlib.Path) -> str:
    """Returns the name of the job of a work directory: the same after every restart."""
    place = hashlib.sha256(str(work_dir.absolute()).encode()).hexdigest()[:8]
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname().lower())
    return f"campus-sync-{host}-{place}"


def cancel_jobs(master: str, name: str) -> int:
    """Cancels all jobs of a name on the cluster at `host:port`; returns how many there were.

    Beam's job server forgets a job on a cluster when it ends itself, and says that it is
    cancelled while it is not.

    Raises:
      CampusSyncError: the cluster does not answer, or a job does not go.
    """
    base = master if master.startswith(("http://", "https://")) else f"http://{master}"
    try:
        jobs = _running(base, name)
        for job in jobs:
            _ask(f"{base}/jobs/{job}", "PATCH")
        deadline = time.monotonic() + _GONE_S
        while _running(base, name):
            if time.monotonic() > deadline:
                raise CampusSyncError(
                    f"job {name} does not end on the Flink cluster at {master}. Remedy: cancel it "
                    f"there, `curl -X PATCH {base}/jobs/{jobs[0] if jobs else 'ID'}`."
                )
            time.sleep(0.2)
        return len(jobs)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise CampusSyncError(
            f"the Flink cluster at {master} does not answer ({reason}). Remedy: check "
            f"--flink_master, it is the REST address; try `curl {base}/overview`."
        ) from None


def _running(base: str, name: str) -> list[str]:
    jobs = json.loads(_ask(f"{base}/jobs/overview", "GET"))["jobs"]
    return [job["jid"] for job in jobs if job["name"] == name and job["state"] not in _ENDED]


def _ask(url: str, method: str) -> bytes:
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        if method == "PATCH" and error.code in (404, 409):
            return b""  # It ended meanwhile.
        raise
