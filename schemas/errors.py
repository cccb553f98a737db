"""Errors that the system names: each says what, where and the remedy, never a patient's data."""


class CampusSyncError(Exception):
    """Base of every error that is shown to a user: its text is safe to print and to log."""


class ConfigError(CampusSyncError):
    """A configuration, mapping or rules file is wrong; the text names file, line and remedy."""


class DataError(CampusSyncError):
    """A change that must be refused. `code` is the dead letter's reason; no arguments."""

    code = "data"
