"""Find and mend one flipped bit in a large table.

`python -m tests.benchmarks.reconcile --rows 1000000`: fills a hospital's table of so many vital
signs, carries it into a store by the sync's own snapshot, flips one bit of one stored row, and has
`campus-sync reconcile` find it, mend it and find nothing more, then look at every row by itself.
Prints rates and the largest memory of the command's process. Ten million rows need 12 GB of disk.
"""

import argparse
import contextlib
import json
import pathlib
import random
import sys
import tempfile
import time

from runners.embedded.postgres import PostgresServer
from tests.faults.harness import SOURCE_SETTINGS, Link, Site
from tests.resident import run_command

FILL = """\
INSERT INTO his.vital_sign (vital_id, mrn, visit_no, temp_c, pulse, sbp, dbp, spo2, measured_at)
SELECT i, 'M' || i %% 100000, 'V' || i %% 300000, 36 + i %% 30 / 10.0, 60 + i %% 60, 110 + i %% 50,
    70 + i %% 30, 90 + i %% 10, timestamptz '2026-01-01 08:00+08' + i * interval '1 second'
FROM generate_series(%s::int, %s::int) i"""
FLIP = """\
UPDATE consult.vital_sign
SET patient_id = left(patient_id, -1) || chr(ascii(right(patient_id, 1)) # 1)
WHERE record_id = %s"""
CHUNK = 100_000
LIMITS = {"in_flight_rows": 200_000, "batch_rows": 20_000, "gather_s": 0.02}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        source, store = (
            stack.enter_context(
                PostgresServer(folder / end, settings=SOURCE_SETTINGS, durable=False)
            )
            for end in ("source", "primary")
        )
        return measure(Site(folder, source, {"primary": store}, limits=LIMITS), options)


def measure(site: Site, options: argparse.Namespace) -> int:
    """Returns 0 if the bit was found, mended, and nothing else differed."""
    with site.hospital() as hospital:
        for start in range(1, options.rows + 1, CHUNK):
            hospital.execute(FILL, [start, min(start + CHUNK - 1, options.rows)])
    began = time.monotonic()
    with Link(site.settings()):
        site.drain(3600)
        print(f"{options.rows:,} rows carried in {time.monotonic() - began:.0f} s", flush=True)
        record_id = str(random.Random(options.seed).randint(1, options.rows))
        with site.store_servers["primary"].connect("consult") as connection:
            connection.execute("SET session_replication_role = replica")
            assert connection.execute(FLIP, [record_id]).rowcount == 1
        counts = [
            run(site, options.rows, what, *more)
            for what, more in (
                ("find", ()),
                ("mend", ("--repair",)),
                ("look again", ()),
                ("look at every row twice", ("--whole",)),
            )
        ]
    print(f"differing and mended, by run: {counts}")
    return 0 if counts == [(1, 0), (1, 1), (0, 0), (0, 0)] else 1


def run(site: Site, rows: int, what: str, *more: str) -> tuple[int, int]:
    """Runs the command in a process of its own; returns how many rows differed and were mended."""
    began = time.monotonic()
    arguments = ["reconcile", "--config", str(site.path), "--json", "--table", "vital_sign"]
    text, resident = run_command(*arguments, *more)
    seconds = time.monotonic() - began
    (link,) = json.loads(text)["report"]["links"]
    print(
        f"{what}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s at both ends each, "
        f"{resident:.0f} MiB resident at most",
        flush=True,
    )
    return link["missing"] + link["different"] + link["extra"] + link["rotten"], link["mended"]


if __name__ == "__main__":
    sys.exit(main())
