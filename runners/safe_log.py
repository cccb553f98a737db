"""Logs without content: an exception's class and place, its text only where it is ours."""

import logging
import sys
import traceback
import types

from schemas.errors import CampusSyncError

WITHHELD = "(text withheld)"
FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s %(message)s"


def safe_traceback(error: BaseException | None) -> str:
    """Returns a traceback that names classes, files and lines.

    The text of an error may quote a row (a database names the value that broke a rule), so
    it is left out, unless the error is a CampusSyncError, whose text is safe by contract.
    """
    parts, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kind = type(error)
        text = str(error) if isinstance(error, CampusSyncError) else WITHHELD
        frames = "".join(
            f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n'
            for frame in traceback.extract_tb(error.__traceback__)
        )
        head = "Traceback (most recent call last):\n"
        parts.append(f"{head}{frames}{kind.__module__}.{kind.__qualname__}: {text}\n")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(reversed(parts)).replace("builtins.", "")


class SafeFormatter(logging.Formatter):
    """Formats records with `safe_traceback`."""

    def __init__(self):
        super().__init__(FORMAT)

    def formatException(self, ei: tuple[type, BaseException, types.TracebackType]) -> str:
        return safe_traceback(ei[1]).rstrip("\n")


def guard_process() -> None:
    """Makes all of this process's logs and reports of exceptions safe, Beam's among them.

    Beam puts `traceback.format_exc()` into its log and sends it to the engine, which logs it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(force=True, level=logging.WARNING, handlers=[handler])
    traceback.format_exc = lambda limit=None, chain=True: safe_traceback(sys.exception())
    sys.excepthook = lambda kind, error, frames: sys.stderr.write(safe_traceback(error))
