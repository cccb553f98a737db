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


def _named(value: object) -> object:
    """An exception that is logged as a message becomes its class."""
    if isinstance(value, BaseException) and not isinstance(value, CampusSyncError):
        return f"{type(value).__qualname__} {WITHHELD}"
    return value


class SafeFormatter(logging.Formatter):
    """Formats records with `safe_traceback`."""

    def __init__(self):
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        safe = logging.makeLogRecord(vars(record))
        safe.msg = _named(record.msg)
        if isinstance(record.args, tuple):
            safe.args = tuple(_named(value) for value in record.args)
        safe.exc_text = None  # Another formatter may have left its own.
        return super().format(safe)

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
    traceback.format_exception = lambda error, value=None, *_, **__: [
        safe_traceback(value if isinstance(value, BaseException) else error)
    ]
    sys.excepthook = lambda kind, error, frames: sys.stderr.write(safe_traceback(error))
