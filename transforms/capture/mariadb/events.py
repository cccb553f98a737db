"""Find transactions and rows in binlog events: kernels over a buffer of packets."""

import numba
import numpy as np

from transforms.capture.columns import NULL
from transforms.capture.mariadb.places import FILE_SHIFT, KIND_BITS, TRANSACTION

ABSENT = -2  # Length of a cell that the image does not have.
HEADER = 20  # The packet's OK byte, then the event's header.

# What a scan ends with.
DONE, CUT_COMMITTED, CUT_OPEN, RARE, BROKEN, DAMAGED, TORN = range(7)
# A scan's state: one array, so that it is handed over once.
IN_TX, LSN, US, SEQ = range(4)  # The transaction under way, and its last ordinal.
ROWS, BYTES = 4, 5  # Kept since the last cut.
DONE_LSN, DONE_US, DONE_ROWS, DONE_BYTES = range(6, 10)  # The same up to the last commit.
START_LSN, START_SEQ, ROWS_MAX, BYTES_MAX = range(10, 14)
FILE, POS = 14, 15  # The log file's number, and where in it the next event starts.
CRC = 16  # Bytes of an event's checksum.
NEXT_IMAGE = 17  # Where a rows event that a cut has divided goes on, or 0.
STANDALONE = 18  # The group under way is one statement, with no commit after it.
OPEN_CUT = 19  # Rows of the transaction under way were given out.
GTID_DOMAIN, GTID_SERVER, GTID_SEQ = 20, 21, 22  # Of the last group begun.
STATE_SIZE = 23
# Values of IN_TX: none; open; XA being prepared; begun, but one statement or more is not known.
NO_TX, OPEN_TX, XA_TX, UNSURE_TX = range(4)
# A kept row: one line of integers. Images are offsets, or negative.
R_MAP, R_OP, R_LSN, R_SEQ, R_US, R_OLD, R_NEW, R_OLD_BITS, R_NEW_BITS, R_MOVED, R_END = range(11)
ROW_SIZE = 11
# A column in a table map's program: how its cell is found, written, and where it goes.
P_KIND, P_FIXED, P_PREFIX, P_A, P_B, P_TARGET, P_KEY = range(7)
PROGRAM_SIZE = 7

_INSERT, _UPDATE, _DELETE = (ord(letter) for letter in "IUD")

QUERY, STOP, ROTATE, INTVAR, XID, FORMAT, TABLE_MAP = 2, 3, 4, 5, 16, 15, 19
_WRITE_1, _UPDATE_1, _DELETE_1, _WRITE_2, _UPDATE_2, _DELETE_2 = 23, 24, 25, 30, 31, 32
INCIDENT, HEARTBEAT, XA_PREPARE, PARTIAL_UPDATE, PAYLOAD, HEARTBEAT_2 = 26, 27, 38, 39, 40, 41
EXECUTE_LOAD_QUERY = 18
MYSQL_GTID, MYSQL_ANONYMOUS = 33, 34
ANNOTATE, CHECKPOINT, GTID, GTID_LIST, START_ENCRYPTION = 160, 161, 162, 163, 164
QUERY_COMPRESSED, ROWS_COMPRESSED = 165, range(166, 172)
# RAND and USER_VAR, which belong to statements; the rest says nothing of rows.
_PASSED_OVER = (STOP, INTVAR, 13, 14, 28, 29, 35, 36, 37, ANNOTATE, CHECKPOINT, GTID_LIST)
_ARTIFICIAL, _IGNORABLE = 0x20, 0x80
FL_STANDALONE, FL_PREPARED_XA, FL_COMPLETED_XA = 1, 64, 128
_BEGIN_QUERY = np.frombuffer(b"BEGIN", np.uint8)
_COMMIT_QUERY = np.frombuffer(b"COMMIT", np.uint8)


def _crc_tables() -> np.ndarray:
    """Returns the tables of CRC-32 eight bytes at a time."""
    tables = np.zeros((8, 256), np.uint32)
    for i in range(256):
        value = i
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        tables[0, i] = value
    for k in range(1, 8):
        tables[k] = tables[0][tables[k - 1] & 0xFF] ^ tables[k - 1] >> np.uint32(8)
    return tables


_CRC = _crc_tables()


@numba.njit(nogil=True, cache=True)
def crc32(buffer, at, end):
    """Returns the CRC-32 of a stretch of the buffer, as zlib does."""
    crc = np.uint32(0xFFFFFFFF)
    while at + 8 <= end:
        low = crc ^ (
            np.uint32(buffer[at])
            | np.uint32(buffer[at + 1]) << np.uint32(8)
            | np.uint32(buffer[at + 2]) << np.uint32(16)
            | np.uint32(buffer[at + 3]) << np.uint32(24)
        )
        crc = (
            _CRC[7, low & np.uint32(0xFF)]
            ^ _CRC[6, low >> np.uint32(8) & np.uint32(0xFF)]
            ^ _CRC[5, low >> np.uint32(16) & np.uint32(0xFF)]
            ^ _CRC[4, low >> np.uint32(24)]
            ^ _CRC[3, buffer[at + 4]]
            ^ _CRC[2, buffer[at + 5]]
            ^ _CRC[1, buffer[at + 6]]
            ^ _CRC[0, buffer[at + 7]]
        )
        at += 8
    while at < end:
        crc = _CRC[0, (crc ^ np.uint32(buffer[at])) & np.uint32(0xFF)] ^ crc >> np.uint32(8)
        at += 1
    return crc ^ np.uint32(0xFFFFFFFF)


@numba.njit(nogil=True, cache=True)
def little(buffer, at, size):
    """Returns the little-endian integer of `size` bytes; of 8 bytes it is signed."""
    value = np.int64(0)
    for i in range(size):
        value |= np.int64(buffer[at + i]) << (8 * i)
    return value


@numba.njit(nogil=True, cache=True)
def image(buffer, at, end, bits, program, start, length, row):
    """Finds the cells of the row image at `at`; returns where it ends, or -1 if it is damaged.

    `bits` is where the mask of the columns stands that the image has; cells are put into
    line `row` of `start` and `length`, in the order of the source's columns.
    """
    width = len(program)
    present = 0
    for c in range(width):
        present += buffer[bits + (c >> 3)] >> (c & 7) & 1
    nulls, k = at, 0
    at += (present + 7) >> 3
    if at > end:
        return np.int64(-1)
    for c in range(width):
        if not buffer[bits + (c >> 3)] >> (c & 7) & 1:
            length[row, c] = ABSENT
            continue
        null = buffer[nulls + (k >> 3)] >> (k & 7) & 1
        k += 1
        if null:
            length[row, c] = NULL
            continue
        size, prefix = program[c, P_FIXED], program[c, P_PREFIX]
        if prefix:
            if at + prefix > end:
                return np.int64(-1)
            size = little(buffer, at, prefix)
            at += prefix
        if size < 0 or size > end - at:
            return np.int64(-1)
        start[row, c], length[row, c] = at, size
        at += size
    return at


@numba.njit(nogil=True, cache=True)
def _moved(buffer, program, start, length):
    """Whether old image (line 0) and new one (line 1) differ in the key."""
    for c in range(len(program)):
        if not program[c, P_KEY] or length[0, c] == ABSENT or length[1, c] == ABSENT:
            continue
        if length[0, c] != length[1, c]:
            return True
        for i in range(length[0, c]):
            if buffer[start[0, c] + i] != buffer[start[1, c] + i]:
                return True
    return False


@numba.njit(nogil=True, cache=True)
def _keep(rows, state, index, op, seq, old, new, old_bits, new_bits, moved, end):
    row = rows[state[ROWS]]
    row[R_MAP], row[R_OP] = index, op
    row[R_LSN], row[R_SEQ], row[R_US] = state[LSN], seq, state[US]
    row[R_OLD], row[R_NEW] = old, new
    row[R_OLD_BITS], row[R_NEW_BITS] = old_bits, new_bits
    row[R_MOVED], row[R_END] = moved, end
    state[ROWS] += 1


@numba.njit(nogil=True, cache=True)
def _row(buffer, at, end, op, bits, index, wanted, program, state, rows, start, length):
    """Takes one row; returns where it ends and `DONE`, or why the scan must stop before it."""
    old = new = np.int64(-1)
    moved = False
    old_bits, new_bits = bits
    if op == _INSERT:
        new, after = at, image(buffer, at, end, new_bits, program, start, length, 1)
    else:
        old, after = at, image(buffer, at, end, old_bits, program, start, length, 0)
        if op == _UPDATE and after >= 0:
            new, after = after, image(buffer, after, end, new_bits, program, start, length, 1)
            moved = wanted and after >= 0 and _moved(buffer, program, start, length)
    if after <= at:
        return at, BROKEN
    first = state[SEQ] + 1
    last = first + 1 if moved else first
    passed = state[START_SEQ] if state[LSN] == state[START_LSN] else np.int64(0)
    if not wanted or state[LSN] < state[START_LSN] or last <= passed:
        state[SEQ] = last
        return after, DONE
    count = last - max(first, passed + 1) + 1
    if state[ROWS] + count > state[ROWS_MAX] or state[BYTES] + after - at > state[BYTES_MAX]:
        if state[DONE_ROWS]:
            return at, CUT_COMMITTED
        if state[ROWS]:
            return at, CUT_OPEN
    if moved and first > passed:
        _keep(rows, state, index, _DELETE, first, old, -1, old_bits, old_bits, 0, end)
    _keep(rows, state, index, op, last, old, new, old_bits, new_bits, moved, end)
    state[SEQ] = last
    state[BYTES] += after - at
    return after, DONE


@numba.njit(nogil=True, cache=True)
def _rows_event(buffer, at, end, kind, tables, state, rows, start, length):
    ids, maps, _, _, firsts, widths, wanted, walkable, programs = tables
    if state[IN_TX] != OPEN_TX or end - at < 10:
        return BROKEN
    table_id = little(buffer, at, 6)
    at += 8
    if kind >= _WRITE_2:
        at += little(buffer, at, 2)
    i = 0
    while i < len(ids) and ids[i] != table_id:
        i += 1
    if i == len(ids):
        # A closing event of a statement may name no table at all.
        return DONE if table_id == 0xFFFFFF else BROKEN
    index = maps[i]
    width = np.int64(buffer[at])
    at += 1
    if width == 0xFC:
        width = little(buffer, at, 2)
        at += 2
    if width != widths[index]:
        return BROKEN
    if not walkable[index]:
        return DONE
    mask = (width + 7) >> 3
    bits = (at, at)
    at += mask
    op = _INSERT
    if kind in (_UPDATE_1, _UPDATE_2):
        bits = (at - mask, at)
        at += mask
        op = _UPDATE
    elif kind in (_DELETE_1, _DELETE_2):
        op = _DELETE
    program = programs[firsts[index] : firsts[index] + width]
    if state[NEXT_IMAGE]:
        at = state[NEXT_IMAGE]
        state[NEXT_IMAGE] = 0
    while at < end:
        at, code = _row(
            buffer, at, end, op, bits, index, wanted[index], program, state, rows, start, length
        )
        if code != DONE:
            state[NEXT_IMAGE] = at
            return code
    return DONE if at == end else BROKEN


@numba.njit(nogil=True, cache=True)
def begin(state, offset, us):
    """Starts the transaction whose first event stands at `offset`."""
    state[IN_TX] = OPEN_TX
    state[LSN] = state[FILE] << FILE_SHIFT | offset << KIND_BITS | TRANSACTION
    state[US] = us
    state[SEQ] = state[STANDALONE] = 0
    # A transaction that an earlier reader gave out in part is open to harm by a rollback too.
    state[OPEN_CUT] = state[LSN] == state[START_LSN] and state[START_SEQ] > 0


@numba.njit(nogil=True, cache=True)
def commit(state):
    """Ends the transaction under way: what is kept of it may be given out."""
    state[IN_TX] = state[STANDALONE] = state[OPEN_CUT] = 0
    state[DONE_LSN] = state[LSN]
    state[DONE_US] = max(state[DONE_US], state[US])
    state[DONE_ROWS] = state[ROWS]
    state[DONE_BYTES] = state[BYTES]


@numba.njit(nogil=True, cache=True)
def _gtid(buffer, at, end, state, size, seconds):
    if state[IN_TX]:
        return TORN
    if end - at < 19:
        return BROKEN
    flags = buffer[at + 12]
    if flags & (FL_PREPARED_XA | FL_COMPLETED_XA):
        return RARE
    begin(state, state[POS] - size, seconds * 1_000_000)
    state[STANDALONE] = flags & FL_STANDALONE
    state[GTID_SEQ] = little(buffer, at, 8)
    state[GTID_DOMAIN] = little(buffer, at + 8, 4)
    state[GTID_SERVER] = little(buffer, at - 14, 4)  # In the event's header.
    return DONE


@numba.njit(nogil=True, cache=True)
def _mysql_gtid(buffer, at, end, state, size, seconds):
    if state[IN_TX]:
        return TORN
    us = seconds * 1_000_000
    if end - at >= 49 and buffer[at + 25] == 2:  # With commit times, microseconds in 7 bytes.
        us = little(buffer, at + 42, 7) & ((1 << 55) - 1)
    begin(state, state[POS] - size, us)
    state[IN_TX] = UNSURE_TX
    state[GTID_SEQ] = little(buffer, at + 17, 8) if end - at >= 25 else 0
    return DONE


@numba.njit(nogil=True, cache=True)
def _is(buffer, at, end, text):
    i = 0
    while i < len(text) and at + i < end and buffer[at + i] == text[i]:
        i += 1
    return i == len(text) == end - at


@numba.njit(nogil=True, cache=True)
def _query(buffer, at, end, state, size, seconds):
    """Takes a transaction's BEGIN and COMMIT; any other statement is rare."""
    if end - at < 13:
        return BROKEN
    text = at + 13 + little(buffer, at + 11, 2) + np.int64(buffer[at + 8]) + 1
    if _is(buffer, text, end, _COMMIT_QUERY):
        if state[IN_TX] != OPEN_TX:
            return BROKEN
        commit(state)
        return DONE
    if _is(buffer, text, end, _BEGIN_QUERY):
        if state[IN_TX] == NO_TX:
            begin(state, state[POS] - size, seconds * 1_000_000)
        elif state[IN_TX] != UNSURE_TX:
            return BROKEN
        state[IN_TX] = OPEN_TX
        return DONE
    return RARE


@numba.njit(nogil=True, cache=True)
def _table_map(buffer, at, end, tables):
    """Whether the table of this map is known, and known to look like this."""
    ids, maps, signatures, bounds, _, _, _, _, _ = tables
    table_id = little(buffer, at, 6)
    for i in range(len(ids)):
        if ids[i] == table_id:
            begins, ends = bounds[maps[i]], bounds[maps[i] + 1]
            if ends - begins != end - at - 8:
                return RARE
            for k in range(ends - begins):
                if signatures[begins + k] != buffer[at + 8 + k]:
                    return RARE
            return DONE
    return RARE


@numba.njit(nogil=True, cache=True)
def advance(state, log_pos, size):
    """Moves the place behind an event.

    Events inside a transaction may have no place of their own; a place has 32 bits, and
    a file may be longer.
    """
    if log_pos == 0:
        state[POS] += size
        return
    place = state[POS] >> 32 << 32 | log_pos
    state[POS] = place + (1 << 32) if place < state[POS] else place


@numba.njit(nogil=True, cache=True)
def _event(buffer, at, end, kind, seconds, size, tables, state, rows, start, length):
    if state[IN_TX] == XA_TX:
        return RARE
    if _WRITE_1 <= kind <= _DELETE_1 or _WRITE_2 <= kind <= _DELETE_2:
        return _rows_event(buffer, at, end, kind, tables, state, rows, start, length)
    if kind == TABLE_MAP:
        return _table_map(buffer, at, end, tables) if end - at >= 8 else BROKEN
    if kind == GTID:
        return _gtid(buffer, at, end, state, size, seconds)
    if kind == XID:
        if state[IN_TX] != OPEN_TX:
            return BROKEN
        commit(state)
        return DONE
    if kind == QUERY:
        return _query(buffer, at, end, state, size, seconds)
    if kind in (MYSQL_GTID, MYSQL_ANONYMOUS):
        return _mysql_gtid(buffer, at, end, state, size, seconds)
    return DONE if kind in _PASSED_OVER else RARE


@numba.njit(nogil=True, cache=True)
def scan(buffer, starts, ends, first, tables, state, rows, start, length):
    """Takes packets from `first` on until one needs more; returns which, and why.

    A packet that ends the scan was not taken, except the commit that fills a batch.
    """
    for packet in range(first, len(starts)):
        at, end = starts[packet], ends[packet]
        if end <= at or buffer[at] != 0:
            return packet, RARE
        if end - at < HEADER:
            return packet, BROKEN
        seconds, kind = little(buffer, at + 1, 4), buffer[at + 5]
        size, log_pos = little(buffer, at + 10, 4), little(buffer, at + 14, 4)
        flags = little(buffer, at + 18, 2)
        if size != end - at - 1:
            return packet, BROKEN
        if kind in (HEARTBEAT, HEARTBEAT_2):
            continue
        fresh = state[NEXT_IMAGE] == 0
        if state[CRC] and kind != FORMAT:
            end -= state[CRC]
            if end - at < HEADER:
                return packet, BROKEN
            if fresh and crc32(buffer, at + 1, end) != np.uint32(little(buffer, end, 4)):
                return packet, DAMAGED
        place = state[POS]
        if fresh and not flags & _ARTIFICIAL and (kind != FORMAT or log_pos):
            advance(state, log_pos, size)
        code = _event(
            buffer, at + HEADER, end, kind, seconds, size, tables, state, rows, start, length
        )
        if code == RARE and flags & _IGNORABLE:
            code = DONE
        if code in (RARE, TORN):
            state[POS] = place  # It is looked at again.
        if code != DONE:
            return packet, code
        full = state[DONE_ROWS] >= state[ROWS_MAX] or state[DONE_BYTES] >= state[BYTES_MAX]
        if full and state[IN_TX] == NO_TX:
            return packet + 1, CUT_COMMITTED
    return len(starts), DONE
