"""The jar cache: verified, filled by one process at a time, usable offline, never half full."""

import collections
import hashlib
import http.server
import multiprocessing
import pathlib
import subprocess
import sys
import threading

import pytest

from runners.jars import Jar, JarsError, fetch_jars, read_lock

CONTENT = {f"lib{i}": bytes([i]) * (1000 + i) for i in range(12)}


def jar(name: str, content: bytes) -> Jar:
    return Jar("org.example.deep", name, "1.0", hashlib.sha256(content).hexdigest(), len(content))


JARS = tuple(jar(name, content) for name, content in CONTENT.items())


@pytest.fixture
def mirror():
    """A Maven repository on this machine; `requests` counts, `truncate` breaks answers off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # Named by the standard library.
            self.server.requests[self.path] += 1
            name = self.path.split("/")[4]
            expected = f"/org/example/deep/{name}/1.0/{name}-1.0.jar"
            if self.path != expected or name not in self.server.content:
                self.send_error(404)
                return
            body = self.server.content[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.server.truncate else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = collections.Counter()
    server.content = dict(CONTENT)
    server.truncate = False
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached(cache: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("*.jar")}


WHOLE = {f"{name}-1.0.jar": content for name, content in CONTENT.items()}


def test_fetches_in_lock_order_and_then_needs_no_network(mirror, tmp_path):
    paths = fetch_jars(mirror.url + "/", tmp_path, JARS)
    assert [path.name for path in paths] == [jar.file_name for jar in JARS]
    assert cached(tmp_path) == WHOLE
    mirror.requests.clear()
    assert fetch_jars("http://127.0.0.1:9", tmp_path, JARS) == paths
    assert not mirror.requests


def test_a_lock_made_of_resolved_jars_is_read_back(tmp_path):
    for name, content in WHOLE.items():
        (tmp_path / name).write_bytes(content)
    lines = [f"   {jar.group}:{jar.artifact}:jar:{jar.version}:runtime" for jar in JARS]
    (tmp_path / "listing").write_text("Resolved:\n" + "\n".join(lines) + "\n")
    command = [sys.executable, "-m", "runners.jars", tmp_path / "listing", tmp_path]
    (tmp_path / "lock").write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    assert set(read_lock(tmp_path / "lock")) == set(JARS)


def test_a_directory_serves_as_a_mirror(tmp_path):
    for jar in JARS:
        path = tmp_path / "repo" / "org/example/deep" / jar.artifact / "1.0" / jar.file_name
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT[jar.artifact])
    fetch_jars(f"file://{tmp_path}/repo", tmp_path / "cache", JARS)
    assert cached(tmp_path / "cache") == WHOLE


def test_the_environment_names_mirror_and_cache(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMPUS_SYNC_MAVEN_REPOSITORY", mirror.url)
    monkeypatch.setenv("CAMPUS_SYNC_JAR_CACHE", str(tmp_path))
    assert fetch_jars(jars=JARS[:1]) == (tmp_path / "lib0-1.0.jar",)


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b""])
def test_a_spoilt_cache_heals(mirror, tmp_path, spoil):
    fetch_jars(mirror.url, tmp_path, JARS)
    mirror.requests.clear()
    path = tmp_path / "lib3-1.0.jar"
    path.write_bytes(spoil(path.read_bytes()))
    fetch_jars(mirror.url, tmp_path, JARS)
    assert cached(tmp_path) == WHOLE
    assert sum(mirror.requests.values()) == 1


def test_another_content_is_refused_and_not_kept(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    mirror.content["lib5"] = b"\0" * len(CONTENT["lib5"])
    with pytest.raises(JarsError) as caught:
        fetch_jars(mirror.url, tmp_path, JARS)
    text = str(caught.value)
    assert "org.example.deep:lib5:1.0" in text
    assert "SHA-256" in text
    assert "Remedy" in text
    assert "lib5-1.0.jar" not in cached(tmp_path)
    assert not list(tmp_path.glob(".incoming-*"))


def test_a_broken_off_download_never_counts(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    mirror.truncate = True
    with pytest.raises(JarsError):
        fetch_jars(mirror.url, tmp_path, JARS)
    assert cached(tmp_path) == {}
    mirror.truncate = False
    fetch_jars(mirror.url, tmp_path, JARS)
    assert cached(tmp_path) == WHOLE


def test_what_is_missing_is_named_with_the_remedy(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    del mirror.content["lib7"]
    with pytest.raises(JarsError) as caught:
        fetch_jars(mirror.url, tmp_path, JARS)
    assert "org.example.deep:lib7:1.0: could not be fetched" in str(caught.value)
    assert "CAMPUS_SYNC_MAVEN_REPOSITORY" in str(caught.value)


def test_what_a_killed_process_left_is_cleared(mirror, tmp_path):
    left = tmp_path / ".incoming-dead"
    left.mkdir()
    (left / "lib0-1.0.jar.tmp").write_bytes(b"half")
    fetch_jars(mirror.url, tmp_path, JARS)
    assert not left.exists()


def test_an_unwritable_cache_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JarsError, match="CAMPUS_SYNC_JAR_CACHE"):
        fetch_jars("http://127.0.0.1:9", tmp_path / "file" / "cache", JARS)


def test_only_one_process_fetches(mirror, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (mirror.url, tmp_path, JARS)
    children = [context.Process(target=fetch_jars, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert set(mirror.requests.values()) == {1}
    assert cached(tmp_path) == WHOLE


def test_progress_is_told_to_whoever_waits(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("runners.jars._QUIET_S", -1)
    told = []
    fetch_jars(mirror.url, tmp_path, JARS, lambda *numbers: told.append(numbers))
    total = sum(map(len, CONTENT.values()))
    assert told[-1] == (len(JARS), len(JARS), total, total)


def test_the_lock_is_whole():
    jars = read_lock()
    assert len(jars) == 162
    assert len({jar.file_name for jar in jars}) == 162
    assert len({jar.sha256 for jar in jars}) == 162
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in jars)
    names = {(jar.artifact, jar.version) for jar in jars}
    assert {("beam-runners-flink-1.19", "2.62.0"), ("slf4j-simple", "1.7.36")} <= names
