"""Quality in a consult store: every rule fires, alarms are kept once, settle, and are shown."""

import argparse
import base64
import collections
import datetime
import json

import numpy as np
import psycopg
import pytest
import yaml

from pipelines.quality import check_stores
from runners.quality import quality
from schemas.config import load
from schemas.entities import TABLES
from schemas.patient_matching import load_matching_rules
from schemas.quality_rules import DEFAULT_PATH, load_quality_rules
from tests.quality_cases import NOW, NOW_US, ROW_CASES, STORE_CASES, Case, Rows, lab, row
from tests.store_rows import StoreRows
from tests.unit.test_check_quality import CAUSES, batches
from tests.unit.test_clinic import STYLES, clinic, harmonised
from transforms.check_quality import QualityChecker
from transforms.deliver import store_schema
from transforms.deliver.judging import check_store, link_persons

RULES = load_quality_rules()
MATCHING = load_matching_rules()
_HOUR_US = 3_600_000_000
SPECIMEN = {"item_sum", "item_at_most", "item_ratio"}
KINDS = {check.reason: check.kind for rule in RULES.rules for check in rule.checks}


class World:
    """One store that two campuses feed."""

    def __init__(self, dsn: str):
        self.conn = psycopg.connect(dsn, autocommit=True)
        store_schema.ensure(self.conn)
        # Rows that a store would refuse are judged before it does: here they are let in.
        for table, name in self.conn.execute(
            "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype = 'c'"
            " AND connamespace = 'consult'::regnamespace"
        ).fetchall():
            self.conn.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
        self.rows = StoreRows(self.conn)
        self.numbers = collections.Counter()
        for campus in ("main", "east"):
            self.rows.reach(campus, 1)

    def put(self, rows: Rows, campuses: tuple[str, ...] = ()) -> None:
        """Lays rows down under new record ids; those of several campuses are of one person."""
        for i, (table, values) in enumerate(rows):
            campus = campuses[i] if campuses else "main"
            self.numbers[table] += 1
            self.rows.put(table, campus, str(self.numbers[table]), **values)
        if campuses:
            links = [f"{campus}>primary" for campus in dict.fromkeys(campuses)]
            link_persons.link(self.conn, links, MATCHING)

    def check(self, now_us: int = NOW_US, campus: str = "main", **more) -> check_store.Checked:
        return check_store.check_campus(self.conn, f"{campus}>primary", RULES, now_us, **more)

    def open(self) -> list[tuple]:
        """Rule and reason of the open alarms."""
        return [(alarm[5], alarm[7]) for alarm in check_store.open_alarms(self.conn)]

    def clear(self) -> None:
        names = ", ".join(f"consult.{table}" for table in TABLES)
        self.conn.execute(
            f"TRUNCATE {names}, sync.quality_alarm, sync.quality_progress, sync.quality_later,"
            " sync.person_record, sync.person_link, sync.person_progress, sync.person_past"
        )
        self.numbers.clear()


@pytest.fixture(scope="module")
def shared(postgres_server, _database_numbers):
    made = World(postgres_server.create_database(f"quality_{next(_database_numbers)}"))
    yield made
    made.conn.close()


@pytest.fixture
def world(shared):
    shared.clear()
    return shared


@pytest.mark.parametrize("case", [*ROW_CASES, *STORE_CASES], ids=lambda case: case.reason)
def test_every_check_fires_in_the_store_too(world, case: Case):
    """On what breaks it and nothing else; what is good raises nothing; both also on arrival."""
    world.put(case.good, case.campuses)
    world.check()
    assert world.open() == []
    world.clear()
    world.put(case.bad, case.campuses)
    assert world.check().found >= 1
    found = world.open()
    assert {rule for rule, _ in found} == {case.rule}
    (reason,) = {reason for _, reason in found}
    assert reason == case.reason or reason.removeprefix(f"{case.reason}_") in CAUSES
    world.check()
    assert world.open() == found


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", STORE_CASES, ids=lambda case: case.reason)
def test_a_row_that_comes_late_is_met(world, case: Case, order):
    """Each row in a run of its own, the last first and the other way round."""
    rows = list(enumerate(case.bad))[::order]
    for place, one in rows:
        world.put([one], case.campuses[place : place + 1])
        if case.campuses:
            link_persons.link(world.conn, ["main>primary", "east>primary"], MATCHING)
        world.check()
        world.check(campus="east")
    assert set(world.open()) == {(case.rule, case.reason)}


@pytest.mark.parametrize(
    "case", [c for c in ROW_CASES if KINDS[c.reason] in SPECIMEN], ids=lambda case: case.reason
)
def test_stream_and_store_give_a_specimen_the_same_alarm(world, case: Case):
    world.put(case.bad)
    world.check(judge_rows=False)
    (kept,) = check_store.open_alarms(world.conn)
    (streamed,) = QualityChecker(RULES, "main").check(batches(case.bad), NOW_US).to_pylist()
    assert (kept[5], kept[6], kept[7]) == (
        streamed["rule"],
        streamed["column"],
        streamed["reason"],
    )
    assert kept[2] == streamed["record_id"] == str(len(case.bad))


def test_alarms_of_a_delivery_are_kept_once_and_reopened(world):
    world.put([row("vital_sign", pulse_per_min=300)])
    lsn = world.conn.execute("SELECT src_lsn FROM consult.vital_sign").fetchone()[0]
    changes = [("vital_sign", row("vital_sign", pulse_per_min=300)[1] | {"_lsn": lsn})]
    alarms = QualityChecker(RULES, "main").check(batches(changes), NOW_US)
    assert check_store.put_alarms(world.conn, alarms) == 1
    assert check_store.put_alarms(world.conn, alarms) == 0
    world.check()
    assert world.open() == [(1, "heart_rate_impossible")]
    ever = "SELECT count(*) FROM sync.quality_alarm"
    assert world.conn.execute(ever).fetchone() == (1,)
    assert check_store.put_alarms(world.conn, alarms.slice(0, 0)) == 0


def test_alarms_settle_when_the_row_or_what_it_contradicts_is_mended(world):
    world.rows.put("patient", "main", "1", **row("patient")[1])
    world.rows.put("diagnosis", "main", "1", **row("diagnosis", code="O80.900")[1])
    world.rows.put("vital_sign", "main", "1", **row("vital_sign", pulse_per_min=0)[1])
    world.check()
    assert world.open() == [(1, "heart_rate_impossible"), (22, "man_with_womans_diagnosis")]
    world.rows.put("patient", "main", "1", **row("patient", sex="2", id_no=None)[1])
    assert world.check().settled == 1
    world.rows.put("vital_sign", "main", "1", **row("vital_sign", pulse_per_min=70)[1])
    assert world.check().settled == 1
    assert world.open() == []
    world.rows.put("patient", "main", "1", **row("patient")[1])
    world.check()
    assert world.open() == [(22, "man_with_womans_diagnosis")]
    world.rows.put("diagnosis", "main", "1", deleted=True, **row("diagnosis", code="O80")[1])
    world.check()
    assert world.open() == []
    ever = "SELECT count(*) FROM sync.quality_alarm"
    assert world.conn.execute(ever).fetchone() == (2,)


def test_a_notice_has_its_time(world):
    """Nothing is said before the hour is over; afterwards without any new row."""
    critical = lab("2823-3", "7.1", "mmol/L", critical=True, reported_at=NOW)
    world.put([critical])
    world.check()
    assert world.open() == []
    assert world.check(NOW_US + _HOUR_US - 1).patients == 0
    assert world.check(NOW_US + _HOUR_US).patients == 1
    assert world.open() == [(25, "critical_value_without_notice")]
    late = NOW + datetime.timedelta(minutes=30)
    world.put([row("emr_document", type="危急值记录", written_at=late)])
    world.check(NOW_US + 2 * _HOUR_US)
    assert world.open() == []


def test_only_what_changed_is_judged(world):
    for i in range(40):
        world.put([lab("2823-3", "42", "mmol/L", patient_id=f"P{i}")])
    first = world.check()
    assert (first.whole, first.patients, first.rows, first.found) == (True, 40, 40, 40)
    again = world.check()
    assert (again.whole, again.patients, again.rows, again.found) == (False, 0, 0, 0)
    world.put([lab("2823-3", "42", "mmol/L", patient_id="P3")])
    third = world.check()
    assert (third.patients, third.rows, third.found) == (1, 1, 1)
    assert world.check(campus="east").rows == 0


def test_other_rules_judge_everything_again(world, tmp_path):
    world.put([row("vital_sign", pulse_per_min=0), row("vital_sign", systolic_mmhg=0)])
    world.check()
    path = tmp_path / "quality.yaml"
    text = DEFAULT_PATH.read_text(encoding="utf-8")
    off = "campuses: {main: {off: [systolic_impossible]}}"
    path.write_text(text.replace("campuses: {}", off), encoding="utf-8")
    done = check_store.check_campus(
        world.conn, "main>primary", load_quality_rules(path), NOW_US, judge_rows=False
    )
    assert (done.whole, done.rows, done.settled) == (True, 2, 1)
    assert world.open() == [(1, "heart_rate_impossible")]


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_false_alarms_on_clean_data(shared, name, mapping):
    """Of the rules that need the store, on ordinary days at three campuses.

    The invented laboratory draws each visit's values anew, so that a patient who comes again
    with another illness has results that no person would have: rule 15 may say so, seldom.
    """
    shared.clear()
    one = clinic(31, name, mapping)
    stories = (step for _ in range(150) for step in (one.routine(), one.emergency()))
    done = harmonised(mapping, stories)
    count = 0
    for table, batch in done.tables.items():
        names = [column.name for column in TABLES[table].columns]
        latest: dict[str, dict] = {}
        for change in batch.to_pylist():
            latest[change["record_id"]] = {key: change[key] for key in ("record_id", *names)}
        shared.rows.put_many(table, name, list(latest.values()))
        count += len(latest)
    newest = max(int(np.max(batch["_commit_us"].to_numpy())) for batch in done.tables.values())
    shared.check(newest + 2 * _HOUR_US, campus=name)
    found = collections.Counter(shared.open())
    print(f"{name}: {count} rows, alarms {dict(found)}")
    assert count > 6000
    assert set(found) <= {(15, "unlike_result_before")}
    assert sum(found.values()) <= count / 1000


# The verb.


@pytest.fixture
def campus_file(tmp_path, world):
    (tmp_path / "key").write_text(base64.b64encode(bytes(32)).decode())
    source = {"kind": "postgresql", "mapping": "postgresql_his"}
    content = {
        "version": 1,
        "sources": {
            c: source | {"dsn": f"postgresql://x@127.0.0.1:1/{c}"} for c in ("main", "east")
        },
        "stores": {"primary": {"dsn": world.conn.info.dsn}},
        "dead_letter_key": "file:key",
    }
    path = tmp_path / "campuses.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(path, action: str, **more) -> int:
    given = {"rule": [], "json": False} | more
    return quality(argparse.Namespace(config=path, action=action, **given))


def test_list_names_reasons_and_what_is_not_evaluated(campus_file, world, capsys):
    world.put([row("patient", name="寮犱笁"), row("vital_sign", pulse_per_min=0)])
    assert run(campus_file, "check") == 0
    assert run(campus_file, "list") == 0
    shown = capsys.readouterr().out
    assert "heart_rate_impossible" in shown and "2 open alarms" in shown
    assert "rule 28 is not evaluated" in shown and "寮犱笁" not in shown
    assert run(campus_file, "list", json=True, rule=[30]) == 0
    listed = json.loads(capsys.readouterr().out)
    (alarm,) = listed["alarms"]
    assert (alarm["rule"], alarm["column"]) == (30, "name")
    assert alarm["reason"] == "name_garbled_read_as_gbk"
    assert set(listed["not_evaluated"]) == {"17", "19", "20", "25", "28", "29"}
    assert run(campus_file, "list", rule=[1]) == 0
    assert "vital_sign 1 pulse_per_min" in capsys.readouterr().out
    assert run(campus_file, "check", json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["checked"][0]["rows"] == 0


def test_rules_are_told(campus_file, capsys):
    assert run(campus_file, "rules") == 0
    shown = capsys.readouterr().out
    assert all(f"{rule.rule:>2}  {rule.title[:20]}" in shown for rule in RULES.rules)
    assert run(campus_file, "rules", json=True) == 0
    assert len(json.loads(capsys.readouterr().out)["rules"]) == 30


def test_a_store_that_is_down_is_named(campus_file, capsys):
    content = yaml.safe_load(campus_file.read_text())
    content["stores"]["primary"]["dsn"] = "postgresql://sync@127.0.0.1:1/consult"
    campus_file.write_text(yaml.safe_dump(content))
    assert run(campus_file, "list") == 1
    assert run(campus_file, "check") == 1
    assert "store primary" in capsys.readouterr().err
    assert check_stores(load(campus_file), RULES)[0].why
