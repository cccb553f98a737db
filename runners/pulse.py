"""Reads unbounded sources on Flink at Flink's own pulse, so that the engine's memory does not grow.

The Flink runner that we lock keeps a state descriptor of about 8 kB for every time that a
splittable read hands back its remainder, for ever (Beam issue 27648): a read that does so four
times a second takes 2.9 GB a day. A pulse source and a plain DoFn leave nothing behind.
"""

import collections.abc
import time

import apache_beam as beam
from apache_beam.io.flink.flink_streaming_impulse_source import FlinkStreamingImpulseSource
from apache_beam.io.unbounded_source import (
    ReadFromUnboundedSource,
    UnboundedReader,
    UnboundedSource,
)
from apache_beam.pipeline import PTransformOverride
from apache_beam.transforms.window import TimestampedValue

_PULSE_MS = 1  # Between two bundles; a pulse that comes while one runs waits for it.
_POLL_S_MAX = 0.05
_BUNDLE_S_MAX = 0.25  # What is read leaves the worker at the end of its bundle.


class _ReadAtPulseFn(beam.DoFn):
    """Emits what the reader has at each pulse; keeps one reader for the worker's life.

    A reader may wait in `advance()`: nothing else runs in its task. It starts without a
    checkpoint mark, so a source must know by itself where to go on.
    """

    def __init__(
        self,
        source: UnboundedSource,
        poll_s: float,
        records_max: int,
        bundle_s: float,
        clock: collections.abc.Callable[[], float] = time.monotonic,
        sleep: collections.abc.Callable[[float], None] = time.sleep,
    ):
        self._source = source
        self._poll_s = min(poll_s, _POLL_S_MAX)
        self._records_max = records_max
        self._bundle_s = min(bundle_s, _BUNDLE_S_MAX)
        self._clock = clock
        self._sleep = sleep
        self._reader: UnboundedReader | None = None

    def process(self, pulse):
        began = self._clock()
        if self._reader is None:
            self._reader = self._source.create_reader(None, None)
            found = self._reader.start()
        else:
            found = self._reader.advance()
        if not found:
            rest = self._poll_s - (self._clock() - began)
            if rest > 0:  # The reader did not wait itself: do not ask it a thousand times a second.
                self._sleep(rest)
            return
        deadline = self._clock() + self._bundle_s
        records = 0
        while found:
            yield TimestampedValue(self._reader.get_current(), self._reader.get_current_timestamp())
            records += 1
            if records >= self._records_max or self._clock() >= deadline:
                return
            found = self._reader.advance()

    def teardown(self):
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class ReadAtPulse(beam.PTransform):
    """Takes the place of `ReadFromUnboundedSource` on Flink; same output, no watermark.

    The watermark stays at its minimum, so event-time timers behind it do not fire: a
    transform that closes windows needs processing time, or the watermark in the data.
    """

    def __init__(self, read: ReadFromUnboundedSource, element_type: object):
        super().__init__()
        self._read = read
        self._element_type = element_type

    def expand(self, root):
        read = self._read
        source = read._source.split(1)[0]
        pulses = root | "Pulse" >> FlinkStreamingImpulseSource().set_interval_ms(_PULSE_MS)
        return pulses | "ReadAtPulse" >> beam.ParDo(
            _ReadAtPulseFn(
                source,
                read._poll_interval,
                read._max_records_per_bundle,
                read._max_read_time_seconds,
            )
        ).with_output_types(self._element_type)


class _Override(PTransformOverride):
    def matches(self, applied_ptransform) -> bool:
        return isinstance(applied_ptransform.transform, ReadFromUnboundedSource)

    def get_replacement_transform_for_applied_ptransform(self, applied_ptransform):
        (output,) = applied_ptransform.outputs.values()
        return ReadAtPulse(applied_ptransform.transform, output.element_type)


def read_at_pulse(pipeline: beam.Pipeline) -> None:
    """Replaces every unbounded read of a pipeline by one that Flink paces."""
    pipeline.replace_all([_Override()])
