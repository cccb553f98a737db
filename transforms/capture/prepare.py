"""Prepare batches for one link of what was interpreted: both lanes, digests, manifest, letters."""

import dataclasses

import numpy as np
import pyarrow as pa

from schemas.batches import ChangeBatch, Lane
from schemas.entities import TABLES
from schemas.links import LinkSettings
from schemas.positions import Position
from transforms.capture.interpret import Interpreted
from transforms.checksum import lacks_digests, manifest, with_digests
from transforms.join_batches import concat_rows
from transforms.seal_dead_letters import Sealer

# Commit times follow commit LSNs only roughly: a commit stamps its time before it is logged.
WATERMARK_SLACK_US = 1_000_000


class Preparer:
    """Makes one link's change batches of stretches of the log. Stateless."""

    def __init__(self, settings: LinkSettings):
        self._link = settings.name
        self._window_us = settings.limits.window_s * 1_000_000
        self._sealer = Sealer(settings.key_ref)

    def routine(self, stretch: Interpreted, read_us: int) -> ChangeBatch:
        """Returns everything in the stretch, its refused changes sealed; not yet finished."""
        return self._batch(
            stretch,
            read_us,
            lane=Lane.ROUTINE,
            begin=stretch.begin,
            captured=stretch.captured,
            tables=stretch.tables,
            dead=tuple(self._sealer.seal(reject, self._link) for reject in stretch.rejects),
            holds=stretch.holds,
            sweeps=stretch.sweeps,
            codes=stretch.codes,
        )

    def emergency(
        self,
        stretch: Interpreted,
        read_us: int,
        begin: Position,
        waiting: dict[str, list[pa.RecordBatch]],
    ) -> ChangeBatch | None:
        """Returns the emergency batch of the stretch, or None if nothing in it is urgent.

        Args:
          begin: where the lane's last batch ended.
          waiting: rows of newly urgent patients that the routine lane has not delivered.
        """
        tables = dict(stretch.urgent)
        for name, parts in waiting.items():
            rows = _complete(concat_rows(parts))
            if rows.num_rows:
                own = [tables[name]] if name in tables else []
                tables[name] = concat_rows([rows, *own])
        if not tables and not stretch.escalations:
            return None
        return self._batch(
            stretch,
            read_us,
            lane=Lane.EMERGENCY,
            begin=begin,
            captured=sum(rows.num_rows for rows in tables.values()),
            tables=tables,
        )

    def _batch(self, stretch: Interpreted, read_us: int, **content) -> ChangeBatch:
        return ChangeBatch(
            link=self._link,
            end=stretch.end,
            commit_us_max=stretch.commit_us_max,
            watermark_us=stretch.commit_us_max - WATERMARK_SLACK_US,
            read_us=read_us,
            # In the routine lane too: its ledger may pass an opening whose copy was lost under
            # way, and a reader that starts then would not know the patient.
            escalations=stretch.escalations,
            **content,
        )

    def finish(self, batch: ChangeBatch) -> ChangeBatch:
        """Returns the batch with digests and manifest, not sealed."""
        tables = {}
        entries = []
        for name, rows in batch.tables.items():
            if lacks_digests(rows):
                rows = with_digests(TABLES[name], rows)
            tables[name] = rows
            entries += manifest(TABLES[name], rows, self._window_us)
        return dataclasses.replace(batch, tables=tables, manifest=tuple(entries))


def _complete(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Drops what must not be copied ahead: rows with values that only the store knows."""
    return rows.filter(pa.array(rows["_unchanged"].to_numpy() == np.uint64(0)))
