"""The moments of reconciliation, what is due of them and what is overdue, by an injected clock."""

import datetime
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from pipelines.sla_report import View
from runners.metrics import LinkCollector
from runners.status import render
from schemas.config import ConfigError, Reconcile, load
from schemas.reconcile_schedule import (
    ATTEMPTS_MAX,
    OVERDUE_US,
    RETRY_US,
    Due,
    Job,
    Run,
    Standing,
    State,
    due,
    last_moment,
    standings,
    unseen,
)

PLAN = Reconcile()
HOUR_US = 3_600_000_000
MOMENTS = st.integers(1_600_000_000, 1_900_000_000).map(lambda s: s * 1_000_000)


def at(text: str) -> int:
    """Microseconds of a time in China."""
    return int(datetime.datetime.fromisoformat(f"{text}+08:00").timestamp()) * 1_000_000


def run(job: Job, due_at: str, state: State, **more) -> Run:
    given = {"attempts": 1, "started_us": at(due_at), "ended_us": at(due_at) + 60_000_000}
    if state is State.SEEN:
        given = {}
    if state is State.RUNNING:
        given["ended_us"] = None
    return Run(job, at(due_at), state, **(given | more))


SEEN = (
    run(Job.DAILY, "2026-11-23T02:30", State.SEEN),
    run(Job.MONTH_END, "2026-11-01T03:30", State.SEEN),
)


@pytest.mark.parametrize(
    ("job", "now", "moment"),
    [
        (Job.DAILY, "2026-11-24T02:29", "2026-11-23T02:30"),
        (Job.DAILY, "2026-11-24T02:30", "2026-11-24T02:30"),
        (Job.DAILY, "2026-11-24T23:59", "2026-11-24T02:30"),
        (Job.DAILY, "2026-03-01T00:00", "2026-02-28T02:30"),
        (Job.MONTH_END, "2026-12-01T03:29", "2026-11-01T03:30"),
        (Job.MONTH_END, "2026-12-01T03:30", "2026-12-01T03:30"),
        (Job.MONTH_END, "2027-01-01T00:00", "2026-12-01T03:30"),
        (Job.MONTH_END, "2028-02-29T12:00", "2028-02-01T03:30"),
    ],
)
def test_moments_are_of_the_zone_s_clock(job, now, moment):
    assert last_moment(PLAN, job, at(now)) == at(moment)


@given(MOMENTS, st.sampled_from(Job), st.sampled_from(["+08:00", "-05:30", "+00:00", "+14:00"]))
def test_a_moment_has_come_and_is_the_last(now_us, job, zone):
    plan = Reconcile(zone=zone)
    moment = last_moment(plan, job, now_us)
    assert moment <= now_us
    assert last_moment(plan, job, moment) == moment
    longest = 31 if job is Job.MONTH_END else 1
    assert now_us - moment < longest * 24 * HOUR_US
    assert last_moment(plan, job, moment - 1) < moment


def test_what_is_off_has_no_moment():
    plan = Reconcile(daily="off", month_end=False)
    assert [last_moment(plan, job, at("2026-11-24T12:00")) for job in Job] == [None, None]
    assert due(plan, SEEN, at("2027-11-24T12:00")) is None
    assert standings(plan, SEEN, at("2027-11-24T12:00")) == ()
    assert standings(None, SEEN, at("2027-11-24T12:00")) == ()


def test_a_new_schedule_makes_up_for_nothing():
    now = at("2026-11-23T12:00")
    assert unseen(PLAN, (), now) == [(one.job, one.due_us) for one in SEEN]
    assert due(PLAN, (), now) is None and due(PLAN, SEEN, now) is None
    assert not unseen(PLAN, SEEN, now)


def test_each_moment_is_run_once_and_of_several_missed_the_last():
    assert due(PLAN, SEEN, at("2026-11-24T02:30")) == Due(Job.DAILY, at("2026-11-24T02:30"), 1)
    late = at("2026-11-27T10:00")
    assert due(PLAN, SEEN, late) == Due(Job.DAILY, at("2026-11-27T02:30"), 1)
    for state in (State.SOUND, State.UNSOUND):
        assert due(PLAN, (*SEEN, run(Job.DAILY, "2026-11-27T02:30", state)), late) is None


def test_the_month_s_run_comes_first_and_stands_for_the_day_s():
    now = at("2026-12-02T10:00")
    wanted = due(PLAN, SEEN, now)
    assert wanted == Due(Job.MONTH_END, at("2026-12-01T03:30"), 1)
    times = {"started_us": now, "ended_us": now + HOUR_US}
    done = run(Job.MONTH_END, "2026-12-01T03:30", State.UNSOUND, **times)
    assert due(PLAN, (*SEEN, done), now + HOUR_US) is None
    assert due(PLAN, (*SEEN, done), at("2026-12-03T02:30")).job is Job.DAILY
    broken = run(Job.MONTH_END, "2026-12-01T03:30", State.FAILED, **times, attempts=ATTEMPTS_MAX)
    assert due(PLAN, (*SEEN, broken), now + HOUR_US).job is Job.DAILY


def test_what_was_cut_off_is_begun_again_but_not_for_ever():
    now = at("2026-11-24T02:45")
    dead = run(Job.DAILY, "2026-11-24T02:30", State.RUNNING)
    assert due(PLAN, (*SEEN, dead), now) == Due(Job.DAILY, dead.due_us, 2)
    failed = run(Job.DAILY, "2026-11-24T02:30", State.FAILED, ended_us=now, attempts=2)
    assert due(PLAN, (*SEEN, failed), now + RETRY_US - 1) is None
    assert due(PLAN, (*SEEN, failed), now + RETRY_US) == Due(Job.DAILY, failed.due_us, 3)
    for state in (State.FAILED, State.RUNNING):
        last = run(Job.DAILY, "2026-11-24T02:30", state, attempts=ATTEMPTS_MAX)
        assert due(PLAN, (*SEEN, last), now + RETRY_US) is None
        assert due(PLAN, (*SEEN, last), at("2026-11-25T02:30")).attempt == 1


def test_a_clock_that_goes_back_runs_nothing_twice():
    done = run(Job.DAILY, "2026-11-24T02:30", State.SOUND)
    assert due(PLAN, (*SEEN, done), at("2026-11-23T02:31")) is None


@given(st.lists(st.integers(1, 50), max_size=60), st.sampled_from([State.SOUND, State.UNSOUND]))
def test_every_day_that_the_job_is_up_has_one_run(hours, state):
    """Whatever the gaps between looks: a day's run or a month's since its moment, never two."""
    runs, now = list(SEEN), at("2026-11-23T12:00")
    for hour in hours:
        now += hour * HOUR_US
        while (found := due(PLAN, runs, now)) is not None:
            assert found.due_us <= now and (found.job, found.due_us) not in {
                (one.job, one.due_us) for one in runs
            }
            runs.append(Run(found.job, found.due_us, state, 1, now, now))
        day = last_moment(PLAN, Job.DAILY, now)
        assert any(
            (one.started_us or 0) >= day or (one.job, one.due_us) == (Job.DAILY, day)
            for one in runs
        )
        assert not any(one.overdue_s for one in standings(PLAN, runs, now))


def test_overdue_is_what_waits_for_more_than_an_hour():
    moment = at("2026-11-24T02:30")

    def overdue(*runs: Run, now: int = moment + OVERDUE_US + 1_000_000) -> float:
        return standings(PLAN, (*SEEN, *runs), now)[0].overdue_s

    assert overdue() == (OVERDUE_US + 1_000_000) / 1e6
    assert overdue(now=moment + OVERDUE_US) == 0
    assert overdue(run(Job.DAILY, "2026-11-24T02:30", State.RUNNING)) == 0
    assert overdue(run(Job.DAILY, "2026-11-24T02:30", State.UNSOUND)) == 0
    assert overdue(run(Job.DAILY, "2026-11-24T02:30", State.FAILED)) > 0
    # Nobody runs a schedule here: nothing is promised.
    assert not standings(PLAN, (), moment + OVERDUE_US * 9)[0].overdue_s


NOW = at("2026-11-24T12:00")
SHOWN = (
    Standing(Job.DAILY, "unsound", NOW - HOUR_US, 5000, 7, 6, "a.json", "", None, 7200.0),
    Standing(Job.MONTH_END, "", None, 0, 0, 0, "", "", NOW - HOUR_US, 0.0),
)


def test_the_terminal_and_prometheus_tell_how_they_stand():
    view = View(NOW, (), (), (), reconciliations=SHOWN)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(view))
    text = console.export_text()
    for words in ("not sound, ended 60 min ago", "7 differed and 6 were mended", "overdue for 2 h"):
        assert words in text
    assert "month-end reconciliation: has not been made yet, one has been running" in text

    collector, registry = LinkCollector(), CollectorRegistry()
    registry.register(collector)
    collector.show(view)
    metrics = generate_latest(registry).decode()
    for line in (
        'campus_sync_reconciliation_overdue_seconds{job="daily"} 7200.0',
        'campus_sync_reconciliation_sound{job="daily"} 0.0',
        'campus_sync_reconciliation_differing_rows{job="daily"} 7.0',
        'campus_sync_reconciliation_mended_rows{job="daily"} 6.0',
        'campus_sync_reconciliation_running{job="month_end"} 1.0',
        f'campus_sync_reconciliation_ended_timestamp_seconds{{job="daily"}} {NOW / 1e6 - 3600:.7e}',
    ):
        assert line in metrics
    assert 'sound{job="month_end"}' not in metrics


FILE = """\
version: 1
sources:
  main: {{kind: postgresql, dsn: "postgresql://sync@127.0.0.1:5501/his", mapping: postgresql_his}}
stores:
  primary: {{dsn: "postgresql://sync@127.0.0.1:5510/consult"}}
dead_letter_key: "file:dead-letter.key"
{}
"""


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("", None),
        ("reconcile: off", None),
        ("reconcile: {}", Reconcile()),
        ("reconcile: {daily: 02:30, month_end: 23:05}", Reconcile(month_end="23:05")),
        ("reconcile: {daily: 00:00, mend: false}", Reconcile(daily="00:00", mend=False)),
        ("reconcile: {month_end: off, zone: -05:30}", Reconcile(month_end="off", zone="-05:30")),
    ],
)
def test_a_schedule_is_read_as_people_write_it(tmp_path, text, plan):
    """YAML takes 23:05 for a number, and off for false."""
    path = tmp_path / "campuses.yaml"
    path.write_text(FILE.format(text))
    assert load(path).reconcile == plan
    if plan is not None:
        assert Reconcile(zone="-05:30").zone_minutes == -330
        assert [plan.minutes(job) is None for job in Job] == [False, plan.month_end == "off"]


@pytest.mark.parametrize(
    "text",
    ["daily: 24:00", 'daily: "2:30"', "month_end: 12:61", "zone: CST", "weekly: 1", "daily: on"],
)
def test_what_is_no_schedule_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "campuses.yaml"
    path.write_text(FILE.format(f"reconcile: {{{text}}}"))
    with pytest.raises(ConfigError, match=f"reconcile.{text.partition(':')[0]}"):
        load(path)
