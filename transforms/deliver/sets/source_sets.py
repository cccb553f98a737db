"""What the links of one source in one process know together of the sets that they write."""

import collections
import threading
from collections.abc import Callable, Hashable

from schemas.batches import Lane
from schemas.clocks import monotonic_s
from schemas.links import LinkSettings
from transforms.deliver.sets.claims import Brought

# A store that gave no answer is not asked again at once: one that is frozen takes its share of the
# deadline each time.
_DOWN_MIN_S, _DOWN_MAX_S = 0.5, 8.0


class SourceSets:
    """Whose turn it is to write, who is down, and what was written for whom. Thread-safe.

    Attributes:
      writing: to be held while sets of a lane are written, so that one link does it for all.
    """

    def __init__(self, monotonic: Callable[[], float] = monotonic_s):
        self.writing = {lane: threading.Lock() for lane in Lane}
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._down: dict[str, tuple[float, float, str]] = {}  # Until when, how long, why.
        self._brought: collections.defaultdict[str, Brought] = collections.defaultdict(Brought)

    def brought(self, store: str) -> Brought:
        """Returns what was written to a store and not yet claimed by a lane of its link."""
        with self._lock:
            return self._brought[store]

    def down(self) -> dict[str, str]:
        """Returns who is not to be asked now, and why."""
        now = self._monotonic()
        with self._lock:
            return {name: why for name, (until, _, why) in self._down.items() if now < until}

    def note(self, name: str, why: str = "") -> None:
        """Notes who gave an answer, or `why` not."""
        with self._lock:
            if not why:
                self._down.pop(name, None)
                return
            _, pause, _ = self._down.get(name, (0.0, _DOWN_MIN_S / 2, ""))
            pause = min(2 * pause, _DOWN_MAX_S)
            self._down[name] = (self._monotonic() + pause, pause, why)


_SOURCES: dict[Hashable, SourceSets] = {}
_LOCK = threading.Lock()


def source_sets(settings: LinkSettings) -> SourceSets:
    """Returns what all links share that write the same sets of the same source."""
    key = (settings.source, settings.source_dsn, settings.sets)
    with _LOCK:
        return _SOURCES.setdefault(key, SourceSets())
