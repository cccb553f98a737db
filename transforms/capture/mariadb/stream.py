"""Read a source's binlog as it grows, as one replica of it would."""

import struct
from collections.abc import Callable, Mapping, Sequence

import pymysql

from schemas.batches import RawChanges
from schemas.clocks import monotonic_s
from schemas.errors import CampusSyncError, SourceUnavailable
from schemas.positions import NEW_LOG_REMEDY, Position
from transforms.capture.mariadb.anchor import Anchor, gtids_before
from transforms.capture.mariadb.check import require_readable
from transforms.capture.mariadb.decode import BinlogDecoder
from transforms.capture.mariadb.errors import LogPurged, LogReplaced, LogUnusable, ServerRefused
from transforms.capture.mariadb.packets import PacketReader, Packets
from transforms.capture.mariadb.places import describe, file_name, is_transaction, place_of
from transforms.capture.mariadb.session import (
    charsets_by_collation,
    clock_us,
    connect,
    translated,
)
from transforms.capture.mariadb.state import LogState, state
from transforms.capture.mariadb.table_map import MetadataMissing
from transforms.capture.resume import SourceRewound

_COM_BINLOG_DUMP = 0x12
_CAPABILITY_GTID = 4  # We understand MariaDB's own events.
_SILENCE_MAX_S = 30.0
_READ_BYTES = 1 << 20
_FATAL_READ = 1236  # The server cannot send its log from where it was asked.
_PURGED_SIGNS = ("could not find first log file", "purged required binary logs", "purged")


class BinlogStream:
    """A running dump of a source's binlog, decoded from `start` on.

    Nothing is told to the source of what was applied: it removes log by age or size, and what
    is lost that way is found here or by `LogState.keeps`. Not thread-safe.

    Args:
      dsn: of the source; the account needs REPLICATION SLAVE and BINLOG MONITOR.
      start: where the last `RawChanges` of an earlier stream, or a snapshot, ended.
      reader_id: as a replica's server id, 1 to 2^32 - 1: of two readers with the same the source
        throws out the older.
      keys, columns, batch_rows, batch_bytes: as for `BinlogDecoder`.
      heartbeat_s: how often an idle source moves the position.
      gtid: `anchor` of the stream that reached `start`, if that is known: whether it still stands
        there tells a log that was begun anew and has grown as far.
      monotonic: a clock.

    Raises:
      SourceUnavailable, RightsMissing, LogSettingsWrong: as they say.
      LogPurged: the log at `start` is gone.
      SourceRewound: the log ends before `start`. LogReplaced: it is another one.
    """

    def __init__(
        self,
        dsn: str,
        start: Position,
        *,
        reader_id: int,
        batch_rows: int,
        batch_bytes: int,
        keys: Mapping[str, Sequence[str]] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        heartbeat_s: float = 1.0,
        gtid: str = "",
        monotonic: Callable[[], float] = monotonic_s,
    ):
        found = state(dsn)
        require_readable(found)
        require_reachable(found, start)
        self._server, self._base, self._start, self._gtid = found.server, found.base, start, gtid
        self._heartbeat_s, self._monotonic = heartbeat_s, monotonic
        self._first: Anchor | None = None
        self._connection = connect(self._server)
        try:
            with self._connection.cursor() as cursor:
                checksum = _prepare(cursor, heartbeat_s)
                names = charsets_by_collation(cursor)
                self._server_us = clock_us(cursor)
                if found.mariadb and not is_transaction(start.lsn):
                    place = place_of(start.lsn)
                    name = file_name(self._base, place.file)
                    before = gtids_before(cursor, name, place.offset)
                    if gtid:
                        self._compare(gtid, before.split(","))
                    if before:
                        self._first = Anchor(start.lsn, before)
            self._decoder = BinlogDecoder(
                batch_rows,
                batch_bytes,
                start,
                self._base,
                names,
                keys,
                columns,
                fold=found.fold,
                checksum=checksum,
            )
            self._dump(place_of(start.lsn), reader_id)
        except CampusSyncError:
            self._connection.close()
            raise
        except (pymysql.Error, OSError) as error:
            self._connection.close()
            raise translated(self._server, error) from error
        self._opened = self._heard = self._beat = monotonic()
        self._caught_up = False

    def __enter__(self) -> "BinlogStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def position(self) -> Position:
        """Where the last `RawChanges` ended."""
        return self._decoder.position

    @property
    def caught_up(self) -> bool:
        """Whether the last `read` found nothing more that could be read without waiting."""
        return self._caught_up

    @property
    def anchor(self) -> str:
        """GTID of the last transaction at or before `position`, to be given to the next stream."""
        return self._decoder.anchor

    @property
    def last_transaction(self) -> Anchor | None:
        """What `anchor.stands` knows this log by; None where no transaction was before it."""
        return self._decoder.last_transaction or self._first

    def read(self, timeout_s: float, max_bytes: int = _READ_BYTES) -> list[RawChanges]:
        """Returns what has come and is complete, about `max_bytes` of log; waits for the first.

        An idle source gives an empty `RawChanges` every `heartbeat_s`.

        Raises:
          SourceUnavailable: the connection is lost or silent.
          LogPurged, LogUnusable: only a new snapshot goes on from here.
          SourceRewound: the log is another one than `start` is of.
          ProtocolError, KeyUnknown, TooManyColumns, LogSettingsWrong, MetadataMissing: a person
            must look.
        """
        try:
            received = self._reader.read(max_bytes)
            if not len(received.packets) and not received.ended:
                self._reader.wait(timeout_s)
                received = self._reader.read(max_bytes)
        except OSError as error:
            raise translated(self._server, error) from error
        now = self._monotonic()
        if len(received.packets):
            self._heard = now
        elif received.ended or now - self._heard > _SILENCE_MAX_S:
            raise SourceUnavailable(
                f"source {self._server.place} "
                + ("dropped the connection." if received.ended else "said nothing for 30 s.")
            )
        taken = self._decode(received.packets)
        self._caught_up = received.drained
        if received.drained:
            beat = now - self._beat >= self._heartbeat_s
            taken += self._decoder.flush(self._now_us(now) if beat else None)
            self._beat = now if beat else self._beat
        return taken

    def acknowledge(self, lsn: int) -> None:
        """Takes note of nothing: the source keeps its log by age and size, whatever was applied."""

    def keep_alive(self) -> None:
        """Does nothing: the source waits for hours for a reader that has no room."""

    def close(self) -> None:
        """Ends the dump; the source notices by itself."""
        self._connection.close()

    def _dump(self, place: tuple[int, int], reader_id: int) -> None:
        number, offset = place
        request = struct.pack("<IHI", offset, 0, reader_id)
        if offset >> 32:
            raise LogUnusable("a place beyond 4 GiB of a log file cannot be asked for.")
        self._connection._execute_command(
            _COM_BINLOG_DUMP, request + file_name(self._base, number).encode()
        )
        self._reader = PacketReader(self._connection._sock)

    def _decode(self, packets: Packets) -> list[RawChanges]:
        first = not self._decoder.first_gtid
        try:
            taken = self._decoder.feed(packets)
        except ServerRefused as error:
            raise self._refused(error) from error
        except MetadataMissing as error:
            # The server's setting was looked at before the start: this is of an earlier time.
            raise LogUnusable(
                f"the log was written without column names for a while: {error}"
            ) from error
        found = self._decoder.first_gtid
        if first and found and self._gtid and is_transaction(self._start.lsn):
            self._compare(self._gtid, [found])
        return taken

    def _compare(self, gtid: str, found: Sequence[str]) -> None:
        """Checks that the transaction that was at the start is among those found there."""
        if gtid not in found:
            raise LogReplaced(
                f"transaction {gtid} is no longer at {describe(self._start.lsn, self._base)}: "
                "the source's log was begun anew, or the server replaced."
            )

    def _now_us(self, now: float) -> int:
        """Returns the source's clock, which is not asked again while the connection lasts."""
        return self._server_us + int((now - self._opened) * 1e6)

    def _refused(self, error: ServerRefused) -> CampusSyncError:
        place = describe(self._start.lsn, self._base)
        if error.code == _FATAL_READ and any(
            sign in error.reason.lower() for sign in _PURGED_SIGNS
        ):
            return LogPurged(f"source {self._server.place} has no log from {place} on.")
        if error.code == _FATAL_READ and not self._decoder.first_gtid:
            return SourceRewound(
                f"the log of source {self._server.place} has no event at {place}: it was begun "
                "anew, or the server replaced."
            )
        if error.code == _FATAL_READ:
            return LogUnusable(f"source {self._server.place} cannot read its own log on.")
        return SourceUnavailable(f"source {self._server.place} ended the log: error {error.code}.")


def require_reachable(found: LogState, start: Position) -> None:
    """Checks that the source's log reaches from `start` to its end.

    Raises:
      LogPurged: what begins at `start` is no longer kept.
      SourceRewound: the log ends before `start`.
    """
    place = place_of(start.lsn)
    if start.lsn > found.log_end_lsn or any(
        file.number == place.file and place.offset > file.size for file in found.files
    ):
        raise SourceRewound(
            f"the log of source {found.server.place} ends before "
            f"{describe(start.lsn, found.base)}: it was begun anew (RESET MASTER), restored from "
            f"a backup, or the server replaced. {NEW_LOG_REMEDY}"
        )
    if not found.keeps(start.lsn):
        raise LogPurged(
            f"source {found.server.place} no longer keeps its log from "
            f"{describe(start.lsn, found.base)} on."
        )


def _prepare(cursor: pymysql.cursors.Cursor, heartbeat_s: float) -> bool:
    """Tells the source what we understand; returns whether its events have checksums."""
    cursor.execute(f"SET @mariadb_slave_capability = {_CAPABILITY_GTID}")
    cursor.execute(f"SET @master_heartbeat_period = {int(heartbeat_s * 1e9)}")
    cursor.execute(f"SET @source_heartbeat_period = {int(heartbeat_s * 1e9)}")
    cursor.execute("SET @master_binlog_checksum = @@GLOBAL.binlog_checksum")
    cursor.execute("SET @source_binlog_checksum = @@GLOBAL.binlog_checksum")
    cursor.execute("SELECT @@GLOBAL.binlog_checksum")
    return str(cursor.fetchone()[0]).upper() == "CRC32"
