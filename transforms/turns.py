"""Let small pieces of work of many links take turns, instead of all of them crawling at once."""

import contextlib
import threading

# So few rows are a few milliseconds of calls that each let go of Python's lock and then queue
# for it again behind every other link's: a dozen links at once make 200 ms of 5 (ADR 0011).
# More rows are long calls, which run beside each other on all processors.
SMALL_ROWS = 2000

_TURN = threading.Lock()
_FREE = contextlib.nullcontext()


def turn(rows: int, waits: bool = False) -> contextlib.AbstractContextManager:
    """Returns what to hold while working on `rows` rows.

    Whoever may wait meanwhile, for a store as it may be, says so and takes no turn: a store that
    is slow or frozen would hold up the links of all the others.
    """
    return _FREE if waits or rows > SMALL_ROWS else _TURN
