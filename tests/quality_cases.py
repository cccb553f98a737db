"""For every check of quality, rows made to break it, and the same rows made good."""

import dataclasses
import datetime

from tests.population import id_no

NOW = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC)
NOW_US = int(NOW.timestamp() * 1e6)
BIRTH = datetime.date(1980, 5, 6)
_EARLIER = NOW - datetime.timedelta(hours=5)
_LATER = NOW + datetime.timedelta(hours=1)

Rows = list[tuple[str, dict]]
_WHOLE = {
    "patient": {"name": "张三", "sex": "1", "birth_date": BIRTH, "id_no": id_no(BIRTH, "1")},
    "visit": {"class": "AMB", "department": "内科", "started_at": _EARLIER},
    "lab_result": {
        "item_code": "2823-3",
        "item_name": "钾",
        "value": "4.2",
        "unit": "mmol/L",
        "status": "final",
        "collected_at": _EARLIER,
        "reported_at": _EARLIER,
    },
    "lab_report": {"name": "血常规", "collected_at": _EARLIER, "reported_at": _EARLIER},
    "allergy": {"substance": "青霉素", "recorded_at": _EARLIER},
    "vital_sign": {"measured_at": _EARLIER},
    "medical_order": {"item_code": "ECG", "ordered_by": "D1", "ordered_at": _EARLIER},
    "diagnosis": {
        "code": "I10.X00",
        "name": "高血压",
        "diagnosed_by": "D1",
        "diagnosed_at": _EARLIER,
    },
    "prescription": {
        "drug_code": "C08CA01",
        "drug_name": "氨氯地平片",
        "dose": "5",
        "dose_unit": "mg",
        "status": "active",
        "prescribed_by": "D1",
        "prescribed_at": _EARLIER,
    },
    "emr_document": {"type": "病历", "author": "D1", "written_at": _EARLIER},
    "consultation": {
        "urgency": "routine",
        "requested_by": "D1",
        "requested_at": _EARLIER,
    },
}


def row(table: str, **values) -> tuple[str, dict]:
    """Returns a row that no rule has anything against, but for `values`."""
    common = {"patient_id": "P1"}
    if table not in ("patient", "allergy"):
        common["visit_no"] = "V1"
    return table, common | _WHOLE[table] | values


def lab(code: str, value: str, unit: str | None, **values) -> tuple[str, dict]:
    """Returns one laboratory result."""
    return row("lab_result", item_code=code, value=value, unit=unit, **values)


@dataclasses.dataclass(frozen=True)
class Case:
    """`bad` raises `reason` of `rule`, and nothing else; `good` raises nothing.

    `campuses`: of the rows, where they are not all of one; all are one person's.
    """

    rule: int
    reason: str
    bad: Rows
    good: Rows
    campuses: tuple[str, ...] = ()


def _vital(**values) -> Rows:
    return [row("vital_sign", **values)]


def _differential(basophils: str) -> Rows:
    parts = zip(
        ("770-8", "736-9", "5905-5", "713-8", "706-2"),
        ("60", "30", "6", "3", basophils),
        strict=True,
    )
    return [lab(code, value, "%") for code, value in parts]


def _documented(minutes: int, **values) -> Rows:
    at = _EARLIER + datetime.timedelta(minutes=minutes)
    critical = lab("2823-3", "7.1", "mmol/L", flag="HH", critical=True)
    return [critical, row("emr_document", type="危急值报告", written_at=at, **values)]


def _allergic(allergies: str | None, **values) -> Rows:
    drug = {"drug_code": "J01CA04", "drug_name": "阿莫西林胶囊"} | values
    return [row("patient", allergies=allergies), row("prescription", **drug)]


# Rows alone, and the results of one specimen.
ROW_CASES = [
    Case(1, "heart_rate_impossible", _vital(pulse_per_min=300), _vital(pulse_per_min=299)),
    Case(2, "systolic_impossible", _vital(systolic_mmhg=400), _vital(systolic_mmhg=399)),
    Case(2, "diastolic_impossible", _vital(diastolic_mmhg=0), _vital(diastolic_mmhg=1)),
    Case(
        3,
        "systolic_not_above_diastolic",
        _vital(systolic_mmhg=80, diastolic_mmhg=80),
        _vital(systolic_mmhg=81, diastolic_mmhg=80),
    ),
    Case(
        4, "respiration_impossible", _vital(respiration_per_min=70), _vital(respiration_per_min=69)
    ),
    Case(5, "temperature_too_low", _vital(temperature_cel="10"), _vital(temperature_cel="10.1")),
    Case(
        5,
        "temperature_perhaps_fahrenheit",
        _vital(temperature_cel="98.6"),
        _vital(temperature_cel="37"),
    ),
    Case(6, "saturation_impossible", _vital(spo2_percent=0), _vital(spo2_percent=100)),
    Case(
        7,
        "potassium_impossible",
        [lab("2823-3", "42", "mmol/L")],
        [lab("2823-3", "30", "mmol/L")],
    ),
    Case(7, "sodium_impossible", [lab("2951-2", "0", "mmol/L")], [lab("2951-2", "140", "mmol/L")]),
    Case(
        8,
        "creatinine_impossible",
        [lab("14682-9", "13261", "µmol/L")],
        [lab("14682-9", "13260", "umol/L")],
    ),
    Case(
        8,
        "creatinine_mass_impossible",
        [lab("2160-0", "151", "mg/dL")],
        [lab("2160-0", "88.4", "umol/L")],
    ),
    Case(8, "albumin_impossible", [lab("1751-7", "40", "g/dL")], [lab("1751-7", "40", "g/L")]),
    Case(
        9,
        "blood_count_not_positive",
        [lab("6690-2", "0", "10^9/L")],
        [lab("6690-2", "0.01", "10^9/L")],
    ),
    Case(10, "ph_impossible", [lab("2744-1", "74", None)], [lab("2744-1", "6.5", "[pH]")]),
    Case(
        11,
        "unit_not_of_item",
        [lab("718-7", "130", "cm")],
        [lab("718-7", "13", "g/dL")],
    ),
    Case(12, "differential_not_100", _differential("7"), _differential("1")),
    Case(
        13,
        "direct_above_total_bilirubin",
        [lab("14629-0", "12", "umol/L"), lab("14631-6", "11.9", "µmol/L")],
        [lab("14629-0", "12", "umol/L"), lab("14631-6", "12", "µmol/L")],
    ),
    Case(
        13,
        "direct_above_total_bilirubin_mass",
        [lab("1968-7", "1.2", "mg/dL"), lab("1975-2", "1", "mg/dL")],
        [lab("1968-7", "1.2", "mg/dL"), lab("1975-2", "34.2", "umol/L")],
    ),
    Case(
        13,
        "albumin_above_total_protein",
        [lab("1751-7", "75", "g/L"), lab("2885-2", "42", "g/L")],
        [lab("1751-7", "42", "g/L"), lab("2885-2", "7.5", "g/dL")],
    ),
    Case(
        14,
        "haematocrit_unlike_haemoglobin",
        [lab("4544-3", "42", "%"), lab("718-7", "90", "g/L")],
        [lab("4544-3", "0.42", "L/L"), lab("718-7", "14", "g/dL")],
    ),
    Case(
        16,
        "visit_ends_before_start",
        [row("visit", ended_at=_EARLIER - datetime.timedelta(seconds=1))],
        [row("visit", ended_at=_EARLIER)],
    ),
    Case(
        18,
        "in_the_future",
        [row("diagnosis", diagnosed_at=_LATER)],
        [row("diagnosis", diagnosed_at=NOW + datetime.timedelta(minutes=5))],
    ),
    Case(
        19,
        "reported_before_collected",
        [lab("2823-3", "4", "mmol/L", reported_at=_EARLIER - datetime.timedelta(minutes=1))],
        [lab("2823-3", "4", "mmol/L", reported_at=_EARLIER + datetime.timedelta(minutes=1))],
    ),
    Case(
        19,
        "report_before_collected",
        [row("lab_report", collected_at=_EARLIER + datetime.timedelta(minutes=1))],
        [row("lab_report", collected_at=None)],
    ),
    Case(
        21,
        "id_malformed",
        [row("patient", id_no="E12345678")],
        [row("patient", id_no=" 690101800506001 ")],
    ),
    Case(
        21,
        "id_check_digit_wrong",
        [row("patient", id_no=id_no(BIRTH, "1")[:-1] + "X")],
        [row("patient", id_no=None)],
    ),
    Case(
        21,
        "id_tells_other_birth",
        [row("patient", birth_date=datetime.date(1980, 6, 5))],
        [row("patient")],
    ),
    Case(21, "id_tells_other_sex", [row("patient", sex="2")], [row("patient", sex="9")]),
    Case(
        24,
        "flag_contradicts_range",
        [lab("2823-3", "4", "mmol/L", flag="H", reference_low="3.5", reference_high="5.3")],
        [lab("2823-3", "5.4", "mmol/L", flag="H", reference_low="3.5", reference_high="5.3")],
    ),
    Case(
        30,
        "required_field_missing",
        [row("diagnosis", patient_id=None)],
        [row("diagnosis", patient_id=None, remarks="awaiting_parent BRID: MS_BRDA 17")],
    ),
    Case(
        30,
        "code_unknown",
        [row("patient", abo=None, remarks="bad_x name: y\nunknown_code abo: 7")],
        [row("patient", abo=None, remarks="awaiting_parent a: unknown_code abo: 7")],
    ),
    Case(
        30,
        "unit_unknown",
        [lab("1988-5", "4", "mg/L", remarks="unknown_unit unit: mg%%")],
        [lab("1988-5", "4", "mg/L")],
    ),
    Case(
        30,
        "not_readable",
        [row("visit", ended_at=None, remarks="bad_time ended_at: 昨天")],
        [row("visit", ended_at=None)],
    ),
    Case(
        30,
        "result_missing",
        [lab("2823-3", None, None, value_text="")],
        [lab("2823-3", None, None, value_text="溶血")],
    ),
    Case(
        30, "unit_missing", [lab("2823-3", "4", None)], [lab("2823-3", None, None, value_text="-")]
    ),
    Case(30, "item_not_mapped", [lab("GLU", "4", "mmol/L")], [lab("2339-0", "4", "mg/dL")]),
    Case(
        30,
        "diagnosis_not_mapped",
        [row("diagnosis", code="高血压")],
        [row("diagnosis", code="I10")],
    ),
    Case(30, "name_garbled", [row("patient", name="寮犱笁")], [row("patient", name="欧阳娜娜")]),
    Case(
        30,
        "text_garbled",
        [row("emr_document", content="主诉???")],
        [row("emr_document", content="考虑肺炎? 建议复查")],
    ),
]

# Other rows of the patient, in the store.
STORE_CASES = [
    Case(
        15,
        "unlike_result_before",
        [
            lab("2823-3", "3.1", "mmol/L", collected_at=_EARLIER - datetime.timedelta(hours=70)),
            lab("2823-3", "9.1", "mmol/L"),
        ],
        [
            lab("2823-3", "3.1", "mmol/L", collected_at=_EARLIER - datetime.timedelta(hours=73)),
            lab("2823-3", "9.1", "mmol/L"),
        ],
    ),
    Case(
        17,
        "event_before_birth",
        [row("patient"), row("visit", started_at=NOW.replace(year=1980, month=5, day=4))],
        [row("patient"), row("visit", started_at=NOW.replace(year=1980, month=5, day=5))],
    ),
    Case(
        22,
        "man_with_womans_diagnosis",
        [row("patient"), row("diagnosis", code="O80.900")],
        [row("patient", sex="9"), row("diagnosis", code="O80.900")],
    ),
    Case(
        22,
        "woman_with_mans_diagnosis",
        [row("patient", sex="2", id_no=None), row("diagnosis", code="N40.X00")],
        [row("patient"), row("diagnosis", code="N40.X00")],
    ),
    Case(
        22,
        "woman_with_psa",
        [row("patient", sex="2", id_no=None), lab("2857-1", "1.2", "ng/mL")],
        [row("patient"), lab("2857-1", "1.2", "ng/mL")],
    ),
    Case(
        22,
        "man_with_pregnancy_test",
        [row("patient"), lab("2106-3", None, None, value_text="阳性")],
        [row("patient", sex="2", id_no=None), lab("2106-3", None, None, value_text="阳性")],
    ),
    Case(
        23,
        "man_in_obstetrics",
        [row("patient"), row("visit", department="产科一病区")],
        [
            row("patient", id_no=None, birth_date=datetime.date(2026, 11, 23)),
            row("visit", department="产科一病区"),
        ],
    ),
    Case(25, "critical_value_without_notice", _documented(61), _documented(59)),
    Case(
        26,
        "drug_against_allergy",
        [row("allergy"), *_allergic(None)],
        [row("allergy", verification="refuted"), *_allergic(None)],
    ),
    Case(
        26,
        "drug_against_allergy",
        _allergic("海鲜(荨麻疹)；青霉素(皮疹)"),
        _allergic("海鲜，否认青霉素过敏"),
    ),
    Case(
        27,
        "two_abo_groups",
        [row("patient", abo="A"), row("patient", abo="B")],
        [row("patient", abo="A"), row("patient", abo=None)],
        campuses=("main", "east"),
    ),
    Case(
        27,
        "two_rh_groups",
        [row("patient", rh="+"), row("patient", rh="-")],
        [row("patient", rh="+"), row("patient", rh="+")],
        campuses=("main", "east"),
    ),
]
