"""Interpret a stretch of a source's log once for all its links: canonical rows and their lanes."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import RawChanges, Reject
from schemas.emergency_rules import load_rules
from schemas.entities import TABLES
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.checksum import with_digests
from transforms.classify_lanes import Classifier
from transforms.escalations import Change, Escalations
from transforms.harmonise import Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.turns import SMALL_ROWS

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """A stretch of the log as every link of its source carries it.

    Attributes:
      begin: exclusive; end: inclusive. captured: changes in it, with those issued again.
      tables: canonical rows; with digests where they are few.
      masks: table to bool[n]: which rows are urgent, as in `Classified`.
      before: who was under emergency before it; escalations: opened and closed by it.
      rejects, holds, sweeps, codes: as `ChangeBatch` has them, rejects not yet sealed.
    """

    begin: Position
    end: Position
    captured: int
    commit_us_max: int
    tables: dict[str, pa.RecordBatch]
    masks: dict[str, np.ndarray]
    before: Escalations
    escalations: tuple[Change, ...]
    rejects: tuple[Reject, ...] = ()
    holds: tuple[tuple[str, Position], ...] = ()
    sweeps: tuple[tuple[str, Position], ...] = ()
    codes: tuple[tuple[str, str, str, str, int], ...] = ()

    @functools.cached_property
    def after(self) -> Escalations:
        """Who is under emergency after it."""
        return self.before.after(self.escalations)

    @functools.cached_property
    def urgent(self) -> dict[str, pa.RecordBatch]:
        """The urgent rows by table."""
        return {
            name: rows.filter(pa.array(self.masks[name]))
            for name, rows in self.tables.items()
            if self.masks[name].any()
        }

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.tables.values())

    def provisional(self) -> "Interpreted":
        """Returns its rows placed a byte before their commits: what comes at those replaces them.

        No commit is there: the one before ends a record earlier.
        """
        tables = {}
        for name, rows in self.tables.items():
            i = rows.schema.get_field_index("_lsn")
            lsn = pc.subtract(rows["_lsn"], pa.scalar(1, rows["_lsn"].type))
            tables[name] = rows.set_column(i, rows.schema.field(i), lsn)
        return dataclasses.replace(self, tables=tables)

    def beyond(self, position: Position) -> "Interpreted":
        """Returns what of it lies behind `position`, where another reading of the log ended."""
        if position <= self.begin:
            return self
        tables, masks = {}, {}
        for name, rows in self.tables.items():
            lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
            new = (lsn > position.lsn) | ((lsn == position.lsn) & (seq > position.seq))
            if new.any():
                tables[name] = rows.filter(pa.array(new))
                masks[name] = self.masks[name][new]
        rejects = tuple(reject for reject in self.rejects if reject.position > position)
        holds = tuple(hold for hold in self.holds if hold[1] > position)
        gone = _count(self.tables, self.rejects, self.holds) - _count(tables, rejects, holds)
        return dataclasses.replace(
            self,
            begin=position,
            captured=self.captured - gone,
            tables=tables,
            masks=masks,
            rejects=rejects,
            holds=holds,
        )


def _count(tables: dict[str, pa.RecordBatch], rejects: tuple, holds: tuple) -> int:
    return sum(rows.num_rows for rows in tables.values()) + len(rejects) + len(holds)


class Interpreter:
    """Harmonises and classifies what one reader reads; who is under emergency is state.

    Args:
      settings: the reader's link. mapping: of its source. silent: log nothing of what is odd.
      escalations: who is under emergency when reading starts, from the store.
      lookups: what is known of parents, where the mapping has any.
    """

    def __init__(
        self,
        settings: LinkSettings,
        mapping: CampusMapping,
        escalations: Escalations,
        silent: bool = False,
        lookups: Lookups | None = None,
    ):
        self._settings, self._mapping = settings, mapping
        self._harmoniser = Harmoniser(mapping, lookups)
        self._classifier = Classifier(load_rules(settings.rules), settings.source)
        self._escalations = escalations
        self._silent = silent
        self._told: collections.Counter[str] = collections.Counter()

    def interpret(self, raw: RawChanges, begin: Position) -> Interpreted:
        """Returns the canonical form of the next stretch; the last one ended at `begin`."""
        harmonised = self._harmoniser.apply(raw)
        classified = self._classifier.classify(harmonised.tables, self._escalations)
        for note, count in harmonised.notes.items():
            self._tell(f"{note.src_table}.{note.column}: {note.what}", count)
        for unknown, count in harmonised.unknown_codes.items():
            self._tell(f"{unknown.src_table}.{unknown.column}: not in {unknown.code_list}", count)
        self._tell("alarming values in a unit that no limit has", classified.unit_mismatches)
        tables = harmonised.tables
        if raw.captured <= SMALL_ROWS:
            # Of little, each link would spend as much on calls again; more waits for its turn.
            tables = {name: with_digests(TABLES[name], rows) for name, rows in tables.items()}
        return self._passed(
            Interpreted(
                begin=begin,
                end=raw.end,
                captured=raw.captured + len(raw.truncates) + harmonised.reissued,
                commit_us_max=raw.commit_us_max,
                tables=tables,
                masks=classified.masks,
                before=self._escalations,
                escalations=tuple(classified.escalations),
                rejects=(*raw.rejects, *harmonised.rejects),
                holds=raw.truncates,
                sweeps=raw.sweeps,
                codes=tuple((*code, n) for code, n in harmonised.unknown_codes.items()),
            )
        )

    def adopt(self, other: Interpreted) -> Interpreted:
        """Takes the next stretch as another link's interpreter understood it.

        Its lanes are decided anew where that one knew of other patients under emergency.
        """
        if other.before != self._escalations:
            classified = self._classifier.classify(other.tables, self._escalations)
            other = dataclasses.replace(
                other,
                before=self._escalations,
                masks=classified.masks,
                escalations=tuple(classified.escalations),
            )
        return self._passed(other)

    def learn(self, changes: Iterable[Change]) -> None:
        """Takes over emergencies that another reading of the source saw open or close."""
        self._escalations = self._escalations.after(changes)

    def sibling(self, lookups: Lookups | None) -> "Interpreter":
        """Returns another that knows of the same emergencies."""
        return Interpreter(self._settings, self._mapping, self._escalations, True, lookups)

    def _passed(self, interpreted: Interpreted) -> Interpreted:
        self._escalations = interpreted.after
        return interpreted

    def _tell(self, what: str, count: int) -> None:
        """Logs how often something odd was met, each time that has grown tenfold."""
        if self._silent:
            return
        before = self._told[what]
        self._told[what] += count
        if len(str(before)) < len(str(self._told[what])) or (count and not before):
            _LOGGER.warning("link %s: %s, %d so far", self._settings.name, what, before + count)
