"""The emergency rules E1 to E11 as data: read, checked against each other, put in words."""

import collections.abc
import dataclasses
import enum
import math
import pathlib
import typing

import pydantic

from schemas.entities import VITAL_SIGN
from schemas.yaml_lines import LineOf, Problem, problems_error, read_model, suggest

DEFAULT_PATH = pathlib.Path(__file__).parent / "rules" / "default.yaml"


class Rule(enum.IntEnum):
    """Why a row is an emergency; the names are those of the rules file and of `sync.escalation`."""

    NONE = 0
    E1 = 1  # Class of the visit.
    E2 = 2  # Triage level.
    E3 = 3  # Vital sign or value of level I.
    E4 = 4  # Vital sign of level II.
    E5 = 5  # Vital sign of level III.
    E6 = 6  # Critical value.
    E7 = 7  # Urgent order.
    E8 = 8  # Emergency consultation.
    E9 = 9  # Chest pain.
    E10 = 10  # Stroke.
    E11 = 11  # Patient under emergency, or emergency record without a class.


SIGN_OFF = "sign_off"  # Stands in the rule's place where an escalation is closed.
LEVEL_RULES = {1: Rule.E3, 2: Rule.E4, 3: Rule.E5}
_LEVEL_NAMES = {1: "I", 2: "II", 3: "III", 4: "IV"}

# Unit in which each item's limits are compared (UCUM). LOINC's code changes with the kind of
# quantity, so mass glucose (2345-7) is another item, not another unit.
ITEM_UNITS = {
    "2823-3": "mmol/L",  # Potassium, serum or plasma.
    "6298-4": "mmol/L",  # Potassium, blood.
    "2951-2": "mmol/L",  # Sodium, serum or plasma.
    "2947-0": "mmol/L",  # Sodium, blood.
    "14749-6": "mmol/L",  # Glucose, serum or plasma.
    "15074-8": "mmol/L",  # Glucose, blood.
    "14743-9": "mmol/L",  # Glucose, capillary blood, glucometer.
    "2000-8": "mmol/L",  # Calcium, serum or plasma.
    "718-7": "g/L",  # Haemoglobin, blood.
    "777-3": "10*9/L",  # Platelets, automated.
    "26515-7": "10*9/L",  # Platelets.
    "6690-2": "10*9/L",  # Leukocytes, automated.
    "26464-8": "10*9/L",  # Leukocytes.
    "6301-6": "{INR}",  # INR, platelet poor plasma.
    "34714-6": "{INR}",  # INR, blood.
    "5902-2": "s",  # Prothrombin time.
    "14979-9": "s",  # aPTT, platelet poor plasma.
    "3173-2": "s",  # aPTT, blood.
    "10839-9": "ng/mL",  # Troponin I, cardiac.
    "2019-8": "mm[Hg]",  # pCO2, arterial.
    "2703-7": "mm[Hg]",  # pO2, arterial.
    "2744-1": "[pH]",  # pH, arterial.
    "2160-0": "umol/L",  # Creatinine, serum or plasma.
    "14682-9": "umol/L",  # Creatinine, substance.
    "2524-7": "mmol/L",  # Lactate, serum or plasma.
    "2518-9": "mmol/L",  # Lactate, arterial.
    "1975-2": "umol/L",  # Bilirubin, total.
    "14631-6": "umol/L",  # Bilirubin, substance.
}

# Ways to write a unit under which the number is the same: campuses and their mappings differ.
UNIT_SPELLINGS = {
    "10*9/L": ("10*9/L", "10^9/L", "10⁹/L", "×10^9/L", "×10⁹/L", "G/L"),
    "umol/L": ("umol/L", "µmol/L", "μmol/L"),
    "ng/mL": ("ng/mL", "ug/L", "µg/L", "μg/L"),
    "mm[Hg]": ("mm[Hg]", "mmHg"),
    "s": ("s", "sec"),
    "{INR}": ("{INR}", "INR", "1"),
    "[pH]": ("[pH]", "pH", "1"),
}
UNITLESS = frozenset({"{INR}", "[pH]"})  # A result may come without a unit.


def spellings_of(unit: str) -> tuple[str, ...]:
    """Returns the ways to write `unit`, itself first."""
    return UNIT_SPELLINGS.get(unit, (unit,))


_SIGNS = {
    column.name: column for column in VITAL_SIGN.columns if column.min is not None and column.unit
}
_SIGN_WORDS = {
    "pulse_per_min": "heart rate",
    "systolic_mmhg": "systolic pressure",
    "diastolic_mmhg": "diastolic pressure",
    "spo2_percent": "oxygen saturation",
    "temperature_cel": "temperature",
    "respiration_per_min": "respiratory rate",
}

Number = typing.Annotated[float, pydantic.Field(allow_inf_nan=False)]
Word = typing.Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
Words = typing.Annotated[tuple[Word, ...], pydantic.Field(min_length=1)]
Level = typing.Annotated[int, pydantic.Field(ge=1, le=4, strict=True)]
Icd = typing.Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Z]\d{2}(\.\d{1,3})?$")]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class _Section(_Strict):
    """`source`: where the threshold comes from; a hospital names its own decision here."""

    source: Word


class Limit(_Section):
    """A number is an alarm outside the limits; each side is open or closed, or absent."""

    below: Number | None = None
    at_or_below: Number | None = None
    above: Number | None = None
    at_or_above: Number | None = None

    @pydantic.model_validator(mode="after")
    def _is_possible(self) -> typing.Self:
        sides = (("below", "at_or_below"), ("above", "at_or_above"))
        for one, other in sides:
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"`{one}` and `{other}` stand together | keep one of the two.")
        if self.low == -math.inf and self.high == math.inf:
            raise ValueError("no limit is given | add `below:` or `above:`.")
        if self.low > self.high:
            raise ValueError(
                "the lower limit reaches the upper one, so that every value is an alarm | "
                "lower the one or raise the other."
            )
        return self

    @property
    def low(self) -> float:
        """A float below this is an alarm: `at_or_below` is taken to the next float."""
        if self.at_or_below is not None:
            return math.nextafter(self.at_or_below, math.inf)
        return -math.inf if self.below is None else self.below

    @property
    def high(self) -> float:
        """A float above this is an alarm."""
        if self.at_or_above is not None:
            return math.nextafter(self.at_or_above, -math.inf)
        return math.inf if self.above is None else self.above

    @property
    def words(self) -> str:
        sides = (
            ("below", self.below),
            ("at or below", self.at_or_below),
            ("above", self.above),
            ("at or above", self.at_or_above),
        )
        return " or ".join(f"{word} {number:g}" for word, number in sides if number is not None)


class SignLimit(Limit):
    level: typing.Literal[1, 2, 3]
    sign: Word
    unit: Word

    @property
    def key(self) -> tuple:
        return (self.sign, self.level)


class ItemLimit(Limit):
    name: Word
    codes: Words
    unit: Word

    @property
    def key(self) -> tuple:
        return (self.name,)


class LevelItemLimit(ItemLimit):
    level: typing.Literal[1, 2, 3]

    @property
    def key(self) -> tuple:
        return (self.name, self.level)


class Encounter(_Section):
    emergency_classes: Words


class Triage(_Section):
    emergency_levels: typing.Annotated[tuple[Level, ...], pydantic.Field(min_length=1)]
    waiting_levels: tuple[Level, ...] = ()
    waiting_statuses: Words


class VitalLevels(_Section):
    counting: tuple[typing.Literal[1, 2, 3], ...]


class CriticalMarks(_Section):
    flags: tuple[Word, ...]
    laboratory_mark: bool


class PositiveResults(_Section):
    codes: tuple[Word, ...]
    texts: Words


class Orders(_Section):
    priorities: tuple[Word, ...]
    ended_statuses: tuple[Word, ...]


class Consultations(_Section):
    urgencies: tuple[Word, ...]


class Pathway(_Section):
    pathways: tuple[Word, ...]
    icd10: tuple[Icd, ...]


class Diagnoses(_Section):
    types: tuple[Word, ...]


class MissingClass(_Section):
    departments: tuple[Word, ...]


class SignOff(_Section):
    """One explicit act that ends an emergency: the row of `table` reaches `status`."""

    table: typing.Literal["visit", "consultation"]
    status: Word
    classes: tuple[Word, ...] = ()
    urgencies: tuple[Word, ...] = ()

    @pydantic.model_validator(mode="after")
    def _fits_table(self) -> typing.Self:
        if self.table == "visit" and self.urgencies:
            raise ValueError("a visit has no urgency | remove `urgencies:` or name `consultation`.")
        if self.table == "consultation" and self.classes:
            raise ValueError("a consultation has no class | remove `classes:` or name `visit`.")
        return self


class Escalation(_Section):
    opened_by: tuple[str, ...]
    sign_off: typing.Annotated[tuple[SignOff, ...], pydantic.Field(min_length=1)]


class Freshness(_Section):
    hours: typing.Annotated[Number, pydantic.Field(gt=0, le=24 * 366)]


class RuleSet(_Strict):
    """The rules of one campus, complete: what a classifier is made of."""

    encounter: Encounter
    triage: Triage
    vital_levels: VitalLevels
    vital_signs: tuple[SignLimit, ...]
    vital_items: tuple[LevelItemLimit, ...]
    critical_values: tuple[ItemLimit, ...]
    critical_marks: CriticalMarks
    positive_results: PositiveResults
    orders: Orders
    consultations: Consultations
    chest_pain: Pathway
    stroke: Pathway
    diagnoses: Diagnoses
    missing_class: MissingClass
    escalation: Escalation
    freshness: Freshness


_LISTS = ("vital_signs", "vital_items", "critical_values")
_Override = pydantic.create_model(
    "_Override",
    __base__=_Strict,
    **{name: (field.annotation | None, None) for name, field in RuleSet.model_fields.items()},
)


class _RulesFile(_Strict):
    version: typing.Literal[1]
    default: RuleSet
    campuses: dict[Word, _Override] = {}


@dataclasses.dataclass(frozen=True)
class EmergencyRules:
    """The rules of a file: the defaults and, for some campuses, what replaces them."""

    path: str
    default: RuleSet
    campuses: dict[str, RuleSet]

    def for_campus(self, campus: str) -> RuleSet:
        """Returns the rules of `campus`: the defaults unless the file names it."""
        return self.campuses.get(campus, self.default)

    def unknown_campuses(self, known: collections.abc.Iterable[str]) -> list[str]:
        """Returns the campuses that the file overrides and that are not in `known`."""
        return sorted(set(self.campuses) - set(known))

    def describe(self, campus: str | None = None) -> str:
        """Returns the rules of `campus` (None: the defaults) in words for a doctor."""
        rules = self.default if campus is None else self.for_campus(campus)
        title = "the defaults" if campus not in self.campuses else f"campus {campus}"
        return "\n".join([f"Emergency rules: {title}", *_describe(rules)])


def load_rules(path: str | pathlib.Path = "default") -> EmergencyRules:
    """Returns the rules of a file; `default` is the packaged one.

    Raises:
      ConfigError: no such file, or it has gaps or contradictions: all of them at once, each
        with its line, its place and the remedy.
    """
    path = DEFAULT_PATH if str(path) == "default" else pathlib.Path(path)
    content, line_of = read_model(path, _RulesFile)
    problems = _problems_of(content.default, {}, ("default",), line_of)
    campuses = {}
    for campus, override in content.campuses.items():
        merged, places = _merge(content.default, override, ("campuses", campus))
        known = {(problem.path, problem.what) for problem in problems}
        found = _problems_of(merged, places, ("default",), line_of)
        problems += [p for p in found if (p.path, p.what) not in known]
        campuses[campus] = merged
    if problems:
        raise problems_error(path, problems)
    return EmergencyRules(str(path), content.default, campuses)


def _merge(base: RuleSet, override: pydantic.BaseModel, place: tuple) -> tuple[RuleSet, dict]:
    """Returns the override laid over the base, and where in the file each replaced part stands."""
    changed, places = {}, {}
    for name in override.model_fields_set:
        value = getattr(override, name)
        if value is None:
            continue
        if name not in _LISTS:
            changed[name] = value
            places[(name,)] = (*place, name)
            continue
        entries = list(getattr(base, name))
        own_keys: set[tuple] = set()
        for i, entry in enumerate(value):
            at = next((j for j, old in enumerate(entries) if old.key == entry.key), len(entries))
            if entry.key in own_keys:
                at = len(entries)  # Kept beside its double, which is then refused.
            own_keys.add(entry.key)
            entries[at : at + 1] = [entry]
            places[(name, at)] = (*place, name, i)
        changed[name] = tuple(entries)
    return base.model_copy(update=changed), places


def _problems_of(rules: RuleSet, places: dict, root: tuple, line_of: LineOf) -> list[Problem]:
    problems = []
    for place, what, remedy in (*_sign_problems(rules), *_item_problems(rules), *_words(rules)):
        full = (*root, *place)
        for size in (2, 1):
            if place[:size] in places:
                full = (*places[place[:size]], *place[size:])
                break
        problems.append(Problem(line_of(full), ".".join(map(str, full)), what, remedy))
    return problems


_Finding = tuple[tuple, str, str]


def _sign_problems(rules: RuleSet) -> collections.abc.Iterator[_Finding]:
    seen: dict[tuple, int] = {}
    for i, limit in enumerate(rules.vital_signs):
        place = ("vital_signs", i)
        if limit.key in seen:
            yield place, f"{limit.sign} of level {limit.level} stands twice", "keep one."
        seen[limit.key] = i
        column = _SIGNS.get(limit.sign)
        if column is None:
            yield (*place, "sign"), "no such vital sign", suggest(limit.sign, _SIGNS)
            continue
        if limit.unit != column.unit:
            yield (
                (*place, "unit"),
                f"{limit.sign} is measured in {column.unit}",
                f"write the limit in {column.unit}.",
            )
        yield from _outside(place, limit, column.min, column.max)
    yield from _crossings("vital_signs", [(x.sign, i, x) for i, x in enumerate(rules.vital_signs)])
    for (sign, level), i in seen.items():
        inner = rules.vital_signs[i]
        outer = seen.get((sign, level + 1))
        if outer is None:
            continue
        wider = rules.vital_signs[outer]
        if inner.low > wider.low or inner.high < wider.high:
            yield (
                ("vital_signs", outer),
                f"level {level} of {sign} reaches further than level {level + 1}",
                "a less urgent level must begin no later than a more urgent one.",
            )


def _outside(place: tuple, limit: Limit, low: float, high: float):
    for side in ("below", "at_or_below", "above", "at_or_above"):
        number = getattr(limit, side)
        if number is not None and not low <= number <= high:
            yield (
                (*place, side),
                f"no value between {low:g} and {high:g} reaches this limit",
                "correct the number; is it in another unit?",
            )


def _crossings(section: str, limits: list[tuple[str, int, Limit]]):
    """Two entries for one quantity that leave no value between them."""
    by_name: dict[str, list[tuple[int, Limit]]] = {}
    for name, i, limit in limits:
        by_name.setdefault(name, []).append((i, limit))
    for name, entries in by_name.items():
        low_at, lowest = max(entries, key=lambda entry: entry[1].low)
        _, highest = min(entries, key=lambda entry: entry[1].high)
        if lowest is not highest and lowest.low > highest.high:
            yield (
                (section, low_at),
                f"the limits of {name} leave no value that is not an alarm",
                "compare the entries of that name.",
            )


def _item_problems(rules: RuleSet) -> collections.abc.Iterator[_Finding]:
    for section in ("vital_items", "critical_values"):
        codes: set[tuple] = set()
        for i, limit in enumerate(getattr(rules, section)):
            level = getattr(limit, "level", None)
            for code in limit.codes:
                if (code, level) in codes:
                    yield (section, i, "codes"), f"{code} stands twice", "keep one."
                codes.add((code, level))
                unit = ITEM_UNITS.get(code)
                if unit is None:
                    yield (section, i, "codes"), f"unknown item {code}", suggest(code, ITEM_UNITS)
                elif limit.unit not in spellings_of(unit):
                    yield (
                        (section, i, "unit"),
                        f"{code} is compared in {unit}, not in {limit.unit}",
                        f"convert the limits to {unit}, or name the item of the other unit.",
                    )
        named = [
            (code, i, limit)
            for i, limit in enumerate(getattr(rules, section))
            for code in limit.codes
        ]
        yield from _crossings(section, named)
    for code in rules.positive_results.codes:
        if code in ITEM_UNITS:
            yield (
                ("positive_results", "codes"),
                f"{code} is measured as a number",
                "name a culture here, a number under `critical_values:`.",
            )


def _words(rules: RuleSet) -> collections.abc.Iterator[_Finding]:
    """Levels, statuses and rule names that do not fit together."""
    triage, counting = rules.triage, rules.vital_levels.counting
    urgent = sorted(triage.emergency_levels)
    if urgent != list(range(1, len(urgent) + 1)):
        yield (
            ("triage", "emergency_levels"),
            "a level is left out or stands twice",
            "name every level from 1 on: a more urgent level cannot be routine.",
        )
    if both := set(urgent) & set(triage.waiting_levels):
        yield (
            ("triage", "waiting_levels"),
            f"level {min(both)} is an emergency already",
            "keep it in one of the two lists.",
        )
    elif triage.waiting_levels and min(triage.waiting_levels) != len(urgent) + 1:
        yield (
            ("triage", "waiting_levels"),
            f"level {len(urgent) + 1} is in neither list",
            "name it in one of the two.",
        )
    if sorted(counting) != list(range(1, len(counting) + 1)):
        yield (
            ("vital_levels", "counting"),
            "a level is left out or stands twice",
            "name every level from 1 on, or none.",
        )
    for level in counting:
        if all(limit.level != level for limit in (*rules.vital_signs, *rules.vital_items)):
            yield ("vital_levels", "counting"), f"level {level} counts but has no limit", "add one."
    ends = {(act.table, act.status) for act in rules.escalation.sign_off}
    for status in triage.waiting_statuses:
        if ("visit", status) in ends:
            yield (
                ("triage", "waiting_statuses"),
                f"a visit that is {status} is signed off",
                "remove it here or from `sign_off:`.",
            )
    names = [rule.name for rule in Rule if rule is not Rule.NONE]
    for name in rules.escalation.opened_by:
        if name not in names:
            yield ("escalation", "opened_by"), f"no rule {name}", suggest(name, names)


def _describe(rules: RuleSet) -> collections.abc.Iterator[str]:
    def levels(numbers: collections.abc.Iterable[int]) -> str:
        return _join([_LEVEL_NAMES[n] for n in sorted(numbers)])

    triage = rules.triage
    yield (
        f"E1  A visit of class {_join(rules.encounter.emergency_classes)} that is not over is"
        f" an emergency. [{rules.encounter.source}]"
    )
    line = f"E2  Triage {levels(triage.emergency_levels)} is an emergency"
    if triage.waiting_levels:
        line += (
            f"; triage {levels(triage.waiting_levels)} while the visit is"
            f" {_join(triage.waiting_statuses)} or has no status"
        )
    yield f"{line}. [{triage.source}]"
    for level, rule in LEVEL_RULES.items():
        yield from _describe_level(rules, level, rule)
    yield "E6  A laboratory value is an emergency when it is"
    for limit in rules.critical_values:
        yield (
            f"      {limit.name}: {limit.words} {limit.unit} ({_join(limit.codes)})"
            f" [{limit.source}]"
        )
    marks = rules.critical_marks
    words = [f"flagged {flag}" for flag in marks.flags]
    words += ["marked critical by the laboratory"] if marks.laboratory_mark else []
    if words:
        yield f"      any item: {_join(words)} [{marks.source}]"
    positive = rules.positive_results
    if positive.codes:
        yield (
            f"      culture {_join(positive.codes)}: text beginning with"
            f" {_join(positive.texts)} [{positive.source}]"
        )
    orders = rules.orders
    yield (
        f"E7  An order {_join(orders.priorities)} is an emergency until it is"
        f" {_join(orders.ended_statuses)}. [{orders.source}]"
    )
    yield (
        f"E8  A consultation of urgency {_join(rules.consultations.urgencies)} that is not"
        f" signed off is an emergency. [{rules.consultations.source}]"
    )
    for rule, name, way in (
        ("E9 ", "chest pain", rules.chest_pain),
        ("E10", "stroke", rules.stroke),
    ):
        yield (
            f"{rule} {name.capitalize()}: a visit on the pathway {_join(way.pathways)}, or a"
            f" diagnosis {_join(way.icd10)} ({_join(rules.diagnoses.types)}). [{way.source}]"
        )
    yield from _describe_escalation(rules)


def _describe_level(rules: RuleSet, level: int, rule: Rule) -> collections.abc.Iterator[str]:
    counts = "an emergency" if level in rules.vital_levels.counting else "not an emergency here"
    yield f"{rule.name}  Level {_LEVEL_NAMES[level]} ({counts}):"
    for limit in rules.vital_signs:
        if limit.level == level:
            name = _SIGN_WORDS.get(limit.sign, limit.sign)
            yield f"      {name}: {limit.words} {limit.unit} [{limit.source}]"
    for limit in rules.vital_items:
        if limit.level == level:
            yield f"      {limit.name}: {limit.words} {limit.unit} [{limit.source}]"


def _describe_escalation(rules: RuleSet) -> collections.abc.Iterator[str]:
    yield (
        "E11 A visit without a class is an emergency when it was triaged, is on a pathway or is"
        f" in {_join(rules.missing_class.departments)}. [{rules.missing_class.source}]"
    )
    escalation = rules.escalation
    yield (
        f"    Once {_join(escalation.opened_by)} applies, every later row of that patient is an"
        f" emergency [{escalation.source}] until"
    )
    for act in escalation.sign_off:
        kinds = f" of class {_join(act.classes)}" if act.classes else ""
        kinds += f" of urgency {_join(act.urgencies)}" if act.urgencies else ""
        yield f"      a {act.table}{kinds} is {act.status} [{act.source}]"
    yield (
        f"    A row that is read or changed again more than {rules.freshness.hours:g} h after its"
        f" clinical time opens nothing. [{rules.freshness.source}]"
    )


def _join(words: collections.abc.Iterable[object]) -> str:
    words = [str(word) for word in words]
    if not words:
        return "(none)"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
