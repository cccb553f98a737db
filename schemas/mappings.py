"""Mapping files: how one campus's tables become the canonical ones. A new campus is a new file."""

import decimal
import functools
import pathlib
import re
import typing

import pydantic
import yaml

from schemas.entities import TABLES
from schemas.mapping_faults import Faults, check_source, check_units
from schemas.mapping_proposals import proposal
from schemas.tables import Table
from schemas.yaml_lines import (
    load_yaml,
    model_problems,
    problems_error,
)

PACKAGED = pathlib.Path(__file__).parent / "mappings"
MEASUREMENT_COLUMNS = (
    "item_code",
    "value",
    "comparator",
    "value_text",
    "unit",
    "raw_value",
    "raw_unit",
    "reference_low",
    "reference_high",
)
_ZONE = re.compile(r"[+-](0\d|1[0-5]):[0-5]\d")
_FORMAT = re.compile(r"([^%]|%[YmdHMSfz%])+")


def _one_or_more(value: typing.Any) -> typing.Any:
    return tuple(value) if isinstance(value, list) else (value,) if value is not None else ()


def _many(value: typing.Any) -> typing.Any:
    return tuple(value) if isinstance(value, list) else value


def _one_deleted_when(value: typing.Any) -> typing.Any:
    return (value,) if isinstance(value, dict) else _many(value)


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
Invalid = typing.Literal["refuse", "note"]
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
      invalid: what becomes of a text that is no value of the column's kind; the file's by default.
      parent: the column of the parent's canonical row that it is taken from, instead of `from`.
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
    invalid: Invalid | None = None
    parent: str | None = None


class Measurement(_Model):
    """A laboratory value: fills `MEASUREMENT_COLUMNS` together, converted by `units`.

    Attributes:
      item: source column of the item code. items: code list to LOINC, if it is a local code.
      number: source column that has numbers only. text: one that has the results that are not.
      result: one column with both, instead: what reads as a number is one. `<1.0` is one too, in
        `text` as well: its sign goes to `comparator`.
      trim: characters around a number in `result` that are not part of it.
      arrows: code list of marks at either end of a number in `result`, e.g. `↑`, to flags.
      flag: source column of the flag. flags: its code list. With `arrows` or `flag` given, the
        flag is filled here: from its column, else from the mark.
      unit: source column of the unit.
      low, high: source columns of the reference limits. range: one that has both as a text, e.g.
        `3.5-5.5`, `<5.2`, `3.5～5.5`, instead.
      units: name of the unit rules.
    """

    item: str
    items: str | None = None
    number: str | None = None
    text: str | None = None
    result: str | None = None
    trim: str | None = None
    arrows: str | None = None
    flag: str | None = None
    flags: str | None = None
    unit: str
    low: str | None = None
    high: str | None = None
    range: str | None = None
    units: str

    @property
    def source(self) -> tuple[str, ...]:
        names = (self.item, self.number, self.text, self.result, self.unit, self.low, self.high)
        return tuple(name for name in (*names, self.range, self.flag) if name is not None)

    @property
    def fills(self) -> tuple[str, ...]:
        """The canonical columns that it fills."""
        return (*MEASUREMENT_COLUMNS, "flag") if self.arrows or self.flag else MEASUREMENT_COLUMNS


class Parent(_Model):
    """The row of another source table that a row takes its patient or visit from (ADR 0014).

    Attributes:
      table: the parent's source table, which stands before in the file.
      by: this table's columns with the parent's key, in the order of the parent's `id`.
    """

    table: str
    by: Names


class DeletedWhen(_Model):
    """A row whose `column` has one of `values` is a tombstone (op DELETE); else it is there."""

    column: str
    values: Names


class Source(_Model):
    """One source table.

    Attributes:
      table: the canonical table that it feeds; several may feed one.
      id: the key's columns, in order; joined by `|` they are the record id.
      id_prefix: put before it, where several source tables of one key feed the canonical one.
      columns: canonical column to its rule.
      measurement: the rule of a laboratory value, if there is one.
      absent: canonical columns that this campus does not have: null.
      ignore: source columns that are known and not wanted.
      deleted_when: the soft delete flag, if there is one, or several: any of them deletes.
      parent: the row that leads to the patient, where the table has no patient number.
    """

    table: str
    id: Names
    id_prefix: str = ""
    columns: dict[str, typing.Annotated[ColumnRule, pydantic.BeforeValidator(_short_column)]]
    measurement: Measurement | None = None
    absent: Names = ()
    ignore: Names = ()
    deleted_when: typing.Annotated[
        tuple[DeletedWhen, ...], pydantic.BeforeValidator(_one_deleted_when)
    ] = ()
    parent: Parent | None = None

    @property
    def canonical(self) -> Table:
        return TABLES[self.table]

    @functools.cached_property
    def needed(self) -> tuple[str, ...]:
        """Every source column that a rule reads, once, in the file's order."""
        names = [*self.id, *(name for rule in self.columns.values() for name in rule.source)]
        names += self.measurement.source if self.measurement else ()
        names += [flag.column for flag in self.deleted_when]
        names += self.parent.by if self.parent else ()
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
      invalid: a text that is no value of its column's kind refuses its row (`refuse`), or is null
        with a note and a remark (`note`): for campuses where anything may stand anywhere.
      max_text_bytes: a longer text makes its row a reject.
      code_lists, units: by name. tables: by source table, `schema.table`.
      file: where it was read from, for messages.
    """

    version: typing.Literal["1"]
    description: str = ""
    zone: Zone = "+08:00"
    invalid: Invalid = "refuse"
    max_text_bytes: typing.Annotated[int, pydantic.Field(strict=False, gt=0, lt=2**31)] = 50_000_000
    code_lists: dict[str, CodeList] = {}
    units: dict[str, Units] = {}
    tables: dict[str, Source]
    file: str = ""

    def compare_columns(
        self, real: typing.Mapping[str, typing.Collection[str]]
    ) -> list[ColumnFinding]:
        """Returns what preflight has to say of a source whose tables have the columns `real`.

        An unmapped table or a missing column refuses rows; a column that is neither mapped nor
        ignored is only not carried. For a missing column the mapping's change is proposed.

        Args:
          real: by source table its columns, or its columns to their types.
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

    def drift(self, real: typing.Mapping[str, dict[str, str]]) -> dict[str, str]:
        """Returns the source tables that cannot be followed as they are, and why, with a proposal.

        Args:
          real: the mapped tables that are there: their columns to types.
        """
        found = dict.fromkeys(self.tables, "is not there, or may not be read")
        for name, columns in real.items():
            if name in found:
                missing = [
                    f"lacks {finding.column}: {finding.remedy}"
                    for finding in self._compare_table(name, self.tables[name], columns)
                    if finding.fatal
                ]
                found[name] = "; ".join(missing)
        return {name: why for name, why in found.items() if why}

    def _compare_table(self, name, source, columns):
        types = columns if isinstance(columns, dict) else dict.fromkeys(columns, "")
        known = {*source.needed, *source.ignore}
        fresh = {column: kind for column, kind in types.items() if column not in known}
        for column in source.needed:
            if column not in columns:
                remedy = f"in {self.file}: {proposal(name, source, column, fresh)}"
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
    faults = Faults(path, line_of)
    data = _plain(yaml.compose(path.read_text("utf-8-sig"), yaml.SafeLoader), (), faults)
    if not isinstance(data, dict):
        faults.add((), "is not a mapping file", "start with version, zone and tables.")
    faults.raise_any()
    try:
        mapping = CampusMapping.model_validate(data | {"file": str(path)})
    except pydantic.ValidationError as error:
        raise problems_error(path, model_problems(error, CampusMapping, line_of)) from None
    for name, units in mapping.units.items():
        check_units(name, units, faults)
    for name, source in mapping.tables.items():
        check_source(mapping, name, source, faults)
    faults.raise_any()
    return mapping


def _plain(node: yaml.Node | None, path: tuple, faults: Faults) -> typing.Any:
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
