"""Measure the whole pipeline on Flink beside PostgreSQL's native logical replication.

Same two servers' settings, same table, same transactions, one after the other in one run:
`python -m tests.benchmarks.beside_native [--rows N] [--json]`. A drain is timed between two
marker rows, at a tenth and at the end of a backlog made while nobody read; live lag is the
commit-to-visible time of single rows at a given rate, polled in the destination by key.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import psycopg

from runners.embedded.postgres import PostgresServer

SETTINGS = {
    "wal_level": "logical",
    "synchronous_commit": "off",
    "wal_writer_delay": "10ms",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "autovacuum": "off",
}
COLUMNS = """id bigint PRIMARY KEY, patient_id text, visit_id text, item_code text, value numeric,
 unit text, ref_low numeric, ref_high numeric, abnormal_flag text, specimen_time timestamptz,
 reported_at timestamptz, reporter text, note text"""
ROW = """SELECT g, 'P' || mod(g, 1000), 'V' || mod(g, 5000), '14749-6', 4 + mod(g, 30) / 10.0,
 'mmol/L', 3.9, 6.1, 'N', now(), now(), 'D' || mod(g, 100),
 repeat('正常范围内。', 4) || g FROM generate_series"""
HERE = pathlib.Path(__file__).parent


class Side:
    """A destination: where its rows are seen, and how its reading is started and stopped."""

    name: str
    seen_sql: str
    server: PostgresServer
    database: str

    def visible(self, connection: psycopg.Connection, row_id: int, note: str | None) -> bool:
        row = connection.execute(self.seen_sql, [str(row_id)]).fetchone()
        return row is not None and (note is None or row[0] == note)


class Native(Side):
    """CREATE SUBSCRIPTION, binary off as by default."""

    name = "native"
    seen_sql = "SELECT note FROM lab WHERE id = %s::bigint"

    def __init__(self, source: PostgresServer, server: PostgresServer):
        self.source, self.server, self.database = source, server, "native"
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE native")
        with psycopg.connect(server.dsn("native"), autocommit=True) as connection:
            connection.execute(f"CREATE TABLE lab ({COLUMNS})")
            connection.execute(
                f"CREATE SUBSCRIPTION bench CONNECTION '{source.dsn('his')}' PUBLICATION bench"
                " WITH (enabled = false, create_slot = true, slot_name = 'native',"
                " connect = true, copy_data = false)"
            )

    def _switch(self, action: str) -> None:
        with psycopg.connect(self.server.dsn("native"), autocommit=True) as connection:
            connection.execute(f"ALTER SUBSCRIPTION bench {action}")

    def start(self) -> None:
        self._switch("ENABLE")

    def stop(self) -> None:
        self._switch("DISABLE")

    def close(self) -> None:
        with psycopg.connect(self.server.dsn("native"), autocommit=True) as connection:
            connection.execute("DROP SUBSCRIPTION bench")


class CampusSync(Side):
    """`campus-sync run` with one link, both lanes, on the embedded Flink."""

    name = "campus-sync"
    seen_sql = "SELECT raw_value FROM consult.lab_result WHERE record_id = %s AND campus = 'bench'"

    def __init__(self, source: PostgresServer, server: PostgresServer, folder: pathlib.Path):
        self.source, self.server, self.database = source, server, "consult"
        self.folder = folder
        self.job: subprocess.Popen | None = None
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE consult")
        key = folder / "dead-letter.key"
        key.write_text("MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\n")
        key.chmod(0o600)
        (folder / "campuses.yaml").write_text(
            "version: 1\n"
            f"sources: {{bench: {{kind: postgresql, dsn: '{source.dsn('his')}',"
            f" mapping: {HERE / 'bench_mapping.yaml'}, publication: bench}}}}\n"
            f"stores: {{primary: {{dsn: '{server.dsn('consult')}'}}}}\n"
            "dead_letter_key: file:dead-letter.key\n"
        )

    def start(self) -> None:
        log = (self.folder / "run.log").open("ab")
        self.job = subprocess.Popen(
            [sys.executable, "-m", "runners.cli", "run", "--config", "campuses.yaml"],
            cwd=self.folder,
            stdout=log,
            stderr=log,
        )

    def stop(self) -> None:
        self.job.terminate()
        self.job.wait(60)

    def close(self) -> None:
        if self.job is not None and self.job.poll() is None:
            self.stop()


def in_transactions(connection, rows: int, per_transaction: int, statement: str) -> None:
    """Runs `statement` over [lo, hi] pieces of 1..rows, each in its own transaction."""
    connection.execute(
        "CREATE OR REPLACE PROCEDURE pieces(base bigint, rows bigint, step bigint) LANGUAGE plpgsql"
        f" AS $$ BEGIN FOR k IN 0 .. rows / step - 1 LOOP {statement}; COMMIT; END LOOP; END $$"
    )


def backlog(source: PostgresServer, kind: str, base: int, rows: int, step: int) -> tuple[int, int]:
    """Commits `rows` changes in transactions of `step` rows and two markers; returns their ids."""
    low, high = "base + k * step + 1", "base + (k + 1) * step"
    if kind == "insert":
        statement = f"INSERT INTO lab {ROW}({low}, {high}) g"
    else:
        statement = f"UPDATE lab SET value = value + 1 WHERE id BETWEEN {low} AND {high}"
    markers = (-base * 2 - 1, -base * 2 - 2)
    with psycopg.connect(source.dsn("his"), autocommit=True) as connection:
        in_transactions(connection, rows, step, statement)
        tenth = rows // 10 // step * step
        connection.execute("CALL pieces(%s, %s, %s)", [base, tenth, step])
        connection.execute(f"INSERT INTO lab {ROW}(%s::bigint, %s::bigint) g", [markers[0]] * 2)
        connection.execute("CALL pieces(%s, %s, %s)", [base + tenth, rows - tenth, step])
        connection.execute(f"INSERT INTO lab {ROW}(%s::bigint, %s::bigint) g", [markers[1]] * 2)
        connection.execute("CHECKPOINT")
    return markers


def wait_visible(side: Side, row_id: int, timeout_s: float = 300) -> float:
    """Returns the time at which a row was seen at the destination."""
    with psycopg.connect(side.server.dsn(side.database), autocommit=True) as connection:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                if side.visible(connection, row_id, None):
                    return time.monotonic()
            time.sleep(0.005)
    raise SystemExit(f"{side.name}: marker not seen within {timeout_s} s; see its log")


def drain(side: Side, markers: tuple[int, int], rows: int) -> float:
    """Starts the side on a waiting backlog; returns rows a second between the markers."""
    side.start()
    first = wait_visible(side, markers[0])
    last = wait_visible(side, markers[1])
    side.stop()
    return rows * 0.9 / max(last - first, 1e-6)


def live(side: Side, source: PostgresServer, rate: int, seconds: int, base: int) -> list[float]:
    """Returns lags in ms of rows committed one by one while `rate` rows a second flow."""
    lags = []
    with (
        psycopg.connect(source.dsn("his"), autocommit=True) as writer,
        psycopg.connect(side.server.dsn(side.database), autocommit=True) as reader,
    ):
        due = time.monotonic()
        for i in range(rate * seconds):
            due += 1 / rate
            writer.execute(f"INSERT INTO lab {ROW}(%s::bigint, %s::bigint) g", [base + i] * 2)
            committed = time.monotonic()
            if i % (rate // 5) == rate // 10:
                while not side.visible(reader, base + i, None):
                    time.sleep(0.0005)
                lags.append((time.monotonic() - committed) * 1000)
            time.sleep(max(0.0, due - time.monotonic()))
    return lags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=["native", "campus-sync"])
    parser.add_argument("--live-seconds", type=int, default=20)
    options = parser.parse_args()
    cases = [("insert", 1000), ("update", 1000), ("insert", 10), ("insert", 1)]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = pathlib.Path(folder)
        root.chmod(0o755)
        source = stack.enter_context(PostgresServer(root / "source", settings=SETTINGS))
        server = stack.enter_context(PostgresServer(root / "store", settings=SETTINGS))
        with psycopg.connect(source.dsn("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE his")
        with psycopg.connect(source.dsn("his"), autocommit=True) as connection:
            connection.execute(f"CREATE TABLE lab ({COLUMNS})")
            connection.execute("CREATE PUBLICATION bench FOR TABLE lab")
        sides: list[Side] = [Native(source, server), CampusSync(source, server, root)]
        sides = [side for side in sides if options.only in (None, side.name)]
        for side in sides:
            stack.callback(side.close)
        sides[-1].start()  # The first start makes slot and snapshot of the empty table.
        time.sleep(20)
        sides[-1].stop()
        base = 0
        for kind, step in cases:
            rows = options.rows if step >= 10 else options.rows // 4
            start = base if kind == "insert" else 0
            markers = backlog(source, kind, start if kind == "insert" else 10**12, rows, step)
            for side in sides:
                rate = drain(side, markers, rows)
                results.setdefault(f"{kind} {step}-row tx", {})[side.name] = round(rate)
                sys.stderr.write(f"{side.name}: {kind} {step}-row: {rate:,.0f} rows/s\n")
            base += rows if kind == "insert" else 0
        for side in sides:
            side.start()
            time.sleep(15)
            lags = live(side, source, 1000, options.live_seconds, base + 10_000_000)
            base += 1_000_000
            side.stop()
            cuts = statistics.quantiles(lags, n=100)
            results.setdefault("live 1000/s p50 ms", {})[side.name] = round(cuts[49], 1)
            results.setdefault("live 1000/s p99 ms", {})[side.name] = round(cuts[98], 1)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for case, found in results.items():
        ratio = found.get("campus-sync", 0) / found["native"] if "native" in found else 0
        print(f"{case:24} {found}  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
