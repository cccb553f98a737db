"""The reconciliations that `run` starts by itself, each in a process of its own."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable

import psycopg

from runners import processes
from schemas.clocks import wall_clock_us
from schemas.config import PRIMARY, Config, Reconcile
from schemas.errors import CampusSyncError
from schemas.reconcile_schedule import Due, Job, Run, State, due, unseen
from schemas.reconciliation import DIFFERING
from transforms.deliver import reconcile_records as records
from transforms.sign_report import verify

LOOK_S = 5.0
REPORTS = "reconciliations"  # The folder of reports, beside campuses.yaml.
_LONGEST_US = 20 * 3_600_000_000  # A run that hangs must not keep the next day's from beginning.
_NICE = ("nice", "-n", "10")  # Deliveries first.


class ReconcileJobs:
    """Starts what is due whenever it is called, one run at a time, and notes how each ended.

    A run is a child process: neither its memory nor its interpreter's lock is the emergency
    lane's. It dies with this process, and the moment is then made up for at the next start. Of
    several jobs that share a primary one holds the schedule, by a lock of its session there.

    Args:
      path: campuses.yaml, which the child reads. now_us: a clock.
    """

    def __init__(
        self,
        config: Config,
        plan: Reconcile,
        path: pathlib.Path,
        now_us: Callable[[], int] = wall_clock_us,
    ):
        self._dsn, self._plan, self._now_us = config.stores[PRIMARY].dsn, plan, now_us
        self._path = path.absolute()
        self._folder = self._path.parent / REPORTS
        self._conn: psycopg.Connection | None = None
        self._claimed = False
        self._child: subprocess.Popen | None = None
        self._due: Due | None = None
        self._begun_us = 0
        self._why = ""

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what runs; its moment stays as it is: begun, and not ended."""
        self._end_child()
        self._disconnect()

    def __call__(self) -> str:
        """Looks once; returns what is wrong, or an empty string.

        Raises:
          psycopg.Error: the primary cannot be asked. What runs goes on.
        """
        try:
            return self._look()
        except psycopg.Error:
            self._disconnect()
            raise

    def _look(self) -> str:
        if self._conn is None:
            self._conn = records.connect(self._dsn)
        if not self._claimed and not records.claim(self._conn):
            self._end_child()  # Another has the schedule since the primary was lost.
            return ""
        self._claimed = True
        now_us = self._now_us()
        if self._child is not None:
            self._attend(now_us)
        if self._child is None:
            known = records.runs(self._conn)
            new = unseen(self._plan, known, now_us)
            for job, moment_us in new:
                records.note_seen(self._conn, job, moment_us)
            found = due(self._plan, known, now_us)
            if found is not None:
                self._begin(found, now_us)
        return self._why

    def _begin(self, wanted: Due, now_us: int) -> None:
        records.begin(self._conn, wanted, now_us)
        self._due, self._begun_us = wanted, now_us
        command = [sys.executable, "-m", "runners.cli", "reconcile", "--config", str(self._path)]
        command += ["--report", str(self._report)]
        command += ["--repair"] if self._plan.mend else []
        command += ["--whole"] if wanted.job is Job.MONTH_END else []
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        prefix = _NICE if shutil.which(_NICE[0]) else ()
        env = {**os.environ, "PYTHONPATH": paths}
        try:
            self._child = processes.spawn([*prefix, *command], self._folder / "jobs.log", env)
        except OSError as error:
            self._note(read_run(wanted, self._report, f"{type(error).__name__}", now_us, now_us))

    @property
    def _report(self) -> pathlib.Path:
        when = datetime.datetime.fromtimestamp(self._begun_us / 1e6, datetime.UTC)
        return self._folder / f"{when:%Y%m%dT%H%M%S}Z-{self._due.job}.json"

    def _attend(self, now_us: int) -> None:
        """Notes how the child ended, if it has."""
        code = self._child.poll()
        if code is None:
            if now_us - self._begun_us < _LONGEST_US:
                return
            processes.stop(self._child)
            code = self._child.poll()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._note(read_run(self._due, self._report, how, self._begun_us, now_us))
        self._child = None

    def _note(self, run: Run) -> None:
        records.end(self._conn, run)
        self._why = "" if run.state is State.SOUND else _words(run)

    def _end_child(self) -> None:
        if self._child is not None:
            processes.stop(self._child)
            self._child = None

    def _disconnect(self) -> None:
        self._claimed = False
        if self._conn is not None:
            with contextlib.suppress(psycopg.Error):
                self._conn.close()
            self._conn = None


def read_run(due: Due, report: pathlib.Path, how: str, started_us: int, now_us: int) -> Run:
    """Returns what became of a run, by the signed report that it left or did not leave.

    Args:
      how: its process ended.
    """
    run = Run(due.job, due.due_us, State.FAILED, due.attempt, started_us, now_us)
    try:
        content, _ = verify(json.loads(report.read_text(encoding="utf-8")))
    except (OSError, ValueError, CampusSyncError):
        detail = f"left no report, {how}: see {REPORTS}/jobs.log"
        return dataclasses.replace(run, detail=detail)
    links = content["links"]
    return dataclasses.replace(
        run,
        state=State.SOUND if content["sound"] else State.UNSOUND,
        rows=sum(one["source_rows"] for one in links),
        differing=sum(one[kind] for one in links for kind in DIFFERING),
        mended=sum(one["mended"] for one in links),
        report=report.name,
    )


def _words(run: Run) -> str:
    name = run.job.replace("_", "-")
    if run.state is State.FAILED:
        return f"{name} reconciliation {run.detail}"
    left = run.differing - run.mended
    return f"{name} reconciliation is not sound, {left:,} rows differ: {REPORTS}/{run.report}"
