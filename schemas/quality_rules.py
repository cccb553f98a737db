"""The thirty rules of data quality as data: read, checked against the canonical tables, told."""

import collections.abc
import dataclasses
import hashlib
import pathlib
import re
import typing

import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from schemas.conflict_policy import ALL_TABLES
from schemas.emergency_rules import UNITLESS, Limit, Number, Word, Words, spellings_of
from schemas.tables import Kind
from schemas.yaml_lines import LineOf, Problem, dotted, read_checked, suggest

DEFAULT_PATH = pathlib.Path(__file__).parent / "rules" / "quality.yaml"
RULES = range(1, 31)  # The numbers that the domain notes and every alarm use.

# One row an alarm: which rule, which version of which row, which column; never the value.
ALARM_SCHEMA = pa.schema(
    [
        pa.field("rule", pa.int16(), False),
        pa.field("campus", pa.utf8(), False),
        pa.field("table", pa.utf8(), False),
        pa.field("record_id", pa.utf8(), False),
        pa.field("lsn", pa.int64(), False),
        pa.field("seq", pa.int32(), False),
        pa.field("column", pa.utf8(), False),
        pa.field("reason", pa.utf8(), False),
    ]
)

Reason = typing.Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z][a-z0-9_]{2,39}$")]
Columns = typing.Annotated[dict[Word, Words], pydantic.Field(min_length=1)]
_Positive = typing.Annotated[Number, pydantic.Field(gt=0)]
_NUMBERS = frozenset({Kind.INT, Kind.DECIMAL})
_MOMENTS = frozenset({Kind.TIME, Kind.DATE})


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Item(_Strict):
    """A laboratory item: its codes and the unit that it is judged in.

    `also` are further units that are right for it, with the factor to `unit`.
    """

    codes: Words
    unit: Word
    also: dict[Word, _Positive] = {}

    @property
    def factors(self) -> dict[str, float]:
        """Every spelling of every unit that is right, with its factor to `unit`.

        The empty text stands for a result without a unit, where the item may have none.
        """
        units = {self.unit: 1.0, **self.also}
        found = {word: factor for unit, factor in units.items() for word in spellings_of(unit)}
        return found | ({"": 1.0} if self.unit in UNITLESS else {})


class _Check(_Strict):
    """`reason` is the code in the alarm, unique in the file; a campus replaces a check by it."""

    reason: Reason


# Judged by the row alone.


class RangeCheck(_Check, Limit):
    """A number of a column outside the limits."""

    kind: typing.Literal["range"]
    source: str = ""
    table: Word
    column: Word


class ItemRangeCheck(_Check, Limit):
    """A laboratory value outside the limits, which are in the item's `unit`."""

    kind: typing.Literal["item_range"]
    source: str = ""
    items: Words


class ItemUnitCheck(_Check):
    """A laboratory value in a unit that its item does not have."""

    kind: typing.Literal["item_unit"]


class OrderCheck(_Check):
    """Columns of one row that do not ascend; nulls are passed over. `strict`: equal is wrong."""

    kind: typing.Literal["order"]
    table: Word
    columns: typing.Annotated[tuple[Word, ...], pydantic.Field(min_length=2)]
    strict: bool = False


class FutureCheck(_Check):
    """A time more than `minutes` ahead of the clock."""

    kind: typing.Literal["future"]
    minutes: _Positive
    columns: Columns


class CitizenIdCheck(_Check):
    """A citizen identity number (GB 11643) that fails one test."""

    kind: typing.Literal["citizen_id"]
    test: typing.Literal["form", "checksum", "birth", "sex"]


class FlagCheck(_Check):
    """A laboratory flag that says other than value and reference range do."""

    kind: typing.Literal["flag"]


class RequiredCheck(_Check):
    """A column without a value; not in a row whose patient is yet to come (ADR 0014).

    `when`: only in rows where that column has one. `unless_items`: not in results of these.
    """

    kind: typing.Literal["required"]
    columns: Columns
    when: Word | None = None
    unless_items: tuple[Word, ...] = ()

    @pydantic.model_validator(mode="after")
    def _is_of_results(self) -> typing.Self:
        if self.unless_items and set(self.columns) != {"lab_result"}:
            raise ValueError("only a lab_result has an item | remove `unless_items:`.")
        return self


class AnyOfCheck(_Check):
    """A row in which none of the columns has a value."""

    kind: typing.Literal["any_of"]
    table: Word
    columns: Words


class PatternCheck(_Check):
    """A code that matches none of the patterns: no mapping knew it."""

    kind: typing.Literal["pattern"]
    table: Word
    column: Word
    patterns: Words


class GarbledCheck(_Check):
    """Text that was decoded wrongly or lost characters; looks at how a value begins.

    `question_marks`: as many in a row stand for lost characters.
    """

    kind: typing.Literal["garbled"]
    columns: Columns
    question_marks: typing.Annotated[int, pydantic.Field(ge=1, le=100)]
    first_characters: typing.Annotated[int, pydantic.Field(ge=16, le=1 << 20)] = 256


class RemarkCheck(_Check):
    """A row that harmonising remarked on with one of these words, in whatever table."""

    kind: typing.Literal["remark"]
    words: Words


# Judged by the results of one specimen: what has the same patient and time of collection.


class ItemSumCheck(_Check, Limit):
    """Items whose sum is outside the limits, where all of them are there."""

    kind: typing.Literal["item_sum"]
    source: str = ""
    items: typing.Annotated[tuple[Word, ...], pydantic.Field(min_length=2)]


class ItemAtMostCheck(_Check):
    """A part that is more than the whole."""

    kind: typing.Literal["item_at_most"]
    part: Word
    whole: Word


class ItemRatioCheck(_Check):
    """`item` that is not `factor` times `of`, give or take `tolerance` (a share)."""

    kind: typing.Literal["item_ratio"]
    item: Word
    of: Word
    factor: _Positive
    tolerance: typing.Annotated[Number, pydantic.Field(gt=0, lt=1)]


# Judged in the store: by other rows of the patient.


class DeltaLimit(_Strict):
    """A change is odd if it is more than `absolute` and more than `ratio` times."""

    item: Word
    absolute: _Positive
    ratio: typing.Annotated[Number, pydantic.Field(gt=1)]


class DeltaCheck(_Check):
    """A result unlike the one before it of the same patient and item, within `hours`."""

    kind: typing.Literal["delta"]
    hours: _Positive
    limits: typing.Annotated[tuple[DeltaLimit, ...], pydantic.Field(min_length=1)]


class BeforeBirthCheck(_Check):
    """An event before the patient's birth date, by more than `grace_days`."""

    kind: typing.Literal["before_birth"]
    grace_days: typing.Annotated[int, pydantic.Field(ge=0, le=30)]
    columns: Columns


class SexCheck(_Check):
    """What a patient of this sex does not have; from `from_age_years` on."""

    kind: typing.Literal["sex"]
    sex: typing.Literal["1", "2"]
    table: Word
    column: Word
    prefixes: Words
    from_age_years: typing.Annotated[int, pydantic.Field(ge=0, le=20)] = 0


class Notice(_Strict):
    """A row that shows that somebody was told: `column` has one of `values`.

    It counts if its `time` is from `before_minutes` before the report to the check's deadline.
    """

    table: Word
    column: Word
    values: Words
    time: Word
    before_minutes: typing.Annotated[Number, pydantic.Field(ge=0)]


class NoticeCheck(_Check):
    """A critical value of which nobody was told within `minutes` of its report."""

    kind: typing.Literal["notice"]
    flags: tuple[Word, ...]
    statuses: Words
    minutes: _Positive
    notices: typing.Annotated[tuple[Notice, ...], pydantic.Field(min_length=1)]


class Recorded(_Strict):
    """Where allergies are recorded as text; `unless`: not where a column has one of these."""

    table: Word
    column: Word
    unless: dict[Word, Words] = {}


class Substance(_Strict):
    """`words` name it in a record of allergies; `drugs` are codes or parts of names."""

    words: Words
    codes: tuple[Word, ...] = ()
    names: tuple[Word, ...] = ()


class AllergyCheck(_Check):
    """An active prescription of what the patient is recorded not to bear.

    `negated`: regular expressions; what they match in a record says that there is no allergy.
    """

    kind: typing.Literal["allergy"]
    recorded: typing.Annotated[tuple[Recorded, ...], pydantic.Field(min_length=1)]
    negated: tuple[Word, ...]
    ended_statuses: tuple[Word, ...]
    substances: typing.Annotated[tuple[Substance, ...], pydantic.Field(min_length=1)]


class BloodGroupCheck(_Check):
    """Records of one person, at whatever campus, with different values of a blood group."""

    kind: typing.Literal["blood_group"]
    column: typing.Literal["abo", "rh"]


RowCheck = (
    RangeCheck
    | ItemRangeCheck
    | ItemUnitCheck
    | OrderCheck
    | FutureCheck
    | CitizenIdCheck
    | FlagCheck
    | RequiredCheck
    | AnyOfCheck
    | PatternCheck
    | GarbledCheck
    | RemarkCheck
)
SpecimenCheck = ItemSumCheck | ItemAtMostCheck | ItemRatioCheck
StoreCheck = DeltaCheck | BeforeBirthCheck | SexCheck | NoticeCheck | AllergyCheck | BloodGroupCheck
Check = typing.Annotated[
    RowCheck | SpecimenCheck | StoreCheck, pydantic.Field(discriminator="kind")
]


class QualityRule(_Strict):
    """One of the thirty.

    Attributes:
      waits: why it, or a part of it, is not evaluated: what the canonical data do not carry.
    """

    rule: typing.Annotated[int, pydantic.Field(ge=RULES[0], le=RULES[-1])]
    title: Word
    source: Word
    checks: tuple[Check, ...] = ()
    waits: Word | None = None


class _Override(_Strict):
    off: tuple[Reason, ...] = ()
    checks: tuple[Check, ...] = ()


class _RulesFile(_Strict):
    version: typing.Literal[1]
    items: dict[Word, Item]
    rules: tuple[QualityRule, ...]
    campuses: dict[Word, _Override] = {}


@dataclasses.dataclass(frozen=True)
class QualityRules:
    """The rules of a file.

    Attributes:
      items: laboratory items by name, which checks refer to.
      rules: all thirty, by number.
      version: SHA-256 of the file's content: other rules judge rows again.
    """

    path: str
    items: dict[str, Item]
    rules: tuple[QualityRule, ...]
    overrides: dict[str, _Override]
    version: bytes

    def for_campus(self, campus: str) -> list[tuple[int, Check]]:
        """Returns the checks of a campus with their rules' numbers, in order of the file."""
        override = self.overrides.get(campus, _Override())
        replaced = {check.reason: check for check in override.checks}
        return [
            (rule.rule, replaced.get(check.reason, check))
            for rule in self.rules
            for check in rule.checks
            if check.reason not in override.off
        ]

    def unknown_campuses(self, known: collections.abc.Iterable[str]) -> list[str]:
        """Returns the campuses that the file overrides and that are not in `known`."""
        return sorted(set(self.overrides) - set(known))


def load_quality_rules(path: str | pathlib.Path = "default") -> QualityRules:
    """Returns the rules of a file; `default` is the packaged one.

    Raises:
      ConfigError: no such file, or it has gaps or contradictions: all of them at once, each
        with its line, its place and the remedy.
    """
    path = DEFAULT_PATH if str(path) == "default" else pathlib.Path(path)
    content = read_checked(path, _RulesFile, _problems)
    rules = tuple(sorted(content.rules, key=lambda rule: rule.rule))
    version = hashlib.sha256(content.model_dump_json().encode()).digest()
    return QualityRules(str(path), content.items, rules, content.campuses, version)


def columns_of(check: Check) -> dict[str, tuple[str, ...]]:
    """Returns the columns that a check looks at, by table."""
    if isinstance(check, FutureCheck | RequiredCheck | GarbledCheck | BeforeBirthCheck):
        return dict(check.columns)
    if isinstance(check, OrderCheck | AnyOfCheck):
        return {check.table: tuple(check.columns)}
    if isinstance(check, RangeCheck | PatternCheck | SexCheck):
        return {check.table: (check.column,)}
    if isinstance(check, CitizenIdCheck):
        return {"patient": ("id_no", "birth_date", "sex")}
    if isinstance(check, RemarkCheck):
        return {
            name: ("remarks",) for name, table in ALL_TABLES.items() if "remarks" in table.by_name
        }
    if isinstance(check, AllergyCheck):
        return {place.table: (place.column, *place.unless) for place in check.recorded}
    if isinstance(check, NoticeCheck):
        return {notice.table: (notice.column, notice.time) for notice in check.notices}
    if isinstance(check, BloodGroupCheck):
        return {"patient": (check.column,)}
    return {"lab_result": ("item_code", "value", "unit")}


def items_of(check: Check) -> tuple[str, ...]:
    """Returns the names of the laboratory items that a check is about."""
    if isinstance(check, ItemRangeCheck | ItemSumCheck):
        return check.items
    if isinstance(check, ItemAtMostCheck):
        return (check.part, check.whole)
    if isinstance(check, ItemRatioCheck):
        return (check.item, check.of)
    if isinstance(check, DeltaCheck):
        return tuple(limit.item for limit in check.limits)
    if isinstance(check, RequiredCheck):
        return check.unless_items
    return ()


_Finding = tuple[tuple, str, str]


def _problems(content: _RulesFile, line_of: LineOf) -> collections.abc.Iterator[Problem]:
    for place, what, remedy in (*_rule_problems(content), *_item_problems(content)):
        yield Problem(line_of(place), dotted(place), what, remedy)


def _rule_problems(content: _RulesFile) -> collections.abc.Iterator[_Finding]:
    numbers: set[int] = set()
    reasons: set[str] = set()
    for i, rule in enumerate(content.rules):
        place = ("rules", i)
        if rule.rule in numbers:
            yield (*place, "rule"), f"rule {rule.rule} stands twice", "keep one."
        numbers.add(rule.rule)
        if not rule.checks and rule.waits is None:
            yield place, "is neither evaluated nor explained", "add `checks:` or say `waits:`."
        for j, check in enumerate(rule.checks):
            if check.reason in reasons:
                yield (*place, "checks", j, "reason"), f"`{check.reason}` stands twice", "rename."
            reasons.add(check.reason)
            yield from _check_problems(content, check, (*place, "checks", j))
    if missing := sorted(set(RULES) - numbers):
        words = ", ".join(map(str, missing))
        yield (
            ("rules",),
            f"rules {words} are missing",
            "name each of the thirty, if to say `waits:`.",
        )
    for campus, override in content.campuses.items():
        place = ("campuses", campus)
        for j, reason in enumerate(override.off):
            if reason not in reasons:
                yield (*place, "off", j), f"no check `{reason}`", suggest(reason, reasons)
        for j, check in enumerate(override.checks):
            if check.reason not in reasons:
                yield (
                    (*place, "checks", j, "reason"),
                    f"no check `{check.reason}` to replace",
                    suggest(check.reason, reasons),
                )
            yield from _check_problems(content, check, (*place, "checks", j))


def _check_problems(
    content: _RulesFile, check: Check, place: tuple
) -> collections.abc.Iterator[_Finding]:
    wanted = _kinds_wanted(check)
    for table, columns in columns_of(check).items():
        if table not in ALL_TABLES:
            yield place, f"no table `{table}`", suggest(table, ALL_TABLES)
            continue
        known = ALL_TABLES[table].by_name
        for column in columns:
            if column not in known:
                yield place, f"{table} has no column `{column}`", suggest(column, known)
            elif wanted is not None and known[column].kind not in wanted:
                yield place, f"{table}.{column} is {known[column].kind}", "name another column."
        when = getattr(check, "when", None)
        if when is not None and when not in known:
            yield (*place, "when"), f"{table} has no column `{when}`", suggest(when, known)
    for item in items_of(check):
        if item not in content.items:
            yield place, f"no item `{item}`", suggest(item, content.items)
    patterns = getattr(check, "patterns", ()) + getattr(check, "negated", ())
    for pattern in patterns:
        if not _is_pattern(pattern):
            yield place, "a pattern is no regular expression", "correct it."


def _kinds_wanted(check: Check) -> frozenset[Kind] | None:
    if isinstance(check, RangeCheck):
        return _NUMBERS
    if isinstance(check, FutureCheck | BeforeBirthCheck):
        return frozenset({Kind.TIME})
    if isinstance(check, OrderCheck):
        return _NUMBERS | _MOMENTS
    if isinstance(check, PatternCheck | GarbledCheck | SexCheck | AnyOfCheck):
        return None if isinstance(check, AnyOfCheck) else frozenset({Kind.TEXT})
    return None


def _is_pattern(text: str) -> bool:
    """Whether both engines that may meet it (RE2 and Python's) read it."""
    try:
        re.compile(text)
        pc.match_substring_regex(pa.array([""]), text)
    except (re.error, pa.ArrowInvalid):
        return False
    return True


def _item_problems(content: _RulesFile) -> collections.abc.Iterator[_Finding]:
    codes: set[str] = set()
    for name, item in content.items.items():
        place = ("items", name)
        for code in item.codes:
            if code in codes:
                yield (*place, "codes"), f"{code} stands twice", "keep one."
            codes.add(code)
        if item.unit in item.also:
            yield (*place, "also"), f"{item.unit} is the unit itself", "remove it."
