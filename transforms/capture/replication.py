"""Read a PostgreSQL replication stream at libpq's level, and answer for it."""

import dataclasses
import select
import struct
import typing
from collections.abc import Callable, Iterator

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from schemas.clocks import monotonic_s, wall_clock_us
from schemas.errors import CampusSyncError, SourceUnavailable
from schemas.positions import format_lsn
from transforms.capture.pgoutput import POSTGRES_EPOCH_US

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
_SILENCE_ASK_S = 10.0  # A silent server is asked for a sign of life,
_SILENCE_MAX_S = 30.0  # and given up.
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
      caught_up: nothing more could be read without waiting.
    """

    payloads: list[bytes | memoryview]
    wal_end: int
    server_us: int
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
        return psycopg.connect(make_conninfo(dsn, **more), autocommit=True)
    except psycopg.OperationalError as error:
        raise unavailable(given, error) from error


def unavailable(server: dict[str, typing.Any], error: psycopg.Error) -> SourceUnavailable:
    """Returns the error for a lost source; PostgreSQL's own text may quote data and is left out."""
    cause = error.sqlstate or type(error).__name__
    place = f"{server.get('host', 'local')}:{server.get('port', 5432)}/{server.get('dbname', '')}"
    return SourceUnavailable(f"source {place} cannot be reached or dropped the connection: {cause}")


class CopyReader:
    """Reads CopyData payloads from a connection in copy mode, many at a time."""

    def __init__(self, pgconn: pq.abc.PGconn):
        self._pgconn = pgconn
        self._poll = select.poll()
        self._poll.register(pgconn.socket, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """Returns whether something came within the time."""
        return bool(self._poll.poll(max(0, timeout_s) * 1000))

    def read(self, max_bytes: int) -> tuple[list[bytes | memoryview], bool]:
        """Returns what can be read without waiting, and whether the copy has ended.

        It stops after the payload that reaches `max_bytes`.

        Raises:
          psycopg.OperationalError: the connection is lost.
        """
        payloads: list[bytes | memoryview] = []
        get, take = self._pgconn.get_copy_data, payloads.append
        size = 0
        while size < max_bytes:
            count, payload = get(1)
            if count > 0:
                take(payload)
                size += count
            elif count < 0:
                return payloads, True
            elif self._poll.poll(0):
                self._pgconn.consume_input()
            else:
                break
        return payloads, False
