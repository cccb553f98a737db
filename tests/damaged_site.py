"""A campus with two stores that tests damage while its links run and traffic flows."""

import contextlib
import random
import threading

import psycopg
import pytest

from pipelines.reconcile import Task
from runners.embedded.postgres import PostgresServer
from runners.embedded.traffic import Traffic
from runners.reconcile import run_direct, run_task
from tests.faults.harness import Link, Site
from transforms.sign_report import ReportKey

FIRST = 900_000_000_000  # Keys that no traffic uses.
VITALS = """\
INSERT INTO his.vital_sign (vital_id, mrn, visit_no, temp_c, pulse, sbp, measured_at)
SELECT %s + i, 'X' || i, 'V' || i, 36.5, 70 + i %% 20, 120, timestamptz '2026-01-01 08:00+08'
FROM generate_series(1, %s) i"""


@pytest.fixture(scope="module")
def second_server(tmp_path_factory):
    with PostgresServer(tmp_path_factory.mktemp("second") / "server", durable=False) as server:
        yield server


class Damaged:
    """A site with two stores, its links running, and what a test does to the stores."""

    def __init__(self, site: Site, seed: int):
        self.site, self.chance = site, random.Random(seed)
        ReportKey(site.config.report_key).make()
        self.free = [str(FIRST + i) for i in range(1, 301)]
        self.chance.shuffle(self.free)

    def take(self, count: int) -> list[str]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def store(self, name: str) -> psycopg.Connection:
        connection = self.site.store_servers[name].connect(f"consult{self.site.name}")
        connection.execute("SET session_replication_role = replica")  # As a disk would: untold.
        return connection

    def damage(self, name: str) -> dict[str, int]:
        """Damages a store's vital signs; returns how many rows of each kind."""
        with self.store(name) as store:
            store.execute(
                "DELETE FROM consult.vital_sign WHERE record_id = ANY (%s)", [self.take(3)]
            )
            for record_id in self.take(2):
                bit = 1 << self.chance.randrange(4)  # A digit stays a character.
                store.execute(
                    "UPDATE consult.vital_sign SET patient_id = overlay(patient_id PLACING"
                    " chr(ascii(right(patient_id, 1)) # %s) FROM length(patient_id))"
                    " WHERE record_id = %s",
                    [bit, record_id],
                )
            store.execute(
                "UPDATE consult.vital_sign SET digest = set_bit(digest, %s,"
                " 1 - get_bit(digest, %s)) WHERE record_id = %s",
                [bit := self.chance.randrange(256), bit, *self.take(1)],
            )
            store.execute(
                "CREATE TEMP TABLE ghost AS SELECT * FROM consult.vital_sign WHERE record_id = %s",
                self.take(1),
            )
            store.execute("UPDATE ghost SET record_id = 'ghost-' || record_id")
            store.execute("INSERT INTO consult.vital_sign SELECT * FROM ghost")
        return {"missing": 3, "different": 2, "rotten": 1, "extra": 1}

    def run(self, folder, **task):
        folder.mkdir()
        return run_task(self.site.config, Task(settle_s=60, **task), folder, run_direct)


@pytest.fixture
def made(request, tmp_path, postgres_server, second_server):
    seed = getattr(request, "param", 1)
    name = f"_{request.node.originalname[5:25]}_{seed}"
    stores = {"primary": postgres_server, "main": second_server}
    site = Site(tmp_path, postgres_server, stores, name)
    try:
        with contextlib.ExitStack() as stack:
            with site.hospital() as hospital:
                hospital.execute(VITALS, [FIRST, 300])
            for store in stores:
                stack.enter_context(Link(site.settings(store)))
            site.drain()
            yield Damaged(site, seed)
    finally:
        with site.administrator() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE active_pid IS NOT NULL AND slot_name LIKE '%%' || %s",
                [name],
            )
        slots = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
        with contextlib.suppress(psycopg.Error), site.administrator() as connection:
            connection.execute(slots + " WHERE slot_name LIKE '%%' || %s", [name])


@contextlib.contextmanager
def traffic(site: Site, seed: int):
    """Changes flow meanwhile; leaves when they have all been written."""
    with Traffic(site.config, seed=seed) as hospital:
        hospital.preload(patients=30)
        going = threading.Event()

        def work() -> None:
            while not going.is_set():
                hospital.run(rate=150, seconds=1)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            going.set()
            thread.join()
