"""Notice texts that were decoded with the wrong charset; never repair them.

What is found is counted and left as it is: a repair that guesses wrong changes a name.
"""

import enum
import functools

import numba
import numpy as np
import pyarrow as pa

from transforms import parse_text

_jit = numba.njit(nogil=True, cache=True)
_RUN_MIN = 4  # Characters of one western run: two Chinese ones.


class Damage(enum.IntFlag):
    """What a text shows.

    READ_AS_LATIN1: GBK bytes taken for western letters, `ÕÅÈý` for 张三.
    READ_AS_GBK: UTF-8 bytes taken for GBK, `寮犱笁` for 张三.
    QUESTION_MARKS: two or more `?` in a row: characters that a charset could not hold.
    REPLACED: U+FFFD: bytes that were no text.
    """

    READ_AS_LATIN1 = 1
    READ_AS_GBK = 2
    QUESTION_MARKS = 4
    REPLACED = 8


_WHATS = {
    Damage.READ_AS_LATIN1: "mojibake_latin1",
    Damage.READ_AS_GBK: "mojibake_gbk",
    Damage.QUESTION_MARKS: "question_marks",
    Damage.REPLACED: "replaced_characters",
}


@functools.cache
def gbk_codes() -> np.ndarray:
    """Two-byte GBK codes by code point (uint16[65536]), 0 where GBK has none."""
    codes = np.zeros(1 << 16, np.uint16)
    for lead in range(0x81, 0xFF):
        for trail in range(0x40, 0xFF):
            try:
                text = bytes((lead, trail)).decode("gbk")
            except UnicodeDecodeError:
                continue
            codes[ord(text)] = lead << 8 | trail
    codes.flags.writeable = False
    return codes


# What `survey` sees in bytes: damage is looked for only where a column has its signs.
NUL, _HIGH, _WESTERN, _QUESTION, _EF = 1, 2, 4, 8, 16
_ANY = _HIGH | _WESTERN | _QUESTION | _EF


@_jit
def survey(data):
    """Returns what uint8[] has, as bits: `NUL`, and signs that `damage_of` takes."""
    nul, high, question, western, ef = False, False, False, False, False
    for byte in data:  # A loop each: the compiler makes one of them sixteen times as fast.
        nul |= byte == 0
    for byte in data:
        question |= byte == 63
    for byte in data:
        high |= byte >= 128
    if high:
        for byte in data:
            western |= byte == 0xC2
        for byte in data:
            western |= byte == 0xC3
        for byte in data:
            ef |= byte == 0xEF
    return nul * 1 | high * 2 | western * 4 | question * 8 | ef * 16


def damage_of(array: pa.Array, signs: int = _ANY) -> np.ndarray:
    """Returns the `Damage` of every text (uint8[n]), 0 for a null and a sound one.

    Args:
      signs: what `survey` found in all of them; without, everything is looked for.
    """
    offsets, data, valid = parse_text.text_buffers(array)
    out = np.zeros(len(array), np.uint8)
    _damage_kernel(offsets, data, valid, gbk_codes(), signs, out)
    return out


def count_damage(array: pa.Array, signs: int = _ANY) -> dict[str, int]:
    """Returns texts by what is wrong with them, for notes; only what there is."""
    found = damage_of(array, signs)
    if not found.any():
        return {}
    counts = {what: int(np.count_nonzero(found & bit)) for bit, what in _WHATS.items()}
    return {what: count for what, count in counts.items() if count}


@_jit
def code_point(data, p):
    """Returns (code point, bytes) of valid UTF-8 at p."""
    first = np.int64(data[p])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[p + 1]) & 0x3F, 2
    if first < 0xF0:
        middle = (np.int64(data[p + 1]) & 0x3F) << 6
        return (first & 0x0F) << 12 | middle | np.int64(data[p + 2]) & 0x3F, 3
    high = (np.int64(data[p + 1]) & 0x3F) << 12 | (np.int64(data[p + 2]) & 0x3F) << 6
    return (first & 0x07) << 18 | high | np.int64(data[p + 3]) & 0x3F, 4


@_jit
def _is_western_run(data, p, end, count):
    """Whether `count` letters from p to end are pairs of the bytes of GB2312 characters."""
    if count < _RUN_MIN or count % 2:
        return False
    lead = True
    while p < end:
        byte, size = code_point(data, p)
        if byte < 0xA1 or byte > (0xF7 if lead else 0xFE):
            return False
        lead = not lead
        p += size
    return True


@_jit
def _latin1(data, start, end):
    """Whether a run of western letters is Chinese in GBK."""
    p, run, count = start, start, 0
    while p < end:
        byte = data[p]
        if byte == 0xC2 or byte == 0xC3:
            if count == 0:
                run = p
            count += 1
            p += 2
            continue
        if count and _is_western_run(data, run, p, count):
            return True
        count = 0
        p += 1
    return count > 0 and _is_western_run(data, run, end, count)


@_jit
def _next_state(need, done, breaks, byte):
    """Feeds one byte to a UTF-8 reader that goes on after a bad one.

    Returns (bytes still needed, Chinese characters read, breaks); `need` has 16 added while it
    is in a Chinese character, which is what counts.
    """
    if need & 15 and byte >= 0x80 and byte <= 0xBF:
        need -= 1
        return (0, done + 1, breaks) if need == 16 else (need, done, breaks)
    breaks += 1 if need & 15 or byte < 0xE2 or byte > 0xEF else 0
    if byte >= 0xE3 and byte <= 0xE9:
        return 16 + 2, done, breaks
    return (2 if byte >= 0xE2 and byte <= 0xEF else 0), done, breaks


@_jit
def _gbk(data, start, end, codes):
    """Whether a text's GBK bytes are UTF-8 of at least two Chinese characters, and little else.

    An odd last byte took its neighbour with it, or became a `?`, or nothing: such breaks are
    allowed, as long as there are more whole characters. Sound text is out after a few.
    """
    p, need, done, breaks = start, 0, 0, 0
    while p < end and data[p] < 0x80:
        p += 1
    if p < end:
        point, _ = code_point(data, p)
        lead = np.int64(codes[point]) >> 8 if point < 65536 else 0
        if lead < 0xE2 or lead > 0xEF:  # It begins with a whole character.
            return False
    while p < end and breaks <= done + 2:
        point, size = code_point(data, p)
        p += size
        code = np.int64(codes[point]) if point < 65536 else 0
        if code == 0:
            if point >= 0x80 and point != 0xFFFD:
                return False
            breaks += 1 if need & 15 else 0
            need = 0
            continue
        need, done, breaks = _next_state(need, done, breaks, code >> 8)
        if code & 255 < 0x80:  # It swallowed a western letter.
            need = 0
            continue
        need, done, breaks = _next_state(need, done, breaks, code & 255)
    return done >= 2 and done > breaks


@_jit
def _damage_kernel(offsets, data, valid, codes, signs, out):
    for i in range(len(out)):
        if len(valid) and not valid[i]:
            continue
        start, end = offsets[i], offsets[i + 1]
        if signs & _QUESTION:
            for p in range(start + 1, end):
                if data[p] == 63 and data[p - 1] == 63:
                    out[i] |= 4
        if signs & _EF:
            for p in range(start + 2, end):
                if data[p] == 0xBD and data[p - 1] == 0xBF and data[p - 2] == 0xEF:
                    out[i] |= 8
        if signs & _WESTERN and _latin1(data, start, end):
            out[i] |= 1
        if signs & _HIGH and _gbk(data, start, end, codes):
            out[i] |= 2
