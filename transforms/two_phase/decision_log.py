"""The coordinator's log in the primary store: what was begun and what was decided, durably."""

import dataclasses
import datetime
import json
import typing
from collections.abc import Callable, Iterable, Sequence

import psycopg

from transforms.deliver import ledger
from transforms.two_phase.states import (
    ENDS,
    Event,
    Identity,
    State,
    TransactionId,
    follow,
)
from transforms.two_phase.writes import TableWrite, from_json, to_json

_T = typing.TypeVar("_T")
_STATEMENT_S = 10
# A decision is only one once it is on disk, whatever the database's own setting.
_SESSION = f"""\
SET synchronous_commit = on; SET TimeZone = 'UTC';
SET statement_timeout = '{_STATEMENT_S}s'; SET lock_timeout = '{_STATEMENT_S}s';
SET idle_in_transaction_session_timeout = '{_STATEMENT_S}s'; SET search_path = pg_catalog"""

# system_identifier and oid name server and database: a copy elsewhere has another oid or is
# another server; a restored or promoted one has another timeline.
_IDENTITY = """\
SELECT substr(md5(concat_ws('/', (SELECT system_identifier FROM pg_control_system()),
        (SELECT oid FROM pg_database WHERE datname = current_database()))), 1, 12),
    ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int,
    coalesce((SELECT last FROM sync.two_phase_log), 0)"""
_NUMBER = """\
INSERT INTO sync.two_phase_log AS l (last) VALUES (1) ON CONFLICT (id) DO UPDATE
SET last = l.last + 1 RETURNING last, substr(md5(gen_random_uuid()::text), 1, 8)"""
_BEGIN = """\
INSERT INTO sync.two_phase (id, state, deadline)
VALUES (%s, %s, clock_timestamp() + make_interval(secs => %s))"""
_ASK = (
    "INSERT INTO sync.two_phase_branch (id, branch, state) SELECT %s, unnest(%s::text[]), 'asked'"
)
# Whoever comes first decides: the coordinator, or recovery behind the deadline.
_LOCK = """\
SELECT state, clock_timestamp() > deadline FROM sync.two_phase WHERE id = %s FOR UPDATE"""
_DECIDE = """\
UPDATE sync.two_phase SET state = %s, reason = %s, content = %s, decided_at = clock_timestamp()
WHERE id = %s"""
_MISSING = """\
UPDATE sync.two_phase_branch SET state = 'missing' WHERE id = %s AND branch = ANY (%s)"""
_EXPIRED = """\
SELECT id FROM sync.two_phase WHERE state = 'preparing' AND clock_timestamp() > deadline"""
_HOLD = """\
INSERT INTO sync.two_phase (id, state, reason, deadline) VALUES (%s, 'held', %s, clock_timestamp())
ON CONFLICT (id) DO NOTHING"""
_HOLD_BRANCH = """\
INSERT INTO sync.two_phase_branch (id, branch, state) VALUES (%s, %s, 'asked')
ON CONFLICT (id, branch) DO NOTHING"""
_DONE = """\
UPDATE sync.two_phase_branch SET state = 'done', done_at = clock_timestamp()
WHERE id = %s AND branch = ANY (%s) AND state <> 'done'"""
_FINISH = """\
UPDATE sync.two_phase t SET state = CASE state WHEN 'commit' THEN 'committed' ELSE 'aborted' END,
    content = NULL, finished_at = clock_timestamp()
WHERE state IN ('commit', 'abort') AND NOT EXISTS
    (SELECT FROM sync.two_phase_branch b WHERE b.id = t.id AND b.state <> 'done')"""
_FORGET = """\
DELETE FROM sync.two_phase WHERE state IN ('committed', 'aborted')
    AND finished_at < clock_timestamp() - interval '30 days'"""
_UNFINISHED = """\
SELECT t.id, t.state, t.reason, t.content, t.begun_at, t.deadline,
    extract(epoch FROM clock_timestamp() - t.begun_at)::float8,
    clock_timestamp() > t.deadline, b.branches
FROM sync.two_phase t, LATERAL (SELECT coalesce(json_object_agg(branch, state), '{}') AS branches
    FROM sync.two_phase_branch b WHERE b.id = t.id) b
WHERE t.state <> ALL (%s) ORDER BY t.begun_at"""


@dataclasses.dataclass(frozen=True)
class Logged:
    """An unfinished transaction. `branches`: name to `asked`, `missing` or `done`.

    A branch is missing where the set was committed elsewhere without it (degraded). `content`
    is there from the decision to commit until every branch has it.
    """

    id: TransactionId
    state: State
    reason: str
    content: list[TableWrite] = dataclasses.field(repr=False)
    begun_at: datetime.datetime
    deadline: datetime.datetime
    age_s: float
    late: bool
    branches: dict[str, str]


class DecisionLog:
    """The log over one connection, opened when needed and again after it broke.

    Every method raises StoreUnavailable where the primary store does not answer; what it was to
    write is then there or not, and may be asked for again.
    """

    def __init__(self, dsn: str):
        self._dsn = dsn
        self._conn: psycopg.Connection | None = None

    def close(self) -> None:
        """Closes the connection; the log may be used again."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def identity(self) -> Identity:
        """Returns whose log this is."""
        return self._do(lambda conn: Identity(*conn.execute(_IDENTITY).fetchone()))

    def begin(self, branches: Iterable[str], seconds: float) -> tuple[Identity, TransactionId]:
        """Notes a transaction that is about to ask these branches, until a deadline."""
        names = list(branches)

        def work(conn: psycopg.Connection) -> tuple[Identity, TransactionId]:
            number, salt = conn.execute(_NUMBER).fetchone()
            here = Identity(*conn.execute(_IDENTITY).fetchone())
            found = TransactionId(here.timeline, number, salt)
            state = follow(State.BEGUN, Event.ASK)
            conn.execute(_BEGIN, (str(found), state, seconds))
            conn.execute(_ASK, (str(found), names))
            return here, found

        return self._do(work)

    def decide(
        self,
        transaction: TransactionId,
        event: Event,
        reason: str = "",
        missing: Sequence[str] = (),
        content: Sequence[TableWrite] = (),
    ) -> State:
        """Decides, if nobody has yet and the deadline has not passed; returns the state.

        When it returns COMMIT, that stands on the primary store's disk.
        """

        def work(conn: psycopg.Connection) -> State:
            row = conn.execute(_LOCK, (str(transaction),)).fetchone()
            if row is None:  # A log that has gone back: nothing may be committed on its word.
                return State.HELD
            state, late = State(row[0]), row[1]
            late = late and event in (Event.WANT_COMMIT, Event.WANT_ABORT)
            after = follow(state, Event.DEADLINE if late else event)
            if after is not state:
                kept = json.dumps(to_json(content)) if after is State.COMMIT else None
                why = "deadline" if late else reason
                conn.execute(_DECIDE, (after, why, kept, str(transaction)))
                if after is State.COMMIT and missing:
                    conn.execute(_MISSING, (str(transaction), list(missing)))
            return after

        return self._do(work)

    def expire(self, here: Identity) -> None:
        """Aborts what is undecided behind its deadline, unless it is of before a restore."""
        rows = self._do(lambda conn: conn.execute(_EXPIRED).fetchall())
        for (text,) in rows:
            found = TransactionId.parse(text)
            ours = found.timeline == here.timeline
            event = Event.DEADLINE if ours else Event.LOG_WENT_BACK
            self.decide(found, event, str(event))

    def state_of(self, transaction: TransactionId) -> State | None:
        """Returns a transaction's state, None where the log does not know it."""
        query = "SELECT state FROM sync.two_phase WHERE id = %s"
        row = self._do(lambda conn: conn.execute(query, (str(transaction),)).fetchone())
        return None if row is None else State(row[0])

    def issued_again(self, transaction: TransactionId) -> bool:
        """Returns whether the log has given the number to another transaction."""
        query = "SELECT FROM sync.two_phase WHERE starts_with(id, %s) AND id <> %s LIMIT 1"
        prefix = f"{transaction.timeline}-{transaction.number}-"
        return self._do(lambda conn: conn.execute(query, (prefix, str(transaction))).rowcount > 0)

    def hold(self, transaction: TransactionId, branch: str) -> None:
        """Notes that a branch waits for a person, since the log has gone back."""

        def work(conn: psycopg.Connection) -> None:
            conn.execute(_HOLD, (str(transaction), str(Event.LOG_WENT_BACK)))
            conn.execute(_HOLD_BRANCH, (str(transaction), branch))

        self._do(work)

    def presume_abort(self) -> None:
        """Aborts what was held: a person has said that nothing of it was committed anywhere."""
        for found in self.unfinished():
            if found.state is State.HELD:
                self.decide(found.id, Event.PRESUME_ABORT, found.reason)

    def note_done(self, transaction: TransactionId, branches: Iterable[str]) -> None:
        """Notes branches that hold nothing of it any more; finished when all do."""

        def work(conn: psycopg.Connection) -> None:
            conn.execute(_DONE, (str(transaction), list(branches)))
            conn.execute(_FINISH)

        self._do(work)

    def forget(self) -> None:
        """Drops what was finished a month ago."""
        self._do(lambda conn: conn.execute(_FORGET))

    def unfinished(self) -> list[Logged]:
        """Returns what is not finished, oldest first."""
        ends = [str(state) for state in ENDS]
        rows = self._do(lambda conn: conn.execute(_UNFINISHED, (ends,)).fetchall())
        return [_logged(*row) for row in rows]

    def _do(self, work: Callable[[psycopg.Connection], _T]) -> _T:
        try:
            if self._conn is None:
                conn = ledger.connect(self._dsn)
                self._conn = conn
                conn.execute(_SESSION)
            with self._conn.transaction():
                return work(self._conn)
        except psycopg.Error as error:
            self.close()
            place = f"two-phase log at {ledger.server_of(self._dsn)}"
            raise ledger.unavailable(place, error) from None
        except BaseException:
            self.close()
            raise


def _logged(name: str, state: str, reason: str, content: list | None, *rest) -> Logged:
    kept = from_json(content or ())
    return Logged(TransactionId.parse(name), State(state), reason, kept, *rest)
