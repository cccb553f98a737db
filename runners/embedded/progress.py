"""Signs of life for whoever waits at a terminal."""

import collections.abc
import sys
import time

Progress = collections.abc.Callable[[str], None]
_QUIET_S = 2.0  # Progress is shown only where somebody waits longer than this.


def show_progress(text: str) -> None:
    """Writes one line to stderr: the default for steps that take longer than two seconds."""
    print(text, file=sys.stderr, flush=True)


class SlowStep:
    """Tells that a step goes on, once a second, from two seconds after it began."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._began = time.monotonic()
        self._next = self._began + _QUIET_S

    def __call__(self, what: str) -> None:
        """Says `what` and since when, if it is time to; call it as often as you like."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1.0
            self._progress(f"{what}, {now - self._began:.0f} s so far")
