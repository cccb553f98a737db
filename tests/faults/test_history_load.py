"""Some history loaded at two unlike campuses while they work, by a job that is killed meanwhile."""

import pytest

from tests.benchmarks.history import Place, run
from tests.faults.harness import seed_of_this_run

ROWS, ROWS_S, KILLS = 20_000, 2000, 2


@pytest.mark.xdist_group("flink")
def test_killed_jobs_go_on_with_their_snapshots(tmp_path):
    """The large one is `python -m tests.benchmarks.history`; here the throttle makes time."""
    tmp_path.chmod(0o755)
    seed = seed_of_this_run()
    place = Place(tmp_path, ROWS, seed, {"snapshot_rows_s": ROWS_S})
    try:
        outcome = run(place, KILLS, seed, pause_s=(1.0, 3.0), tell=print)
    finally:
        place.close()
    print(*outcome.lines(), sep="\n")
    assert outcome.equal and outcome.sound
    assert outcome.letters == 0
    assert len(outcome.kills) == KILLS
    assert sum(outcome.resumes.values()) >= KILLS
    assert min(outcome.rows.values()) >= 0.9 * ROWS
    assert all(rate < 1.3 * ROWS_S for rate in outcome.rows_s.values())
