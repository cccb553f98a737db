"""Make, watch and drop replication slots, and see that a publication covers the tables."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict

from schemas.errors import CampusSyncError, SourceUnavailable
from schemas.positions import format_lsn, parse_lsn
from transforms.capture.postgresql.replication import (
    PublicationMissing,
    SlotInvalidated,
    SlotMissing,
    connect,
    first_result,
    unavailable,
)


class SlotForeign(CampusSyncError):
    """A slot of the wanted name exists and is not ours: other database, kind or plugin."""


class SlotsExhausted(CampusSyncError):
    """The source has no free replication slot or sender."""


@dataclasses.dataclass(frozen=True)
class SlotState:
    """A slot as its source sees it, and the source's log.

    Attributes:
      exists: False leaves the rest at its default, but for the end of the log.
      lost: the log that it should keep is gone: it can only be dropped.
      active: a reader is connected.
      confirmed_lsn: everything before was acknowledged.
      retained_bytes: log that the slot keeps on the source's disk.
      safe_wal_bytes: log that may still be written before the slot is in danger; None if
        nothing limits it.
      log_end_lsn: end of the source's log now.
    """

    exists: bool
    log_end_lsn: int
    lost: bool = False
    active: bool = False
    confirmed_lsn: int = 0
    retained_bytes: int = 0
    safe_wal_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class CreatedSlot:
    """A new slot and the snapshot that joins on to it, valid while `create` is open.

    Attributes:
      slot: its name.
      lsn: the snapshot's place: it holds exactly the transactions whose commit record starts
        at or before it, and the stream exactly the later ones. PostgreSQL's consistent point
        is one byte further: a commit may start right there and is then in the stream.
      snapshot: name of the exported snapshot.
      taken_us: the source's clock just after, microseconds since 1970.
      view_lsn: of a later view of what the snapshot has left: it holds all transactions before
        `lsn`, and of the later ones some up to this place. None: the snapshot is exact.
    """

    slot: str
    lsn: int
    snapshot: str
    taken_us: int
    view_lsn: int | None = None


_STATE = """
SELECT e.log_end - '0/0', s.slot_name IS NOT NULL, s.plugin, s.database = current_database(),
  coalesce(s.wal_status = 'lost', false) OR to_jsonb(s) ->> 'invalidation_reason' IS NOT NULL,
  s.active, s.confirmed_flush_lsn - '0/0', greatest(e.log_end - s.restart_lsn, 0), s.safe_wal_size
FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
  ELSE pg_current_wal_lsn() END AS log_end) e
LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""


def state(dsn: str, slot: str) -> SlotState:
    """Returns the slot as it is now.

    Raises:
      SourceUnavailable: no connection.
      SlotForeign: the name is taken by a slot that is not ours.
    """
    with _session(dsn) as connection:
        row = connection.execute(_STATE, [slot]).fetchone()
    log_end, exists, plugin, here, lost, active, confirmed, retained, safe = row
    if not exists:
        return SlotState(False, int(log_end))
    if plugin != "pgoutput" or not here:
        raise SlotForeign(
            f"replication slot {slot} belongs to another database or plugin: drop it or name "
            "the link differently."
        )
    return SlotState(
        exists=True,
        log_end_lsn=int(log_end),
        lost=lost,
        active=active,
        confirmed_lsn=int(confirmed or 0),
        retained_bytes=int(retained or 0),
        safe_wal_bytes=safe,
    )


# Whom a new slot waits for: transactions that have written, of every database of the server.
# Times of other users' sessions are shown to members of pg_read_all_stats alone.
_RUNNING = """
SELECT count(*) OVER (), pid, application_name, xact_start FROM (
  SELECT pid, coalesce(application_name, '') AS application_name, xact_start, backend_xid AS xid
  FROM pg_stat_activity WHERE backend_xid IS NOT NULL
  UNION ALL SELECT 0, '', prepared, transaction FROM pg_prepared_xacts) AS running
ORDER BY age(xid) DESC LIMIT 1
"""


def _running(connection: psycopg.Connection) -> str:
    """Returns in words whom a new slot waits for."""
    row = connection.execute(_RUNNING).fetchone()
    if row is None:
        return "its transactions to end"
    count, pid, application, since = row
    who = f"session {pid} ({application})" if pid else "a prepared one"
    when = f", since {since:%Y-%m-%d %H:%M:%S}" if since else ""
    rest = f" and {count - 1} more" if count > 1 else ""
    remedy = "pg_terminate_backend" if pid else "COMMIT or ROLLBACK PREPARED (pg_prepared_xacts)"
    return f"the transaction of {who}{when}{rest} to end. Remedy: if it is forgotten, {remedy}"


@contextlib.contextmanager
def create(
    dsn: str, slot: str, waiting: Callable[[str], None] = lambda _: None
) -> Iterator[CreatedSlot]:
    """Creates the slot and exports its snapshot, which lasts as long as the context.

    Waits until every transaction that runs now has ended, and calls `waiting` each second with
    words for whom; what that raises breaks the creation off. The slot stays when the context
    ends; one whose creation breaks off does not.

    Raises:
      SourceUnavailable: no connection, or it was lost.
      SlotsExhausted: the source's settings allow no more slots.
      psycopg.errors.DuplicateObject: there is one of this name.
    """
    with _session(dsn, replication=True) as connection:
        with _session(dsn) as other:  # A command on the first connection ends the snapshot.
            point, exported = _created(connection, slot, lambda: waiting(_running(other)))
            (now_us,) = other.execute(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
            ).fetchone()
        yield CreatedSlot(slot, parse_lsn(point) - 1, exported, now_us)


def _created(
    connection: psycopg.Connection, slot: str, waiting: Callable[[], None]
) -> tuple[str, str]:
    """Returns a new slot's consistent point and the name of its snapshot."""
    command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput EXPORT_SNAPSHOT")
    query = command.format(sql.Identifier(slot)).as_bytes(connection)
    try:
        result = first_result(connection.pgconn, query, waiting)
    except BaseException:
        connection.cancel_safe()  # It would not notice that nobody waits any more.
        raise
    while connection.pgconn.get_result() is not None:
        pass
    if result is None:
        raise psycopg.OperationalError("no answer")
    if result.status != pq.ExecStatus.TUPLES_OK:
        error = psycopg.errors.error_from_result(result, encoding=connection.info.encoding)
        if isinstance(error, psycopg.errors.ConfigurationLimitExceeded):
            raise SlotsExhausted(
                "the source has no free replication slot: raise max_replication_slots."
            ) from error
        raise error
    return result.get_value(0, 1).decode(), result.get_value(0, 2).decode()


_VIEW = """
SELECT pg_export_snapshot(), (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
  CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
    ELSE pg_current_wal_insert_lsn() END - '0/0'
"""


@contextlib.contextmanager
def view(dsn: str, slot: str, lsn: int) -> Iterator[CreatedSlot]:
    """Exports a view of the source as it is now, for what a snapshot at `lsn` has left.

    Raises:
      SourceUnavailable: no connection, or it was lost.
    """
    with _session(dsn) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        # The place is asked for within the view, and so is no earlier than anything in it.
        name, now_us, end = connection.execute(_VIEW).fetchone()
        yield CreatedSlot(slot, lsn, name, now_us, int(end))


def drop(dsn: str, slot: str) -> None:
    """Drops the slot if it exists.

    Raises:
      SourceUnavailable: no connection, or a reader still has the slot.
    """
    with _session(dsn) as connection:
        try:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s AND database = current_database()",
                [slot],
            )
        except psycopg.errors.ObjectInUse as error:
            raise SourceUnavailable(f"replication slot {slot} has a reader.") from error
        except psycopg.errors.UndefinedObject:
            pass  # Somebody else was faster.


def advance(dsn: str, slot: str, lsn: int) -> None:
    """Moves a slot that nobody reads on to `lsn`, if it is not there yet.

    Raises:
      SourceUnavailable: no connection, or a reader has the slot.
      SlotMissing, SlotInvalidated: there is none, or what it should keep is gone.
    """
    with _session(dsn) as connection:
        row = connection.execute(_STATE, [slot]).fetchone()
        _, exists, _, _, lost, _, confirmed, _, _ = row
        if not exists:
            raise SlotMissing(f"replication slot {slot} does not exist any more.")
        if lost:
            raise SlotInvalidated(f"replication slot {slot} was invalidated.")
        if int(confirmed or 0) >= lsn:
            return
        try:
            connection.execute(
                "SELECT pg_replication_slot_advance(%s, %s)", [slot, format_lsn(lsn)]
            )
        except psycopg.errors.ObjectInUse as error:
            raise SourceUnavailable(f"replication slot {slot} has a reader.") from error


def missing_tables(dsn: str, publication: str, tables: Collection[str]) -> tuple[str, ...]:
    """Returns which of the tables (`schema.table`) the publication does not publish, sorted.

    Raises:
      SourceUnavailable: no connection.
      PublicationMissing: it exists, but leaves out rows or kinds of change.
    """
    with _session(dsn) as connection:
        return _missing(connection, publication, tables)[1]


def ensure_publication_covers(
    dsn: str, publication: str, tables: Collection[str]
) -> tuple[str, ...]:
    """Creates the publication or adds tables to it; returns the tables that were added, sorted.

    What was written to an added table before is not in any stream: a slot that is older than
    the addition needs a new snapshot.

    Raises:
      SourceUnavailable: no connection.
      PublicationMissing: tables do not exist or have no identity, the role may not publish
        them, or the publication leaves out rows or kinds of change.
    """
    with _session(dsn) as connection, connection.transaction():
        exists, missing = _missing(connection, publication, tables)
        if not missing:
            return ()
        _check_tables(connection, missing)
        names = sql.SQL(", ").join(sql.Identifier(*_parts(name)) for name in missing)
        verb = (
            sql.SQL("ALTER PUBLICATION {} ADD TABLE {}")
            if exists
            else sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root)")
        )
        try:
            connection.execute(verb.format(sql.Identifier(publication), names))
        except psycopg.errors.InsufficientPrivilege as error:
            raise PublicationMissing(
                f"publication {publication} lacks {', '.join(missing)} and this role may not add "
                "them: let their owner do it."
            ) from error
    return missing


_CONTENT = """
SELECT format('%%s.%%s', t.schemaname, t.tablename), to_jsonb(t) ->> 'rowfilter'
FROM pg_publication_tables t WHERE pubname = %s
"""


def _missing(
    connection: psycopg.Connection, publication: str, tables: Collection[str]
) -> tuple[bool, tuple[str, ...]]:
    """Returns whether the publication exists and which tables it lacks."""
    kinds = connection.execute(
        "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_publication"
        " WHERE pubname = %s",
        [publication],
    ).fetchone()
    if kinds is None:
        return False, tuple(sorted(set(tables)))
    published = dict(connection.execute(_CONTENT, [publication]).fetchall())
    filtered = sorted(name for name in tables if published.get(name))
    if not kinds[0] or filtered:
        raise PublicationMissing(
            f"publication {publication} leaves out changes"
            + (f" by row filters of {', '.join(filtered)}" if filtered else " by `publish`")
            + ": publish all of them."
        )
    return True, tuple(sorted(set(tables) - set(published)))


_MEMBERSHIPS = """
SELECT format('%%s.%%s', n.nspname, c.relname), format('%%s/%%s/%%s', p.oid, r.oid, c.oid)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_publication p ON p.pubname = %(publication)s
LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
WHERE c.relkind IN ('r', 'p') AND format('%%s.%%s', n.nspname, c.relname) = ANY (%(tables)s)
"""


def memberships(dsn: str, publication: str, tables: Collection[str]) -> dict[str, str]:
    """Returns which membership of the publication each table has: a text, equal while it lasts.

    A table that leaves and comes back, or is dropped and made again, has another one: what
    was written to it meanwhile is in no stream.

    Raises:
      SourceUnavailable: no connection.
    """
    with _session(dsn) as connection:
        arguments = {"publication": publication, "tables": list(tables)}
        return dict(connection.execute(_MEMBERSHIPS, arguments).fetchall())


_COLUMNS = """
SELECT format('%%s.%%s', n.nspname, c.relname), a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND format('%%s.%%s', n.nspname, c.relname) = ANY (%s)
ORDER BY a.attnum
"""


def columns(dsn: str, tables: Collection[str]) -> dict[str, dict[str, str]]:
    """Returns the columns, to their types, of those tables that are there.

    Raises:
      SourceUnavailable: no connection.
    """
    found: dict[str, dict[str, str]] = {}
    with _session(dsn) as connection:
        for table, column, kind in connection.execute(_COLUMNS, [list(tables)]):
            found.setdefault(table, {})[column] = kind
    return found


_NAMED_BY = """
SELECT format('%%s.%%s', n.nspname, c.relname), coalesce(array_agg(a.attname::text) FILTER (
    WHERE a.attnum = ANY (i.indkey)), '{}')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid
    AND CASE c.relreplident WHEN 'i' THEN i.indisreplident WHEN 'd' THEN i.indisprimary END
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND c.relreplident <> 'f'
    AND format('%%s.%%s', n.nspname, c.relname) = ANY (%s)
GROUP BY 1
"""


def unnamed(dsn: str, keys: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Returns the tables whose replica identity lacks columns of their key, and which.

    Raises:
      SourceUnavailable: no connection.
    """
    with _session(dsn) as connection:
        found = dict(connection.execute(_NAMED_BY, [list(keys)]).fetchall())
    lacking = {name: sorted({*keys[name]} - {*named}) for name, named in found.items()}
    return {name: columns for name, columns in lacking.items() if columns}


_IDENTITY = """
SELECT format('%%s.%%s', n.nspname, c.relname),
  c.relreplident IN ('f', 'i') OR c.relreplident = 'd' AND EXISTS (
    SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND format('%%s.%%s', n.nspname, c.relname) = ANY (%s)
"""


def _check_tables(connection: psycopg.Connection, tables: Sequence[str]) -> None:
    """Refuses what would break: once published, a table without identity takes no update."""
    found = dict(connection.execute(_IDENTITY, [list(tables)]).fetchall())
    absent = [name for name in tables if name not in found]
    if absent:
        raise PublicationMissing(f"the source has no table {', '.join(absent)}.")
    bare = [name for name in tables if not found[name]]
    if bare:
        raise PublicationMissing(
            f"{', '.join(bare)} must not be published, since its updates and deletes would then "
            "fail in the source: it needs a primary key or another replica identity first."
        )


def _parts(table: str) -> tuple[str, str]:
    schema, _, name = table.partition(".")
    return schema, name


@contextlib.contextmanager
def _session(dsn: str, replication: bool = False) -> Iterator[psycopg.Connection]:
    connection = connect(dsn, replication)
    try:
        with contextlib.closing(connection):
            yield connection
    except psycopg.OperationalError as error:
        if error.sqlstate is None or connection.broken:
            raise unavailable(conninfo_to_dict(dsn), error) from error
        raise
