"""Prepare what was decoded: canonical rows, urgent copies, digests, manifest and seal."""

import collections
import dataclasses
import logging

import numpy as np
import pyarrow as pa

from schemas.batches import CHANGE_FIELDS, ChangeBatch, Lane, RawChanges
from schemas.emergency_rules import load_rules
from schemas.entities import TABLES
from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import Position
from transforms.checksum import digest_rows, manifest
from transforms.classify_lanes import Classifier, Escalations
from transforms.harmonise import Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.join_batches import concat_rows
from transforms.seal_dead_letters import Sealer

_LOGGER = logging.getLogger(__name__)

_DIGEST = [field.name for field in CHANGE_FIELDS].index("_digest")
# Commit times follow commit LSNs only roughly: a commit stamps its time before it is logged.
WATERMARK_SLACK_US = 1_000_000


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What one stretch of the log became.

    Attributes:
      routine: everything in it, unsealed, with no digests yet.
      urgent: complete urgent rows by table.
      escalations: opened and closed by it, as in `ChangeBatch`.
      opened: patients newly under emergency, whose waiting rows follow.
    """

    routine: ChangeBatch
    urgent: dict[str, pa.RecordBatch]
    escalations: tuple[tuple[str, str, int, int, bool], ...]
    opened: frozenset[str]


class Preparer:
    """Turns `RawChanges` of one link into change batches; the patients under emergency are state.

    Args:
      settings: the link. mapping: of its source. silent: log nothing of what is odd.
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
        self._settings = settings
        self._harmoniser = Harmoniser(mapping, lookups)
        self._classifier = Classifier(load_rules(settings.rules), settings.source)
        self._sealer = Sealer(settings.key_ref)
        self._escalations = escalations
        self._silent = silent
        self._told: collections.Counter[str] = collections.Counter()

    def prepare(self, raw: RawChanges, begin: Position, read_us: int) -> Prepared:
        """Harmonises and classifies; `begin` is where the link's last batch ended."""
        harmonised = self._harmoniser.apply(raw)
        rejects = [*raw.rejects, *harmonised.rejects]
        classified = self._classifier.classify(harmonised.tables, self._escalations)
        for note, count in harmonised.notes.items():
            self._tell(f"{note.src_table}.{note.column}: {note.what}", count)
        for unknown, count in harmonised.unknown_codes.items():
            self._tell(f"{unknown.src_table}.{unknown.column}: not in {unknown.code_list}", count)
        self._tell("alarming values in a unit that no limit has", classified.unit_mismatches)
        self._escalations = self._escalations.after(classified.escalations)
        routine = ChangeBatch(
            link=self._settings.name,
            lane=Lane.ROUTINE,
            begin=begin,
            end=raw.end,
            captured=raw.captured + len(raw.truncates) + harmonised.reissued,
            commit_us_max=raw.commit_us_max,
            watermark_us=raw.commit_us_max - WATERMARK_SLACK_US,
            read_us=read_us,
            tables=harmonised.tables,
            dead=tuple(self._sealer.seal(reject, self._settings.name) for reject in rejects),
            holds=raw.truncates,
            sweeps=raw.sweeps,
            # Here too: the routine ledger may pass an opening whose copy was lost under way, and
            # a reader that starts then would not know the patient.
            escalations=tuple(classified.escalations),
            codes=tuple((*code, count) for code, count in harmonised.unknown_codes.items()),
        )
        urgent = {
            name: rows.filter(pa.array(classified.masks[name]))
            for name, rows in harmonised.tables.items()
            if classified.masks[name].any()
        }
        opened = frozenset(change[0] for change in classified.escalations if change[4])
        return Prepared(routine, urgent, tuple(classified.escalations), opened)

    def _tell(self, what: str, count: int) -> None:
        """Logs how often something odd was met, each time that has grown tenfold."""
        if self._silent:
            return
        before = self._told[what]
        self._told[what] += count
        if len(str(before)) < len(str(self._told[what])) or (count and not before):
            _LOGGER.warning("link %s: %s, %d so far", self._settings.name, what, before + count)

    def emergency(
        self, prepared: Prepared, begin: Position, waiting: dict[str, list[pa.RecordBatch]]
    ) -> ChangeBatch | None:
        """Returns the emergency batch of this stretch, or None if nothing in it is urgent.

        `waiting` are rows of newly urgent patients that the routine lane has not delivered.
        """
        tables = dict(prepared.urgent)
        for name, parts in waiting.items():
            rows = _complete(concat_rows(parts))
            if rows.num_rows:
                own = [tables[name]] if name in tables else []
                tables[name] = concat_rows([rows, *own])
        if not tables and not prepared.escalations:
            return None
        routine = prepared.routine
        return dataclasses.replace(
            routine,
            lane=Lane.EMERGENCY,
            begin=begin,
            captured=sum(rows.num_rows for rows in tables.values()),
            tables=tables,
            dead=(),
            holds=(),
            sweeps=(),
            codes=(),
            escalations=prepared.escalations,
        )

    def finish(self, batch: ChangeBatch) -> ChangeBatch:
        """Returns the batch with digests and manifest, not sealed."""
        tables = {}
        entries = []
        window_us = self._settings.limits.window_s * 1_000_000
        for name, rows in batch.tables.items():
            digests = digest_rows(TABLES[name], rows)
            rows = rows.set_column(_DIGEST, rows.schema.field(_DIGEST), digests)
            tables[name] = rows
            entries += manifest(TABLES[name], rows, window_us)
        return dataclasses.replace(batch, tables=tables, manifest=tuple(entries))


def _complete(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Drops what must not be copied ahead: rows with values that only the store knows."""
    return rows.filter(pa.array(rows["_unchanged"].to_numpy() == np.uint64(0)))
