"""Decode PostgreSQL's logical replication messages (pgoutput, versions 1 and 2) into columns."""

import struct
from collections.abc import Mapping, Sequence

import numba
import numpy as np
import pyarrow as pa

from schemas.batches import RawChanges, Reject
from schemas.errors import CampusSyncError
from schemas.positions import SEQ_END, Position, format_lsn
from transforms.capture.columns import NULL, SLACK, UNCHANGED, Layout, Rows, record_batch

POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01 in microseconds since 1970.
HEADER = 25  # Bytes before the message: "w", start and end of its place in the log, time.
_BATCH_BYTES_MAX = 1 << 30  # With one value of up to 1 GB more, an Arrow offset holds.
_IGNORED = -1  # Stands for a layout where a table is passed over.

# What a scan ends with.
_DONE, _CUT_COMMITTED, _CUT_OPEN, _RARE, _BROKEN = range(5)
# A scan's state: one array, so that it is handed over once.
_IN_TX, _LSN, _US, _SEQ = range(4)  # The transaction under way, and its last ordinal.
_ROWS, _BYTES = 4, 5  # Kept since the last cut.
_DONE_LSN, _DONE_US, _DONE_ROWS, _DONE_BYTES = range(6, 10)  # The same up to the last commit.
_START_LSN, _START_SEQ, _ROWS_MAX, _BYTES_MAX = range(10, 14)
_STATE_SIZE = 14
# A kept row: one line of integers. Offsets are those of its tuples, or negative.
_R_LAYOUT, _R_OP, _R_LSN, _R_SEQ, _R_US, _R_NEW, _R_OLD, _R_OLD_KIND, _R_MOVED, _R_END = range(10)
_ROW_SIZE = 10

_B, _C, _I, _U, _D = (ord(letter) for letter in "BCIUD")
_KEY, _WHOLE, _NEW = (ord(letter) for letter in "KON")
_TEXT, _NO_VALUE, _TOAST = (ord(letter) for letter in "tnu")
_PASSED_OVER = tuple(ord(letter) for letter in "YOM")  # Type, Origin, Message.
_DATA, _KEEPALIVE = ord("w"), ord("k")


class ProtocolError(CampusSyncError):
    """The source sent what this decoder does not understand; the stream cannot go on."""


class KeyUnknown(CampusSyncError):
    """A table's replica identity does not name the rows by the key that is needed."""


class PgOutputDecoder:
    """Turns replication messages into `RawChanges` that join on to each other from `start`.

    A `RawChanges` ends at a commit, except where one transaction alone exceeds a limit: then
    it ends inside, at (commit LSN, ordinal). What is cut where depends only on the messages
    and the calls of `flush`, never on how the messages are divided among calls of `feed`.
    After an exception a decoder is of no more use.

    Ordinals count a transaction's changes from 1; an update of the key takes two: the delete
    of the old key, then the update.

    Args:
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one change is
        larger. Bytes are those of the change messages; at most 1 GiB.
      start: changes up to it were applied before; they are passed over and not counted.
      keys: `schema.table` to the columns that identify a row; changes of other tables are
        passed over and not counted. None: every table, by its replica identity.
    """

    def __init__(
        self,
        batch_rows: int,
        batch_bytes: int,
        start: Position,
        keys: Mapping[str, Sequence[str]] | None = None,
    ):
        if not 0 < batch_bytes <= _BATCH_BYTES_MAX or batch_rows < 1:
            raise ValueError("batch_rows must be positive, batch_bytes from 1 to 1 GiB")
        self._keys = keys
        self._end = start
        self._state = np.zeros(_STATE_SIZE, np.int64)
        self._state[_DONE_LSN] = -1
        limits = (start.lsn, start.seq, batch_rows, batch_bytes)
        self._state[_START_LSN : _BYTES_MAX + 1] = limits
        self._rows = np.empty((batch_rows + 2, _ROW_SIZE), np.int64)
        self._buffer = np.empty(1 << 16, np.uint8)
        self._used = 0
        self._layouts: list[Layout] = []
        self._relations: dict[int, tuple[bytes, int]] = {}
        self._tables = _lookup(self._relations, self._layouts)
        self._truncates: list[tuple[str, Position]] = []

    @property
    def position(self) -> Position:
        """Where the last `RawChanges` ended."""
        return self._end

    @property
    def idle(self) -> bool:
        """Whether nothing waits: no transaction is open and everything complete was returned."""
        done = Position(int(self._state[_DONE_LSN]), SEQ_END)
        return not self._state[_IN_TX] and done <= self._end

    def feed(self, payloads: Sequence[bytes]) -> list[RawChanges]:
        """Takes CopyData payloads as they came and returns what they fill.

        Raises:
          ProtocolError: a message is unknown or damaged.
          KeyUnknown: a table's replica identity lacks its key.
          TooManyColumns: a table cannot be carried.
        """
        bounds = self._append(payloads)
        taken: list[RawChanges] = []
        at = 0
        while True:
            at, code = _scan(self._buffer, bounds, at, self._tables, self._state, self._rows)
            if code == _DONE:
                break
            if code == _CUT_COMMITTED:
                taken.append(self._cut_committed())
            elif code == _CUT_OPEN:
                taken.append(self._cut_open())
            elif code == _RARE:
                taken += self._take_rare(self._buffer[bounds[at] : bounds[at + 1]].tobytes())
                at += 1
            else:
                raise _broken(self._buffer[bounds[at] : bounds[at + 1]].tobytes())
        self._compact()
        return taken

    def flush(self, wal_end: int = 0, server_us: int = 0) -> list[RawChanges]:
        """Returns what is complete, whatever its size; an open transaction stays.

        Args:
          wal_end: the log up to here was sent, as a keepalive says; if nothing waits, an
            empty `RawChanges` moves the position there.
          server_us: the keepalive's time, the source's clock.
        """
        taken = []
        if Position(int(self._state[_DONE_LSN]), SEQ_END) > self._end:
            taken.append(self._cut_committed())
            self._compact()
        end = Position(wal_end - 1, SEQ_END)
        if self.idle and end > self._end:
            taken.append(RawChanges(self._end, end, 0, server_us, {}))
            self._end = end
        return taken

    def _append(self, payloads: Sequence[bytes]) -> np.ndarray:
        """Returns the bounds of the payloads in the buffer, to which they are added."""
        joined = b"".join(payloads)
        bounds = np.empty(len(payloads) + 1, np.int64)
        bounds[0] = self._used
        bounds[1:] = np.fromiter(map(len, payloads), np.int64, len(payloads))
        np.cumsum(bounds, out=bounds)
        needed = self._used + len(joined)
        if needed + SLACK > len(self._buffer):
            grown = np.empty(needed + needed // 2 + SLACK, np.uint8)
            grown[: self._used] = self._buffer[: self._used]
            self._buffer = grown
        self._buffer[self._used : needed] = np.frombuffer(joined, np.uint8)
        self._used = needed
        return bounds

    def _compact(self) -> None:
        """Gives back the bytes before the first kept row, once they are the greater part."""
        kept = self._rows[: self._state[_ROWS]]
        if not len(kept):
            self._used = 0
            if len(self._buffer) > 8 * self._state[_BYTES_MAX]:  # One huge value went through.
                self._buffer = np.empty(1 << 16, np.uint8)
            return
        first = int(kept[0, _R_OLD] if kept[0, _R_OLD] >= 0 else kept[0, _R_NEW])
        if 2 * first < self._used:
            return
        self._buffer[: self._used - first] = self._buffer[first : self._used].copy()
        self._used -= first
        kept[:, (_R_NEW, _R_OLD, _R_END)] -= first

    def _cut_committed(self) -> RawChanges:
        state = self._state
        done, bytes_done = int(state[_DONE_ROWS]), int(state[_DONE_BYTES])
        cut = self._cut(done, Position(int(state[_DONE_LSN]), SEQ_END), int(state[_DONE_US]))
        left = int(state[_ROWS]) - done
        self._rows[:left] = self._rows[done : done + left].copy()
        state[_ROWS], state[_BYTES] = left, state[_BYTES] - bytes_done
        state[_DONE_US] = state[_DONE_ROWS] = state[_DONE_BYTES] = 0
        return cut

    def _cut_open(self) -> RawChanges:
        state = self._state
        commit_us = max(int(state[_DONE_US]), int(state[_US]))
        end = Position(int(state[_LSN]), int(state[_SEQ]))
        cut = self._cut(int(state[_ROWS]), end, commit_us)
        state[_ROWS] = state[_BYTES] = 0
        state[_DONE_US] = state[_DONE_ROWS] = state[_DONE_BYTES] = 0
        return cut

    def _cut(self, count: int, end: Position, commit_us: int) -> RawChanges:
        """Makes a `RawChanges` of the first `count` rows kept and moves the position."""
        rows = self._rows[:count]
        tables: dict[str, pa.RecordBatch] = {}
        rejects: list[Reject] = []
        for index in np.flatnonzero(np.bincount(rows[:, _R_LAYOUT])) if count else ():
            layout = self._layouts[index]
            batch, refused = self._decode(layout, rows[rows[:, _R_LAYOUT] == index])
            rejects += refused
            if batch.num_rows:
                tables[layout.table] = batch
        truncates = tuple(item for item in self._truncates if item[1] <= end)
        self._truncates = self._truncates[len(truncates) :]
        begin, self._end = self._end, end
        return RawChanges(
            begin, end, count, commit_us, tables, truncates=truncates, rejects=tuple(rejects)
        )

    def _decode(
        self, layout: Layout, rows: np.ndarray
    ) -> tuple[pa.RecordBatch, tuple[Reject, ...]]:
        start = np.zeros((len(rows), layout.width), np.int64)
        length = np.full((len(rows), layout.width), NULL, np.int32)
        identity = np.zeros(len(layout.columns), np.bool_)
        identity[list(layout.identity)] = True
        key = np.array(layout.key, np.int64)
        broken = _cells(self._buffer, rows, identity, key, start, length)
        if broken >= 0:
            lsn = format_lsn(int(rows[broken, _R_LSN]))
            raise ProtocolError(
                f"a change of {layout.table} in the transaction at {lsn} is damaged."
            )
        fixed = Rows(
            op=rows[:, _R_OP].astype(np.uint8),
            lsn=rows[:, _R_LSN].copy(),
            seq=rows[:, _R_SEQ].astype(np.int32),
            commit_us=rows[:, _R_US].copy(),
        )
        return record_batch(layout, fixed, self._buffer, start, length)

    def _take_rare(self, payload: bytes) -> list[RawChanges]:
        kind = payload[HEADER : HEADER + 1]
        try:
            if kind == b"R":
                return self._take_relation(payload[HEADER + 1 :])
            if kind == b"T" and self._state[_IN_TX]:
                return self._take_truncate(payload[HEADER + 1 :])
        except (struct.error, ValueError, KeyError) as error:
            raise _broken(payload) from error
        raise _broken(payload)

    def _take_relation(self, message: bytes) -> list[RawChanges]:
        (oid,) = struct.unpack_from("!I", message)
        known = self._relations.get(oid)
        if known is not None and known[0] == message:
            return []
        followed = known is not None and known[1] != _IGNORED
        layout = _layout(message, self._keys, followed)
        index = _IGNORED
        taken: list[RawChanges] = []
        if layout is not None:
            taken = self._close(layout)
            if layout not in self._layouts:
                self._layouts.append(layout)
            index = self._layouts.index(layout)
        self._relations[oid] = (message, index)
        self._tables = _lookup(self._relations, self._layouts)
        return taken

    def _close(self, layout: Layout) -> list[RawChanges]:
        """Cuts as often as it takes to hold no row of the same table in another layout."""
        others = [
            index
            for index, other in enumerate(self._layouts)
            if other.table == layout.table and other != layout
        ]
        taken = []
        for cut in (self._cut_committed, self._cut_open):
            kept = self._rows[: self._state[_ROWS], _R_LAYOUT]
            if np.isin(kept, others).any() and (cut == self._cut_open or self._state[_DONE_ROWS]):
                taken.append(cut())
        return taken

    def _take_truncate(self, message: bytes) -> list[RawChanges]:
        count, _options = struct.unpack_from("!iB", message)
        state = self._state
        for oid in struct.unpack_from(f"!{count}I", message, 5):
            state[_SEQ] += 1
            position = Position(int(state[_LSN]), int(state[_SEQ]))
            index = self._relations[oid][1]
            if index != _IGNORED and position > (state[_START_LSN], state[_START_SEQ]):
                self._truncates.append((self._layouts[index].table, position))
        return []


def _broken(payload: bytes) -> ProtocolError:
    if len(payload) <= HEADER or payload[0] != _DATA:
        return ProtocolError(f"the source sent {len(payload)} bytes that hold no message.")
    (lsn,) = struct.unpack_from("!Q", payload, 1)
    return ProtocolError(
        f"message type 0x{payload[HEADER]:02x} at {format_lsn(lsn)} is unknown, damaged or "
        "out of place."
    )


def _layout(
    message: bytes, keys: Mapping[str, Sequence[str]] | None, followed: bool
) -> Layout | None:
    """Returns the layout that a Relation message tells, or None for a table passed over.

    Args:
      followed: whether the table was followed under the name that it had before: under a new one
        its rows are told as well, for somebody to refuse them.
    """
    namespace, name, rest = message[4:].split(b"\0", 2)
    table = f"{namespace.decode() or 'pg_catalog'}.{name.decode()}"
    if keys is not None and table not in keys:
        if not followed:
            return None
        keys = {table: ()}
    identity_kind, count = struct.unpack_from("!cH", rest)
    at = 3
    columns: list[str] = []
    identity: list[int] = []
    for index in range(count):
        end = rest.index(b"\0", at + 1)
        columns.append(rest[at + 1 : end].decode())
        if rest[at] & 1:
            identity.append(index)
        at = end + 9  # The terminator, the type and its modifier.
    if at != len(rest):
        raise ValueError("not as long as its columns")
    if keys is not None:
        # A key's column that is gone or renamed refuses its rows one by one.
        here = [column for column in keys[table] if column in columns]
        lacking = sorted(set(here) - {columns[index] for index in identity})
        if lacking:
            raise KeyUnknown(
                f"the replica identity of {table} lacks {', '.join(lacking)}: give the table a "
                "primary key of these columns, or REPLICA IDENTITY FULL."
            )
        key = tuple(columns.index(column) for column in here)
    elif identity_kind == b"f":
        raise KeyUnknown(f"{table} has REPLICA IDENTITY FULL: its key columns must be given.")
    else:
        key = tuple(identity)
    return Layout(table, tuple(columns), key, tuple(identity))


def _lookup(
    relations: Mapping[int, tuple[bytes, int]], layouts: Sequence[Layout]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns relation ids, their layouts, and of each layout its width and a mask of its key."""
    return (
        np.array(list(relations), np.int64),
        np.array([index for _, index in relations.values()], np.int64),
        np.array([len(layout.columns) for layout in layouts], np.int64),
        np.array([sum(1 << i for i in layout.key) for layout in layouts], np.uint64),
    )


@numba.njit(nogil=True, cache=True)
def _integer(buffer, at, size):
    """Returns the big-endian integer of `size` bytes; of 8 bytes it is signed."""
    value = np.int64(0)
    for i in range(size):
        value = (value << 8) | np.int64(buffer[at + i])
    return value


@numba.njit(nogil=True, cache=True)
def _walk(buffer, at, end, columns, start, length, row):
    """Finds the cells of the tuple at `at`; returns where it ends, or -1 if it is damaged."""
    if at + 2 > end or _integer(buffer, at, 2) != columns:
        return -1
    at += 2
    for c in range(columns):
        if at >= end:
            return -1
        kind = buffer[at]
        at += 1
        if kind == _TEXT:
            if at + 4 > end:
                return -1
            size = _integer(buffer, at, 4)
            at += 4
            if size > end - at:
                return -1
            start[row, c] = at
            length[row, c] = size
            at += size
        elif kind == _NO_VALUE:
            length[row, c] = NULL
        elif kind == _TOAST:
            length[row, c] = UNCHANGED
        else:
            return -1
    return at


@numba.njit(nogil=True, cache=True)
def _moved(buffer, columns, key, start, length):
    """Whether the old tuple (row 0) and the new one (row 1) differ in the key."""
    for c in range(columns):
        if not (key >> np.uint64(c)) & np.uint64(1) or length[1, c] == UNCHANGED:
            continue
        if length[0, c] != length[1, c]:
            return True
        for i in range(length[0, c]):
            if buffer[start[0, c] + i] != buffer[start[1, c] + i]:
                return True
    return False


@numba.njit(nogil=True, cache=True)
def _tuples(buffer, at, end, columns, key, start, length):
    """Returns offsets of new and old tuple of the change at `at`, kind of the old, key moved.

    A tuple that is absent is at -1; both are absent if the message is damaged.
    """
    kind, tag = buffer[at], buffer[at + 5]
    new, old, moved = np.int64(-1), np.int64(-1), False
    if kind == _D:
        if tag in (_KEY, _WHOLE):
            old = at + 6
    elif tag == _NEW:
        new = at + 6
    elif kind == _U and tag in (_KEY, _WHOLE):
        middle = _walk(buffer, at + 6, end, columns, start, length, 0)
        if middle < 0 or middle >= end or buffer[middle] != _NEW:
            return new, old, tag, moved
        if _walk(buffer, middle + 1, end, columns, start, length, 1) >= 0:
            old, new = at + 6, middle + 1
            moved = _moved(buffer, columns, key, start, length)
    return new, old, tag, moved


@numba.njit(nogil=True, cache=True)
def _keep(rows, state, layout, op, seq, new, old, old_kind, moved, end):
    row = rows[state[_ROWS]]
    row[_R_LAYOUT], row[_R_OP] = layout, op
    row[_R_LSN], row[_R_SEQ], row[_R_US] = state[_LSN], seq, state[_US]
    row[_R_NEW], row[_R_OLD], row[_R_OLD_KIND] = new, old, old_kind
    row[_R_MOVED], row[_R_END] = moved, end
    state[_ROWS] += 1


@numba.njit(nogil=True, cache=True)
def _change(buffer, at, end, tables, state, rows, start, length):
    """Takes an insert, update or delete; returns `_DONE` or why the scan must stop before it."""
    oids, layouts, widths, keys = tables
    if not state[_IN_TX] or end - at < 8:
        return _BROKEN
    oid = _integer(buffer, at + 1, 4)
    index = 0
    while index < len(oids) and oids[index] != oid:
        index += 1
    if index == len(oids):
        return _BROKEN
    layout = layouts[index]
    if layout == _IGNORED:
        state[_SEQ] += 1
        return _DONE
    new, old, old_kind, moved = _tuples(
        buffer, at, end, widths[layout], keys[layout], start, length
    )
    if new < 0 and old < 0:
        return _BROKEN
    first = state[_SEQ] + 1
    last = first + 1 if moved else first
    passed = state[_START_SEQ] if state[_LSN] == state[_START_LSN] else np.int64(0)
    if state[_LSN] < state[_START_LSN] or last <= passed:
        state[_SEQ] = last
        return _DONE
    count = last - max(first, passed + 1) + 1
    if state[_ROWS] + count > state[_ROWS_MAX] or state[_BYTES] + end - at > state[_BYTES_MAX]:
        if state[_DONE_ROWS]:
            return _CUT_COMMITTED
        if state[_ROWS]:
            return _CUT_OPEN
    if moved and first > passed:
        _keep(rows, state, layout, _D, first, -1, old, old_kind, 0, end)
    _keep(rows, state, layout, buffer[at], last, new, old, old_kind, moved, end)
    state[_SEQ] = last
    state[_BYTES] += end - at
    return _DONE


@numba.njit(nogil=True, cache=True)
def _begin(buffer, at, end, state):
    if state[_IN_TX] or end - at < 21:
        return _BROKEN
    state[_IN_TX] = 1
    state[_LSN] = _integer(buffer, at + 1, 8)
    state[_US] = _integer(buffer, at + 9, 8) + POSTGRES_EPOCH_US
    state[_SEQ] = 0
    return _DONE


@numba.njit(nogil=True, cache=True)
def _commit(buffer, at, end, state):
    if not state[_IN_TX] or end - at < 26 or _integer(buffer, at + 2, 8) != state[_LSN]:
        return _BROKEN
    state[_IN_TX] = 0
    state[_DONE_LSN] = state[_LSN]
    state[_DONE_US] = max(state[_DONE_US], state[_US])
    state[_DONE_ROWS] = state[_ROWS]
    state[_DONE_BYTES] = state[_BYTES]
    return _DONE


@numba.njit(nogil=True, cache=True)
def _scan(buffer, bounds, first, tables, state, rows):
    """Takes messages from `first` on until one needs more; returns which, and why.

    A message that ends the scan was not taken, except the commit that fills a batch.
    """
    start = np.empty((2, 64), np.int64)
    length = np.empty((2, 64), np.int32)
    for message in range(first, len(bounds) - 1):
        begin, end = bounds[message], bounds[message + 1]
        at = begin + HEADER
        if end > begin and buffer[begin] == _KEEPALIVE:
            continue
        if end <= at or buffer[begin] != _DATA:
            return message, _BROKEN
        kind = buffer[at]
        if kind in (_I, _U, _D):
            code = _change(buffer, at, end, tables, state, rows, start, length)
        elif kind == _B:
            code = _begin(buffer, at, end, state)
        elif kind == _C:
            code = _commit(buffer, at, end, state)
            full = state[_ROWS] >= state[_ROWS_MAX] or state[_BYTES] >= state[_BYTES_MAX]
            if code == _DONE and full:
                return message + 1, _CUT_COMMITTED
        elif kind in _PASSED_OVER:
            code = _DONE
        else:
            code = _RARE
        if code != _DONE:
            return message, code
    return len(bounds) - 1, _DONE


@numba.njit(nogil=True, cache=True)
def _cells(buffer, rows, identity, key, start, length):
    """Finds the cells of every row; returns -1, or which row is damaged.

    An unchanged value is taken from the old tuple where that has it; what an old tuple of
    the key alone does not have is unchanged, not null.
    """
    columns = len(identity)
    old_start = np.empty((1, columns), np.int64)
    old_length = np.empty((1, columns), np.int32)
    for r in range(len(rows)):
        new, old, end = rows[r, _R_NEW], rows[r, _R_OLD], rows[r, _R_END]
        if new >= 0 and _walk(buffer, new, end, columns, start, length, r) < 0:
            return r
        if old < 0:
            continue
        if _walk(buffer, old, end, columns, old_start, old_length, 0) < 0:
            return r
        for c in range(columns):
            if rows[r, _R_OLD_KIND] == _KEY and not identity[c]:
                old_length[0, c] = UNCHANGED
            if new < 0 or length[r, c] == UNCHANGED:
                start[r, c] = old_start[0, c]
                length[r, c] = old_length[0, c]
        if rows[r, _R_MOVED]:
            for k in range(len(key)):
                start[r, columns + k] = old_start[0, key[k]]
                length[r, columns + k] = old_length[0, key[k]]
    return -1
