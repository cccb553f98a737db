"""Campus B's dialect: a MariaDB of the GBK years, see campus_b.sql."""

import collections.abc
import datetime
import pathlib

from runners.embedded.dialect import (
    Dialect,
    Row,
    RowChange,
    Statement,
    local,
    number_of,
    plain,
    statement_of,
)
from transforms.harmonise.gbk import for_gbk

DATABASE = "his"
_ZERO = "0000-00-00 00:00:00"  # What the programs of those years wrote instead of NULL.
_ITEMS = {
    "2823-3": "KAL", "2951-2": "NAT", "2075-0": "CLO", "17861-6": "CAL", "2000-8": "CAL",
    "2345-7": "GLU", "14749-6": "GLU", "2160-0": "CRE", "14682-9": "CRE", "3094-0": "BUN",
    "14937-7": "BUN", "3084-1": "URA", "14933-6": "URA", "1975-2": "TBI", "14631-6": "TBI",
    "1742-6": "ALT", "1920-8": "AST", "1751-7": "ALB", "2885-2": "TPR", "718-7": "HGB",
    "6690-2": "WBC", "777-3": "PLT", "789-8": "RBC", "770-8": "NEU", "1988-5": "CRP",
    "10839-9": "TNI", "13969-1": "CKM", "33762-6": "BNP", "48065-7": "DDF", "6301-6": "INR",
    "5902-2": "PTS", "14979-9": "APT", "2524-7": "LAC", "2744-1": "PHA", "2019-8": "PCO",
    "2703-7": "POX", "4548-4": "A1C", "3016-3": "TSH", "5196-1": "HBS", "20454-5": "UPR",
    "600-7": "BCU",
}  # fmt: skip
# Each unit as three generations of analysers write it.
_UNITS = {
    "mg/dL": ("mg/dl", "mg/dL", "mg%"), "g/dL": ("g/dl", "g/dL", "G/DL"),
    "µmol/L": ("umol/L", "μmol/L", "umol/L"), "10^9/L": ("10*9/L", "10E9/L", "×10^9/L"),
    "10^12/L": ("10*12/L", "10E12/L", "T/L"), "mm[Hg]": ("mmHg", "mmHg", "mm[Hg]"),
    "s": ("秒", "s", "秒"), "U/L": ("U/L", "u/L", "IU/L"), "mIU/L": ("mIU/L", "uIU/ml", "mIU/L"),
    "ng/mL": ("ng/ml", "ng/mL", "ng/ml"), "pg/mL": ("pg/ml", "pg/mL", "pg/ml"),
}  # fmt: skip
_CHARGED = ("KAL", "NAT", "CLO")  # mEq/L is mmol/L.
_ARROWS = {"H": "↑", "L": "↓", "HH": "↑↑", "LL": "↓↓", "N": ""}
_WORDS = {"H": "偏高", "L": "偏低", "HH": "HH", "LL": "LL", "N": "正常"}
_DEPARTMENTS = {
    "心血管内科": 101, "呼吸内科": 102, "肾内科": 103, "内分泌科": 104, "消化内科": 105,
    "血液内科": 106, "风湿免疫科": 107, "感染科": 108, "神经内科": 109, "儿科": 110,
    "普通外科": 201, "骨科": 202, "神经外科": 203, "产科": 204, "急诊医学科": 301,
    "重症医学科": 302, "体检中心": 401,
}  # fmt: skip
_SEXES = {"0": ("未知", "0"), "1": ("男", "1"), "2": ("女", "2"), None: (None, None)}
_ABO = {"A": "1", "B": "2", "O": "3", "AB": "4", None: "5"}
_RH = {"+": "阳性", "-": "阴性", None: "不详"}
_PATHWAYS = {"chest_pain": "XT", "stroke": "CZ", None: None}
_VISIT_STATES = {"open": 0, "closed": 1, "signed_off": 2}
_PRIORITIES = {"routine": 0, "urgent": 1, "asap": 2, "stat": 3}
_ORDER_STATES = {"active": 1, "completed": 2, "stopped": 3}
_DIAGNOSIS_TYPES = {"admission": 1, "discharge": 2, "outpatient": 3, "emergency": 4}
_ROUTES = {
    "口服": 1, "嚼服": 2, "皮下": 3, "肌内注射": 4, "静脉注射": 5, "静脉泵入": 6, "静脉滴注": 7,
}  # fmt: skip
_RESULT_STATES = {"preliminary": 0, "final": 1, "corrected": 2}
_DOCUMENT_STATES = {"draft": 0, "signed": 1, "archived": 2}
_CONSULTATION_STATES = {"requested": 0, "arrived": 1, "answered": 2, "signed_off": 3}
_SEVERITIES = {"mild": 1, "moderate": 2, "severe": 3, None: 0}
_VERIFICATIONS = {"unconfirmed": 0, "confirmed": 1, "refuted": 2}
_ROLES = {"doctor": 1, "nurse": 2, "technician": 3}
_KINDS = {"clinical": 1, "technical": 2}
_KEYS = {"MS_CFMX": ("CFHM", "MXXH")}
_FLAGS = {
    **dict.fromkeys(("YS_YZ", "HL_SMTZ", "BL_WS", "YS_ZY_HZSQ", "YS_MZ_HZSQ"), "ZFBZ"),
    "MS_GHMX": "THBZ",
}


class MariaDbDialect(Dialect):
    """Says changes as rows of campus B, or as what its programs run."""

    def results(self, rows: collections.abc.Iterable[Row]) -> list[RowChange]:
        """Returns the inserts of results that are not kept in mind, rows of `lis.result`."""
        said = [self._say("lis.result", row) for row in rows]
        return [RowChange("insert", table, None, row, key) for table, row, key in said]

    def statement(self, change: RowChange) -> Statement:
        """Returns `(SQL, parameters)` that makes a row change; the marks are `%s`."""
        return statement_of(change, f"`{DATABASE}`.`{change.table}`", "`")

    def _new_visit(self, row: Row) -> int:
        return int(row["visit_no"].lstrip("VT"))

    def _say(self, table: str, row: Row) -> tuple[str, Row, tuple[str, ...]]:
        name, said = getattr(self, f"_{table.partition('.')[2]}")(row)
        said = {column: _gbk(value) for column, value in said.items()}
        return name, said, _KEYS.get(name, (next(iter(said)),))

    def _voided(self, table: str, row: Row) -> Row | None:
        if table == "YS_YZ" and row["YZXH"] % 2:
            return row | {"YZZT": 9}  # The other half of the programs voids by status.
        return row | {_FLAGS.get(table, "ZFPB"): 1}

    def _department(self, row: Row) -> tuple[str, Row]:
        return "GY_KSDM", {
            "KSDM": _DEPARTMENTS[row["name"]],
            "KSMC": row["name"],
            "KSLX": _KINDS[row["kind"]],
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _staff(self, row: Row) -> tuple[str, Row]:
        return "GY_YGDM", {
            "YGDM": row["staff_no"],
            "YGXM": row["name"],
            "YGZC": row["title"],
            "YGLB": _ROLES[row["role"]],
            "KSDM": int(row["dept_code"][1:]),
            "LZBZ": int(row["status"] == "left"),
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _patient(self, row: Row) -> tuple[str, Row]:
        habit = row["pid"] % 4
        id_no = row["id_no"]
        return "MS_BRDA", {
            "BRID": row["pid"],
            "MZHM": row["mrn"],
            "BRXM": row["name"],
            "BRXB": _SEXES[row["sex_code"]][habit % 2],
            "CSNY": _day(row["birth_date"], habit),
            "SFZH": id_no.lower() if id_no and habit == 3 else id_no,
            "JTDH": row["phone"],
            "XX": _ABO[row["abo"]],
            "RHXX": _RH[row["rh"]],
            "GMS": row["allergies"],
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _allergy(self, row: Row) -> tuple[str, Row]:
        return "GY_GMJL", {
            "JLXH": row["allergy_id"],
            "BRID": self._brid(row),
            "GMWMC": row["substance"],
            "GMFY": row["reaction"],
            "YZCD": _SEVERITIES[row["severity"]],
            "QRBZ": _VERIFICATIONS[row["verification"]],
            "DJR": row["recorded_by"],
            "DJSJ": plain(row["recorded_at"]),
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _visit(self, row: Row) -> tuple[str, Row]:
        number = self._visits.get(row["visit_no"], self._new_visit(row))
        ended = plain(row["ended_at"]) or (_ZERO if number % 2 else None)
        head = {"BRID": self._brid(row)}
        tail = {"KSDM": _DEPARTMENTS[row["dept"]], "CWHM": row["bed"]}
        state = _VISIT_STATES[row["status"]]
        times = plain(row["started_at"]), ended, plain(row["updated_at"])
        if row["visit_class"] == "IMP":
            said = {"ZYH": number, **head, "ZYHM": row["visit_no"], **tail, "CYPB": state}
            said |= zip(("RYRQ", "CYRQ", "XGSJ"), times, strict=True)
            return "ZY_BRRY", said | {"ZFPB": 0}
        said = {"SBXH": number, **head, "JZHM": row["visit_no"]}
        said |= {"GHLB": 2 if row["visit_class"] == "EMER" else 1 + 2 * (number % 2)}
        said |= {"YJFJ": row["triage_level"], "LSTD": _PATHWAYS[row["pathway"]], **tail}
        said |= {"JZZT": state, **dict(zip(("GHSJ", "LYSJ", "XGSJ"), times, strict=True))}
        return "MS_GHMX", said | {"THBZ": 0}

    def _medical_order(self, row: Row) -> tuple[str, Row]:
        return "YS_YZ", {
            "YZXH": row["order_id"],
            **self._whose(row),
            "XMDM": row["item_code"],
            "XMMC": row["item_name"],
            "JJCD": _PRIORITIES[row["priority"]],
            "YZZT": _ORDER_STATES[row["status"]],
            "KZYS": row["ordered_by"],
            "KZSJ": plain(row["ordered_at"]),
            "ZFBZ": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _vital_sign(self, row: Row) -> tuple[str, Row]:
        names = {"TW": "temp_c", "MB": "pulse", "HX": "resp", "SSY": "sbp", "SZY": "dbp"}
        names["XYBH"] = "spo2"
        nothing = "" if row["vital_id"] % 2 else None
        return "HL_SMTZ", {
            "CJXH": row["vital_id"],
            **self._whose(row),
            **{
                column: nothing if row[name] is None else str(row[name])
                for column, name in names.items()
            },
            "GCS": row["gcs"],
            "CLSJ": f"{local(row['measured_at']):%Y%m%d%H%M%S}",
            "SBMC": row["device"],
            "ZFBZ": 0,
        }

    def _diagnosis(self, row: Row) -> tuple[str, Row]:
        return "MS_BRZD", {
            "JLXH": row["diagnosis_id"],
            **self._whose(row),
            "ICD10": row["icd10"].lower().replace(".", ""),
            "ZDMC": row["name"],
            "ZDLB": _DIAGNOSIS_TYPES[row["dx_type"]],
            "ZZBZ": int(row["is_primary"]),
            "ZDYS": row["doctor"],
            "ZDRQ": _moment(row["diagnosed_at"], row["diagnosis_id"] % 4),
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _prescription(self, row: Row) -> tuple[str, Row]:
        return "MS_CFMX", {
            "CFHM": row["rx_no"],
            "MXXH": row["line_no"],
            **self._whose(row),
            "YPDM": row["drug_code"],
            "YPMC": row["drug_name"],
            "YCJL": row["dose"],
            "JLDW": row["dose_unit"],
            "GYTJ": _ROUTES[row["route"]],
            "SYPC": row["frequency"].upper(),
            "YYTS": row["days"],
            "CFZT": _ORDER_STATES[row["status"]],
            "KFYS": row["doctor"],
            "KFSJ": _moment(row["prescribed_at"], 2 + 2 * (row["line_no"] % 2)),
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _result(self, row: Row) -> tuple[str, Row]:
        number = number_of(row["result_id"])
        habit = number % 3
        item, flag, printed = _ITEMS[row["loinc"]], row["abn_flag"], row["val_num"]
        unit = _UNITS.get(row["unit"], (row["unit"],) * 3)[habit]
        if item in _CHARGED and habit == 1:
            unit = "mEq/L"
        hint = None
        if printed is None:
            printed = row["val_txt"]
        elif habit == 0 and flag != "N":
            printed = f"{printed}{_ARROWS[flag]}"
        elif flag is not None:
            hint = (_WORDS if habit != 2 else _ARROWS)[flag] or "N"
        dash = ("-", "～", "--")[habit]
        limits = row["ref_low"], row["ref_high"]
        return "JYJG", {
            "JYXH": number,
            **self._whose(row),
            "XMDM": item,
            "XMMC": row["item_name"],
            "JG": printed,
            "DW": unit,
            "CKZ": None if limits[0] is None else dash.join(limits),
            "TS": hint,
            "WJBZ": int(row["critical"]),
            "JGZT": _RESULT_STATES[row["status"]],
            "CYSJ": _moment(row["collected_at"], 0),
            "BGSJ": f"{local(row['result_at']):%Y%m%d%H%M%S}",
            "ZFPB": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _document(self, row: Row) -> tuple[str, Row]:
        return "BL_WS", {
            "WSXH": row["doc_id"],
            **self._whose(row),
            "WSLX": row["doc_type"],
            "WSBT": row["title"],
            "SXYS": row["author"],
            "QMYS": row["signed_by"],
            "WSZT": _DOCUMENT_STATES[row["status"]],
            "WSNR": row["content"],
            "SXSJ": plain(row["written_at"]),
            "ZFBZ": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _consultation(self, row: Row) -> tuple[str, Row]:
        ward = self._classes[row["visit_no"]] == "IMP"
        nothing = _ZERO if row["consultation_id"] % 2 else None
        return "YS_ZY_HZSQ" if ward else "YS_MZ_HZSQ", {
            "SQXH": row["consultation_id"],
            "JZHM": self._visits[row["visit_no"]],
            "SQSJ": plain(row["requested_at"]),
            "SQKS": _DEPARTMENTS[row["requested_dept"]],
            "SQYS": row["requested_by"],
            "JJBZ": int(row["urgency"] == "emergency"),
            "HZMD": row["purpose"],
            "HZYS": row["consultant"],
            "HZYJ": row["opinion"],
            "HZZT": _CONSULTATION_STATES[row["status"]],
            "DCSJ": plain(row["arrived_at"]) or nothing,
            "HFSJ": plain(row["answered_at"]) or nothing,
            "ZFBZ": 0,
            "XGSJ": plain(row["updated_at"]),
        }

    def _brid(self, row: Row) -> int:
        return self._patients[row["mrn"]]["pid"]

    def _whose(self, row: Row) -> Row:
        return {"BRID": self._brid(row), "JZHM": row["visit_no"]}


def script() -> list[str]:
    """Returns the statements of campus_b.sql, which may be run again."""
    text = pathlib.Path(__file__).with_name("campus_b.sql").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("--"))
    return [part.strip() for part in "\n".join(lines).split(";") if part.strip()]


def _gbk(value: object) -> object:
    """Text as this store can hold it; what is lost shows."""
    return for_gbk(value).text if isinstance(value, str) else value


def _day(day: datetime.date | None, habit: int) -> str | None:
    if day is None:
        return None
    dotted = f"{day.year:04d}.{day.month}.{day.day}"
    return (dotted, f"{day:%Y-%m-%d}", f"{day:%Y%m%d}", dotted.replace(".", "/"))[habit]


def _moment(time: datetime.datetime | None, habit: int) -> str | None:
    time = local(time)
    if time is None:
        return None
    dotted = f"{time.year}.{time.month}.{time.day} {time.hour}:{time:%M:%S}"
    forms = (dotted, f"{time:%Y%m%d%H%M%S}", f"{time:%Y-%m-%d %H:%M:%S}")
    return (*forms, dotted.replace(".", "-"), dotted.replace(".", "/"))[habit]
