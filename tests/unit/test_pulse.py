"""The read at Flink's pulse: what it takes the place of, and how it asks its reader."""

import apache_beam as beam
import pytest
from apache_beam.coders import PickleCoder
from apache_beam.io.unbounded_source import (
    CheckpointMark,
    ReadFromUnboundedSource,
    UnboundedReader,
    UnboundedSource,
)
from apache_beam.utils.timestamp import Timestamp

from runners.pulse import _ReadAtPulseFn, read_at_pulse


class Script(UnboundedSource, UnboundedReader):
    """Plays a script: a number is a record, None is nothing now, a string takes a second."""

    def __init__(self, script=(), clock=None):
        self._script, self._clock = list(script), clock
        self.calls, self.closed = [], False

    def split(self, desired_num_splits, options=None):
        return [self]

    def create_reader(self, options, checkpoint_mark):
        self.calls.append("create")
        return self

    def get_checkpoint_mark_coder(self):
        return PickleCoder()

    def start(self):
        self.calls.append("start")
        return self._play()

    def advance(self):
        self.calls.append("advance")
        return self._play()

    def _play(self):
        self._current = self._script.pop(0) if self._script else None
        if isinstance(self._current, str):
            self._clock[0] += 1
        return self._current is not None

    def get_current(self):
        return self._current

    def get_current_timestamp(self):
        return Timestamp(7)

    def get_watermark(self):
        return Timestamp(0)

    def get_checkpoint_mark(self):
        return CheckpointMark()

    def close(self):
        self.closed = True


def player(script, records_max=100, bundle_s=0.2):
    now, slept = [0.0], []
    source = Script(script, now)
    fn = _ReadAtPulseFn(source, 0.02, records_max, bundle_s, lambda: now[0], slept.append)
    return source, slept, lambda: [item.value for item in fn.process(b"")], fn


def test_one_reader_serves_all_pulses_and_is_closed():
    source, slept, pulse, fn = player([1, 2, None, None, 3])
    assert pulse() == [1, 2]
    assert pulse() == []
    assert pulse() == [3]
    assert source.calls[:2] == ["create", "start"]
    assert source.calls.count("create") == source.calls.count("start") == 1
    assert slept == [0.02]
    fn.teardown()
    assert source.closed


def test_a_pulse_ends_after_so_many_records_or_so_long():
    _, _, pulse, _ = player([1, 2, 3, 4, 5], records_max=2)
    assert [pulse(), pulse(), pulse()] == [[1, 2], [3, 4], [5]]
    _, _, pulse, _ = player([1, "slow", 2])
    assert [pulse(), pulse()] == [[1, "slow"], [2]]


def test_a_reader_that_waits_itself_is_asked_again_at_once():
    source, slept, pulse, _ = player([])
    source._play = lambda: source._clock.__setitem__(0, source._clock[0] + 0.25)
    assert pulse() == []
    assert slept == []


def test_timestamps_are_the_readers():
    fn = _ReadAtPulseFn(Script([1]), 0.02, 9, 1)
    assert [item.timestamp for item in fn.process(b"")] == [Timestamp(7)]


def test_every_unbounded_read_is_replaced_and_keeps_its_type():
    root = beam.Pipeline()
    for name in ("a", "b"):
        (
            root
            | f"Read {name}" >> ReadFromUnboundedSource(Script()).with_output_types(int)
            | f"Use {name}" >> beam.Map(lambda n: (str(n), n)).with_output_types(tuple[str, int])
        )
    read_at_pulse(root)
    transforms = root.to_runner_api().components.transforms.values()
    urns = [t.spec.urn for t in transforms]
    assert urns.count("flink:transform:streaming_impulse:v1") == 2
    assert not [t for t in transforms if "ReadUnbounded" in t.unique_name]


@pytest.mark.parametrize("bounded", [True, False])
def test_other_sources_stay(bounded):
    root = beam.Pipeline()
    _ = root | (beam.Create([1]) if bounded else beam.Impulse())
    before = len(root.to_runner_api().components.transforms)
    read_at_pulse(root)
    assert len(root.to_runner_api().components.transforms) == before
