"""Split a link's batches by the lane that its reader gave them."""

import typing

import apache_beam as beam

from schemas.batches import ChangeBatch, Lane

_Emergency = beam.pvalue.TaggedOutput[typing.Literal["emergency"], ChangeBatch]
_Routine = beam.pvalue.TaggedOutput[typing.Literal["routine"], ChangeBatch]


def _tag(batch: ChangeBatch) -> _Emergency | _Routine:
    return beam.pvalue.TaggedOutput(batch.lane.value, batch)


class SplitLanes(beam.PTransform):
    """Splits PCollection[ChangeBatch] into `.emergency` and `.routine`; keeps timestamps.

    Lanes are decided at the reader, before any queue (ADR 0002); this only routes.
    """

    def expand(self, batches):
        return batches | "Tag" >> beam.Map(_tag).with_outputs(*(lane.value for lane in Lane))
