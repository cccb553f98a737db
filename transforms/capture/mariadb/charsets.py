"""Turn text of the source's character sets into UTF-8; what is no text is marked, never guessed."""

import dataclasses
import functools
from collections.abc import Iterable

import numba
import numpy as np

BINARY = "binary"
# How a column's text is written: as it is, by tables, by tables and GB18030's four byte forms,
# or by Python's codec, cell by cell.
COPIED, TABLED, GB18030, SLOW = range(4)
# Stands before the bytes of a cell that is no text: never valid UTF-8, so the row is refused.
MARK = b"\xff\xff"
_INVALID, _LEAD = 0, 0xFFFF  # In a table of code points; 0 is itself in place 0 only.
_FOUR_BYTE_BMP, _FOUR_BYTE_ASTRAL = 39_420, 189_000

# A server's set, and Python's codec that reads it. GB18030 reads all that GBK and GB2312 may hold,
# and what a client wrote past them.
_CODECS = {
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "gb18030": "gb18030",
    "big5": "big5",
    "sjis": "shift_jis",
    "cp932": "cp932",
    "euckr": "euc_kr",
    "latin1": "cp1252",
    "latin2": "iso8859_2",
    "latin5": "iso8859_9",
    "latin7": "iso8859_13",
    "greek": "iso8859_7",
    "hebrew": "iso8859_8",
    "cp850": "cp850",
    "cp852": "cp852",
    "cp866": "cp866",
    "cp1250": "cp1250",
    "cp1251": "cp1251",
    "cp1256": "cp1256",
    "cp1257": "cp1257",
    "koi8r": "koi8_r",
    "koi8u": "koi8_u",
    "macce": "mac_latin2",
    "macroman": "mac_roman",
    "hp8": "hp_roman8",
    "tis620": "tis_620",
}
_SLOW_CODECS = {
    "ucs2": "utf_16_be",
    "utf16": "utf_16_be",
    "utf16le": "utf_16_le",
    "utf32": "utf_32_be",
    "ujis": "euc_jp",
    "eucjpms": "euc_jp",
}
_UTF8 = ("utf8", "utf8mb3", "utf8mb4", "ascii")
_ASCII_ONLY = "ascii"  # Of a set that Python does not know, ASCII is read and the rest refused.


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a character set is read: a `mode` of the above and the codec where one is used."""

    mode: int
    codec: str = "utf_8"


def reading(charset: str) -> Reading:
    """Returns how the source's character set of this name is read; `binary` is no text."""
    if charset in _UTF8:
        return Reading(COPIED)
    if charset in _SLOW_CODECS:
        return Reading(SLOW, _SLOW_CODECS[charset])
    codec = _CODECS.get(charset, _ASCII_ONLY)
    return Reading(GB18030 if codec == "gb18030" else TABLED, codec)


@dataclasses.dataclass(frozen=True)
class Tables:
    """Code points by bytes, one line a codec: 0 where a byte or a pair says nothing.

    Attributes:
      single: uint16 (codecs, 256), 0xFFFF for the first of two bytes.
      double: uint16 (codecs, 65536), by first byte * 256 + second.
      four: uint16, GB18030's four byte forms below U+10000, in their order.
    """

    single: np.ndarray
    double: np.ndarray
    four: np.ndarray


def tables(codecs: Iterable[str]) -> Tables:
    """Returns the tables of codecs, in their order; none is still one line."""
    made = [_table(codec) for codec in codecs] or [_table(_ASCII_ONLY)]
    return Tables(
        np.stack([single for single, _ in made]),
        np.stack([double for _, double in made]),
        _four_byte_table(),
    )


@functools.cache
def _table(codec: str) -> tuple[np.ndarray, np.ndarray]:
    single, double = np.zeros(256, np.uint16), np.zeros(1 << 16, np.uint16)
    for first in range(256):
        single[first] = _code_point(bytes([first]), codec)
        if first < 128 or single[first]:
            continue
        pairs = [_code_point(bytes([first, second]), codec) for second in range(256)]
        if any(pairs):
            double[first << 8 : first + 1 << 8] = pairs
            single[first] = _LEAD
    if codec == "cp1252":  # The server maps what Windows leaves out to the control codes.
        for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D):
            single[byte] = byte
    return single, double


@functools.cache
def _four_byte_table() -> np.ndarray:
    return np.array([_code_point(_four_bytes(i), "gb18030") for i in range(_FOUR_BYTE_BMP)], "u2")


def _four_bytes(index: int) -> bytes:
    index, fourth = divmod(index, 10)
    index, third = divmod(index, 126)
    first, second = divmod(index, 10)
    return bytes([0x81 + first, 0x30 + second, 0x81 + third, 0x30 + fourth])


def _code_point(text: bytes, codec: str) -> int:
    try:
        decoded = text.decode(codec)
    except UnicodeDecodeError:
        return _INVALID
    fits = len(decoded) == 1 and ord(decoded) < _LEAD
    return ord(decoded) if fits else _INVALID


@functools.lru_cache(maxsize=1 << 16)
def decoded(text: bytes, codec: str) -> bytes:
    """Returns text of a slow codec as UTF-8, or marked and as it is."""
    try:
        return text.decode(codec).encode()
    except (UnicodeDecodeError, UnicodeEncodeError):
        return MARK + text


@numba.njit(nogil=True, cache=True)
def put_code_point(code, out, to):
    """Writes a code point as UTF-8; returns the place behind it."""
    if code < 0x80:
        out[to] = code
        return to + 1
    if code < 0x800:
        out[to], out[to + 1] = 0xC0 | code >> 6, 0x80 | code & 0x3F
        return to + 2
    if code < 0x10000:
        out[to], out[to + 1] = 0xE0 | code >> 12, 0x80 | code >> 6 & 0x3F
        out[to + 2] = 0x80 | code & 0x3F
        return to + 3
    out[to], out[to + 1] = 0xF0 | code >> 18, 0x80 | code >> 12 & 0x3F
    out[to + 2], out[to + 3] = 0x80 | code >> 6 & 0x3F, 0x80 | code & 0x3F
    return to + 4


@numba.njit(nogil=True, cache=True)
def put_marked(buffer, at, size, out, to):
    """Writes bytes that are no text, behind the mark that has their row refused."""
    out[to] = out[to + 1] = 0xFF
    for i in range(size):
        out[to + 2 + i] = buffer[at + i]
    return to + 2 + size


@numba.njit(nogil=True, cache=True)
def _four(buffer, at, end, four):
    """Returns the code point of GB18030's four bytes at `at`, or 0."""
    if at + 4 > end:
        return np.int64(0)
    second, third = np.int64(buffer[at + 1]) - 0x30, np.int64(buffer[at + 2]) - 0x81
    fourth = np.int64(buffer[at + 3]) - 0x30
    if second > 9 or third < 0 or third > 125 or fourth < 0 or fourth > 9:
        return np.int64(0)
    index = (((np.int64(buffer[at]) - 0x81) * 10 + second) * 126 + third) * 10 + fourth
    if index < _FOUR_BYTE_BMP:
        return np.int64(four[index])
    code = index - _FOUR_BYTE_ASTRAL + 0x10000
    return code if 0x10000 <= code <= 0x10FFFF else np.int64(0)


@numba.njit(nogil=True, cache=True)
def put_text(buffer, at, size, mode, single, double, four, out, to):
    """Writes text as UTF-8, or marked and as it is; returns the place behind it.

    Needs room for three bytes a byte, and two more.
    """
    if mode in (COPIED, SLOW):
        for i in range(size):
            out[to + i] = buffer[at + i]
        return to + size
    begin, end, i = to, at + size, at
    while i < end:
        byte = buffer[i]
        if byte < 0x80:
            out[to] = byte
            to, i = to + 1, i + 1
            continue
        code, step = np.int64(single[byte]), 1
        if code == _LEAD and i + 1 < end:
            following = np.int64(buffer[i + 1])
            if mode == GB18030 and 0x30 <= following <= 0x39:
                code, step = _four(buffer, i, end, four), 4
            else:
                code, step = np.int64(double[np.int64(byte) << 8 | following]), 2
        if code in (_INVALID, _LEAD):
            return put_marked(buffer, at, size, out, begin)
        to, i = put_code_point(code, out, to), i + step
    return to
