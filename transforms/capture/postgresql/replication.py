"""Read a PostgreSQL replication stream at libpq's level, and answer for it."""

import dataclasses
import select
import struct
import typing
from collections.abc import Callable

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from schemas.clocks import monotonic_s, wall_clock_us
from schemas.errors import CampusSyncError, SourceUnavailable
from schemas.positions import format_lsn
from transforms import postgresql_sessions
from transforms.capture.postgresql.pgoutput import POSTGRES_EPOCH_US

# Stream and snapshot must write a value in the same words (trap 12), so that both are told the
# same, whatever the role's and the database's own settings are. `row_security=off` turns a row
# that a policy would hide into an error.
_SETTINGS = {
    "datestyle": "ISO",
    "timezone": "UTC",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "xmlbinary": "base64",
    "lc_monetary": "C",
    "search_path": "pg_catalog",
    "row_security": "off",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
_CONNECT_TIMEOUT_S = 10
_STATUS_S = 2.0  # Far below any sensible wal_sender_timeout.
_CLOSE_S = 2.0
_SILENCE_ASK_S = 10.0  # A silent server is asked for a sign of life,
_SILENCE_MAX_S = 30.0  # and given up.
_WAITING_S = 1.0
_REQUESTS_MAX = 20  # In a second; a server that goes on asks once in many.
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")

_UNDEFINED, _IN_USE, _NOT_AS_REQUIRED = "42704", "55006", "55000"


class SlotMissing(CampusSyncError):
    """The replication slot does not exist: its log is not kept (trap 7)."""


class SlotInvalidated(CampusSyncError):
    """The replication slot cannot give the log that is asked for: it is gone (trap 6)."""


class PublicationMissing(CampusSyncError):
    """The publication does not exist or does not publish what is needed."""


@dataclasses.dataclass(frozen=True)
class Read:
    """What one `ReplicationStream.read` found.

    Attributes:
      payloads: CopyData payloads in order, for `PgOutputDecoder.feed`.
      wal_end: the source has sent every transaction committed before here; 0 if not known yet.
      server_us: the source's clock when it said so, microseconds since 1970.
      sent_us: the source's clock when it sent the newest payload; 0 if there is none.
      caught_up: nothing more could be read without waiting.
    """

    payloads: list[bytes]
    wal_end: int
    server_us: int
    sent_us: int
    caught_up: bool


def connect(dsn: str, replication: bool = False) -> psycopg.Connection:
    """Returns an autocommit connection to a source, with the settings that fix text forms.

    Raises:
      SourceUnavailable: the text names no more than server, database and cause.
    """
    given = conninfo_to_dict(dsn)
    options = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    more = {
        "options": f"{given.get('options', '')} {options}".strip(),
        "client_encoding": "UTF8",
        "application_name": "campus_sync",
        "connect_timeout": given.get("connect_timeout", _CONNECT_TIMEOUT_S),
    }
    if replication:
        more["replication"] = "database"
    try:
        return postgresql_sessions.connect(make_conninfo(dsn, **more))
    except psycopg.OperationalError as error:
        raise unavailable(given, error) from error


def _sent_us(payload: bytes) -> int:
    """Returns when XLogData left its server: its head is `w`, two LSNs and this time."""
    return struct.unpack_from("!q", payload, 17)[0] + POSTGRES_EPOCH_US


def unavailable(server: dict[str, typing.Any], error: psycopg.Error) -> SourceUnavailable:
    """Returns the error for a lost source; PostgreSQL's own text may quote data and is left out."""
    cause = error.sqlstate or type(error).__name__
    place = f"{server.get('host', 'local')}:{server.get('port', 5432)}/{server.get('dbname', '')}"
    return SourceUnavailable(f"source {place} cannot be reached or dropped the connection: {cause}")


def start_copy(connection: psycopg.Connection, command: sql.Composable) -> pq.abc.PGresult | None:
    """Sends a command that begins a copy; returns its result, which may be a refusal.

    The connection is of no more use for anything but copies.

    Raises:
      psycopg.OperationalError: the connection is lost.
    """
    pgconn = connection.pgconn
    query = command.as_bytes(connection)
    if pgconn.parameter_status(b"server_encoding") == b"SQL_ASCII":
        # Such a server does not know its encoding and would end the copy at a byte that is not
        # UTF-8; the decoder refuses that row alone.
        pgconn.exec_(b"SET client_encoding = 'SQL_ASCII'")
    return first_result(pgconn, query)


def first_result(
    pgconn: pq.abc.PGconn, query: bytes, waiting: Callable[[], None] = lambda: None
) -> pq.abc.PGresult | None:
    """Sends a query and returns its first result; calls `waiting` each second until it comes.

    Raises:
      psycopg.OperationalError: the connection is lost. What `waiting` raises.
    """
    pgconn.send_query(query)
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    while True:
        pgconn.flush()
        pgconn.consume_input()
        if not pgconn.is_busy():
            return pgconn.get_result()
        if not poll.poll(_WAITING_S * 1000):
            waiting()


class Copied(typing.NamedTuple):
    """Payloads in order; whether nothing more could be read without waiting; or ever."""

    payloads: list[bytes]
    drained: bool
    ended: bool


class CopyReader:
    """Reads CopyData payloads from a connection in copy mode, many at a time."""

    def __init__(self, pgconn: pq.abc.PGconn):
        self._pgconn = pgconn
        self._poll = select.poll()
        self._poll.register(pgconn.socket, select.POLLIN)
        # TLS may hold up to a record of bytes that the socket no longer shows.
        self._spare = 3 if pgconn.ssl_in_use else 0

    def wait(self, timeout_s: float) -> bool:
        """Returns whether something came within the time."""
        return bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def read(self, max_bytes: int) -> Copied:
        """Returns what can be read without waiting; stops after the payload at `max_bytes`.

        Raises:
          psycopg.OperationalError: the connection is lost.
        """
        payloads: list[bytes] = []
        get, take = self._pgconn.get_copy_data, payloads.append
        size, spare = 0, self._spare
        while size < max_bytes:
            count, payload = get(1)
            if count > 0:
                # Bytes, since a view of libpq's memory costs the garbage collector thrice the copy.
                take(bytes(payload))
                size += count
            elif count < 0:
                return Copied(payloads, True, True)
            elif self._poll.poll(0):
                self._pgconn.consume_input()
                spare = self._spare
            elif spare:
                self._pgconn.consume_input()
                spare -= 1
            else:
                return Copied(payloads, True, False)
        return Copied(payloads, False, False)


class ReplicationStream:
    """A running START_REPLICATION of a logical slot, pgoutput version 1.

    Everything before `start_lsn`, and later before what `acknowledge` was given, is told to
    the source as applied: it may throw that log away. Not thread-safe.

    Args:
      dsn, slot, publication: the source; the role needs REPLICATION.
      start_lsn: the first commit that may be needed starts here or later.
      now_us, monotonic: clocks.

    Raises:
      SourceUnavailable: no connection, or another reader has the slot.
      SlotMissing, SlotInvalidated, PublicationMissing: as they say.
    """

    def __init__(
        self,
        dsn: str,
        slot: str,
        publication: str,
        start_lsn: int,
        now_us: Callable[[], int] = wall_clock_us,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._server = conninfo_to_dict(dsn)
        self._slot, self._publication = slot, publication
        self._now_us, self._monotonic = now_us, monotonic
        self._acknowledged = start_lsn
        self._wal_end = self._server_us = 0
        self._silent_s = 0.0
        self._asked: tuple[float, int] = (0.0, 0)
        self._publication_lost = False
        self._still = True
        self._connection = connect(dsn, replication=True)
        try:
            self._check(start_lsn)
            self._start(start_lsn)
        except psycopg.OperationalError as error:
            self._connection.close()
            raise unavailable(self._server, error) from error
        except CampusSyncError:
            self._connection.close()
            raise
        self._reader = CopyReader(self._connection.pgconn)
        self._status_at = self._monotonic()

    def __enter__(self) -> "ReplicationStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def read(self, max_bytes: int, timeout_s: float) -> Read:
        """Returns what has come, at least `max_bytes` of it or all; waits only for the first.

        Raises:
          SourceUnavailable: the connection is lost, silent, or the source is stopping.
          SlotInvalidated: the source ended the stream since the slot's log is gone.
          PublicationMissing: the publication was dropped.
        """
        deadline = self._monotonic() + timeout_s
        try:
            while True:
                self.keep_alive()
                copied = self._reader.read(max_bytes)
                self._still = copied.drained
                payloads = self._take_keepalives(copied.payloads)
                if copied.ended:
                    raise self._ended()
                if self._publication_lost:
                    raise self._no_publication()
                now = self._monotonic()
                if payloads or now >= deadline:
                    sent_us = _sent_us(payloads[-1]) if payloads else 0
                    return Read(payloads, self._wal_end, self._server_us, sent_us, copied.drained)
                self._wait(min(deadline, self._status_at + _STATUS_S) - now)
        except psycopg.OperationalError as error:
            raise unavailable(self._server, error) from error

    def acknowledge(self, lsn: int) -> None:
        """Tells the source that every transaction committed before `lsn` is applied.

        Raises:
          SourceUnavailable: the connection is lost.
        """
        if lsn > self._acknowledged:
            self._acknowledged = lsn
            self._send_status()

    def keep_alive(self) -> None:
        """Gives the sign of life that is due; call it every few seconds while not reading.

        Raises:
          SourceUnavailable: the connection is lost.
        """
        if self._monotonic() - self._status_at >= _STATUS_S:
            self._send_status(ask=self._silent_s >= _SILENCE_ASK_S)

    def close(self) -> None:
        """Ends the stream; where it stands still, waits a moment until the slot is free.

        Inside a long transaction the source would only stop at its end: then it is left to
        find the connection gone.
        """
        try:
            if self._still:
                self._end_copy()
        except psycopg.OperationalError:
            pass  # It is gone already.
        finally:
            self._connection.close()

    def _end_copy(self) -> None:
        deadline = self._monotonic() + _CLOSE_S
        self._connection.pgconn.put_copy_end()
        self._connection.pgconn.flush()
        while not self._reader.read(1 << 20).ended:
            left = deadline - self._monotonic()
            if left <= 0:
                return
            self._reader.wait(left)

    def _check(self, start_lsn: int) -> None:
        """Looks before the start, which would pass over lost log and a missing publication."""
        row = self._connection.execute(
            sql.SQL(
                "SELECT (confirmed_flush_lsn - '0/0')::text, wal_status,"
                " to_jsonb(s) ->> 'invalidation_reason', active FROM pg_replication_slots s"
                " WHERE slot_name = {} AND slot_type = 'logical' AND database = current_database()"
            ).format(sql.Literal(self._slot))
        ).fetchone()
        if row is None:
            raise SlotMissing(f"replication slot {self._slot} does not exist in this database.")
        confirmed, wal_status, invalidation, active = row
        if wal_status == "lost" or invalidation:
            raise self._invalidated(invalidation or "its log was removed")
        if int(confirmed) > start_lsn:
            raise self._invalidated(f"it was advanced past {format_lsn(start_lsn)}")
        if active:
            raise SourceUnavailable(f"replication slot {self._slot} has another reader.")
        query = sql.SQL("SELECT FROM pg_publication WHERE pubname = {}")
        query = query.format(sql.Literal(self._publication))
        if self._connection.execute(query).fetchone() is None:
            raise self._no_publication()

    def _start(self, start_lsn: int) -> None:
        pgconn = self._connection.pgconn
        # Version 18 goes on without a publication that is dropped, and says so in a warning only.
        pgconn.notice_handler = self._take_notice
        names = sql.Literal(sql.Identifier(self._publication).as_string(self._connection))
        command = sql.SQL(
            "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {})"
        ).format(sql.Identifier(self._slot), sql.SQL(format_lsn(start_lsn)), names)
        result = start_copy(self._connection, command)
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            raise self._refused(result)

    def _take_keepalives(self, payloads: list[bytes]) -> list[bytes]:
        """Returns the data alone; answers and remembers the rest."""
        if payloads:
            self._silent_s = 0.0
        found = [payload for payload in payloads if len(payload) == _KEEPALIVE.size]
        if not found:
            return payloads
        wanted = False
        for payload in found:
            _, wal_end, server_us, reply = _KEEPALIVE.unpack(payload)
            self._wal_end = max(self._wal_end, wal_end)
            self._server_us = server_us + POSTGRES_EPOCH_US
            wanted |= bool(reply)
        if wanted:
            self._count_request()
            self._send_status()
        return [payload for payload in payloads if len(payload) != _KEEPALIVE.size]

    def _count_request(self) -> None:
        """Lets a stopping server go: it asks on and on until all of its log is applied.

        Otherwise a store that is down would hold up the stop of a hospital's database.
        """
        since, count = self._asked
        now = self._monotonic()
        self._asked = (since, count + 1) if now - since < 1 else (now, 1)
        if self._asked[1] >= _REQUESTS_MAX:
            raise SourceUnavailable("the source is stopping and waits for its readers to leave.")

    def _send_status(self, ask: bool = False) -> None:
        lsn, now = self._acknowledged, self._now_us() - POSTGRES_EPOCH_US
        try:
            self._connection.pgconn.put_copy_data(_STATUS.pack(b"r", lsn, lsn, lsn, now, ask))
            self._connection.pgconn.flush()
        except psycopg.OperationalError as error:
            raise unavailable(self._server, error) from error
        self._status_at = self._monotonic()

    def _wait(self, timeout_s: float) -> None:
        before = self._monotonic()
        self._reader.wait(timeout_s)
        self._silent_s += self._monotonic() - before
        if self._silent_s >= _SILENCE_MAX_S:
            raise SourceUnavailable(f"the source said nothing for {_SILENCE_MAX_S:.0f} s.")

    def _take_notice(self, notice: pq.abc.PGresult) -> None:
        fields = pq.DiagnosticField
        severity = notice.error_field(fields.SEVERITY_NONLOCALIZED)
        state = notice.error_field(fields.SQLSTATE)
        self._publication_lost |= (severity, state) == (b"WARNING", _NOT_AS_REQUIRED.encode())

    def _ended(self) -> CampusSyncError:
        """Returns why the source ended the stream."""
        return self._refused(self._connection.pgconn.get_result())

    def _refused(self, result: pq.abc.PGresult | None) -> CampusSyncError:
        state = result and result.error_field(pq.DiagnosticField.SQLSTATE)
        state = (state or b"").decode()
        if state == _UNDEFINED:
            return SlotMissing(f"replication slot {self._slot} or its publication was dropped.")
        if state == _NOT_AS_REQUIRED:
            return self._invalidated("the source refused it")
        if state == _IN_USE:
            return SourceUnavailable(f"replication slot {self._slot} has another reader.")
        return SourceUnavailable(f"the source ended the stream: {state or 'no reason given'}.")

    def _invalidated(self, reason: str) -> SlotInvalidated:
        return SlotInvalidated(f"replication slot {self._slot} has a gap: {reason}.")

    def _no_publication(self) -> PublicationMissing:
        return PublicationMissing(
            f"publication {self._publication} does not exist: changes made without it are not "
            "in the stream."
        )
