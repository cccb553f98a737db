"""Keep the rows of distributed transactions from their preparation to their end."""

import struct


def xid_of_gtid(body: bytes) -> bytes:
    """Returns the name of the distributed transaction in a GTID event's body."""
    form, global_size, branch_size = struct.unpack_from("<IBB", body, 13)
    return (
        struct.pack("<III", form, global_size, branch_size) + body[19:][: global_size + branch_size]
    )


def xid_of_prepare(body: bytes) -> bytes:
    """Returns the name in an XA_PREPARE event's body, equal to `xid_of_gtid`'s."""
    _, global_size, branch_size = struct.unpack_from("<III", body, 1)
    return body[1 : 13 + global_size + branch_size]


class Prepared:
    """Packets of prepared transactions by name, as many bytes as are allowed.

    What exceeds them, or was prepared before the reader began, is not known: None.
    """

    def __init__(self, bytes_max: int):
        self._bytes_max = bytes_max
        self._known: dict[bytes, list[bytes] | None] = {}
        self._open: list[bytes] | None = None
        self.ending: bytes | None = None

    def open(self) -> None:
        self._open = []

    def add(self, packet: bytes) -> None:
        if self._open is None:
            return
        self._open.append(packet)
        waiting = [*(parts for parts in self._known.values() if parts), self._open]
        if sum(len(part) for parts in waiting for part in parts) > self._bytes_max:
            self._open = None

    def close(self, name: bytes) -> None:
        self._known[name], self._open = self._open, None

    def abandon(self) -> None:
        """Forgets what was being prepared."""
        self._open = None
        self.ending = None

    def take(self) -> list[bytes] | None:
        """Returns the packets of the transaction that ends, the first time; then none."""
        taken = self._known.pop(self.ending, None)
        if taken:
            self._known[self.ending] = []
        return taken

    def forget(self) -> None:
        """Drops what is left of the transaction that ends."""
        self._known.pop(self.ending, None)
        self.ending = None
