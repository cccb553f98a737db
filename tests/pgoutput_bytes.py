"""Write replication messages byte by byte, as PostgreSQL does (protocol version 1)."""

import struct

TOAST = object()  # A value that was not sent since it did not change.


def xlog(message: bytes, lsn: int = 0) -> bytes:
    """CopyData payload: "w", start and end in the log, time, then the message."""
    return b"w" + struct.pack("!QQq", lsn, lsn, 0) + message


def begin(lsn: int, us_since_2000: int = 0, xid: int = 1) -> bytes:
    return b"B" + struct.pack("!QqI", lsn, us_since_2000, xid)


def commit(lsn: int, us_since_2000: int = 0) -> bytes:
    return b"C" + struct.pack("!BQQq", 0, lsn, lsn + 8, us_since_2000)


def relation(
    oid: int, table: str, columns: list[str], key: set[str] | None = None, identity: str = "d"
) -> bytes:
    schema, name = table.split(".")
    key = {columns[0]} if key is None else key
    head = b"R" + struct.pack("!I", oid) + f"{schema}\0{name}\0{identity}".encode()
    parts = [
        struct.pack("!B", identity == "f" or column in key)
        + column.encode()
        + b"\0"
        + struct.pack("!Ii", 25, -1)
        for column in columns
    ]
    return head + struct.pack("!H", len(columns)) + b"".join(parts)


def values(row: list) -> bytes:
    """TupleData: None is a null, TOAST unchanged; bytes go as they are."""
    cells = []
    for value in row:
        if value is None:
            cells.append(b"n")
        elif value is TOAST:
            cells.append(b"u")
        else:
            text = value if isinstance(value, bytes) else value.encode()
            cells.append(b"t" + struct.pack("!I", len(text)) + text)
    return struct.pack("!H", len(row)) + b"".join(cells)


def insert(oid: int, row: list) -> bytes:
    return b"I" + struct.pack("!I", oid) + b"N" + values(row)


def update(oid: int, row: list, old: list | None = None, old_kind: str = "K") -> bytes:
    before = b"" if old is None else old_kind.encode() + values(old)
    return b"U" + struct.pack("!I", oid) + before + b"N" + values(row)


def delete(oid: int, old: list, old_kind: str = "K") -> bytes:
    return b"D" + struct.pack("!I", oid) + old_kind.encode() + values(old)


def truncate(*oids: int) -> bytes:
    return b"T" + struct.pack(f"!IB{len(oids)}I", len(oids), 0, *oids)
