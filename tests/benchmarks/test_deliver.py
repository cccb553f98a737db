"""Rows a second into a consult store, where the time goes, and native replication beside it.

Wall time of a busy machine says little: `backend_cpu_s_per_million_rows` is what the server's
process used, and the figure to compare.
"""

import collections
import itertools
import os
import time

import psycopg
import pytest

from runners.embedded.postgres import PostgresServer
from schemas.batches import ChangeBatch, Lane, Op
from schemas.positions import SEQ_END, START, Position
from tests.canonical import COMMIT_US, rows_of
from tests.deliveries import LINK, batch_of, lab_results
from transforms.deliver import delivery, ledger
from transforms.deliver.merging import merge, merge_wire
from transforms.deliver.store import Store

ROWS = 20_000
BATCHES = 8
SETTINGS = {
    "wal_level": "logical",
    "synchronous_commit": "off",
    "wal_writer_delay": "10ms",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "autovacuum": "off",
}
# The table of the comparison with the peers: 13 columns, about 250 bytes a row.
NATIVE = """id bigint PRIMARY KEY, patient_id text, visit_id text, item_code text, value numeric,
 unit text, ref_low numeric, ref_high numeric, abnormal_flag text, specimen_time timestamptz,
 reported_at timestamptz, reporter text, note text"""
NATIVE_ROW = """SELECT g, 'P' || mod(g * 7919, 20000), 'V' || mod(g * 7919, 40000), '2345-7',
 4 + mod(g, 30) / 10.0, 'mmol/L', 3.9, 6.1, 'N', now(), now(), 'D' || mod(g, 100),
 repeat('正常范围内。', 4) || g FROM generate_series(%s::bigint, %s::bigint) AS g"""
_names = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PostgresServer(tmp_path_factory.mktemp("deliver") / "store", settings=SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with PostgresServer(tmp_path_factory.mktemp("deliver") / "source", settings=SETTINGS) as made:
        yield made


@pytest.fixture
def store(server):
    dsn = server.create_database(f"consult_{next(_names)}")
    made = Store(dsn, LINK, "main", None, lambda: COMMIT_US)
    made.apply([batch_of({}, START, Position(1, SEQ_END))], Lane.ROUTINE)  # Connects, compiles.
    yield made
    made.close()


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def log(op: Op, begin: Position, value: str, count: int = BATCHES) -> list[ChangeBatch]:
    batches = []
    for i in range(count):
        rows = lab_results(i * ROWS, ROWS, begin.lsn + 1, op, value)
        batches.append(batch_of({"lab_result": rows}, begin))
        begin = batches[-1].end
    return batches


class Split:
    """Wall seconds by step of `Store.apply`; encoding lies within copying, as it overlaps it."""

    STEPS = (
        ("verify", Store, "_is_sound"),
        ("compact", delivery, "compact"),
        ("encode", merge_wire, "_encoded"),
        ("copy", merge.TableMerger, "_copy"),
        ("copy and merge", merge.TableMerger, "merge"),
        ("ledger", ledger, "lock"),
        ("ledger", delivery.Delivery, "finish"),
    )

    def __init__(self, monkeypatch):
        self.seconds = collections.Counter()
        for name, owner, attribute in self.STEPS:
            monkeypatch.setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def _timed(self, name, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


@pytest.mark.parametrize("kind", ["insert", "update", "delete", "duplicate"])
def test_apply(benchmark, store, kind, monkeypatch):
    """One batch of 20,000 laboratory results a round."""
    inserts = log(Op.INSERT, Position(1, SEQ_END), "5.3")
    ops = {"update": Op.UPDATE, "delete": Op.DELETE, "duplicate": Op.INSERT}
    batches = inserts
    if kind != "insert":
        for batch in inserts:
            store.apply([batch], Lane.ROUTINE)
        store._conn.execute("VACUUM ANALYZE consult.lab_result")
        begin = inserts[-1].end if kind != "duplicate" else START
        batches = log(ops[kind], begin, "6.25")
    lane = Lane.ROUTINE
    if kind == "duplicate":
        # The same positions in the other lane: looked at, and not written.
        lane = Lane.EMERGENCY
        batches = [_in_emergency_lane(batch) for batch in inserts]
        store.apply([batch_of({}, START, batches[0].begin, lane)], lane)
    split = Split(monkeypatch)
    pid = store._conn.info.backend_pid
    left = iter(batches)
    before_s = cpu_s(pid)
    benchmark.pedantic(
        lambda batch: store.apply([batch], lane),
        setup=lambda: ((next(left),), {}),
        rounds=BATCHES,
    )
    rows = BATCHES * ROWS
    benchmark.extra_info["rows_per_s"] = round(ROWS / benchmark.stats.stats.median)
    used_s = cpu_s(pid) - before_s
    benchmark.extra_info["backend_cpu_s_per_million_rows"] = round(used_s / rows * 1e6, 2)
    for name, seconds in split.seconds.items():
        benchmark.extra_info[f"{name}_ms_per_batch"] = round(seconds / BATCHES * 1e3, 1)
    counts = store._conn.execute(
        "SELECT delivered, duplicates FROM sync.progress WHERE lane = %s", (lane.value,)
    ).fetchone()
    assert counts == {"insert": (rows, 0), "duplicate": (0, rows)}.get(kind, (2 * rows, 0))


def _in_emergency_lane(batch: ChangeBatch) -> ChangeBatch:
    return batch_of(batch.tables, batch.begin, batch.end, Lane.EMERGENCY)


@pytest.mark.parametrize("index", ["none", "by patient"])
def test_price_of_the_patient_index(benchmark, store, index):
    if index == "none":
        store._conn.execute("DROP INDEX consult.lab_result_patient")
    left = iter(log(Op.INSERT, Position(1, SEQ_END), "5.3"))
    pid = store._conn.info.backend_pid
    before_s = cpu_s(pid)
    benchmark.pedantic(
        lambda batch: store.apply([batch], Lane.ROUTINE),
        setup=lambda: ((next(left),), {}),
        rounds=BATCHES,
    )
    used_s = (cpu_s(pid) - before_s) / (BATCHES * ROWS)
    benchmark.extra_info["backend_cpu_s_per_million_rows"] = round(used_s * 1e6, 2)


@pytest.mark.parametrize("kind", ["insert", "update"])
def test_native_apply(benchmark, server, source, kind):
    """The apply worker of a subscription on a table of 13 columns, transactions of 1000 rows."""
    name = f"native_{next(_names)}"
    rows = BATCHES * ROWS
    with (
        psycopg.connect(source.create_database(name), autocommit=True) as here,
        psycopg.connect(server.create_database(name), autocommit=True) as there,
    ):
        for conn in (here, there):
            conn.execute(f"CREATE TABLE lab_result ({NATIVE})")
        there.execute("CREATE INDEX ON lab_result (patient_id)")  # As a consult store has one.
        here.execute(f"CREATE PUBLICATION {name} FOR TABLE lab_result")
        there.execute(
            f"CREATE SUBSCRIPTION {name} CONNECTION '{here.info.dsn}' PUBLICATION {name}"
            " WITH (copy_data = false)"
        )
        _fill(here, rows)
        if kind == "update":
            _drain(here, there, name)
            there.execute("VACUUM ANALYZE lab_result")
            there.execute(f"ALTER SUBSCRIPTION {name} DISABLE")
            for first in range(1, rows, 1000):
                here.execute(
                    "UPDATE lab_result SET value = value + 1, reported_at = now()"
                    " WHERE id BETWEEN %s AND %s",
                    (first, first + 999),
                )
            there.execute(f"ALTER SUBSCRIPTION {name} ENABLE")
        used = []
        benchmark.pedantic(lambda: used.append(_drain(here, there, name)), rounds=1)
        benchmark.extra_info["rows_per_s"] = round(rows / benchmark.stats.stats.median)
        benchmark.extra_info["backend_cpu_s_per_million_rows"] = round(used[0] / rows * 1e6, 2)
        there.execute(f"DROP SUBSCRIPTION {name}")


def _fill(conn: psycopg.Connection, rows: int) -> None:
    for first in range(1, rows, 1000):
        conn.execute(f"INSERT INTO lab_result {NATIVE_ROW}", (first, first + 999))


def _drain(here: psycopg.Connection, there: psycopg.Connection, name: str) -> float:
    """Waits until all is applied; returns the apply worker's CPU seconds."""
    end = here.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0]
    used_s = 0.0
    while True:
        worker = there.execute(
            "SELECT pid FROM pg_stat_subscription WHERE subname = %s AND pid IS NOT NULL", (name,)
        ).fetchone()
        if worker is not None:
            used_s = cpu_s(worker[0])
        done = here.execute(
            "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots"
            " WHERE slot_name = %s",
            (end, name),
        ).fetchone()
        if done is not None and done[0]:
            return used_s
        time.sleep(0.005)


def test_emergency_of_five_rows_in_two_tables(benchmark, store):
    left = iter(range(1, 1000))

    def next_batch():
        i = next(left)
        vitals = [{"record_id": f"{i}-{k}", "pulse_per_min": 80} for k in range(2)]
        results = [{"record_id": f"{i}-{k}", "value": "5.1"} for k in range(3)]
        tables = {
            name: rows_of(name, [{**row, "_lsn": i, "_seq": k + at} for k, row in enumerate(rows)])
            for name, rows, at in (("vital_sign", vitals, 1), ("lab_result", results, 4))
        }
        begin = Position(i - 1, SEQ_END) if i > 1 else START
        return ((batch_of(tables, begin, lane=Lane.EMERGENCY),), {})

    benchmark.pedantic(
        lambda batch: store.apply([batch], Lane.EMERGENCY),
        setup=next_batch,
        rounds=300,
        warmup_rounds=20,
    )
    benchmark.extra_info["p50_ms"] = round(benchmark.stats.stats.median * 1e3, 2)
