"""Reconciling takes no more memory for ten times the rows."""

import json

from tests.benchmarks.reconcile import FILL, LIMITS
from tests.faults.harness import Link, Site
from tests.resident import run_command
from transforms.sign_report import ReportKey

SMALL, LARGE = 40_000, 400_000  # Some chunks, and many.
ARGUMENTS = ("--table", "vital_sign", "--json")
MORE_MAX = 1.1


def test_ten_times_the_rows_take_no_more_memory(tmp_path, postgres_server):
    site = Site(tmp_path, postgres_server, {"primary": postgres_server}, "_memory", limits=LIMITS)
    ReportKey(site.config.report_key).make()

    def resident(first: int, last: int) -> float:
        """Adds rows and reconciles all of them; returns MiB."""
        with site.hospital() as hospital:
            hospital.execute(FILL, [first, last])
        site.drain(300)
        run_command("reconcile", "--config", str(site.path), *ARGUMENTS)  # Kernels are compiled.
        text, found = run_command("reconcile", "--config", str(site.path), *ARGUMENTS)
        report = json.loads(text)["report"]
        assert report["sound"] and report["links"][0]["source_rows"] == last
        return found

    with Link(site.settings()):
        small, large = resident(1, SMALL), resident(SMALL + 1, LARGE)
    print(f"{SMALL:,} rows: {small:.0f} MiB, {LARGE:,} rows: {large:.0f} MiB")
    assert large < MORE_MAX * small, f"{small:.0f} MiB, then {large:.0f} MiB"
    with site.administrator() as connection:
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
            " WHERE NOT active AND slot_name LIKE '%%_memory'"
        )
