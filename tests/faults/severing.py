"""A way into a server that breaks just when it matters: around a COMMIT, on either side of it."""

import contextlib
import random
import socket
import threading

_COMMIT = b"COMMIT\0"
_HOST = "127.0.0.1"


class _Frontend:
    """Splits what a client sends into messages and knows which of them commit."""

    def __init__(self):
        self._rest = b""
        self._begun = False
        self._commits: set[bytes] = set()

    def take(self, data: bytes) -> list[tuple[bytes, bool]]:
        """Returns the messages that are complete now, and whether each runs a COMMIT."""
        self._rest += data
        found = []
        while True:
            head = 1 if self._begun else 0  # The first message has no letter.
            if len(self._rest) < head + 4:
                return found
            size = head + int.from_bytes(self._rest[head : head + 4])
            if len(self._rest) < size:
                return found
            message, self._rest = self._rest[:size], self._rest[size:]
            found.append((message, self._begun and self._runs_commit(message)))
            self._begun = True

    def _runs_commit(self, message: bytes) -> bool:
        kind, body = message[:1], message[5:]
        if kind == b"P":
            name, _, query = body.partition(b"\0")
            self._commits.discard(name)
            if query.startswith(_COMMIT):
                self._commits.add(name)
        if kind == b"B":
            _portal, _, after = body.partition(b"\0")
            return after.partition(b"\0")[0] in self._commits
        return kind == b"Q" and body == _COMMIT


class SeveringProxy:
    """Forwards to a server's port; breaks some connections before and some after a COMMIT.

    After: the server gets the whole of it and its answer is never heard. Encryption must be
    off.

    Attributes:
      port: to connect to. commits: that came along. before, after: how many of them met a
        connection that broke on that side.
    """

    def __init__(self, port: int, seed: int, share: float):
        self._target = port
        self._share = share
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server((_HOST, 0))
        self.port = self._listener.getsockname()[1]
        self.commits = self.before = self.after = 0
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "SeveringProxy":
        self._threads[0].start()
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def stop_severing(self) -> None:
        self._share = 0.0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=[client])
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection((_HOST, self._target)) as server:
            for end in (client, server):  # Single messages must not wait for one another.
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._answer, args=[server, client])
            back.start()
            frontend = _Frontend()
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 16):
                    if self._forward(frontend.take(data), client, server):
                        break
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_WR)
            back.join()

    def _forward(self, messages, client: socket.socket, server: socket.socket) -> bool:
        """Sends messages on; returns whether the connection is broken now."""
        for at, (message, commits) in enumerate(messages):
            side = self._draw() if commits else ""
            if side == "before":
                client.shutdown(socket.SHUT_RDWR)
                return True
            if side == "after":
                # First nobody hears the answer, then all that was sent gets there.
                client.shutdown(socket.SHUT_RDWR)
                for rest, _ in messages[at:]:
                    server.sendall(rest)
                sync = b"S\0\0\0\4"  # A pipeline commits at its end.
                server.sendall(sync)
                return True
            server.sendall(message)
        return False

    def _draw(self) -> str:
        with self._lock:
            self.commits += 1
            if self._chance.random() >= self._share:
                return ""
            side = self._chance.choice(["before", "after"])
            setattr(self, side, getattr(self, side) + 1)
            return side

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                with contextlib.suppress(OSError):  # Else the server could not go on.
                    client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
