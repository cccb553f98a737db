"""The reconciliations that `run` starts: by their clock, once, in processes of their own."""

import datetime
import json
import logging

import psycopg
import pytest
import yaml

from pipelines.sla_report import Observer
from runners.reconcile_jobs import REPORTS, ReconcileJobs
from runners.report_html import page
from runners.upkeep import Rules, Upkeep
from schemas.config import Config, Reconcile, load
from schemas.reconcile_schedule import RETRY_US, Job, State
from schemas.reports import to_csv
from tests.e2e.test_reconcile import FIRST, VITALS
from tests.faults.harness import Link, Site, until
from transforms.deliver import reconcile_records as records
from transforms.sign_report import verify

SOON_S = 120
HURT = "UPDATE consult.vital_sign SET visit_no = 'no' WHERE record_id = '{}'"


def at(text: str) -> int:
    """Microseconds of a time in China."""
    return int(datetime.datetime.fromisoformat(f"{text}+08:00").timestamp()) * 1_000_000


class Night:
    """A site with one store, and a schedule whose clock the test sets."""

    def __init__(self, site: Site):
        self.site, self.plan, self.now_us = site, Reconcile(), at("2026-11-23T12:00")
        self.primary = records.connect(site.config.stores["primary"].dsn)

    def jobs(self) -> ReconcileJobs:
        """Returns the schedule as another `run` has it."""
        return ReconcileJobs(self.site.config, self.plan, self.site.path, lambda: self.now_us)

    def configured(self, **more) -> Config:
        """Adds to campuses.yaml; returns it read."""
        content = yaml.safe_load(self.site.path.read_text())
        self.site.path.write_text(yaml.safe_dump(content | more))
        return load(self.site.path)

    def hurt(self, number: int) -> None:
        dsn = self.site.store_servers["primary"].dsn(f"consult{self.site.name}")
        with psycopg.connect(dsn) as store:
            store.execute("SET session_replication_role = replica")  # As a disk would: untold.
            assert store.execute(HURT.format(FIRST + number)).rowcount == 1

    def newest(self, job: Job = Job.DAILY):
        return max((r for r in records.runs(self.primary) if r.job is job), key=lambda r: r.due_us)

    def ended(self, jobs: ReconcileJobs, job: Job, state: State):
        """Returns a job's newest run once it has ended so; looks as often as `run` does."""
        found = until(
            lambda: jobs() is not None and self.newest(job).ended_us and self.newest(job),
            SOON_S,
            lambda: f"{records.runs(self.primary)}, {self.log()}",
        )
        assert found.state is state, (found, self.log())
        return found

    def report(self, name: str) -> dict:
        return verify(json.loads((self.site.folder / REPORTS / name).read_text()))[0]

    def log(self) -> str:
        path = self.site.folder / REPORTS / "jobs.log"
        return path.read_text()[-2000:] if path.exists() else "no log"


@pytest.fixture
def night(request, tmp_path, postgres_server):
    name = f"_{request.node.originalname[5:25]}"
    site = Site(tmp_path, postgres_server, {"primary": postgres_server}, name)
    with site.hospital() as hospital:
        hospital.execute(VITALS, [FIRST, 200])
    with Link(site.settings()):
        site.drain()
        found = Night(site)
        yield found
        found.primary.close()
    with site.administrator() as connection:
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
            " WHERE NOT active AND slot_name LIKE '%%' || %s",
            [name],
        )


def test_a_night_s_run_mends_is_signed_and_is_not_made_twice(night):
    with night.jobs() as jobs:
        assert jobs() == ""
        assert {run.state for run in records.runs(night.primary)} == {State.SEEN}
        night.hurt(7)
        night.now_us = at("2026-11-24T02:29")
        assert jobs() == "" and night.newest().state is State.SEEN
        night.now_us = at("2026-11-24T02:31")
        assert jobs() == "" and night.newest().state is State.RUNNING
        with night.jobs() as other:
            assert other() == "" and other() == ""  # It has no schedule: nothing is begun.
            assert night.newest().attempts == 1
        found = night.ended(jobs, Job.DAILY, State.SOUND)
        assert (found.rows, found.differing, found.mended) == (200, 1, 1)
        made = night.report(found.report)
        assert made["sound"] and made["repair"] and not made["whole"]
        assert (night.site.folder / REPORTS / found.report).with_suffix(".txt").exists()
        assert jobs() == "" and night.newest() == found

        with Observer(night.configured(reconcile={})) as observer:
            view = observer.view(night.now_us)
            (daily, month) = view.reconciliations
            assert (daily.result, daily.differing, daily.mended) == ("sound", 1, 1)
            assert month.ended_us is None and not daily.overdue_s
            late = observer.report(at("2026-11-25T04:00"))
            assert late.reconciliations[0].overdue_s == 5400
            assert "overdue for 90 min" in page(late) and found.report in page(late)
            assert "daily,sound," in to_csv(late)["reconciliations.csv"]
    # Another start of `run`, later that day, and by another job: nothing is left to do.
    with night.jobs() as again:
        assert again() == "" and night.newest() == found
    night.site.prove()


def test_what_was_missed_or_cut_off_is_made_up_for_once(night):
    with night.jobs() as jobs:
        jobs()
    # Down for the last days of the month: the month's run is made, and the day's with it.
    night.hurt(3)
    night.now_us = at("2026-12-02T09:00")
    with night.jobs() as jobs:
        assert jobs() == "" and night.newest(Job.MONTH_END).state is State.RUNNING
        assert night.newest(Job.DAILY).state is State.SEEN
    cut = night.newest(Job.MONTH_END)
    assert (cut.state, cut.attempts) == (State.RUNNING, 1)
    with night.jobs() as jobs:
        assert jobs() == "" and night.newest(Job.MONTH_END).attempts == 2
        found = night.ended(jobs, Job.MONTH_END, State.SOUND)
        assert (found.differing, found.mended) == (1, 1)
        assert night.report(found.report)["whole"]
        assert jobs() == "" and night.newest(Job.DAILY).state is State.SEEN
        night.now_us = at("2026-12-03T02:30")
        assert jobs() == "" and night.newest(Job.DAILY).state is State.RUNNING
        night.ended(jobs, Job.DAILY, State.SOUND)
    night.site.prove()


def test_what_is_not_mended_or_not_made_is_told(night):
    night.plan = Reconcile(mend=False)
    with night.jobs() as jobs:
        jobs()
        night.hurt(5)
        night.now_us = at("2026-11-24T02:30")
        jobs()
        found = night.ended(jobs, Job.DAILY, State.UNSOUND)
        assert (found.differing, found.mended) == (1, 0)
        assert jobs().startswith("daily reconciliation is not sound, 1 rows differ: ")
        # A configuration that cannot be read any more: no report, tried again in a while.
        kept = night.site.path.read_text()
        night.site.path.write_text("version: 2\n")
        night.now_us = at("2026-11-25T02:30")
        jobs()
        failed = night.ended(jobs, Job.DAILY, State.FAILED)
        assert "exit code 2" in failed.detail and "left no report" in jobs()
        night.site.path.write_text(kept)
        jobs()
        assert night.newest().attempts == 1
        night.now_us = failed.ended_us + RETRY_US
        jobs()
        assert night.newest().attempts == 2
        night.ended(jobs, Job.DAILY, State.UNSOUND)


def test_run_looks_after_the_schedule(night, caplog):
    """As `run` has it: with the host's clock, in a thread, beside what else it does."""
    config = night.configured(
        reconcile={"mend": False}, quality_rules="off", patient_matching="off"
    )
    with caplog.at_level(logging.WARNING), Upkeep(config, Rules.load(config), night.site.path):
        until(lambda: len(records.runs(night.primary)) == 2, SOON_S, "no schedule is kept")
    assert {run.state for run in records.runs(night.primary)} == {State.SEEN}
    assert not [one for one in caplog.records if one.name == "runners.upkeep"]
