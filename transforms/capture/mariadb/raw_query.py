"""Run a query and read its rows as packets, many at a time."""

import struct
from collections.abc import Iterator

import numpy as np
import pymysql
from pymysql.constants import COMMAND

from transforms.capture.mariadb.packets import PacketReader, Packets

_ERROR, _END = 0xFF, 0xFE
_END_SIZE_MAX = 8
_WAIT_S = 60.0


def raw_rows(
    connection: pymysql.Connection, reader: PacketReader, query: str, max_bytes: int
) -> Iterator[Packets]:
    """Yields the packets of a result's rows, about `max_bytes` at a time.

    Nothing else may use the connection before all of them are read. `reader` is of the
    connection's socket, and the only one.

    Raises:
      pymysql.OperationalError: the server refused the query, or fell silent.
      OSError: the connection is lost.
    """
    connection._execute_command(COMMAND.COM_QUERY, query)
    heads = -1  # Packets before the rows; known once the first has come.
    while True:
        received = reader.read(max_bytes)
        packets, first = received.packets, 0
        if received.ended or (not len(packets) and received.drained and not reader.wait(_WAIT_S)):
            raise pymysql.OperationalError(2013, "lost or silent")
        while heads and first < len(packets):
            content = packets.data[packets.starts[first] : packets.ends[first]]
            _check(content)
            heads = int(content[0]) + 1 if heads < 0 else heads - 1
            if content[0] == 0xFC and heads == 0xFC + 1:
                heads = int(content[1]) + 256 * int(content[2]) + 1
            first += 1
        if first == len(packets):
            continue
        last = packets.data[packets.starts[-1] : packets.ends[-1]]
        ended = len(last) <= _END_SIZE_MAX and last[0] == _END
        if not ended:
            _check(last)
        rows = slice(first, len(packets) - ended)
        if rows.stop > rows.start:
            yield Packets(packets.data, packets.starts[rows], packets.ends[rows])
        if ended:
            return


def _check(content: np.ndarray) -> None:
    if len(content) >= 3 and content[0] == _ERROR:
        (code,) = struct.unpack_from("<H", content.tobytes(), 1)
        raise pymysql.OperationalError(code, "refused")
