"""Measure the whole pipeline on Flink beside PostgreSQL's native logical replication.

Same two servers, same table, same transactions, one side after the other in one run:
`python -m tests.benchmarks.beside_native`. A drain is timed in the destination between two
marker rows, after a fiftieth and at the end of a backlog that was made while nobody read. Live lag
is the time from a row's commit until it is seen in the destination, at a given rate.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import psycopg

from runners.embedded.postgres import PostgresServer
from tests.benchmarks.cpu import cpu_by_role, spent_between
from tests.benchmarks.emergencies import under_backlog
from tests.benchmarks.servers import running
from transforms.seal_dead_letters import make_key

COLUMNS = """id bigint PRIMARY KEY, patient_id text, visit_id text, item_code text, value numeric,
 unit text, ref_low numeric, ref_high numeric, abnormal_flag text, specimen_time timestamptz,
 reported_at timestamptz, reporter text, note text"""
ROWS = """INSERT INTO lab SELECT g, 'P' || mod(g, 1000), 'V' || mod(g, 5000), '14749-6',
 4 + mod(g, 30) / 10.0, 'mmol/L', 3.9, 6.1, 'N', now(), now(), 'D' || mod(g, 100),
 repeat('正常范围内。', 4) || g FROM generate_series({low}::bigint, {high}::bigint) g"""
URGENT = """INSERT INTO lab SELECT g, 'E' || g, 'V', '2823-3', 7.4, 'mmol/L', 3.5, 5.3, 'HH',
 now(), now(), 'D1', 'K' FROM generate_series({low}::bigint, {high}::bigint) g"""
CHANGE = "UPDATE lab SET value = value + 1, note = note || '.' WHERE id BETWEEN {low} AND {high}"
HERE = pathlib.Path(__file__).parent


def execute(dsn: str, *statements: str) -> None:
    """Executes statements one by one in one session, each a transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


class Native:
    """CREATE SUBSCRIPTION with its defaults; the table has the two indexes of a consult store."""

    name, slot = "native", "native"
    seen_sql = "SELECT 1 FROM lab WHERE id = %s::bigint"

    def __init__(self, source: str, server: PostgresServer):
        self.dsn = server.create_database("native")
        self.dsns = {"native": self.dsn}
        self._run(f"CREATE TABLE lab ({COLUMNS})")
        self._run("CREATE INDEX ON lab (patient_id)")
        self._run(
            f"CREATE SUBSCRIPTION bench CONNECTION '{source}' PUBLICATION bench"
            " WITH (enabled = false, create_slot = true, slot_name = 'native', copy_data = false)"
        )

    def _run(self, statement: str) -> None:
        execute(self.dsn, statement)

    def start(self) -> None:
        self._run("ALTER SUBSCRIPTION bench ENABLE")

    def stop(self) -> None:
        self._run("ALTER SUBSCRIPTION bench DISABLE")

    def close(self) -> None:
        self._run("DROP SUBSCRIPTION bench")


class CampusSync:
    """`campus-sync run` with both lanes on the embedded Flink: `campus` to each of its stores.

    Args:
      source, dsns: connection strings, of the stores by name; `primary` must be one.
      mapping: a file of this folder.
    """

    name = "campus-sync"

    def __init__(
        self,
        source: str,
        dsns: dict[str, str],
        folder: pathlib.Path,
        campus: str = "bench",
        mapping: str = "bench_mapping.yaml",
    ):
        self.campus, self.dsns, self.folder = campus, dsns, folder
        self.slot = f"campus_sync_{campus}_primary"
        self.seen_sql = (
            f"SELECT 1 FROM consult.lab_result WHERE record_id = %s::text AND campus = '{campus}'"
        )
        self.dsn = dsns["primary"]
        self._job: subprocess.Popen | None = None
        folder.mkdir(exist_ok=True)
        make_key(folder / "dead-letter.key")
        (folder / "campuses.yaml").write_text(
            "version: 1\n"
            f"sources: {{{campus}: {{kind: postgresql, dsn: '{source}',"
            f" mapping: {HERE / mapping}, publication: bench}}}}\n"
            f"stores: {{{', '.join(f'{n}: {{dsn: {d!r}}}' for n, d in dsns.items())}}}\n"
            "dead_letter_key: file:dead-letter.key\n"
        )

    def start(self) -> None:
        with (self.folder / "run.log").open("ab") as log:
            self._job = subprocess.Popen(
                [sys.executable, "-m", "runners.cli", "run", "--config",
                 str(self.folder / "campuses.yaml")],
                stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        self._job.send_signal(signal.SIGTERM)
        self._job.wait(60)
        # A restart, or a store or source that did not answer, explains a number that is odd.
        for log, sign in (("run.log", " failed "), ("job/worker.log", " link ")):
            lines = (self.folder / log).read_text(errors="replace").splitlines()
            print(*(line for line in lines if sign in line), sep="\n", file=sys.stderr)

    def close(self) -> None:
        if self._job is not None and self._job.poll() is None:
            self.stop()


@dataclasses.dataclass
class Bench:
    """The source and the sides that follow it; ids are handed out from `next_id`."""

    source: PostgresServer
    sides: list = dataclasses.field(default_factory=list)
    database: str = "his"
    next_id: int = 1
    marker: int = 1_000_000_000_000

    def __post_init__(self):
        self.dsn = self.source.create_database(self.database)
        self.execute(f"CREATE TABLE lab ({COLUMNS})", "CREATE PUBLICATION bench FOR TABLE lab")

    def execute(self, *statements: str) -> None:
        execute(self.dsn, *statements)

    def take_ids(self, count: int) -> int:
        """Returns the first of so many ids."""
        self.next_id += count
        return self.next_id - count

    def take_marker(self) -> int:
        """Returns the id of one more marker row."""
        self.marker += 1
        return self.marker - 1

    def backlog(self, statement: str, first: int, rows: int, step: int) -> tuple[int, int]:
        """Commits changes of `rows` rows, `step` a transaction; returns the markers' ids."""
        body = statement.format(low="first + k * step", high="first + (k + 1) * step - 1")
        self.execute(
            "CREATE OR REPLACE PROCEDURE pieces(first bigint, pieces bigint, step bigint)"
            " LANGUAGE plpgsql AS $$ BEGIN FOR k IN 0 .. pieces - 1 LOOP"
            f" {body}; COMMIT; END LOOP; END $$"
        )
        head = rows // step // 50
        markers = (self.take_marker(), self.take_marker())
        self.execute(
            f"CALL pieces({first}, {head}, {step})",
            ROWS.format(low=markers[0], high=markers[0]),
            f"CALL pieces({first + head * step}, {rows // step - head}, {step})",
            ROWS.format(low=markers[1], high=markers[1]),
        )
        return markers

    def drain(self, side, markers: tuple[int, int], rows: int) -> tuple[float, float]:
        """Lets a side meet the backlog; returns rows a second between the markers, and since it
        connected: the second has the first pane's wait in it, and what is read meanwhile."""
        side.start()
        connected = self._connected(side)
        first = wait_visible(side, markers[0])
        before = cpu_by_role()
        last = wait_visible(side, markers[1])
        spent = spent_between(before, cpu_by_role())
        side.stop()
        per_row = {role: s * 1e6 / (rows * 0.98) for role, s in spent.items() if s > 0.05}
        each = ", ".join(f"{role} {us:.1f}" for role, us in per_row.items())
        print(f"  {side.name}: CPU us a row: {each}", file=sys.stderr, flush=True)
        return rows * 0.98 / (last - first), rows / (last - connected)

    def _connected(self, side, timeout_s: float = 120) -> float:
        """Returns the time at which a side began to read its slot."""
        query = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active"
        deadline = time.monotonic() + timeout_s
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while time.monotonic() < deadline:
                if connection.execute(query, [side.slot]).rowcount:
                    return time.monotonic()
                time.sleep(0.002)
        raise SystemExit(f"{side.name} did not connect within {timeout_s:.0f} s")

    def live(
        self, side, statement: str, rate: int, seconds: int, every: int | None = None
    ) -> list[float]:
        """Returns commit-to-seen lags in ms of single-row transactions at `rate` a second.

        Ten a second are waited for, or `every` so many.
        """
        every = every or max(1, rate // 10)
        lags = []
        with (
            psycopg.connect(self.dsn, autocommit=True) as writer,
            psycopg.connect(side.dsn, autocommit=True) as reader,
        ):
            due = time.monotonic()
            for i in range(rate * seconds):
                due += 1 / rate
                row = self.take_ids(1)
                writer.execute(statement.format(low=row, high=row))
                if i % every == 0:
                    began = time.monotonic()
                    while reader.execute(side.seen_sql, [row]).fetchone() is None:
                        time.sleep(0.0005)
                    lags.append((time.monotonic() - began) * 1000)
                time.sleep(max(0.0, due - time.monotonic()))
        return lags


def wait_visible(side, row_id: int, timeout_s: float = 300) -> float:
    """Returns the time at which a row was first seen at the destination, the last if several."""
    deadline = time.monotonic() + timeout_s
    seen = 0.0
    for dsn in side.dsns.values():
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not (seen := _seen(connection, side.seen_sql, row_id)):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{side.name}: a marker was not seen within {timeout_s:.0f} s")
                time.sleep(0.005)
    return seen


def _seen(connection: psycopg.Connection, query: str, row_id: int) -> float:
    """Returns the time if a row is there, else 0."""
    with contextlib.suppress(psycopg.errors.UndefinedTable):
        if connection.execute(query, [row_id]).fetchone():
            return time.monotonic()
    return 0.0


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}

    def note(case: str, side, value: float) -> None:
        results.setdefault(case, {})[side.name] = value
        print(f"{case:32} {side.name:12} {value:12,.1f}", file=sys.stderr, flush=True)

    for kind, step in (("insert", 1000), ("update", 1000), ("insert", 10), ("insert", 1)):
        rows = options.rows if step >= 10 else options.rows // 2
        first = bench.take_ids(rows) if kind == "insert" else 1
        markers = bench.backlog(ROWS if kind == "insert" else CHANGE, first, rows, step)
        for side in bench.sides:
            between, since = bench.drain(side, markers, rows)
            note(f"{kind}, {step}-row tx, rows/s", side, between)
            note(f"{kind}, {step}-row tx, since connected", side, since)
    for side in bench.sides:
        start_anew(bench, side)
        for name, statement, rate in (
            ("routine at 1000/s", ROWS, 1000),
            ("urgent at 10/s", URGENT, 10),
        ):
            lags = bench.live(side, statement, rate, options.live_seconds)
            cuts = statistics.quantiles(lags, n=100)
            note(f"live, {name}, p50 ms", side, cuts[49])
            note(f"live, {name}, p99 ms", side, cuts[98])
        side.stop()
    return results


def start_anew(bench: Bench, side) -> None:
    """Starts a side and returns when it delivers everywhere."""
    side.start()
    wait_visible(side, bench.backlog(ROWS, bench.take_ids(10), 10, 1)[1])


def emergencies(bench: Bench, side: CampusSync, rows: int) -> dict[str, dict[str, float]]:
    """Returns what `under_backlog` found of a side with one link or more, as percentiles."""
    start_anew(bench, side)
    results = {}
    links = f"{len(side.dsns)} link{'s' if len(side.dsns) > 1 else ''}"
    for phase, lags in under_backlog(bench, side, rows, ROWS, URGENT).items():
        cuts = statistics.quantiles(lags, n=100) if len(lags) > 1 else lags * 99
        results[f"{links}, urgent while a backlog {phase}, ms"] = {
            "p50": cuts[49], "p99": cuts[98], "max": max(lags), "count": len(lags),
        }  # fmt: skip
    side.stop()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--live-seconds", type=int, default=20)
    parser.add_argument("--only", choices=["native", "campus-sync"])
    parser.add_argument("--emergencies", action="store_true", help="under a backlog, and no more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with running("source", "store") as (root, servers), contextlib.ExitStack() as stack:
        source, server = servers
        bench, results = Bench(source), {}
        stores = {"primary": server.create_database("consult")}
        ours = CampusSync(bench.dsn, stores, root / "one")
        bench.sides = [ours] if options.emergencies else [Native(bench.dsn, server), ours]
        bench.sides = [side for side in bench.sides if options.only in (None, side.name)]
        for side in bench.sides:
            stack.callback(side.close)
        if ours in bench.sides:  # Its first start makes slot and snapshot, and fills caches.
            ours.start()
            wait_visible(ours, bench.backlog(URGENT, bench.take_ids(1000), 1000, 100)[1])
            ours.stop()
        if not options.emergencies:
            results |= measure(bench, options)
        if ours in bench.sides:
            results |= emergencies(bench, ours, options.rows)
            # A campus with a store of its own: two links of one reading (ADR 0018).
            both = Bench(source, database="his_of_both")
            stores = {n: server.create_database(f"both_{n}") for n in ("primary", "both")}
            ours = CampusSync(both.dsn, stores, root / "both", campus="both")
            stack.callback(ours.close)
            results |= emergencies(both, ours, options.rows)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for case, found in results.items():
        ratio = ""
        if {"native", "campus-sync"} <= found.keys():
            ratio = f"  ratio {found['campus-sync'] / found['native']:.2f}"
        values = "  ".join(f"{name} {value:,.1f}" for name, value in found.items())
        print(f"{case:60} {values}{ratio}")


if __name__ == "__main__":
    main()
