"""The main job as a newcomer runs it: one command, start to report."""

import collections
import json
import subprocess
import sys

import pytest

from runners.embedded import world
from schemas.config import load


@pytest.mark.xdist_group("flink")
def test_demo_ends_with_the_law_and_equal_stores(tmp_path):
    folder, report = tmp_path / "world", tmp_path / "report"
    command = [sys.executable, "-m", "runners.cli", "demo", "--json", "--seconds", "8"]
    done = subprocess.run(
        [*command, "--seed", "7", "--dir", str(folder), "--report-dir", str(report)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["law_holds"] and found["complete"] and found["stores_equal"]
    # From the contents of three unlike sources: every entity of every campus is there.
    tables = json.loads((report / "report.json").read_text())["comparison"]["tables"]
    filled = {(match["campus"], match["table"]) for match in tables if match["source_rows"]}
    counts = collections.Counter(campus for campus, _ in filled)
    assert counts == {"main": 12, "east": 12, "west": 13}
    kinds = [source.kind for source in load(folder / "campuses.yaml").sources.values()]
    assert kinds == ["postgresql", "mariadb", "debezium"]
    counts = found["counts"]
    assert counts["delivered"] > 0
    # What the traffic writes wrongly on purpose, once a source, ends sealed in all four stores.
    assert counts["dead"] > 0 and counts["dead"] % 4 == 0
    lanes = {name.split()[1] for name in found["lag_ms"]}
    assert lanes == {"emergency", "routine"}
    assert (report / "report.html").stat().st_size > 10_000
    assert not any(server["running"] for server in world.status(folder).values())
    world.remove(folder)
