"""A store that stands still for the routine lane holds up no emergency, on Flink."""

import pytest

from runners.embedded.postgres import PostgresServer
from tests.faults.harness import CRITICAL, SOURCE_SETTINGS, VITAL, Site, until
from tests.faults.test_kill import RECOVERY_S, Job

ROWS = 20_000  # More than Flink's buffers between two tasks hold by value.
EMERGENCIES = 20
# The lane's patience ends while the store stands still.
LIMITS = {"heartbeat_s": 0.5, "gather_s": 0.05, "resend_routine_s": 1.0}
SOON_S = 12.0  # Deliveries give up a lock after 30 s, which would end the wait.


@pytest.fixture
def site(tmp_path):
    tmp_path.chmod(0o755)
    with (
        PostgresServer(tmp_path / "source", settings=SOURCE_SETTINGS, durable=False) as source,
        PostgresServer(tmp_path / "primary", settings=SOURCE_SETTINGS, durable=False) as primary,
    ):
        yield Site(tmp_path, source, {"primary": primary}, limits=LIMITS)


@pytest.mark.xdist_group("flink")
def test_emergencies_arrive_while_the_routine_lane_waits_for_a_table(site):
    job = Job(site)
    try:
        until(lambda: site.snapshots()[-1:] == [("first", "done")], RECOVERY_S, job.tail)
        with site.hospital() as hospital, site.store() as guard, site.store() as store:

            def arrived() -> int:
                query = "SELECT FROM consult.lab_result WHERE patient_id LIKE 'C%%'"
                return store.execute(query).rowcount

            with guard.transaction():
                guard.execute("LOCK TABLE consult.vital_sign")
                hospital.execute(VITAL, [1, ROWS])
                query = "SELECT FROM pg_locks WHERE NOT granted"
                until(lambda: store.execute(query).rowcount, 30, "a batch that waits")
                for number in range(EMERGENCIES):
                    hospital.execute(CRITICAL, [f"C{number}", 1])
                    until(lambda n=number: arrived() > n, SOON_S, f"emergency {number}")
        site.drain(RECOVERY_S)
        assert job.stop() == 0, job.tail()
    finally:
        job.kill()
    site.prove()
