"""Decide where a link's reading begins: on with the stream, or with a snapshot, and why."""

import dataclasses
import enum

from schemas.errors import CampusSyncError
from schemas.positions import NEW_LOG_REMEDY, SEQ_END, START, Position, generation_of


class SourceRewound(CampusSyncError):
    """The source's log ends before the ledger: it was restored from a backup or replaced."""


class Reason(enum.StrEnum):
    """Why a snapshot is taken; kept in `sync.snapshot`."""

    FIRST = "first"
    NEW_LOG = "new_log"
    SLOT_MISSING = "slot_missing"
    SLOT_INVALIDATED = "slot_invalidated"
    LEDGER_BEHIND = "ledger_behind"
    INTERRUPTED = "interrupted"
    NEW_TABLES = "new_tables"
    REWOUND = "rewound"


@dataclasses.dataclass(frozen=True)
class Known:
    """What both ends say when a link starts.

    Attributes:
      ledger: the routine lane's durable position, or None if the link has none.
      snapshot_lsn: L0 of the link's latest snapshot, or None.
      slot_exists, slot_lost: the replication slot; lost means its log is gone.
      confirmed_lsn: what the slot was advanced to, 0 if it does not exist.
      log_end_lsn: end of the source's log now.
      new_tables: whether the mapping has tables that no snapshot of the link has read.
      missed: whether some of the mapped tables was not in the log all the time.
      rewound: whether the log once ended before what was read of it.
    """

    ledger: Position | None
    snapshot_lsn: int | None
    slot_exists: bool
    slot_lost: bool
    confirmed_lsn: int
    log_end_lsn: int
    new_tables: bool = False
    missed: bool = False
    rewound: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether the latest snapshot has not been applied to its end."""
        if self.snapshot_lsn is None:
            return False
        return (self.ledger or START) < (self.snapshot_lsn, SEQ_END)


def can_resume(known: Known) -> bool:
    """Whether the latest snapshot broke off and all of the log behind it is there to follow it."""
    if known.rewound or not known.interrupted or known.snapshot_lsn > known.log_end_lsn:
        return False
    whole = known.slot_exists and not known.slot_lost and not known.missed
    return whole and known.confirmed_lsn <= known.snapshot_lsn + 1


def refuse_rewound(applied: Position, log_end_lsn: int) -> None:
    """Checks that the source's log reaches as far as what was read or applied of it.

    Raises:
      SourceRewound: it does not.
    """
    if applied.lsn > log_end_lsn:
        raise SourceRewound(
            "the store is ahead of the source's log: the source was restored from a backup or "
            f"replaced. {NEW_LOG_REMEDY}"
        )


def snapshot_reason(known: Known) -> Reason | None:
    """Returns why a snapshot is needed, or None if the stream joins on to the ledger.

    Raises:
      SourceRewound: the ledger is ahead of the source's log; going on would leave new
        changes with old positions.
    """
    if known.ledger is not None:
        refuse_rewound(known.ledger, known.log_end_lsn)
    if known.ledger is None or known.ledger == START:
        return Reason.FIRST
    if generation_of(known.ledger.lsn) != generation_of(known.log_end_lsn):
        return Reason.NEW_LOG
    if known.interrupted:
        return Reason.INTERRUPTED
    if not known.slot_exists:
        return Reason.SLOT_MISSING
    if known.slot_lost:
        return Reason.SLOT_INVALIDATED
    if known.confirmed_lsn > known.ledger.acknowledgeable_lsn:
        return Reason.LEDGER_BEHIND
    if known.rewound:  # Where it was shorter it says other things now, at places that were read.
        return Reason.REWOUND
    # A table that joined the publication later: what it held before is in no stream.
    return Reason.NEW_TABLES if known.new_tables or known.missed else None
