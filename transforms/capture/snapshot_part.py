"""Parts of a snapshot that can be left and gone on with: what was read, and what is left."""

import dataclasses
from collections.abc import Mapping, Sequence

from schemas.batches import RawChanges
from schemas.positions import SEQ_END, Position

Key = Mapping[str, bytes]  # Columns of a table's own order, as its source writes their values.


@dataclasses.dataclass(frozen=True)
class SnapshotChanges(RawChanges):
    """Rows of one table as a snapshot reads them, and where another reading goes on behind them.

    Attributes:
      table: whose rows; "" in the last part of a snapshot of which nothing was left.
      behind: key of the last row; empty where the table has no order to be read by: it can only
        be begun anew.
      last_seq: the greatest ordinal that was given out so far; `end` may lie beyond it.
    """

    table: str = ""
    behind: Key = dataclasses.field(default_factory=dict)
    last_seq: int = 0

    @property
    def ended(self) -> bool:
        """Whether the table has been read to its end."""
        return any(table == self.table for table, _ in self.sweeps)


@dataclasses.dataclass(frozen=True)
class Rest:
    """What an interrupted snapshot has left to read, and where its numbers go on.

    Attributes:
      last_seq: the greatest ordinal that any reading before has given out. A number is never
        given to two rows: what an earlier reading sent may still be under way.
      done: tables that were read to their end. table: the one that was being read, behind the
        row with the key `behind`.
    """

    last_seq: int = 0
    done: frozenset[str] = frozenset()
    table: str = ""
    behind: Key = dataclasses.field(default_factory=dict)

    def of(self, tables: Sequence[str]) -> list[str]:
        """Returns which tables are left, in their order."""
        return [table for table in tables if table not in self.done]

    def after(self, table: str, columns: Sequence[str]) -> tuple[bytes, ...] | None:
        """Returns the key that a table goes on behind; None: it begins at its first row.

        Args:
          columns: what the table is ordered by now; by others it begins anew.
        """
        if table != self.table or not columns or set(columns) != set(self.behind):
            return None
        return tuple(self.behind[column] for column in columns)


WHOLE = Rest()


def nothing_left(lsn: int, rest: Rest) -> SnapshotChanges:
    """Returns the end of a snapshot of which no table is left to read."""
    begin = Position(lsn, rest.last_seq)
    return SnapshotChanges(begin, Position(lsn, SEQ_END), 0, 0, {}, last_seq=rest.last_seq)
