"""Open PostgreSQL sessions that notice when the other end is gone without a word."""

import typing

import psycopg
from psycopg.conninfo import conninfo_to_dict

# Whoever waits for an answer hears nothing of a host that lost its power, or of a firewall that
# forgot the connection: by Linux's own settings for two hours.
_ALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def connect(dsn: str, **options: typing.Any) -> psycopg.Connection:
    """Returns an autocommit connection; one whose other end is gone breaks within half a minute.

    Args:
      options: libpq's and psycopg's; what `dsn` says of keepalives itself stands.

    Raises:
      psycopg.OperationalError: there is none.
    """
    said = conninfo_to_dict(dsn)
    alive = {name: value for name, value in _ALIVE.items() if name not in said}
    return psycopg.connect(dsn, **{"autocommit": True} | alive | options)
