"""Mapping files: the packaged ones, and that every fault is named with its line and remedy."""

import pathlib
import re

import pytest

from runners.embedded.knowledge import ITEMS
from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.mappings import PACKAGED, load_mapping

EMBEDDED = pathlib.Path(__file__).parents[2] / "runners" / "embedded"
# Mapping to the tables that it is for, their schema, and the canonical tables that it lacks.
CAMPUSES = {
    "postgresql_his": ("hospital.sql", "", {"lab_report"}),
    "postgresql_his_us_units": ("hospital.sql", "", {"lab_report"}),
    "mariadb_his_gbk": ("campus_b.sql", "his.", {"lab_report"}),
    "oracle_his": ("campus_c.sql", "HIS.", set()),
}
NAMES = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def columns_of(script: str, schema: str = "") -> dict[str, list[str]]:
    """Table to columns, as a script declares them."""
    tables = {}
    text = re.sub(r"--.*| IF NOT EXISTS", "", (EMBEDDED / script).read_text("utf-8"))
    for name, body in re.findall(r"CREATE TABLE ([\w.]+) \((.*?)\)[^();]*;", text, re.S):
        body = re.sub(r"(PRIMARY )?KEY \(.*?\)|\(\d+(, ?\d+)?\)", "", body)
        tables[schema + name] = [part.split()[0] for part in body.split(",") if part.split()]
    for name, like in re.findall(r"CREATE TABLE (\w+) LIKE (\w+);", text):
        tables[schema + name] = tables[schema + like]
    return tables


def columns_of_hospital() -> dict[str, list[str]]:
    return columns_of("hospital.sql")


def faulty(tmp_path: pathlib.Path, old: str, new: str) -> str:
    """The error for the first packaged mapping with one text replaced."""
    text = (PACKAGED / "postgresql_his.yaml").read_text("utf-8")
    assert old in text
    path = tmp_path / "campus.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_mapping("campus.yaml", tmp_path)
    return str(caught.value)


def line_of(text: str) -> int:
    lines = (PACKAGED / "postgresql_his.yaml").read_text("utf-8").splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("name", NAMES)
def test_packaged_mappings_fit_their_campuss_tables(name):
    mapping = load_mapping(name)
    script, schema, lacking = CAMPUSES[name]
    assert mapping.compare_columns(columns_of(script, schema)) == []
    assert {source.table for source in mapping.tables.values()} == set(TABLES) - lacking


@pytest.mark.parametrize("name", NAMES)
def test_micro_is_the_micro_sign(name):
    for units in load_mapping(name).units.values():
        targets = {*units.spellings.values(), *(rule.to_unit for rule in units.rules)}
        assert units.spellings["\u03bcmol/L"] == "\u00b5mol/L"
        assert not any("\u03bc" in unit for unit in targets)


def test_codes_are_texts_and_null_is_null():
    mapping = load_mapping("postgresql_his")
    assert mapping.code_lists["sex"].codes["1"] == "1"
    assert mapping.code_lists["flag"].codes["N"] == "N"
    assert mapping.code_lists["abo"].codes["5"] is None
    assert mapping.code_lists["abo"].unknown == "null"


FAULTS = [
    ("codes: sex}", "codes: sexx}", "tables.his.patient.columns.sex.codes", "sexx"),
    ("id: pid", "idd: pid", "tables.his.patient.idd", "did you mean `id`"),
    ("phone: phone", "fone: phone", "tables.his.patient.columns.fone", "did you mean `phone`"),
    ("table: patient", "table: patients", "tables.his.patient.table", "did you mean `patient`"),
    ("zone: +08:00", "zone: +8", "zone", "+08:00"),
    ("version: 1", "version: 2", "version", "'1'"),
    ("[row_ver]", "[row_ver, mrn]", "tables.his.patient.ignore", "take it out"),
    ("factor: 1,", "factor: -1,", "units.si.rules[0].factor", "greater than 0"),
    ("factor: 1,", "factor: 1.123456789,", "units.si.rules[0].factor", "shorten"),
    ("factor: 1,", "factor: one,", "units.si.rules[0].factor", "decimal"),
    ("item: 2951-2", "item: 2823-3", "units.si.rules[1]", "keep one"),
    ("unit: mEq/L", "unit: mEq/l", "units.si.rules[0].unit", "write mEq/L"),
    ("birth_date: birth_date", "birth_date: {from: birth_date, text: upper}", "text", "remove it"),
    ("birth_date: birth_date", "birth_date: {formats: '%Y-%m'}", "birth_date", "give one"),
    ("phone: phone", "phone: {from: phone, join: '-'}", "phone.join", "name several"),
    ("birth_date: birth_date", "birth_date: {from: b, formats: '%y'}", "formats", "%Y %m %d"),
    ("birth_date: birth_date", "birth_date: {from: b, formats: '%Y'}", "formats", "lacks"),
    ("number: val_num", "result: r, number: val_num", "measurement", "give result:"),
    ("units: si}", "units: us}", "tables.lis.result.measurement.units", "one of: si"),
]


@pytest.mark.parametrize(("old", "new", "path", "remedy"), FAULTS)
def test_faults_are_named_with_line_path_and_remedy(tmp_path, old, new, path, remedy):
    error = faulty(tmp_path, old, new)
    assert str(tmp_path / "campus.yaml") in error
    assert path in error
    assert remedy in error
    assert re.search(rf"line ({line_of(old)}|{line_of(old) + 1}|{line_of(old) - 1})\b", error)


@pytest.mark.parametrize(
    ("rule", "because"),
    [
        ("item: 32673-6, unit: U/L, factor: 1, to_unit: µg/L", "CK-MB"),
        ("item: 32673-6, unit: U/L, factor: 1, to_unit: U/L, to_item: 13969-1", "CK-MB"),
        ("item: 10835-7, unit: mg/L, factor: 2.5, to_unit: nmol/L", "Lp(a)"),
        ("item: 48066-5, unit: mg/L, factor: 2, to_unit: mg/L, to_item: 48065-7", "FEU"),
    ],
)
def test_what_has_no_common_measure_is_never_converted(tmp_path, rule, because):
    old = "item: 2823-3, unit: mEq/L, factor: 1, to_unit: mmol/L"
    assert because in faulty(tmp_path, old, rule)


def test_a_file_adds_refusals(tmp_path):
    new = "refuse: [{items: 2823-3, units: [mEq/L, mmol/L], because: ours}]\n    rules:"
    assert "ours" in faulty(tmp_path, "rules:", new)


def test_refused_items_keep_conversions_within_one_measure(tmp_path):
    text = (PACKAGED / "postgresql_his.yaml").read_text("utf-8")
    old = "item: 2823-3, unit: mEq/L, factor: 1, to_unit: mmol/L"
    new = "item: 32673-6, unit: U/mL, factor: 1000, to_unit: U/L"
    path = tmp_path / "campus.yaml"
    path.write_text(text.replace(old, new), "utf-8")
    assert load_mapping(str(path)).units["si"].rules[0].scaled == (1000, 0)


def test_all_faults_are_told_at_once(tmp_path):
    error = faulty(tmp_path, "      phone: phone\n      abo: {from: abo, codes: abo}\n", "")
    assert "does not fill phone" in error
    assert "does not fill abo" in error


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_mapping("nowhere.yaml", tmp_path)


def test_preflight_sees_dropped_added_and_foreign():
    mapping = load_mapping("postgresql_his")
    real = columns_of_hospital()
    real["his.patient"].remove("phone")
    real["his.patient"].append("photo")
    real["his.invoice"] = ["id"]
    del real["emr.document"]
    found = {(f.table, f.column, f.reason, f.fatal) for f in mapping.compare_columns(real)}
    assert found == {
        ("his.patient", "phone", "missing_column", True),
        ("his.patient", "photo", "unknown_column", False),
        ("his.invoice", "", "unknown_table", True),
        ("emr.document", "", "missing_table", False),
    }


def faulty_old_campus(tmp_path: pathlib.Path, old: str, new: str) -> tuple[str, int]:
    """The error for the GBK mapping with one text replaced, and the line of that."""
    text = (PACKAGED / "mariadb_his_gbk.yaml").read_text("utf-8")
    assert old in text
    path = tmp_path / "campus.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_mapping("campus.yaml", tmp_path)
    return str(caught.value), text[: text.index(old)].count("\n") + 1


PARENT = "parent: {table: his.MS_BRDA, by: BRID}"
OLD_CAMPUS_FAULTS = [
    (PARENT, "parent: {table: his.MS_BRDD, by: BRID}", "MS_GHMX.parent", "did you mean"),
    (PARENT, "parent: {table: his.YS_YZ, by: BRID}", "MS_GHMX.parent", "move it up"),
    (PARENT, "parent: {table: his.MS_GHMX, by: BRID}", "MS_GHMX.parent", "move it up"),
    (PARENT, "parent: {table: his.MS_BRDA, by: [BRID, X]}", "MS_GHMX.parent", "name as many"),
    (PARENT, "parent: {table: his.MS_BRDA}", "parent.by", "add `by:`"),
    (PARENT, "ignore: BRID", "MS_GHMX.columns.patient_id", "add parent:"),
    ("{parent: patient_id}", "{parent: mrn}", "columns.patient_id.parent", "no column mrn"),
    ("{parent: patient_id}", "{parent: remarks}", "columns.patient_id.parent", "no column"),
    ("{parent: patient_id}", "{parent: birth_date}", "patient_id.parent", "name another"),
    ("{parent: patient_id}", "{parent: patient_id, text: trim}", "text", "parent's own column"),
    ("{parent: patient_id}", "{parent: patient_id, from: BRID}", "patient_id", "give one"),
    ("absent: patient_id", PARENT + "\n    absent: patient_id", "GY_KSDM.parent", "add e.g."),
    ("      name: KSMC", "      name: KSMC\n      remarks: KSMC", "columns.remarks", "remove it"),
    ("{column: ZFPB, values: 1}", "{column: ZFPB}", "deleted_when", "add `values:`"),
    ("{column: ZFPB, values: 1}", "{kolumn: ZFPB, values: 1}", "deleted_when", "did you mean"),
    ("arrows: arrows", "arrows: flagz", "measurement.arrows", "one of:"),
    ("arrows: arrows", "arrows: flags, low: X", "measurement.range", "give one or the other"),
    ("codes: {↑: H", "codes: {1↑: H", "code_lists.arrows.codes", "part of a number"),
    ("flag: TS, ", "", "measurement.flags", "name the flag's column"),
    ("result: JG, trim: '*', ", "number: JG, ", "measurement.arrows", "is for result: only"),
    ("invalid: note", "invalid: guess", "invalid", "'refuse' or 'note'"),
]


@pytest.mark.parametrize(("old", "new", "path", "remedy"), OLD_CAMPUS_FAULTS)
def test_faults_of_what_old_campuses_need(tmp_path, old, new, path, remedy):
    error, line = faulty_old_campus(tmp_path, old, new)
    assert path in error
    assert remedy in error
    lines = [int(number) for number in re.findall(r"line (\d+)", error)]
    assert any(abs(number - line) <= 12 for number in lines), (lines, line)


def test_every_item_of_a_campus_is_converted_or_is_in_its_unit_already():
    """A dictionary leads to a LOINC that either has a rule or is what the rules lead to."""
    for name in ("mariadb_his_gbk", "oracle_his"):
        mapping = load_mapping(name)
        (units,) = mapping.units.values()
        items = set(mapping.code_lists["items"].codes.values())
        assert {rule.item for rule in units.rules} <= items


def test_campuses_know_the_same_laboratory_items():
    mass = {item.mass.code: item.code for item in ITEMS if item.mass}
    for name in ("mariadb_his_gbk", "oracle_his"):
        items = set(load_mapping(name).code_lists["items"].codes.values())
        assert {mass.get(item, item) for item in items} == {item.code for item in ITEMS}
