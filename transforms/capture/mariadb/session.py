"""Open connections to MariaDB and MySQL with settings that fix how values are written."""

import contextlib
import ssl
import struct
from collections.abc import Iterator, Sequence

import pymysql
from pymysql.constants import ER

from schemas.errors import SourceUnavailable
from transforms.capture.mariadb.dsn import Server, parse_dsn
from transforms.capture.mariadb.errors import RightsMissing

_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 120
# Whatever the server's own are: no mode pads or reinterprets a value, times come in UTC, and a
# reader that waits for room in its store is not thrown out.
_SETTINGS = (
    "SET sql_mode = ''",
    "SET time_zone = '+00:00'",
    "SET net_write_timeout = 28800, net_read_timeout = 3600, wait_timeout = 28800",
)
_DENIED = {
    ER.ACCESS_DENIED_ERROR,
    ER.DBACCESS_DENIED_ERROR,
    ER.TABLEACCESS_DENIED_ERROR,
    ER.COLUMNACCESS_DENIED_ERROR,
    ER.SPECIFIC_ACCESS_DENIED_ERROR,
}
_LOST = (OSError, struct.error, pymysql.err.InterfaceError)


def opened(server: Server, **options) -> pymysql.Connection:
    """Returns a connection as its string says, encrypted and verified where that names a CA.

    Raises:
      pymysql.Error: there is none. ConfigError: the password's file cannot be read.
    """
    context = ssl.create_default_context(cafile=server.ssl_ca) if server.ssl_ca else None
    return pymysql.connect(
        host=server.host,
        port=server.port,
        user=server.user,
        password=server.secret(),
        database=server.database,
        charset="utf8mb4",
        ssl=context,
        **options,
    )


def connect(server: Server) -> pymysql.Connection:
    """Returns an autocommit connection.

    Raises:
      SourceUnavailable, RightsMissing: the texts name server, account and error number only.
    """
    try:
        connection = opened(
            server,
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            program_name="campus_sync",
        )
    except pymysql.Error as error:
        raise translated(server, error) from error
    try:
        with connection.cursor() as cursor:
            for setting in _SETTINGS:
                cursor.execute(setting)
    except (pymysql.Error, *_LOST) as error:
        connection.close()
        raise translated(server, error) from error
    return connection


@contextlib.contextmanager
def session(dsn: str | Server) -> Iterator[pymysql.cursors.Cursor]:
    """Yields a cursor of a new connection, which is closed at the end.

    Raises:
      SourceUnavailable, RightsMissing: as for `connect`, or the connection was lost.
    """
    server = parse_dsn(dsn) if isinstance(dsn, str) else dsn
    connection = connect(server)
    try:
        with contextlib.closing(connection), connection.cursor() as cursor:
            yield cursor
    except (pymysql.err.OperationalError, pymysql.err.InternalError, *_LOST) as error:
        raise translated(server, error) from error


def translated(server: Server, error: BaseException) -> SourceUnavailable | RightsMissing:
    """Returns our error for one of the driver's, whose text may quote data and is left out."""
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    cause = str(code) if code else type(error).__name__
    if code in _DENIED:
        return RightsMissing(
            f"source {server.place} denies {server.user} what is needed (error {code}): GRANT "
            "SELECT on the tables, REPLICATION SLAVE and BINLOG MONITOR (MySQL: REPLICATION "
            "CLIENT) ON *.* to it, and check its password."
        )
    return SourceUnavailable(
        f"source {server.place} cannot be reached or dropped the connection: {cause}"
    )


def variables(cursor: pymysql.cursors.Cursor, names: Sequence[str]) -> dict[str, str]:
    """Returns global variables by name; those that the server does not have are absent."""
    marks = ", ".join(["%s"] * len(names))
    cursor.execute(f"SHOW GLOBAL VARIABLES WHERE variable_name IN ({marks})", list(names))
    return {str(name).lower(): str(value) for name, value in cursor.fetchall()}


def charsets_by_collation(cursor: pymysql.cursors.Cursor) -> dict[int, str]:
    """Returns the character set of every collation id that the server has."""
    found = {}
    for table in ("COLLATIONS", "COLLATION_CHARACTER_SET_APPLICABILITY"):
        # The second has the ids of newer MariaDB's collations, and none in MySQL.
        with contextlib.suppress(pymysql.err.OperationalError):
            cursor.execute(
                f"SELECT ID, CHARACTER_SET_NAME FROM information_schema.{table} "
                "WHERE ID IS NOT NULL AND CHARACTER_SET_NAME IS NOT NULL"
            )
            found |= {int(number): str(name) for number, name in cursor.fetchall()}
    return found


def is_mariadb(cursor: pymysql.cursors.Cursor) -> bool:
    """Returns whether the server is MariaDB rather than MySQL."""
    cursor.execute("SELECT VERSION()")
    return "mariadb" in str(cursor.fetchone()[0]).lower()


def clock_us(cursor: pymysql.cursors.Cursor) -> int:
    """Returns the source's clock, microseconds since 1970."""
    cursor.execute("SELECT CAST(UNIX_TIMESTAMP(SYSDATE(6)) * 1000000 AS UNSIGNED)")
    return int(cursor.fetchone()[0])
