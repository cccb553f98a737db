"""Read a large table again whose store lacks much of it.

`python -m tests.benchmarks.reread --rows 500000`: fills a hospital's table of so many vital signs,
carries it into a store, deletes or changes a fifth of the rows there, and has `campus-sync reread`
mend them, then read all of it again with nothing to mend, while the link delivers. Prints rates and
the largest memory of the command's process.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time

from runners.embedded.postgres import PostgresServer
from tests.benchmarks.reconcile import CHUNK, FILL, LIMITS
from tests.faults.harness import CAMPUS, SOURCE_SETTINGS, Link, Site
from tests.resident import run_command

DAMAGE = (
    "DELETE FROM consult.vital_sign WHERE record_id::bigint % 10 = 1",
    "UPDATE consult.vital_sign SET visit_no = 'no' WHERE record_id::bigint % 10 = 2",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=500_000)
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
        return measure(Site(folder, source, {"primary": store}, limits=LIMITS), options.rows)


def measure(site: Site, rows: int) -> int:
    """Returns 0 if what was damaged was mended and nothing else."""
    with site.hospital() as hospital:
        for start in range(1, rows + 1, CHUNK):
            hospital.execute(FILL, [start, min(start + CHUNK - 1, rows)])
    began = time.monotonic()
    with Link(site.settings()):
        site.drain(3600)
        print(f"{rows:,} rows carried in {time.monotonic() - began:.0f} s", flush=True)
        with site.store_servers["primary"].connect("consult") as connection:
            connection.execute("SET session_replication_role = replica")
            damaged = sum(connection.execute(one).rowcount for one in DAMAGE)
        mended = run(site, f"a fifth mended ({damaged:,})")
        alike = run(site, "nothing to mend")
    return 0 if (mended, alike) == (damaged, 0) else 1


def run(site: Site, what: str) -> int:
    """Runs the command in a process of its own; returns how many rows it delivered."""
    arguments = ("--config", str(site.path), "--table", "his.vital_sign", "--json")
    text, resident = run_command("reread", CAMPUS, *arguments)
    told = json.loads(text)
    print(
        f"{what}: {told['rows']:,} rows and {told['ids']:,} ids in {told['seconds']:.1f} s, "
        f"{told['rows_s']:,.0f} rows/s, {resident:.0f} MiB resident at most",
        flush=True,
    )
    return told["delivered"]


if __name__ == "__main__":
    sys.exit(main())
