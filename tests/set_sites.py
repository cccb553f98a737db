"""A source that feeds two stores and a MariaDB, sets of rows in it, and links that deliver them."""

import collections
import functools
import os
import pathlib
import random
import signal
import sys
import threading
import time
import typing

import psycopg
import pymysql

from runners.embedded.mariadb import MariaDbServer
from runners.embedded.world import READER
from schemas.batches import ChangeBatch, Lane
from schemas.config import PRIMARY, load
from schemas.entities import TABLES
from schemas.links import LinkSettings
from schemas.panes import RoutinePane, Timing
from schemas.receipts import Receipt
from tests.faults.harness import Link, Site
from transforms.deliver.deliver import DeliverEmergency, DeliverRoutine
from transforms.deliver.sets import write_sets
from transforms.two_phase.apply_together import apply_together
from transforms.two_phase.branches import APPLICATION
from transforms.two_phase.mariadb_branch import mariadb_ddl

ROOT = pathlib.Path(__file__).parents[1]
WEST = "west"  # The MariaDB.
LINE = (
    "INSERT INTO his.prescription (rx_no, line_no, mrn, drug_name, dose, dose_unit, status,"
    " prescribed_at, updated_at) VALUES (%s, %s, %s, '阿莫西林', %s, 'g', 'active', now(), now())"
)
RESULT = (
    "INSERT INTO lis.result (result_id, mrn, loinc, item_name, val_num, unit, status, result_at,"
    " updated_at) VALUES (gen_random_uuid(), %s, '2823-3', %s, %s, 'mmol/L', 'final', now(),"
    " now())"
)


def prescribe(hospital: psycopg.Connection, number: str, doses=("0.5", "0.5", "0.5"), mrn="M1"):
    """Commits a prescription with a line for each dose."""
    with hospital.transaction():
        for line, dose in enumerate(doses, 1):
            hospital.execute(LINE, (number, line, mrn, dose))


class SetSite(Site):
    """`main` feeds `primary` and `east`; `west`, a MariaDB, is fed by sets alone.

    Args:
      west: a running server.
    """

    def __init__(self, folder, source, stores, west: MariaDbServer, name: str, **two_phase):
        self.west = west
        super().__init__(folder, source, stores, name)
        database = f"consult{name}"
        with west.connect() as conn, conn.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {database}")
            cursor.execute(f"USE {database}")
            for table in TABLES.values():
                cursor.execute(mariadb_ddl(table))
            cursor.execute(f"CREATE USER IF NOT EXISTS {READER}@'%'")
            cursor.execute(f"GRANT SELECT, INSERT, UPDATE ON {database}.* TO {READER}@'%'")
        self.configure(**two_phase)

    def configure(self, **two_phase) -> None:
        """Writes campuses.yaml with these settings of `two_phase`."""
        branches = {WEST: self.west.dsn(f"consult{self.name}", READER)}
        given = {"mode": "refuse", "deadline_s": 5, "branches": branches}
        given["sets"] = ["prescription", "lab_report"]
        self.write_config(two_phase=given | two_phase)

    def settings(self, store: str = PRIMARY) -> LinkSettings:
        """Returns a link's settings, its slot named as `status` looks for it."""
        (link,) = (link for link in self.config.links() if link.store == store)
        return self.config.settings(link)

    @property
    def servers(self) -> dict[str, typing.Any]:
        return {**self.store_servers, WEST: self.west}

    def ask(self, name: str, statement: str) -> list[tuple]:
        """Asks a store, in which tables stand without a schema's name in MariaDB."""
        if name == WEST:
            with self.west.connect(f"consult{self.name}") as conn, conn.cursor() as cursor:
                cursor.execute(statement.replace("consult.", ""))
                return list(cursor.fetchall())
        with self.store(name) as connection:
            return connection.execute(statement).fetchall()

    def lines(self, name: str) -> dict[str, set[int]]:
        """Returns the lines that a store has of each prescription."""
        query = "SELECT prescription_no, line_no FROM consult.prescription WHERE NOT deleted"
        found = collections.defaultdict(set)
        for number, line in self.ask(name, query):
            found[number].add(int(line))
        return dict(found)

    def content(self) -> dict[str, list[tuple]]:
        """Returns what each store has of the tables of sets: (table, record, place, deleted)."""
        query = " UNION ALL ".join(
            f"SELECT '{table}', record_id, src_lsn, src_seq, deleted FROM consult.{table}"
            for table in ("prescription", "lab_result", "lab_report")
        )
        return {
            name: sorted((*row[:4], bool(row[4])) for row in self.ask(name, query))
            for name in self.servers
        }

    def prepared(self) -> list:
        """Returns what any store holds prepared."""
        found = [self.ask(name, "SELECT gid FROM pg_prepared_xacts") for name in self.store_servers]
        with self.west.connect() as conn, conn.cursor() as cursor:
            cursor.execute("XA RECOVER")
            return [*found[0], *found[1], *cursor.fetchall()]

    def quiet(self) -> bool:
        """Whether no session of a coordinator lives any more."""
        sessions = f"SELECT FROM pg_stat_activity WHERE application_name = '{APPLICATION}'"
        with self.west.connect() as conn, conn.cursor() as cursor:
            query = "SELECT 1 FROM information_schema.processlist WHERE user = %s"
            alive = cursor.execute(query, (READER,))
        return not (alive or any(self.ask(name, sessions) for name in self.store_servers))


class SetLink(Link):
    """A link whose lanes are delivered as the pipeline does, by its own functions."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.receipts: list[Receipt] = []

    def _apply(self, lane: Lane, chance: random.Random) -> None:
        verb = DeliverEmergency if lane is Lane.EMERGENCY else DeliverRoutine
        fn = verb(self._settings)._fn
        fn.setup()
        while not self._stopping.is_set():
            for element in self._elements(self._arrived(lane, chance), lane):
                self.receipts += fn.process(element)
        fn.teardown()

    def _elements(self, batches: list[ChangeBatch], lane: Lane):
        if lane is Lane.EMERGENCY:
            return batches
        name = self._settings.name
        pane = RoutinePane(name, 0, 0, Timing.EARLY, tuple(batches), 0)
        return [(name, pane)] if batches else []


class Watcher:
    """Looks at all stores again and again, in a thread, for prescriptions that are not whole.

    `partial` is what was seen of them: (store, number, lines). `forbidden` numbers are not to be
    seen anywhere: `broken` is where they were.
    """

    def __init__(self, site: SetSite, whole: dict[str, set[int]]):
        self._site, self._whole = site, whole
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.forbidden: set[str] = set()
        self.partial: list[tuple] = []
        self.broken: list[tuple] = []
        self.looks = 0

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(0.002):
            forbidden = set(self.forbidden)
            for name in self._site.servers:
                try:
                    found = self._site.lines(name)
                except (psycopg.OperationalError, pymysql.Error, OSError):
                    continue  # It is down.
                self.looks += 1
                for number, lines in found.items():
                    if lines != self._whole.get(number, lines):
                        self.partial.append((name, number, lines))
                    # One that was allowed meanwhile may have come meanwhile.
                    if number in forbidden and number in self.forbidden:
                        self.broken.append((name, number, lines))


def serve(path: str, die_at: str, times: int) -> None:
    """Runs all links of a configuration, and dies when a step was reached so often."""
    left = times

    def reached(step: str) -> None:
        nonlocal left
        if step == die_at:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    write_sets.apply_together = functools.partial(apply_together, reached=reached)
    config = load(path)
    links = [SetLink(config.settings(link)) for link in config.links()]
    for link in links:
        link.__enter__()
    print("ready", flush=True)
    while True:
        time.sleep(1)
        for link in links:
            if link.errors:
                raise link.errors[0]


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
