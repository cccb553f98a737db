"""What can be wrong in a mapping file: every fault with its line, its path and a remedy."""

import pathlib
import re
import typing

from schemas.entities import OWN_COLUMNS, TABLES
from schemas.tables import Kind, Table
from schemas.yaml_lines import LineOf, Problem, dotted, problems_error, suggest

if typing.TYPE_CHECKING:
    from schemas.mappings import CampusMapping, ColumnRule, Measurement, Source, Units

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


class Faults:
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


def check_units(name: str, units: "Units", faults: Faults) -> None:
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


def check_source(mapping: "CampusMapping", name: str, source: "Source", faults: Faults) -> None:
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
        filled += source.measurement.fills
        _check_measurement(mapping, (*path, "measurement"), source.measurement, table, faults)
    for where, columns in (("columns", source.columns), ("absent", source.absent)):
        for column in columns:
            if column not in table.by_name:
                what = f"{table.name} has no column {column}"
                faults.add((*path, where, column), what, suggest(column, table.by_name))
    for where, columns in (("columns", source.columns), ("absent", source.absent)):
        for column in OWN_COLUMNS:
            if column in columns:
                faults.add(
                    (*path, where, column), f"{column} is not a file's to fill", "remove it."
                )
    for column in table.by_name.keys() - set(OWN_COLUMNS):
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
    _check_parent(mapping, name, source, faults)


def _check_rule(mapping, path, rule: "ColumnRule", kind: Kind, faults: Faults) -> None:
    if [bool(rule.source), rule.constant is not None, rule.parent is not None].count(True) != 1:
        faults.add(path, "has none or several of from:, constant: and parent:", "give one of them.")
    for key in ("join", "codes", "text", "zone", "invalid", "nulls", "formats"):
        if rule.parent is not None and getattr(rule, key):
            what = "is not applied to what comes from a parent"
            faults.add((*path, key), what, "put it at the parent's own column.")
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


def _check_measurement(mapping, path, rule: "Measurement", table: Table, faults: Faults) -> None:
    if not set(rule.fills) <= table.by_name.keys():
        what = f"{table.name} is not a table of measurements"
        faults.add(path, what, "map its columns under columns:.")
    if (rule.result is None) == (rule.number is None and rule.text is None):
        what = "has both or neither of result: and number:, text:"
        faults.add(path, what, "give result: where one column has both, or else the two.")
    for key in ("trim", "arrows"):
        if getattr(rule, key) is not None and rule.result is None:
            faults.add((*path, key), "is for result: only", "remove it.")
    if rule.flags is not None and rule.flag is None:
        faults.add((*path, "flags"), "is for flag: only", "name the flag's column.")
    if rule.range is not None and (rule.low or rule.high):
        faults.add((*path, "range"), "stands beside low: or high:", "give one or the other.")
    _check_listed((*path, "units"), rule.units, mapping.units, "units", faults)
    for key in ("items", "arrows", "flags"):
        listed = mapping.code_lists
        _check_listed((*path, key), getattr(rule, key), listed, "code_lists", faults)
    if rule.arrows in mapping.code_lists:
        for mark in mapping.code_lists[rule.arrows].codes:
            if not mark or re.search(r"[\s0-9.<>≤≥=+-]", mark):
                what = "a mark is empty, or could be part of a number"
                faults.add(("code_lists", rule.arrows, "codes", mark), what, "remove it.")


def _check_parent(mapping: "CampusMapping", name: str, source: "Source", faults: Faults) -> None:
    path = ("tables", name, "parent")
    taken = {c: rule.parent for c, rule in source.columns.items() if rule.parent is not None}
    if source.parent is None:
        for column in taken:
            where = ("tables", name, "columns", column)
            faults.add(where, "the table has no parent", "add parent: {table: .., by: ..}.")
        return
    before = list(mapping.tables)[: list(mapping.tables).index(name)]
    known = source.parent.table
    if known not in mapping.tables:
        what = f"there is no table {known}"
        faults.add((*path, "table"), what, suggest(known, mapping.tables))
        return
    if known not in before:
        what = f"{known} does not stand before its child"
        faults.add((*path, "table"), what, "move it up: parents are read first.")
    parent = mapping.tables[known]
    if len(source.parent.by) != len(parent.id):
        what = f"the key of {known} has {len(parent.id)} columns: {', '.join(parent.id)}"
        faults.add((*path, "by"), what, "name as many.")
    if "parent_ref" not in source.canonical.by_name or not taken:
        what = "is for rows of a patient that take a column from their parent"
        faults.add(path, what, "add e.g. patient_id: {parent: patient_id}, or remove it.")
    if parent.table not in TABLES:
        return
    for column, wanted in taken.items():
        where = ("tables", name, "columns", column, "parent")
        theirs = parent.canonical.by_name
        if wanted not in theirs or wanted in OWN_COLUMNS:
            faults.add(where, f"{parent.table} has no column {wanted}", suggest(wanted, theirs))
        elif column in source.canonical.by_name:
            kind, own = theirs[wanted].kind, source.canonical.by_name[column].kind
            if kind is not own:
                faults.add(where, f"is {kind}, and this column is {own}", "name another one.")


def _check_listed(path, name: str | None, listed, section: str, faults: Faults) -> None:
    if name is not None and name not in listed:
        remedy = f"add it there, or name one of: {', '.join(listed)}."
        faults.add(path, f"there is no {name} under {section}:", remedy)
