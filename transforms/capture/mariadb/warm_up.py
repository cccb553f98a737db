"""Compile the kernels of this package before a source or an emergency waits for them."""

import functools
import struct

import numpy as np

from schemas.batches import RawChanges
from schemas.positions import SEQ_END, Position
from transforms.capture.mariadb import charsets, result_rows
from transforms.capture.mariadb.decode import BinlogDecoder
from transforms.capture.mariadb.packets import Packets
from transforms.capture.mariadb.places import border

_GBK = 28
_TABLE_ID = 1
_PLACE = 256


@functools.cache
def warm_up() -> tuple[RawChanges, ...]:
    """Decodes one transaction that inserts, changes and deletes a row; returns what it gave.

    A machine that runs this software for the first time compiles for half a minute; later
    starts load what was compiled.
    """
    row = struct.pack("<Bi", 0, 1) + b"\4\xd5\xc5\xc8\xfd"
    head = struct.pack("<IHHB", _TABLE_ID, 0, 1, 2)
    events = [
        (162, struct.pack("<QIB6x", 1, 0, 0)),
        (19, struct.pack("<IHH", _TABLE_ID, 0, 1) + _TABLE),
        (23, head + b"\3" + row),
        (24, head + b"\3\3" + row + row),
        (25, head + b"\3" + row),
        (16, bytes(8)),
    ]
    start = Position(border(1, _PLACE), SEQ_END)
    decoder = BinlogDecoder(
        100, 1 << 16, start, "binlog", {_GBK: "gbk"}, {"none.none": ("id",)}, checksum=False
    )
    taken = decoder.feed(_packets([_event(kind, body) for kind, body in events]))
    _warm_result()
    return (*taken, *decoder.flush())


# INT and VARCHAR(20) CHARACTER SET gbk, with names; the first is the key.
_TABLE = b"\4none\0\4none\0\2\3\x0f\2\x14\0\2\1\1\0\2\1\x1c\4\5\2id\1v\x08\1\0"


def _event(kind: int, body: bytes) -> bytes:
    return b"\0" + struct.pack("<IBIIIH", 0, kind, 1, 19 + len(body), 0, 0) + body


def _packets(contents: list[bytes]) -> Packets:
    ends = np.cumsum([len(content) for content in contents], dtype=np.int64)
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    return Packets(np.frombuffer(b"".join(contents), np.uint8), starts, ends)


def _warm_result() -> None:
    """Writes one row of a query's result, as a snapshot does."""
    codecs = charsets.tables(["gb18030"])
    lines = np.array([(result_rows.CHARACTERS, charsets.GB18030, 0, 0)], np.int64)
    result_rows.write_result(
        np.array([1, 65, 0], np.uint8),
        np.zeros(1, np.int64),
        np.full(1, 2, np.int64),
        0,
        lines,
        (codecs.single, codecs.double, codecs.four),
        np.zeros((1, 1), np.int64),
        np.zeros((1, 1), np.int32),
        np.empty(256, np.uint8),
        0,
    )
