"""Let small pieces of work of many links take turns, instead of all of them crawling at once."""

import contextlib
import threading

# So few rows are a few milliseconds of calls that each let go of Python's lock and then queue
# for it again behind every other link's: a dozen links at once make 200 ms of 5 (ADR 0011).
# More rows are long calls, which run beside each other on all processors.
SMALL_ROWS = 2000

_TURN = threading.Lock()
_FREE = contextlib.nullcontext()


def turn(rows: int) -> contextlib.AbstractContextManager:
    """Returns what to hold while working, without waiting for anything else, on `rows` rows."""
    return _TURN if rows <= SMALL_ROWS else _FREE
