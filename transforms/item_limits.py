"""Judge laboratory items by limits: each value against its own item's, in its own unit only."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.emergency_rules import ITEM_UNITS, LEVEL_RULES, UNITLESS, Rule, RuleSet, spellings_of
from transforms.conditions import floats, true, words


class ItemLimits:
    """E3 to E6 on laboratory items: limits by item, each compared in its own unit only."""

    def __init__(self, rules: RuleSet):
        counting = rules.vital_levels.counting
        limits = [(Rule.E6, limit) for limit in rules.critical_values]
        for limit in rules.vital_items:
            if limit.level in counting:
                limits.append((LEVEL_RULES[limit.level], limit))
        codes = sorted({code for _, limit in limits for code in limit.codes})
        self._codes = pa.array([*codes, *rules.positive_results.codes], pa.utf8())
        self._cultures = len(codes)
        self._texts = tuple(text.lower() for text in rules.positive_results.texts)
        size = len(self._codes) + 1  # The last place stands for every other item.
        spellings = sorted({word for code in codes for word in spellings_of(ITEM_UNITS[code])})
        self._spellings = words(spellings)
        # Item by spelling; the last column stands for a result without a unit.
        self._fits = np.zeros((size, len(spellings) + 1), bool)
        for place, unit in enumerate(ITEM_UNITS[code] for code in codes):
            self._fits[place, [spellings.index(word) for word in spellings_of(unit)]] = True
            self._fits[place, -1] = unit in UNITLESS
        self._layers: list[tuple[Rule, np.ndarray, np.ndarray]] = []
        self._low, self._high = np.full(size, -np.inf), np.full(size, np.inf)
        for rule in sorted({rule for rule, _ in limits}, reverse=True):
            low, high = np.full(size, -np.inf), np.full(size, np.inf)
            for code, limit in ((c, x) for r, x in limits if r is rule for c in x.codes):
                place = codes.index(code)
                low[place], high[place] = limit.low, limit.high
            self._layers.append((rule, low, high))
            np.maximum(self._low, low, out=self._low)
            np.minimum(self._high, high, out=self._high)

    def find(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        """Returns the rule of each row, 0 for none, and the alarms refused for their unit."""
        found = np.zeros(rows.num_rows, np.uint8)
        other = len(self._codes)
        item = pc.index_in(rows.column("item_code"), value_set=self._codes)
        item = pc.fill_null(item, other).to_numpy()
        values = floats(rows.column("value"))
        at = np.flatnonzero((values < self._low[item]) | (values > self._high[item]))
        if at.size:
            fits = self._unit_fits(rows.column("unit").take(pa.array(at)), item[at])
            mismatches = int(at.size - np.count_nonzero(fits))
            at = at[fits]
        else:
            mismatches = 0
        for rule, low, high in self._layers:
            inner = (values[at] < low[item[at]]) | (values[at] > high[item[at]])
            found[at[inner]] = rule
        cultures = np.flatnonzero((item >= self._cultures) & (item != other))
        if cultures.size:
            texts = pc.utf8_trim_whitespace(rows.column("value_text").take(pa.array(cultures)))
            texts = pc.utf8_lower(texts)
            for text in self._texts:
                found[cultures[true(pc.starts_with(texts, text))]] = Rule.E6
        return found, mismatches

    def _unit_fits(self, units: pa.Array, item: np.ndarray) -> np.ndarray:
        spelling = pc.index_in(units, value_set=self._spellings)
        known = pc.fill_null(spelling, 0).to_numpy()
        known = np.where(true(pc.is_null(units)), len(self._spellings), known)
        return self._fits[item, known] & true(pc.or_(pc.is_null(units), pc.is_valid(spelling)))
