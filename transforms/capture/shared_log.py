"""Share one reading of a source's log among the links of a process (ADR 0018)."""

import collections
import threading
import typing
from collections.abc import Hashable

from schemas.links import LinkSettings
from schemas.positions import Position
from transforms.capture.interpret import Interpreted

# Kept for links that are about to join, beyond what followers have still to take.
_TAIL_BYTES = 1 << 20
# A follower that is further behind reads for itself.
_MAX_BYTES = 64 << 20


class Stretch(typing.NamedTuple):
    """What was read, and how long after its commit."""

    interpreted: Interpreted
    behind_us: int


class SharedLog:
    """The newest stretches of one source's log, written by one link and followed by others.

    The stretches follow one another without a gap. At most one link has the pen; the others
    follow while the log reaches from where they are, and read for themselves when it does
    not, or when nobody writes. Thread-safe.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._writer: Hashable | None = None
        self._stretches: collections.deque[Stretch] = collections.deque()
        self._nbytes = 0
        self._tail: Position | None = None
        self._head: Position | None = None
        self._followers: dict[Hashable, Position] = {}

    def take_pen(self, link: Hashable, at: Position) -> bool:
        """Makes `link` the writer from `at` on, unless there is one; says whether it is now."""
        with self._changed:
            if self._writer is None:
                self._writer = link
                if self._head != at:
                    self._stretches.clear()
                    self._nbytes = 0
                    self._tail = self._head = at
                    self._changed.notify_all()
            return self._writer == link

    def drop_pen(self, link: Hashable) -> None:
        """Ends the writing of `link`, if it is the writer: its followers look for another."""
        with self._changed:
            if self._writer == link:
                self._writer = None
                self._changed.notify_all()

    def write(self, link: Hashable, stretch: Stretch) -> None:
        """Appends the writer's next stretch; of anybody else, does nothing.

        Raises:
          ValueError: it does not begin where the last one ended.
        """
        interpreted = stretch.interpreted
        with self._changed:
            if self._writer != link:
                return
            if interpreted.begin != self._head:
                raise ValueError(f"a stretch from {interpreted.begin} behind {self._head}")
            self._stretches.append(stretch)
            self._head = interpreted.end
            self._nbytes += interpreted.nbytes
            self._forget()
            self._changed.notify_all()

    def covers(self, at: Position) -> bool:
        """Whether a link that has read as far as `at` may follow."""
        with self._changed:
            return self._reaches(at)

    def follow(self, link: Hashable, at: Position, wait_s: float) -> list[Stretch] | None:
        """Returns the stretches behind `at`, of which the first may begin before it.

        Waits for the first. None: the log does not reach from there, or nobody writes it; the
        link is then no follower any more.
        """
        with self._changed:
            self._followers[link] = at
            if self._reaches(at) and self._head == at:
                self._changed.wait(wait_s)
            if not self._reaches(at):
                del self._followers[link]
                return None
            found: list[Stretch] = []
            for stretch in reversed(self._stretches):
                if stretch.interpreted.end <= at:
                    break
                found.append(stretch)
            return found[::-1]

    def leave(self, link: Hashable) -> None:
        """Ends what `link` does here, if anything."""
        with self._changed:
            self._followers.pop(link, None)
            self.drop_pen(link)

    def _reaches(self, at: Position) -> bool:
        return self._writer is not None and self._tail <= at <= self._head

    def _forget(self) -> None:
        needed = min(self._followers.values(), default=self._head)
        while self._stretches:
            oldest = self._stretches[0].interpreted
            waits = oldest.end > needed
            if self._nbytes <= (_MAX_BYTES if waits else _TAIL_BYTES):
                break
            self._stretches.popleft()
            self._nbytes -= oldest.nbytes
            self._tail = oldest.end


_LOGS: dict[Hashable, SharedLog] = {}
_LOCK = threading.Lock()


def shared_log(settings: LinkSettings) -> SharedLog:
    """Returns the process's log of a link's source, as all links that read it alike share it."""
    key = (
        settings.source,
        settings.source_kind,
        settings.source_dsn,
        settings.source_options,
        settings.publication,
        settings.mapping,
        settings.rules,
        settings.limits,
    )
    with _LOCK:
        return _LOGS.setdefault(key, SharedLog())
