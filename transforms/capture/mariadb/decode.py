"""Decode binlog events into columns: rows, transactions and what else a link must know."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from schemas.batches import RawChanges, Reject
from schemas.positions import SEQ_END, Position
from transforms.capture.columns import SLACK
from transforms.capture.mariadb import events
from transforms.capture.mariadb.anchor import Anchor
from transforms.capture.mariadb.errors import LogUnusable, ServerRefused
from transforms.capture.mariadb.inflate import inflate
from transforms.capture.mariadb.packets import Packets
from transforms.capture.mariadb.places import border, describe, file_name, file_number, place_of
from transforms.capture.mariadb.prepared import Prepared, xid_of_gtid, xid_of_prepare
from transforms.capture.mariadb.rows import RowWriter
from transforms.capture.mariadb.statements import effect, read_query, xa_end
from transforms.capture.mariadb.tables import Tables
from transforms.capture.postgresql.pgoutput import ProtocolError

_BATCH_BYTES_MAX = 1 << 28  # With text three times as long as its bytes, an Arrow offset holds.
_BUFFER_MIN = 1 << 16
_ERROR_PACKET, _END_PACKET = 0xFF, 0xFE
_UNSUPPORTED = {
    events.PAYLOAD: "compressed transactions: SET GLOBAL binlog_transaction_compression = OFF",
    events.PARTIAL_UPDATE: "parts of JSON values: SET GLOBAL binlog_row_value_options = ''",
}


class BinlogDecoder:
    """Turns a dump's packets into `RawChanges` that join on to each other from `start`.

    A `RawChanges` ends at a commit, except where one transaction alone exceeds a limit: then
    it ends inside, at (lsn, ordinal). What is cut where depends only on the packets and the
    calls of `flush`. After an exception a decoder is of no more use.

    A transaction's lsn is where it starts (`places.transaction`), since a long one is given
    out before its end is seen. Ordinals count its changes from 1, of all tables; an update of
    the key takes two: the delete of the old key, then the update.

    Args:
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one row is larger.
        Bytes are those of row images; at most 256 MiB.
      start: changes up to it were applied before; they are passed over and not counted.
      base: name of the log files before the dot.
      charsets: collation ids to character sets, of the server.
      keys: `database.table` to the columns that identify a row; changes of other tables are
        passed over and not counted. None: every table, by its primary key.
      columns: `database.table` to the columns that are wanted, the key's among them; others
        are left out. None, or a table that it lacks: all.
      fold: whether the server's table names ignore case.
      checksum: whether events end with CRC-32 as long as the log does not say.
    """

    def __init__(
        self,
        batch_rows: int,
        batch_bytes: int,
        start: Position,
        base: str,
        charsets: Mapping[int, str],
        keys: Mapping[str, Sequence[str]] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        fold: bool = False,
        checksum: bool = True,
    ):
        if not 0 < batch_bytes <= _BATCH_BYTES_MAX or batch_rows < 1:
            raise ValueError("batch_rows must be positive, batch_bytes from 1 to 256 MiB")
        self._base, self._charsets, self._fold = base, charsets, fold
        self._end = start
        self._state = np.zeros(events.STATE_SIZE, np.int64)
        self._state[events.DONE_LSN] = -1
        limits = (start.lsn, start.seq, batch_rows, batch_bytes)
        self._state[events.START_LSN : events.BYTES_MAX + 1] = limits
        self._state[events.FILE], self._state[events.POS] = place_of(start.lsn)
        self._state[events.CRC] = 4 if checksum else 0
        self._kept = np.empty((batch_rows + 2, events.ROW_SIZE), np.int64)
        self._buffer = np.empty(_BUFFER_MIN, np.uint8)
        self._used = 0
        self._tables = Tables(charsets, keys, columns, fold)
        self._writer = RowWriter()
        self._truncates: list[tuple[str, Position]] = []
        self._prepared = Prepared(2 * batch_bytes)
        self._first_group = ""
        self._starts = self._ends = np.empty(0, np.int64)

    @property
    def position(self) -> Position:
        """Where the last `RawChanges` ended."""
        return self._end

    @property
    def log_end(self) -> int:
        """The lsn of the border behind the last event that was taken."""
        return border(int(self._state[events.FILE]), int(self._state[events.POS]))

    @property
    def idle(self) -> bool:
        """Whether nothing waits: no transaction is open and everything complete was returned."""
        done = Position(int(self._state[events.DONE_LSN]), SEQ_END)
        return not self._state[events.IN_TX] and done <= self._end

    @property
    def gtid(self) -> str:
        """GTID of the last transaction begun, as MariaDB writes it; "" before the first."""
        state = self._state
        number = int(state[events.GTID_SEQ])
        server = int(state[events.GTID_SERVER])
        return f"{int(state[events.GTID_DOMAIN])}-{server}-{number}" if number else ""

    @property
    def anchor(self) -> str:
        """GTID of the last transaction at or before `position`; "" where that is not known."""
        begun = int(self._state[events.LSN])
        known = self._end.lsn == begun or (self.idle and self._end.lsn > begun)
        return self.gtid if known else ""

    @property
    def last_transaction(self) -> Anchor | None:
        """Where the last transaction begun starts, and its GTID; None before the first."""
        return Anchor(int(self._state[events.LSN]), self.gtid) if self.gtid else None

    @property
    def first_gtid(self) -> str:
        """GTID of the first transaction met; "" before it."""
        return self._first_group

    def feed(self, packets: Packets) -> list[RawChanges]:
        """Takes packets as they came and returns what they fill.

        Raises:
          ServerRefused: the server ended the dump with an error.
          LogUnusable: the log does not tell what became of rows.
          ProtocolError: an event is unknown or damaged.
          KeyUnknown, TooManyColumns, MetadataMissing: a table cannot be followed.
        """
        self._append(packets)
        taken: list[RawChanges] = []
        at = 0
        while True:
            at, code = events.scan(
                self._buffer,
                self._starts,
                self._ends,
                at,
                self._tables.arrays,
                self._state,
                self._kept,
                *self._tables.scratch,
            )
            self._first_group = self._first_group or self.gtid
            if code == events.DONE:
                break
            if code == events.CUT_COMMITTED:
                taken.append(self._cut_committed())
            elif code == events.CUT_OPEN:
                taken.append(self._cut_open())
            elif code == events.TORN:
                self._drop_open("the server stopped in the middle of a transaction")
            elif code == events.RARE:
                more, passed = self._take_rare(at)
                taken += more
                at += passed
            else:
                raise self._broken(at, "fails its checksum" if code == events.DAMAGED else "")
        self._compact()
        return taken

    def flush(self, server_us: int | None = None) -> list[RawChanges]:
        """Returns what is complete, whatever its size; an open transaction stays.

        Args:
          server_us: the source's clock; if nothing waits, an empty `RawChanges` of this time
            moves the position to the end of what was read. None: it stays.
        """
        taken = []
        if Position(int(self._state[events.DONE_LSN]), SEQ_END) > self._end:
            taken.append(self._cut_committed())
            self._compact()
        end = Position(self.log_end, SEQ_END)
        if server_us is not None and self.idle and end > self._end:
            taken.append(RawChanges(self._end, end, 0, server_us, {}))
            self._end = end
        return taken

    # The buffer.

    def _append(self, packets: Packets) -> None:
        """Adds the packets to the buffer and sets their bounds in it."""
        if not len(packets):
            self._starts = self._ends = np.empty(0, np.int64)
            return
        first, last = int(packets.starts[0]), int(packets.ends[-1])
        shift = self._used - first
        self._extend(packets.data[first:last])
        self._starts, self._ends = packets.starts + shift, packets.ends + shift

    def _extend(self, content: np.ndarray) -> None:
        needed = self._used + len(content)
        if needed + SLACK > len(self._buffer):
            grown = np.empty(needed + needed // 2 + SLACK, np.uint8)
            grown[: self._used] = self._buffer[: self._used]
            self._buffer = grown
        self._buffer[self._used : needed] = content
        self._used = needed

    def _insert(self, at: int, contents: Sequence[bytes], replace: bool) -> None:
        """Puts packets before the one at `at`, or in its place."""
        begin = self._used
        self._extend(np.frombuffer(b"".join(contents), np.uint8))
        ends = begin + np.cumsum([len(content) for content in contents], dtype=np.int64)
        starts = np.concatenate(([begin], ends[:-1]))
        rest = at + replace
        self._starts = np.concatenate((self._starts[:at], starts, self._starts[rest:]))
        self._ends = np.concatenate((self._ends[:at], ends, self._ends[rest:]))

    def _compact(self) -> None:
        """Gives back the bytes before the first kept row, once they are the greater part."""
        kept = self._kept[: self._state[events.ROWS]]
        if not len(kept):
            self._used = 0
            if len(self._buffer) > 8 * self._state[events.BYTES_MAX]:  # One huge row went through.
                self._buffer = np.empty(_BUFFER_MIN, np.uint8)
            return
        first = int(kept[:, (events.R_OLD_BITS, events.R_NEW_BITS)].min())
        if 2 * first < self._used:
            return
        self._buffer[: self._used - first] = self._buffer[first : self._used].copy()
        self._used -= first
        for place in (events.R_OLD, events.R_NEW):
            kept[kept[:, place] >= 0, place] -= first
        kept[:, (events.R_OLD_BITS, events.R_NEW_BITS, events.R_END)] -= first

    # Cuts.

    def _cut_committed(self) -> RawChanges:
        state = self._state
        done, bytes_done = int(state[events.DONE_ROWS]), int(state[events.DONE_BYTES])
        end = Position(int(state[events.DONE_LSN]), SEQ_END)
        cut = self._cut(done, end, int(state[events.DONE_US]))
        left = int(state[events.ROWS]) - done
        self._kept[:left] = self._kept[done : done + left].copy()
        state[events.ROWS], state[events.BYTES] = left, state[events.BYTES] - bytes_done
        state[events.DONE_US] = state[events.DONE_ROWS] = state[events.DONE_BYTES] = 0
        return cut

    def _cut_open(self) -> RawChanges:
        state = self._state
        commit_us = max(int(state[events.DONE_US]), int(state[events.US]))
        end = Position(int(state[events.LSN]), int(state[events.SEQ]))
        cut = self._cut(int(state[events.ROWS]), end, commit_us)
        state[events.ROWS] = state[events.BYTES] = 0
        state[events.DONE_US] = state[events.DONE_ROWS] = state[events.DONE_BYTES] = 0
        state[events.OPEN_CUT] = 1
        return cut

    def _cut(self, count: int, end: Position, commit_us: int) -> RawChanges:
        """Makes a `RawChanges` of the first `count` rows kept and moves the position."""
        rows = self._kept[:count]
        tables: dict[str, pa.RecordBatch] = {}
        rejects: list[Reject] = []
        maps = rows[:, events.R_MAP]
        for index in np.flatnonzero(np.bincount(maps)) if count else ():
            table = self._tables.followed(int(index))
            batch, refused = self._writer.write(
                table, self._tables.codec_tables, self._buffer, rows[maps == index]
            )
            rejects += refused
            if batch.num_rows:
                tables[table.layout.table] = batch
        truncates = tuple(item for item in self._truncates if item[1] <= end)
        self._truncates = self._truncates[len(truncates) :]
        begin, self._end = self._end, end
        return RawChanges(
            begin, end, count, commit_us, tables, truncates=truncates, rejects=tuple(rejects)
        )

    def _close(self, others: Sequence[int]) -> list[RawChanges]:
        """Cuts as often as it takes to hold no row by these table maps."""
        taken = []
        for cut in (self._cut_committed, self._cut_open):
            kept = self._kept[: self._state[events.ROWS], events.R_MAP]
            held = bool(np.isin(kept, others).any())
            if held and (cut == self._cut_open or self._state[events.DONE_ROWS]):
                taken.append(cut())
        return taken

    def _drop_open(self, why: str) -> None:
        """Forgets the transaction under way, which never became one.

        Raises:
          LogUnusable: some of it has been given out.
        """
        state = self._state
        if state[events.OPEN_CUT]:
            raise LogUnusable(
                f"at {self._place()} {why} that was already delivered in part: the link needs a "
                "new snapshot."
            )
        state[events.ROWS], state[events.BYTES] = state[events.DONE_ROWS], state[events.DONE_BYTES]
        lsn = int(state[events.LSN])
        self._truncates = [item for item in self._truncates if item[1].lsn != lsn]
        state[events.IN_TX] = state[events.STANDALONE] = 0
        self._prepared.abandon()

    # What is rare.

    def _take_rare(self, at: int) -> tuple[list[RawChanges], int]:
        """Takes one packet; returns what it fills and how many packets to go on by."""
        packet = self._buffer[self._starts[at] : self._ends[at]].tobytes()
        try:
            if packet[:1] != b"\0":
                self._refused(packet)
            kind = packet[5]
            if self._state[events.IN_TX] == events.XA_TX:
                return self._take_prepared(packet, kind)
            if kind == events.ROTATE:
                self._rotate(self._body(packet))
            elif kind == events.FORMAT:
                self._read_format(packet)
            elif kind == events.TABLE_MAP:
                return self._take_table(self._body(packet)), 1
            elif kind == events.QUERY:
                return [], self._query(packet, at)
            elif kind == events.GTID:
                self._begin_xa(packet)
            elif kind == events.QUERY_COMPRESSED or kind in events.ROWS_COMPRESSED:
                checksum = bool(self._state[events.CRC])
                self._insert(at, [inflate(packet, checksum)], True)
                return [], 0
            else:
                self._unsupported(kind, at)
            return [], 1
        except (struct.error, ValueError, KeyError, IndexError) as error:
            raise self._broken(at) from error

    def _body(self, packet: bytes) -> bytes:
        return packet[events.HEADER : len(packet) - int(self._state[events.CRC])]

    def _advance(self, packet: bytes) -> int:
        """Moves the place behind a rare event; returns where the event starts."""
        size, log_pos, flags = struct.unpack_from("<IIH", packet, 10)
        if not flags & 0x20:
            events.advance(self._state, log_pos, size)
        return int(self._state[events.POS]) - size

    def _rotate(self, body: bytes) -> None:
        (offset,) = struct.unpack_from("<Q", body)
        number = file_number(body[8:].decode())
        if file_name(self._base, number).encode() != body[8:]:
            raise LogUnusable("the server's log files have another name than before.")
        if self._state[events.IN_TX]:
            self._drop_open("the server stopped in the middle of a transaction")
        self._state[events.FILE], self._state[events.POS] = number, offset

    def _read_format(self, packet: bytes) -> None:
        """Learns whether events have checksums; a server that started anew rolls back."""
        (log_pos,) = struct.unpack_from("<I", packet, 14)
        if packet[events.HEADER + 56] != events.HEADER - 1:
            raise ValueError("another length of headers")
        # The kind of checksum stands before the checksum, which is there whatever its kind.
        self._state[events.CRC] = 4 if packet[-5] == 1 else 0
        if log_pos:
            if self._state[events.IN_TX]:
                self._drop_open("the server stopped in the middle of a transaction")
            self._advance(packet)

    def _take_table(self, body: bytes) -> list[RawChanges]:
        others = self._tables.learn(body)
        return self._close(others) if others else []

    def _query(self, packet: bytes, at: int) -> int:
        """Takes a statement; returns how many packets to go on by."""
        state = self._state
        statement = read_query(self._body(packet), self._charsets)
        if state[events.IN_TX] == events.NO_TX or state[events.STANDALONE]:
            how = xa_end(statement)
            if how and not self._end_xa(how, at):
                return 0
        start = self._advance(packet)
        if state[events.IN_TX] == events.NO_TX:  # Of a server without GTIDs.
            events.begin(state, start, struct.unpack_from("<I", packet, 1)[0] * 1_000_000)
            state[events.STANDALONE] = 1
        if statement.text.upper().startswith("ROLLBACK") and "TO" not in statement.text.upper():
            self._drop_open("a transaction was rolled back")
            return 1
        if state[events.IN_TX] == events.UNSURE_TX:
            # MySQL's group of one statement has no BEGIN.
            state[events.IN_TX], state[events.STANDALONE] = events.OPEN_TX, 1
            if statement.text.upper().startswith("XA START"):
                raise self._xa_of_mysql()
        self._apply(effect(statement, self._tables.names, self._fold))
        if state[events.STANDALONE]:
            events.commit(state)
        return 1

    def _apply(self, found) -> None:
        """Notes what a statement did to followed tables, after what was read before."""
        state = self._state
        if (state[events.LSN], SEQ_END) <= (state[events.START_LSN], state[events.START_SEQ]):
            return
        if found.unreadable:
            raise LogUnusable(
                f"at {self._place()} {found.unreadable}: the link needs a new snapshot."
            )
        for table in found.emptied:
            state[events.SEQ] += 1
            position = Position(int(state[events.LSN]), int(state[events.SEQ]))
            if position > (state[events.START_LSN], state[events.START_SEQ]):
                self._truncates.append((table, position))

    # Two-phase commit: rows are logged when prepared, and count where they are committed.

    def _begin_xa(self, packet: bytes) -> None:
        body = self._body(packet)
        start = self._advance(packet)
        events.begin(self._state, start, struct.unpack_from("<I", packet, 1)[0] * 1_000_000)
        number, domain = struct.unpack_from("<QI", body)
        self._state[events.GTID_SEQ], self._state[events.GTID_DOMAIN] = number, domain
        self._state[events.GTID_SERVER] = struct.unpack_from("<I", packet, 6)[0]
        if body[12] & events.FL_PREPARED_XA:
            self._state[events.IN_TX] = events.XA_TX
            self._prepared.open()
        else:
            self._state[events.STANDALONE] = 1
            self._prepared.ending = xid_of_gtid(body)

    def _take_prepared(self, packet: bytes, kind: int) -> tuple[list[RawChanges], int]:
        if kind in (events.ROTATE, events.FORMAT, events.GTID):
            self._drop_open("the server stopped in the middle of a transaction")
            return [], 0
        self._advance(packet)
        if kind == events.XA_PREPARE:
            body = self._body(packet)
            self._prepared.close(xid_of_prepare(body))
            events.commit(self._state)
        elif kind != events.QUERY:
            self._prepared.add(packet)
        return [], 1

    def _end_xa(self, how: str, at: int) -> bool:
        """Brings in what was prepared; returns whether the statement may now be taken."""
        if self._prepared.ending is None:
            raise self._xa_of_mysql()
        passed = self._state[events.LSN] < self._state[events.START_LSN] or (
            self._state[events.LSN] == self._state[events.START_LSN]
            and self._state[events.START_SEQ] == SEQ_END
        )
        contents = self._prepared.take()
        if how == "rollback" or passed:
            self._prepared.forget()
            return True
        if contents is None:
            raise LogUnusable(
                f"at {self._place()} a distributed transaction was committed whose rows were "
                "logged before this reader began, or are too many to wait: the link needs a new "
                "snapshot."
            )
        if contents:
            # Not the last statement, so that rows may follow in its transaction.
            self._insert(at, contents, False)
        return not contents

    def _xa_of_mysql(self) -> LogUnusable:
        return LogUnusable(
            f"at {self._place()} there is a distributed transaction in a form that cannot be "
            "followed: the link needs a new snapshot."
        )

    # What cannot be gone on with.

    def _unsupported(self, kind: int, at: int) -> None:
        if kind == events.INCIDENT:
            raise LogUnusable(
                f"at {self._place()} the server says that it lost events: the link needs a new "
                "snapshot."
            )
        if kind == events.EXECUTE_LOAD_QUERY:
            raise LogUnusable(
                f"at {self._place()} rows were loaded by a statement: the link needs a new "
                "snapshot, and the server binlog_format = ROW."
            )
        if kind in _UNSUPPORTED:
            raise ProtocolError(f"at {self._place()} the log has {_UNSUPPORTED[kind]}.")
        raise self._broken(at)

    def _refused(self, packet: bytes) -> None:
        if packet[:1] == bytes([_ERROR_PACKET]):
            (code,) = struct.unpack_from("<H", packet, 1)
            raise ServerRefused(code, packet[3:].decode("utf-8", "replace"))
        raise ServerRefused(0, "the server ended the log")

    def _place(self) -> str:
        return describe(self.log_end, self._base)

    def _broken(self, at: int, how: str = "") -> ProtocolError:
        kind = self._buffer[self._starts[at] + 5] if self._ends[at] - self._starts[at] > 5 else 0
        how = how or "is unknown, damaged or out of place"
        return ProtocolError(f"the event of type {int(kind)} after {self._place()} {how}.")
