"""PostgreSQL's branch of a two-phase commit: PREPARE TRANSACTION and what settles it."""

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Iterator, Sequence

import psycopg
from psycopg import sql

from schemas.entities import TABLES
from schemas.tables import POSTGRES_TYPES
from transforms import postgresql_sessions
from transforms.deliver.ledger import server_of
from transforms.deliver.merging.outcomes import is_data
from transforms.deliver.store_schema import SYNC_COLUMNS
from transforms.two_phase.branches import (
    APPLICATION,
    BranchBusy,
    BranchDown,
    BranchRefused,
    BranchSession,
    RowsRefused,
    Settled,
    whole_seconds,
)
from transforms.two_phase.states import Xid
from transforms.two_phase.writes import TableWrite, names_of

_CONNECT_S_MIN = 2  # libpq takes no less.
_TRANSACTION_TIMEOUT_SINCE = 170000
# Connection lost, no room, locked by others, ended by a limit or by a person, a standby.
_DOWN_CLASSES = ("08", "40", "53", "57", "58")
_DOWN_CODES = ("25006", "25P03", "25P04")
_BUSY_CODES = ("40P01", "40001", "55P03")
_UNSETTLED_CODES = ("42704", "55000")
_PREPARED = """\
SELECT gid FROM pg_prepared_xacts
WHERE database = current_database() AND starts_with(gid, %s)"""


class PostgresBranch(BranchSession):
    """A consult store, or any PostgreSQL with its tables, as a `Branch`.

    Prepared transactions need `max_prepared_transactions` above zero, and whoever settles one
    must be who prepared it or a superuser.
    """

    def __init__(self, name: str, dsn: str, seconds: float = 10.0):
        super().__init__(name, seconds)
        self._dsn = dsn
        self._said: str | None = None

    def _begin(self, xid: Xid, seconds: float) -> None:
        kept = self._conn
        limits = "" if kept is None else _session(seconds, kept.info.server_version)
        self._run(f"{limits} BEGIN")

    def write(self, writes: Sequence[TableWrite]) -> None:
        for write in writes:
            self._run(_statement(write.table, write.bare), (write.rows_json, self.name))

    def prepare(self) -> None:
        self._end("PREPARE TRANSACTION", self._xid.gid)

    def prepared(self, coordinator: str) -> list[Xid]:
        prefix = f"campus_sync:{coordinator}:"
        found = [Xid.parse(gid) for (gid,) in self._run(_PREPARED, (prefix,))]
        return sorted(xid for xid in found if xid is not None and xid.branch == self.name)

    def apply(self, writes: Sequence[TableWrite]) -> None:
        self._run("BEGIN")
        self.write(writes)
        self._end("COMMIT")

    def rest(self) -> None:
        """Nothing to do: an open session without a transaction has no limit."""

    def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def _settle(self, xid: Xid, commit: bool) -> Settled:
        verb = sql.SQL("COMMIT PREPARED {}" if commit else "ROLLBACK PREPARED {}")
        try:
            self._run(verb.format(xid.gid))
        except _Unsettled:
            held = xid in self.prepared(xid.coordinator)
            return Settled.HELD if held else Settled.UNKNOWN
        return Settled.DONE

    def _end(self, verb: str, name: str = "") -> None:
        """Ends the transaction; a failed one would be rolled back without an error (trap 33)."""
        self._run(sql.SQL(verb) + (sql.SQL(" {}").format(name) if name else sql.SQL("")))
        if self._said != verb:
            self.close()
            raise BranchDown(f"branch {self.name}: {verb} was answered by a rollback")

    def _run(self, statement, arguments: tuple = ()) -> list[tuple]:
        """Raises BranchDown, BranchRefused; the session is then gone, and what was not prepared."""
        try:
            conn = self._connected()
            with _cut_after(conn, self._seconds):
                cursor = conn.execute(statement, arguments or None)
                self._said = cursor.statusmessage
                return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            self.close()
            raise self._translated(error) from None
        except BaseException:
            self.close()
            raise

    def _connected(self) -> psycopg.Connection:
        if self._conn is None:
            self._conn = postgresql_sessions.connect(
                self._dsn,
                application_name=APPLICATION,
                connect_timeout=whole_seconds(self._seconds, _CONNECT_S_MIN),
            )
            with _cut_after(self._conn, self._seconds):
                self._conn.execute(_session(self._seconds, self._conn.info.server_version))
        return self._conn

    def _translated(self, error: psycopg.Error) -> Exception:
        code = error.sqlstate or ""
        place = f"branch {self.name} at {server_of(self._dsn)}: {type(error).__name__}"
        text = f"{place} ({code or 'connection'})"
        if code in _UNSETTLED_CODES:
            return _Unsettled(text)
        if code in _BUSY_CODES:
            return BranchBusy(text)
        if not code or code[:2] in _DOWN_CLASSES or code in _DOWN_CODES:
            return BranchDown(text)
        return RowsRefused(text) if is_data(error) else BranchRefused(text)


class _Unsettled(BranchRefused):
    """There is no prepared transaction of this name, or another session has it just now."""


def _session(seconds: float, version: int) -> str:
    ms = max(1, int(seconds * 1000))
    # Who waits for others' rows is to say so, rather than that the statement took too long.
    limits = [
        f"SET statement_timeout = {ms}; SET lock_timeout = {max(1, ms * 4 // 5)};",
        f"SET idle_in_transaction_session_timeout = {ms}; SET TimeZone = 'UTC';",
        "SET synchronous_commit = on; SET default_transaction_isolation = 'read committed';",
    ]
    if version >= _TRANSACTION_TIMEOUT_SINCE:
        limits.append(f"SET transaction_timeout = {ms};")
    return " ".join(limits)


@contextlib.contextmanager
def _cut_after(conn: psycopg.Connection, seconds: float) -> Iterator[None]:
    """Breaks the connection after so long: a frozen server answers no limit of its own."""
    descriptor = conn.pgconn.socket
    timer = threading.Timer(seconds + 0.5, _cut, [os.dup(descriptor)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        with contextlib.suppress(OSError):
            os.close(timer.args[0])


def _cut(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
        end.shutdown(socket.SHUT_RDWR)


@functools.cache
def _statement(name: str, bare: bool) -> bytes:
    table = TABLES[name]
    kinds = {column.name: POSTGRES_TYPES[column.kind] for column in table.columns}
    kinds |= {column: kind.split()[0] for column, kind, _ in SYNC_COLUMNS}
    given = names_of(table, bare)
    shape = ", ".join(f'"{column}" {kinds.get(column, "text")}' for column in given)
    shape = shape.replace('"digest" bytea', '"digest" text')
    values = ", ".join(
        "decode(s.digest, 'hex')" if column == "digest" else f's."{column}"' for column in given
    )
    names = ", ".join(f'"{column}"' for column in given)
    changes = ", ".join(f'"{column}" = excluded."{column}"' for column in given[2:])
    return (
        f"INSERT INTO consult.{name} AS t ({names})"
        f" SELECT {values} FROM json_to_recordset(%s) AS s ({shape})"
        # A finished snapshot of the store had the last word of what is older.
        " WHERE NOT EXISTS (SELECT FROM sync.sweep w WHERE w.link = s.campus || '>' || %s"
        " AND w.src_table = s.src_table AND w.lsn > s.src_lsn)"
        f" ON CONFLICT (record_id, campus) DO UPDATE SET {changes}"
        " WHERE (t.src_lsn, t.src_seq) < (excluded.src_lsn, excluded.src_seq)"
    ).encode()
