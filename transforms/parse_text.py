"""Parse columns of database text into canonical Arrow columns, compiled and without the GIL.

Every parser takes a utf8 array and returns `(array, bad)`: null stays null, a text that is not
a value of the type becomes null and sets its place in `bad` (bool[n]). Nothing is ever guessed.
"""

import re

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transforms.memory import copy, load_u8, load_u16, load_u64, store_u8

_INT64_MAX = 2**63 - 1
_EXPONENT_MAX = 400  # Covers float8; a larger one would write kilobytes of zeros.
_EXPONENT_ROOM = 2 * _EXPONENT_MAX + 4
_DAY_US = 86_400_000_000
# Years 1 .. 9999 in UTC: what every client of a consult store can represent.
_DAY_MIN, _DAY_MAX = -719_162, 2_932_896
_ZONE_MAX_S = 16 * 3600  # PostgreSQL's own limit is 15:59:59.
NO_ZONE = 2**31  # Zone of texts without one is not known: such a text is bad.

_ZONE = re.compile(r"([+-])(\d\d):([0-5]\d)")

# "0000-00-" and "00:00:00" as little-endian words, and what each byte lacks to 0x7f.
_DATE_TEMPLATE = np.uint64(int.from_bytes(b"0000-00-", "little"))
_TIME_TEMPLATE = np.uint64(int.from_bytes(b"00:00:00", "little"))
_DATE_ROOM = np.uint64(0x7F76_767F_7676_7676)
_TIME_ROOM = np.uint64(0x7676_7F76_767F_7676)
_TOP_BITS = np.uint64(0x8080_8080_8080_8080)

_jit = numba.njit(nogil=True, cache=True)


def parse_zone(text: str) -> int:
    """Returns the seconds east of UTC of `+HH:MM` or `-HH:MM`.

    Raises:
      ValueError: `text` is not of that form, or beyond 15:59.
    """
    match = _ZONE.fullmatch(text)
    if match is None or int(match[2]) > 15:
        raise ValueError("a zone is written +HH:MM, e.g. +08:00")
    seconds = int(match[2]) * 3600 + int(match[3]) * 60
    return -seconds if match[1] == "-" else seconds


def parse_int(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Parses `[+-]digits` to int64; beyond 64 bits is bad."""
    values = np.empty(len(array), np.int64)
    return _parsed(array, _int_kernel, values, pa.int64())


def parse_bool(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Parses `t`, `true`, `1` and `f`, `false`, `0`."""
    values = np.empty(len(array), np.uint8)
    array, bad = _parsed(array, _bool_kernel, values, pa.uint8())
    return array.cast(pa.bool_()), bad


def parse_date(array: pa.Array, formats: tuple[str, ...] = ()) -> tuple[pa.Array, np.ndarray]:
    """Parses `YYYY-MM-DD`, or else the first of `formats` that fits, to date32.

    Years 1 .. 9999; `infinity` and BC are bad. A format may have a time, which is dropped.
    """
    values = np.empty(len(array), np.int32)
    if not formats:
        return _parsed(array, _date_kernel, values, pa.date32())
    times, bad = parse_time(array, formats, 0)
    days = np.frombuffer(times.buffers()[1], np.int64)[: len(array)] // _DAY_US
    return _array(pa.date32(), days.astype(np.int32), ~_is_null(times)), bad


def parse_time(
    array: pa.Array, formats: tuple[str, ...] = (), zone: int = NO_ZONE
) -> tuple[pa.Array, np.ndarray]:
    """Parses instants to timestamp[us, UTC].

    Without `formats`, ISO as PostgreSQL prints it: `2026-11-23 16:00:29.123456+05:30`, with `T`
    for the blank, `Z` or no zone too. With formats, the first of them that fits the whole text:
    `%Y` four digits, `%m %d %H %M %S` one or two, `%f` an optional fraction with its point, `%z`
    an optional zone. A text without a zone is `zone` seconds east of UTC. Fractions beyond
    microseconds, years outside 1 .. 9999 (in UTC), `infinity` and BC are bad.
    """
    values = np.empty(len(array), np.int64)
    bad = np.empty(len(array), np.bool_)
    offsets, data, valid = text_buffers(array)
    if not formats:
        _iso_kernel(offsets, data, valid, zone, values, bad)
    for i, code in enumerate(formats):
        program = np.frombuffer(code.encode() + b"\0", np.uint8)
        _format_kernel(offsets, data, valid, zone, program, i > 0, values, bad)
    return _array(pa.timestamp("us", tz="UTC"), values, _good(array, valid, bad)), bad


def parse_decimal(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Rewrites decimals as canonical text (see `schemas.tables.ARROW_TYPES`), exactly.

    `[+-]digits[.digits][e[+-]digits]`; NaN, Infinity and exponents beyond +-400 are bad. Returns
    `array` itself where every text is canonical already.
    """
    offsets, data, valid = text_buffers(array)
    bad = np.empty(len(array), np.bool_)
    out_offsets = np.empty(len(array) + 1, np.int32)
    used = data[offsets[0] : offsets[-1]]
    out = np.empty(_decimal_room(used, len(array)), np.uint8)
    changed = _decimal_kernel(offsets, data, valid, out_offsets, out, bad)
    if not changed:
        return array, bad
    return _text_array(out_offsets, out, _good(array, valid, bad)), bad


def scale_decimal(array: pa.Array, mantissas: np.ndarray, scales: np.ndarray) -> pa.Array:
    """Multiplies canonical decimals by `mantissas[i] / 10**scales[i]`, exactly and canonically.

    Args:
      array: utf8, as `parse_decimal` returns it.
      mantissas: int64[n], positive. scales: int64[n], 0 .. 18. Rows of 1 and 0 are copied.
    """
    offsets, data, valid = text_buffers(array)
    used = data[offsets[0] : offsets[-1]]
    out = np.empty(len(used) + 24 * len(array), np.uint8)
    out_offsets = np.empty(len(array) + 1, np.int32)
    wide = np.zeros(len(array), np.bool_)
    _scale_kernel(offsets, data, valid, mantissas, scales, out_offsets, out, wide)
    scaled = _text_array(out_offsets, out, None if array.null_count == 0 else ~_is_null(array))
    rows = np.flatnonzero(wide)
    if not len(rows):
        return scaled
    texts = array.take(pa.array(rows)).to_pylist()
    products = [
        _scale_one(text, int(mantissas[row]), int(scales[row]))
        for text, row in zip(texts, rows, strict=True)
    ]
    return pc.replace_with_mask(scaled, pa.array(wide), pa.array(products, pa.utf8()))


def _scale_one(text: str, mantissa: int, scale: int) -> str:
    """The exact product in integers, for what does not fit 64 bits."""
    sign = "-" if text.startswith("-") else ""
    whole, _, fraction = text.removeprefix("-").partition(".")
    places = len(fraction) + scale
    digits = str(int(whole + fraction) * mantissa).rjust(places + 1, "0")
    whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :].rstrip("0")
    text = whole + ("." + fraction if fraction else "")
    return text if text == "0" else sign + text


def text_buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `(offsets int32[n+1], data uint8[], valid bool[n])`, read-only views of a utf8 array.

    `valid` is empty where nothing is null. `data[offsets[i]:offsets[i+1]]` is row i.
    """
    _, offsets, data = array.buffers()
    offsets = (
        np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        if len(array)
        else np.zeros(1, np.int32)
    )
    data = np.frombuffer(data or b"", np.uint8)
    valid = ~_is_null(array) if array.null_count else np.empty(0, np.bool_)
    for part in (offsets, data, valid):
        part.flags.writeable = False  # One compiled signature, whoever owns the memory.
    return offsets, data, valid


def _is_null(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def _good(array: pa.Array, valid: np.ndarray, bad: np.ndarray) -> np.ndarray | None:
    """bool[n] of what has a value, or None where everything has."""
    if len(valid):
        return valid & ~bad
    return ~bad if bad.any() else None


def _parsed(array, kernel, values, kind):
    offsets, data, valid = text_buffers(array)
    bad = np.empty(len(array), np.bool_)
    kernel(offsets, data, valid, values, bad)
    return _array(kind, values, _good(array, valid, bad)), bad


def _bitmap(good: np.ndarray | None) -> pa.Buffer | None:
    return None if good is None else pa.py_buffer(np.packbits(good, bitorder="little"))


def _array(kind: pa.DataType, values: np.ndarray, good: np.ndarray | None) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [_bitmap(good), pa.py_buffer(values)])


def _text_array(offsets: np.ndarray, data: np.ndarray, good: np.ndarray | None) -> pa.Array:
    buffers = [_bitmap(good), pa.py_buffer(offsets), pa.py_buffer(data[: offsets[-1]])]
    return pa.Array.from_buffers(pa.utf8(), len(offsets) - 1, buffers)


@_jit
def _int_kernel(offsets, data, valid, values, bad):
    for i in range(len(values)):
        values[i] = 0
        bad[i] = False
        if len(valid) and not valid[i]:
            continue
        p, end = offsets[i], offsets[i + 1]
        negative = p < end and data[p] == 45
        if p < end and (data[p] == 45 or data[p] == 43):
            p += 1
        bad[i] = p == end
        total = np.int64(0)  # Grown downwards: -2^63 has no positive twin.
        while p < end:
            digit = np.int64(data[p]) - 48
            if (
                digit < 0
                or digit > 9
                or total
                < (-_INT64_MAX - 1 + digit) // 10 + (1 if (-_INT64_MAX - 1 + digit) % 10 else 0)
            ):
                bad[i] = True
                break
            total = total * 10 - digit
            p += 1
        if not negative and total == -_INT64_MAX - 1:
            bad[i] = True
        if not bad[i]:
            values[i] = total if negative else -total


@_jit
def _bool_kernel(offsets, data, valid, values, bad):
    true, false = b"true", b"false"
    for i in range(len(values)):
        values[i] = 0
        bad[i] = False
        if len(valid) and not valid[i]:
            continue
        p, size = offsets[i], offsets[i + 1] - offsets[i]
        first = data[p] if size else 0
        if size == 1 and (first == 116 or first == 49):
            values[i] = 1
        elif size == 1 and (first == 102 or first == 48):
            values[i] = 0
        elif size == 4 or size == 5:
            word = true if size == 4 else false
            for k in range(size):
                bad[i] |= data[p + k] != word[k]
            values[i] = size == 4
        else:
            bad[i] = True


@_jit
def _digits(data, p, end, count_max):
    """Reads up to `count_max` digits at p; returns (value, digits read)."""
    value, n = np.int64(0), 0
    while n < count_max and p + n < end:
        digit = np.int64(data[p + n]) - 48
        if digit < 0 or digit > 9:
            break
        value = value * 10 + digit
        n += 1
    return value, n


@_jit
def _day_number(year, month, day):
    """Days since 1970-01-01 (Gregorian), or `_DAY_MAX + 1` if there is no such day."""
    if year < 1 or month < 1 or month > 12 or day < 1:
        return np.int64(_DAY_MAX + 1)
    if day > 28:
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        last = 31 if month != 2 else (29 if leap else 28)
        if month == 4 or month == 6 or month == 9 or month == 11:
            last = 30
        if day > last:
            return np.int64(_DAY_MAX + 1)
    # The year begins in March here, so that the leap day is its last.
    y = year - 1 if month <= 2 else year
    era = y // 400
    of_era = y - era * 400
    of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


@_jit
def _date_kernel(offsets, data, valid, values, bad):
    for i in range(len(values)):
        values[i] = 0
        bad[i] = False
        if len(valid) and not valid[i]:
            continue
        p, end = offsets[i], offsets[i + 1]
        bad[i] = True
        if end - p != 10 or data[p + 4] != 45 or data[p + 7] != 45:
            continue
        year, a = _digits(data, p, end, 4)
        month, b = _digits(data, p + 5, end, 2)
        day, c = _digits(data, p + 8, end, 2)
        number = _day_number(year, month, day)
        if a == 4 and b == 2 and c == 2 and number <= _DAY_MAX:
            values[i] = number
            bad[i] = False


@_jit
def _zone_at(data, p, end):
    """Reads `Z`, `+HH`, `+HHMM`, `+HH:MM` or `+HH:MM:SS` at p; returns (seconds, end or -1)."""
    if p < end and data[p] == 90:
        return np.int64(0), p + 1
    negative = data[p] == 45
    if not negative and data[p] != 43:
        return np.int64(0), -1
    hours, n = _digits(data, p + 1, end, 2)
    if n != 2:
        return np.int64(0), -1
    p += 3
    total, unit = hours * 3600, 60
    while p < end and unit and (data[p] == 58 or (data[p] >= 48 and data[p] <= 57)):
        p += 1 if data[p] == 58 else 0
        part, n = _digits(data, p, end, 2)
        if n != 2 or part > 59:
            return np.int64(0), -1
        total += part * unit
        unit = 1 if unit == 60 else 0
        p += 2
    if total >= _ZONE_MAX_S:
        return np.int64(0), -1
    return (-total if negative else total), p


@_jit
def _fraction_at(data, p, end):
    """Reads `.d` to `.dddddd`, if a point is at p; returns (microseconds, end or -1)."""
    if p >= end or data[p] != 46:
        return np.int64(0), p
    value, n = _digits(data, p + 1, end, 6)
    for _ in range(6 - n):
        value *= 10
    return value, (-1 if n == 0 else p + 1 + n)


@_jit
def _iso_head(at):
    """Checks and reads `YYYY-MM-DD hh:mm:ss` at the address; returns (date, time) packed, or 0.

    The digits stay one a byte: `date` has year and month in 8 bytes as written, the day is the
    last 2 bytes of them; `time` is seconds of the day. Eight bytes are checked at once: xor
    with a template leaves 0 .. 9 in a digit's place and 0 in a separator's, and adding what is
    missing to 0x7f sets the top bit of every byte that is anything else.
    """
    date = load_u64(at) ^ _DATE_TEMPLATE
    time = load_u64(at + 11) ^ _TIME_TEMPLATE
    day = load_u16(at + 8) ^ np.uint16(0x3030)
    wrong = (date | (date + _DATE_ROOM) | time | (time + _TIME_ROOM)) & _TOP_BITS
    wrong |= np.uint64((day | (day + np.uint16(0x7676))) & np.uint16(0x8080))
    blank = load_u8(at + 10)
    if wrong or (blank != 32 and blank != 84):
        return np.uint64(0), np.uint16(0), np.int64(-1)
    hour = _two(time, 0)
    minute = _two(time, 24)
    second = _two(time, 48)
    if hour > 23 or minute > 59 or second > 59:
        return np.uint64(0), np.uint16(0), np.int64(-1)
    return date, day, hour * 3600 + minute * 60 + second


@_jit
def _two(digits, shift):
    """The number of two digits, one a byte, from bit `shift` on."""
    tens = np.int64((digits >> np.uint64(shift)) & np.uint64(15))
    return tens * 10 + np.int64((digits >> np.uint64(shift + 8)) & np.uint64(15))


@_jit
def _iso_kernel(offsets, data, valid, zone, values, bad):
    base = np.int64(data.ctypes.data)
    date_before, day_before, days = np.uint64(0), np.uint16(0), np.int64(_DAY_MAX + 1)
    for i in range(len(values)):
        values[i] = 0
        bad[i] = False
        if len(valid) and not valid[i]:
            continue
        bad[i] = True
        p, end = np.int64(offsets[i]), np.int64(offsets[i + 1])
        if end - p < 19:
            continue
        date, day, second = _iso_head(base + p)
        if second == -1:
            continue
        if date != date_before or day != day_before:  # Neighbours mostly share their day.
            year = _two(date, 0) * 100 + _two(date, 16)
            days = _day_number(year, _two(date, 40), _two(np.uint64(day), 0))
            date_before, day_before = date, day
        p += 19
        fraction, east = np.int64(0), zone
        if p < end:
            fraction, p = _fraction_at(data, p, end)
            if p != -1 and p < end:
                east, p = _zone_at(data, p, end)
        value, ok = _instant(days, second, fraction, east, p == end)
        if ok:
            values[i] = value
            bad[i] = False


@_jit
def _instant(days, second, fraction, zone, ok):
    """Returns (microseconds since 1970 UTC, ok) of a day, a second of it and an offset."""
    if not ok or days > _DAY_MAX or zone == NO_ZONE:
        return np.int64(0), False
    value = days * _DAY_US + (second - zone) * 1_000_000 + fraction
    return value, value >= _DAY_MIN * _DAY_US and value < (_DAY_MAX + 1) * _DAY_US


@_jit
def _format_at(data, p, end, zone, program):
    """Reads a whole time by `program`, a format that ends in NUL; returns (microseconds, ok)."""
    year, month, day = np.int64(0), np.int64(1), np.int64(1)
    hour, minute, second, fraction = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    at, n = 0, 1
    while program[at] != 0 and n > 0 and p != -1:
        code = program[at + 1] if program[at] == 37 else 0
        if code == 102:  # %f
            fraction, p = _fraction_at(data, p, end)
        elif code == 122:  # %z
            if p < end:
                zone, p = _zone_at(data, p, end)
        elif code == 0 or code == 37:
            n = 1 if p < end and data[p] == program[at] else 0
            p += 1
        else:
            value, n = _digits(data, p, end, 4 if code == 89 else 2)
            n = n if code != 89 or n == 4 else 0
            p += n
            if code == 89:
                year = value
            elif code == 109:
                month = value
            elif code == 100:
                day = value
            elif code == 72:
                hour = value
            elif code == 77:
                minute = value
            else:
                second = value
        at += 2 if code else 1
    ok = n > 0 and p == end and hour < 24 and minute < 60 and second < 60
    days = _day_number(year, month, day)
    return _instant(days, hour * 3600 + minute * 60 + second, fraction, zone, ok)


@_jit
def _format_kernel(offsets, data, valid, zone, program, only_bad, values, bad):
    for i in range(len(values)):
        if only_bad and not bad[i]:
            continue
        values[i] = 0
        bad[i] = False
        if len(valid) and not valid[i]:
            continue
        value, ok = _format_at(data, offsets[i], offsets[i + 1], zone, program)
        if ok:
            values[i] = value
        else:
            bad[i] = True


@_jit
def _decimal_room(data, n):
    """Bytes that canonical texts can need at most: a zero before a point, exponents in full."""
    exponents = 0
    for byte in data:
        exponents += byte == 101 or byte == 69
    return len(data) + n + exponents * _EXPONENT_ROOM


@_jit
def _is_digit(at):
    byte = load_u8(at)
    return byte >= 48 and byte <= 57


@_jit
def _put(out, start, end):
    """Copies the few bytes of [start, end) to `out`; returns its end."""
    for k in range(end - start):
        store_u8(out + k, load_u8(start + k))
    return out + end - start


@_jit
def _decimal_at(p, end, out):
    """Writes the decimal in [p, end) canonically at `out`; returns its end, or -1 if it is bad."""
    negative = p < end and load_u8(p) == 45
    if p < end and (negative or load_u8(p) == 43):
        p += 1
    whole = p
    while p < end and _is_digit(p):
        p += 1
    whole_end, fraction, fraction_end = p, p, p
    if p < end and load_u8(p) == 46:
        p += 1
        fraction = p
        while p < end and _is_digit(p):
            p += 1
        fraction_end = p
    if whole_end == whole and fraction_end == fraction:
        return np.int64(-1)
    exponent = np.int64(0)
    if p < end:
        exponent = _exponent_at(p, end)
        if exponent > _EXPONENT_MAX:
            return np.int64(-1)
    while whole < whole_end and load_u8(whole) == 48:
        whole += 1
    while fraction_end > fraction and load_u8(fraction_end - 1) == 48:
        fraction_end -= 1
    if whole == whole_end and fraction == fraction_end:
        store_u8(out, np.uint8(48))
        return out + 1
    if negative:
        store_u8(out, np.uint8(45))
        out += 1
    if exponent:
        return _put_shifted(out, whole, whole_end, fraction, fraction_end, exponent)
    if whole == whole_end:
        store_u8(out, np.uint8(48))
        out += 1
    out = _put(out, whole, whole_end)
    if fraction < fraction_end:
        store_u8(out, np.uint8(46))
        out = _put(out + 1, fraction, fraction_end)
    return out


@_jit
def _exponent_at(p, end):
    """Reads `e-12`, which must end at `end`; returns it, or `_EXPONENT_MAX + 1` if it is bad."""
    byte = load_u8(p)
    if byte != 101 and byte != 69:
        return np.int64(_EXPONENT_MAX + 1)
    p += 1
    down = p < end and load_u8(p) == 45
    if p < end and (down or load_u8(p) == 43):
        p += 1
    if p == end:
        return np.int64(_EXPONENT_MAX + 1)
    exponent = np.int64(0)
    while p < end:
        if not _is_digit(p) or exponent > _EXPONENT_MAX:
            return np.int64(_EXPONENT_MAX + 1)
        exponent = exponent * 10 + np.int64(load_u8(p)) - 48
        p += 1
    return exponent if exponent > _EXPONENT_MAX or not down else -exponent


@_jit
def _put_shifted(out, whole, whole_end, fraction, fraction_end, exponent):
    """Writes digits, not all of them zero, with the point moved by `exponent`."""
    size = whole_end - whole  # Digits, leading zeros gone, before the point as it was.
    n = size + fraction_end - fraction
    point = size + exponent
    first, last = np.int64(-1), np.int64(0)
    for k in range(n):
        if load_u8(whole + k if k < size else fraction + k - size) != 48:
            first = k if first == -1 else first
            last = k
    for k in range(min(first, point - 1), max(last + 1, point)):
        if k == point:
            store_u8(out, np.uint8(46))
            out += 1
        digit = np.uint8(48)
        if k >= 0 and k < n:
            digit = load_u8(whole + k if k < size else fraction + k - size)
        store_u8(out, digit)
        out += 1
    return out


@_jit
def _decimal_kernel(offsets, data, valid, out_offsets, out, bad):
    base, start = np.int64(data.ctypes.data), np.int64(out.ctypes.data)
    o, changed = start, False
    out_offsets[0] = 0
    for i in range(len(bad)):
        bad[i] = False
        if not len(valid) or valid[i]:
            p, end = base + offsets[i], base + offsets[i + 1]
            stop = _decimal_at(p, end, o)
            if stop == -1:
                bad[i] = True
                changed = True
            else:
                changed |= stop - o != end - p
                if not changed:
                    for k in range(end - p):
                        changed |= load_u8(o + k) != load_u8(p + k)
                o = stop
        out_offsets[i + 1] = o - start
    return changed


@_jit
def _scale_kernel(offsets, data, valid, mantissas, scales, out_offsets, out, wide):
    o = 0
    out_offsets[0] = 0
    digits = np.empty(40, np.uint8)
    for i in range(len(wide)):
        p, end = offsets[i], offsets[i + 1]
        if len(valid) and not valid[i]:
            pass
        elif mantissas[i] == 1 and scales[i] == 0:
            copy(np.int64(out.ctypes.data) + o, np.int64(data.ctypes.data) + p, np.int64(end - p))
            o += end - p
        else:
            negative = data[p] == 45
            p += 1 if negative else 0
            value, places = np.int64(0), scales[i]
            limit = (_INT64_MAX // mantissas[i] - 9) // 10
            seen_point = False
            while p < end and value <= limit:
                if data[p] == 46:
                    seen_point = True
                else:
                    value = value * 10 + (np.int64(data[p]) - 48)
                    places += 1 if seen_point else 0
                p += 1
            if p < end or places > 30:
                wide[i] = True
            else:
                o = _write_scaled(value * mantissas[i], places, negative, digits, out, o)
        out_offsets[i + 1] = o


@_jit
def _write_scaled(value, places, negative, digits, out, o):
    """Writes `value / 10**places` canonically at out[o]; returns its end. `digits` is scratch."""
    while places > 0 and value % 10 == 0:
        value //= 10
        places -= 1
    if value == 0:
        places = 0
        negative = False
    n = 0
    while value or n <= places:
        digits[n] = 48 + value % 10
        value //= 10
        n += 1
    if negative:
        out[o] = 45
        o += 1
    for k in range(n - 1, -1, -1):
        out[o] = digits[k]
        o += 1
        if k == places and places:
            out[o] = 46
            o += 1
    return o
