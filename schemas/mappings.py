"""Mapping files: how one campus's tables become the canonical ones. A new campus is a new file."""

import decimal
import functools
import pathlib
import re
import typing

import pydantic
import yaml

from schemas.entities import TABLES
from schemas.tables import Kind, Table
from schemas.yaml_lines import (
    LineOf,
    Problem,
    dotted,
    load_yaml,
    model_problems,
    problems_error,
    suggest,
)

PACKAGED = pathlib.Path(__file__).parent / "mappings"
MEASUREMENT_COLUMNS = (
    "item_code",
    "value",
    "value_text",
    "unit",
    "raw_value",
    "raw_unit",
    "reference_low",
    "reference_high",
)
_ZONE = re.compile(r"[+-](0\d|1[0-5]):[0-5]\d")
_FORMAT = re.compile(r"([^%]|%[YmdHMSfz%])+")
_FACTOR_DIGITS_MAX = 9  # Times a value of 9 digits it still fits 64 bits.


class Refusal(typing.NamedTuple):
    """Quantities that no factor turns into each other.

    Attributes:
      items: LOINCs of one analyte: no rule leads from one of them to another one.
      units: the units between which no rule leads for any of these items.
      because: what differs, for the error.
    """

    items: tuple[str, ...]
    units: tuple[str, ...]
    because: str


# Never to be converted, whatever a file says: a file can add to these, not take away.
REFUSALS = (
    Refusal(("32673-6", "13969-1"), ("U/L", "µg/L", "ng/mL"), "CK-MB activity is not its mass"),
    Refusal(("10835-7", "43583-4"), ("mg/L", "mg/dL", "nmol/L"), "Lp(a) mass varies by isoform"),
    Refusal(("48065-7", "48066-5"), (), "D-dimer FEU and DDU differ by method, about twofold"),
)


def _one_or_more(value: typing.Any) -> typing.Any:
    return tuple(value) if isinstance(value, list) else (value,) if value is not None else ()


def _many(value: typing.Any) -> typing.Any:
    return tuple(value) if isinstance(value, list) else value


def _short_column(value: typing.Any) -> typing.Any:
    return {"from": value} if isinstance(value, str | list) else value


def _checked(pattern: re.Pattern, remedy: str) -> pydantic.AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(remedy)
        return text

    return pydantic.AfterValidator(check)


Names = typing.Annotated[tuple[str, ...], pydantic.BeforeValidator(_one_or_more)]
Zone = typing.Annotated[str, _checked(_ZONE, "is not a zone | write +HH:MM, e.g. +08:00.")]
Format = typing.Annotated[
    str, _checked(_FORMAT, "is not a format | use %Y %m %d %H %M %S %f %z only.")
]
Number = typing.Annotated[decimal.Decimal, pydantic.Field(strict=False, gt=0, allow_inf_nan=False)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class CodeList(_Model):
    """Campus codes to canonical ones.

    Attributes:
      codes: by the campus's exact text; a null target makes the value null.
      unknown: a code that is not listed becomes null (`null`, the default: a rule downstream
        must not meet a foreign vocabulary) or stays as it is (`keep`). The row arrives and the
        code is counted either way.
    """

    codes: dict[str, str | None]
    unknown: typing.Annotated[
        typing.Literal["null", "keep"],
        pydantic.BeforeValidator(lambda value: "null" if value is None else value),
    ] = "null"


class UnitRule(_Model):
    """A value of `item` in `unit`, times `factor`, is one of `to_item` (the same) in `to_unit`."""

    item: str
    unit: str
    factor: Number
    to_unit: str
    to_item: str | None = None

    @property
    def target(self) -> str:
        return self.to_item or self.item

    @property
    def scaled(self) -> tuple[int, int]:
        """The factor as `(mantissa, scale)`: mantissa / 10**scale."""
        _, digits, exponent = self.factor.as_tuple()
        mantissa = int("".join(map(str, digits)))
        return mantissa * 10 ** max(exponent, 0), max(-exponent, 0)


class ForbiddenConversion(_Model):
    """A file's own addition to `REFUSALS`."""

    items: Names
    units: Names = ()
    because: str


class Units(_Model):
    """How a campus's units are spelt and which (item, unit) is converted.

    Attributes:
      spellings: unit as written to its canonical spelling; applied before `rules`.
      rules: conversions, at most one for an item and unit.
      refuse: conversions that no rule may make, beside `REFUSALS`.
    """

    spellings: dict[str, str] = {}
    rules: typing.Annotated[tuple[UnitRule, ...], pydantic.BeforeValidator(_many)] = ()
    refuse: typing.Annotated[tuple[ForbiddenConversion, ...], pydantic.BeforeValidator(_many)] = ()

    @functools.cached_property
    def by_item_and_unit(self) -> dict[tuple[str, str], UnitRule]:
        return {(rule.item, rule.unit): rule for rule in self.rules}

    @functools.cached_property
    def converted_units(self) -> frozenset[str]:
        return frozenset(rule.unit for rule in self.rules)

    @functools.cached_property
    def known_units(self) -> dict[str, frozenset[str]]:
        """Item to the units that its rules know, before or after: others are counted."""
        known: dict[str, set[str]] = {}
        for rule in self.rules:
            known.setdefault(rule.item, set()).update((rule.unit, rule.to_unit))
            known.setdefault(rule.target, set()).add(rule.to_unit)
        return {item: frozenset(units) for item, units in known.items()}


class ColumnRule(_Model):
    """Where one canonical column comes from; a bare name or list means `from`.

    Attributes:
      source (`from`): source columns; several need `join`, or the first that is not null counts.
      join: text between the columns; a null part makes the whole null.
      constant: the same value in every row, instead of `from`.
      nulls: texts that mean null, e.g. `0000-00-00`.
      codes: name of a code list.
      text: normal form: `trim`, `upper`, `lower`, or `icd10` (upper case, dot after the third).
      formats: of a date or time, tried in order; without them ISO.
      zone: of times without one; the file's `zone` by default.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    source: Names = pydantic.Field((), alias="from")
    join: str | None = None
    constant: str | None = None
    nulls: Names = ()
    codes: str | None = None
    text: typing.Literal["trim", "upper", "lower", "icd10"] | None = None
    formats: typing.Annotated[tuple[Format, ...], pydantic.BeforeValidator(_one_or_more)] = ()
    zone: Zone | None = None


class Measurement(_Model):
    """A laboratory value: fills `MEASUREMENT_COLUMNS` together, converted by `units`.

    Attributes:
      item: source column of the item code. items: code list to LOINC, if it is a local code.
      number: source column that has numbers only. text: one that has the results that are not.
      result: one column with both, instead: what reads as a number is one.
      trim: characters around a number in `result` that are not part of it, e.g. arrows.
      unit, low, high: source columns of unit and reference limits.
      units: name of the unit rules.
    """

    item: str
    items: str | None = None
    number: str | None = None
    text: str | None = None
    result: str | None = None
    trim: str | None = None
    unit: str
    low: str | None = None
    high: str | None = None
    units: str

    @property
    def source(self) -> tuple[str, ...]:
        names = (self.item, self.number, self.text, self.result, self.unit, self.low, self.high)
        return tuple(name for name in names if name is not None)


class DeletedWhen(_Model):
    """A row whose `column` has one of `values` is a tombstone (op DELETE)."""

    column: str
    values: Names


class Source(_Model):
    """One source table.

    Attributes:
      table: the canonical table that it feeds; several may feed one.
      id: the key's columns, in order; joined by `|` they are the record id.
      columns: canonical column to its rule.
      measurement: the rule of a laboratory value, if there is one.
      absent: canonical columns that this campus does not have: null.
      ignore: source columns that are known and not wanted.
      deleted_when: the soft delete flag, if there is one.
    """

    table: str
    id: Names
    columns: dict[str, typing.Annotated[ColumnRule, pydantic.BeforeValidator(_short_column)]]
    measurement: Measurement | None = None
    absent: Names = ()
    ignore: Names = ()
    deleted_when: DeletedWhen | None = None

    @property
    def canonical(self) -> Table:
        return TABLES[self.table]

    @functools.cached_property
    def needed(self) -> tuple[str, ...]:
        """Every source column that a rule reads, once, in the file's order."""
        names = [*self.id, *(name for rule in self.columns.values() for name in rule.source)]
        names += self.measurement.source if self.measurement else ()
        names += [self.deleted_when.column] if self.deleted_when else ()
        return tuple(dict.fromkeys(names))


class ColumnFinding(typing.NamedTuple):
    """A difference between a mapping and a source's real columns; `remedy` is for a person.

    `fatal`: rows would be refused (`missing_column`, `unknown_table`); else they flow.
    """

    table: str
    column: str
    reason: str
    fatal: bool
    remedy: str


class CampusMapping(_Model):
    """A whole mapping file.

    Attributes:
      version: of the file's form.
      zone: of times that are written without one.
      max_text_bytes: a longer text makes its row a reject.
      code_lists, units: by name. tables: by source table, `schema.table`.
      file: where it was read from, for messages.
    """

    version: typing.Literal["1"]
    description: str = ""
    zone: Zone = "+08:00"
    max_text_bytes: typing.Annotated[int, pydantic.Field(strict=False, gt=0, lt=2**31)] = 50_000_000
    code_lists: dict[str, CodeList] = {}
    units: dict[str, Units] = {}
    tables: dict[str, Source]
    file: str = ""

    def compare_columns(self, real: dict[str, typing.Sequence[str]]) -> list[ColumnFinding]:
        """Returns what preflight has to say of a source whose tables have the columns `real`.

        An unmapped table or a missing column refuses rows; a column that is neither mapped nor
        ignored is only not carried.
        """
        found = []
        for name in sorted(self.tables.keys() | real.keys()):
            if name not in self.tables:
                remedy = f"map it in {self.file} or take it out of the publication"
                found.append(ColumnFinding(name, "", "unknown_table", True, remedy))
            elif name not in real:
                remedy = f"add it to the publication or take it out of {self.file}"
                found.append(ColumnFinding(name, "", "missing_table", False, remedy))
            else:
                found += self._compare_table(name, self.tables[name], real[name])
        return found

    def _compare_table(self, name, source, columns):
        for column in source.needed:
            if column not in columns:
                remedy = f"restore it in the source or map its successor in {self.file}"
                yield ColumnFinding(name, column, "missing_column", True, remedy)
        for column in columns:
            if column not in source.needed and column not in source.ignore:
                remedy = f"map it, or list it under ignore: in {self.file}"
                yield ColumnFinding(name, column, "unknown_column", False, remedy)


def load_mapping(name: str, base: pathlib.Path | None = None) -> CampusMapping:
    """Reads the packaged mapping `name`, or the file at that path (relative to `base`).

    Every plain value is a text: `no`, `1` and `01` are codes there, never other types.

    Raises:
      ConfigError: there is no such file, or it is wrong: every fault with file, line, path in
        the file and remedy.
    """
    path = PACKAGED / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path.is_file():
        path = (base or pathlib.Path()) / name
    _, line_of = load_yaml(path)  # Tells of syntax, encoding and most of the repeated keys.
    faults = _Faults(path, line_of)
    data = _plain(yaml.compose(path.read_text("utf-8-sig"), yaml.SafeLoader), (), faults)
    if not isinstance(data, dict):
        faults.add((), "is not a mapping file", "start with version, zone and tables.")
    faults.raise_any()
    try:
        mapping = CampusMapping.model_validate(data | {"file": str(path)})
    except pydantic.ValidationError as error:
        raise problems_error(path, model_problems(error, CampusMapping, line_of)) from None
    for name, units in mapping.units.items():
        _check_units(name, units, faults)
    for name, source in mapping.tables.items():
        _check_source(mapping, name, source, faults)
    faults.raise_any()
    return mapping


class _Faults:
    """Collects the faults of one file."""

    def __init__(self, file: pathlib.Path, line_of: LineOf):
        self._file = file
        self._line_of = line_of
        self._problems: list[Problem] = []

    def add(self, path: tuple, what: str, remedy: str) -> None:
        self._problems.append(Problem(self._line_of(path), dotted(path), what, remedy))

    def raise_any(self) -> None:
        if self._problems:
            raise problems_error(self._file, self._problems)


def _plain(node: yaml.Node | None, path: tuple, faults: _Faults) -> typing.Any:
    """Node to dict, list, str or None, which is an empty or a plain `null`."""
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), faults) for i, child in enumerate(node.value)]
    data = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in data:
            faults.add(path, "has a key that is a list or there twice", "keep one plain key.")
        else:
            data[key.value] = _plain(child, (*path, key.value), faults)
    return data


def _check_units(name: str, units: Units, faults: _Faults) -> None:
    refusals = [*REFUSALS, *(Refusal(r.items, r.units, r.because) for r in units.refuse)]
    seen = set()
    for i, rule in enumerate(units.rules):
        path = ("units", name, "rules", i)
        if (rule.item, rule.unit) in seen:
            faults.add(path, "has a rule for this item and unit already", "keep one.")
        seen.add((rule.item, rule.unit))
        if max(rule.scaled[0], 10 ** rule.scaled[1]) >= 10**_FACTOR_DIGITS_MAX:
            what = f"has {_FACTOR_DIGITS_MAX} digits or more before or after its point"
            faults.add((*path, "factor"), what, "shorten it.")
        for key, unit in (("unit", rule.unit), ("to_unit", rule.to_unit)):
            spelt = units.spellings.get(unit, unit)
            if spelt != unit:
                faults.add((*path, key), f"spellings: make {unit} {spelt}", f"write {spelt}.")
        for refusal in refusals:
            if {rule.item, rule.target}.isdisjoint(refusal.items):
                continue
            crosses = rule.unit != rule.to_unit and {rule.unit, rule.to_unit} <= set(refusal.units)
            if rule.target != rule.item or crosses:
                what = f"converts what has no common measure: {refusal.because}"
                faults.add(path, what, "remove the rule.")


def _check_source(mapping: CampusMapping, name: str, source: Source, faults: _Faults) -> None:
    path = ("tables", name)
    if source.table not in TABLES:
        what = f"there is no canonical table {source.table}"
        faults.add((*path, "table"), what, suggest(source.table, TABLES))
        return
    if not source.id:
        faults.add((*path, "id"), "names no column", "give the primary key's columns.")
    table = source.canonical
    filled = list(source.columns)
    if source.measurement:
        filled += MEASUREMENT_COLUMNS
        _check_measurement(mapping, (*path, "measurement"), source.measurement, table, faults)
    for where, columns in (("columns", source.columns), ("absent", source.absent)):
        for column in columns:
            if column not in table.by_name:
                what = f"{table.name} has no column {column}"
                faults.add((*path, where, column), what, suggest(column, table.by_name))
    for column in table.by_name:
        times = filled.count(column) + source.absent.count(column)
        if times == 0:
            faults.add(path, f"does not fill {column}", "map it, or list it under absent:.")
        elif times > 1:
            faults.add((*path, "columns", column), f"{column} is filled twice", "keep one.")
    for column in source.ignore:
        if column in source.needed:
            faults.add((*path, "ignore"), f"{column} is mapped", "take it out of ignore:.")
    for column, rule in source.columns.items():
        if column in table.by_name:
            kind = table.by_name[column].kind
            _check_rule(mapping, (*path, "columns", column), rule, kind, faults)


def _check_rule(mapping, path, rule: ColumnRule, kind: Kind, faults: _Faults) -> None:
    if bool(rule.source) == (rule.constant is not None):
        faults.add(path, "has both or neither of from: and constant:", "give one of them.")
    if rule.join is not None and len(rule.source) < 2:
        faults.add((*path, "join"), "joins a single column", "name several in from:.")
    _check_listed((*path, "codes"), rule.codes, mapping.code_lists, "code_lists", faults)
    for key, given, kinds in (
        ("text", rule.text, (Kind.TEXT,)),
        ("formats", rule.formats, (Kind.DATE, Kind.TIME)),
        ("zone", rule.zone, (Kind.TIME,)),
    ):
        if given and kind not in kinds:
            what = f"is for {' and '.join(kinds)}, and this column is {kind}"
            faults.add((*path, key), what, "remove it.")
    for code in rule.formats:
        if not all(field in code for field in ("%Y", "%m", "%d")):
            faults.add((*path, "formats"), "a format lacks %Y, %m or %d", "add it.")


def _check_measurement(mapping, path, rule: Measurement, table: Table, faults: _Faults) -> None:
    if not set(MEASUREMENT_COLUMNS) <= table.by_name.keys():
        what = f"{table.name} is not a table of measurements"
        faults.add(path, what, "map its columns under columns:.")
    if (rule.result is None) == (rule.number is None and rule.text is None):
        what = "has both or neither of result: and number:, text:"
        faults.add(path, what, "give result: where one column has both, or else the two.")
    if rule.trim is not None and rule.result is None:
        faults.add((*path, "trim"), "is for result: only", "remove it.")
    _check_listed((*path, "units"), rule.units, mapping.units, "units", faults)
    _check_listed((*path, "items"), rule.items, mapping.code_lists, "code_lists", faults)


def _check_listed(path, name: str | None, listed, section: str, faults: _Faults) -> None:
    if name is not None and name not in listed:
        remedy = f"add it there, or name one of: {', '.join(listed)}."
        faults.add(path, f"there is no {name} under {section}:", remedy)
