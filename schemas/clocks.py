"""The clocks and the chance that production injects; everything else is given one."""

import random
import time


def wall_clock_us() -> int:
    """Returns microseconds since 1970 by this host's clock."""
    return time.time_ns() // 1000


def monotonic_s() -> float:
    """Returns seconds that never go back."""
    return time.monotonic()


def jitter() -> float:
    """Returns a number in 0..1 that spreads the retries of many links."""
    return random.random()
