"""Measure how many edits a second clients get to another store, beside rows of a single writer.

    python -m tests.benchmarks.edits_live [--seconds 15] [--clients 4] [--durable] [--json]

The same clients commit single rows as fast as they can: at a source, which `run` carries to the
primary store on Flink; and in treatment plans of another store, which `run` folds and exchanges.
A rate is all that they committed by the time from the first until the last is seen at the primary.
Both ways share the machine's cores with the clients, in one run, one after the other.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import typing

import psycopg

from tests.benchmarks.beside_native import Bench, CampusSync, start_anew
from tests.benchmarks.cpu import cpu_by_role, spent_between
from tests.benchmarks.servers import SETTINGS, running

_CLIENT = """
import sys, time, psycopg
dsn, statement, first, step, count, seconds = sys.argv[1:]
first, step, count = int(first), int(step), int(count)
done, end = 0, time.monotonic() + float(seconds)
with psycopg.connect(dsn, autocommit=True) as connection:
    while time.monotonic() < end:
        connection.execute(statement, {"id": first + done % count * step})
        done += 1
print(done)
"""
_ROWS_MAX = 10_000_000  # Of one client: an insert never meets its own.
_LAST = 1_000_000_000


class _Way(typing.NamedTuple):
    """`name`: of who writes; `dsn`: where; `seen`: asks the primary for a row."""

    name: str
    dsn: str
    insert: str
    update: str
    seen: str


def _ways(source: str, edited: str) -> tuple[_Way, _Way]:
    return (
        _Way(
            "single writer",
            source,
            "INSERT INTO lab SELECT %(id)s::bigint, 'P1', 'V1', '14749-6', 4.2, 'mmol/L', 3.9, 6.1,"
            " 'N', now(), now(), 'D1', repeat('文', 80)",
            "UPDATE lab SET note = repeat('字', 80) || clock_timestamp() WHERE id = %(id)s::bigint",
            "SELECT FROM consult.lab_result WHERE record_id = %s::text AND campus = 'bench'",
        ),
        _Way(
            "edits",
            edited,
            "INSERT INTO consult.treatment_plan (campus, record_id, patient_id, title, content)"
            " VALUES ('bench', %(id)s::text, 'P1', 't', repeat('文', 80))",
            "UPDATE consult.treatment_plan SET content = repeat('字', 80) || clock_timestamp()"
            " WHERE campus = 'bench' AND record_id = %(id)s::text",
            "SELECT FROM consult.treatment_plan WHERE record_id = %s::text AND campus = 'bench'",
        ),
    )


def _measure(way: _Way, primary: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    found, count = {}, 0
    for number, what in enumerate(("insert", "update")):
        statement = getattr(way, what)
        count = count or _ROWS_MAX
        began, before = time.monotonic(), cpu_by_role()
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", _CLIENT, way.dsn, statement, str(first),
                 str(options.clients), str(count), str(options.seconds)],
                stdout=subprocess.PIPE, text=True,
            )
            for first in range(1000, 1000 + options.clients)
        ]  # fmt: skip
        done = [int(client.communicate()[0]) for client in clients]
        wrote = time.monotonic()
        with psycopg.connect(way.dsn, autocommit=True) as connection:
            connection.execute(way.insert, {"id": _LAST + number})
        with psycopg.connect(primary, autocommit=True) as connection:
            while not connection.execute(way.seen, [_LAST + number]).rowcount:
                time.sleep(0.005)
        seen, spent = time.monotonic(), spent_between(before, cpu_by_role())
        count = min(done)  # What each has written may be changed.
        found[what] = {
            "per_s": sum(done) / (seen - began),
            "committed_per_s": sum(done) / (wrote - began),
            "behind_s": seen - wrote,
            **{f"{role} us": s / sum(done) * 1e6 for role, s in spent.items() if s > 0.1},
        }
        figures = ", ".join(f"{name} {value:,.1f}" for name, value in found[what].items())
        print(f"{way.name}, {what}: {figures}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--durable", action="store_true", help="commits wait for the disk")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = SETTINGS | {"autovacuum": "on"}
    settings |= {"synchronous_commit": "on"} if options.durable else {}
    names = ("source", "primary", "other")
    with (
        running(*names, settings=settings) as (root, servers),
        contextlib.ExitStack() as stack,
    ):
        bench = Bench(servers[0])
        primary, other = (server.create_database("consult") for server in servers[1:])
        ours = CampusSync(bench.dsn, {"primary": primary, "other": other}, root / "job")
        stack.callback(ours.close)
        ours.dsns = {"primary": primary}  # Nothing of the source comes to the other store.
        with (root / "job" / "campuses.yaml").open("a") as config:
            config.write("links: [bench>primary]\n")
        start_anew(bench, ours)
        found = {way.name: _measure(way, primary, options) for way in _ways(bench.dsn, other)}
    ratios = {
        what: found["edits"][what]["per_s"] / found["single writer"][what]["per_s"]
        for what in ("insert", "update")
    }
    if options.json:
        print(json.dumps(found | {"ratio": ratios}, indent=2))
        return
    for what, ratio in ratios.items():
        print(f"{what}: edits by rows of a single writer, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
