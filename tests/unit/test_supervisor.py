"""What the supervisor of the engine does where there is no room for its files."""

import errno
import io
import os
import pathlib
import sys
import threading

import pytest

from runners import flink, job_server
from runners.job_server import EngineError
from runners.options import parse
from runners.run import print_event


class Hurried(threading.Event):
    """Is waited for in no time."""

    def wait(self, timeout=None):
        return self.is_set()


@pytest.fixture(autouse=True)
def _no_java(monkeypatch):
    monkeypatch.setattr(flink.jars, "fetch_jars", lambda _: ())
    for module in (flink, job_server):
        monkeypatch.setattr(module, "find_java", lambda *_: "java")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_finds_no_room_is_a_failed_start(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    events = []
    with pytest.raises(EngineError, match="the pipeline failed 3 times"):
        flink.run_on_flink(
            lambda root: None,
            parse(["--restarts_max=2"]),
            tmp_path,
            Hurried(),
            events.append,
        )
    failed = [event.detail for event in events if event.kind == "failed"]
    assert len(failed) == 3
    assert failed[0].startswith(f"{tmp_path}: No space left on device. Remedy: make room")


def test_a_folder_that_finds_no_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "mkdir", full)
    with pytest.raises(EngineError, match="job: No space left on device") as caught:
        flink.run_on_flink(lambda root: None, parse([]), tmp_path / "job", Hurried())
    assert "Remedy: make room" in str(caught.value)


def test_a_report_that_finds_no_room_does_not_end_the_run(monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    print_event(flink.Event("failed", 1, "why"))
    assert printed.getvalue().endswith(" failed (start 1) why\n")
    monkeypatch.setattr(printed, "write", full)
    print_event(flink.Event("failed", 2))


class Starts(flink._Supervisor):
    """Starts that fail as often as there are answers to how much is free, and then end well.

    The first answer after a failed start is what it left; the others are what is waited for.
    """

    def __init__(self, work_dir, free, stop=None, **more):
        self.free, self.stop, self.events = list(free), stop or Hurried(), []
        super().__init__(
            lambda root: None,
            parse(["--restarts_max=2"]),
            work_dir,
            self.stop,
            self.events.append,
            lambda: 0.0,
            free_bytes=lambda _: self.free.pop(0),
            **more,
        )

    def _run_once(self, class_path):
        self._report(flink.Event("starting", self._attempt))
        if self.free:
            raise flink._Failed("the job is FAILED: java.io.IOException")
        return flink.Outcome.DONE

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)


ROOM = 1 << 30


def test_failures_without_room_are_not_counted(tmp_path):
    """Ten starts, thirty seconds apart, none of which has room; then there is."""
    starts = Starts(tmp_path, [20 << 20] * 31 * 10 + [0, 0, ROOM], wait_for_room=True)
    assert starts.run() == flink.Outcome.DONE
    assert (starts.count("failed"), starts.count("starting")) == (11, 12)
    told = {event.detail for event in starts.events if event.kind == "failed"}
    (why,) = told
    assert why.startswith(f"no room in {tmp_path}. Remedy: make room. ")


def test_failures_with_room_are_counted_and_those_before_are_not_forgotten(tmp_path):
    starts = Starts(tmp_path, [ROOM, ROOM, 0, ROOM, ROOM, ROOM], wait_for_room=True)
    with pytest.raises(EngineError, match="the pipeline failed 3 times"):
        starts.run()
    assert starts.count("failed") == 4


def test_who_does_not_wait_for_room_is_told_that_there_is_none(tmp_path):
    starts = Starts(tmp_path, [0] * 9)
    with pytest.raises(EngineError, match=r"no room in .*Remedy: make room"):
        starts.run()


def test_waiting_for_room_ends_when_it_is_asked_to(tmp_path):
    stop = Hurried()
    starts = Starts(tmp_path, [0] * 9, stop, wait_for_room=True)
    starts._report = lambda event: stop.set() if event.kind == "failed" else None
    assert starts.run() == flink.Outcome.STOPPED
