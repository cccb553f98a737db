"""Who of a campus is under emergency: opened and closed by changes, kept by each link."""

import collections.abc
import functools

import pyarrow as pa

from schemas.emergency_rules import SIGN_OFF

# `(patient_id, rule, lsn, seq, open)`, as in ChangeBatch.escalations and `sync.escalation`.
Change = tuple[str, str, int, int, bool]


class Escalations:
    """The patients of one campus under emergency: immutable, one set per link.

    Its repr names nobody. `ids` is an Arrow array for membership tests, made once.

    Args:
      opened: patient to `(rule, lsn, seq)`, what opened the emergency and where.
    """

    def __init__(self, opened: collections.abc.Mapping[str, tuple[str, int, int]] | None = None):
        self._opened = dict(opened or {})
        self.ids = pa.array(self._opened, pa.utf8())

    @functools.cached_property
    def patients(self) -> frozenset[str]:
        return frozenset(self._opened)

    @classmethod
    def from_rows(cls, rows: collections.abc.Iterable[Change]) -> "Escalations":
        """Returns the state that rows of `sync.escalation` (or changes, in any order) leave."""
        return cls().after(sorted(rows, key=lambda row: row[2:4]))

    def after(self, changes: collections.abc.Iterable[Change]) -> "Escalations":
        """Returns the state after `changes`, in order; itself if nothing changes.

        A closing that is not newer than the opening it meets is an old one, sent again,
        and does nothing: only a later sign-off ends an emergency.
        """
        opened = None
        for patient, rule, lsn, seq, is_open in changes:
            opened = dict(self._opened) if opened is None else opened
            known = opened.get(patient)
            if is_open:
                if known is None:
                    opened[patient] = (rule, lsn, seq)
            elif known is not None and (lsn, seq) > known[1:]:
                del opened[patient]
        return self if opened is None or opened == self._opened else Escalations(opened)

    def opened_at(self, patient: str) -> tuple[int, int] | None:
        """Returns where the emergency of `patient` began, or None."""
        known = self._opened.get(patient)
        return None if known is None else known[1:]

    def __contains__(self, patient: str) -> bool:
        return patient in self._opened

    def __len__(self) -> int:
        return len(self._opened)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Escalations) and self._opened == other._opened

    __hash__ = None

    def __repr__(self) -> str:
        return f"Escalations({len(self)} open)"


def replay(
    events: list[tuple[int, int, str, str]], open_patients: Escalations
) -> tuple[list[Change], dict[str, tuple[int, int]]]:
    """Runs the few rows that open or close, in log order, over the state before them."""
    state: dict[str, tuple[int, int] | None] = {}
    changes: list[Change] = []
    ended: dict[str, tuple[int, int]] = {}
    for lsn, seq, patient, rule in events:
        opened = state[patient] if patient in state else open_patients.opened_at(patient)
        if rule == SIGN_OFF:
            if opened is None or (lsn, seq) <= opened:
                continue
            state[patient] = None
            ended[patient] = (lsn, seq)
        elif opened is None:
            state[patient] = (lsn, seq)
            ended.pop(patient, None)
        else:
            continue
        changes.append((patient, rule, lsn, seq, rule != SIGN_OFF))
    return changes, ended
