"""Write the rows of a query's result as text, in the words that the log's rows are written in."""

import numba
import numpy as np

from transforms.capture.columns import NULL
from transforms.capture.mariadb.cells import put_hex
from transforms.capture.mariadb.charsets import put_marked, put_text
from transforms.capture.mariadb.events import little

# What is done with a column of the result: written as it is, as text of a character set, in
# hexadecimal, as a time of UTC, marked to be refused, or read past.
PLAIN, CHARACTERS, BYTES, INSTANT, REFUSED, LEFT_OUT = range(6)
S_HOW, S_MODE, S_TABLE, S_TARGET = range(4)
_SPARE = 32
_ZERO, _PLUS = ord("0"), ord("+")


@numba.njit(nogil=True, cache=True)
def cell_bounds(buffer, at, end):
    """Returns where the next cell's content begins and how long it is; a length of -2 is damage."""
    if at >= end:
        return at, np.int64(-2)
    first = np.int64(buffer[at])
    at += 1
    if first == 0xFB:
        return at, np.int64(NULL)
    if first < 0xFB:
        size = first
    else:
        width = 2 if first == 0xFC else 3 if first == 0xFD else 8
        if at + width > end:
            return at, np.int64(-2)
        size = little(buffer, at, width)
        at += width
    return at, size if 0 <= size <= end - at else np.int64(-2)


@numba.njit(nogil=True, cache=True)
def _put(buffer, at, size, column, codecs, text, to):
    single, double, four = codecs
    how, table = column[S_HOW], column[S_TABLE]
    if how == CHARACTERS:
        return put_text(
            buffer, at, size, column[S_MODE], single[table], double[table], four, text, to
        )
    if how == BYTES:
        return put_hex(buffer, at, size, 0, text, to)
    if how == REFUSED:
        return put_marked(buffer, at, size, text, to)
    dated = False
    for i in range(size):
        text[to + i] = buffer[at + i]
        dated |= i < 4 and buffer[at + i] != _ZERO
    to += size
    if how == INSTANT and dated:  # The zero date is no instant.
        text[to], text[to + 1], text[to + 2] = _PLUS, _ZERO, _ZERO
        to += 3
    return to


@numba.njit(nogil=True, cache=True)
def write_result(buffer, starts, ends, first, columns, codecs, start, length, text, to):
    """Writes the cells of rows from `first` on.

    Returns which row was not written, -1 if none, and the place behind the text: `-2 - row` is
    a damaged row, `row` is one that needs more room.
    """
    for r in range(first, len(starts)):
        at, end = starts[r], ends[r]
        if to + 3 * (end - at) + _SPARE * len(columns) > len(text):
            return np.int64(r), to
        for c in range(len(columns)):
            at, size = cell_bounds(buffer, at, end)
            if size < NULL:
                return np.int64(-2 - r), to
            target = columns[c, S_TARGET]
            if size == NULL:
                if columns[c, S_HOW] != LEFT_OUT:
                    length[r, target] = NULL
                continue
            if columns[c, S_HOW] != LEFT_OUT:
                start[r, target] = to
                to = _put(buffer, at, size, columns[c], codecs, text, to)
                length[r, target] = to - start[r, target]
            at += size
        if at != end:
            return np.int64(-2 - r), to
    return np.int64(-1), to
