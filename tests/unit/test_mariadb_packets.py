"""Packets from a socket: whole ones only, however the bytes come, and long ones joined."""

import socket

import hypothesis
import pytest
from hypothesis import strategies as st

from transforms.capture.mariadb.packets import PacketReader

LONGEST = (1 << 24) - 1


def framed(content: bytes) -> bytes:
    """A packet, or as many as it takes."""
    parts, number = [], 0
    while True:
        part, content = content[:LONGEST], content[LONGEST:]
        parts.append(len(part).to_bytes(3, "little") + bytes([number & 255]) + part)
        number += 1
        if len(part) < LONGEST:
            return b"".join(parts)


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def received(reader: PacketReader, max_bytes: int = 1 << 30) -> list[bytes]:
    packets = reader.read(max_bytes).packets
    return [
        packets.data[start:end].tobytes()
        for start, end in zip(packets.starts, packets.ends, strict=True)
    ]


@hypothesis.given(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 400), min_size=1))
def test_whole_packets_however_they_come(contents, sizes):
    stream, found, turn = b"".join(map(framed, contents)), [], 0
    near, far = socket.socketpair()
    with near, far:
        reader = PacketReader(near)
        while stream:
            size = sizes[turn % len(sizes)]
            far.sendall(stream[:size])
            stream, turn = stream[size:], turn + 1
            found += received(reader)
    assert found == contents


@pytest.mark.parametrize("size", [LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST, 40_000_000])
def test_long_packets_are_joined(pair, size):
    near, far = pair
    content = bytes(range(256)) * (size // 256 + 1)
    contents = [b"before", content[:size], b"after"]
    stream = memoryview(b"".join(map(framed, contents)))
    far.setblocking(False)
    reader, found = PacketReader(near), []
    while len(found) < 3:
        if stream:
            stream = stream[far.send(stream[: 1 << 16]) :]
        found += received(reader)
    assert found == contents


def test_a_read_ends_at_about_its_limit(pair):
    near, far = pair
    far.sendall(framed(b"x" * 100) * 50)
    reader = PacketReader(near)
    first = reader.read(1)
    assert len(first.packets) >= 1
    assert received(reader) or len(first.packets) == 50


def test_an_end_is_told_after_what_came_before_it(pair):
    near, far = pair
    reader = PacketReader(near)
    assert not reader.wait(0)
    far.sendall(framed(b"last") + b"\5\0\0")
    far.close()
    assert reader.wait(1)
    got = reader.read(1 << 20)
    assert got.ended
    assert len(got.packets) == 1
    assert reader.read(1 << 20).ended
