"""Laboratory results drawn for many specimens at once, as a campus writes them."""

import collections.abc
import dataclasses
import functools
import math

import numpy as np

from runners.embedded.knowledge import INDEX, ITEMS, LabItem

_HAEMOLYSED = "标本溶血，建议复查"
_HAEMOLYSED_SHARE = 0.003
_CALM = 2.8  # Standard deviations; beyond them somebody would be called.


@dataclasses.dataclass(frozen=True)
class Results:
    """Columns of results, all of one length; a value is text with the item's decimals.

    `value` is None where the result is a `text`; `low`, `high` are None where there is no
    range. `flag` is N, L, H, LL or HH, None for texts.
    """

    code: list[str]
    name: list[str]
    value: list[str | None]
    text: list[str | None]
    unit: list[str | None]
    low: list[str | None]
    high: list[str | None]
    flag: list[str | None]
    critical: list[bool]

    def rows(self) -> collections.abc.Iterator[dict[str, object]]:
        """Yields each result as columns of `lis.result`."""
        names = ("loinc", "item_name", "val_num", "val_txt", "unit", "ref_low", "ref_high")
        names += ("abn_flag", "critical")
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


class Laboratory:
    """Measures specimens.

    Args:
      mass_units: write mass concentrations (mg/dL, g/dL) and their LOINCs.
    """

    def __init__(self, mass_units: bool):
        self.numeric_items = np.array([i for i, item in enumerate(ITEMS) if item.texts is None])
        factors = [_factor(item, mass_units) for item in ITEMS]
        self._factor = np.array(factors)
        self._decimals = [_decimals(item, mass_units) for item in ITEMS]
        self._scale = 10.0 ** np.array(self._decimals)
        self._mean, self._deviation, self._skewed = _healthy()
        self._critical = np.array(
            [
                [-math.inf if low is None else low, math.inf if high is None else high]
                for low, high in (item.critical for item in ITEMS)
            ]
        )
        # By [woman][item]: what stands beside the value, and the range as it is written.
        self._printed = [
            [self._heading(item, i, woman, mass_units) for i, item in enumerate(ITEMS)]
            for woman in (False, True)
        ]
        self._range = np.array(
            [[[float(h[3] or "-inf"), float(h[4] or "inf")] for h in row] for row in self._printed]
        )

    def _heading(self, item: LabItem, index: int, woman: bool, mass_units: bool) -> tuple:
        mass = item.mass if mass_units else None
        low, high = item.women if woman and item.women else (item.low, item.high)
        ends = (None, None)
        if item.texts is None:
            decimals = self._decimals[index]
            ends = tuple(f"{end / self._factor[index]:.{decimals}f}" for end in (low, high))
        unit = mass.unit if mass else item.unit
        return (mass.code if mass else item.code, item.name, unit or None, *ends)

    def measure(
        self,
        rng: np.random.Generator,
        items: np.ndarray,
        women: np.ndarray,
        unlike: collections.abc.Mapping[str, tuple[float, float] | str] | None = None,
        calm: bool = False,
    ) -> Results:
        """Returns one result for each specimen.

        Args:
          items: n indices into `ITEMS`.
          women: n booleans; some reference ranges are theirs.
          unlike: SI LOINC -> (mean, standard deviation) or text, for those who are ill.
          calm: no critical value, nothing that makes an emergency of anybody.
        """
        sex, skewed = women.astype(np.int64), self._skewed[items]
        mean, deviation = self._mean[sex, items], self._deviation[sex, items]
        texts: dict[int, str] = {}
        for code, how in (unlike or {}).items():
            here = items == INDEX[code]
            if isinstance(how, str):
                texts[INDEX[code]] = how
            else:
                mean, deviation = np.where(here, how[0], mean), np.where(here, how[1], deviation)
                skewed = skewed & ~here
        draw = rng.standard_normal(len(items))
        if calm:
            draw = np.clip(draw, -_CALM, _CALM)
        si = mean + deviation * draw
        si = np.where(skewed, np.exp(np.where(skewed, si, 0.0)), si)
        critical = self._critical[items]
        if calm:  # A fiftieth off the limits, so that no rounding crosses them.
            si = np.clip(si, critical[:, 0] * 1.02, critical[:, 1] * 0.98)
        factor, scale = self._factor[items], self._scale[items]
        written = np.round(np.maximum(si, 0.0) / factor * scale) / scale
        haemolysed = rng.random(len(items)) < _HAEMOLYSED_SHARE
        limits = critical / factor[:, None]
        return self._write(items, sex, written, limits, texts, haemolysed)

    def _write(self, items, sex, written, critical, texts, haemolysed) -> Results:
        """Lays results out as columns; see `measure`."""
        ends = self._range[sex, items]
        level = (written > ends[:, 1]).astype(np.int8) - (written < ends[:, 0])
        is_critical = (written < critical[:, 0]) | (written > critical[:, 1])
        flags = np.array(["LL", "L", "N", "H", "HH"], dtype=object)[level * (1 + is_critical) + 2]
        value: list[str | None] = []
        text: list[str | None] = []
        out_flags, out_critical = flags.tolist(), is_critical.tolist()
        for i, (item, number) in enumerate(zip(items.tolist(), written.tolist(), strict=True)):
            known, decimals = ITEMS[item].texts, self._decimals[item]
            if known is None and number > 0 and not haemolysed[i]:
                value.append(f"{number:.{decimals}f}")
                text.append(None)
                continue
            value.append(None)
            out_flags[i], out_critical[i] = None, False
            if known is not None:
                text.append(texts.get(item, known[0]))
                # A blood culture that grows something is telephoned, like a critical number.
                out_critical[i] = item == INDEX["600-7"] and text[-1] != known[0]
            elif haemolysed[i]:
                text.append(_HAEMOLYSED)
            else:
                text.append(f"<{10.0**-decimals:.{decimals}f}")
        printed = self._printed
        headings = [printed[w][i] for w, i in zip(sex.tolist(), items.tolist(), strict=True)]
        code, name, unit, low, high = (list(c) for c in zip(*headings, strict=True))
        return Results(code, name, value, text, unit, low, high, out_flags, out_critical)


def _factor(item: LabItem, mass_units: bool) -> float:
    return item.mass.factor if item.mass and mass_units else 1.0


def _decimals(item: LabItem, mass_units: bool) -> int:
    return item.mass.decimals if item.mass and mass_units else item.decimals


@functools.cache
def _healthy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean and deviation by [woman][item], and for which items they are of logarithms.

    They leave one in twenty of the healthy outside the reference range, as such ranges do.
    """
    mean, deviation = np.empty((2, len(ITEMS))), np.empty((2, len(ITEMS)))
    for i, item in enumerate(ITEMS):
        men = (item.low, item.high)
        for woman, (low, high) in enumerate((men, item.women or men)):
            if item.skewed:
                mean[woman, i] = math.log(item.typical)
                deviation[woman, i] = math.log(high / item.typical) / 1.96
            else:
                mean[woman, i] = (low + high) / 2
                deviation[woman, i] = (high - low) / 3.92
    return mean, deviation, np.array([item.skewed for item in ITEMS])
