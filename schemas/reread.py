"""What is read again of a source table, how far that has come, and what came of it."""

import dataclasses
import enum
import json
from collections.abc import Mapping

Key = Mapping[str, bytes]  # Columns of a table's order, as its source writes their values.


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows of one source table.

    Attributes:
      table: `schema.table`, as the mapping has it.
      low, high: bounds of the key, included: texts of the columns of the mapping's `id`; () for
        none.
      column, since: only rows whose `column` has that day (YYYY-MM-DD), by the campus's clock, or a
        later one; "" for all.
    """

    table: str
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    column: str = ""
    since: str = ""

    @property
    def name(self) -> str:
        """The same text for the same rows: what progress is kept under."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)


class Phase(enum.StrEnum):
    """`ROWS`: the source's are read. `GONE`: the store's ids are held against the source."""

    ROWS = "rows"
    GONE = "gone"
    DONE = "done"


@dataclasses.dataclass
class Tally:
    """What came of it, all readings together.

    Attributes:
      rows: of the source, read. ids: of the stores, held against the source.
      delivered, superseded: rows that were unlike, by store: delivered again, or overtaken by a
        newer change.
      deleted: records that the source no longer has. refused: rows that mapping or store refuse.
      untold: ids of the stores of which it cannot be told whether they lie in the span.
    """

    rows: int = 0
    ids: int = 0
    delivered: int = 0
    superseded: int = 0
    deleted: int = 0
    refused: int = 0
    untold: int = 0


@dataclasses.dataclass(frozen=True)
class Note:
    """How far a span has been read again, as it is kept beside a link's ledger.

    Attributes:
      behind: where it goes on: behind this key of the source, or behind the
        record id under "" in the stores' order; empty at the beginning.
    """

    phase: Phase
    behind: Key
    tally: Tally
