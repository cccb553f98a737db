"""A small job in the manner of ours, run as a program of its own by test_flink.py.

Its source numbers elements from what its ledger file holds, and its sink appends a number only
if it is the next: whatever dies, the ledger must read 0, 1, 2, ... in the end.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time

import apache_beam as beam
from apache_beam.coders import PickleCoder, VarIntCoder
from apache_beam.io.unbounded_source import (
    CheckpointMark,
    ReadFromUnboundedSource,
    UnboundedReader,
    UnboundedSource,
)
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.utils.timestamp import Timestamp

from runners.flink import run_on_flink
from runners.options import parse


def ledger_of(path: str) -> list[dict]:
    """Returns the ledger's lines; one that a kill broke off counts as not written."""
    lines = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Numbers(UnboundedSource, UnboundedReader):
    """One number every `pause_s`, from the ledger on; goes back if the ledger stands still."""

    def __init__(self, path: str, pause_s: float, nbytes: int, secret: str):
        self._path, self._pause_s, self._nbytes, self._secret = path, pause_s, nbytes, secret
        self._next = self._stood_since = None
        self._due = 0.0

    def split(self, desired_num_splits, options=None):
        return [self]

    def create_reader(self, options, checkpoint_mark):
        return self

    def get_checkpoint_mark_coder(self):
        return PickleCoder()

    def start(self):
        if self._secret:
            raise ValueError(f"the patient {self._secret} must not be printed")
        return self.advance()

    def advance(self):
        time.sleep(min(self._pause_s, max(0.0, self._due - time.monotonic())))
        if time.monotonic() < self._due:
            return False
        done = len(ledger_of(self._path))
        if self._next is None or self._next > done + 5:
            self._next = done
        self._current, self._next = self._next, self._next + 1
        self._due = time.monotonic() + self._pause_s
        return True

    def get_current(self):
        return self._current, os.getpid(), b"\0" * self._nbytes

    def get_current_timestamp(self):
        return Timestamp(time.time())

    def get_watermark(self):
        return Timestamp(time.time())

    def get_checkpoint_mark(self):
        return CheckpointMark()


class CountFn(beam.DoFn):
    """Counts per key, as our routine lane does."""

    _COUNT = beam.DoFn.StateParam(ReadModifyWriteStateSpec("count", VarIntCoder()))

    def process(self, element, count=_COUNT):
        seen = (count.read() or 0) + 1
        count.write(seen)
        yield element[1], seen


class AppendFn(beam.DoFn):
    """The sink: appends the next number, once."""

    def __init__(self, path: str):
        self._path = path

    def process(self, element):
        (number, reader, content), seen = element
        if number == len(ledger_of(self._path)):
            with open(self._path, "a") as file:
                line = {"n": number, "pid": reader, "bytes": len(content), "seen": seen}
                file.write(json.dumps(line) + "\n")


def build(root: beam.Pipeline, path: str, pause_s: float, nbytes: int, secret: str) -> None:
    (
        root
        | "Read" >> ReadFromUnboundedSource(Numbers(path, pause_s, nbytes, secret))
        | "Key" >> beam.Map(lambda element: ("all", element)).with_output_types(tuple[str, object])
        | "Count" >> beam.ParDo(CountFn()).with_output_types(tuple[object, int])
        | "Append" >> beam.ParDo(AppendFn(path))
    )


def say(kind: str, detail: str) -> None:
    sys.stdout.write(json.dumps([kind, detail]) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--nbytes", type=int, default=10)
    parser.add_argument("--pause_s", type=float, default=0.02)
    parser.add_argument("--secret", default="")
    own, flags = parser.parse_known_args()
    outcome = run_on_flink(
        functools.partial(
            build, path=own.ledger, pause_s=own.pause_s, nbytes=own.nbytes, secret=own.secret
        ),
        parse(flags),
        pathlib.Path(own.dir),
        report=lambda event: say(event.kind, event.detail),
        jitter=lambda: 0.0,
    )
    say("outcome", outcome.value)


if __name__ == "__main__":
    # Workers unpickle by module name, so nothing may belong to `__main__`.
    from tests.e2e import flink_job

    sys.exit(flink_job.main())
