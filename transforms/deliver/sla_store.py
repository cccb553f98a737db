"""Keep what is measured in the primary store: lag windows, the links' health, one-sided pairs."""

import datetime
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import apache_beam as beam
import psycopg
from apache_beam.metrics import Metrics

from schemas.clocks import wall_clock_us
from schemas.reports import Health
from transforms import postgresql_sessions
from transforms.deliver import store_schema
from transforms.measure_lag import LagWindow

_LOGGER = logging.getLogger(__name__)

KEEP_DAYS = 92  # A quarter and its report.
_CONNECT_TIMEOUT_S = 3
_RETRY_US = 5_000_000
_PRUNE_EVERY_US = 3_600_000_000
_PENDING_MAX = 20_000  # Windows of a kilobyte: ten links through three hours.
_ADVISORY_LOCK = 0x736C61  # "sla": one session at a time creates the tables below.

# Beside sync.lag: what happened to all changes of a window, and the state of links over time.
_DDL = """\
CREATE TABLE IF NOT EXISTS sync.lag_counts (
    link text COLLATE "C", lane text COLLATE "C", window_start timestamptz,
    incarnation text COLLATE "C", captured bigint NOT NULL, delivered bigint NOT NULL,
    duplicates bigint NOT NULL, superseded bigint NOT NULL, held bigint NOT NULL,
    dead bigint NOT NULL, watermark_us bigint NOT NULL,
    PRIMARY KEY (link, lane, window_start, incarnation)) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.link_health (
    link text COLLATE "C", sampled_at timestamptz, state text NOT NULL,
    backlog_bytes bigint, retained_bytes bigint, watermark_lag_ms bigint,
    PRIMARY KEY (link, sampled_at));
"""

# A pane that fires again, or a bundle that is tried again, changes nothing: it has no more rows.
_PUT_LAG = """\
INSERT INTO sync.lag AS l (link, lane, window_start, incarnation, sketch, rows, late)
VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (link, lane, window_start, incarnation) DO UPDATE
SET sketch = excluded.sketch, rows = excluded.rows, late = excluded.late
WHERE excluded.rows >= l.rows
"""
_PUT_COUNTS = """\
INSERT INTO sync.lag_counts AS l (link, lane, window_start, incarnation, captured, delivered,
    duplicates, superseded, held, dead, watermark_us)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (link, lane, window_start, incarnation) DO UPDATE
SET captured = excluded.captured, delivered = excluded.delivered,
    duplicates = excluded.duplicates, superseded = excluded.superseded, held = excluded.held,
    dead = excluded.dead, watermark_us = excluded.watermark_us
WHERE excluded.captured >= l.captured
"""
_PUT_HEALTH = """\
INSERT INTO sync.link_health (link, sampled_at, state, backlog_bytes, retained_bytes,
    watermark_lag_ms)
VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_PUT_RATE = """\
INSERT INTO sync.log_rate (source, units_per_s, measured_at) VALUES (%s, %s, %s)
ON CONFLICT (source) DO UPDATE
SET units_per_s = excluded.units_per_s, measured_at = excluded.measured_at"""


def ensure(conn: psycopg.Connection) -> None:
    """Creates the store's schema and the tables of this module where they are not there.

    Safe to call at once from many; commits.
    """
    store_schema.ensure(conn)
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s)", (_ADVISORY_LOCK,))
        conn.execute(_DDL.encode())


def put_windows(conn: psycopg.Connection, windows: Sequence[LagWindow], incarnation: str) -> None:
    """Writes panes in one transaction; of one window the pane with the most rows stays.

    Args:
      incarnation: names one start of the pipeline. A start overwrites its own windows only;
        readers add up the starts that a window has seen.
    """
    keys = [
        (window.link, str(window.lane), _time(window.window_start_us), incarnation)
        for window in windows
    ]
    pairs = sorted(zip(keys, windows, strict=True), key=lambda pair: (pair[0], pair[1].rows))
    lag = [(*key, w.sketch.to_bytes(), w.rows, w.late) for key, w in pairs]
    counts = [(*key, *w.counts, w.watermark_us) for key, w in pairs]
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(_PUT_LAG, lag)
        cursor.executemany(_PUT_COUNTS, counts)


def put_health(conn: psycopg.Connection, sampled_us: int, samples: Iterable[Health]) -> None:
    """Writes one sample of every link."""
    rows = [
        (
            sample.link,
            _time(sampled_us),
            str(sample.state),
            sample.backlog_bytes,
            sample.retained_bytes,
            sample.watermark_lag_ms,
        )
        for sample in samples
    ]
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(_PUT_HEALTH, rows)


def put_rates(conn: psycopg.Connection, at_us: int, rates: Mapping[str, float]) -> None:
    """Keeps how fast the sources' logs grow now, for those who look once only."""
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(_PUT_RATE, [(name, rate, _time(at_us)) for name, rate in rates.items()])


def prune(conn: psycopg.Connection, now_us: int, keep_days: int = KEEP_DAYS) -> int:
    """Deletes measurements older than `keep_days`; returns how many rows went."""
    before = _time(now_us - keep_days * 86_400_000_000)
    gone = 0
    with conn.transaction():
        for table, column in (
            ("lag", "window_start"),
            ("lag_counts", "window_start"),
            ("link_health", "sampled_at"),
        ):
            statement = f"DELETE FROM sync.{table} WHERE {column} < %s"
            gone += conn.execute(statement.encode(), (before,)).rowcount
    return gone


def set_incident(conn: psycopg.Connection, link: str, kind: str, detail: str) -> bool:
    """Opens an incident unless one of this link and kind is open; returns whether it did."""
    with conn.transaction():
        conn.execute("LOCK TABLE sync.incident IN SHARE ROW EXCLUSIVE MODE")
        statement = (
            "INSERT INTO sync.incident (link, kind, detail) SELECT %s, %s, %s WHERE NOT EXISTS"
            " (SELECT FROM sync.incident WHERE link = %s AND kind = %s AND state = 'open')"
        )
        return conn.execute(statement, (link, kind, detail, link, kind)).rowcount == 1


def keep_incident(conn: psycopg.Connection, link: str, kind: str, detail: str) -> bool:
    """Makes the open incident of this link and kind say `detail`, or be closed for an empty one.

    Returns whether that is news to tell.
    """
    known = open_incident(conn, link, kind)
    if known is not None and known != detail:
        close_incident(conn, link, kind)
    if not detail or known == detail:
        return False
    return set_incident(conn, link, kind, detail)


def open_incident(conn: psycopg.Connection, link: str, kind: str) -> str | None:
    """Returns what the open incident of this link and kind says; None if there is none."""
    query = "SELECT detail FROM sync.incident WHERE link = %s AND kind = %s AND state = 'open'"
    found = conn.execute(query, (link, kind)).fetchone()
    return found and found[0]


def note_past(conn: psycopg.Connection, link: str, kind: str, detail: str) -> None:
    """Notes something that has happened and is over, once."""
    conn.execute(
        "INSERT INTO sync.incident (link, kind, detail, state, closed_at)"
        " SELECT %s, %s, %s, 'closed', now() WHERE NOT EXISTS (SELECT FROM sync.incident"
        " WHERE link = %s AND kind = %s AND detail = %s)",
        (link, kind, detail, link, kind, detail),
    )


def close_incident(conn: psycopg.Connection, link: str, kind: str) -> bool:
    """Closes the open incident of this link and kind; returns whether there was one."""
    with conn.transaction():
        statement = (
            "UPDATE sync.incident SET state = 'closed', closed_at = now()"
            " WHERE link = %s AND kind = %s AND state = 'open'"
        )
        return conn.execute(statement, (link, kind)).rowcount > 0


class _WriteFn(beam.DoFn):
    """Writes a bundle's panes at its end, the fullest of each window.

    A primary that is down never holds up the pipeline: panes wait in memory, the oldest
    windows go first when there are too many, and the primary is tried again every few seconds.
    """

    def __init__(self, dsn: str, incarnation: str, now_us: Callable[[], int]):
        self._dsn = dsn
        self._incarnation = incarnation
        self._now_us = now_us
        self._conn: psycopg.Connection | None = None
        self._panes: dict[tuple, LagWindow] = {}
        self._pruned_us = self._retry_us = 0
        self._written = Metrics.counter("sla_store", "panes_total")
        self._lost = Metrics.counter("sla_store", "lost_panes_total")

    def process(self, window: LagWindow):
        key = (window.window_start_us, window.link, window.lane)
        known = self._panes.get(key)
        if known is None or window.rows >= known.rows:
            self._panes[key] = window

    def finish_bundle(self):
        now_us = self._now_us()
        if self._panes and now_us >= self._retry_us:
            self._put(now_us)
        for key in sorted(self._panes)[: max(0, len(self._panes) - _PENDING_MAX)]:
            del self._panes[key]
            self._lost.inc()

    def _put(self, now_us: int) -> None:
        try:
            conn = self._connection()
            put_windows(conn, list(self._panes.values()), self._incarnation)
            self._written.inc(len(self._panes))
            self._panes.clear()
            if now_us - self._pruned_us > _PRUNE_EVERY_US:
                self._pruned_us = now_us
                prune(conn, now_us)
        except psycopg.Error as error:
            _LOGGER.warning("lag windows: the primary refuses, SQLSTATE %s", error.sqlstate)
            self._retry_us = now_us + _RETRY_US
            self.teardown()

    def teardown(self):
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def _connection(self) -> psycopg.Connection:
        if self._conn is None or self._conn.closed:
            self._conn = postgresql_sessions.connect(
                self._dsn,
                connect_timeout=_CONNECT_TIMEOUT_S,
                options="-c statement_timeout=5000 -c lock_timeout=3000",
                application_name="campus_sync_sla",
            )
            ensure(self._conn)
        return self._conn


class WriteLag(beam.PTransform):
    """Writes PCollection[LagWindow] to the primary store's `sync.lag` and `sync.lag_counts`.

    Idempotent: a row is one link, lane, window and incarnation, and a pane replaces it only
    if it has at least as many rows.

    Args:
      primary_dsn: libpq connection string. incarnation: names this start of the pipeline.
      now_us: microseconds since 1970; can be pickled.
    """

    def __init__(
        self, primary_dsn: str, incarnation: str, now_us: Callable[[], int] = wall_clock_us
    ):
        super().__init__()
        self._fn = _WriteFn(primary_dsn, incarnation, now_us)

    def expand(self, windows):
        return windows | "Put" >> beam.ParDo(self._fn).with_output_types(type(None))


def _time(us: int) -> datetime.datetime:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return epoch + datetime.timedelta(microseconds=us)
