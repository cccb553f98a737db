"""Write binlog events byte by byte, as MariaDB does, and lay them out as packets of a dump."""

import dataclasses
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from transforms.capture.mariadb.packets import Packets

SERVER_ID, DOMAIN = 7, 0
GBK, UTF8MB4, BINARY = 28, 45, 63
CHARSETS = {GBK: "gbk", UTF8MB4: "utf8mb4", BINARY: "binary", 8: "latin1", 35: "ucs2"}
ABSENT = object()  # A column that an image does not have.


@dataclasses.dataclass(frozen=True)
class Col:
    """A column: name, type, its metadata, for text its collation, and a choice's labels."""

    name: str
    type: int = 3
    meta: bytes = b""
    unsigned: bool = False
    collation: int = 0
    labels: tuple[str, ...] = ()


def integer(name: str) -> Col:
    return Col(name, 3)


def text(name: str, collation: int = GBK, size: int = 40) -> Col:
    return Col(name, 15, struct.pack("<H", size), collation=collation)


def lenenc(number: int) -> bytes:
    return bytes([number]) if number < 251 else b"\xfc" + struct.pack("<H", number)


def field(content: bytes) -> bytes:
    return lenenc(len(content)) + content


def bits(flags: Sequence[bool]) -> bytes:
    """A mask, least bit first."""
    mask = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        mask[i // 8] |= flag << i % 8
    return bytes(mask)


def table_map(table_id: int, name: str, columns: Sequence[Col], names: bool = True) -> bytes:
    """Body of a TABLE_MAP event with full metadata; the first column is the primary key."""
    database, table = name.encode().split(b".")
    body = struct.pack("<IHH", table_id, 0, 1)
    body += field(database) + b"\0" + field(table) + b"\0"
    body += lenenc(len(columns)) + bytes(column.type for column in columns)
    body += field(b"".join(column.meta for column in columns)) + bits([True] * len(columns))
    numbers = [column for column in columns if column.type in (1, 2, 3, 4, 5, 8, 9, 13, 246)]
    signs = [column.unsigned for column in numbers]
    if signs:
        mask = bytearray((len(signs) + 7) // 8)
        for i, sign in enumerate(signs):
            mask[i // 8] |= sign << 7 - i % 8  # Most significant bit first.
        body += b"\x01" + field(bytes(mask))
    texts = [lenenc(column.collation) for column in columns if column.collation]
    if texts:
        body += b"\x03" + field(b"".join(texts))
    for real, kind in ((0xF8, 5), (0xF7, 6)):
        choices = [c.labels for c in columns if c.type == 254 and c.meta[0] == real and c.labels]
        if choices:
            lists = [lenenc(len(c)) + b"".join(field(x.encode()) for x in c) for c in choices]
            body += bytes([kind]) + field(b"".join(lists))
    if names:
        body += b"\x04" + field(b"".join(field(column.name.encode()) for column in columns))
    return body + b"\x08" + field(b"\0")


def cell(column: Col, value) -> bytes:
    """A value of one of the types that `integer` and `text` make; bytes go as they are."""
    if column.type == 3:
        return struct.pack("<i", value)
    if not isinstance(value, bytes):
        value = value.encode("gb18030" if column.collation == GBK else "utf-8")
    width = 1 if struct.unpack("<H", column.meta)[0] < 256 else 2
    return len(value).to_bytes(width, "little") + value


def image(columns: Sequence[Col], row: Sequence) -> bytes:
    present = [(c, v) for c, v in zip(columns, row, strict=True) if v is not ABSENT]
    nulls = bits([value is None for _, value in present])
    return nulls + b"".join(cell(c, v) for c, v in present if v is not None)


def mask(row: Sequence) -> bytes:
    return bits([value is not ABSENT for value in row])


def rows_body(table_id: int, columns: Sequence[Col], images: Sequence[Sequence], pairs: bool):
    """Body of a rows event; for updates (`pairs`) images are old, new, old, new .."""
    body = struct.pack("<IHH", table_id, 0, 1) + lenenc(len(columns)) + mask(images[0])
    if pairs:
        body += mask(images[1])
    return body + b"".join(image(columns, row) for row in images)


class Log:
    """Writes one log file's packets and knows their places."""

    def __init__(self, file: int = 1, checksum: bool = True, offset: int = 256):
        self.file, self.checksum, self.offset = file, checksum, offset
        self.seconds, self.number = 1_000_000, 0
        self.packets: list[bytes] = []

    def event(self, kind: int, body: bytes, placed: bool = True, flags: int = 0) -> "Log":
        size = 19 + len(body) + 4 * self.checksum
        self.offset += size
        place = self.offset & 0xFFFFFFFF if placed else 0
        head = struct.pack("<IBIIIH", self.seconds, kind, SERVER_ID, size, place, flags)
        event = head + body
        if self.checksum:
            event += struct.pack("<I", zlib.crc32(event))
        self.packets.append(b"\0" + event)
        return self

    def rotate(self, file: int, offset: int = 4) -> "Log":
        """The made-up event by which a server names a file."""
        self.event(4, struct.pack("<Q", offset) + f"binlog.{file:06d}".encode(), False, 0x20)
        self.file, self.offset = file, offset
        return self

    def format(self, placed: bool = False) -> "Log":
        before = self.offset
        body = struct.pack("<H50sIB", 4, b"11.4.5-MariaDB-log", 0, 19) + bytes(100)
        checksum, self.checksum = self.checksum, True
        self.event(15, body + bytes([checksum]), placed)
        self.checksum = checksum
        if not placed:
            self.offset = before
        return self

    def gtid(self, flags: int = 0, xid: bytes = b"") -> "Log":
        self.number += 1
        body = struct.pack("<QIB", self.number, DOMAIN, flags) + (xid or bytes(6))
        return self.event(162, body)

    def table(self, table_id: int, name: str, columns: Sequence[Col], **more) -> "Log":
        return self.event(19, table_map(table_id, name, columns, **more), False)

    def insert(self, table_id: int, columns: Sequence[Col], *rows: Sequence) -> "Log":
        return self.event(23, rows_body(table_id, columns, rows, False), False)

    def update(self, table_id: int, columns: Sequence[Col], *rows: Sequence) -> "Log":
        return self.event(24, rows_body(table_id, columns, rows, True), False)

    def delete(self, table_id: int, columns: Sequence[Col], *rows: Sequence) -> "Log":
        return self.event(25, rows_body(table_id, columns, rows, False), False)

    def xid(self) -> "Log":
        return self.event(16, bytes(8))

    def query(self, statement: str, database: str = "his", placed: bool = True) -> "Log":
        status = b"\0" * 5 + b"\x04" + struct.pack("<HHH", UTF8MB4, UTF8MB4, UTF8MB4)
        head = struct.pack("<IIBHH", 1, 0, len(database), 0, len(status))
        body = head + status + database.encode() + b"\0" + statement.encode()
        return self.event(2, body, placed)

    def heartbeat(self) -> "Log":
        before = self.offset
        self.event(27, f"binlog.{self.file:06d}".encode(), False)
        self.offset = before
        return self


def packets_of(contents: Sequence[bytes]) -> Packets:
    """Lays out packets as a reader does, with their heads between them."""
    parts, starts, ends, at = [], [], [], 0
    for i, content in enumerate(contents):
        parts.append(len(content).to_bytes(3, "little") + bytes([i & 255]) + content)
        starts.append(at + 4)
        at += 4 + len(content)
        ends.append(at)
    data = np.frombuffer(b"".join(parts), np.uint8)
    return Packets(data, np.array(starts, np.int64), np.array(ends, np.int64))
