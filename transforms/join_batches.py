"""Join consecutive change batches of one link and lane into one."""

import itertools
from collections.abc import Sequence

import pyarrow as pa

from schemas.batches import ChangeBatch


def join_batches(batches: Sequence[ChangeBatch]) -> ChangeBatch:
    """Returns one batch over (first.begin, last.end], rows in log order within each table.

    The batches must follow one another in one lane of one link, unsealed: no gap, no
    overlap. `manifest` entries are kept side by side; whoever reads them adds them up.

    Raises:
      ValueError: the batches do not join on, which is a fault of the caller.
    """
    first, last = batches[0], batches[-1]
    if len(batches) == 1:
        return first
    for earlier, later in itertools.pairwise(batches):
        if (earlier.link, earlier.lane, earlier.end) != (later.link, later.lane, later.begin):
            raise ValueError(f"batches do not join on: {earlier.end} then {later.begin}")
    parts: dict[str, list[pa.RecordBatch]] = {}
    for batch in batches:
        for name, rows in batch.tables.items():
            parts.setdefault(name, []).append(rows)
    return ChangeBatch(
        link=first.link,
        lane=first.lane,
        begin=first.begin,
        end=last.end,
        captured=sum(batch.captured for batch in batches),
        commit_us_max=max(batch.commit_us_max for batch in batches),
        watermark_us=max(batch.watermark_us for batch in batches),
        read_us=min(batch.read_us for batch in batches),
        tables={name: concat_rows(rows) for name, rows in parts.items()},
        dead=tuple(letter for batch in batches for letter in batch.dead),
        holds=tuple(hold for batch in batches for hold in batch.holds),
        sweeps=tuple(sweep for batch in batches for sweep in batch.sweeps),
        manifest=tuple(entry for batch in batches for entry in batch.manifest),
        escalations=tuple(change for batch in batches for change in batch.escalations),
        codes=tuple(code for batch in batches for code in batch.codes),
    )


def concat_rows(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns the rows of `parts` (one schema) in one contiguous record batch."""
    if len(parts) == 1:
        return parts[0]
    table = pa.Table.from_batches(parts).unify_dictionaries().combine_chunks()
    return table.to_batches()[0]
