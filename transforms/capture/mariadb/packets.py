"""Read MySQL protocol packets from a socket many at a time, with no Python work for each."""

import dataclasses
import select
import socket
import ssl

import numba
import numpy as np

_HEAD = 4  # Three bytes of length, one of sequence.
_LONGEST = 0xFFFFFF  # A packet of so many bytes goes on in the next.
_ROOM_MIN = 1 << 16
_READ_MAX = 1 << 20


@dataclasses.dataclass(frozen=True)
class Packets:
    """Whole packets: contents at `starts` to `ends` of `data`, which the next read may reuse."""

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)


@dataclasses.dataclass(frozen=True)
class Received:
    """Packets; whether nothing more could be read without waiting; whether the peer is gone."""

    packets: Packets
    drained: bool
    ended: bool


class PacketReader:
    """Reads from a connected socket that nobody else reads from."""

    def __init__(self, peer: socket.socket):
        self._socket = peer
        self._poll = select.poll()
        self._poll.register(peer, select.POLLIN)
        self._secure = isinstance(peer, ssl.SSLSocket)
        self._buffer = np.empty(_ROOM_MIN, np.uint8)
        self._used = self._taken = 0

    def wait(self, timeout_s: float) -> bool:
        """Returns whether something came within the time."""
        return self._pending() or bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def read(self, max_bytes: int) -> Received:
        """Returns what can be read without waiting, about `max_bytes` of it or all.

        Raises:
          OSError: the connection is lost.
        """
        self._forget()
        begin, ended = self._used, False
        while True:
            ready = self._pending() or bool(self._poll.poll(0))
            if not ready or self._used - begin >= max_bytes:
                break
            if len(self._buffer) - self._used < _ROOM_MIN // 2:
                self._grow()
            room = memoryview(self._buffer)[self._used : self._used + _READ_MAX]
            count = self._socket.recv_into(room)
            if not count:
                ended = True
                break
            self._used += count
        starts = np.empty((self._used // _HEAD) + 1, np.int64)
        ends = np.empty_like(starts)
        found, self._taken, self._used = _split(self._buffer, self._used, starts, ends)
        packets = Packets(self._buffer, starts[:found].copy(), ends[:found].copy())
        return Received(packets, not ready, ended)

    def _pending(self) -> bool:
        """Whether TLS holds bytes that the socket no longer shows."""
        return self._secure and self._socket.pending() > 0

    def _forget(self) -> None:
        left = self._used - self._taken
        if self._taken:
            self._buffer[:left] = self._buffer[self._taken : self._used].copy()
            self._taken, self._used = 0, left
        if len(self._buffer) > 16 * _READ_MAX and left < _ROOM_MIN:  # A huge packet went through.
            self._buffer = np.concatenate((self._buffer[:left], np.empty(_READ_MAX, np.uint8)))

    def _grow(self) -> None:
        grown = np.empty(2 * len(self._buffer), np.uint8)
        grown[: self._used] = self._buffer[: self._used]
        self._buffer = grown


@numba.njit(nogil=True, cache=True)
def _split(buffer, used, starts, ends):
    """Finds whole packets, joining the parts of long ones in place.

    Returns how many, where they end, and how many bytes are used after the joining.
    """
    at = count = 0
    while at + _HEAD <= used:
        after = at
        while True:  # Is all of it there?
            if after + _HEAD > used:
                return count, at, used
            size = np.int64(buffer[after]) | np.int64(buffer[after + 1]) << 8
            size |= np.int64(buffer[after + 2]) << 16
            after += _HEAD + size
            if after > used:
                return count, at, used
            if size < _LONGEST:
                break
        starts[count] = at + _HEAD
        size = np.int64(buffer[at]) | np.int64(buffer[at + 1]) << 8
        size |= np.int64(buffer[at + 2]) << 16
        end = at + _HEAD + size
        while end < after:  # The head of a further part stands here, and is taken out.
            for i in range(end + _HEAD, used):
                buffer[i - _HEAD] = buffer[i]
            used -= _HEAD
            after -= _HEAD
            end = min(end + _LONGEST, after)  # All parts but the last are of this length.
        ends[count] = end
        count += 1
        at = after
    return count, at, used
