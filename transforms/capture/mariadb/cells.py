"""Write the cells of row images as text: one canonical form a type, for log and snapshot."""

import numba
import numpy as np

from transforms.capture.columns import NULL, UNCHANGED
from transforms.capture.mariadb.charsets import put_marked, put_text
from transforms.capture.mariadb.events import (
    ABSENT,
    P_A,
    P_B,
    P_KEY,
    P_KIND,
    P_TARGET,
    R_END,
    R_MOVED,
    R_NEW,
    R_NEW_BITS,
    R_OLD,
    R_OLD_BITS,
    image,
    little,
)

# Kinds of cells. Their arguments A and B: see `table_map`.
(
    INTEGER,
    UNSIGNED,
    FLOAT,
    DECIMAL,
    YEAR,
    DATE,
    DATETIME,
    TIMESTAMP,
    TIME,
    OLD_DATETIME,
    OLD_TIMESTAMP,
    OLD_TIME,
    BIT,
    ENUM,
    SET,
    TEXT,
    HEX,
    REFUSED,
) = range(18)

_ZERO, _MINUS, _POINT, _COLON, _SPACE, _PLUS, _COMMA = (ord(letter) for letter in "0-.: +,")
_DIGIT_BYTES = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4, 4], np.int64)
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_POWERS = np.array([10**i for i in range(10)], np.int64)
_SPARE = 160  # Bytes that the longest number or time takes, and then some.


@numba.njit(nogil=True, cache=True)
def big(buffer, at, size):
    """Returns the big-endian integer of `size` bytes; of 8 bytes it is signed."""
    value = np.int64(0)
    for i in range(size):
        value = value << 8 | np.int64(buffer[at + i])
    return value


@numba.njit(nogil=True, cache=True)
def put_digits(value, digits, out, to):
    """Writes the last `digits` digits of a number that is not negative."""
    for i in range(digits - 1, -1, -1):
        out[to + i] = _ZERO + value % 10
        value //= 10
    return to + digits


@numba.njit(nogil=True, cache=True)
def put_unsigned(value, out, to):
    """Writes a uint64 with no leading zeros."""
    digits, rest = 1, value // np.uint64(10)
    while rest:
        digits += 1
        rest //= np.uint64(10)
    for i in range(digits - 1, -1, -1):
        out[to + i] = np.uint8(_ZERO + np.int64(value % np.uint64(10)))
        value //= np.uint64(10)
    return to + digits


@numba.njit(nogil=True, cache=True)
def _put_integer(buffer, at, size, unsigned, out, to):
    value = little(buffer, at, size)
    if unsigned:
        return put_unsigned(np.uint64(value), out, to)
    shift = 64 - 8 * size
    value = value << shift >> shift
    if value < 0:
        out[to] = _MINUS
        # The least number has no positive twin, but the same bits.
        return put_unsigned(np.uint64(-value), out, to + 1)
    return put_unsigned(np.uint64(value), out, to)


@numba.njit(nogil=True, cache=True)
def _group(buffer, at, size, first, flip):
    """Returns the number in a decimal's group of digits; `first` has the sign's bit in it."""
    value = np.int64(0)
    for i in range(size):
        byte = np.int64(buffer[at + i])
        if first and i == 0:
            byte ^= 0x80
        value = value << 8 | (byte ^ flip)
    return value


@numba.njit(nogil=True, cache=True)
def _put_decimal(buffer, at, precision, scale, out, to):
    """Writes a decimal with all digits of its scale; returns -1 if it is damaged."""
    flip = 0 if buffer[at] & 0x80 else 0xFF
    if flip:
        out[to] = _MINUS
        to += 1
    first, started = True, False
    for part in range(2):
        digits = scale if part else precision - scale
        if part and scale:
            out[to] = _POINT
            to += 1
        lead = digits % 9
        while digits > 0:
            if part:
                count = min(9, digits)
            else:
                count = lead if lead else 9
                lead = 0
            size = _DIGIT_BYTES[count]
            value = _group(buffer, at, size, first, flip)
            if value < 0 or value >= _POWERS[count]:
                return np.int64(-1)
            first = False
            at += size
            digits -= count
            if part or started:
                to = put_digits(value, count, out, to)
            elif value:
                to = put_unsigned(np.uint64(value), out, to)
                started = True
        if not part and not started:
            out[to] = _ZERO
            to += 1
    return to


@numba.njit(nogil=True, cache=True)
def _put_date(year, month, day, out, to):
    to = put_digits(year, 4, out, to)
    out[to] = _MINUS
    to = put_digits(month, 2, out, to + 1)
    out[to] = _MINUS
    return put_digits(day, 2, out, to + 1)


@numba.njit(nogil=True, cache=True)
def _put_clock(hour, minute, second, micros, decimals, out, to):
    to = put_digits(hour, 3 if hour > 99 else 2, out, to)
    out[to] = _COLON
    to = put_digits(minute, 2, out, to + 1)
    out[to] = _COLON
    to = put_digits(second, 2, out, to + 1)
    if decimals:
        out[to] = _POINT
        to = put_digits(micros // _POWERS[6 - decimals], decimals, out, to + 1)
    return to


@numba.njit(nogil=True, cache=True)
def _micros(fraction, decimals):
    """Returns the microseconds of a stored fraction, which has an even number of digits."""
    return fraction * _POWERS[6 - 2 * ((decimals + 1) // 2)]


@numba.njit(nogil=True, cache=True)
def _put_datetime(buffer, at, decimals, out, to):
    packed = big(buffer, at, 5) - 0x8000000000
    if packed < 0:
        return np.int64(-1)
    day, clock = packed >> 17, packed & 0x1FFFF
    month = day >> 5
    to = _put_date(month // 13, month % 13, day & 31, out, to)
    out[to] = _SPACE
    micros = _micros(big(buffer, at + 5, (decimals + 1) // 2), decimals)
    return _put_clock(clock >> 12, clock >> 6 & 63, clock & 63, micros, decimals, out, to + 1)


@numba.njit(nogil=True, cache=True)
def _put_instant(seconds, micros, decimals, out, to):
    """Writes seconds since 1970 in UTC with its zone; the zero date has none."""
    if seconds == 0 and micros == 0:
        to = _put_date(0, 0, 0, out, to)
        out[to] = _SPACE
        return _put_clock(0, 0, 0, 0, decimals, out, to + 1)
    days, second = seconds // 86_400, seconds % 86_400
    days += 719_468  # From 1 March of the year 0, in eras of 400 years.
    era = days // 146_097
    of_era = days - era * 146_097
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    march = (5 * of_year + 2) // 153
    month = march + 3 if march < 10 else march - 9
    day = of_year - (153 * march + 2) // 5 + 1
    to = _put_date(year + era * 400 + (month <= 2), month, day, out, to)
    out[to] = _SPACE
    to = _put_clock(second // 3600, second // 60 % 60, second % 60, micros, decimals, out, to + 1)
    out[to] = _PLUS
    return put_digits(0, 2, out, to + 1)


@numba.njit(nogil=True, cache=True)
def _put_time(buffer, at, decimals, out, to):
    size = (decimals + 1) // 2
    value = big(buffer, at, 3 + size) - (np.int64(0x800000) << 8 * size)
    if value < 0:
        out[to] = _MINUS
        to += 1
        value = -value
    clock, fraction = value >> 8 * size, value & (1 << 8 * size) - 1
    micros = _micros(fraction, decimals)
    return _put_clock(clock >> 12 & 0x3FF, clock >> 6 & 63, clock & 63, micros, decimals, out, to)


@numba.njit(nogil=True, cache=True)
def _put_old(buffer, at, kind, out, to):
    """Writes a time as servers before 10.1 and 5.6 stored it: in decimal, with no fraction."""
    if kind == OLD_TIMESTAMP:
        return _put_instant(little(buffer, at, 4), 0, 0, out, to)
    if kind == OLD_TIME:
        value = little(buffer, at, 3) << 40 >> 40
        if value < 0:
            out[to] = _MINUS
            to += 1
            value = -value
        return _put_clock(value // 10_000, value // 100 % 100, value % 100, 0, 0, out, to)
    value = little(buffer, at, 8)
    day, clock = value // 1_000_000, value % 1_000_000
    to = _put_date(day // 10_000, day // 100 % 100, day % 100, out, to)
    out[to] = _SPACE
    return _put_clock(clock // 10_000, clock // 100 % 100, clock % 100, 0, 0, out, to + 1)


@numba.njit(nogil=True, cache=True)
def _put_moment(buffer, at, kind, decimals, out, to):
    """Writes a value of a temporal type."""
    if kind == YEAR:
        value = np.int64(buffer[at])
        return put_digits(1900 + value if value else 0, 4, out, to)
    if kind == DATE:
        value = little(buffer, at, 3)
        return _put_date(value >> 9, value >> 5 & 15, value & 31, out, to)
    if kind == DATETIME:
        return _put_datetime(buffer, at, decimals, out, to)
    if kind == TIMESTAMP:
        micros = _micros(big(buffer, at + 4, (decimals + 1) // 2), decimals)
        return _put_instant(big(buffer, at, 4), micros, decimals, out, to)
    if kind == TIME:
        return _put_time(buffer, at, decimals, out, to)
    return _put_old(buffer, at, kind, out, to)


@numba.njit(nogil=True, cache=True)
def put_hex(buffer, at, size, padded, out, to):
    """Writes bytes in hexadecimal; what a fixed length lacks was zeros, stripped by the log."""
    for i in range(max(size, padded)):
        byte = buffer[at + i] if i < size else np.uint8(0)
        out[to], out[to + 1] = _HEX[byte >> 4], _HEX[byte & 15]
        to += 2
    return to


@numba.njit(nogil=True, cache=True)
def _put_label(index, labels, bounds, out, to):
    for i in range(bounds[index], bounds[index + 1]):
        out[to] = labels[i]
        to += 1
    return to


@numba.njit(nogil=True, cache=True)
def _put_choice(buffer, at, size, kind, first, count, labels, bounds, out, to):
    """Writes the label of an ENUM, or a SET's in their order; -1 if there is none such."""
    value = little(buffer, at, size)
    if kind == ENUM:
        if value == 0:  # What a lenient server stores for a value that is not in the list.
            return to
        return _put_label(first + value - 1, labels, bounds, out, to) if value <= count else -1
    if count < 64 and np.uint64(value) >> np.uint64(count):
        return np.int64(-1)
    some = False
    for i in range(count):
        if np.uint64(value) >> np.uint64(i) & np.uint64(1):
            if some:
                out[to] = _COMMA
                to += 1
            some = True
            to = _put_label(first + i, labels, bounds, out, to)
    return to


@numba.njit(nogil=True, cache=True)
def _put(buffer, at, size, column, words, out, to):
    """Writes one cell; returns the place behind it."""
    labels, bounds, single, double, four = words
    kind, a, b = column[P_KIND], column[P_A], column[P_B]
    if kind in (INTEGER, UNSIGNED):
        return _put_integer(buffer, at, size, kind == UNSIGNED, out, to)
    if kind == TEXT:
        return put_text(buffer, at, size, a, single[b], double[b], four, out, to)
    if kind == HEX:
        return put_hex(buffer, at, size, a, out, to)
    if kind == BIT:
        return put_unsigned(np.uint64(big(buffer, at, size)), out, to)
    done = np.int64(-1)
    if kind == DECIMAL:
        done = _put_decimal(buffer, at, a, b, out, to)
    elif YEAR <= kind <= OLD_TIME:
        done = _put_moment(buffer, at, kind, a, out, to)
    elif kind in (ENUM, SET):
        done = _put_choice(buffer, at, size, kind, a, b, labels, bounds, out, to)
    return done if done >= 0 else put_marked(buffer, at, size, out, to)


@numba.njit(nogil=True, cache=True)
def _room(size, column, bounds):
    """Returns how many bytes a cell takes at most."""
    kind, a, b = column[P_KIND], column[P_A], column[P_B]
    if kind == HEX:
        return 2 * max(size, a) + _SPARE
    if kind in (ENUM, SET):
        return bounds[a + b] - bounds[a] + b + _SPARE
    return 3 * size + _SPARE


@numba.njit(nogil=True, cache=True)
def _cell(buffer, r, place, column, words, floats, start, length, target, text, to):
    """Writes or notes one cell that the image has; returns the place behind its text."""
    at, size, old = place
    start[r, target] = to
    if column[P_KIND] == FLOAT:
        # Written later, all at once. Of 4 bytes or 8; the bits are kept.
        floats[column[P_A], old, r] = little(buffer, at, size)
        length[r, target] = 0
        return to
    after = _put(buffer, at, size, column, words, text, to)
    length[r, target] = after - to
    return after


@numba.njit(nogil=True, cache=True)
def write_rows(buffer, rows, first, program, words, floats, start, length, columns, text, to):
    """Writes the cells of rows from `first` on.

    A new image's absent cell is taken from the old one where that has it (then it did not
    change), and is unchanged otherwise. Old keys of moved rows go behind the columns.

    Numbers of floating point are noted in `floats` (column, old key or not, row) as their bits.

    Returns which row was not written, -1 if none, and the place behind the text: `-2 - row` is
    a damaged row, `row` is one that needs more room.
    """
    width = len(program)
    at = np.empty((2, width), np.int64)
    size = np.empty((2, width), np.int64)
    for r in range(first, len(rows)):
        old, new, end = rows[r, R_OLD], rows[r, R_NEW], rows[r, R_END]
        size[:] = ABSENT
        if old >= 0 and image(buffer, old, end, rows[r, R_OLD_BITS], program, at, size, 0) < 0:
            return np.int64(-2 - r), to
        if new >= 0 and image(buffer, new, end, rows[r, R_NEW_BITS], program, at, size, 1) < 0:
            return np.int64(-2 - r), to
        room = np.int64(0)
        for c in range(width):
            if program[c, P_TARGET] >= 0:
                longest = max(size[0, c], size[1, c], 0)
                room += 2 * _room(longest, program[c], words[1])
        if to + room > len(text):
            return np.int64(r), to
        for c in range(width):
            target, key = program[c, P_TARGET], program[c, P_KEY]
            if target < 0:
                continue
            side = 1 if new >= 0 and size[1, c] != ABSENT else 0
            for k in range(2 if key and rows[r, R_MOVED] else 1):
                if k:
                    side, target = 0, columns + key - 1
                found = size[side, c]
                if found < 0:
                    length[r, target] = NULL if found == NULL else UNCHANGED
                    continue
                place = (at[side, c], found, k)
                to = _cell(
                    buffer, r, place, program[c], words, floats, start, length, target, text, to
                )
    return np.int64(-1), to
