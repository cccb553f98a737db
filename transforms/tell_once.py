"""Log what keeps something from its work once, however often it is met again."""

import logging


class TellOnce:
    """Logs a text where it is another one than the last, and that `place` goes on where it ends.

    Args:
      logger: of whoever tells. place: what each line begins with.
    """

    def __init__(self, logger: logging.Logger, place: str):
        self._logger, self._place = logger, place
        self._said = ""

    def __call__(self, what: str) -> None:
        """Takes what keeps it now; nothing if it goes on."""
        if what != self._said:
            self._logger.warning("%s: %s", self._place, what or "goes on")
            self._said = what
