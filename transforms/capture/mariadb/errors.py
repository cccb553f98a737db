"""What may be wrong with a binlog, each with what helps."""

from schemas.errors import CampusSyncError
from transforms.capture.postgresql.replication import SlotInvalidated
from transforms.capture.resume import SourceRewound


class LogPurged(SlotInvalidated):
    """The log from our position on is no longer kept: there is a gap (trap 6)."""


class LogUnusable(SlotInvalidated):
    """The log does not tell what became of some rows: only a snapshot does."""


class LogReplaced(SourceRewound):
    """The log at our position is another one, begun anew, which has grown as far: a gap."""


class LogSettingsWrong(CampusSyncError):
    """The server does not log rows in a form that can be followed; the text has the remedy."""


class RightsMissing(CampusSyncError):
    """This account lacks a right; the text has the GRANT."""


class ServerRefused(CampusSyncError):
    """The server answered a request for its log with an error: `code` is the server's."""

    def __init__(self, code: int, text: str):
        super().__init__(f"the source refused to send its log: error {code}.")
        self.code, self.reason = code, text
