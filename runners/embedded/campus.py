"""How a campus writes what all campuses know: its codes, units and spellings."""

import dataclasses
import hashlib
import pathlib


@dataclasses.dataclass(frozen=True)
class Campus:
    """One campus's habits. Every table of codes is from the canonical code to the campus's.

    Attributes:
      name: as in campuses.yaml.
      letter: the first of its patient numbers.
      mass_units: mg/dL and g/dL instead of mmol/L and g/L.
      lower_icd: diagnosis codes in lower case and without the dot.
    """

    name: str
    letter: str
    mass_units: bool
    lower_icd: bool
    sex: dict[str, str]
    visit_class: dict[str, str]
    priority: dict[str, str]
    urgency: dict[str, str]
    abo: dict[str | None, str | None]
    rh: dict[str | None, str | None]

    def icd(self, code: str) -> str:
        """Returns a diagnosis code as the campus writes it."""
        return code.lower().replace(".", "") if self.lower_icd else code

    @property
    def digest(self) -> int:
        """Sixty-two bits that are the campus's own: of its ids and of its chance."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") >> 2


def _same(*codes: str) -> dict[str, str]:
    return {code: code for code in codes}


_CANONICAL = {
    "sex": _same("0", "1", "2"),
    "visit_class": _same("AMB", "EMER", "IMP"),
    "priority": _same("routine", "urgent", "asap", "stat"),
    "urgency": _same("emergency", "routine"),
    "abo": {**_same("A", "B", "O", "AB"), None: None},
    "rh": {**_same("+", "-"), None: None},
}
_DIALECTS = {"mariadb_his_gbk": True, "oracle_his": False}  # Mapping: whether in mass units.
_CHINESE = {
    "sex": _same("0", "1", "2"),
    "visit_class": {"AMB": "门诊", "EMER": "急诊", "IMP": "住院"},
    "priority": {"routine": "R", "urgent": "urgent", "asap": "A", "stat": "S"},
    "urgency": {"emergency": "急会诊", "routine": "普通会诊"},
    "abo": {"A": "1", "B": "2", "O": "3", "AB": "4", None: "5"},
    "rh": {"+": "阳性", "-": "阴性", None: "不详"},
}
_OLDER = {
    "sex": {"0": "未知", "1": "男", "2": "女"},
    "visit_class": {"AMB": "O", "EMER": "E", "IMP": "I"},
    "priority": {"routine": "R", "urgent": "urgent", "asap": "ASAP", "stat": "STAT"},
    "urgency": {"emergency": "急会诊", "routine": "普通会诊"},
    "abo": {**_same("A", "B", "O", "AB"), None: "不详"},
    "rh": {"+": "阳性", "-": "阴性", None: None},
}


def campus(name: str, mapping: str) -> Campus:
    """Returns the habits of a campus that is read with a packaged mapping.

    `postgresql_his_us_units` is for mass units, lower-case ICD-10 and 男/女. Where a dialect
    says the rows in its own words, it starts from canonical codes. Of the others, `main` writes
    canonical codes and every other campus the words that it grew up with: the mapping knows both.
    """
    kind, letter = pathlib.Path(mapping).stem, name[0].upper()
    if kind in _DIALECTS:
        return Campus(name, letter, _DIALECTS[kind], False, **_CANONICAL)
    us_units = kind == "postgresql_his_us_units"
    codes = _OLDER if us_units else _CANONICAL if name == "main" else _CHINESE
    return Campus(name, letter, us_units, us_units, **codes)
