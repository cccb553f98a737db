"""Undo MariaDB's `log_bin_compress`: an event as it was before it was compressed."""

import struct
import zlib

from transforms.capture.mariadb.events import HEADER, QUERY, QUERY_COMPRESSED

# Compressed kinds of row events, and what they are otherwise.
_PLAIN = {166: 23, 167: 24, 168: 25, 169: 30, 170: 31, 171: 32, QUERY_COMPRESSED: QUERY}
_UPDATES = (24, 31)


def inflate(packet: bytes, checksum: bool) -> bytes:
    """Returns the packet of the plain event, with a checksum of its own.

    Raises:
      ValueError, IndexError: it is damaged.
    """
    kind = _PLAIN[packet[5]]
    body = packet[HEADER : len(packet) - 4 * checksum]
    head = _query_head(body) if kind == QUERY else _rows_head(body, kind)
    try:
        content = zlib.decompress(body[head + 1 + (body[head] & 7) :])
    except zlib.error as error:
        raise ValueError("damaged compression") from error
    plain = bytearray(packet[:HEADER] + body[:head] + content)
    plain[5] = kind
    struct.pack_into("<I", plain, 10, len(plain) - 1 + 4 * checksum)
    if checksum:
        plain += struct.pack("<I", zlib.crc32(plain[1:]))
    return bytes(plain)


def _query_head(body: bytes) -> int:
    return 13 + struct.unpack_from("<H", body, 11)[0] + body[8] + 1


def _rows_head(body: bytes, kind: int) -> int:
    """Returns where the rows begin: behind the masks of the columns."""
    at = 8
    if kind >= 30:
        at += struct.unpack_from("<H", body, 8)[0]
    width = body[at]
    at += 1
    if width == 0xFC:
        (width,) = struct.unpack_from("<H", body, at)
        at += 2
    return at + (width + 7) // 8 * (2 if kind in _UPDATES else 1)
