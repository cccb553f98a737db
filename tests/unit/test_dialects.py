"""Three campuses say the same events in their own words, and one canonical record comes of it."""

import collections
import dataclasses
import datetime
import decimal
import itertools

import numpy as np
import pyarrow as pa
import pytest

from runners.embedded.campus import campus
from runners.embedded.campus_b import DATABASE, MariaDbDialect
from runners.embedded.campus_c import SCHEMA, OracleDialect
from runners.embedded.changes import KEYS, OTHER_KEYS, Step, apply, insert
from runners.embedded.clinic import Clinic
from runners.embedded.dialect import RowChange, number_of
from runners.embedded.ids import Ids
from runners.embedded.knowledge import ITEMS
from runners.embedded.staffing import staffing
from schemas.emergency_rules import load_rules
from schemas.mappings import load_mapping
from schemas.positions import START
from tests.memory_store import MemoryStore
from tests.said_rows import raw_changes
from transforms.classify_lanes import Classifier
from transforms.escalations import Escalations
from transforms.harmonise import Harmoniser
from transforms.harmonise.gbk import for_gbk

NOON = datetime.datetime(2026, 11, 23, 4, 0, 0, 123_456, tzinfo=datetime.UTC)
ENTITIES = {  # The main campus's table, then the canonical one, and each column's source.
    "his.patient": "patient patient_id=mrn name sex=sex_code birth_date id_no phone abo rh"
    " allergies updated_at",
    "his.visit": "visit patient_id=mrn visit_no class=visit_class triage_level pathway"
    " department=dept bed status started_at ended_at updated_at",
    "his.medical_order": "medical_order patient_id=mrn visit_no item_code item_name priority"
    " status ordered_by ordered_at updated_at",
    "his.vital_sign": "vital_sign patient_id=mrn visit_no temperature_cel=temp_c"
    " pulse_per_min=pulse respiration_per_min=resp systolic_mmhg=sbp diastolic_mmhg=dbp"
    " spo2_percent=spo2 gcs measured_at device",
    "his.diagnosis": "diagnosis patient_id=mrn visit_no name type=dx_type is_primary"
    " diagnosed_by=doctor diagnosed_at updated_at",
    "his.prescription": "prescription patient_id=mrn visit_no prescription_no=rx_no line_no"
    " drug_code drug_name dose dose_unit route frequency days status prescribed_by=doctor"
    " prescribed_at updated_at",
    "his.consultation": "consultation patient_id=mrn visit_no urgency purpose"
    " requested_department=requested_dept requested_by consultant opinion status requested_at"
    " arrived_at answered_at updated_at",
    "lis.result": "lab_result patient_id=mrn visit_no item_name flag=abn_flag critical status"
    " collected_at reported_at=result_at updated_at",
    "emr.document": "emr_document patient_id=mrn visit_no type=doc_type title author signed_by"
    " status content written_at updated_at",
    "his.allergy": "allergy patient_id=mrn substance reaction severity verification recorded_by"
    " recorded_at updated_at",
    "his.staff": "staff staff_no name title role status updated_at",
    "his.department": "department name kind status updated_at",
}
# What is a campus's own: how it wrote a value, and its numbers for departments.
OWN = {"raw_value", "raw_unit", "parent_ref", "remarks"}
OWN_CODES = {"staff": {"department"}, "department": {"code"}}
STORIES = 260


class Main:
    """The main campus says what the clinic says."""

    def __init__(self):
        self._rows: dict[str, dict[tuple, dict]] = {}

    def say(self, step: Step) -> list[RowChange]:
        if step.rolled_back:
            return []
        said = []
        for change in step.changes:
            before = None
            if change.op != "insert":
                before = self._rows[change.table][tuple(change.key.values())]
            apply(self._rows, Step((change,)))
            after = None if change.op == "delete" else (before or {}) | change.values
            said.append(
                RowChange(change.op, change.table, before, after, (KEYS | OTHER_KEYS)[change.table])
            )
        return said


@dataclasses.dataclass
class Told:
    """One campus's events: what is left of them, and what its dialect made of them."""

    steps: list[Step]
    left: dict[str, dict[tuple, dict]]
    transactions: list[list[RowChange]]
    events: int
    dialect: object


def tell(name: str, mass_units: bool, dialect, seed: int, told: int = STORIES) -> Told:
    """Tells stories, eight at a time, as a hospital's day has them."""
    habits = dataclasses.replace(
        campus("main", "postgresql_his"), name=name, letter=name[0].upper(), mass_units=mass_units
    )
    clock = itertools.count(int(NOON.timestamp() * 1e6), 777_777)
    rng = np.random.default_rng(seed)
    clinic = Clinic(habits, rng, Ids(seed, habits), lambda: next(clock), allergies=True)
    steps = [*staffing(NOON), clinic.registrations(20)]
    stories = []
    for i in range(told):
        stories.append(clinic.emergency() if i % 4 == 0 else clinic.routine())
        while len(stories) > 8 or (i == told - 1 and stories):
            place = int(rng.integers(len(stories)))
            step = next(stories[place], None)
            if step is None:
                stories.pop(place)
            else:
                steps.append(step)
    upload = clinic.upload(300, calm=True)
    now = NOON + datetime.timedelta(hours=3)
    times = {"collected_at": now, "result_at": now, "updated_at": now, "status": "final"}
    ids = Ids(seed + 1, habits)
    steps += [
        Step((insert("lis.result", {"result_id": ids.uuid(ids.take()), "mrn": visit.mrn,
                                    "visit_no": visit.visit_no, **result, **times}),))
        for result, visit in zip(
            upload.results.rows(), (upload.visits[i] for i in upload.whose), strict=True)
    ]  # fmt: skip
    left: dict[str, dict[tuple, dict]] = {}
    for step in steps:
        apply(left, step)
    events = sum(step.rows for step in steps)
    return Told(steps, left, [dialect.say(step) for step in steps], events, dialect)


def stored(told: Told, schema: str, mapping: str, pieces: int = 60) -> MemoryStore:
    """Harmonises a campus's log in pieces and applies them; nothing may be refused or odd."""
    known = load_mapping(mapping)
    transactions = told.transactions
    if not schema:  # The main campus has schemas of its own in its tables' names.
        transactions = [[c for c in t if c.table in known.tables] for t in transactions]
    store = MemoryStore(known)
    harmoniser = Harmoniser(known)
    end, size = START, -(-len(transactions) // pieces)
    captured = issued = 0
    for first in range(0, len(transactions), size):
        raw = raw_changes(schema, transactions[first : first + size], first + 1, end)
        raw = dataclasses.replace(
            raw, tables={name.lstrip("."): batch for name, batch in raw.tables.items()}
        )
        done = harmoniser.apply(raw)
        assert done.rejects == []
        assert done.notes == {}
        assert done.unknown_codes == {}
        captured += raw.captured + done.reissued
        issued += sum(batch.num_rows for batch in done.tables.values())
        store.apply(done.tables)
        end = raw.end
    assert captured == issued
    assert store.refused == []
    return store


def canonical(text: str | None) -> str | None:
    if text is None:
        return None
    plain = format(decimal.Decimal(text).normalize(), "f")
    return "0" if plain == "-0" else plain


MASS = {item.mass.code: item for item in ITEMS if item.mass}


def laboratory(row: dict) -> dict:
    """The value of a result in SI units, by hand."""
    item = MASS.get(row["loinc"]) if row["unit"] in ("mg/dL", "g/dL") else None
    words = row["val_num"] is None and not row["val_txt"].startswith("<")
    factor = decimal.Decimal(str(item.mass.factor)) if item and not words else 1
    number = row["val_num"] or (None if words else row["val_txt"][1:])
    ends = [row[name] and canonical(str(decimal.Decimal(row[name]) * factor))
            for name in ("ref_low", "ref_high")]  # fmt: skip
    value = None if number is None else canonical(str(decimal.Decimal(number) * factor))
    bound = row["val_num"] is None and not words
    return {
        "item_code": item.code if item and not words else row["loinc"],
        "unit": item.unit if item and not words else row["unit"],
        "value": value,
        "comparator": "<" if bound else None,
        "value_text": f"<{value}" if bound and item else row["val_txt"],
        "reference_low": ends[0],
        "reference_high": ends[1],
    }


def truth(table: str, row: dict, gbk: bool) -> dict:
    """What everybody must know of an event's row: by hand, in no campus's words."""
    name, *columns = ENTITIES[table].split()
    pairs = (column.split("=") for column in columns)
    out = {pair[0]: row[pair[-1]] for pair in pairs}
    if name == "diagnosis":
        code = row["icd10"].upper().replace(".", "")
        out["code"] = f"{code[:3]}.{code[3:]}"
    if name == "lab_result":
        out |= laboratory(row)
    for column, value in out.items():
        if isinstance(value, decimal.Decimal):
            out[column] = canonical(str(value))
        elif isinstance(value, str) and gbk:  # What a GBK store cannot hold is truly lost.
            unit = column in ("unit", "value_text") and for_gbk(value).faithful
            out[column] = value if unit else for_gbk(value).text
        elif isinstance(value, datetime.datetime) and gbk:
            out[column] = value.replace(microsecond=0)
    return out


def assert_same(told: Told, store: MemoryStore, gbk: bool, key_of) -> collections.Counter:
    """Compares every event's row with the canonical one; returns how many of each entity."""
    counts: collections.Counter[str] = collections.Counter()
    for table, rows in told.left.items():
        name = ENTITIES[table].split()[0]
        live = store.live(name)
        if not live and not gbk:
            continue  # The main campus's mapping does not have it.
        for row in rows.values():
            found = live[key_of(table, row)]
            counts[name] += 1
            own = OWN | OWN_CODES.get(name, set())
            seen = {c: v for c, v in found.items() if c not in own}
            expected = truth(table, row, gbk)
            seen = {c: v for c, v in seen.items() if v is not None or c in expected}
            assert seen == expected, (table, row)
            assert found["remarks"] is None
        assert len(live) == len(rows), table  # What was deleted is gone.
    return counts


def plain_key(table: str, row: dict) -> str:
    return "|".join(str(row[column]) for column in (KEYS | OTHER_KEYS)[table])


def test_the_main_campus():
    told = tell("main", False, Main(), 21)
    store = stored(told, "", "postgresql_his")
    counts = assert_same(told, store, False, plain_key)
    assert counts["lab_result"] > 1000


def key_of_campus_b(told: Told):
    """Returns what finds the record id of an event's row."""
    departments = {
        f"{row['KSMC']}": str(row["KSDM"])
        for row in (c.after for t in told.transactions for c in t if c.table == "GY_KSDM")
    }
    wards = {row["visit_no"] for row in told.left["his.visit"].values()
             if row["visit_class"] == "IMP"}  # fmt: skip

    def key_of(table: str, row: dict) -> str:
        if table == "lis.result":
            return str(number_of(row["result_id"]))
        if table == "his.department":
            return departments[row["name"]]
        if table == "his.visit":
            prefix = "ZY" if row["visit_no"] in wards else "MZ"
            return f"{prefix}{told.dialect._visits[row['visit_no']]}"
        if table == "his.consultation":
            return ("ZY" if row["visit_no"] in wards else "MZ") + str(row["consultation_id"])
        return plain_key(table, row)

    return key_of


@pytest.mark.parametrize("mass_units", [True, False])
def test_campus_b(mass_units):
    told = tell("old", mass_units, MariaDbDialect(), 22)
    store = stored(told, DATABASE, "mariadb_his_gbk")
    counts = assert_same(told, store, True, key_of_campus_b(told))
    assert set(counts) == {words.split()[0] for words in ENTITIES.values()}
    assert told.events > 4000
    assert counts["lab_result"] > 1000
    # Its habits are there: soft deletes by flag and by status, arrows, words, zero dates.
    rows = [c.after for t in told.transactions for c in t]
    assert any(r.get("ZFBZ") == 1 for r in rows) and any(r.get("YZZT") == 9 for r in rows)
    printed = [str(r["JG"]) for r in rows if "JG" in r]
    assert any("↑↑" in p for p in printed) and any("↓" in p for p in printed)
    assert any("0000-00-00 00:00:00" in map(str, r.values()) for r in rows)
    for row in rows:
        for value in row.values():
            if isinstance(value, str):
                value.encode("gbk")


def test_campus_c():
    told = tell("cloud", False, OracleDialect(), 23)
    store = stored(told, SCHEMA, "oracle_his")

    def key_of(table: str, row: dict) -> str:
        if table == "lis.result":
            report, place = told.dialect._places[row["result_id"]]
            return f"{report}|{place}|{place}"
        if table == "his.department":
            return next(k for k, r in store.live("department").items() if r["name"] == row["name"])
        if table == "his.patient":
            return row["mrn"]
        if table == "his.visit":
            return f"{row['mrn']}|{told.dialect._visits[row['visit_no']]}"
        return plain_key(table, row)

    counts = assert_same(told, store, True, key_of)
    assert set(counts) == {words.split()[0] for words in ENTITIES.values()}
    reports = store.live("lab_report")
    assert {key.partition("|")[0] for key in store.live("lab_result")} == set(reports)
    assert all(row["patient_id"] and row["visit_no"] for row in reports.values())


def test_statements_of_campus_b_say_what_the_rows_say():
    dialect, twin = MariaDbDialect(), MariaDbDialect()
    habits = campus("main", "postgresql_his")
    clock = itertools.count(int(NOON.timestamp() * 1e6), 777_777)
    clinic = Clinic(habits, np.random.default_rng(5), Ids(5, habits), lambda: next(clock))
    seen = collections.Counter()
    for _ in range(60):
        for step in clinic.routine():
            transaction = dialect.transaction(step)
            said = twin.say(step)
            assert transaction[0] == ("BEGIN", ())
            assert transaction[-1][0] == ("ROLLBACK" if step.rolled_back else "COMMIT")
            seen[transaction[-1][0]] += 1
            seen["savepoint"] += any(text.startswith("SAVEPOINT") for text, _ in transaction)
            verbs = [text.split()[0] for text, _ in transaction[1:-1]]
            if not step.rolled_back and not step.undone:
                assert verbs == [change.op.upper() for change in said]
            for text, parameters in transaction:
                assert text.count("%s") == len(parameters)
    assert min(seen.values()) > 0


def test_uploads_of_campus_b():
    habits = campus("main", "postgresql_his")
    clock = itertools.count(int(NOON.timestamp() * 1e6), 777_777)
    ids = Ids(6, habits)
    clinic = Clinic(habits, np.random.default_rng(6), ids, lambda: next(clock))
    dialect = MariaDbDialect()
    dialect.say(clinic.registrations(10))
    upload = clinic.upload(50, calm=True)
    rows = [
        {"result_id": ids.uuid(ids.take()), "mrn": visit.mrn, "visit_no": visit.visit_no,
         **result, "status": "final", "collected_at": NOON, "result_at": NOON, "updated_at": NOON}
        for result, visit in zip(
            upload.results.rows(), (upload.visits[i] for i in upload.whose), strict=True)
    ]  # fmt: skip
    said = list(map(dialect.statement, dialect.results(rows)))
    assert len(said) == 50
    assert len({text for text, _ in said}) == 1
    assert all(text.count("%s") == len(parameters) for text, parameters in said)


@pytest.mark.parametrize(
    ("dialect", "schema", "mapping"),
    [(MariaDbDialect(), DATABASE, "mariadb_his_gbk"), (OracleDialect(), SCHEMA, "oracle_his")],
    ids=["b", "c"],
)
def test_emergencies_are_emergencies_at_every_campus(dialect, schema, mapping):
    """After harmonising, the rules see what they see at the main campus: limits in their units."""
    habits = dataclasses.replace(campus("main", "postgresql_his"), mass_units=schema == DATABASE)
    clock = itertools.count(int(NOON.timestamp() * 1e6), 777_777)
    clinic = Clinic(habits, np.random.default_rng(8), Ids(8, habits), lambda: next(clock))
    transactions = [dialect.say(step) for _ in range(40) for step in clinic.emergency()]
    raw = raw_changes(schema, transactions, 1, START)
    raw = dataclasses.replace(raw, commit_us_max=next(clock))
    done = Harmoniser(load_mapping(mapping)).apply(raw)
    tables = {
        name: rows.set_column(
            rows.schema.get_field_index("_commit_us"), rows.schema.field("_commit_us"),
            pa.array([next(clock)] * rows.num_rows, pa.int64()))
        for name, rows in done.tables.items()
    }  # fmt: skip
    found = Classifier(load_rules(), "main").classify(tables, Escalations())
    assert found.unit_mismatches == 0
    patients = set(tables["patient"]["patient_id"].to_pylist())
    assert Escalations().after([c for c in found.escalations if c[4]]).patients == patients
