"""Where a change stands in its source's log: the unit of progress, guard and acknowledgement."""

import typing

SEQ_END = 2**31 - 1  # The seq of a finished transaction: after every change in it.


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


def format_lsn(lsn: int) -> str:
    """Returns `lsn` as PostgreSQL prints it, e.g. `16/B374D848`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Returns the integer of PostgreSQL's text form of an LSN.

    Raises:
      ValueError: `text` is not of the form `X/X` in hexadecimal.
    """
    high, low = text.split("/")
    return (int(high, 16) << 32) | int(low, 16)
