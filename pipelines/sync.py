"""The main pipeline: every link's changes, in two lanes, into its consult store."""

import dataclasses
from collections.abc import Sequence

import apache_beam as beam

from schemas.batches import ChangeBatch, Lane
from schemas.links import LinkSettings
from transforms.batch_routine import BatchRoutine
from transforms.capture.read_link import ReadLink
from transforms.deliver.deliver import DeliverEmergency, DeliverRoutine
from transforms.deliver.sla_store import WriteLag
from transforms.measure_lag import MeasureLag
from transforms.split_lanes import SplitLanes


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What `build` makes, for tests and for what is wired behind it.

    Attributes:
      receipts: PCollection[Receipt] of all links and lanes.
      lag: PCollection[LagWindow], accumulating panes.
    """

    receipts: beam.PCollection
    lag: beam.PCollection


def build(
    root: beam.Pipeline,
    links: Sequence[LinkSettings],
    primary_dsn: str,
    incarnation: str,
    lag_hold_s: float = 0.0,
) -> Outputs:
    """Wires all links; each is a branch of its own, so that none waits for another.

    Args:
      links: what to carry; at least one.
      primary_dsn: the store that keeps the lag windows.
      incarnation: names this start of the pipeline, so that its lag windows replace only
        their own (TRAPS: a window may fire twice).
      lag_hold_s: as `MeasureLag` has it.
    """
    receipts = [receipt for link in links for receipt in carry(root, link)]
    flat = receipts | "Receipts" >> beam.Flatten()
    lag = tuple(receipts) | "MeasureLag" >> MeasureLag(hold_s=lag_hold_s)
    lag | "WriteLag" >> WriteLag(primary_dsn, incarnation)
    return Outputs(flat, lag)


def carry(root: beam.Pipeline, link: LinkSettings) -> tuple[beam.PCollection, beam.PCollection]:
    """Wires one link; returns the receipts of its emergency and of its routine lane.

    The emergency write is fused with the read: nothing stands between them. The routine
    lane crosses into keyed state, where its event-time panes are gathered.
    """
    name = link.name
    limits = link.limits
    lanes = root | f"Read {name}" >> ReadLink(link) | f"SplitLanes {name}" >> SplitLanes()
    emergency = lanes[Lane.EMERGENCY] | f"DeliverEmergency {name}" >> DeliverEmergency(link)
    routine = (
        lanes[Lane.ROUTINE]
        | f"KeyByLink {name}" >> beam.Map(_keyed).with_output_types(tuple[str, ChangeBatch])
        | f"BatchRoutine {name}"
        >> BatchRoutine(
            window_s=limits.window_s,
            early_rows=limits.early_rows,
            early_bytes=limits.batch_bytes * 4,
            early_s=limits.early_s,
        )
        | f"DeliverRoutine {name}" >> DeliverRoutine(link)
    )
    return emergency, routine


def _keyed(batch: ChangeBatch) -> tuple[str, ChangeBatch]:
    return batch.link, batch
