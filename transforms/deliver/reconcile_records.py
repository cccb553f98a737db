"""What the primary store remembers of the reconciliations that `run` starts by itself."""

import datetime

import psycopg

from schemas.reconcile_schedule import Due, Job, Run, State
from transforms import postgresql_sessions

KEEP_DAYS = 400  # A year and its report.
# A host that is gone must not keep the schedule for the two hours that a server waits by default.
_OPTIONS = (
    "-c statement_timeout=30000 -c lock_timeout=5000"
    " -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
)
_LOCK = 0x7265636F6E  # "recon": one `run` of all that know this primary has the schedule.

# In the primary alone.
_DDL = """\
CREATE TABLE IF NOT EXISTS sync.reconciliation (
    job text COLLATE "C", due_at timestamptz, state text NOT NULL
        CHECK (state IN ('seen', 'running', 'sound', 'unsound', 'failed')),
    attempts integer NOT NULL, started_at timestamptz, ended_at timestamptz,
    rows bigint NOT NULL DEFAULT 0, differing bigint NOT NULL DEFAULT 0,
    mended bigint NOT NULL DEFAULT 0, report text NOT NULL DEFAULT '',
    detail text NOT NULL DEFAULT '', PRIMARY KEY (job, due_at))"""
_EXISTS = "SELECT to_regclass('sync.reconciliation') IS NOT NULL"
_SEEN = """\
INSERT INTO sync.reconciliation (job, due_at, state, attempts) VALUES (%s, %s, 'seen', 0)
ON CONFLICT DO NOTHING"""
_BEGIN = """\
INSERT INTO sync.reconciliation (job, due_at, state, attempts, started_at)
VALUES (%s, %s, 'running', %s, %s)
ON CONFLICT (job, due_at) DO UPDATE
SET state = 'running', attempts = excluded.attempts, started_at = excluded.started_at,
    ended_at = NULL, report = '', detail = ''"""
_END = """\
UPDATE sync.reconciliation SET state = %s, ended_at = %s, rows = %s, differing = %s, mended = %s,
    report = %s, detail = %s
WHERE job = %s AND due_at = %s AND attempts = %s AND state = 'running'"""
_PRUNE = "DELETE FROM sync.reconciliation WHERE due_at < %s"
# The newest of each job, the newest that ended, and a month's that may stand for a day's.
_RUNS = """\
SELECT job, due_at, state, attempts, started_at, ended_at, rows, differing, mended, report, detail
FROM (SELECT *, row_number() OVER (PARTITION BY job, ended_at IS NULL ORDER BY due_at DESC) AS nth
    FROM sync.reconciliation) newest
WHERE nth = 1 ORDER BY job, due_at"""
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def connect(dsn: str) -> psycopg.Connection:
    """Returns an autocommit connection to the primary, for as long as the schedule is wanted.

    Raises:
      psycopg.OperationalError: it cannot be reached.
    """
    return postgresql_sessions.connect(
        dsn,
        options=_OPTIONS,
        application_name="campus_sync_reconcile",
    )


def claim(conn: psycopg.Connection) -> bool:
    """Takes the schedule for this session, if no other has it; makes the table where it lacks."""
    if not conn.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()[0]:
        return False
    if not conn.execute(_EXISTS).fetchone()[0]:
        conn.execute(_DDL)
    return True


def runs(conn: psycopg.Connection) -> tuple[Run, ...]:
    """Returns of each job the newest run and the newest that has ended; none without a table."""
    if not conn.execute(_EXISTS).fetchone()[0]:
        return ()
    return tuple(
        Run(Job(job), _us(due), State(state), attempts, _us(started), _us(ended), *rest)
        for job, due, state, attempts, started, ended, *rest in conn.execute(_RUNS)
    )


def note_seen(conn: psycopg.Connection, job: Job, due_us: int) -> None:
    """Notes the moment from which on a job's schedule is kept."""
    conn.execute(_SEEN, (job.value, _time(due_us)))


def begin(conn: psycopg.Connection, due: Due, now_us: int) -> None:
    """Notes that a run begins; forgets those of long ago."""
    with conn.transaction():
        conn.execute(_BEGIN, (due.job.value, _time(due.due_us), due.attempt, _time(now_us)))
        conn.execute(_PRUNE, (_time(now_us - KEEP_DAYS * 86_400_000_000),))


def end(conn: psycopg.Connection, run: Run) -> bool:
    """Notes how a run ended; False: another has begun the same moment since."""
    values = (run.state.value, _time(run.ended_us), run.rows, run.differing, run.mended)
    place = (run.job.value, _time(run.due_us), run.attempts)
    return conn.execute(_END, (*values, run.report, run.detail, *place)).rowcount == 1


def _time(us: int) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(microseconds=us)


def _us(when: datetime.datetime | None) -> int | None:
    return None if when is None else (when - _EPOCH) // datetime.timedelta(microseconds=1)
