"""Room for the text of many cells, which grows and is used again."""

import numpy as np
import pyarrow as pa

from transforms.capture.columns import SLACK
from transforms.capture.mariadb.charsets import decoded

_ROOM_MIN = 1 << 16
_ROOM_KEPT = 64 << 20  # One huge batch shall not hold its room for good.


class TextArea:
    """Bytes `room[:used]`, with `SLACK` readable bytes behind them."""

    def __init__(self) -> None:
        self.room = np.empty(_ROOM_MIN, np.uint8)
        self.used = 0

    def clear(self) -> None:
        self.used = 0
        if len(self.room) > _ROOM_KEPT:
            self.room = np.empty(_ROOM_MIN, np.uint8)

    def grow(self, more: int = 0) -> None:
        """At least doubles the room."""
        grown = np.empty(2 * len(self.room) + more + SLACK, np.uint8)
        grown[: self.used] = self.room[: self.used]
        self.room = grown

    def append(self, content: np.ndarray) -> int:
        """Adds bytes and returns where they begin."""
        begin = self.used
        if begin + len(content) + SLACK > len(self.room):
            self.grow(len(content))
        self.room[begin : begin + len(content)] = content
        self.used += len(content)
        return begin

    def put(self, texts: pa.StringArray, start: np.ndarray, length: np.ndarray) -> None:
        """Sets the cells of a column that are there to these texts, one for every row."""
        offsets = np.frombuffer(texts.buffers()[1], np.int32)[: len(texts) + 1]
        data = texts.buffers()[2]
        content = np.frombuffer(data, np.uint8)[: offsets[-1]] if offsets[-1] else np.empty(0, "u1")
        begin = self.append(content)
        there = length >= 0
        start[there] = begin + offsets[:-1][there]
        length[there] = np.diff(offsets)[there]


def decode_slowly(area: TextArea, codec: str, start: np.ndarray, length: np.ndarray) -> None:
    """Turns a column's cells into UTF-8 one by one: for sets that few sources have."""
    for row in np.flatnonzero(length > 0):
        text = area.room[start[row] : start[row] + length[row]].tobytes()
        content = decoded(text, codec)
        start[row], length[row] = area.append(np.frombuffer(content, np.uint8)), len(content)
