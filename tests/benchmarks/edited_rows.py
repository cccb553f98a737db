"""Measure a source's rows into a table of several writers: before and after clients edited it.

    python -m tests.benchmarks.edited_rows [--rows 200000] [--rounds 2] [--json]

A backlog of changed patients, a thousand a transaction, is carried by `run` on Flink into the
primary store, timed there between two marker rows. First nobody has edited anything, so that each
row goes the way of a single writer's; then a client changes every patient's telephone at the
store, so that each row meets a version and goes the way of several writers'. What the source says
of the telephone stays as it was; everything else it changes is shown.
"""

import argparse
import contextlib
import json
import sys
import time

import psycopg

from tests.benchmarks.beside_native import Bench, CampusSync, execute, start_anew
from tests.benchmarks.servers import running
from tests.faults.harness import until

_STEP = 1000
_TABLE = """CREATE TABLE patient (pid bigint PRIMARY KEY, mrn text NOT NULL, name text, sex text,
 birth_date date, id_no text, phone text, allergies text, updated_at timestamptz NOT NULL)"""
_ROWS = """INSERT INTO patient SELECT g, 'P' || g, '某某' || mod(g, 1000), '1',
 date '1950-01-01' + mod(g, 20000)::int, NULL, '1390000' || lpad(mod(g, 10000)::text, 4, '0'),
 '青霉素', now() FROM generate_series(1, {rows}) g"""
# A program of the hospital that touches every row.
_CHANGE = """UPDATE patient SET updated_at = clock_timestamp()
 WHERE pid BETWEEN {low} AND {high}"""
_EDIT = "UPDATE consult.patient SET phone = '1380000' || right(phone, 4)"
_ANALYSED = "VACUUM ANALYZE"  # As autovacuum has done soon, which the measurement has not on.
_PATIENCE_S = 600


def _eventually(dsn: str, query: str, what: str) -> None:
    """Returns once `query` gives true."""
    print(f"  waiting for {what}", file=sys.stderr, flush=True)
    with psycopg.connect(dsn, autocommit=True) as connection:
        until(lambda: connection.execute(query).fetchone()[0], _PATIENCE_S, what)


def _edit_all(ours: CampusSync, rows: int) -> float:
    """Lets a client change every patient; returns the rate of what it takes until it is folded."""
    began = time.monotonic()
    execute(ours.dsn, "SET campus_sync.role = 'attending'", _EDIT)
    _eventually(ours.dsn, "SELECT NOT EXISTS (SELECT FROM sync.edit)", "edits to be taken in")
    return rows / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with running("source", "store") as (root, servers), contextlib.ExitStack() as stack:
        source, store = servers
        bench = Bench(source)
        bench.execute(
            _TABLE,
            _ROWS.format(rows=options.rows),
            "ANALYZE patient",
            "ALTER PUBLICATION bench ADD TABLE patient",
        )
        stores = {"primary": store.create_database("consult")}
        ours = CampusSync(bench.dsn, stores, root / "job", mapping="patients_mapping.yaml")
        stack.callback(ours.close)

        def drained() -> float:
            markers = bench.backlog(_CHANGE, 1, options.rows, _STEP)
            return bench.drain(ours, markers, options.rows)[0]

        start_anew(bench, ours)
        all_there = f"SELECT count(*) = {options.rows} FROM consult.patient"
        _eventually(ours.dsn, all_there, "the first snapshot")
        ours.stop()
        execute(ours.dsn, _ANALYSED)
        found = {"one writer": [drained() for _ in range(options.rounds)]}
        start_anew(bench, ours)
        found["edits"] = [_edit_all(ours, options.rows)]
        ours.stop()
        execute(ours.dsn, _ANALYSED)
        found["several writers"] = [drained() for _ in range(options.rounds)]
        with psycopg.connect(ours.dsn) as connection:
            query = (
                "SELECT count(*) FROM consult.patient WHERE phone LIKE '1380000%' AND NOT deleted"
            )
            (kept,) = connection.execute(query).fetchone()
            (met,) = connection.execute("SELECT count(*) FROM sync.record").fetchone()
    if (kept, met) != (options.rows, options.rows):
        raise SystemExit(f"{kept} telephones were kept and {met} records met of {options.rows}")
    ratio = max(found["several writers"]) / max(found["one writer"])
    if options.json:
        print(json.dumps({**found, "ratio": ratio}, indent=2))
        return
    for way, rates in found.items():
        print(f"{way:16} {', '.join(f'{rate:,.0f}' for rate in rates)} rows/s")
    print(f"several by one   {ratio:.2f}")


if __name__ == "__main__":
    main()
