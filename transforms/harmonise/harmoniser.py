"""Harmonise decoded changes: a campus's tables and codes become the canonical ones.

Law: rows in + rows issued again = rows out + rejects. A bad value refuses its own row only, with
a reason and the source column: `unknown_table`, `missing_column`, `missing_key`, `bad_int`,
`bad_decimal`, `bad_bool`, `bad_date`, `bad_time`, `nul_byte`, `oversized`, and `partial_row`: some
inputs of a rule are unchanged and some are not, so that its output cannot be known. A mapping may
say that a bad value is null with a remark instead. Implausible values pass: the store's CHECKs
refuse those.
"""

import collections
import dataclasses

import numpy as np
import pyarrow as pa

from schemas.batches import RawChanges, Reject
from schemas.mappings import CampusMapping
from transforms.harmonise.columns import in_order
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.plan import Plan
from transforms.harmonise.rejects import rejects_of
from transforms.harmonise.rows import Note, Tally, UnknownCode


@dataclasses.dataclass(frozen=True)
class Harmonised:
    """Canonical changes.

    Attributes:
      tables: canonical table to its changes (`Table.arrow_schema`, `_digest` null), in order of
        position; only tables with rows.
      rejects: refused rows, in order of position. A column that is absent from `Reject.row` was
        unchanged.
      notes: rows counted by what is worth knowing about them; never their content.
      unknown_codes: codes that the dictionaries lack, with how often each was met.
      reissued: rows in `tables` that are no change of their own, but follow from one of their
        parent: what was captured is so many more.
    """

    tables: dict[str, pa.RecordBatch]
    rejects: list[Reject]
    notes: dict[Note, int] = dataclasses.field(default_factory=dict)
    unknown_codes: dict[UnknownCode, int] = dataclasses.field(default_factory=dict)
    reissued: int = 0


class Harmoniser:
    """Applies one campus's mapping; made once, used for every batch.

    By any thread, unless the mapping has parents: then `lookups` is state, of one link, and
    batches are to come in order.

    Args:
      lookups: what is known of parents; None: only what the batches bring.
    """

    def __init__(self, mapping: CampusMapping, lookups: Lookups | None = None):
        names = sorted(mapping.tables)
        dictionary = pa.array(names, pa.utf8())
        self._plans = {
            name: Plan(mapping, name, names.index(name), dictionary) for name in mapping.tables
        }
        self._related = any(source.parent for source in mapping.tables.values())
        self._lookups = lookups
        if self._related and lookups is None:
            self._lookups = Lookups(mapping)

    def apply(self, raw: RawChanges) -> Harmonised:
        """Returns the canonical form of `raw.tables`; loses no row, changes no order.

        Whatever the lookups' store raises passes through: nothing has happened then, and the same
        batch may be tried again.
        """
        if not self._related:
            return self._apply(raw)
        try:
            harmonised = self._apply(raw)
            self._lookups.finish()
            return harmonised
        except BaseException:
            self._lookups.abandon()
            raise

    def _apply(self, raw: RawChanges) -> Harmonised:
        rejects: list[Reject] = []
        tally = Tally(collections.Counter(), collections.Counter())
        parts = collections.defaultdict(list)
        reissued = 0
        if self._related:
            self._lookups.begin(raw)
        for name in raw.tables.keys() - self._plans.keys():
            batch = raw.tables[name]
            every = np.arange(batch.num_rows)
            rejects += rejects_of(name, batch, every, [("unknown_table", "")] * len(every))
        for name, plan in self._plans.items():
            part = None
            if name in raw.tables:
                part = plan.apply(raw.tables[name], rejects, tally, self._lookups)
                part = part if part is not None and part.num_rows else None
            if self._related:
                part, again = self._lookups.settle(name, part)
                reissued += again
            if part is not None:
                parts[plan.table.name].append(part)
        rejects.sort(key=lambda reject: reject.position)
        tables = {name: in_order(some) for name, some in parts.items()}
        return Harmonised(tables, rejects, tally.notes, tally.unknown_codes, reissued)
