"""A clinic's days: visits hang together, calm ones stay calm, and a seed repeats them."""

import collections
import datetime
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.embedded.campus import campus
from runners.embedded.changes import KEYS, Step, apply, key_of
from runners.embedded.clinic import EMERGENCY_ROWS, ROUTINE_ROWS, Clinic
from runners.embedded.ids import PER_SEED, Ids
from runners.embedded.knowledge import CONTRAINDICATED, INDEX, ITEMS, PANELS
from runners.embedded.laboratory import Laboratory
from schemas.batches import Op
from schemas.emergency_rules import load_rules
from schemas.mappings import load_mapping
from tests.raw_changes import raw_batch, raw_of
from transforms.classify_lanes import Classifier
from transforms.escalations import Escalations
from transforms.harmonise import Harmonised, Harmoniser

NOON = int(datetime.datetime(2026, 11, 23, 4, tzinfo=datetime.UTC).timestamp()) * 1_000_000
seeds = st.integers(0, 999_999)
few = settings(max_examples=25)
OPS = {"insert": Op.INSERT, "update": Op.UPDATE}
STYLES = [
    ("main", "postgresql_his"),
    ("east", "postgresql_his"),
    ("west", "postgresql_his_us_units"),
]


def clinic(seed: int, name: str = "main", mapping: str = "postgresql_his") -> Clinic:
    habits = campus(name, mapping)
    clock = itertools.count(NOON, 1000)
    return Clinic(habits, np.random.default_rng(seed), Ids(seed, habits), lambda: next(clock))


def told(steps) -> tuple[list[Step], dict[str, list[dict]]]:
    """Runs a story in memory; returns its steps and the rows that it leaves."""
    tables: dict[str, dict[tuple, dict]] = {}
    done = []
    for step in steps:
        apply(tables, step)
        done.append(step)
    return done, {table: list(rows.values()) for table, rows in tables.items()}


def inserted(steps: list[Step], table: str) -> list[dict]:
    changes = [change for step in steps for change in step.changes]
    return [c.values for c in changes if c.op == "insert" and c.table == table]


@few
@given(seeds)
def test_same_seed_same_steps(seed):
    def day():
        one = clinic(seed)
        return [*one.routine(), *one.emergency(), one.registrations(5)], one.upload(50)

    first, second = day(), day()
    assert first[0] == second[0]
    assert first[1].results == second[1].results


@few
@given(seeds)
def test_calm_visits_raise_no_alarm(seed):
    """Below every threshold of DOMAIN.md 3 that opens the emergency lane."""
    steps, left = told(clinic(seed).routine())
    for row in inserted(steps, "his.vital_sign"):
        assert 50 < row["pulse"] < 150
        assert 80 < row["sbp"] <= 200
        assert row["spo2"] > 90
        assert row["temp_c"] <= 41
    for row in inserted(steps, "lis.result"):
        assert not row["critical"]
        assert row["abn_flag"] not in ("HH", "LL")
        if row["loinc"] == "14749-6" and row["val_num"]:
            assert float(row["val_num"]) > 3.33
    assert {row["priority"] for row in left["his.medical_order"]} <= {"routine", "urgent"}
    assert left["his.visit"][0]["status"] == "closed"
    assert left["his.visit"][0]["ended_at"] is not None


@few
@given(seeds)
def test_emergencies_are_urgent_from_arrival_to_sign_off(seed):
    steps, left = told(clinic(seed).emergency())
    (visit,) = left["his.visit"]
    assert visit["visit_class"] == "EMER"
    assert visit["triage_level"] in (1, 2)
    assert visit["visit_no"].startswith("V")
    assert visit["status"] == "signed_off"
    (consultation,) = left["his.consultation"]
    assert consultation["status"] == "signed_off"
    times = [consultation[name] for name in ("requested_at", "arrived_at", "answered_at")]
    assert times == sorted(times)
    assert times[1] - times[0] <= datetime.timedelta(minutes=10)
    assert {row["priority"] for row in left["his.medical_order"]} == {"stat"}
    assert {row["status"] for row in left["lis.result"]} <= {"final", "corrected"}
    assert all(row["pid"] for row in left["his.patient"])
    (diagnosis,) = left["his.diagnosis"]
    pathway = {"I20": "chest_pain", "I21": "chest_pain", "I61": "stroke", "I63": "stroke"}
    assert visit["pathway"] == pathway.get(diagnosis["icd10"][:3])
    last = steps[-1].changes[-1]
    assert (last.table, last.values["status"]) == ("his.visit", "signed_off")


@few
@given(seeds)
def test_every_row_is_of_the_visit_and_its_patient(seed):
    one = clinic(seed)
    for story in (one.routine(), one.emergency()):
        _, left = told(story)
        (visit,), (patient,) = left["his.visit"], left["his.patient"]
        for table, rows in left.items():
            for row in rows:
                assert row["mrn"] == patient["mrn"], table
                assert row.get("visit_no", visit["visit_no"]) == visit["visit_no"], table


@few
@given(seeds)
def test_bedside_values_are_possible(seed):
    steps, _ = told(clinic(seed).emergency())
    for row in inserted(steps, "his.vital_sign"):
        assert row["sbp"] > row["dbp"] > 0
        assert 3 <= row["gcs"] <= 15
        assert 60 <= row["spo2"] <= 100
        assert 33 <= row["temp_c"] <= 42


def test_flags_agree_with_value_and_range():
    one = clinic(5)
    for _ in range(40):
        for row in inserted(list(one.emergency()), "lis.result"):
            if row["val_num"] is None:
                assert row["abn_flag"] is None
                assert row["val_txt"]
                continue
            value, low, high = (float(row[name]) for name in ("val_num", "ref_low", "ref_high"))
            side = "L" if value < low else "H" if value > high else "N"
            assert row["abn_flag"][0] == side
            assert row["critical"] == (row["abn_flag"] in ("LL", "HH"))


def test_nobody_is_given_what_they_do_not_bear():
    one = clinic(6)
    met = 0
    for _ in range(400):
        steps, left = told(one.emergency())
        allergies = left["his.patient"][0]["allergies"] or ""
        banned = tuple(code for word, code in CONTRAINDICATED.items() if word in allergies)
        met += bool(banned)
        for row in inserted(steps, "his.prescription"):
            assert not (banned and row["drug_code"].startswith(banned)) or (
                left["his.patient"][0]["row_ver"] > 1  # Given before anybody knew who it was.
            )
    assert met > 10


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_every_code_and_unit_is_known_to_the_mapping(name, mapping):
    habits, known = campus(name, mapping), load_mapping(mapping)
    for kind in ("sex", "visit_class", "priority", "urgency", "abo", "rh"):
        listed = known.code_lists[kind].codes
        for canonical, written in getattr(habits, kind).items():
            if written is not None:
                assert listed[written] == canonical, (kind, written)
    units = next(iter(known.units.values()))
    laboratory = Laboratory(habits.mass_units)
    items = np.arange(len(ITEMS))
    results = laboratory.measure(np.random.default_rng(1), items, items < 0)
    rules = {(rule.item, rule.unit): rule for rule in units.rules}
    for item, row in zip(ITEMS, results.rows(), strict=True):
        if row["unit"] is None or not habits.mass_units or item.mass is None:
            assert row["loinc"] == item.code
            continue
        rule = rules[row["loinc"], row["unit"]]
        assert (rule.to_item or rule.item, rule.to_unit) == (item.code, item.unit)
        assert float(rule.factor) == item.mass.factor


def test_mass_units_are_the_same_blood():
    """The same draw at both kinds of campus differs by the rounding of the coarser one."""
    items = np.tile(np.arange(len(ITEMS)), 50)
    women = np.arange(len(items)) % 2 == 0
    si, mass = (
        Laboratory(mass_units).measure(np.random.default_rng(3), items, women)
        for mass_units in (False, True)
    )
    for i, item in enumerate(items):
        of = ITEMS[item]
        if si.value[i] is None or mass.value[i] is None or of.mass is None:
            continue
        coarse = 0.51 * (of.mass.factor * 10**-of.mass.decimals + 10**-of.decimals)
        assert float(mass.value[i]) * of.mass.factor == pytest.approx(
            float(si.value[i]), abs=coarse
        ), of.code


def test_one_in_twenty_of_the_healthy_is_outside_the_range():
    items = np.repeat(np.arange(len(ITEMS)), 2000)
    women = np.arange(len(items)) % 2 == 0
    results = Laboratory(False).measure(np.random.default_rng(4), items, women)
    for i, item in enumerate(ITEMS):
        if item.texts is None and not item.skewed:
            flags = results.flag[i * 2000 : (i + 1) * 2000]
            outside = sum(flag != "N" for flag in flags if flag) / 2000
            assert 0.02 < outside < 0.09, item.code


def test_uploads_are_calm_but_for_the_alarm():
    one = clinic(9)
    one.registrations(60)
    alarms = 0
    for _ in range(60):
        before = list(one.open_visits)
        upload = one.upload(300)
        critical = [i for i, bad in enumerate(upload.results.critical) if bad]
        alarms += upload.alarmed is not None
        if upload.alarmed is None:
            assert critical == []
            continue
        assert critical == [299]
        assert upload.visits[upload.whose[299]] is upload.alarmed
        assert upload.alarmed in before and upload.alarmed not in one.open_visits
        steps = list(one.alarm(upload.alarmed))
        assert steps[-1].changes[0].values["status"] == "signed_off"
    assert 4 <= alarms <= 25


def test_stories_show_all_that_databases_do():
    one = clinic(10)
    seen = collections.Counter()
    rows = {"routine": 0, "emergency": 0}
    for _ in range(300):
        for kind in rows:
            for step in getattr(one, kind)():
                rows[kind] += step.rows
                seen["rolled back"] += step.rolled_back
                seen["savepoint"] += bool(step.undone)
                for change in step.changes:
                    seen[change.op] += 1
                    seen["null"] += None in change.values.values()
                    seen["key change"] += bool(change.key) and set(change.key) <= set(change.values)
                    seen["corrected"] += change.values.get("status") == "corrected"
                    content = change.values.get("content", "")
                    seen["long"] += 20_000 <= len(content.encode()) <= 220_000
    assert min(seen.values()) >= 5, seen
    assert rows["routine"] / 300 == pytest.approx(ROUTINE_ROWS, abs=4)
    assert rows["emergency"] / 300 == pytest.approx(EMERGENCY_ROWS, abs=5)


@given(seeds, st.integers(0, PER_SEED - 1))
def test_ids_come_back_from_their_keys_and_keep_their_order(seed, used):
    ids = Ids(seed, campus("east", "postgresql_his"), used)
    first, second = ids.take(), ids.take()
    assert ids.uuid(first) < ids.uuid(second)
    assert ids.number(ids.uuid(first)) == first == ids.number(f"V{first:017d}")
    assert ids.number(str(first)) == first
    assert ids.uuid(first)[14] == "8" and ids.uuid(first)[19] in "89ab"


def test_seeds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="999999"):
        Ids(10**6, campus("main", "postgresql_his"))


def test_panels_and_illnesses_name_what_there_is():
    assert {code for panel in PANELS.values() for code in panel.items} <= set(INDEX)


def as_postgres_prints(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)


def harmonised(mapping: str, stories) -> Harmonised:
    """Runs stories one after the other and returns their changes as the sync sees them."""
    left: dict[str, dict[tuple, dict]] = {}
    tables = collections.defaultdict(list)
    for lsn, step in enumerate(itertools.chain.from_iterable(stories), start=1):
        apply(left, step)
        if step.rolled_back:
            continue
        for seq, change in enumerate(step.changes, start=1):
            if change.op == "delete":
                continue
            key = key_of(change.table, change.key | change.values)
            written = left[change.table][tuple(key.values())]
            place = {"_lsn": lsn, "_seq": seq, "_commit_us": NOON, "_op": OPS[change.op]}
            row = {column: as_postgres_prints(value) for column, value in written.items()}
            tables[change.table].append(row | place)
    columns = {table: [c for c in rows[0] if c[0] != "_"] for table, rows in tables.items()}
    raw = raw_of({t: raw_batch(columns[t], rows, KEYS[t]) for t, rows in tables.items()})
    done = Harmoniser(load_mapping(mapping)).apply(raw)
    assert sum(batch.num_rows for batch in done.tables.values()) == raw.captured
    return done


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_every_row_passes_its_campuss_mapping_without_a_remark(name, mapping):
    one = clinic(11, name, mapping)
    done = harmonised(mapping, (s for _ in range(60) for s in (one.routine(), one.emergency())))
    assert done.rejects == []
    assert done.notes == {}
    assert not set(done.tables["lab_result"]["unit"].to_pylist()) & {"mg/dL", "g/dL"}
    assert {"I21.300", "I10.X00X002"} <= set(done.tables["diagnosis"]["code"].to_pylist())


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_calm_visits_stay_in_the_routine_lane(name, mapping):
    one = clinic(12, name, mapping)
    done = harmonised(mapping, (one.routine() for _ in range(200)))
    found = Classifier(load_rules(), name).classify(done.tables, Escalations())
    assert (found.urgent, found.escalations, found.unit_mismatches) == (0, [], 0)


@pytest.mark.parametrize(("name", "mapping"), STYLES)
def test_emergencies_travel_wholly_in_their_lane_and_end(name, mapping):
    one = clinic(13, name, mapping)
    done = harmonised(mapping, (one.emergency() for _ in range(60)))
    found = Classifier(load_rules(), name).classify(done.tables, Escalations())
    # The consultant's sign-off ends it; only the visit's own, behind it, is routine again.
    routine = {table: int((~mask).sum()) for table, mask in found.masks.items()}
    assert {table: rows for table, rows in routine.items() if rows} == {"visit": 60}
    assert found.unit_mismatches == 0
    patients = set(done.tables["patient"]["patient_id"].to_pylist())
    opened = Escalations().after([change for change in found.escalations if change[4]])
    assert opened.patients == patients
    assert len(Escalations().after(found.escalations)) == 0
