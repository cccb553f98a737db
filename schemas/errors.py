"""Errors that the system names: each says what, where and the remedy, never a patient's data."""


class CampusSyncError(Exception):
    """Base of every error that is shown to a user: its text is safe to print and to log."""


class ConfigError(CampusSyncError):
    """A configuration, mapping or rules file is wrong; the text names file, line and remedy."""


class DataError(CampusSyncError):
    """A change that must be refused. `code` is the dead letter's reason; no arguments."""

    code = "data"


class DeadLetterDamagedError(DataError):
    """A sealed dead letter is not as it was sealed: it is not opened."""

    code = "dead_letter_damaged"


class SealBrokenError(DataError):
    """A change batch is not as it was sealed at capture."""

    code = "seal_broken"


class WireFormatError(DataError):
    """Bytes are not a change batch of a version that is known here."""

    code = "wire_format"


class StoreUnavailable(CampusSyncError):
    """A consult store cannot take changes now: nothing of the batch is in it; send it again.

    The text names server and SQLSTATE only.
    """


class ConservationBroken(CampusSyncError):
    """A delivery would lose or double a change by its own count: it was rolled back."""


class SourceUnavailable(CampusSyncError):
    """A source cannot be reached or dropped the connection: trying again may help."""


def reason(error: Exception) -> str:
    """Returns what may be shown of any error: class and SQLSTATE, never its text."""
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''}".strip()


def told(error: Exception) -> str:
    """Returns what is shown of an error: the text of our own ones, of others their `reason`."""
    return str(error) if isinstance(error, CampusSyncError) else reason(error)
