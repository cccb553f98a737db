"""The clocks that production injects; everything else is given one."""

import time


def wall_clock_us() -> int:
    """Returns microseconds since 1970 by this host's clock."""
    return time.time_ns() // 1000


def monotonic_s() -> float:
    """Returns seconds that never go back."""
    return time.monotonic()
