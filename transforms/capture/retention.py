"""How long a source will still keep the log that a link needs, and how fast that log grows."""

import collections
import dataclasses

# Over a minute a rate is steady enough to warn by, and young enough to be of now.
RATE_SPAN_US = 60_000_000
RATE_AGE_MAX_US = 600_000_000  # What was measured longer ago says nothing of now.


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a source keeps of its log, as seen from a link's position.

    Attributes:
      expire_s: age at which a piece of log is removed; None if age removes none.
      behind_s: age of the oldest change that the link has not applied; 0 if there is none.
      size_max: bytes of log that are kept in all; None if size removes none.
      needed_bytes: log from the beginning of the link's piece on.
      bytes_per_s: at which the log grows now; 0 where that is not known.
    """

    expire_s: float | None
    behind_s: float
    size_max: int | None
    needed_bytes: int
    bytes_per_s: float


def seconds_left(retention: Retention) -> float | None:
    """Returns the seconds until log that the link needs may be removed if it stands still.

    None: nothing removes it. 0: it may be gone any moment. A piece goes when it is as old as
    `expire_s`, counted from its last change, which is never older than the link's position;
    or when it and all that follows exceed `size_max`.
    """
    left = []
    if retention.expire_s is not None:
        left.append(retention.expire_s - retention.behind_s)
    if retention.size_max is not None:
        spare = retention.size_max - retention.needed_bytes
        if spare <= 0:
            left.append(0.0)
        elif retention.bytes_per_s > 0:
            left.append(spare / retention.bytes_per_s)
    return max(0.0, min(left)) if left else None


class Rate:
    """How fast a log grows now, from looks at it over about the last minute."""

    def __init__(self):
        self._looks: collections.deque[tuple[int, int]] = collections.deque()

    def look(self, at_us: int, total: int) -> None:
        """Notes how much log there had been in all at a moment of the source's clock.

        A log or a clock that goes back (a failover, a server made anew) begins a new count.
        """
        looks = self._looks
        if looks and (at_us < looks[-1][0] or total < looks[-1][1]):
            looks.clear()
        if not looks or at_us > looks[-1][0]:
            looks.append((at_us, total))
        while len(looks) > 2 and looks[1][0] <= at_us - RATE_SPAN_US:
            looks.popleft()

    @property
    def per_s(self) -> float | None:
        """Units a second; None before the second look."""
        if len(self._looks) < 2:
            return None
        (first_us, first), (last_us, last) = self._looks[0], self._looks[-1]
        return (last - first) / ((last_us - first_us) / 1e6)
