"""What the supervisor of the engine does where there is no room for its files."""

import errno
import os
import pathlib
import threading

import pytest

from runners import flink, job_server
from runners.job_server import EngineError
from runners.options import parse


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
