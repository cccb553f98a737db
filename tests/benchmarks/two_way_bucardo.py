"""Measure Bucardo where `tests/e2e/test_two_way.py` measures us and PostgreSQL's own replication.

    python -m tests.benchmarks.two_way_bucardo

Needs Debian 12: `apt-get install bucardo postgresql-15 postgresql-plperl-15 faketime`.

The same two hundred records are changed at two databases, both sources of one sync, while the sync
is deactivated; then it is activated and kicked, since a backlog alone does not start it. A line
tells how many records differ between the databases, how many of the 300 edits stand in neither
(Bucardo keeps keys of changed rows, not what was in them), and the seconds until each database has
the other's last row (`inf`: not within half a minute). One run of the sync joins both databases, so
no side heals first; instead each side's clock once is an hour ahead, the other's an hour behind.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psycopg

from runners.embedded.binaries import server_account
from runners.embedded.process_tree import (
    ProcessId,
    children_of,
    identify,
    kill_tree,
    send,
    wait_gone,
)
from tests.e2e.test_two_way import DELETED, PLAN, ROWS, UPDATED, change
from tests.faults.harness import until

POSTGRES = pathlib.Path("/usr/lib/postgresql/15")  # Where Debian has it.
SKEWS = {"control": None, "ahead": "+1h", "behind": "-1h"}
SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
# The first is the default. The second is documented, but version 5.6.0 looks for a database of that
# name; the third is what it has instead: the databases in order, the first wins.
STRATEGIES = ("bucardo_latest", "bucardo_source", "{0} {1}")
PATIENCE_S, KICK_S, ECHO_S = 30, 1, 2


class Bucardo:
    """Three servers (one for Bucardo's own database, two with wrong clocks) in a new folder."""

    def __init__(self, folder: pathlib.Path):
        account = server_account(folder)
        folder.mkdir()
        if account.uid is not None:
            os.chown(folder, account.uid, account.gid)
        self._folder, self._account = folder, account.popen()
        self._env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "PGBINDIR": str(POSTGRES / "bin"),
            "LC_ALL": "C",
            "TZ": "UTC",
        }
        self.ports: dict[str, int] = {}
        self._servers: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Bucardo":
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for name in SKEWS:
                self._start_server(name)
            where = ("--dbhost", "127.0.0.1", "--dbport", str(self.ports["control"]))
            account = ("--dbuser", "postgres", "--dbname", "postgres")
            self.bucardo("install", "--batch", *where, *account, "--piddir", str(self._folder))
            files = ("reason_file", "warning_file", "log_conflict_file")
            self.bucardo("set", *(f"{name}={self._folder / name}" for name in files))
            stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops all that was started here, Bucardo first."""
        try:
            self.stop()
        finally:
            for name, process in self._servers.items():
                self._stop_server(name)
                process.wait()  # `faketime`, too, which ends with its server.

    def dsn(self, server: str, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.ports[server]}/{database}"

    def bucardo(self, verb: str, *words: str) -> str:
        """Runs a command of Bucardo's; returns what it said.

        Raises:
          SystemExit: it failed.
        """
        control = ("-h", "127.0.0.1", "-p", str(self.ports["control"]), "-d", "bucardo")
        if verb == "install":
            control = ()
        return self._run("bucardo", "--no-bucardorc", *control, verb, *words)

    def start(self) -> None:
        self.bucardo("start", f"--log-destination={self._folder}")
        until(self._daemon, PATIENCE_S, "Bucardo's daemon")

    def stop(self) -> None:
        """Asks the daemon to end; kills what has not within ten seconds."""
        family = self._daemon()
        if family:
            self.bucardo("stop")
            if not wait_gone(family, 10):
                for process in family:
                    kill_tree(process)

    def _daemon(self) -> list[ProcessId]:
        """The master, its controller and their kids."""
        try:
            said = (self._folder / "bucardo.mcp.pid").read_text()
            family = [identify(int(re.search(r"\d+", said)[0]))]
            command = pathlib.Path(f"/proc/{family[0].pid}/cmdline").read_text()
        except (OSError, AttributeError, TypeError):
            return []  # Not there, or no more.
        if not command.startswith("Bucardo"):
            return []
        for process in family:
            family += children_of(process.pid)
        return family

    def _start_server(self, name: str) -> None:
        data, skew = self._folder / name, SKEWS[name]
        self._run(
            POSTGRES / "bin/initdb", "-D", data, "--username=postgres", "--auth=trust",
            "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.ports[name] = free.getsockname()[1]
        settings = {**SETTINGS, "port": self.ports[name]}
        with (self._folder / f"{name}.log").open("wb") as log:
            self._servers[name] = subprocess.Popen(
                [
                    *(["faketime", "-f", skew] if skew else []),
                    *(POSTGRES / "bin/postgres", "-D", data),
                    *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
                ],
                **self._arguments(stderr=log, stdout=log),
            )
        until(lambda: self._answers(name), PATIENCE_S, f"server {name}")

    def _stop_server(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            pid = int((self._folder / name / "postmaster.pid").read_text().split()[0])
            server = identify(pid)
            if server and send(server, signal.SIGINT) and not wait_gone([server], 20):
                kill_tree(server)

    def _answers(self, name: str) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.dsn(name)).close()
            return True
        return False

    def _run(self, *command: str | pathlib.Path) -> str:
        said = self._folder / "said.txt"  # A file: the daemon keeps what it inherits open.
        with said.open("wb") as out:
            ended = subprocess.run(command, timeout=60, **self._arguments(stdout=out, stderr=out))
        text = said.read_text(errors="replace")
        if ended.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed: {text}")
        return text

    def _arguments(self, **files) -> dict:
        common = {"env": self._env, "cwd": self._folder, "stdin": subprocess.DEVNULL}
        common["start_new_session"] = True  # Ctrl-C is for us, who then stop them in order.
        return common | self._account | files


def measure(bench: Bucardo, strategy: str, servers: tuple[str, str]) -> tuple[int, int, float]:
    """Returns what diverged, what was lost, and seconds to heal (infinite: it did not)."""
    name = f"consult{time.monotonic_ns()}"
    sides = (f"{name}_0", f"{name}_1")
    conns = []
    for side, server in zip(sides, servers, strict=True):
        with psycopg.connect(bench.dsn(server), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")
        conn = psycopg.connect(bench.dsn(server, name), autocommit=True)
        conn.execute(f"CREATE TABLE {PLAN} (record_id text PRIMARY KEY, content text)")
        conn.execute(
            f"INSERT INTO {PLAN} SELECT 'r' || i, 'before' FROM generate_series(0, {ROWS - 1}) i"
        )
        conns.append(conn)
        where = ("host=127.0.0.1", f"port={bench.ports[server]}", "user=postgres")
        bench.bucardo("add", "db", side, f"dbname={name}", *where)
    bench.bucardo("add", "table", f"public.{PLAN}", f"db={sides[0]}", f"relgroup={name}")
    dbs = ",".join(f"{side}:source" for side in sides)
    rule = f"conflict_strategy={strategy.format(*sides)}"
    bench.bucardo("add", "sync", name, f"relgroup={name}", f"dbs={dbs}", rule)
    bench.start()
    _mark(conns, "before")
    until(lambda: _marked(conns, "before"), PATIENCE_S, "the sync carries rows both ways")
    bench.bucardo("deactivate", name, "20")
    for side, conn in enumerate(conns):
        change(
            side,
            lambda r, text, c=conn: c.execute(
                f"UPDATE {PLAN} SET content = %s WHERE record_id = %s", (text, r)
            ),
            lambda r, c=conn: c.execute(f"DELETE FROM {PLAN} WHERE record_id = %s", (r,)),
        )
    _mark(conns, "after")
    assert not any(_marked([conn], "after") for conn in conns)  # They are cut off.
    seconds = _heal(bench, name, conns)
    time.sleep(ECHO_S)
    diverged, lost = _count(conns)
    bench.bucardo("deactivate", name)  # The next one starts without it.
    bench.stop()
    for conn in conns:
        conn.close()
    return diverged, lost, seconds


def _heal(bench: Bucardo, name: str, conns: list[psycopg.Connection]) -> float:
    began = time.monotonic()
    bench.bucardo("activate", name, "20")
    while time.monotonic() < began + PATIENCE_S:
        bench.bucardo("kick", name)  # Again, should the first have found no controller.
        with contextlib.suppress(AssertionError):
            until(lambda: _marked(conns, "after"), KICK_S, "the markers")
            return time.monotonic() - began
    return float("inf")


def _mark(conns: list[psycopg.Connection], word: str) -> None:
    for side, conn in enumerate(conns):
        conn.execute(f"INSERT INTO {PLAN} VALUES (%s, '')", (f"marker {word} {side}",))


def _marked(conns: list[psycopg.Connection], word: str) -> bool:
    query = f"SELECT FROM {PLAN} WHERE record_id ^@ %s"
    return all(conn.execute(query, (f"marker {word}",)).rowcount == 2 for conn in conns)


def _count(conns: list[psycopg.Connection]) -> tuple[int, int]:
    found = [dict(conn.execute(f"SELECT * FROM {PLAN}").fetchall()) for conn in conns]
    diverged = lost = 0
    for i in range(ROWS):
        seen = {rows.get(f"r{i}") for rows in found}
        diverged += len(seen) > 1
        wanted = {"from 0", "from 1"} if i < UPDATED else {f"from {int(i >= UPDATED + DELETED)}"}
        lost += len(wanted - seen)
    return diverged, lost


def _refuse_what_is_missing() -> None:
    programs = [name for name in ("bucardo", "faketime") if shutil.which(name) is None]
    files = [POSTGRES / "bin/postgres", POSTGRES / "lib/plperl.so"]
    missing = [*programs, *(str(path) for path in files if not path.exists())]
    if missing:
        sys.exit(
            f"Not found: {', '.join(missing)}. Remedy, on Debian 12: "
            "`apt-get install bucardo postgresql-15 postgresql-plperl-15 faketime`."
        )


def main() -> None:
    _refuse_what_is_missing()
    with tempfile.TemporaryDirectory() as top:
        pathlib.Path(top).chmod(0o755)
        print(f"{ROWS} records, both sides changed while cut off  diverged  lost  seconds to heal")
        with Bucardo(pathlib.Path(top) / "bucardo") as bench:
            for strategy in STRATEGIES:
                for servers in (("ahead", "behind"), ("behind", "ahead")):
                    diverged, lost, seconds = measure(bench, strategy, servers)
                    what = f"{strategy.format(0, 1)}, 0's clock {servers[0]}"
                    print(f"  {what:48}  {diverged:8}  {lost:4}  {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
