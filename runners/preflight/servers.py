"""Checks of any PostgreSQL server: reached, its clock, its encoding."""

import collections
import collections.abc

import psycopg

from runners.preflight.findings import Findings
from schemas.config import redact
from transforms import postgresql_sessions

_CONNECT_S = 2  # libpq takes no less.
STATEMENT_MS = 2000
_SKEW_S = 1.0


def connect(dsn: str, **parameters: object) -> psycopg.Connection:
    return postgresql_sessions.connect(
        dsn,
        connect_timeout=_CONNECT_S,
        application_name="campus-sync check",
        **parameters,
    )


def unreachable(dsn: str, error: psycopg.Error, found: Findings) -> None:
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    found.error(
        f"{redact(dsn)} cannot be reached: {reason}",
        f"psql {redact_command(dsn)} -c 'select 1' from this host; then check the server, "
        "its pg_hba.conf and the network.",
    )


def redact_command(dsn: str) -> str:
    """Returns a connection string to paste behind `psql`, without any password."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    parts = {key: value for key, value in parts.items() if "password" not in key}
    return '"' + psycopg.conninfo.make_conninfo("", **parts) + '"'


def check_clock(
    connection: psycopg.Connection,
    found: Findings,
    wall_clock: collections.abc.Callable[[], float],
) -> None:
    before = wall_clock()
    there = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()[0]
    after = wall_clock()
    skew = there - (before + after) / 2
    if abs(skew) - (after - before) / 2 > _SKEW_S:
        side = "ahead of" if skew > 0 else "behind"
        found.warning(
            f"its clock is {abs(skew):.1f} s {side} this host's: measured delays are wrong by it",
            "timedatectl status on both; sudo chronyc makestep",
        )


def check_encoding(connection: psycopg.Connection, found: Findings) -> None:
    database, encoding = connection.execute(
        "SELECT current_database(), pg_encoding_to_char(encoding) FROM pg_database"
        " WHERE datname = current_database()"
    ).fetchone()
    if encoding != "UTF8":
        remedy = f"CREATE DATABASE {database}_utf8 ENCODING 'UTF8' TEMPLATE template0;"
        what = f"database {database} is in {encoding}, not UTF8"
        if encoding == "SQL_ASCII":
            found.error(f"{what}: the meaning of its bytes is not known", remedy)
        else:
            found.warning(f"{what}: characters it lacks cannot be carried", remedy)
