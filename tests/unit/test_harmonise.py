"""Harmonise: a campus's rows become canonical ones, and none is lost on the way."""

import collections
import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.mappings import load_mapping
from tests.raw_changes import DDL, hospital_batch, laboratory_results, raw_batch, raw_of
from transforms.harmonise import Harmonised, Harmoniser, Note, UnknownCode

SI = Harmoniser(load_mapping("postgresql_his"))
MASS = Harmoniser(load_mapping("postgresql_his_us_units"))
AT = "2026-11-23 16:00:29.5+00"
LAB = {
    "result_id": "r1",
    "mrn": "M1",
    "visit_no": "V1",
    "loinc": "2823-3",
    "val_num": "6.8000",
    "unit": "mmol/L",
    "ref_low": "3.50",
    "ref_high": "5.30",
    "critical": "t",
    "result_at": AT,
}
LAB_OUT = ("item_code", "value", "value_text", "unit", "raw_value", "raw_unit", "reference_low")

# Campus B (DOMAIN.md 2.2): pinyin names, local items, one result column, soft deletes, no zone.
OLD_CAMPUS = """
version: 1
code_lists:
  items: {codes: {K: 2823-3, CRE: 2160-0}, unknown: keep}
units:
  mass:
    spellings: {mg/dl: mg/dL}
    rules:
      - {item: 2160-0, unit: mg/dL, factor: 88.4, to_unit: µmol/L, to_item: 14682-9}
      - {item: 2823-3, unit: mEq/L, factor: 1, to_unit: mmol/L}
tables:
  lis.JYJG: &report
    table: lab_result
    id: [JYXH, XH]
    columns: &columns
      patient_id: BRID
      item_name: {from: [XMMC, XMDM]}
      status: {constant: final}
      reported_at: {from: BGSJ, formats: ['%Y%m%d%H%M%S', '%Y.%m.%d'], nulls: 0000-00-00}
      updated_at: {from: [RQ, SJ], join: ' '}
    measurement: {item: XMDM, items: items, result: JG, trim: ↑↓, unit: DW, units: mass}
    absent: [visit_no, flag, critical, collected_at]
    deleted_when: {column: ZFPB, values: 1}
  lis.JYJG2: *report
"""
OLD_COLUMNS = ["JYXH", "XH", "BRID", "XMDM", "XMMC", "JG", "DW", "BGSJ", "RQ", "SJ", "ZFPB"]
OLD = {"JYXH": "7", "XH": "1", "BRID": "5", "XMDM": "CRE", "DW": "mg/dl", "ZFPB": "0"}


@pytest.fixture(scope="module")
def old_campus(tmp_path_factory) -> Harmoniser:
    path = tmp_path_factory.mktemp("mapping") / "old.yaml"
    path.write_text(OLD_CAMPUS, "utf-8")
    return Harmoniser(load_mapping(str(path)))


def lab(harmoniser: Harmoniser, *rows: dict) -> Harmonised:
    return harmoniser.apply(raw_of({"lis.result": hospital_batch("lis.result", rows)}))


def only(result: Harmonised, table: str) -> dict:
    """The single row, where nothing was refused; `_unchanged` by names."""
    assert result.rejects == []
    batch = result.tables[table]
    batch.validate(full=True)
    assert batch.schema.equals(TABLES[table].arrow_schema)
    [row] = batch.to_pylist()
    bits = row["_unchanged"]
    row["_unchanged"] = {name for name, i in TABLES[table].index.items() if bits >> i & 1}
    return row


def test_patient():
    raw = {
        "pid": "17",
        "mrn": "M1",
        "name": "王小东",
        "sex_code": "女",
        "birth_date": "1949-10-01",
        "abo": "4",
        "rh": "+",
        "row_ver": "3",
        "updated_at": "2026-11-24 00:00:29.5+08",
    }
    result = SI.apply(raw_of({"his.patient": hospital_batch("his.patient", [raw])}))
    row = only(result, "patient")
    assert row["record_id"] == "17"
    assert row["_src_table"] == "his.patient"
    assert (row["sex"], row["abo"], row["rh"], row["name"]) == ("2", "AB", "+", "王小东")
    assert row["birth_date"] == datetime.date(1949, 10, 1)
    assert row["updated_at"] == datetime.datetime(2026, 11, 23, 16, 0, 29, 500_000, datetime.UTC)
    assert (row["phone"], row["_unchanged"], row["_prev_id"]) == (None, set(), None)
    assert result.notes == {}


@pytest.mark.parametrize(
    ("code", "sex"), [*zip("129男女MF0", "12912120", strict=True), ("X", None)]
)
@pytest.mark.parametrize("harmoniser", [SI, MASS], ids=["si", "mass"])
def test_sex_and_its_unknown_codes(harmoniser, code, sex):
    batch = hospital_batch("his.patient", [{"pid": "1", "mrn": "M", "sex_code": code}])
    result = harmoniser.apply(raw_of({"his.patient": batch}))
    assert only(result, "patient")["sex"] == sex
    unknown = Note("his.patient", "sex_code", "unknown_code")
    assert result.notes == ({} if sex else {unknown: 1})
    queued = UnknownCode("sex", code, "his.patient", "sex_code")
    assert result.unknown_codes == ({} if sex else {queued: 1})
    remark = None if sex else f"unknown_code sex: {code}"
    assert only(result, "patient")["remarks"] == remark


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("i219", "I21.9"),
        ("I21.9", "I21.9"),
        (" a00.000x001", "A00.000X001"),
        ("a000001", "A00.0001"),
        ("i21", "I21"),
        ("", ""),
        (None, None),
    ],
)
def test_icd10(written, code):
    batch = hospital_batch("his.diagnosis", [{"diagnosis_id": "1", "mrn": "M", "icd10": written}])
    result = MASS.apply(raw_of({"his.diagnosis": batch}))
    assert only(result, "diagnosis")["code"] == code


def test_result_with_si_units():
    row = only(lab(SI, LAB), "lab_result")
    assert [row[c] for c in LAB_OUT] == [
        "2823-3", "6.8", None, "mmol/L", "6.8000", "mmol/L", "3.5",
    ]  # fmt: skip
    assert row["critical"] is True


CONVERSIONS = [
    # item, number, text, unit, low -> item_code, value, value_text, unit, raw_value, low
    ("2345-7", "95.0000", None, "mg/dL", "70", "14749-6", "5.2725", None, "mmol/L", "3.885"),
    ("2345-7", "95", None, "mg/dl", None, "14749-6", "5.2725", None, "mmol/L", None),
    ("2160-0", "1.0", None, "mg/dL", "0.6", "14682-9", "88.4", None, "µmol/L", "53.04"),
    ("3094-0", "10", None, "mg/dL", None, "14937-7", "3.57", None, "mmol/L", None),
    ("17861-6", "9.2", None, "mg/dL", None, "2000-8", "2.3", None, "mmol/L", None),
    ("1975-2", "1.2", None, "mg/dL", None, "14631-6", "20.52", None, "µmol/L", None),
    ("3084-1", "7", None, "mg/dL", None, "14933-6", "416.36", None, "µmol/L", None),
    ("718-7", "4.9", None, "g/dL", "12", "718-7", "49", None, "g/L", "120"),
    ("2823-3", "6.80", None, "mEq/L", None, "2823-3", "6.8", None, "mmol/L", None),
    # A comparator is converted with its number; a remark stays beside a number.
    ("2160-0", None, "<1.0", "mg/dL", None, "14682-9", "88.4", "<88.4", "µmol/L", None),
    ("2160-0", None, " ≥ 20", "mg/dL", None, "14682-9", "1768", "≥1768", "µmol/L", None),
    ("2160-0", "1", "溶血", "mg/dL", None, "14682-9", "88.4", "溶血", "µmol/L", None),
    # Words alone keep the unit that they were written with.
    ("2160-0", None, "溶血", "mg/dL", "0.6", "2160-0", None, "溶血", "mg/dL", "0.6"),
    # No rule for it: as it is.
    ("14682-9", "88.4", None, "μmol/L", None, "14682-9", "88.4", None, "µmol/L", None),
    ("99999-9", "1.50", None, "mg/dL", None, "99999-9", "1.5", None, "mg/dL", None),
    ("2345-7", "5.3", None, None, None, "2345-7", "5.3", None, None, None),
]


@pytest.mark.parametrize("case", CONVERSIONS)
def test_units(case):
    item, number, text, unit, low, *expected = case
    given = {"loinc": item, "val_num": number, "val_txt": text, "unit": unit, "ref_low": low}
    # A neighbour with no rule must not be touched.
    result = lab(MASS, LAB | given, LAB | {"_seq": 2})
    row, neighbour = result.tables["lab_result"].to_pylist()
    out = [row[c] for c in ("item_code", "value", "value_text", "unit", "reference_low")]
    assert out == expected
    assert (row["raw_value"], row["raw_unit"]) == (number or text, unit)
    assert (neighbour["value"], neighbour["unit"]) == ("6.8", "mmol/L")


def test_a_unit_that_no_rule_of_its_item_knows_is_counted_and_marked():
    result = lab(MASS, LAB | {"loinc": "2345-7", "unit": "g/L"}, LAB | {"_seq": 2})
    assert result.notes == {Note("lis.result", "unit", "unknown_unit"): 1}
    remarks = result.tables["lab_result"]["remarks"].to_pylist()
    assert remarks == ["unknown_unit unit: g/L", None]


@pytest.mark.parametrize(
    ("written", "item", "unit", "value", "value_text", "out_unit"),
    [
        ("6.80↑", "K", "mEq/L", "6.8", None, "mmol/L"),
        ("1.0", "CRE", "mg/dl", "88.4", None, "µmol/L"),
        ("<1.0", "CRE", "mg/dl", "88.4", "<88.4", "µmol/L"),
        ("阴性(-)", "HBS", None, None, "阴性(-)", None),
        ("溶血", "K", "mEq/L", None, "溶血", "mEq/L"),
        (None, "K", "mEq/L", None, None, "mmol/L"),
    ],
)
def test_one_column_with_numbers_and_texts(
    old_campus, written, item, unit, value, value_text, out_unit
):
    row = OLD | {"JG": written, "XMDM": item, "DW": unit}
    batch = raw_batch(OLD_COLUMNS, [row], ["JYXH", "XH"])
    out = only(old_campus.apply(raw_of({"lis.JYJG": batch})), "lab_result")
    assert (out["value"], out["value_text"], out["unit"]) == (value, value_text, out_unit)
    assert (out["raw_value"], out["raw_unit"]) == (written, unit)
    assert (out["record_id"], out["status"], out["item_name"]) == ("7|1", "final", item)


@pytest.mark.parametrize(
    ("written", "value"),
    [("20160305081500", (3, 5, 0, 15)), ("2016.3.5", (3, 4, 16, 0)), ("0000-00-00", None)],
)
def test_times_without_a_zone_are_the_campuss(old_campus, written, value):
    row = OLD | {"BGSJ": written, "RQ": "2016-03-05", "SJ": "08:00:00"}
    batch = raw_batch(OLD_COLUMNS, [row], ["JYXH", "XH"])
    out = only(old_campus.apply(raw_of({"lis.JYJG": batch})), "lab_result")
    assert out["reported_at"] == (value and datetime.datetime(2016, *value, tzinfo=datetime.UTC))
    assert out["updated_at"] == datetime.datetime(2016, 3, 5, 0, 0, tzinfo=datetime.UTC)


def test_a_soft_delete_is_a_tombstone(old_campus):
    rows = [
        OLD | {"_op": Op.UPDATE, "ZFPB": "1"},
        OLD | {"_op": Op.UPDATE, "ZFPB": "0"},
        OLD | {"_op": Op.UPDATE, "ZFPB": "1", "BGSJ": "rubbish"},  # Goes all the same.
        OLD | {"_op": Op.UPDATE, "ZFPB": None, "unchanged": ["ZFPB"]},  # Gone or not?
    ]
    batch = raw_batch(OLD_COLUMNS, rows, ["JYXH", "XH"])
    result = old_campus.apply(raw_of({"lis.JYJG": batch}))
    assert result.tables["lab_result"]["_op"].to_pylist() == [Op.DELETE, Op.UPDATE, Op.DELETE]
    assert [(r.position.seq, r.reason) for r in result.rejects] == [(4, "partial_row")]


def test_tables_that_feed_one_are_merged_by_position(old_campus):
    first = raw_batch(OLD_COLUMNS, [OLD | {"_lsn": n, "_seq": 1} for n in (1, 4, 5)], ["JYXH"])
    second = raw_batch(OLD_COLUMNS, [OLD | {"_lsn": n, "_seq": 2} for n in (1, 2, 9)], ["JYXH"])
    batch = old_campus.apply(raw_of({"lis.JYJG": first, "lis.JYJG2": second})).tables["lab_result"]
    batch.validate(full=True)
    places = [(r["_lsn"], r["_seq"], r["_src_table"]) for r in batch.to_pylist()]
    one, two = "lis.JYJG", "lis.JYJG2"
    expected = [(1, 1, one), (1, 2, two), (2, 2, two), (4, 1, one), (5, 1, one), (9, 2, two)]
    assert places == expected


def test_a_delete_says_its_key_only():
    rx = {"_op": Op.DELETE, "rx_no": "R1", "line_no": "2"}
    batch = hospital_batch("his.prescription", [rx], ["rx_no", "line_no"])
    row = only(SI.apply(raw_of({"his.prescription": batch})), "prescription")
    known = {"prescription_no", "line_no"}
    assert row["record_id"] == "R1|2"
    assert (row["prescription_no"], row["line_no"]) == ("R1", 2)
    assert row["_unchanged"] == TABLES["prescription"].by_name.keys() - known


def test_a_delete_is_never_refused_for_the_content_it_takes_away():
    rows = [LAB | {"_op": Op.DELETE, "val_num": "NaN"}, LAB | {"_op": Op.DELETE}]
    result = lab(SI, *rows)
    assert result.rejects == []
    broken, whole = result.tables["lab_result"].to_pylist()
    assert broken["value"] is None
    assert broken["_unchanged"] == (1 << len(TABLES["lab_result"].columns)) - 1
    assert (whole["value"], whole["_unchanged"]) == ("6.8", 0)


def test_a_key_change_names_the_old_key():
    rows = [
        {"_op": Op.DELETE, "rx_no": "R1", "line_no": "2"},
        {"_op": Op.UPDATE, "rx_no": "R1", "line_no": "3", "_old.line_no": "2", "_old.rx_no": "R1"},
        {"_op": Op.UPDATE, "rx_no": "R2", "line_no": "1", "_old.line_no": "7"},
        {"_op": Op.UPDATE, "rx_no": "R4", "line_no": "1"},
    ]
    batch = hospital_batch("his.prescription", rows, ["rx_no", "line_no"])
    out = SI.apply(raw_of({"his.prescription": batch})).tables["prescription"]
    assert out["_prev_id"].to_pylist() == [None, "R1|2", "R2|7", None]
    assert out["record_id"].to_pylist() == ["R1|2", "R1|3", "R2|1", "R4|1"]


def test_unchanged_bits_follow_their_columns():
    sent = {k: v for k, v in LAB.items() if k not in ("visit_no", "ref_low")}
    row = only(
        lab(SI, sent | {"_op": Op.UPDATE, "unchanged": ["item_name", "status"]}), "lab_result"
    )
    assert row["_unchanged"] == {"item_name", "status"}
    assert row["visit_no"] is None


def test_an_unchanged_long_text_does_not_hide_a_changed_number():
    update = LAB | {"_op": Op.UPDATE, "unchanged": ["val_txt"]}
    row = only(
        lab(MASS, update | {"loinc": "2160-0", "unit": "mg/dL", "val_num": "2"}), "lab_result"
    )
    assert (row["value"], row["unit"], row["raw_value"]) == ("176.8", "µmol/L", "2")
    assert row["_unchanged"] == {"value_text"}


def test_an_unchanged_long_text_alone_keeps_its_raw_value():
    update = LAB | {"_op": Op.UPDATE, "unchanged": ["val_txt"], "val_num": None}
    row = only(lab(MASS, update | {"loinc": "2160-0", "unit": "mg/dL"}), "lab_result")
    assert (row["value"], row["unit"]) == (None, "mg/dL")
    assert row["_unchanged"] == {"value_text", "raw_value"}


def test_inputs_that_are_partly_unchanged_refuse_the_row():
    inputs = ["loinc", "val_num", "unit", "ref_low", "ref_high"]
    blank = LAB | {"_op": Op.UPDATE} | dict.fromkeys(inputs)
    whole = blank | {"unchanged": [*inputs, "val_txt"]}
    result = lab(SI, whole, blank | {"unchanged": ["unit"]}, blank | {"unchanged": inputs})
    assert [(r.position.seq, r.reason) for r in result.rejects] == [
        (2, "partial_row"),
        (3, "partial_row"),
    ]
    assert "unit" not in result.rejects[0].row
    [row] = result.tables["lab_result"].to_pylist()
    assert row["_unchanged"] == sum(
        1 << TABLES["lab_result"].index[c]
        for c in (*LAB_OUT, "reference_high", "comparator", "remarks")
    )


REFUSALS = [
    ("val_num", "NaN", "bad_decimal"),
    ("ref_high", "high", "bad_decimal"),
    ("critical", "maybe", "bad_bool"),
    ("result_at", "infinity", "bad_time"),
    ("result_id", None, "missing_key"),
    ("val_txt", "a\0b", "nul_byte"),
    ("val_txt", "x" * 1001, "oversized"),
    ("result_id", "a\0b", "nul_byte"),
]


@pytest.mark.parametrize(("column", "value", "reason"), REFUSALS)
def test_a_bad_value_refuses_its_row_only(column, value, reason):
    mapping = load_mapping("postgresql_his").model_copy(update={"max_text_bytes": 1000})
    rows = [LAB, LAB | {column: value}, LAB]
    batch = hospital_batch("lis.result", rows).slice(1).slice(0, 2)  # Offsets are honoured.
    result = Harmoniser(mapping).apply(raw_of({"lis.result": batch}))
    [reject] = result.rejects
    assert (reject.reason, reject.column, reject.src_table) == (reason, column, "lis.result")
    assert reject.position == (1, 2)
    assert reject.row == {
        **dict.fromkeys(DDL["lis.result"].split()),
        **LAB,
        column: value,
        "_old.result_id": None,
    }
    assert result.tables["lab_result"]["_seq"].to_pylist() == [3]


def test_bad_int_and_bad_date():
    rx = hospital_batch("his.prescription", [{"rx_no": "R", "line_no": "two"}])
    patient = hospital_batch("his.patient", [{"pid": "1", "mrn": "M", "birth_date": "0000-00-00"}])
    result = SI.apply(raw_of({"his.prescription": rx, "his.patient": patient}))
    assert {(r.column, r.reason) for r in result.rejects} == {
        ("line_no", "bad_int"),
        ("birth_date", "bad_date"),
    }
    assert result.tables == {}


def test_schema_drift():
    """A lost column refuses its table, an added one passes and is counted."""
    lost = hospital_batch("lis.result", [LAB, LAB]).drop_columns(["unit"])
    grown = raw_batch([*DDL["his.patient"].split(), "photo"], [{"pid": "1", "mrn": "M"}], ["pid"])
    foreign = raw_batch(["id"], [{"id": "1"}], ["id"])
    tables = {"lis.result": lost, "his.patient": grown, "his.invoice": foreign}
    result = SI.apply(raw_of(tables))
    assert result.tables["patient"].num_rows == 1
    assert result.notes == {Note("his.patient", "photo", "unknown_column"): 1}
    reasons = collections.Counter((r.src_table, r.reason, r.column) for r in result.rejects)
    assert reasons == {
        ("lis.result", "missing_column", "unit"): 2,
        ("his.invoice", "unknown_table", ""): 1,
    }


def test_unchanged_columns_are_not_copied():
    batch = laboratory_results(100)
    out = SI.apply(raw_of({"lis.result": batch})).tables["lab_result"]
    for canonical, source in {
        "record_id": "result_id",
        "patient_id": "mrn",
        "item_code": "loinc",
        "raw_value": "val_num",
        "raw_unit": "unit",
        "unit": "unit",
        "flag": "abn_flag",
    }.items():
        assert out[canonical].buffers()[2].address == batch[source].buffers()[2].address


def test_empty():
    batch = hospital_batch("lis.result", [])
    assert SI.apply(raw_of({"lis.result": batch})) == Harmonised({}, [], {})
    assert SI.apply(raw_of({})) == Harmonised({}, [], {})


WORDS = st.sampled_from(
    [
        None,
        "",
        "1",
        "6.80",
        "<1.0",
        "-",
        "NaN",
        "t",
        "x\0",
        "溶血",
        "mg/dL",
        "2160-0",
        "1|",
        AT,
        "M",
    ]
)


@st.composite
def batches(draw, table: str):
    columns = DDL[table].split()
    rows = draw(
        st.lists(
            st.fixed_dictionaries(
                {"_op": st.sampled_from(list(Op)), columns[0]: st.sampled_from(["1", "2", None])},
                optional=dict.fromkeys(columns[1:], WORDS)
                | {"unchanged": st.lists(st.sampled_from(columns), unique=True)}
                | {f"_old.{columns[0]}": st.sampled_from(["1", None])},
            ),
            max_size=8,
        )
    )
    rows = [
        {k: v for k, v in row.items() if k not in row.get("unchanged", ())} | {"_seq": i}
        for i, row in enumerate(rows)
    ]
    return hospital_batch(table, rows)


@settings(deadline=None)
@given(
    st.sampled_from([SI, MASS]),
    st.fixed_dictionaries({}, optional={table: batches(table) for table in DDL}),
)
def test_rows_in_are_rows_out_and_rejects(harmoniser, tables):
    result = harmoniser.apply(raw_of(tables))
    seen = collections.Counter((r.src_table, r.position.seq) for r in result.rejects)
    for name, batch in result.tables.items():
        batch.validate(full=True)
        table = TABLES[name]
        assert batch.schema.equals(table.arrow_schema)
        assert batch["record_id"].null_count == 0
        for row in batch.to_pylist():
            seen[row["_src_table"], row["_seq"]] += 1
            for column, bit in table.index.items():
                assert row[column] is None or not row["_unchanged"] >> bit & 1
    given_rows = {(n, s): 1 for n, b in tables.items() for s in b["_seq"].to_pylist()}
    assert seen == given_rows


@settings(deadline=None)
@given(batches("lis.result"), st.data())
def test_rows_do_not_depend_on_their_batch(batch, data):
    """Any split of a batch gives the same rows: nothing leaks from a row to its neighbour."""
    cut = data.draw(st.integers(0, batch.num_rows))
    whole = MASS.apply(raw_of({"lis.result": batch}))
    halves = [
        MASS.apply(raw_of({"lis.result": p})) for p in (batch.slice(0, cut), batch.slice(cut))
    ]
    assert rows_of(whole) == [row for half in halves for row in rows_of(half)]
    assert whole.rejects == [reject for half in halves for reject in half.rejects]


def rows_of(result: Harmonised) -> list[dict]:
    return [row for batch in result.tables.values() for row in batch.to_pylist()]


def test_texts_of_any_length_pass_untouched():
    text = "会诊" * 100_000
    row = only(lab(SI, LAB | {"val_txt": text, "val_num": None}), "lab_result")
    assert (row["value_text"], row["raw_value"]) == (text, text)


@pytest.mark.parametrize(
    ("text", "comparator", "value"),
    [("<0.01", "<", "0.01"), ("≤ 5", "<=", "5"), (">=200", ">=", "200"), ("＞7.5", ">", "7.5")],
)
def test_a_bound_in_the_text_column_is_a_number_with_its_comparator(text, comparator, value):
    row = only(lab(SI, LAB | {"val_num": None, "val_txt": text}), "lab_result")
    assert (row["comparator"], row["value"], row["value_text"]) == (comparator, value, text)
    assert row["raw_value"] == text


def test_remarks_are_unchanged_where_their_inputs_are():
    update = LAB | {"_op": Op.UPDATE, "abn_flag": None, "unchanged": ["abn_flag"]}
    assert only(lab(SI, update), "lab_result")["_unchanged"] == {"flag", "remarks"}


def test_codes_are_queued_by_dictionary_and_code():
    rows = [LAB | {"abn_flag": code} for code in ("N", "高", "高", "x" * 100, None)]
    result = lab(SI, *rows, LAB | {"abn_flag": "gone", "_op": Op.DELETE})
    queued = {code.code: count for code, count in result.unknown_codes.items()}
    assert queued == {"高": 2, "x" * 64: 1}
    assert {code[:1] + code[2:] for code in result.unknown_codes} == {
        ("flag", "lis.result", "abn_flag")
    }
    remarks = result.tables["lab_result"]["remarks"].to_pylist()
    assert remarks[1:3] == ["unknown_code flag: 高"] * 2
    assert remarks[3] == "unknown_code flag: " + "x" * 64


def test_damaged_text_passes_as_it_is_and_is_noted():
    names = ["ÕÅÈý", "寮犱笁", "王??", "张三"]
    rows = [{"pid": str(i), "mrn": "M", "name": name} for i, name in enumerate(names)]
    result = SI.apply(raw_of({"his.patient": hospital_batch("his.patient", rows)}))
    assert result.tables["patient"]["name"].to_pylist() == names
    assert result.notes == {
        Note("his.patient", "name", what): 1
        for what in ("mojibake_latin1", "mojibake_gbk", "question_marks")
    }


FORMS = st.sampled_from(
    [None, "", "0", "1", "2", "9", "6.80↑", "<1.0", "溶血", "2016.3.5", "20160305081500", "K",
     "0000-00-00 00:00:00", "2016-03-05 08:15:00", "mg/dl", "GLU", "3.5～5.5", "ÕÅÈý", "a\0b", "D"]
)  # fmt: skip


@st.composite
def old_batches(draw, mapping, name: str):
    source = mapping.tables[name]
    columns = [*source.needed]
    keys = dict.fromkeys(source.id, st.sampled_from(["1", "2"]))
    rest = dict.fromkeys((c for c in columns if c not in source.id), FORMS)
    rows = draw(
        st.lists(
            st.fixed_dictionaries(
                {"_op": st.sampled_from(list(Op)), **keys},
                optional=rest | {"unchanged": st.lists(st.sampled_from(columns), max_size=2)},
            ),
            max_size=4,
        )
    )
    rows = [
        {k: v for k, v in row.items() if k not in row.get("unchanged", ())} | {"_seq": i}
        for i, row in enumerate(rows)
    ]
    return raw_batch(columns, rows, source.id)


@pytest.mark.parametrize("name", ["mariadb_his_gbk", "oracle_his"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_old_campuses_lose_no_row_whatever_stands_where(name, data):
    mapping = load_mapping(name)
    tables = {}
    for i, table in enumerate(mapping.tables):
        if data.draw(st.booleans()):
            batch = data.draw(old_batches(mapping, table))
            place = batch.schema.get_field_index("_lsn")
            lsn = pa.array([i + 1] * batch.num_rows, pa.int64())
            tables[table] = batch.set_column(place, "_lsn", lsn)
    result = Harmoniser(mapping).apply(raw_of(tables))
    rows = sum(batch.num_rows for batch in result.tables.values())
    given_rows = sum(batch.num_rows for batch in tables.values())
    assert rows + len(result.rejects) == given_rows + result.reissued
    assert {reject.reason for reject in result.rejects} <= {
        "nul_byte", "partial_row", "missing_key",
    }  # fmt: skip
    for table, batch in result.tables.items():
        batch.validate(full=True)
        assert batch.schema.equals(TABLES[table].arrow_schema)
        assert batch["record_id"].null_count == 0
