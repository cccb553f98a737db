"""Check changes against the rules of quality: alarms for what is odd; no row is touched.

Columns are judged as a whole, without a loop over rows. What needs other rows of a patient is
judged in the store by the same rules (transforms/deliver/judging/check_store.py).
"""

import collections.abc
import functools
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas import quality_rules as q
from schemas.batches import Op
from schemas.conflict_policy import ALL_TABLES
from transforms.citizen_id import CitizenIds, read_citizen_ids
from transforms.harmonise.damaged_text import Damage, damage_of, survey
from transforms.harmonise.reissue import awaits
from transforms.parse_text import text_buffers

NO_ALARMS = pa.RecordBatch.from_pylist([], schema=q.ALARM_SCHEMA)
TOLERANCE = 1e-6  # Of sums and ratios: decimals are judged as floats.

_DECIMAL = r"^[-+]?[0-9]+(\.[0-9]+)?$"
# `(rows, reason, column)` for each place of a check: bool[n], reason code, column.
Finding = tuple[np.ndarray, str, str]
_Judge = collections.abc.Callable[["_Rows", int], collections.abc.Iterable[Finding]]


class QualityChecker:
    """The rules of one campus, made ready for columns. Stateless and pure.

    A value that the log did not carry (`_unchanged`) is not judged, a delete neither. Of one
    rule a row has one alarm at most, that of the first check in the file that finds something.
    Every version of a row in a batch is judged by itself; specimens by their newest results.
    """

    def __init__(self, rules: q.QualityRules, campus: str):
        self._campus = campus
        self._items = items = ItemTable(rules.items)
        self._judges: dict[str, list[tuple[int, _Judge]]] = {}
        for rule, check in rules.for_campus(campus):
            make = _JUDGES.get(check.kind)
            if make is None:
                continue
            for table, columns in q.columns_of(check).items():
                judge = make(check, table, columns, items)
                self._judges.setdefault(table, []).append((rule, judge))

    def check(
        self, tables: collections.abc.Mapping[str, pa.RecordBatch], now_us: int
    ) -> pa.RecordBatch:
        """Returns the alarms of harmonised rows, as `ALARM_SCHEMA`.

        Args:
          tables: canonical table name to batch, in order of position; none is changed.
          now_us: by which a time is in the future.
        """
        parts = []
        for name, batch in tables.items():
            if batch.num_rows and name in self._judges:
                parts += self._check_table(name, batch, now_us)
        return pa.concat_batches(parts) if parts else NO_ALARMS

    def _check_table(self, name: str, batch: pa.RecordBatch, now_us: int) -> list[pa.RecordBatch]:
        rows = _Rows(name, batch, self._items)
        found: dict[int, np.ndarray] = {}
        parts = []
        for rule, judge in self._judges[name]:
            for mask, reason, column in judge(rows, now_us):
                if not mask.any():
                    continue
                mask = mask & rows.live
                if rule in found:
                    mask &= ~found[rule]
                    found[rule] |= mask
                else:
                    found[rule] = mask
                if mask.any():
                    parts.append(self._alarms(rule, name, batch, mask, column, reason))
        return parts

    def _alarms(self, rule, table, batch, mask, column, reason) -> pa.RecordBatch:
        at = pa.array(np.flatnonzero(mask))
        columns = [
            pa.repeat(pa.scalar(rule, pa.int16()), len(at)),
            pa.repeat(self._campus, len(at)),
            pa.repeat(table, len(at)),
            batch.column("record_id").take(at),
            batch.column("_lsn").take(at),
            batch.column("_seq").take(at),
            pa.repeat(column, len(at)),
            pa.repeat(reason, len(at)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=q.ALARM_SCHEMA)


class _Rows:
    """One batch of one table while it is judged; what several checks ask for is made once."""

    def __init__(self, table: str, batch: pa.RecordBatch, items: "ItemTable"):
        self.table, self.batch, self._items = ALL_TABLES[table], batch, items
        self.size = batch.num_rows
        self.live = batch.column("_op").to_numpy() != Op.DELETE
        unchanged = batch.column("_unchanged").to_numpy()
        self._unchanged = unchanged if unchanged.any() else None
        self._floats: dict[str, np.ndarray] = {}

    def column(self, name: str) -> pa.Array:
        return self.batch.column(name)

    def known(self, name: str) -> np.ndarray:
        """bool[n]: whatever is there, a value or null, is what the source has."""
        if self._unchanged is None:
            return self.live
        return (self._unchanged >> np.uint64(self.table.index[name]) & np.uint64(1)) == 0

    def missing(self, name: str) -> np.ndarray:
        """bool[n]: null or empty, and known."""
        array = self.column(name)
        empty = np.zeros(self.size, np.bool_)
        if array.null_count:
            empty = array.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_string(array.type):
            empty = empty | (np.diff(text_buffers(array)[0]) == 0)
        return empty & self.known(name) if empty.any() else empty

    def floats(self, name: str) -> np.ndarray:
        """float64[n], NaN for null. Exact for times, in microseconds, to the year 2255."""
        if name not in self._floats:
            self._floats[name] = _floats(self.column(name))
        return self._floats[name]

    @functools.cached_property
    def ids(self) -> CitizenIds:
        return read_citizen_ids(self.column("id_no"))

    @functools.cached_property
    def value(self) -> np.ndarray:
        """float64[n]: laboratory values, NaN for a bound as `<1.0`, which is no value."""
        values, bounds = self.floats("value"), self.column("comparator")
        if bounds.null_count == self.size:
            return values
        return np.where(bounds.is_valid().to_numpy(zero_copy_only=False), np.nan, values)

    @functools.cached_property
    def measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Item, factor and value in the item's unit of every laboratory result."""
        item, factor = self._items.find(self.column("item_code"), self.column("unit"))
        return item, factor, self.value * factor

    @functools.cached_property
    def waits(self) -> np.ndarray | None:
        """bool[n]: what its parent tells is not known yet; None if no row waits."""
        if "remarks" not in self.table.by_name:
            return None
        return awaits(self.column("remarks"))


class ItemTable:
    """Laboratory items and their units as numbers: index of an item, factor of a unit."""

    def __init__(self, items: collections.abc.Mapping[str, q.Item]):
        self.index = {name: i for i, name in enumerate(items)}
        self.none = len(items)  # Stands for any other item.
        pairs = [(code, i) for i, item in enumerate(items.values()) for code in item.codes]
        self._codes = pa.array([code for code, _ in pairs], pa.utf8())
        self._item_of = np.array([i for _, i in pairs] + [self.none])
        spellings = sorted({word for item in items.values() for word in item.factors})
        self._spellings = pa.array(spellings, pa.utf8())
        self._other, self._null = len(spellings), len(spellings) + 1
        self._factors = np.full((self.none + 1, len(spellings) + 2), np.nan)
        for i, item in enumerate(items.values()):
            for word, factor in item.factors.items():
                self._factors[i, spellings.index(word)] = factor
            self._factors[i, self._null] = item.factors.get("", np.nan)

    def find(self, codes: pa.Array, units: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Returns index of item (`none` for others) and factor to its unit, NaN if it has none."""
        place = pc.index_in(codes, value_set=self._codes)
        item = self._item_of[_filled(place, len(self._codes))]
        spelling = _filled(pc.index_in(units, value_set=self._spellings), self._other)
        if units.null_count:
            nulls = units.is_null().to_numpy(zero_copy_only=False)
            spelling = np.where(nulls, self._null, spelling)
        return item, self._factors[item, spelling]

    def marks(self, names: collections.abc.Iterable[str]) -> np.ndarray:
        """bool[items + 1]: whether an item is one of `names`."""
        marks = np.zeros(self.none + 1, np.bool_)
        marks[[self.index[name] for name in names]] = True
        return marks


def _range(check: q.RangeCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        values = rows.floats(check.column)
        yield (values < check.low) | (values > check.high), check.reason, check.column

    return judge


def _item_range(check: q.ItemRangeCheck, table, columns, items: ItemTable) -> _Judge:
    marks = items.marks(check.items)
    low = np.where(marks, check.low, -np.inf)
    high = np.where(marks, check.high, np.inf)

    def judge(rows: _Rows, now_us: int):
        item, _, values = rows.measured
        yield (values < low[item]) | (values > high[item]), check.reason, "value"

    return judge


def _item_unit(check: q.ItemUnitCheck, table, columns, items: ItemTable) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        item, factor, _ = rows.measured
        wrong = np.isnan(factor) & (item != items.none)
        if wrong.any():
            has_unit = rows.column("unit").is_valid().to_numpy(zero_copy_only=False)
            wrong &= has_unit & ~np.isnan(rows.floats("value"))
        yield wrong, check.reason, "unit"

    return judge


def _order(check: q.OrderCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        for i, earlier in enumerate(check.columns):
            for later in check.columns[i + 1 :]:
                first, second = rows.floats(earlier), rows.floats(later)
                wrong = first >= second if check.strict else first > second
                yield wrong, check.reason, later

    return judge


def _future(check: q.FutureCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        latest = now_us + check.minutes * 60e6
        for column in columns:
            yield rows.floats(column) > latest, check.reason, column

    return judge


def _citizen_id(check: q.CitizenIdCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        ids = rows.ids
        if check.test == "form":
            wrong = ids.present & ~ids.formed
        elif check.test == "checksum":
            wrong = ids.checked & ~ids.valid
        elif check.test == "birth":
            birth = pc.fill_null(pc.cast(rows.column("birth_date"), pa.int32()), 0).to_numpy()
            known = rows.column("birth_date").is_valid().to_numpy(zero_copy_only=False)
            wrong = ids.formed & known & (birth != ids.birth_days)
        else:
            sex = rows.column("sex")
            men, women = (pc.fill_null(pc.equal(sex, code), False) for code in "12")
            men, women = (part.to_numpy(zero_copy_only=False) for part in (men, women))
            wrong = ids.formed & ((men & ~ids.male) | (women & ids.male))
        yield wrong, check.reason, "id_no"

    return judge


def _flag(check: q.FlagCheck, table, columns, items) -> _Judge:
    words = pa.array(["N", "L", "LL", "H", "HH"])

    def judge(rows: _Rows, now_us: int):
        value = rows.value
        low, high = rows.floats("reference_low"), rows.floats("reference_high")
        flag = _filled(pc.index_in(rows.column("flag"), value_set=words), -1)
        normal, says_low, says_high = flag == 0, (flag == 1) | (flag == 2), flag >= 3
        # NaN compares as False: without a value or a limit nothing contradicts.
        wrong = normal & ((value < low) | (value > high))
        wrong |= (says_low & (value >= low)) | (says_high & (value <= high))
        yield wrong, check.reason, "flag"

    return judge


def _required(check: q.RequiredCheck, table, columns, items: ItemTable) -> _Judge:
    spared = items.marks(check.unless_items)

    def judge(rows: _Rows, now_us: int):
        for column in columns:
            missing = rows.missing(column)
            if missing.any() and check.when is not None:
                missing &= rows.column(check.when).is_valid().to_numpy(zero_copy_only=False)
            if missing.any() and rows.waits is not None:
                missing &= ~rows.waits
            if missing.any() and check.unless_items:
                missing &= ~spared[rows.measured[0]]
            yield missing, check.reason, column

    return judge


def _any_of(check: q.AnyOfCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        missing = [rows.missing(column) for column in columns]
        yield np.logical_and.reduce(missing), check.reason, columns[0]

    return judge


def _pattern(check: q.PatternCheck, table, columns, items) -> _Judge:
    def judge(rows: _Rows, now_us: int):
        encoded = rows.column(check.column).dictionary_encode()
        texts = encoded.dictionary
        known = np.zeros(len(texts), np.bool_)
        for pattern in check.patterns:
            known |= pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
        known |= np.asarray(pc.binary_length(texts)) == 0  # Missing, which is another check's.
        place = _filled(encoded.indices, len(texts))
        yield ~np.append(known, True)[place], check.reason, check.column

    return judge


def _garbled(check: q.GarbledCheck, table, columns, items) -> _Judge:
    kinds = [kind for kind in Damage if kind is not Damage.QUESTION_MARKS]
    marks = "?" * check.question_marks
    lost = f"{check.reason}_{Damage.QUESTION_MARKS.name.lower()}"

    def judge(rows: _Rows, now_us: int):
        for column in columns:
            texts, places = _distinct(rows.column(column), check.first_characters)
            offsets, data, _ = text_buffers(texts)
            found = damage_of(texts, int(survey(data[offsets[0] : offsets[-1]])))
            if found.any():
                for kind in kinds:
                    mask = (found & kind) != 0
                    yield mask[places], f"{check.reason}_{kind.name.lower()}", column
            lacks = pc.fill_null(pc.match_substring(texts, marks), False)
            if lacks.true_count:
                yield lacks.to_numpy(zero_copy_only=False)[places], lost, column

    return judge


def _distinct(texts: pa.Array, first_characters: int) -> tuple[pa.Array, np.ndarray | slice]:
    """Returns the beginnings of texts, of short ones each but once, and which row has which."""
    lengths = np.diff(text_buffers(texts)[0])
    if lengths.size and lengths.max() > 4 * first_characters:
        return pc.utf8_slice_codeunits(texts, 0, first_characters), slice(None)
    encoded = texts.dictionary_encode()
    if not encoded.indices.null_count:
        return encoded.dictionary, encoded.indices.to_numpy()
    with_null = pa.concat_arrays([encoded.dictionary, pa.nulls(1, pa.utf8())])
    return with_null, _filled(encoded.indices, len(encoded.dictionary))


def _remark(check: q.RemarkCheck, table, columns, items) -> _Judge:
    words = "|".join(map(re.escape, check.words))
    pattern = rf"(?:^|\n)(?:{words}) (?P<column>[a-z0-9_]+): "

    def judge(rows: _Rows, now_us: int):
        remarks = rows.column("remarks")
        if remarks.null_count == rows.size:
            return
        named = pc.struct_field(pc.extract_regex(remarks, pattern), "column").dictionary_encode()
        place = _filled(named.indices, -1)
        for i, column in enumerate(named.dictionary.to_pylist()):
            yield place == i, check.reason, column

    return judge


def _specimen(check: q.SpecimenCheck, table, columns, items: ItemTable) -> _Judge:
    names = q.items_of(check)
    marks = items.marks(names)
    places = np.zeros(items.none + 1, np.int64)
    places[[items.index[name] for name in names]] = np.arange(len(names))

    def judge(rows: _Rows, now_us: int):
        item, _, values = rows.measured
        at = np.flatnonzero(marks[item] & ~np.isnan(values) & rows.live)
        if at.size:
            taken = rows.floats("collected_at")[at]
            at = at[~np.isnan(taken)]
        if at.size < len(names):
            return
        patients = rows.column("patient_id").take(pa.array(at)).dictionary_encode()
        patient = _filled(patients.indices, -1)
        grid, last = _by_specimen(
            patient, rows.floats("collected_at")[at], places[item[at]], values[at], len(names)
        )
        whole = ~np.isnan(grid).any(axis=1)
        wrong = np.zeros(rows.size, np.bool_)
        wrong[at[last[whole & is_odd(check, grid)]]] = True
        yield wrong, check.reason, "value"

    return judge


def _by_specimen(
    patient: np.ndarray, taken: np.ndarray, place: np.ndarray, values: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the newest value of each item by specimen, and each specimen's newest row.

    Rows come in order of position. `place` is the item's place, 0 .. size - 1; a specimen is a
    patient (-1: nobody's, left out) and a time. Returns float64[specimens, size], NaN where an
    item is not there, and int64[specimens].
    """
    order = np.lexsort((np.arange(len(patient)), taken, patient))
    order = order[patient[order] >= 0]
    p, t = patient[order], taken[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (p[1:] != p[:-1]) | (t[1:] != t[:-1])
    number = np.cumsum(new) - 1
    count = int(number[-1]) + 1 if len(number) else 0
    grid = np.full((count, size), np.nan)
    last = np.zeros(count, np.int64)
    grid[number, place[order]] = values[order]  # Of equal places the last stays: the newest.
    last[number] = order
    return grid, last


def is_odd(check: q.SpecimenCheck, grid: np.ndarray) -> np.ndarray:
    """Returns bool[n] for float64[n, items], the items in the order of `items_of(check)`."""
    if isinstance(check, q.ItemSumCheck):
        total = grid.sum(axis=1)
        return (total < check.low - TOLERANCE) | (total > check.high + TOLERANCE)
    first, second = grid[:, 0], grid[:, 1]
    if isinstance(check, q.ItemAtMostCheck):
        return first > second * (1 + TOLERANCE)
    expected = second * check.factor
    return np.abs(first - expected) > expected * (check.tolerance + TOLERANCE)


_JUDGES = {
    "range": _range,
    "item_range": _item_range,
    "item_unit": _item_unit,
    "order": _order,
    "future": _future,
    "citizen_id": _citizen_id,
    "flag": _flag,
    "required": _required,
    "any_of": _any_of,
    "pattern": _pattern,
    "garbled": _garbled,
    "remark": _remark,
    "item_sum": _specimen,
    "item_at_most": _specimen,
    "item_ratio": _specimen,
}


def _filled(indices: pa.Array, other: int) -> np.ndarray:
    """Indices as int64[n], `other` for a null."""
    if indices.null_count:
        indices = pc.fill_null(indices, pa.scalar(other, indices.type))
    return indices.to_numpy(zero_copy_only=False)


def _floats(values: pa.Array) -> np.ndarray:
    if pa.types.is_string(values.type):
        if values.null_count == len(values):
            return np.full(len(values), np.nan)
        try:
            values = pc.cast(values, pa.float64())
        except pa.ArrowInvalid:
            numeric = pc.fill_null(pc.match_substring_regex(values, _DECIMAL), False)
            values = pc.if_else(numeric, values, pa.scalar(None, pa.utf8()))
            values = pc.cast(values, pa.float64())
    elif not pa.types.is_integer(values.type):
        values = pc.cast(values, pa.int32() if pa.types.is_date32(values.type) else pa.int64())
    return pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
