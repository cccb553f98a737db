"""What a report concludes, and its forms: JSON, CSV, page, terminal and metrics."""

import csv
import dataclasses
import datetime
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from pipelines.emergency_pairs import PairWatch
from pipelines.sla_facts import LagRow
from pipelines.sla_report import LinkView, View, lag_points, measure_objectives
from runners import words
from runners.metrics import LinkCollector
from runners.report_html import headline, page, tiles
from runners.status import render, rows_per_s
from schemas.batches import Lane
from schemas.config import Objectives
from schemas.positions import Position
from schemas.receipts import Counts
from schemas.reports import (
    ONE_SIDED,
    AlarmCount,
    BacklogPoint,
    Comparison,
    Completeness,
    Conservation,
    Gap,
    Health,
    Hold,
    Incident,
    LaneLag,
    Pair,
    Refused,
    Report,
    Risk,
    Snapshot,
    State,
    StoresMatch,
    TableMatch,
    Tending,
    to_csv,
    to_json,
)
from schemas.sketches import LagSketch

START_US = 1_790_000_000_000_000
LINKS = ("main>primary", "main>main")
TEN_S = 10_000_000


def lag_rows(windows: int = 30, emergency_ms: float = 30) -> list[LagRow]:
    rows = []
    for link in LINKS:
        for lane, lag_ms in ((Lane.EMERGENCY, emergency_ms), (Lane.ROUTINE, 400.0)):
            for i in range(windows):
                sketch = LagSketch.of_ms(np.array([lag_ms, lag_ms * 2]), np.array([99, 1]))
                rows.append(LagRow(link, lane, START_US + i * TEN_S, 1, sketch))
    return rows


def pair(together: bool = True) -> Pair:
    reached = Position(90, 1)
    return Pair(
        "main",
        *LINKS,
        Position(100, 1),
        Position(100, 1),
        Position(100, 1) if together else reached,
        together,
        "" if together else LINKS[1],
        0 if together else 12.0,
        0 if together else 12.0,
        0 if together else 1,
        0 if together else 1,
    )


def sound_report(**changes) -> Report:
    rows = lag_rows()
    pairs = (pair(),)
    match = TableMatch("primary", "main", "patient", 9, 8, refused=1)
    given = {
        "made_us": START_US + 31 * TEN_S,
        "from_us": START_US,
        "to_us": START_US + 30 * TEN_S,
        "links": LINKS,
        "health": tuple(
            Health(link, State.UP, "", 816, 4096, 900, "reserved", True) for link in LINKS
        ),
        "lag": tuple(
            LaneLag.of(link, lane, LagSketch.of_ms(np.array([30.0])), 0)
            for link in LINKS
            for lane in Lane
        ),
        "points": lag_points(rows),
        "backlog": tuple(
            BacklogPoint(link, START_US + i * TEN_S, State.UP, 1000 * i, 10)
            for link in LINKS
            for i in range(5)
        ),
        "conservation": tuple(
            Conservation(link, lane, Counts(10, 5, 2, 1, 1, 1))
            for link in LINKS
            for lane in (*Lane, None)
        ),
        "completeness": (Completeness(LINKS[0], Lane.ROUTINE, "patient", 4, 0, 0, 10, 10),),
        "gaps": (),
        "refused": (Refused(LINKS[0], "lis.result", "val_num", "bad_decimal", 2, 1),),
        "holds": (),
        "incidents": (),
        "snapshots": (Snapshot(LINKS[0], "done", "first", START_US, START_US + TEN_S),),
        "pairs": pairs,
        "objectives": measure_objectives(Objectives(), dict.fromkeys(LINKS, 0.0), rows, pairs),
        "comparison": Comparison(
            (match,),
            (StoresMatch("primary", "main", "main", "patient", 8, 8, True, 1, 1, True),),
            (),
            25,
            0.5,
        ),
    }
    return Report(**(given | changes))


def test_a_sound_report_says_so_everywhere():
    report = sound_report()
    assert report.sound
    assert report.law_holds
    assert report.complete
    assert report.objectives_met
    assert report.total == Counts(40, 20, 8, 4, 4, 4)
    assert all(tile.good for tile in tiles(report))
    assert "Every change arrived" in headline(report)


def test_what_a_dead_letter_holds_is_not_missing():
    refused = (Refused(LINKS[0], "his.vital_sign", "spo2_percent", "check_violation", 1, 0),)
    report = sound_report(completeness=short, refused=refused)
    assert report.complete and report.sound
    replayed = (dataclasses.replace(refused[0], open=0, replayed=1),)
    assert not sound_report(completeness=short, refused=replayed).complete


unbalanced = (Conservation(LINKS[0], Lane.ROUTINE, Counts(10, 5)),)
short = (Completeness(LINKS[0], Lane.ROUTINE, "patient", 4, 1, 0, 10, 9, START_US),)
island = tuple(dataclasses.replace(part, islands=1) for part in sound_report().conservation)
unlike = Comparison((TableMatch("primary", "main", "patient", 9, 8, missing=1),), (), (), 17, 0.1)
rotten = Comparison((TableMatch("primary", "main", "patient", 9, 9, rotten=1),), (), (), 18, 0.1)
nothing = Comparison((), (), (), 0, 0.1)


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({"conservation": unbalanced}, 0),
        ({"conservation": ()}, 0),
        ({"completeness": short}, 1),
        ({"conservation": island}, 1),
        ({"comparison": unlike}, 2),
        ({"comparison": rotten}, 2),
        ({"comparison": nothing}, 2),
        ({"unreachable": ("store main",)}, None),
    ],
)
def test_whatever_is_wrong_makes_the_report_unsound_and_shows(changes, tile):
    report = sound_report(**changes)
    assert not report.sound
    assert "arrived, once" not in headline(report)
    if tile is not None:
        assert [place for place, shown in enumerate(tiles(report)) if not shown.good] == [tile]
    assert json.loads(to_json(report))["verdict"]["sound"] is False


def test_lateness_alone_is_told_and_leaves_the_data_sound():
    rows = lag_rows(emergency_ms=1500)
    report = sound_report(
        objectives=measure_objectives(Objectives(), dict.fromkeys(LINKS, 0.0), rows, ())
    )
    assert report.sound
    assert [m.objective for m in report.breaches] == ["emergency_p99_ms"] * 2
    assert "later than promised" in headline(report)
    assert "p99 was" in page(report)


def test_contents_that_were_not_compared_are_not_called_equal():
    report = sound_report(comparison=None)
    assert report.stores_equal is None
    assert tiles(report)[2].good is None
    assert "not compared" in headline(report)


def test_json_and_csv_hold_the_same_numbers():
    report = sound_report()
    data = json.loads(to_json(report))
    files = to_csv(report)
    conservation = list(csv.DictReader(io.StringIO(files["conservation.csv"])))
    assert [int(row["captured"]) for row in conservation] == [
        part["counts"]["captured"] for part in data["conservation"]
    ]
    points = list(csv.DictReader(io.StringIO(files["lag_windows.csv"])))
    assert points[0]["start"] == "2026-09-21T14:13:20.000Z"
    assert len(points) == len(data["points"])
    assert "holds.csv" not in files
    assert data["comparison"]["equal"] is True


def full_report() -> Report:
    """One of everything, and names that would break a careless page."""
    return sound_report(
        completeness=short,
        gaps=(Gap(LINKS[0], Lane.ROUTINE, "patient", START_US, 10, 9, "short"),),
        holds=(Hold(LINKS[0], "truncate", "his.<b>&", "open", START_US),),
        incidents=(Incident(LINKS[1], ONE_SIDED, "waits", "open", START_US, None),),
        pairs=(pair(False),),
        unreachable=("store main",),
        comparison=unlike,
        health=(Health(LINKS[0], State.BEHIND, "later"), Health(LINKS[1], State.DOWN, "gone")),
    )


@pytest.mark.parametrize("report", [sound_report(), full_report()], ids=["sound", "full"])
def test_the_page_needs_nothing_else_and_repeats(report):
    zone = datetime.timezone(datetime.timedelta(hours=8))
    text = page(report, zone)
    assert text == page(report, zone)
    # Nothing is fetched: the only addresses are names of XML vocabularies, which nobody opens.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)", text)
    assert "2026-09-21 22:13:20" in text
    assert "(UTC+08:00)" in text
    assert text.count("<svg") == 4
    assert ">p99</text>" in text.replace("<!-- p99 -->", "")
    assert "急诊" in text
    assert "平诊" in text
    assert "<b>&" not in text


def test_the_page_of_a_system_that_has_done_nothing():
    empty = dict.fromkeys(
        [
            "lag",
            "points",
            "backlog",
            "conservation",
            "completeness",
            "refused",
            "snapshots",
            "pairs",
            "objectives",
        ],
        (),
    )
    text = page(sound_report(**empty, from_us=0, to_us=0, comparison=None))
    assert "Nothing measured yet" in text
    assert "<svg" not in text


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9)), min_size=1, max_size=60))
def test_points_lose_no_row_and_stay_few(windows):
    rows = [
        LagRow("a>b", Lane.ROUTINE, START_US + place * TEN_S, n, LagSketch.of_ms(np.full(n, 5.0)))
        for place, n in windows
    ]
    points = lag_points(rows, points_max=40)
    assert len(points) <= 40
    assert sum(point.rows for point in points) == sum(n for _, n in windows)
    assert sum(point.late for point in points) == sum(n for _, n in windows)


def test_starts_of_the_pipeline_add_up_in_a_window_of_an_objective():
    one = LagSketch.of_ms(np.array([10.0]), np.array([50]))
    slow = LagSketch.of_ms(np.array([5000.0]), np.array([50]))
    rows = [LagRow("a>b", Lane.EMERGENCY, START_US, 0, sketch) for sketch in (one, slow)]
    emergency, routine = measure_objectives(Objectives(), {"a>b": 0.0}, rows, ())
    assert (emergency.windows, emergency.windows_over, emergency.share_within) == (1, 1, 0.5)
    assert not emergency.met
    assert (routine.value, routine.met) == (None, True)


@pytest.mark.parametrize(
    ("lag_ms", "blur_s", "met", "whole"),
    [(900, 1.0, True, True), (1900, 1.0, None, None), (2100, 1.0, False, False),
     (900, 0.0, True, True), (1100, 0.0, False, False)],
)  # fmt: skip
def test_what_whole_seconds_may_have_added_breaks_no_objective(lag_ms, blur_s, met, whole):
    sketch = LagSketch.of_ms(np.array([float(lag_ms)]), np.array([50]))
    rows = [LagRow("a>b", Lane.EMERGENCY, START_US, 0, sketch)]
    objectives = measure_objectives(Objectives(), {"a>b": blur_s}, rows, ())
    assert objectives[0].met is met
    assert objectives[0].windows_over == (met is False)
    report = sound_report(objectives=objectives)
    assert report.objectives_met is whole
    assert tiles(report)[3].good is whole
    assert len(report.breaches) == (met is False)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=80))
def test_a_pair_is_late_exactly_when_a_position_waited_too_long(steps):
    """Against a model that remembers when every position was first seen one-sided."""
    watch = PairWatch(10)
    ahead = behind = now = 0
    seen: dict[int, int] = {}
    for grow, catch_up in steps:
        now += 3_000_000
        ahead += grow
        behind = min(ahead, behind + catch_up)
        state = dataclasses.replace(
            pair(behind == ahead),
            newest=Position(ahead, 1),
            primary_reached=Position(ahead, 1),
            local_reached=Position(behind, 1),
        )
        seen = {place: at for place, at in seen.items() if place > behind}
        if behind < ahead and ahead not in seen:
            seen[ahead] = now
        late = watch.late(state, now)
        oldest = min(seen.values(), default=now)
        if late:
            assert now - oldest > 10_000_000
        if behind == ahead:
            assert not late
        # Late at the latest when the newest position at the last catching up is twice too old.
        if now - oldest > 20_000_000 + 3_000_000:
            assert late


def view(at_us: int = START_US, delivered: int = 10, **changes) -> View:
    link = LinkView(
        Health(LINKS[0], State.UP, "", 2048, 4096, 1200, "reserved", True),
        {lane: Conservation(LINKS[0], lane, Counts(delivered, delivered)) for lane in Lane},
        {
            lane: LaneLag.of(LINKS[0], lane, LagSketch.of_ms(np.array([20.0, 20.0])), 0)
            for lane in Lane
        },
        3,
    )
    down = LinkView(Health(LINKS[1], State.DOWN, "store main cannot be reached"), {}, {}, 0)
    given = {"links": (link, down), "pairs": (pair(False),), "unreachable": ("store main",)}
    return View(at_us, **(given | changes))


def test_the_terminal_shows_a_row_a_link_and_what_is_wrong():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(view()))
    text = console.export_text()
    for word in ("main>primary", "up", "20 ms", "1.2 s", "2 KiB", "down", "急诊"):
        assert word in text
    assert text.count("store main cannot be reached") == 2
    assert "waits for emergencies" in text


ALARMS = (
    AlarmCount("primary", 15, "main", "lab_result", "value", "delta", 40, 90),
    AlarmCount("main", 15, "main", "lab_result", "value", "delta", 41, 90),
    AlarmCount("primary", 1, "main", "vital_sign", "pulse_per_min", "heart_rate", 2, 3),
    AlarmCount("primary", 7, "east", "patient", "birth_date", "in_future", 0, 5),
)
TENDING = (
    Tending("primary", START_US - 4_000_000, START_US - 30_000_000, 12),
    Tending("main", None, None, 0),
)


def test_the_terminal_counts_alarms_once_and_warns_of_logs_that_expire():
    link = view().links[0]
    soon = dataclasses.replace(link.health, seconds_left=5000.0, log_risk=Risk.CRITICAL)
    shown = view(links=(dataclasses.replace(link, health=soon),), alarms=ALARMS, tending=TENDING)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(shown))
    text = console.export_text()
    assert "main: 43 quality alarms open (rule 15: 41, rule 1: 2)" in text
    assert "12 pairs of patient records wait for a person" in text
    assert "may remove log that it needs in 83 min" in text
    assert "east" not in text


def test_metrics_count_alarms_by_rule_and_tell_the_time_left():
    collector = LinkCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    link = view().links[0]
    soon = dataclasses.replace(link.health, seconds_left=5000.0, log_risk=Risk.CRITICAL)
    links = (dataclasses.replace(link, health=soon), view().links[1])
    collector.show(view(links=links, alarms=ALARMS, tending=TENDING))
    text = generate_latest(registry).decode()
    for line in (
        'campus_sync_open_quality_alarms{campus="main",rule="15",store="primary"} 40.0',
        'campus_sync_open_patient_reviews{store="primary"} 12.0',
        'campus_sync_quality_age_seconds{store="primary"} 4.0',
        'campus_sync_log_seconds_left{link="main>primary"} 5000.0',
        'campus_sync_log_risk{link="main>primary"} 2.0',
        'campus_sync_log_risk{link="main>main"} 0.0',
    ):
        assert line in text, line
    assert 'campus_sync_log_seconds_left{link="main>main"}' not in text
    assert 'campus_sync_quality_age_seconds{store="main"}' not in text
    assert not re.search(r"heart_rate|delta|pulse", text)


def test_the_page_counts_alarms_and_names_who_loses_its_log():
    health = sound_report().health
    soon = dataclasses.replace(health[0], seconds_left=0.0, log_risk=Risk.CRITICAL)
    made = sound_report(health=(soon, health[1]), alarms=ALARMS, tending=TENDING)
    text = page(made)
    assert "may remove log that it needs at any moment" in text
    assert "12 pairs of patient records" in text
    row = r'<td class="n">15</td><td>lab result</td><td>value</td><td>delta</td><td class="n">41<'
    assert re.search(row, text)
    assert made.sound
    files = to_csv(made)
    assert files["quality_alarms.csv"].splitlines()[1] == (
        "primary,15,main,lab_result,value,delta,40,90"
    )
    (left,) = {row["log_risk"] for row in csv.DictReader(io.StringIO(files["health.csv"]))} - {
        "none"
    }
    assert left == "critical"
    assert json.loads(to_json(made))["tending"][1]["judged_us"] is None


def test_rows_a_second_are_counted_between_views():
    before, after = view(), view(START_US + 2_000_000, delivered=110)
    assert rows_per_s(after, after.links[0], before, before.links[0]) == 100
    assert rows_per_s(before, before.links[0]) == pytest.approx(4 / 60)
    assert rows_per_s(before, before.links[1]) is None


def test_metrics_carry_units_and_no_ids():
    collector = LinkCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    assert generate_latest(registry) == b""
    collector.show(view())
    text = generate_latest(registry).decode()
    assert 'campus_sync_link_state{link="main>primary",state="up"} 1.0' in text
    assert (
        'campus_sync_changes_total{lane="routine",link="main>primary",outcome="captured"} 10.0'
        in text
    )
    assert 'campus_sync_lag_seconds{lane="emergency",link="main>primary",quantile="0.99"}' in text
    assert 'campus_sync_watermark_lag_seconds{link="main>primary"} 1.2' in text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels <= {"link", "lane", "state", "outcome", "quantile", "source"}


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.milliseconds, 0.034, "0.03 ms"),
        (words.milliseconds, 18.24, "18.2 ms"),
        (words.milliseconds, 250, "250 ms"),
        (words.milliseconds, 300_000, "5 min"),
        (words.milliseconds, -1500, "-1.5 s"),
        (words.milliseconds, 7_200_000, "2 h"),
        (words.size, 1536, "1.5 KiB"),
        (words.size, 5 << 40, "5 TiB"),
        (words.percent, 0.99999, "99.99 %"),
        (words.percent, 1, "100 %"),
        (words.count, 1234567, "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"),
    ],
)
def test_numbers_read_at_a_glance(function, value, text):
    assert function(value) == text
