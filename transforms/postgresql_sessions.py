"""Open PostgreSQL sessions that notice when the other end is gone without a word."""

import typing

import psycopg
from psycopg.conninfo import conninfo_to_dict

# Where the connection string says nothing else. Whoever waits for an answer hears nothing of a host
# that lost its power, or of a firewall that forgot the connection: by Linux's own settings for two
# hours.
_USUAL = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def connect(dsn: str, **options: typing.Any) -> psycopg.Connection:
    """Returns an autocommit connection; one whose other end is gone breaks within half a minute.

    Args:
      options: libpq's and psycopg's. What `dsn` says of keepalives, and of the 5 s for connecting,
        stands.

    Raises:
      psycopg.OperationalError: there is none.
    """
    said = conninfo_to_dict(dsn)
    usual = {name: value for name, value in _USUAL.items() if name not in said}
    return psycopg.connect(dsn, **{"autocommit": True} | usual | options)
