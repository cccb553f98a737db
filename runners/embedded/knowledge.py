"""What the invented hospital knows, from knowledge.yaml: items, panels, drugs and illnesses."""

import dataclasses
import pathlib

from schemas.yaml_lines import load_yaml


@dataclasses.dataclass(frozen=True)
class Mass:
    """How a campus that measures mass concentration writes an item: SI = value × factor."""

    code: str
    unit: str
    factor: float
    decimals: int


@dataclasses.dataclass(frozen=True)
class LabItem:
    """One laboratory item, in SI units.

    Attributes:
      code: LOINC.
      low, high: reference range of men.
      decimals: as the analyser prints.
      typical: median of the healthy; the middle of the range where None.
      skewed: log-normal, so that few are far above the median.
      critical: below the first and above the second it is a critical value.
      women: women's reference range, where theirs differs.
      mass: how a campus with mass units writes it.
      texts: results of an item that is not a number: (the usual one, the positive one).
    """

    code: str
    name: str
    unit: str
    low: float
    high: float
    decimals: int
    typical: float | None = None
    skewed: bool = False
    critical: tuple[float | None, float | None] = (None, None)
    women: tuple[float, float] | None = None
    mass: Mass | None = None
    texts: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """What is ordered together; `items` are LOINCs of `ITEMS`."""

    name: str
    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Drug:
    """A drug as it is usually given; `code` is its ATC code."""

    code: str
    name: str
    dose: float
    unit: str
    route: str
    frequency: str
    days: int


@dataclasses.dataclass(frozen=True)
class Department:
    """A department; `code` is the main campus's, `kind` clinical or technical."""

    name: str
    code: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Illness:
    """What brings somebody to hospital, and what is then found and done.

    Attributes:
      code: ICD-10, 国临版.
      visit_class: AMB, EMER or IMP.
      share: how often, among those of the same urgency.
      complaint: as it stands in the record.
      panels, examinations, drugs: what is ordered.
      labs: LOINC -> (mean, standard deviation), or a text, where unlike the healthy.
      vitals: column -> (mean, standard deviation), where unlike the healthy.
      sex, ages: who gets it: from the first age to before the second.
      triage, pathway, consulted: of an emergency: its level, 胸痛 or 卒中 pathway, and the
        department that is asked.
    """

    code: str
    name: str
    department: str
    visit_class: str
    share: float
    complaint: str
    panels: tuple[str, ...]
    examinations: tuple[str, ...] = ()
    drugs: tuple[str, ...] = ()
    labs: dict[str, tuple[float, float] | str] = dataclasses.field(default_factory=dict)
    vitals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    sex: str | None = None
    ages: tuple[int, int] = (18, 95)
    triage: int | None = None
    pathway: str | None = None
    consulted: str | None = None


def _frozen(value: object) -> object:
    """Lists as tuples, so that what is shared by all cannot be changed by one."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value


_CONTENT = _frozen(load_yaml(pathlib.Path(__file__).with_suffix(".yaml"))[0])

ITEMS: tuple[LabItem, ...] = tuple(
    LabItem(**entry | {"mass": Mass(**entry["mass"]) if "mass" in entry else None})
    for entry in _CONTENT["items"]
)
INDEX: dict[str, int] = {item.code: i for i, item in enumerate(ITEMS)}
PANELS: dict[str, Panel] = {code: Panel(**entry) for code, entry in _CONTENT["panels"].items()}
EXAMINATIONS: dict[str, str] = _CONTENT["examinations"]
DRUGS: dict[str, Drug] = {entry["code"]: Drug(**entry) for entry in _CONTENT["drugs"]}
CONTRAINDICATED: dict[str, str] = _CONTENT["contraindicated"]
ROUTINE: tuple[Illness, ...] = tuple(Illness(**entry) for entry in _CONTENT["routine"])
EMERGENCIES: tuple[Illness, ...] = tuple(Illness(**entry) for entry in _CONTENT["emergencies"])
DEPARTMENTS: tuple[Department, ...] = tuple(Department(**e) for e in _CONTENT["departments"])
WARDS: dict[str, str] = _CONTENT["wards"]
HOURS: tuple[int, ...] = _CONTENT["hours"]
