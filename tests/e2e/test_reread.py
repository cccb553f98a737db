"""Rows of a source table read again while changes flow and links deliver."""

import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipelines.differences import Ends
from pipelines.reread import Reread, Task
from runners.cli import main
from schemas.clocks import monotonic_s, wall_clock_us
from schemas.reread import Span
from tests.damaged_site import FIRST, VITALS, traffic
from tests.faults.harness import CAMPUS, seed_of_this_run, until

pytest_plugins = ["tests.damaged_site"]
TABLE = "his.vital_sign"
LOW, HIGH = FIRST + 51, FIRST + 150
ROWS = """\
SELECT record_id, to_jsonb(v) - 'hlc' FROM consult.vital_sign v
WHERE campus = 'main' AND record_id ~ '^9000000' AND length(record_id) = 12
    AND (record_id::bigint BETWEEN %s AND %s) = %s"""


def reread(made, *more: str) -> int:
    return main(["reread", CAMPUS, "--config", str(made.site.path), "--table", TABLE, *more])


BOUNDS = ("--from", str(LOW), "--to", str(HIGH))


def damage(made, name: str, first: int, chance: random.Random) -> None:
    """Damages 55 of 100 rows: gone, changed, rotten, ended, and five that no source has."""
    keys = [str(first + i) for i in range(100)]
    chance.shuffle(keys)
    with made.site.hospital() as hospital:
        hospital.execute("DELETE FROM his.vital_sign WHERE vital_id = ANY (%s)", [keys[50:55]])
    made.site.drain()
    with made.store(name) as store:
        store.execute("DELETE FROM consult.vital_sign WHERE record_id = ANY (%s)", [keys[:15]])
        store.execute(
            "UPDATE consult.vital_sign SET patient_id = 'wrong' WHERE record_id = ANY (%s)",
            [keys[15:30]],
        )
        store.execute(
            "UPDATE consult.vital_sign SET digest = sha256('') WHERE record_id = ANY (%s)",
            [keys[30:40]],
        )
        store.execute(
            "UPDATE consult.vital_sign SET deleted = NOT deleted WHERE record_id = ANY (%s)",
            [keys[40:55]],
        )


def outside(made, name: str) -> dict:
    with made.store(name) as store:
        return dict(store.execute(ROWS, [LOW, HIGH, False]).fetchall())


@contextlib.contextmanager
def changes(made):
    """The first sixty rows of the range change, end and come back, for as long as this is open."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        with made.site.hospital() as hospital:
            while not stop.is_set():
                number += 1
                key = LOW + number % 60
                hospital.execute(
                    "UPDATE his.vital_sign SET pulse = %s WHERE vital_id = %s",
                    [60 + number % 90, key],
                )
                if number % 7 == 0:
                    hospital.execute("DELETE FROM his.vital_sign WHERE vital_id = %s", [key])
                    hospital.execute(VITALS, [key - 1, 1])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def differing(made, name: str) -> set[tuple]:
    """The rows of the range that source and store do not have alike."""
    with made.site.hospital() as hospital, made.store(name) as store:
        mine = hospital.execute(
            "SELECT vital_id::text, mrn, pulse FROM his.vital_sign WHERE vital_id BETWEEN %s AND %s"
            " ORDER BY 1",
            [LOW, HIGH],
        ).fetchall()
        theirs = store.execute(
            "SELECT record_id, patient_id, pulse_per_min FROM consult.vital_sign"
            " WHERE campus = 'main' AND NOT deleted AND record_id = ANY (%s) ORDER BY 1",
            [[str(key) for key in range(LOW, HIGH + 1)]],
        ).fetchall()
    assert len(mine) >= 90  # Ten are ended before, where both stores are damaged.
    return set(mine) ^ set(theirs)


@pytest.mark.parametrize("made", [1, 2], indirect=True)
def test_a_range_is_mended_and_nothing_else_touched_while_changes_flow(made, capsys, request):
    chance = random.Random(seed := request.node.callspec.params["made"])
    name = ("primary", "main")[seed % 2]
    for first in (LOW, FIRST + 201):
        damage(made, name, first, chance)
    before = outside(made, name)
    assert differing(made, name)
    with traffic(made.site, seed), changes(made):
        assert reread(made, *BOUNDS, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] >= 90 and told["delivered"] + told["superseded"] >= 30 and told["deleted"]
    made.site.drain()
    assert outside(made, name) == before
    assert not differing(made, name)
    assert reread(made) == 0
    made.site.drain()
    made.site.prove()


def test_killed_at_random_it_goes_on_where_it_was(made):
    chance = random.Random(seed_of_this_run())
    for name in ("primary", "main"):
        damage(made, name, LOW, chance)
    before = {name: outside(made, name) for name in ("primary", "main")}
    command = [
        *(sys.executable, "-m", "runners.cli", "reread", CAMPUS, "--config", str(made.site.path)),
        *("--table", TABLE, *BOUNDS, "--rows-s", "50", "--json"),
    ]
    # Of about 95 rows and then 290 ids: while rows are read, and while deletions are looked for.
    points = sorted([*chance.sample(range(1, 90), 3), *chance.sample(range(100, 300), 2)])
    noted = [0]

    def come_to(point: int) -> bool:
        with made.store("main") as store:
            row = store.execute(
                "SELECT phase, (tally->>'rows')::int + (tally->>'ids')::int FROM sync.reread"
            ).fetchone()
        noted.append(row[1] if row and row[0] != "done" else noted[-1])
        return noted[-1] >= point

    with changes(made):
        for point in points:
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
                until(lambda point=point: come_to(point), 60, f"{point}: {noted[-1]}")
                assert child.poll() is None
                child.send_signal(signal.SIGKILL)
        assert noted == sorted(noted)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 80 <= told["rows_before"] == told["rows"] < 130
    made.site.drain()
    for name in ("primary", "main"):
        assert not differing(made, name)
        assert outside(made, name) == before[name]
    assert reread(made) == 0  # Begun anew: what had ended is no place to go on from.
    made.site.drain()
    made.site.prove()


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_it_is_no_faster_than_is_allowed(made):
    clock = Clock()
    ends = Ends(made.site.config, 30, monotonic_s)
    span = Span(TABLE, (str(LOW),), (str(HIGH),))
    noted = []
    work = Reread(
        ends,
        Task(CAMPUS, span, ("primary",), rows_s=40),
        lambda at: noted.append(at.tally.rows + at.tally.ids),
        wall_clock_us,
        lambda: clock.now,
        clock.sleep,
    )
    made_of = work.run()
    assert made_of.tally.rows == 100 and made_of.tally.delivered == 0
    # A quarter of a second's rows at a time, each paid for before the next.
    assert max(clock.slept) <= 0.25
    assert all(more - rows <= 10 for rows, more in itertools.pairwise(noted))
    assert clock.now >= (made_of.tally.rows + made_of.tally.ids - 20) / 40


def test_real_time_passes_under_a_throttle(made, capsys):
    began = time.monotonic()
    assert reread(made, *BOUNDS, "--rows-s", "100", "--where-column", "measured_at",
                  "--since", "2020-01-01") == 0  # fmt: skip
    assert time.monotonic() - began >= 100 / 100 - 0.25


def test_a_day_s_rows_are_renewed_and_deletions_are_not_guessed(made, capsys):
    with made.site.hospital() as hospital:
        hospital.execute(
            "UPDATE his.vital_sign SET measured_at = '2026-02-01 00:00+08' WHERE vital_id <= %s",
            [LOW],
        )
        hospital.execute("DELETE FROM his.vital_sign WHERE vital_id = %s", [LOW - 1])
    made.site.drain()
    with made.store("primary") as store:
        store.execute("UPDATE consult.vital_sign SET visit_no = 'no' WHERE campus = 'main'")
        store.execute("UPDATE consult.vital_sign SET deleted = false WHERE campus = 'main'")
    day = ("--where-column", "measured_at", "--since")
    assert reread(made, *day, "2026-02-02", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 0
    assert reread(made, *day, "2026-02-01", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["delivered"], told["deleted"]) == (50, 50, 0)
    assert told["deletions_looked_for"] is False
    assert reread(made, *day, "2026-02-01") == 0
    assert "deletions were not looked for" in capsys.readouterr().out
    assert reread(made) == 0
    made.site.prove()


def test_a_view_without_a_place_stops_it_and_it_goes_on_later(made, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.reread.PATIENCE_S", 0.3)
    damage(made, "main", LOW, random.Random(1))
    with made.site.hospital(autocommit=False) as hospital:
        hospital.execute("UPDATE his.vital_sign SET pulse = 1 WHERE vital_id = %s", [FIRST + 1])
        assert reread(made, *BOUNDS) == 1
        assert "transactions that were under way did not end" in capsys.readouterr().err
        hospital.rollback()
    assert reread(made, *BOUNDS) == 0
    made.site.drain()
    made.site.prove()


def test_two_at_once_are_refused_and_a_store_that_is_down_is_named(made, capsys):
    with made.site.store("main") as store:
        span = Span(TABLE, (str(LOW),), (str(HIGH),))
        store.execute(
            "SELECT pg_advisory_lock(hashtextextended('reread ' || %s || ' ' || %s, 0))",
            ["main>main", span.name],
        )
        assert reread(made, *BOUNDS) == 1
        assert "by another process" in capsys.readouterr().err
        assert reread(made, *BOUNDS, "--store", "primary") == 0
