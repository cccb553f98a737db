"""Three stores of two makes with the coordinator's log, and processes that are killed at a step."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import psycopg

from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from runners.embedded.world import READER
from schemas.entities import TABLES
from tests.canonical import rows_of
from tests.faults.harness import until
from transforms.checksum import with_digests
from transforms.deliver import store_schema
from transforms.two_phase.apply_together import apply_together
from transforms.two_phase.branches import APPLICATION
from transforms.two_phase.decision_log import DecisionLog
from transforms.two_phase.mariadb_branch import MariaDbBranch, mariadb_ddl
from transforms.two_phase.postgresql_branch import PostgresBranch
from transforms.two_phase.recover import Recovered, recover
from transforms.two_phase.states import OnBranchDown
from transforms.two_phase.writes import RowSet

ROOT = pathlib.Path(__file__).parents[1]
PREPARED = {"max_prepared_transactions": 64}
WRITTEN = ("lab_report", "lab_result", "prescription")


def sets_of(number: int) -> list[RowSet]:
    """A new prescription of three lines, and a report with two items as of its next version."""

    def rows(table: str, given: list[dict]):
        full = [{"_lsn": number, "patient_id": "P1"} | row for row in given]
        return with_digests(TABLES[table], rows_of(table, full))

    lines = [
        {"record_id": f"{number}-{i}", "prescription_no": str(number), "line_no": i, "dose": "0.5"}
        for i in (1, 2, 3)
    ]
    items = [{"record_id": f"R-{i}", "item_name": "葡萄糖", "value": f"5.{number}"} for i in (1, 2)]
    report = {
        "lab_report": rows("lab_report", [{"record_id": "R", "name": f"血生化 {number}"}]),
        "lab_result": rows("lab_result", items),
    }
    return [RowSet("main", {"prescription": rows("prescription", lines)}), RowSet("main", report)]


class Sites:
    """`primary` with the log and `east` on PostgreSQL, `west` on MariaDB."""

    def __init__(self, primary: PostgresServer, east: PostgresServer, west: MariaDbServer):
        self.servers = {"east": east, "primary": primary, "west": west}
        self.dsns = {}
        for name in ("east", "primary"):
            server = self.servers[name]
            with server.connect() as conn:
                conn.execute(f"CREATE ROLE {READER} LOGIN")
                conn.execute(f"CREATE DATABASE consult OWNER {READER}")
            self.dsns[name] = server.dsn("consult", READER)
            with psycopg.connect(self.dsns[name], autocommit=True) as conn:
                store_schema.ensure(conn)
        with west.connect() as conn, conn.cursor() as cursor:
            cursor.execute("CREATE DATABASE consult")
            cursor.execute("USE consult")
            for table in TABLES.values():
                cursor.execute(mariadb_ddl(table))
            cursor.execute(f"CREATE USER {READER}@'%'")
            cursor.execute(f"GRANT SELECT, INSERT, UPDATE ON consult.* TO {READER}@'%'")
        self.dsns["west"] = west.dsn("consult", READER)

    def ask(self, statement: str, name: str) -> list[tuple]:
        """Asks a server as its administrator."""
        if name == "west":
            with self.servers[name].connect("consult") as conn, conn.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall())
        with self.servers[name].connect("consult") as conn:
            cursor = conn.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def recover(self, **given) -> Recovered:
        with contextlib.closing(DecisionLog(self.dsns["primary"])) as log:
            return recover(log, branches_of(self.dsns), **given)

    def apply(self, number: int, policy=OnBranchDown.REFUSE, **given):
        with contextlib.closing(DecisionLog(self.dsns["primary"])) as log:
            sets = given.pop("sets", None) or sets_of(number)
            return apply_together(log, sets, branches_of(self.dsns), policy, **given)

    def pass_deadline(self) -> None:
        self.ask("UPDATE sync.two_phase SET deadline = now() WHERE state = 'preparing'", "primary")

    def start(self) -> None:
        for server in self.servers.values():
            server.start()

    def clear(self) -> None:
        """Takes all rows away, of stores and log."""
        for name in ("east", "primary"):
            tables = ", ".join(f"consult.{table}" for table in WRITTEN)
            self.ask(f"TRUNCATE {tables}, sync.two_phase CASCADE", name)
        for table in WRITTEN:
            self.ask(f"TRUNCATE {table}", "west")

    def quiet(self) -> bool:
        """Whether no session of a coordinator lives any more."""
        sessions = f"SELECT FROM pg_stat_activity WHERE application_name = '{APPLICATION}'"
        return not (
            any(self.ask(sessions, name) for name in ("east", "primary"))
            or self.ask(
                f"SELECT 1 FROM information_schema.processlist WHERE user = '{READER}'", "west"
            )
        )

    def heal(self) -> None:
        """Everything runs again, the deadline passes, recovery works until it has nothing left."""
        self.start()
        until(self.quiet, 30, "sessions of a dead coordinator end")
        self.pass_deadline()
        until(lambda: self.recover().clean, 30, lambda: repr(self.recover()))

    def content(self) -> list[tuple]:
        """Asserts that all stores hold the same; returns (table, record_id, src_lsn)."""
        found = []
        for name in self.servers:
            prefix = "" if name == "west" else "consult."
            query = " UNION ALL ".join(
                f"SELECT '{table}', record_id, src_lsn FROM {prefix}{table}" for table in WRITTEN
            )
            found.append(sorted(self.ask(query, name)))
        assert found[0] == found[1] == found[2]
        return found[0]

    def assert_free(self) -> None:
        """Asserts that nothing is prepared, no row is locked and the log is finished."""
        for name in ("east", "primary"):
            assert not self.ask("SELECT gid FROM pg_prepared_xacts", name)
            assert not self.ask("SELECT FROM pg_locks WHERE pid IS NULL", name)
            with self.servers[name].connect("consult") as conn, conn.transaction():
                conn.execute("SET LOCAL lock_timeout = '500ms'")
                for table in WRITTEN:
                    conn.execute(f"SELECT FROM consult.{table} FOR UPDATE")
        assert not self.ask("XA RECOVER", "west")
        held = self.servers["west"].connect("consult", autocommit=False)
        with held as conn, conn.cursor() as cursor:
            cursor.execute("SET innodb_lock_wait_timeout = 1")
            for table in WRITTEN:
                cursor.execute(f"SELECT record_id FROM {table} FOR UPDATE")
        unfinished = "state NOT IN ('committed', 'aborted') OR content IS NOT NULL"
        assert not self.ask(f"SELECT id FROM sync.two_phase WHERE {unfinished}", "primary")


def branches_of(dsns: dict[str, str]) -> list:
    """Returns a branch for each connection string."""
    return [
        (MariaDbBranch if dsn.startswith("mariadb") else PostgresBranch)(name, dsn, 5.0)
        for name, dsn in dsns.items()
    ]


class Coordinators:
    """Processes that each do one thing and are killed at one step of it: `tests.two_phase_sites`.

    They are forked from one that has loaded the modules, which takes it seconds.
    """

    def __enter__(self) -> "Coordinators":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.two_phase_sites"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, dsns: dict[str, str], number: int, policy: str, die_at: str) -> bool:
        """Writes set `number`, or recovers for 0; returns whether it was killed on its way."""
        task = {"dsns": dsns, "number": number, "policy": policy, "die_at": die_at}
        print(json.dumps(task), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        assert answer in ("killed", "ended"), answer
        return answer == "killed"


def _work(task: dict) -> None:
    def reached(step: str) -> None:
        if step == task["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    log, branches = DecisionLog(task["dsns"]["primary"]), branches_of(task["dsns"])
    if task["number"]:
        policy = OnBranchDown(task["policy"])
        apply_together(log, sets_of(task["number"]), branches, policy, 60.0, reached=reached)
    else:
        recover(log, branches, reached=reached)


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _work(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        ended = "ended" if status == 0 else "failed"
        print("killed" if died else ended, flush=True)


if __name__ == "__main__":
    _serve()
