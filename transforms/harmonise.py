"""Harmonise decoded changes: a campus's tables and codes become the canonical ones.

Law: rows in = rows out + rejects. A bad value refuses its own row only, with a reason and the
source column: `unknown_table`, `missing_column`, `missing_key`, `bad_int`, `bad_decimal`,
`bad_bool`, `bad_date`, `bad_time`, `nul_byte`, `oversized`, and `partial_row`: some inputs of a
rule are unchanged and some are not, so that its output cannot be known. Implausible values pass:
the store's CHECKs refuse those.
"""

import collections
import dataclasses
import functools
import re
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op, RawChanges, Reject
from schemas.mappings import (
    CampusMapping,
    CodeList,
    ColumnRule,
    Measurement,
    Source,
    UnitRule,
)
from schemas.positions import Position
from schemas.tables import ARROW_TYPES, Kind, Table
from transforms import parse_text
from transforms.join_batches import concat_rows

_META = ("_op", "_lsn", "_seq", "_commit_us", "_unchanged")
_OLD = "_old."
_KEY_SEPARATOR = "|"
_COMPARED = re.compile(r"\s*([<>≤≥]=?|=)\s*(\d+(?:\.\d+)?)\s*")
_ICD10 = r"^([A-Z][0-9][0-9A-Z])(.+)$"


class Note(typing.NamedTuple):
    """What passed and should be seen: `unknown_code`, `unknown_column`, `unknown_unit`."""

    src_table: str
    column: str
    what: str


@dataclasses.dataclass(frozen=True)
class Harmonised:
    """Canonical changes.

    Attributes:
      tables: canonical table to its changes (`Table.arrow_schema`, `_digest` null), in order of
        position; only tables with rows.
      rejects: refused rows, in order of position. A column that is absent from `Reject.row` was
        unchanged.
      notes: rows counted by what is worth knowing about them; never their content.
    """

    tables: dict[str, pa.RecordBatch]
    rejects: list[Reject]
    notes: dict[Note, int] = dataclasses.field(default_factory=dict)


class Harmoniser:
    """Applies one campus's mapping; made once, used for every batch, by any thread."""

    def __init__(self, mapping: CampusMapping):
        names = sorted(mapping.tables)
        self._dictionary = pa.array(names, pa.utf8())
        self._plans = {
            name: _Plan(mapping, name, source, names.index(name), self._dictionary)
            for name, source in mapping.tables.items()
        }

    def apply(self, raw: RawChanges) -> Harmonised:
        """Returns the canonical form of `raw.tables`; loses no row, changes no order."""
        rejects: list[Reject] = []
        notes: collections.Counter[Note] = collections.Counter()
        parts = collections.defaultdict(list)
        for name, batch in raw.tables.items():
            plan = self._plans.get(name)
            if plan is None:
                every = np.arange(batch.num_rows)
                rejects += _rejects(name, batch, every, [("unknown_table", "")] * len(every))
                continue
            part = plan.apply(batch, rejects, notes)
            if part is not None and part.num_rows:
                parts[plan.table.name].append(part)
        rejects.sort(key=lambda reject: reject.position)
        return Harmonised({name: _in_order(some) for name, some in parts.items()}, rejects, notes)


class _Rows:
    """The rows of one source table while they are worked on."""

    def __init__(self, name: str, batch: pa.RecordBatch, notes: collections.Counter):
        self.name = name
        self.batch = batch
        self.notes = notes
        self.size = batch.num_rows
        self.columns = _source_columns(batch)
        self.ops = batch.column("_op").to_numpy()
        bits = batch.column("_unchanged").to_numpy()
        self._bits = bits if bits.any() else None
        self._cleaned: dict[str, pa.Array] = {}
        self._broken: np.ndarray | None = None
        self.deletes: np.ndarray | None = None
        self.refused: dict[int, tuple[str, str]] = {}

    def __getitem__(self, column: str) -> pa.Array:
        return self._cleaned[column] if column in self._cleaned else self.batch.column(column)

    @property
    def all_sent(self) -> bool:
        """Whether no source column of any row is unchanged."""
        return self._bits is None

    def clean(self, column: str, mask: np.ndarray) -> None:
        """Makes a source column null in `mask`: texts that no later step may meet."""
        self._cleaned[column] = _null_where(self[column], mask)

    def unchanged(self, column: str | None) -> np.ndarray | None:
        """bool[n] of the rows in which a source column is unchanged, or None if in none."""
        if self._bits is None or column is None:
            return None
        mask = (self._bits >> np.uint64(self.columns.index(column))) & np.uint64(1)
        return mask.astype(np.bool_) if mask.any() else None

    def refuse(self, mask: np.ndarray, reason: str, column: str, key: bool = False) -> None:
        """Refuses the rows in `mask`; a row's first refusal stands.

        A delete needs its key only: it is refused for that, not for the content it takes away.
        """
        if not mask.any():
            return
        if not key and self.deletes is not None:
            spared = mask & self.deletes
            self._broken = spared if self._broken is None else self._broken | spared
            mask = mask & ~self.deletes
        for row in np.flatnonzero(mask).tolist():
            self.refused.setdefault(row, (reason, column))

    def key_only(self, keys: tuple[str, ...]) -> np.ndarray | None:
        """bool[n] of the deletes that bring no content, or none that can be read."""
        if self.deletes is None:
            return None
        places = pa.array(np.flatnonzero(self.deletes))
        whole = np.zeros(len(places), np.bool_)
        for column in self.columns:
            if column not in keys:
                whole |= self[column].take(places).is_valid().to_numpy(zero_copy_only=False)
        mask = self.deletes.copy()
        mask[self.deletes] = ~whole
        return mask if self._broken is None else mask | self._broken

    def note(self, column: str, what: str, count: int) -> None:
        if count:
            self.notes[Note(self.name, column, what)] += int(count)


class _Outputs:
    """Canonical columns as they are made, with the rows in which each is unchanged."""

    def __init__(self, size: int):
        self._size = size
        self.arrays: dict[str, pa.Array] = {}
        self.unchanged: dict[str, np.ndarray] = {}

    def put(self, column: str, array: pa.Array, unchanged: np.ndarray | None) -> None:
        if unchanged is not None:
            array = _null_where(array, unchanged)
            self.unchanged[column] = unchanged
        self.arrays[column] = array

    def keep_only(self, rows: np.ndarray, columns: frozenset[str]) -> None:
        """Makes all columns but `columns` unchanged in the rows `rows` (bool[n])."""
        for column, array in self.arrays.items():
            if column not in columns:
                before = self.unchanged.get(column)
                self.put(column, array, rows if before is None else rows | before)

    def bits(self, table: Table) -> pa.Array | None:
        """The `_unchanged` masks, or None if nothing is unchanged."""
        if not self.unchanged:
            return None
        bits = np.zeros(self._size, np.uint64)
        for column, mask in self.unchanged.items():
            bits |= mask.astype(np.uint64) << np.uint64(table.index[column])
        return pa.array(bits)


class _Plan:
    """What is done to one source table."""

    def __init__(self, mapping, name: str, source: Source, index: int, dictionary: pa.Array):
        self.table = source.canonical
        self._name = name
        self._source = source
        self._mapping = mapping
        self._index, self._dictionary = index, dictionary
        measurement = source.measurement
        self._measure = _Measure(mapping, measurement) if measurement else None
        self._texts = _text_inputs(source)
        # What the key alone tells: a delete may bring no more.
        self._from_key = frozenset(
            column
            for column, rule in source.columns.items()
            if rule.source and set(rule.source) <= set(source.id)
        )

    def apply(self, batch, rejects: list, notes: collections.Counter) -> pa.RecordBatch | None:
        rows = _Rows(self._name, batch, notes)
        source = self._source
        missing = [column for column in source.needed if column not in rows.columns]
        if missing:
            every = np.arange(rows.size)
            refusals = [("missing_column", missing[0])] * rows.size
            rejects += _rejects(self._name, batch, every, refusals)
            return None
        for column in rows.columns:
            if column not in source.needed and column not in source.ignore:
                rows.note(column, "unknown_column", rows.size)
        ops = self._ops(rows)
        deletes = ops == Op.DELETE
        rows.deletes = deletes if deletes.any() else None
        unsure = rows.unchanged(source.deleted_when.column) if source.deleted_when else None
        if unsure is not None:
            rows.refuse(unsure, "partial_row", source.deleted_when.column)
        for column in self._texts:
            key = column in source.id
            _check_text(rows, column, self._mapping.max_text_bytes, key)
        out = _Outputs(rows.size)
        for column, rule in source.columns.items():
            self._apply_rule(rows, out, column, rule)
        if self._measure is not None:
            self._measure.apply(rows, out)
        for column in source.absent:
            kind = ARROW_TYPES[self.table.by_name[column].kind]
            out.put(column, pa.nulls(rows.size, kind), None)
        record_id = self._record_id(rows)
        key_only = rows.key_only(source.id)
        if key_only is not None and key_only.any():
            out.keep_only(key_only, self._from_key)
        return self._assemble(rows, out, ops, record_id, rejects)

    def _apply_rule(self, rows: _Rows, out: _Outputs, column: str, rule: ColumnRule) -> None:
        kind = self.table.by_name[column].kind
        if rule.constant is not None:
            text, unchanged = pa.repeat(rule.constant, rows.size), None
        else:
            text, unchanged = _combine(rows, rule)
        where = rule.source[0] if rule.source else column
        if rule.nulls:
            listed = pc.is_in(text, value_set=pa.array(rule.nulls, pa.utf8()))
            text = pc.if_else(listed, pa.scalar(None, pa.utf8()), text)
        if rule.text is not None:
            text = _by_value(text, functools.partial(_normal_text, rule.text))
        if rule.codes is not None:
            text = _recode(rows, text, self._mapping.code_lists[rule.codes], where)
        zone = parse_text.parse_zone(rule.zone or self._mapping.zone)
        array, bad = _parse(text, kind, rule.formats, zone)
        if bad is not None:
            rows.refuse(bad, f"bad_{kind}", where)
        out.put(column, array, unchanged)

    def _record_id(self, rows: _Rows) -> pa.Array:
        parts = [rows[column] for column in self._source.id]
        for column, part in zip(self._source.id, parts, strict=True):
            unchanged = rows.unchanged(column)
            if part.null_count:
                rows.refuse(_nulls(part), "missing_key", column, key=True)
            if unchanged is not None:
                rows.refuse(unchanged, "missing_key", column, key=True)
        return _joined(parts, _KEY_SEPARATOR)

    def _prev_id(self, rows: _Rows) -> pa.Array:
        """The old record id where the key changed; an old part that is null did not change."""
        names = [_OLD + column for column in self._source.id]
        here = [name for name in names if name in rows.batch.schema.names]
        if all(rows[name].null_count == rows.size for name in here):
            return pa.nulls(rows.size, pa.utf8())
        changed = functools.reduce(pc.or_, (rows[name].is_valid() for name in here))
        parts = [
            pc.coalesce(rows[old], rows[new]) if old in here else rows[new]
            for old, new in zip(names, self._source.id, strict=True)
        ]
        return pc.if_else(changed, _joined(parts, _KEY_SEPARATOR), pa.scalar(None, pa.utf8()))

    def _ops(self, rows: _Rows) -> np.ndarray:
        """The operations, soft deletes among them."""
        flag = self._source.deleted_when
        if flag is None:
            return rows.ops
        gone = pc.is_in(rows[flag.column], value_set=pa.array(flag.values, pa.utf8()))
        return np.where(gone.to_numpy(zero_copy_only=False), np.uint8(Op.DELETE), rows.ops)

    def _assemble(self, rows, out: _Outputs, ops, record_id, rejects: list) -> pa.RecordBatch:
        bits = out.bits(self.table)
        if bits is None:
            zeros = np.zeros(rows.size, np.uint64)
            bits = rows["_unchanged"] if rows.all_sent else pa.array(zeros)
        places = pa.array(np.full(rows.size, self._index, np.int32))
        meta = {
            "_op": rows["_op"] if ops is rows.ops else pa.array(ops),
            "_lsn": rows["_lsn"],
            "_seq": rows["_seq"],
            "_commit_us": rows["_commit_us"],
            "_src_table": pa.DictionaryArray.from_arrays(places, self._dictionary),
            "_unchanged": bits,
            "_prev_id": self._prev_id(rows),
            "_digest": pa.nulls(rows.size, pa.binary(32)),
            "record_id": record_id,
        }
        schema = self.table.arrow_schema
        arrays = [meta[n] if n in meta else out.arrays[n] for n in schema.names]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        if not rows.refused:
            return batch
        refused = np.array(sorted(rows.refused))
        refusals = [rows.refused[row] for row in refused.tolist()]
        rejects += _rejects(self._name, rows.batch, refused, refusals)
        keep = np.ones(rows.size, np.bool_)
        keep[refused] = False
        return batch.filter(pa.array(keep))


class _Measure:
    """The rule of a laboratory value: number or text, its unit, its item, its reference limits."""

    def __init__(self, mapping: CampusMapping, rule: Measurement):
        self._rule = rule
        self._units = mapping.units[rule.units]
        self._items = mapping.code_lists[rule.items] if rule.items else None
        rules = self._units.rules
        scaled = [rule.scaled for rule in rules] + [(1, 0)]  # The last is for rows of no rule.
        self._mantissas, self._scales = np.array(scaled, np.int64).T.copy()
        self._targets = pa.array([rule.target for rule in rules], pa.utf8())
        self._to_units = pa.array([rule.to_unit for rule in rules], pa.utf8())

    def apply(self, rows: _Rows, out: _Outputs) -> None:
        rule = self._rule
        core = self._core_unchanged(rows)
        value, text, raw = self._results(rows)
        late = rows.unchanged(rule.text or rule.result)
        item = rows[rule.item]
        if self._items is not None:
            item = _recode(rows, item, self._items, rule.item)
        unit = _by_value(rows[rule.unit], self._respelt)
        low, high = (self._limit(rows, column) for column in (rule.low, rule.high))
        places = self._rules_of(rows, item, unit)
        if places is not None:
            text, places = self._convert_texts(value, text, places, late)
            chosen = pa.array(places >= 0)
            at = pa.array(np.maximum(places, 0))
            mantissas, scales = self._mantissas[places], self._scales[places]
            value, low, high = (
                parse_text.scale_decimal(array, mantissas, scales) for array in (value, low, high)
            )
            item = pc.if_else(chosen, self._targets.take(at), item)
            unit = pc.if_else(chosen, self._to_units.take(at), unit)
        core_or_late = _either(core, late)
        out.put("item_code", item, core)
        out.put("value", value, core_or_late if rule.result else core)
        out.put("value_text", text, core_or_late)
        out.put("unit", unit, core)
        if late is not None:  # A number that is there is the raw value, whatever the text was.
            late = late & _nulls(value)
        out.put("raw_value", raw, _either(core, late))
        out.put("raw_unit", rows[rule.unit], core)
        out.put("reference_low", low, core)
        out.put("reference_high", high, core)

    def _core_unchanged(self, rows: _Rows) -> np.ndarray | None:
        """Where all inputs are unchanged. Where only some are, the outputs cannot be known."""
        rule = self._rule
        if rows.all_sent:
            return None
        names = [rule.item, rule.number, rule.unit, rule.low, rule.high]
        core = _all_or_refused(rows, [name for name in names if name is not None])
        late = rows.unchanged(rule.text or rule.result)
        if core is not None and (rule.text or rule.result):
            alone = core if late is None else core & ~late
            rows.refuse(alone, "partial_row", rule.item)
        return core

    def _results(self, rows: _Rows) -> tuple[pa.Array, pa.Array, pa.Array]:
        """Returns `(value, value_text, raw_value)` before any conversion."""
        rule, none = self._rule, pa.nulls(rows.size, pa.utf8())
        if rule.result:
            raw = rows[rule.result]
            trimmed = _by_value(raw, self._trimmed)
            value, bad = parse_text.parse_decimal(trimmed)
            return value, pc.if_else(pa.array(bad), raw, none), raw
        text = rows[rule.text] if rule.text else none
        if not rule.number:
            return none, text, text
        number = rows[rule.number]
        value, bad = parse_text.parse_decimal(number)
        rows.refuse(bad, "bad_decimal", rule.number)
        if not number.null_count or text.null_count == rows.size:
            return value, text, number
        return value, text, pc.coalesce(number, text)

    def _limit(self, rows: _Rows, column: str | None) -> pa.Array:
        if column is None:
            return pa.nulls(rows.size, pa.utf8())
        limit, bad = parse_text.parse_decimal(rows[column])
        rows.refuse(bad, "bad_decimal", column)
        return limit

    def _trimmed(self, texts: pa.Array) -> pa.Array:
        return pc.utf8_trim(texts, characters=" " + (self._rule.trim or ""))

    def _respelt(self, names: pa.Array) -> pa.Array:
        spellings = self._units.spellings
        return pa.array([spellings.get(name, name) for name in names.to_pylist()], pa.utf8())

    def _rules_of(self, rows: _Rows, item: pa.Array, unit: pa.Array) -> np.ndarray | None:
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
        pair = _codes(items), _codes(units)
        if any_odd:
            rows.note(self._rule.unit, "unknown_unit", odd[pair].sum())
        places = rule_of[pair] if any_rule else None
        return places if places is not None and (places >= 0).any() else None

    def _convert_texts(self, value, text, places: np.ndarray, late) -> tuple[pa.Array, np.ndarray]:
        """Converts `<1.0` and the like; a row whose result is other text keeps its unit.

        Returns the texts and the rules that then apply. A text beside a number is a remark:
        it stays, and the number is converted.
        """
        no_number = _nulls(value)
        places = places.copy()
        if late is not None:
            places[late & no_number] = -1
        at = np.flatnonzero((places >= 0) & ~_nulls(text))
        if not len(at):
            return text, places
        replaced = []
        for row, written in zip(at.tolist(), text.take(pa.array(at)).to_pylist(), strict=True):
            match = _COMPARED.fullmatch(written)
            if match:
                rule = self._units.rules[places[row]]
                written = match[1] + _scaled(match[2], rule)
            elif no_number[row]:
                places[row] = -1
            replaced.append(written)
        mask = np.zeros(len(text), np.bool_)
        mask[at] = True
        return pc.replace_with_mask(text, pa.array(mask), pa.array(replaced, pa.utf8())), places


def _scaled(number: str, rule: UnitRule) -> str:
    """`number` in the rule's target unit, exactly and canonically."""
    mantissa, scale = rule.scaled
    canonical, _ = parse_text.parse_decimal(pa.array([number], pa.utf8()))
    factors = np.array([mantissa], np.int64), np.array([scale], np.int64)
    return parse_text.scale_decimal(canonical, *factors)[0].as_py()


def _source_columns(batch: pa.RecordBatch) -> list[str]:
    """The source's columns in its order: bit i of `_unchanged` is the i-th of these."""
    names = (name for name in batch.schema.names if not name.startswith(_OLD))
    return [name for name in names if name not in _META]


def _text_inputs(source: Source) -> tuple[str, ...]:
    """Source columns whose text is carried as it is; the parsers judge the others."""
    names = list(source.id)
    for column, rule in source.columns.items():
        if source.canonical.by_name[column].kind is Kind.TEXT:
            names += rule.source
    if rule := source.measurement:
        names += [name for name in (rule.item, rule.text, rule.result, rule.unit) if name]
    return tuple(dict.fromkeys(names))


def _check_text(rows: _Rows, column: str, limit: int, key: bool) -> None:
    """Refuses texts that no consult store can hold: with NUL, or too long."""
    array = rows[column]
    offsets, data, _ = parse_text.text_buffers(array)
    used = data[offsets[0] : offsets[-1]]
    bad = []
    if parse_text.has_nul(used):
        holders = np.searchsorted(offsets, offsets[0] + np.flatnonzero(used == 0), "right") - 1
        bad.append(("nul_byte", _mask(rows.size, holders)))
    if len(used) > limit:
        bad.append(("oversized", np.diff(offsets) > limit))
    for reason, mask in bad:
        rows.refuse(mask, reason, column, key)
        rows.clean(column, mask)


def _combine(rows: _Rows, rule: ColumnRule) -> tuple[pa.Array, np.ndarray | None]:
    """The text of a rule's source columns, and where it is unchanged."""
    parts = [rows[column] for column in rule.source]
    if len(parts) == 1:
        return parts[0], rows.unchanged(rule.source[0])
    unchanged = _all_or_refused(rows, rule.source)
    if rule.join is None:
        return pc.coalesce(*parts), unchanged
    return _joined(parts, rule.join), unchanged


def _all_or_refused(rows: _Rows, columns: typing.Sequence[str]) -> np.ndarray | None:
    """Where all `columns` are unchanged; refuses the rows in which only some are."""
    masks = [rows.unchanged(column) for column in columns]
    some = functools.reduce(_either, masks)
    if some is None:
        return None
    none = np.zeros(rows.size, np.bool_)
    all_of = functools.reduce(np.logical_and, (none if m is None else m for m in masks))
    rows.refuse(some & ~all_of, "partial_row", columns[0])
    return some


def _either(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _parse(text: pa.Array, kind: Kind, formats: tuple[str, ...], zone: int):
    """Returns `(array, bad)` of a canonical kind; bad is None where nothing can be."""
    if kind is Kind.INT:
        return parse_text.parse_int(text)
    if kind is Kind.DECIMAL:
        return parse_text.parse_decimal(text)
    if kind is Kind.BOOL:
        return parse_text.parse_bool(text)
    if kind is Kind.DATE:
        return parse_text.parse_date(text, formats)
    if kind is Kind.TIME:
        return parse_text.parse_time(text, formats, zone)
    return text, None


def _by_value(text: pa.Array, rule: typing.Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Applies `rule` to the distinct texts only; returns `text` itself if it changes none."""
    encoded = text.dictionary_encode()
    values = rule(encoded.dictionary)
    return text if values.equals(encoded.dictionary) else values.take(encoded.indices)


def _recode(rows: _Rows, text: pa.Array, codes: CodeList, column: str) -> pa.Array:
    """Campus codes to canonical ones; counts the rows whose code is not listed."""
    encoded = text.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    unknown = np.array([name not in codes.codes for name in names] + [False])
    if unknown.any():
        rows.note(column, "unknown_code", unknown[_codes(encoded)].sum())
    keep = codes.unknown == "keep"
    values = [codes.codes.get(name, name if keep else None) for name in names]
    return text if values == names else pa.array(values, pa.utf8()).take(encoded.indices)


def _normal_text(form: str, texts: pa.Array) -> pa.Array:
    if form == "lower":
        return pc.utf8_lower(texts)
    if form == "upper":
        return pc.utf8_upper(texts)
    texts = pc.utf8_trim_whitespace(texts)
    if form == "icd10":
        texts = pc.replace_substring(pc.utf8_upper(texts), ".", "")
        texts = pc.replace_substring_regex(texts, _ICD10, r"\1.\2")
    return texts


def _codes(encoded: pa.DictionaryArray) -> np.ndarray:
    """Places in the dictionary; null is one beyond the last."""
    return encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()


def _joined(parts: list[pa.Array], separator: str) -> pa.Array:
    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, separator)


def _nulls(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def _null_where(array: pa.Array, mask: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _mask(size: int, rows: typing.Sequence[int] | np.ndarray) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[rows] = True
    return mask


def _in_order(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Changes of several source tables as one batch, by position."""
    if len(parts) == 1:
        return parts[0]
    batch = concat_rows(parts)
    keys = batch.column("_seq").to_numpy(), batch.column("_lsn").to_numpy()
    return batch.take(pa.array(np.lexsort(keys)))


def _rejects(
    name: str, batch: pa.RecordBatch, places: np.ndarray, refusals: list[tuple[str, str]]
) -> list[Reject]:
    """The rows at `places` with their reasons and columns. Rejects are few: this is per row."""
    if not len(places):
        return []
    part = batch.take(pa.array(places, pa.int64()))
    columns = _source_columns(batch)
    texts = {
        column: part.column(column).to_pylist()
        for column in (*columns, *(n for n in batch.schema.names if n.startswith(_OLD)))
    }
    meta = {column: part.column(column).to_pylist() for column in _META}
    rejects = []
    for i, (reason, column) in enumerate(refusals):
        bits = meta["_unchanged"][i]
        unchanged = {c for k, c in enumerate(columns) if bits >> k & 1}
        rejects.append(
            Reject(
                src_table=name,
                position=Position(meta["_lsn"][i], meta["_seq"][i]),
                op=meta["_op"][i],
                commit_us=meta["_commit_us"][i],
                reason=reason,
                column=column,
                row={c: value[i] for c, value in texts.items() if c not in unchanged},
            )
        )
    return rejects
