"""When `run` reconciles by itself: the moments of its two jobs, which is due, which is overdue."""

import dataclasses
import datetime
import enum
from collections.abc import Iterable, Sequence

from schemas.config import Reconcile

ATTEMPTS_MAX = 3
RETRY_US = 900_000_000  # After a run that could not be made; what cut it off may pass.
OVERDUE_US = 3_600_000_000  # For so long a moment may wait for a job that is busy or away.
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Job(enum.StrEnum):
    """A day's reconciliation, or that of the month that has ended."""

    DAILY = "daily"
    MONTH_END = "month_end"


class State(enum.StrEnum):
    """What became of a moment of a job.

    `SEEN` is the one before the first that the schedule knew of: nothing was run for it.
    `FAILED`: there is no report.
    """

    SEEN = "seen"
    RUNNING = "running"
    SOUND = "sound"
    UNSOUND = "unsound"
    FAILED = "failed"

    @property
    def reported(self) -> bool:
        return self in (State.SOUND, State.UNSOUND)


@dataclasses.dataclass(frozen=True)
class Run:
    """One moment of a job as the primary store remembers it; times in µs since 1970.

    Attributes:
      attempts: how often it was begun. started_us, ended_us: of the last of them.
      rows: read at the sources. differing, mended: rows. report: the report's file name.
      detail: why there is none.
    """

    job: Job
    due_us: int
    state: State
    attempts: int = 0
    started_us: int | None = None
    ended_us: int | None = None
    rows: int = 0
    differing: int = 0
    mended: int = 0
    report: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Due:
    """A run to begin now."""

    job: Job
    due_us: int
    attempt: int


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a job that is configured stands.

    Attributes:
      result, ended_us, rows, differing, mended, report, detail: of the last run that ended;
        `ended_us` None: none has.
      running_us: since when one runs; None: none does.
      overdue_s: how long its last moment has been waiting for a run that ends with a report; 0
        while that is no longer than an hour, or where one runs.
    """

    job: Job
    result: str
    ended_us: int | None
    rows: int
    differing: int
    mended: int
    report: str
    detail: str
    running_us: int | None
    overdue_s: float


def last_moment(plan: Reconcile, job: Job, now_us: int) -> int | None:
    """Returns the latest moment of a job that is not after now, µs since 1970; None: it is off.

    A month's is on the first day of the next, when all of it is over.
    """
    minutes = plan.minutes(job)
    if minutes is None:
        return None
    zone = datetime.timezone(datetime.timedelta(minutes=plan.zone_minutes))
    now = (_EPOCH + datetime.timedelta(microseconds=now_us)).astimezone(zone)
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if job is Job.MONTH_END:
        day = day.replace(day=1)
    at = datetime.timedelta(minutes=minutes)
    if day + at > now:
        day -= datetime.timedelta(days=1)
        if job is Job.MONTH_END:
            day = day.replace(day=1)
    return (day + at - _EPOCH) // datetime.timedelta(microseconds=1)


def unseen(plan: Reconcile, runs: Sequence[Run], now_us: int) -> list[tuple[Job, int]]:
    """Returns the jobs that no schedule has known yet, each with its latest moment.

    That moment is not made up for: what is new begins with its next.
    """
    known = {run.job for run in runs}
    moments = ((job, last_moment(plan, job, now_us)) for job in Job if job not in known)
    return [(job, moment) for job, moment in moments if moment is not None]


def due(plan: Reconcile, runs: Sequence[Run], now_us: int) -> Due | None:
    """Returns what is to be run now, the month's first; None: nothing.

    Of several moments that were missed the latest is made up for, once. A run that is `RUNNING`
    is of a job that has died, since whoever asks holds the schedule: it is begun again at once.
    """
    for job in (Job.MONTH_END, Job.DAILY):
        moment = last_moment(plan, job, now_us)
        newest = _newest(runs, job)
        if moment is None or newest is None or _covered(runs, job, moment):
            continue
        if newest.due_us < moment:
            return Due(job, moment, 1)
        if newest.attempts < ATTEMPTS_MAX and _broken(newest, now_us):
            return Due(job, newest.due_us, newest.attempts + 1)
    return None


def standings(plan: Reconcile | None, runs: Sequence[Run], now_us: int) -> tuple[Standing, ...]:
    """Returns how each job that is configured stands."""
    found = []
    for job in Job if plan is not None else ():
        moment = last_moment(plan, job, now_us)
        if moment is None:
            continue
        newest = _newest(runs, job)
        ended = _newest([run for run in runs if run.ended_us is not None], job)
        running = newest is not None and newest.state is State.RUNNING
        settled = newest is None or (newest.due_us >= moment and newest.state is not State.FAILED)
        waits_us = 0 if settled or _covered(runs, job, moment) else now_us - moment
        found.append(
            Standing(
                job,
                result=ended.state.value if ended else "",
                ended_us=ended.ended_us if ended else None,
                rows=ended.rows if ended else 0,
                differing=ended.differing if ended else 0,
                mended=ended.mended if ended else 0,
                report=ended.report if ended else "",
                detail=ended.detail if ended else "",
                running_us=newest.started_us if running else None,
                overdue_s=waits_us / 1e6 if waits_us > OVERDUE_US else 0.0,
            )
        )
    return tuple(found)


def _newest(runs: Iterable[Run], job: Job) -> Run | None:
    return max((run for run in runs if run.job is job), key=lambda run: run.due_us, default=None)


def _broken(run: Run, now_us: int) -> bool:
    """Whether a run left no report, and may be tried again."""
    if run.state is State.RUNNING:
        return True
    return run.state is State.FAILED and now_us - (run.ended_us or 0) >= RETRY_US


def _covered(runs: Iterable[Run], job: Job, moment: int) -> bool:
    """Whether a month's run, which is more than a day's, has begun since this moment of a day's."""
    return job is Job.DAILY and any(
        run.job is Job.MONTH_END and run.state.reported and (run.started_us or 0) >= moment
        for run in runs
    )
