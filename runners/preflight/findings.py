"""What a check found, where, and what helps."""

import enum
import typing


class Severity(enum.StrEnum):
    """ERROR forbids a start; HELD holds one table of a link that has begun, the others flow;
    WARNING will hurt some day; NOTE is good to know."""

    ERROR = "error"
    HELD = "held"
    WARNING = "warning"
    NOTE = "note"


class Finding(typing.NamedTuple):
    """What is not as it should be: where, what, and a command or SQL that helps."""

    severity: Severity
    place: str
    what: str
    remedy: str

    def to_dict(self) -> dict[str, str]:
        return self._asdict()


class Findings(list[Finding]):
    """The findings of one place."""

    def __init__(self, place: str):
        super().__init__()
        self._place = place

    def error(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.ERROR, self._place, what, remedy))

    def held(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.HELD, self._place, what, remedy))

    def warning(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.WARNING, self._place, what, remedy))

    def note(self, what: str, remedy: str) -> None:
        self.append(Finding(Severity.NOTE, self._place, what, remedy))
