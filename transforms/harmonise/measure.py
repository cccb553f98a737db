"""The rule of a laboratory value: number or text, its unit, its item, its reference limits."""

import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.mappings import CampusMapping, Measurement
from transforms import parse_text
from transforms.harmonise.columns import by_value, codes_of, either, nulls
from transforms.harmonise.results import PRINTED, Result, read_range, read_result
from transforms.harmonise.rows import Outputs, Rows, all_or_refused
from transforms.harmonise.values import recode

_UTF8 = pa.utf8()


class _Results(typing.NamedTuple):
    """Results before any conversion, utf8[n] each; `mark` as it stood beside the number."""

    value: pa.Array
    comparator: pa.Array
    text: pa.Array
    mark: pa.Array
    raw: pa.Array


class Measure:
    """The rule of a laboratory value: number or text, its unit, its item, its reference limits."""

    def __init__(self, mapping: CampusMapping, rule: Measurement):
        self._rule = rule
        self._units = mapping.units[rule.units]
        lists = mapping.code_lists
        self._items, self._flags, self._arrows = (
            (name, lists[name]) if name else None for name in (rule.items, rule.flags, rule.arrows)
        )
        self._noted = mapping.invalid == "note"
        rules = self._units.rules
        scaled = [rule.scaled for rule in rules] + [(1, 0)]  # The last is for rows of no rule.
        self._mantissas, self._scales = np.array(scaled, np.int64).T.copy()
        self._targets = pa.array([rule.target for rule in rules], _UTF8)
        self._to_units = pa.array([rule.to_unit for rule in rules], _UTF8)
        self._keeps_unit = np.array([rule.unit == rule.to_unit for rule in rules] + [False])

    def apply(self, rows: Rows, out: Outputs) -> None:
        rule = self._rule
        core = self._core_unchanged(rows)
        value, comparator, text, mark, raw = self._results(rows)
        late = rows.unchanged(rule.text or rule.result)
        item = rows[rule.item]
        if self._items is not None:
            item = recode(rows, item, self._items, rule.item, "item_code")
        unit = by_value(rows[rule.unit], self._respelt)
        low, high = self._limits(rows)
        places = self._rules_of(rows, item, unit)
        if places is not None:
            places = self._of_numbers(value, text, places, late)
            chosen = pa.array(places >= 0)
            at = pa.array(np.maximum(places, 0))
            mantissas, scales = self._mantissas[places], self._scales[places]
            value, low, high = (
                parse_text.scale_decimal(array, mantissas, scales) for array in (value, low, high)
            )
            item = pc.if_else(chosen, self._targets.take(at), item)
            unit = pc.if_else(chosen, self._to_units.take(at), unit)
            text = _bounds_as_text(value, comparator, text, places)
        core_or_late = either(core, late)
        of_result = core_or_late if rule.result else core
        out.put("item_code", item, core)
        out.put("value", value, of_result)
        out.put("comparator", comparator, of_result)
        out.put("value_text", text, core_or_late)
        out.put("unit", unit, core)
        if "flag" in rule.fills:
            marked = late if self._arrows else None
            out.put("flag", self._flag(rows, mark), either(rows.unchanged(rule.flag), marked))
        if late is not None:  # A number that is there is the raw value, whatever the text was.
            late = late & nulls(value)
        out.put("raw_value", raw, either(core, late))
        out.put("raw_unit", rows[rule.unit], core)
        out.put("reference_low", low, core)
        out.put("reference_high", high, core)

    def _core_unchanged(self, rows: Rows) -> np.ndarray | None:
        """Where all inputs are unchanged. Where only some are, the outputs cannot be known."""
        rule = self._rule
        if rows.all_sent:
            return None
        names = [rule.item, rule.number, rule.unit, rule.low, rule.high, rule.range]
        core = all_or_refused(rows, [name for name in names if name is not None])
        late = rows.unchanged(rule.text or rule.result)
        if core is not None and (rule.text or rule.result):
            alone = core if late is None else core & ~late
            rows.refuse(alone, "partial_row", rule.item)
        return core

    def _results(self, rows: Rows) -> _Results:
        rule, none = self._rule, pa.nulls(rows.size, _UTF8)
        if rule.result:
            raw = rows[rule.result]
            value, bad = parse_text.parse_decimal(raw)
            marks = tuple(self._arrows[1].codes) if self._arrows else ()
            return self._with_odd(value, none, none, raw, bad, marks, rule.trim or "")
        text = rows[rule.text] if rule.text else none
        if not rule.number:
            value, number = none, none
        else:
            number = rows[rule.number]
            value, bad = parse_text.parse_decimal(number)
            rows.invalid(self._noted, bad, "bad_decimal", rule.number, "value", number)
        if not number.null_count or text.null_count == rows.size:
            return _Results(value, none, text, none, number)
        raw = pc.coalesce(number, text)
        odd = nulls(number) & ~nulls(text)
        return self._with_odd(value, none, text, raw, odd, (), "", only_bounds=True)

    def _with_odd(self, value, none, text, raw, odd, marks, trim, only_bounds=False) -> _Results:
        """Fills in what the rows `odd` say, which is no plain number; read once a distinct text."""
        if not odd.any():
            return _Results(value, none, text, none, raw)
        where = pa.array(odd)
        encoded = raw.filter(where).dictionary_encode()
        found = [read_result(one, marks, trim) for one in encoded.dictionary.to_pylist()]
        if only_bounds:
            found = [
                one if one.comparator else Result(None, None, written, None)
                for one, written in zip(found, encoded.dictionary.to_pylist(), strict=True)
            ]
        number, comparator, words, mark = (
            pa.array([one[i] for one in found], _UTF8).take(encoded.indices) for i in range(4)
        )
        number, _ = parse_text.parse_decimal(number)
        parts = zip((value, none, text, none), (number, comparator, words, mark), strict=True)
        return _Results(*(pc.replace_with_mask(all_of, where, some) for all_of, some in parts), raw)

    def _flag(self, rows: Rows, mark: pa.Array) -> pa.Array:
        """The flag's own column, else the mark beside the number."""
        rule, flag = self._rule, pa.nulls(rows.size, _UTF8)
        if rule.flag:
            flag = rows[rule.flag]
            if self._flags is not None:
                flag = recode(rows, flag, self._flags, rule.flag, "flag")
        if mark.null_count == rows.size:
            return flag
        return pc.coalesce(flag, recode(rows, mark, self._arrows, rule.result, "flag"))

    def _limits(self, rows: Rows) -> tuple[pa.Array, pa.Array]:
        rule = self._rule
        if rule.range is None:
            return self._limit(rows, rule.low, "low"), self._limit(rows, rule.high, "high")
        written = rows[rule.range]
        encoded = written.dictionary_encode()
        found = [read_range(text) for text in encoded.dictionary.to_pylist()]
        unread = np.array([one is None for one in found] + [False])
        if unread.any():
            mask = unread[codes_of(encoded)]
            rows.remark(rule.range, "reference_low", "unread_range", mask, written)
        ends = [pa.array([one and one[i] for one in found], _UTF8) for i in range(2)]
        low, high = (parse_text.parse_decimal(end)[0].take(encoded.indices) for end in ends)
        return low, high

    def _limit(self, rows: Rows, column: str | None, side: str) -> pa.Array:
        if column is None:
            return pa.nulls(rows.size, _UTF8)
        limit, bad = parse_text.parse_decimal(rows[column])
        rows.invalid(self._noted, bad, "bad_decimal", column, f"reference_{side}", rows[column])
        return limit

    def _respelt(self, names: pa.Array) -> pa.Array:
        spellings = self._units.spellings
        return pa.array([spellings.get(name, name) for name in names.to_pylist()], pa.utf8())

    def _rules_of(self, rows: Rows, item: pa.Array, unit: pa.Array) -> np.ndarray | None:
        """Index of each row's unit rule, -1 for none; None if no row has one."""
        known = self._units.known_units
        items, units = item.dictionary_encode(), unit.dictionary_encode()
        item_at = {name: i for i, name in enumerate(items.dictionary.to_pylist())}
        unit_at = {name: i for i, name in enumerate(units.dictionary.to_pylist())}
        # By (item, unit), with a last place each for null. Only distinct pairs are looked at.
        rule_of = np.full((len(item_at) + 1, len(unit_at) + 1), -1, np.int64)
        odd = np.zeros(rule_of.shape, np.bool_)
        for i, rule in enumerate(self._units.rules):
            if rule.item in item_at and rule.unit in unit_at:
                rule_of[item_at[rule.item], unit_at[rule.unit]] = i
        for name in known.keys() & item_at.keys():
            for written in unit_at.keys() - known[name]:
                odd[item_at[name], unit_at[written]] = True
        any_rule, any_odd = (rule_of >= 0).any(), odd.any()
        if not any_rule and not any_odd:
            return None
        pair = codes_of(items), codes_of(units)
        if any_odd:
            written = rows[self._rule.unit]
            rows.remark(self._rule.unit, "unit", "unknown_unit", odd[pair], written)
        places = rule_of[pair] if any_rule else None
        return places if places is not None and (places >= 0).any() else None

    def _of_numbers(self, value, text, places: np.ndarray, late) -> np.ndarray:
        """The rules that apply: words alone keep the unit of their row, and its item with it.

        A text beside a number is a remark: it stays, and the number is converted.
        """
        no_number = nulls(value)
        words = no_number & ~nulls(text)
        if late is not None:
            words |= late & no_number
        words &= ~self._keeps_unit[places]
        return np.where(words, -1, places) if words.any() else places


def _bounds_as_text(value, comparator, text, places: np.ndarray) -> pa.Array:
    """`value_text` of the bounds that were converted: `<88.4`."""
    if comparator.null_count == len(comparator):
        return text
    mask = ~nulls(comparator) & (places >= 0)
    at = pa.array(np.flatnonzero(mask))
    signs = pa.array([PRINTED[sign] for sign in comparator.take(at).to_pylist()], _UTF8)
    bounds = pc.binary_join_element_wise(signs, value.take(at), "")
    return pc.replace_with_mask(text, pa.array(mask), bounds)
