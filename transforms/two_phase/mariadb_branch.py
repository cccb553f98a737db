"""MariaDB's branch of a two-phase commit: XA, and the canonical tables as MariaDB has them."""

import contextlib
import functools
import struct
from collections.abc import Sequence

import pymysql
from pymysql.constants import CR, ER

from schemas.entities import TABLES
from schemas.tables import Kind, Table
from transforms.capture.mariadb.dsn import parse_dsn
from transforms.capture.mariadb.session import opened
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
from transforms.two_phase.states import XID_FORMAT, Xid
from transforms.two_phase.writes import TableWrite, names_of

_XAER_NOTA = 1397
_XA_RBROLLBACK = 1402
_DOWN = {
    *(CR.CR_CONN_HOST_ERROR, CR.CR_CONNECTION_ERROR, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST),
    *(ER.CON_COUNT_ERROR, ER.SERVER_SHUTDOWN),
    *(1290, 1792),  # The server, or the transaction, is read only.
    *(1927, 1969),  # The connection was killed; max_statement_time has passed.
}
_BUSY = {ER.LOCK_WAIT_TIMEOUT, ER.LOCK_DEADLOCK}
# Beside pymysql's own classes: a wrong value, a wrong character, a row or packet too large.
_ROWS = {1366, 1292, 1118, 1153, 1301}
_LOST = (OSError, struct.error, pymysql.err.InterfaceError)
_SCALE = 30
_REST_S = 3600  # A session that is kept and holds nothing may be silent so long.
_TYPES = {
    Kind.TEXT: "LONGTEXT",
    Kind.INT: "BIGINT",
    # Rounding would be silent: texts with more places than these are refused.
    Kind.DECIMAL: f"DECIMAL(65, {_SCALE})",
    Kind.BOOL: "BOOLEAN",
    Kind.DATE: "DATE",
    Kind.TIME: "DATETIME(6)",
}
_SYNC_TYPES = {
    "src_table": "VARCHAR(255) NOT NULL",
    "src_lsn": "BIGINT NOT NULL",
    "src_seq": "INT NOT NULL",
    "committed_at": "DATETIME(6) NOT NULL",
    "hlc": "BIGINT NOT NULL",
    "lane": "CHAR(1) NOT NULL",
    "security_level": "SMALLINT NOT NULL",
    "digest": "BINARY(32)",
    "deleted": "BOOLEAN NOT NULL",
}


class MariaDbBranch(BranchSession):
    """A MariaDB (10.5 or newer) that holds the canonical tables, as a `Branch`.

    `dsn` is of transforms/capture/mariadb/dsn.py. Since 10.5 a prepared branch outlives its
    session, but as long as that session lives no other one can settle the branch: the server is
    told to end sessions of ours that fall silent.
    """

    def __init__(self, name: str, dsn: str, seconds: float = 10.0):
        super().__init__(name, seconds)
        self._server = parse_dsn(dsn)

    def _begin(self, xid: Xid, seconds: float) -> None:
        if self._conn is not None:
            self._run(_limits(seconds))
        self._run(f"XA START {_literal(xid)}")

    def write(self, writes: Sequence[TableWrite]) -> None:
        for write in writes:
            self._write(write)

    def prepare(self) -> None:
        self._run(f"XA END {_literal(self._xid)}")
        self._run(f"XA PREPARE {_literal(self._xid)}")

    def prepared(self, coordinator: str) -> list[Xid]:
        found = []
        for number, length, _, data in self._run("XA RECOVER"):
            text = data if isinstance(data, bytes) else data.encode("latin-1")
            if number == XID_FORMAT and text[length:] == self.name.encode():
                gtrid = text[:length].decode("ascii", "replace")
                xid = Xid.parse(f"campus_sync:{gtrid}:{self.name}")
                if xid is not None and xid.coordinator == coordinator:
                    found.append(xid)
        return sorted(found)

    def apply(self, writes: Sequence[TableWrite]) -> None:
        self._run("BEGIN")
        self.write(writes)
        self._run("COMMIT")

    def rest(self) -> None:
        # What fails has ended the session: then there will be a new one.
        with contextlib.suppress(BranchDown, BranchRefused):
            self._run(f"SET wait_timeout = {_REST_S}")

    def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None and conn.open:
            try:
                conn.close()
            except (pymysql.Error, *_LOST):
                conn._force_close()

    def _settle(self, xid: Xid, commit: bool) -> Settled:
        try:
            self._run(f"XA {'COMMIT' if commit else 'ROLLBACK'} {_literal(xid)}")
        except _RolledBack:
            if commit:  # A promise was broken: never taken for done.
                raise
        except _Unknown:
            # Also said of a branch that another session still holds.
            held = xid in self.prepared(xid.coordinator)
            return Settled.HELD if held else Settled.UNKNOWN
        return Settled.DONE

    def _write(self, write: TableWrite) -> None:
        names = names_of(TABLES[write.table], write.bare)
        rows = [self._values(write.table, names, row) for row in write.rows]
        self._run(_statement(write.table, write.bare), rows)

    def _values(self, name: str, names: Sequence[str], row: dict) -> tuple:
        table = TABLES[name]
        values = []
        for column in names:
            value = row[column]
            declared = table.by_name.get(column)
            kind = declared.kind if declared else None
            if value is None:
                pass
            elif kind is Kind.TIME or column == "committed_at":
                value = value.removesuffix("Z")
            elif kind is Kind.DECIMAL and len(value.partition(".")[2]) > _SCALE:
                self.close()
                raise RowsRefused(f"branch {self.name}: {name}.{column} has too many places")
            elif column == "digest":
                value = bytes.fromhex(value)
            values.append(value)
        return tuple(values)

    def _run(self, statement: str, rows: Sequence[tuple] | None = None) -> Sequence[tuple]:
        """Raises BranchDown, BranchRefused; the session is then gone, and what was not prepared."""
        try:
            with self._connected().cursor() as cursor:
                if rows is None:
                    cursor.execute(statement)
                else:
                    cursor.executemany(statement, rows)
                return cursor.fetchall()
        except (pymysql.Error, *_LOST) as error:
            self.close()
            raise self._translated(error) from None
        except BaseException:
            self.close()
            raise

    def _connected(self) -> pymysql.Connection:
        if self._conn is None:
            seconds = whole_seconds(self._seconds)
            self._conn = opened(
                self._server,
                autocommit=True,
                connect_timeout=seconds,
                read_timeout=seconds + 1,
                write_timeout=seconds + 1,
                program_name=APPLICATION,
            )
            with self._conn.cursor() as cursor:
                cursor.execute("SET sql_mode = 'STRICT_ALL_TABLES', time_zone = '+00:00'")
                cursor.execute(_limits(self._seconds))
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        return self._conn

    def _translated(self, error: BaseException) -> Exception:
        code = error.args[0] if isinstance(error, pymysql.Error) and error.args else 0
        text = f"branch {self.name} at {self._server.place}: {type(error).__name__} ({code})"
        if code == _XAER_NOTA:
            return _Unknown(text)
        if code == _XA_RBROLLBACK:
            return _RolledBack(text)
        if code in _BUSY:
            return BranchBusy(text)
        if not code or code in _DOWN or isinstance(error, _LOST):
            return BranchDown(text)
        content = isinstance(error, pymysql.err.DataError | pymysql.err.IntegrityError)
        return RowsRefused(text) if content or code in _ROWS else BranchRefused(text)


def _limits(seconds: float) -> str:
    """Returns the statement by which the server ends what takes longer, and a silent session."""
    whole = whole_seconds(seconds)
    return (
        f"SET innodb_lock_wait_timeout = {whole}, lock_wait_timeout = {whole},"
        f" max_statement_time = {whole}, wait_timeout = {whole + 1},"
        f" idle_transaction_timeout = {whole}"
    )


class _Unknown(BranchRefused):
    """There is no prepared branch of this name, or another session has it."""


class _RolledBack(BranchRefused):
    """The server has rolled the branch back by itself."""


def mariadb_ddl(table: Table) -> str:
    """Returns the statement that creates a canonical table in MariaDB, if absent.

    A trailing blank tells two keys apart, as in PostgreSQL.
    """
    own = [f"`{column.name}` {_TYPES[column.kind]}" for column in table.columns]
    sync = [f"`{name}` {kind}" for name, kind in _SYNC_TYPES.items()]
    return (
        f"CREATE TABLE IF NOT EXISTS `{table.name}` (`campus` VARCHAR(64) NOT NULL,"
        f" `record_id` VARCHAR(512) NOT NULL, {', '.join((*own, *sync))},"
        f" PRIMARY KEY (`record_id`, `campus`), KEY (`{table.patient}`(64), `campus`))"
        " ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"
    )


@functools.cache
def _statement(name: str, bare: bool) -> str:
    given = names_of(TABLES[name], bare)
    newer = (
        "(`src_lsn` < VALUES(`src_lsn`)"
        " OR `src_lsn` = VALUES(`src_lsn`) AND `src_seq` < VALUES(`src_seq`))"
    )
    # Assigned from left to right, each seeing those before it: the place changes last.
    order = [column for column in given[2:] if column not in ("src_seq", "src_lsn")]
    changes = ", ".join(
        f"`{column}` = IF({newer}, VALUES(`{column}`), `{column}`)"
        for column in (*order, "src_seq", "src_lsn")
    )
    return (
        f"INSERT INTO `{name}` ({', '.join(f'`{column}`' for column in given)})"
        f" VALUES ({', '.join(['%s'] * len(given))}) ON DUPLICATE KEY UPDATE {changes}"
    )


def _literal(xid: Xid) -> str:
    """Returns an XID as SQL: hexadecimal, so that nothing in it needs an escape."""
    return f"X'{xid.gtrid.encode().hex()}',X'{xid.branch.encode().hex()}',{XID_FORMAT}"
