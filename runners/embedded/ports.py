"""Free TCP ports for servers that come and go."""

import collections.abc
import hashlib
import pathlib
import socket

from runners.embedded.binaries import ServerError

# Below the ports that the kernel gives to outgoing connections, which would now and then
# hold a stopped server's port just when it comes back.
_PORTS_FROM = 15_000
_PORT_RANGE = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(host: str, owner: bytes) -> collections.abc.Iterator[int]:
    """Yields TCP ports of `host` that are free just now, from a place of the owner's own.

    Only the server's own bind settles who has a port; two that start at once begin their
    search at different places.

    Raises:
      ServerError: none is left.
    """
    try:
        end = int(_PORT_RANGE.read_text().split()[0])
    except OSError:
        end = 32_768
    span = range(_PORTS_FROM, max(end, _PORTS_FROM + 10_000))
    first = int.from_bytes(hashlib.sha256(owner).digest()[:4], "big")
    for step in range(len(span)):
        port = span[(first + step) % len(span)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
        yield port
    raise ServerError(f"{host}: no port from {span[0]} to {span[-1]} is free. Remedy: close some.")
