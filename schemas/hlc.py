"""Hybrid logical clocks (Kulkarni et al. 2014) in one bigint: wall time that causality corrects.

A stamp is laid out as the stores' `hlc` column is: 48 bits of milliseconds since 1970, 10 of
microseconds, 6 of count. The next stamp is always at least one greater, so a burst that uses up
the count borrows from the bits above it and stays in order.
"""

import collections.abc

_COUNT_BITS = 6
_MS_BITS = 16  # Bits below the milliseconds.


def stamp_of(us: int) -> int:
    """Returns the first stamp of a microsecond since 1970."""
    return us // 1000 << _MS_BITS | us % 1000 << _COUNT_BITS


def us_of(stamp: int) -> int:
    """Returns the microsecond since 1970 that a stamp stands for."""
    return (stamp >> _MS_BITS) * 1000 + min(stamp >> _COUNT_BITS & 1023, 999)


class HybridClock:
    """One store's clock.

    Stamps of one clock ascend, and a stamp is greater than every stamp that was adopted before
    it. A remote stamp further ahead than the bound is not adopted: one clock that is an hour fast
    would drag all others with it. It is refused and its actor named in `distrusted`, which every
    later stamp here carries along: between two that do not trust each other time decides nothing.

    Attributes:
      latest: the greatest stamp given or adopted; kept durably by the store, as it must not
        go back when the process starts again.
      distrusted: actors whose stamps were refused, until `trust`.
    """

    def __init__(
        self,
        wall_us: collections.abc.Callable[[], int],
        bound_us: int,
        latest: int = 0,
        distrusted: collections.abc.Iterable[str] = (),
    ):
        self._wall_us = wall_us
        self._bound_us = bound_us
        self.latest = latest
        self.distrusted = frozenset(distrusted)

    def tick(self) -> int:
        """Returns the stamp of an edit made now."""
        self.latest = max(self.latest + 1, stamp_of(self._wall_us()))
        return self.latest

    def witness(self, stamp: int, actor: str) -> bool:
        """Adopts a stamp that `actor` gave. False: it was refused, and the skew is to be told."""
        if us_of(stamp) - self._wall_us() > self._bound_us:
            self.distrusted |= {actor}
            return False
        self.latest = max(self.latest, stamp)
        return True

    def trust(self, actor: str) -> None:
        """Takes an actor's stamps again, once its clock is mended."""
        self.distrusted -= {actor}

    @property
    def ahead_us(self) -> int:
        """How far the stamps are ahead of the wall: more than the bound, and it was set back."""
        return us_of(self.latest) - self._wall_us()
