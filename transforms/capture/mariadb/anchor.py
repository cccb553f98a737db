"""Whether a binlog is still the one that was read: by the transaction at a place that is known.

A log that was begun anew (RESET MASTER) and has grown past our place looks like the old one by
file and offset alone. What stood there tells: a GTID is given once.
"""

import typing

import pymysql
from pymysql.constants import ER

from transforms.capture.mariadb.places import file_name, is_transaction, place_of
from transforms.capture.mariadb.session import session
from transforms.capture.mariadb.state import LogState

# `Wrong offset or I/O error`, no such file: there is another log at this place, or none.
_NOT_THERE = (ER.ERROR_WHEN_EXECUTING_COMMAND,)


class Anchor(typing.NamedTuple):
    """What stands, or stood, at a place of the log.

    Attributes:
      lsn: of a transaction, or of a border between two.
      gtid: the transaction's; at a border, the last of each domain before it, comma-separated.
    """

    lsn: int
    gtid: str


def stands(found: LogState, anchor: Anchor) -> bool:
    """Returns whether the source's log still has at the anchor what was there.

    True where that cannot be told any more: its file is no longer kept.

    Raises:
      SourceUnavailable, RightsMissing: as they say.
    """
    if not anchor.gtid or anchor.lsn < found.oldest_lsn:
        return True
    if anchor.lsn > found.log_end_lsn + 1:
        return False
    place = place_of(anchor.lsn)
    name = file_name(found.base, place.file)
    with session(found.server) as cursor:
        if not is_transaction(anchor.lsn):
            return not found.mariadb or same_gtids(gtids_before(cursor, name, place.offset), anchor)
        try:
            cursor.execute(f"SHOW BINLOG EVENTS IN %s FROM {place.offset} LIMIT 1", (name,))
            row = cursor.fetchone()
        except pymysql.MySQLError as error:
            if error.args and error.args[0] in _NOT_THERE:
                return False
            raise
    return row is not None and is_named(str(row[5]), anchor.gtid, found.mariadb)


def is_named(info: str, gtid: str, mariadb: bool) -> bool:
    """Returns whether an event's description, as the server gives it, is of this transaction.

    MariaDB says `BEGIN GTID 0-1-7`; MySQL `SET @@SESSION.GTID_NEXT= '<uuid>:7'`, of which the
    decoder keeps the number.
    """
    if mariadb:
        return gtid in info.split()
    return info.rstrip("'").endswith(f":{gtid.rpartition('-')[2]}")


def same_gtids(found: str, anchor: Anchor) -> bool:
    """Returns whether two lists of GTIDs are equal, in whatever order."""
    return sorted(found.split(",")) == sorted(anchor.gtid.split(","))


def gtids_before(cursor: pymysql.cursors.Cursor, name: str, offset: int) -> str:
    """Returns the last transaction of each domain before a place of MariaDB's log."""
    cursor.execute("SELECT BINLOG_GTID_POS(%s, %s)", (name, offset))
    return str(cursor.fetchone()[0] or "")
