"""Measure one link's delivery with sets written to several stores beside without.

`python -m tests.benchmarks.sets`: the pipeline's own delivery functions, batches of lab_result made
by hand, real servers with their default durability. Rates are of the first link, which writes for
all, and of the second, which finds the rows; latencies of one report of three items in the
emergency lane, idle and while the routine lane writes.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import threading
import time

import psycopg

from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from schemas.batches import Lane
from schemas.entities import TABLES
from schemas.links import LinkSettings, SetSettings
from schemas.panes import RoutinePane, Timing
from schemas.positions import SEQ_END, Position
from tests.deliveries import batch_of, lab_results, resealed
from transforms.deliver import store_schema
from transforms.deliver.deliver import DeliverEmergency, DeliverRoutine
from transforms.two_phase.mariadb_branch import mariadb_ddl

PANE_ROWS = 10_000
SETTINGS = {"max_prepared_transactions": 64, "max_wal_size": "4GB", "shared_buffers": "256MB"}


class Bench:
    """Three servers, and links of one source that are made anew for each measurement."""

    def __init__(self, stack: contextlib.ExitStack, folder: pathlib.Path):
        self._numbers = 0
        self.servers = {
            name: stack.enter_context(PostgresServer(folder / name, settings=SETTINGS))
            for name in ("primary", "east")
        }
        self.west = MariaDbServer(folder / "west")
        stack.callback(self.west.remove)
        self.west.start()

    def links(self, with_sets: bool, with_west: bool) -> dict[str, LinkSettings]:
        """Returns settings of links into empty stores."""
        self._numbers += 1
        name, dsns = f"consult{self._numbers}", {}
        for store, server in self.servers.items():
            dsns[store] = server.create_database(name)
            with psycopg.connect(dsns[store], autocommit=True) as conn:
                store_schema.ensure(conn)
        with self.west.connect() as conn, conn.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
            cursor.execute(f"USE {name}")
            for table in TABLES.values():
                cursor.execute(mariadb_ddl(table))
        sets = SetSettings(
            tables=(("lab_report", "lab_result"),),
            degrade=False,
            deadline_s=30,
            log_dsn=dsns["primary"],
            stores=tuple(dsns.items()),
            branches=(("west", self.west.dsn(name)),) if with_west else (),
        )
        return {
            store: LinkSettings(
                name=f"main>{store}", source="main", store=store, source_dsn=name, store_dsn=dsn,
                slot="", publication="", mapping="", rules="", key_ref="env:NONE",
                sets=sets if with_sets else None,
            )
            for store, dsn in dsns.items()
        }  # fmt: skip


def routine(settings: LinkSettings, rows: int, per_commit: int) -> float:
    """Delivers `rows` results in panes; returns rows a second, after a first pane."""
    fn = DeliverRoutine(settings)._fn
    fn.setup()
    begin, began = Position(0, SEQ_END), 0.0
    panes = [
        lab_results(first, PANE_ROWS, 1 + first // per_commit, per_commit=per_commit)
        for first in range(0, rows + PANE_ROWS, PANE_ROWS)
    ]
    batches = []
    for part in panes:
        batch = resealed(batch_of({"lab_result": part}, begin), link=settings.name)
        batches.append(batch)
        begin = batch.end
    for i, batch in enumerate(batches):
        began = time.monotonic() if i == 1 else began
        pane = RoutinePane(settings.name, 0, 0, Timing.EARLY, (batch,), 0)
        (receipt,) = fn.process((settings.name, pane))
        assert receipt.counts.captured == PANE_ROWS
    took = time.monotonic() - began
    fn.teardown()
    return rows / took


def emergencies(settings: LinkSettings, count: int, first: int) -> list[float]:
    """Delivers reports of three items one by one; returns how long each took, seconds."""
    fn = DeliverEmergency(settings)._fn
    fn.setup()
    begin, took = Position(0, SEQ_END), []
    for number in range(count):
        rows = lab_results(first + 3 * number, 3, 100 * first + number)
        batch = batch_of({"lab_result": rows}, begin, lane=Lane.EMERGENCY)
        batch = resealed(batch, link=settings.name)
        begin = batch.end
        began = time.monotonic()
        (receipt,) = fn.process(batch)
        took.append(time.monotonic() - began)
        assert receipt.counts.delivered == 3
        time.sleep(0.02)
    fn.teardown()
    return sorted(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    rows = parser.parse_args().rows
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        bench = Bench(stack, folder)
        for words, with_sets, with_west in (
            ("off", False, False),
            ("on, two PostgreSQL", True, False),
            ("on, and a MariaDB", True, True),
        ):
            for per_commit in (1000, 1):
                links = bench.links(with_sets, with_west)
                rates = [routine(links[name], rows, per_commit) for name in ("east", "primary")]
                print(
                    f"sets {words}: {per_commit}-row transactions, first link {rates[0]:,.0f} "
                    f"rows/s, second {rates[1]:,.0f}",
                    flush=True,
                )
            links = bench.links(with_sets, with_west)
            idle = emergencies(links["east"], 60, 1_000_000)
            again = links["east"]
            writer = threading.Thread(target=routine, args=(links["east"], rows, 1000))
            writer.start()
            time.sleep(1.0)
            busy = emergencies(again, 40, 2_000_000)
            writer.join()
            for when, took in (("idle", idle), ("while routine is written", busy)):
                print(
                    f"sets {words}: emergency {when}, p50 {statistics.median(took) * 1e3:.0f} ms, "
                    f"longest of {len(took)} {took[-1] * 1e3:.0f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
