"""Campus C's dialect: an Oracle HIS, see campus_c.sql, as full before and after images."""

import collections
import collections.abc

from runners.embedded.changes import Step
from runners.embedded.dialect import (
    Dialect,
    Row,
    RowChange,
    Statement,
    number_of,
    plain,
    statement_of,
)
from runners.embedded.knowledge import PANELS
from transforms.harmonise.gbk import for_gbk

SCHEMA = "HIS"
_ITEMS = {
    "2823-3": "BIO0000001", "2951-2": "BIO0000002", "2075-0": "BIO0000003",
    "2000-8": "BIO0000004", "14749-6": "BIO0000005", "14682-9": "BIO0000006",
    "14937-7": "BIO0000007", "14933-6": "BIO0000008", "14631-6": "BIO0000009",
    "1742-6": "BIO0000010", "1920-8": "BIO0000011", "1751-7": "BIO0000012",
    "2885-2": "BIO0000013", "4548-4": "BIO0000014", "718-7": "HEM0000001",
    "6690-2": "HEM0000002", "777-3": "HEM0000003", "789-8": "HEM0000004", "770-8": "HEM0000005",
    "1988-5": "IMM0000001", "5196-1": "IMM0000002", "10839-9": "CAR0000001",
    "13969-1": "CAR0000002", "33762-6": "CAR0000003", "48065-7": "COA0000001",
    "6301-6": "COA0000002", "5902-2": "COA0000003", "14979-9": "COA0000004",
    "2524-7": "GAS0000001", "2744-1": "GAS0000002", "2019-8": "GAS0000003",
    "2703-7": "GAS0000004", "3016-3": "END0000001", "20454-5": "URI0000001", "600-7": "MIC0000001",
}  # fmt: skip
_UNITS = {
    "10^9/L": ("G/L", "10*9/L", "×10^9/L"), "10^12/L": ("T/L", "10*12/L", "×10^12/L"),
    "µmol/L": ("umol/L", "μmol/L", "umol/l"), "mmol/L": ("mmol/L", "mmol/l", "mmol/L"),
    "g/L": ("g/L", "g/l", "g/L"), "mm[Hg]": ("mmHg", "mm[Hg]", "mmHg"), "s": ("s", "sec", "s"),
    "U/L": ("U/L", "IU/L", "U/L"),
}  # fmt: skip
_DEPARTMENTS = {
    "心血管内科": "0201", "呼吸内科": "0202", "肾内科": "0203", "内分泌科": "0204",
    "消化内科": "0205", "血液内科": "0206", "风湿免疫科": "0207", "感染科": "0208",
    "神经内科": "0209", "儿科": "0210", "普通外科": "0301", "骨科": "0302", "神经外科": "0303",
    "产科": "0304", "急诊医学科": "0401", "重症医学科": "0402", "体检中心": "0501",
}  # fmt: skip
_NUMBERS = {  # The main campus's codes, which staff rows have.
    "K101": "0201", "K102": "0202", "K103": "0203", "K104": "0204", "K105": "0205",
    "K106": "0206", "K107": "0207", "K108": "0208", "K109": "0209", "K110": "0210",
    "K201": "0301", "K202": "0302", "K203": "0303", "K204": "0304", "K301": "0401",
    "K302": "0402", "K401": "0501",
}  # fmt: skip
_SEXES = {"0": ("未知", "U"), "1": ("男", "M"), "2": ("女", "F"), None: (None, None)}
_CLASSES = {"AMB": "O", "EMER": "E", "IMP": "I"}
_PATHWAYS = {"chest_pain": "CP", "stroke": "ST", None: None}
_VISIT_STATES = {"open": "0", "closed": "1", "signed_off": "2"}
_PRIORITIES = {"routine": 0, "urgent": 1, "asap": 2, "stat": 3}
_ORDER_STATES = {"active": "1", "completed": "2", "stopped": "3"}
_DIAGNOSIS_TYPES = {"outpatient": "1", "admission": "2", "discharge": "3", "emergency": "6"}
_RESULT_STATES = {"preliminary": "3", "final": "4", "corrected": "5"}
_DOCUMENT_STATES = {"draft": "0", "signed": "1", "archived": "2"}
_CONSULTATION_STATES = {"requested": "1", "arrived": "2", "answered": "3", "signed_off": "4"}
_SEVERITIES = {"mild": "L", "moderate": "M", "severe": "S", None: None}
_VERIFICATIONS = {"unconfirmed": "N", "confirmed": "Y", "refuted": "R"}
_ROLES = {"doctor": "医生", "nurse": "护士", "technician": "技师"}
_KINDS = {"clinical": 0, "technical": 1}
_KEYS = {
    "PAT_VISIT": ("PATIENT_ID", "VISIT_ID"),
    "DRUG_PRESC_DETAIL": ("PRESC_NO", "ITEM_NO"),
    "LAB_RESULT": ("TEST_NO", "ITEM_NO", "PRINT_ORDER"),
}
# Where 作废 is written; a vital sign that is taken back is really gone.
_STATES = {
    "ORDERS": "ORDER_STATUS", "PAT_VISIT": "VISIT_STATUS", "LAB_RESULT": "RESULT_STATUS",
    "VITAL_SIGNS_REC": None,
}  # fmt: skip
_PANEL_OF = {item: panel for panel in PANELS.values() for item in panel.items}


class OracleDialect(Dialect):
    """Says changes as rows of campus C; results come with the report that knows the patient.

    A report (LAB_TEST_MASTER) is inserted before its results, in their transaction: one for the
    results of one visit that a transaction brings.
    """

    def __init__(self):
        super().__init__()
        self._visit_counts: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}  # Result to its report and number in it.

    def say(self, step: Step) -> list[RowChange]:
        """Returns what a transaction does to the dialect's tables; nothing if it is given up."""
        if step.rolled_back:
            return []
        said = []
        reports: dict[str, str] = {}
        counts: dict[str, int] = {}
        for change in step.changes:
            if change.table == "lis.result" and change.op == "insert":
                visit = change.values["visit_no"]
                if visit not in reports:
                    reports[visit] = f"T{number_of(change.values['result_id'])}"
                    counts[visit] = 0
                    said.append(self._report(reports[visit], change.values))
                counts[visit] += 1
                self._places[change.values["result_id"]] = reports[visit], counts[visit]
            said += self._say_change(change)
        return said

    def rows(self, step: Step) -> int:
        """Returns the row changes that others see of a transaction, its reports among them."""
        visits = {
            change.values["visit_no"]
            for change in step.changes
            if change.table == "lis.result" and change.op == "insert"
        }
        return 0 if step.rolled_back else step.rows + len(visits)

    def results(self, rows: collections.abc.Iterable[Row]) -> list[RowChange]:
        """Returns the inserts of results that are not kept in mind, each behind its report."""
        said: list[RowChange] = []
        reports: dict[str, str] = {}
        counts: dict[str, int] = collections.Counter()
        for row in rows:
            visit, ident = row["visit_no"], row["result_id"]
            if visit not in reports:
                reports[visit] = f"T{number_of(ident)}"
                said.append(self._report(reports[visit], row))
            counts[visit] += 1
            self._places[ident] = reports[visit], counts[visit]
            table, values, key = self._say("lis.result", row)
            del self._places[ident]
            said.append(RowChange("insert", table, None, values, key))
        return said

    def statement(self, change: RowChange) -> Statement:
        """Returns `(SQL, parameters)` that makes a row change; the marks are `%s`."""
        return statement_of(change, f'"{SCHEMA}"."{change.table}"', '"')

    def _report(self, number: str, result: Row) -> RowChange:
        panel = _PANEL_OF[result["loinc"]]
        row = {
            "TEST_NO": number,
            **self._whose(result),
            "SUBJECT": panel.name,
            "SPECIMEN": None,
            "PRIORITY_INDICATOR": 0,
            "ORDERING_PROVIDER": None,
            "SPCM_SAMPLE_DATE_TIME": plain(result["collected_at"]),
            "RESULTS_RPT_DATE_TIME": plain(result["result_at"]),
            "RESULT_STATUS": _RESULT_STATES[result["status"]],
            "UPDATE_DATE_TIME": plain(result["updated_at"]),
        }
        return RowChange("insert", "LAB_TEST_MASTER", None, row, ("TEST_NO",))

    def _new_visit(self, row: Row) -> int:
        count = self._visit_counts.get(row["mrn"], 0) + 1
        self._visit_counts[row["mrn"]] = count
        return count

    def _say(self, table: str, row: Row) -> tuple[str, Row, tuple[str, ...]]:
        name, said = getattr(self, f"_{table.partition('.')[2]}")(row)
        said = {c: for_gbk(v).text if isinstance(v, str) else v for c, v in said.items()}
        return name, said, _KEYS.get(name, (next(iter(said)),))

    def _voided(self, table: str, row: Row) -> Row | None:
        state = _STATES.get(table, "STATUS")
        return None if state is None else row | {state: "D"}

    def _department(self, row: Row) -> tuple[str, Row]:
        return "DEPT_DICT", {
            "DEPT_CODE": _DEPARTMENTS[row["name"]],
            "DEPT_NAME": row["name"],
            "CLINIC_ATTR": _KINDS[row["kind"]],
            "STATUS": "1" if row["status"] == "active" else "0",
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _staff(self, row: Row) -> tuple[str, Row]:
        return "STAFF_DICT", {
            "EMP_NO": row["staff_no"],
            "NAME": row["name"],
            "TITLE": row["title"],
            "JOB": _ROLES[row["role"]],
            "DEPT_CODE": _NUMBERS[row["dept_code"]],
            "STATUS": "1" if row["status"] == "active" else "0",
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _patient(self, row: Row) -> tuple[str, Row]:
        born = row["birth_date"]
        return "PAT_MASTER_INDEX", {
            "PATIENT_ID": row["mrn"],
            "INP_NO": None,
            "NAME": row["name"],
            "SEX": _SEXES[row["sex_code"]][row["pid"] % 2],
            "DATE_OF_BIRTH": None if born is None else f"{born:%Y-%m-%d} 00:00:00",
            "ID_NO": row["id_no"],
            "PHONE_NUMBER": row["phone"],
            "BLOOD_TYPE": row["abo"] or "未查",
            "BLOOD_TYPE_RH": {"+": "P", "-": "N", None: "未查"}[row["rh"]],
            "ALERGY_DRUGS": row["allergies"],
            "STATUS": "1",
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _allergy(self, row: Row) -> tuple[str, Row]:
        return "PAT_ALERGY", {
            "ALERGY_NO": row["allergy_id"],
            "PATIENT_ID": row["mrn"],
            "ALERGY_NAME": row["substance"],
            "ALERGY_REACTION": row["reaction"],
            "SEVERITY": _SEVERITIES[row["severity"]],
            "CONFIRM_FLAG": _VERIFICATIONS[row["verification"]],
            "OPERATOR": row["recorded_by"],
            "ENTER_DATE_TIME": plain(row["recorded_at"]),
            "STATUS": "1",
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _visit(self, row: Row) -> tuple[str, Row]:
        return "PAT_VISIT", {
            "PATIENT_ID": row["mrn"],
            "VISIT_ID": self._visits[row["visit_no"]],
            "VISIT_NO": row["visit_no"],
            "VISIT_TYPE": _CLASSES[row["visit_class"]],
            "TRIAGE_LEVEL": row["triage_level"],
            "GREEN_CHANNEL": _PATHWAYS[row["pathway"]],
            "DEPT_ADMISSION_TO": _DEPARTMENTS[row["dept"]],
            "BED_LABEL": row["bed"],
            "VISIT_STATUS": _VISIT_STATES[row["status"]],
            "ADMISSION_DATE_TIME": plain(row["started_at"]),
            "DISCHARGE_DATE_TIME": plain(row["ended_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _medical_order(self, row: Row) -> tuple[str, Row]:
        return "ORDERS", {
            "ORDER_NO": row["order_id"],
            **self._whose(row),
            "ORDER_CODE": row["item_code"],
            "ORDER_TEXT": row["item_name"],
            "PRIORITY_INDICATOR": _PRIORITIES[row["priority"]],
            "ORDER_STATUS": _ORDER_STATES[row["status"]],
            "DOCTOR": row["ordered_by"],
            "ENTER_DATE_TIME": plain(row["ordered_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _vital_sign(self, row: Row) -> tuple[str, Row]:
        return "VITAL_SIGNS_REC", {
            "REC_NO": row["vital_id"],
            **self._whose(row),
            "TEMPERATURE": row["temp_c"],
            "PULSE": row["pulse"],
            "BREATH": row["resp"],
            "BP_HIGH": row["sbp"],
            "BP_LOW": row["dbp"],
            "SPO2": row["spo2"],
            "GCS": row["gcs"],
            "TIME_POINT": plain(row["measured_at"]),
            "MONITOR": row["device"],
        }

    def _diagnosis(self, row: Row) -> tuple[str, Row]:
        return "DIAGNOSIS", {
            "DIAGNOSIS_NO": row["diagnosis_id"],
            **self._whose(row),
            "DIAGNOSIS_CODE": row["icd10"],
            "DIAGNOSIS_DESC": row["name"],
            "DIAGNOSIS_TYPE": _DIAGNOSIS_TYPES[row["dx_type"]],
            "MAIN_INDICATOR": int(row["is_primary"]),
            "DOCTOR": row["doctor"],
            "DIAGNOSIS_DATE": plain(row["diagnosed_at"]),
            "STATUS": "1",
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _prescription(self, row: Row) -> tuple[str, Row]:
        return "DRUG_PRESC_DETAIL", {
            "PRESC_NO": row["rx_no"],
            "ITEM_NO": row["line_no"],
            **self._whose(row),
            "DRUG_CODE": row["drug_code"],
            "DRUG_NAME": row["drug_name"],
            "DOSAGE": row["dose"],
            "DOSAGE_UNITS": row["dose_unit"],
            "ADMINISTRATION": row["route"],
            "FREQUENCY": row["frequency"].upper(),
            "DAYS": row["days"],
            "STATUS": _ORDER_STATES[row["status"]],
            "DOCTOR": row["doctor"],
            "PRESC_DATE_TIME": plain(row["prescribed_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _result(self, row: Row) -> tuple[str, Row]:
        report, place = self._places[row["result_id"]]
        habit = number_of(row["result_id"]) % 3
        low, high = row["ref_low"], row["ref_high"]
        return "LAB_RESULT", {
            "TEST_NO": report,
            "ITEM_NO": place,
            "PRINT_ORDER": place,
            "REPORT_ITEM_CODE": _ITEMS[row["loinc"]],
            "REPORT_ITEM_NAME": row["item_name"],
            "RESULT": row["val_txt"] if row["val_num"] is None else row["val_num"],
            "UNITS": _UNITS.get(row["unit"], (row["unit"],) * 3)[habit],
            "ABNORMAL_INDICATOR": row["abn_flag"],
            "NORMAL_RANGE": None if low is None else f"{low}{('-', '～', ' - ')[habit]}{high}",
            "CRITICAL_INDICATOR": int(row["critical"]),
            "RESULT_STATUS": _RESULT_STATES[row["status"]],
            "RESULT_DATE_TIME": plain(row["result_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _document(self, row: Row) -> tuple[str, Row]:
        return "MR_FILE_INDEX", {
            "FILE_NO": row["doc_id"],
            **self._whose(row),
            "FILE_ATTR": row["doc_type"],
            "TOPIC": row["title"],
            "CREATOR": row["author"],
            "SIGNER": row["signed_by"],
            "STATUS": _DOCUMENT_STATES[row["status"]],
            "FILE_CONTENT": row["content"],
            "CREATE_DATE_TIME": plain(row["written_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _consultation(self, row: Row) -> tuple[str, Row]:
        return "CONSULT_APPLY", {
            "APPLY_NO": row["consultation_id"],
            **self._whose(row),
            "URGENT_FLAG": int(row["urgency"] == "emergency"),
            "CONSULT_PURPOSE": row["purpose"],
            "CONSULT_DEPT": _DEPARTMENTS[row["requested_dept"]],
            "APPLY_DOCTOR": row["requested_by"],
            "CONSULT_DOCTOR": row["consultant"],
            "CONSULT_OPINION": row["opinion"],
            "STATUS": _CONSULTATION_STATES[row["status"]],
            "APPLY_DATE_TIME": plain(row["requested_at"]),
            "ARRIVE_DATE_TIME": plain(row["arrived_at"]),
            "CONSULT_DATE_TIME": plain(row["answered_at"]),
            "UPDATE_DATE_TIME": plain(row["updated_at"]),
        }

    def _whose(self, row: Row) -> Row:
        return {"PATIENT_ID": row["mrn"], "VISIT_ID": self._visits[row["visit_no"]]}
