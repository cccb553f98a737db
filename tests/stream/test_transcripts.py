"""The golden transcripts: stories that a clinician can read, run as they stand."""

import pathlib
import re

import pydantic
import pytest

from schemas.batches import Op
from schemas.emergency_rules import Rule, load_rules
from schemas.entities import TABLES
from schemas.tables import Kind
from schemas.yaml_lines import read_model
from tests.canonical import COMMIT_US, at, rows_of
from tests.stream.gathering import Delivery, Story
from transforms.classify_lanes import Classifier
from transforms.escalations import Escalations

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
HOUR_US = 3_600_000_000
LANES = {
    path: re.search(r"^lane: (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
    for path in sorted(FOLDER.glob("*.yaml"))
}


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class _Commit(_Strict):
    batch: str
    at: str
    rows: int
    link: str = ""


class _Delivered(_Strict):
    batches: list[str]
    when: str
    window: str
    rows: int
    why: str


class _RoutineStep(_Strict):
    clock: str
    says: str
    watermark: str | dict[str, str] = {}
    commits: list[_Commit] = []
    delivered: list[_Delivered] = []


class _Routine(_Strict):
    title: str
    tells: str
    lane: str
    policy: dict[str, float]
    links: list[str]
    story: list[_RoutineStep]


class _EmergencyStep(_Strict):
    clock: str
    says: str
    changes: list[dict]
    emergency: dict[str, str] = {}
    routine_only: list[str] = []
    under_emergency: list[str]


class _Emergency(_Strict):
    title: str
    tells: str
    lane: str
    campus: str
    story: list[_EmergencyStep]


def seconds(clock: str) -> float:
    """Returns the seconds since midnight of `08:00`, `08:00:01` or `08:00:01.500`."""
    hours, minutes, *rest = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest[0] if rest else 0)


@pytest.mark.parametrize("path", LANES, ids=lambda path: path.stem)
def test_every_transcript_is_of_a_lane(path):
    assert LANES[path] in ("routine", "emergency")


def _told(delivery: Delivery) -> dict:
    return {
        "clock": delivery.clock_s,
        "link": delivery.link,
        "batches": list(delivery.batches),
        "when": delivery.timing.replace("_", " "),
        "window": delivery.window_s[0],
        "rows": delivery.rows,
    }


@pytest.mark.parametrize(
    "path", [p for p, lane in LANES.items() if lane == "routine"], ids=lambda path: path.stem
)
def test_routine_lane(path):
    told, _ = read_model(path, _Routine)
    links = {commit.batch: commit.link for step in told.story for commit in step.commits}
    story = Story(*told.links, **told.policy)
    expected = []
    for step in told.story:
        story.clock(seconds(step.clock))
        for commit in step.commits:
            story.commit(commit.batch, seconds(commit.at), commit.rows, commit.link)
        marks = step.watermark
        for link, mark in ({"": marks} if isinstance(marks, str) else marks).items():
            story.watermark(seconds(mark), link)
        expected += [
            {
                "clock": seconds(step.clock),
                "link": links[pane.batches[0]] or told.links[0],
                "batches": pane.batches,
                "when": pane.when,
                "window": seconds(pane.window),
                "rows": pane.rows,
            }
            for pane in step.delivered
        ]
    assert [_told(delivery) for delivery in story.run()] == expected


def _row(change: dict, lsn: int) -> tuple[str, str, dict]:
    """Returns name, table and canonical row of one change of a story."""
    change = dict(change)
    name, table = change.pop("row"), change.pop("table")
    declared = TABLES[table]
    row = {
        "_lsn": lsn,
        "_op": int(Op[change.pop("op", "insert").upper()]),
        "patient_id": change.pop("patient"),
        "unchanged": change.pop("unchanged", ()),
    }
    if (hours := change.pop("hours_ago", None)) is not None:
        row[declared.event_time] = at(COMMIT_US - hours * HOUR_US)
    for column, value in change.items():
        as_text = declared.by_name[column].kind in (Kind.TEXT, Kind.DECIMAL)
        row[column] = str(value) if as_text else value
    return name, table, row


@pytest.mark.parametrize(
    "path", [p for p, lane in LANES.items() if lane == "emergency"], ids=lambda path: path.stem
)
def test_emergency_lane(path):
    told, _ = read_model(path, _Emergency)
    classifier, patients = Classifier(load_rules(), told.campus), Escalations()
    for lsn, step in enumerate(told.story, start=1):
        tables: dict[str, list[dict]] = {}
        places = {}
        for seq, change in enumerate(step.changes, start=1):
            name, table, row = _row(change, lsn)
            tables.setdefault(table, []).append({**row, "_seq": seq})
            places[name] = (table, len(tables[table]) - 1)
        assert len(places) == len(step.changes), "two rows of one name"
        done = classifier.classify({t: rows_of(t, rows) for t, rows in tables.items()}, patients)
        patients = patients.after(done.escalations)
        urgent = {
            name: Rule(done.rules[table][i]).name
            for name, (table, i) in places.items()
            if done.masks[table][i]
        }
        assert urgent == step.emergency, step.clock
        assert sorted(set(places) - set(urgent)) == sorted(step.routine_only), step.clock
        assert sorted(patients.patients) == step.under_emergency, step.clock
