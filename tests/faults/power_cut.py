"""A host that loses its power while somebody waits for its answer: nothing says that it is gone.

    unshare --net python -m tests.faults.power_cut FOLDER store|source

In a network of its own, so that `lo` can be taken down: what is sent then is lost. A server that
is killed meanwhile tells nobody, and is forgotten before the network is back.
"""

import contextlib
import fcntl
import pathlib
import socket
import struct
import sys
import time

import psycopg

from runners.embedded.postgres import PostgresServer
from tests.faults.harness import SOURCE_SETTINGS, VITAL, Link, Site, until

_IFREQ, _GET_FLAGS, _SET_FLAGS, _UP = struct.Struct("16sh14x"), 0x8913, 0x8914, 1
# As a fresh host's kernel: it does not go on to say goodbye for its dead predecessor.
_GOODBYES = pathlib.Path("/proc/sys/net/ipv4/tcp_orphan_retries")
_SENT_S = 1.0  # Who waits has nothing on its way that would be answered.
_FORGOTTEN_S = 5.0
_NOTICED_S = 60.0  # Half of it by keepalives; Linux's own take two hours.


def network(up: bool) -> None:
    """Takes this namespace's loopback up or down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        given = fcntl.ioctl(any_socket, _GET_FLAGS, _IFREQ.pack(b"lo", 0))
        flags = _IFREQ.unpack(given)[1]
        flags = flags | _UP if up else flags & ~_UP
        fcntl.ioctl(any_socket, _SET_FLAGS, _IFREQ.pack(b"lo", flags))


def lose_power(server: PostgresServer) -> None:
    """Ends a server without a word to anybody, and starts it again."""
    time.sleep(_SENT_S)
    network(up=False)
    server.kill()
    time.sleep(_FORGOTTEN_S)
    server.start()
    network(up=True)


def waits(connection: psycopg.Connection, table: str) -> bool:
    """Whether somebody waits for a table."""
    query = "SELECT FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
    return connection.execute(query, [table]).rowcount > 0


def store_gone(site: Site) -> None:
    """The store dies under a batch that it is just writing."""
    with site.hospital() as hospital, Link(site.settings()):
        until(lambda: site.snapshots() == [("first", "done")], 60, "the snapshot")
        with contextlib.suppress(psycopg.Error), site.store() as guard, guard.transaction():
            guard.execute("LOCK TABLE consult.vital_sign")
            hospital.execute(VITAL, [1, 100])
            with site.store() as other:
                until(lambda: waits(other, "consult.vital_sign"), 30, "a batch that waits")
            lose_power(site.store_servers["primary"])
        hospital.execute(VITAL, [101, 200])
        site.drain(_NOTICED_S)


def source_gone(site: Site) -> None:
    """The source dies under a snapshot that it is just reading out."""
    with site.hospital() as hospital:
        hospital.execute(VITAL, [1, 100])
    guard = site.administrator()
    guard.execute("BEGIN; LOCK TABLE his.vital_sign")
    with Link(site.settings()):
        with site.administrator() as other:
            until(lambda: waits(other, "his.vital_sign"), 60, "a snapshot that waits")
        lose_power(site.source_server)
        with site.hospital() as hospital:
            hospital.execute(VITAL, [101, 200])
        until(lambda: "done" in (site.snapshots()[-1:] or [()])[0], _NOTICED_S, "a snapshot")
        site.drain()
    guard.close()


def main(folder: pathlib.Path, which: str) -> None:
    network(up=True)
    _GOODBYES.write_text("1")
    with contextlib.ExitStack() as stack:
        source, store = (
            stack.enter_context(
                PostgresServer(folder / name, settings=SOURCE_SETTINGS, durable=False)
            )
            for name in ("source", "primary")
        )
        site = Site(folder, source, {"primary": store})
        {"store": store_gone, "source": source_gone}[which](site)
        site.prove()
    print(f"the {which} was missed and came back")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
