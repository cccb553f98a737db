"""Where a change stands in its source's log: the unit of progress, guard and acknowledgement."""

import typing

SEQ_END = 2**31 - 1  # The seq of a finished transaction: after every change in it.
# The highest bits of an lsn tell which log of its source it is of (ADR 0030); the rest is the
# source's own place.
OWN_BITS = 59
GENERATION_MAX = 2 ** (63 - OWN_BITS) - 1
# What helps when a source's log is not the one that was read.
NEW_LOG_REMEDY = (
    "Remedy: if that server is the right one, stop `campus-sync run`, raise the source's "
    "`generation` in campuses.yaml by one, and start again: the source is read whole, and what it "
    "says is newer than all that it said before."
)


class Position(typing.NamedTuple):
    """A place in a source's log, totally ordered per source.

    Attributes:
      lsn: the transaction's commit LSN (start of its commit record); GTID and SCN
        sources map their own commit order onto it.
      seq: ordinal of the change in its transaction, from 1; `SEQ_END` means that
        the transaction is complete. Deterministic: the same transaction read
        again has the same seqs.
    """

    lsn: int
    seq: int

    def __str__(self) -> str:
        seq = "end" if self.seq == SEQ_END else str(self.seq)
        return f"{format_lsn(self.lsn)}#{seq}"

    @property
    def acknowledgeable_lsn(self) -> int:
        """The LSN that a slot may be advanced to once this position is in the ledger.

        PostgreSQL re-sends every transaction whose commit record starts at or after
        the confirmed LSN, so a complete transaction is passed by one byte and a
        partial one not at all (trap 3).
        """
        return self.lsn + 1 if self.seq == SEQ_END else self.lsn


START = Position(0, SEQ_END)


def generation_of(lsn: int) -> int:
    """Returns which log of its source a place is in, from 0."""
    return lsn >> OWN_BITS


def own_lsn(lsn: int) -> int:
    """Returns a place as its source knows it, in whichever of its logs."""
    return lsn & (1 << OWN_BITS) - 1


def lsn_in(generation: int, lsn: int) -> int:
    """Returns a source's own place as one in its log of a generation, later than any before."""
    return generation << OWN_BITS | lsn


def own_position(generation: int, position: Position) -> Position:
    """Returns a position as the log of a generation has it; of another log, before all of it."""
    if generation_of(position.lsn) != generation:
        return START
    return Position(own_lsn(position.lsn), position.seq)


def distance(at: int, end: int) -> int:
    """Returns how much log lies between `at` and `end`; of another log than `end`, all of it."""
    if generation_of(at) != generation_of(end):
        return own_lsn(end)
    return max(0, end - at)


def format_lsn(lsn: int) -> str:
    """Returns `lsn` as PostgreSQL prints it, e.g. `16/B374D848`; `2:16/B374D848` in a third log."""
    own, generation = own_lsn(lsn), generation_of(lsn)
    return f"{f'{generation}:' if generation else ''}{own >> 32:X}/{own & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Returns the integer of PostgreSQL's text form of an LSN.

    Raises:
      ValueError: `text` is not of the form `X/X` in hexadecimal.
    """
    high, low = text.split("/")
    return (int(high, 16) << 32) | int(low, 16)
