"""Bundles without Beam's sampling thread: they end at once, and our counters are still told."""

import threading
import time

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.worker import bundle_processor, statesampler

from runners.bundle_costs import spare_bundles

_PATCHED = (
    (statesampler.StateSampler, "start"),
    (statesampler.StateSampler, "stop"),
    (bundle_processor.BundleProcessor, "monitoring_infos"),
)
_SEEN: list[set[str]] = []


class _CountFn(beam.DoFn):
    def __init__(self):
        self._met = Metrics.counter("bundles", "met_total")

    def process(self, element):
        self._met.inc(element)
        time.sleep(0.05)  # A sampling thread would be alive in it.
        _SEEN.append({thread.name for thread in threading.enumerate()})
        yield element


def _run() -> int:
    """Runs a pipeline in this process; returns its counter."""
    _SEEN.clear()
    pipeline = beam.Pipeline(runner=FnApiRunner())
    pipeline | beam.Create([1, 2, 3]) | beam.Reshuffle() | beam.ParDo(_CountFn())
    result = pipeline.run()
    result.wait_until_finish()
    (counter,) = result.metrics().query()["counters"]
    return counter.committed


def _samples() -> bool:
    return any("(run)" in name for names in _SEEN for name in names)


def test_bundles_end_at_once_and_counters_stay(monkeypatch):
    assert _run() == 6
    assert _samples()  # Else Beam has changed, and this is not needed any more.
    for owner, name in _PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    spare_bundles()
    assert _run() == 6
    assert not _samples()
