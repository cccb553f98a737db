"""What is done to one source table."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.entities import OWN_COLUMNS
from schemas.mappings import CampusMapping, ColumnRule, Source
from schemas.tables import ARROW_TYPES, Kind
from transforms import parse_text
from transforms.harmonise.columns import OLD, by_value, either, joined, nulls
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.measure import Measure
from transforms.harmonise.reissue import AWAITING
from transforms.harmonise.rejects import rejects_of
from transforms.harmonise.rows import Outputs, Rows, Tally, all_or_refused, check_text
from transforms.harmonise.values import combine, normal_text, parse, recode

_KEY_SEPARATOR = "|"


class Plan:
    """What is done to one source table."""

    def __init__(self, mapping: CampusMapping, name: str, index: int, dictionary: pa.Array):
        source = mapping.tables[name]
        self.table = source.canonical
        self._name = name
        self._source = source
        self._mapping = mapping
        self._index, self._dictionary = index, dictionary
        measurement = source.measurement
        self._measure = Measure(mapping, measurement) if measurement else None
        self._texts = text_inputs(source)
        self._words = words_inputs(source)
        self._marking = marking_inputs(mapping, source)
        self._own = [column for column in OWN_COLUMNS if column in self.table.by_name]
        self._parent_prefix = ""
        if source.parent is not None:
            self._parent_prefix = mapping.tables[source.parent.table].id_prefix
        # What the key alone tells: a delete may bring no more.
        self._from_key = frozenset(
            column
            for column, rule in source.columns.items()
            if _inputs(rule, source) and set(_inputs(rule, source)) <= set(source.id)
        )

    def apply(
        self, batch, rejects: list, tally: Tally, lookups: Lookups | None
    ) -> pa.RecordBatch | None:
        """Returns the canonical rows of a source table, None if a column is missing."""
        rows = Rows(self._name, batch, tally)
        source = self._source
        missing = [column for column in source.needed if column not in rows.columns]
        if missing:
            every = np.arange(rows.size)
            refusals = [("missing_column", missing[0])] * rows.size
            rejects += rejects_of(self._name, batch, every, refusals)
            return None
        for column in rows.columns:
            if column not in source.needed and column not in source.ignore:
                rows.note(column, "unknown_column", rows.size)
        ops = self._ops(rows)
        deletes = ops == Op.DELETE
        rows.deletes = deletes if deletes.any() else None
        for flag in source.deleted_when:
            if (unsure := rows.unchanged(flag.column)) is not None:
                rows.refuse(unsure, "partial_row", flag.column)
        for column in self._texts:
            key, words = column in source.id, column in self._words
            check_text(rows, column, self._mapping.max_text_bytes, key, words)
        out = Outputs(rows.size)
        for column, rule in source.columns.items():
            if rule.parent is None:
                self._apply_rule(rows, out, column, rule)
        if self._measure is not None:
            self._measure.apply(rows, out)
        for column in source.absent:
            kind = ARROW_TYPES[self.table.by_name[column].kind]
            out.put(column, pa.nulls(rows.size, kind), None)
        for column in self._own:
            out.put(column, pa.nulls(rows.size, pa.utf8()), None)
        record_id = self._record_id(rows)
        if source.parent is not None:
            self._take_from_parent(rows, out, lookups)
        if rows.remarked:
            out.put("remarks", rows.remarks(self.table), None)
        if not rows.all_sent:
            untold = functools.reduce(either, map(rows.unchanged, self._marking), None)
            out.put("remarks", out.arrays["remarks"], untold)
        key_only = rows.key_only(source.id)
        if key_only is not None and key_only.any():
            out.keep_only(key_only, self._from_key)
        return self._assemble(rows, out, ops, record_id, rejects)

    def _apply_rule(self, rows: Rows, out: Outputs, column: str, rule: ColumnRule) -> None:
        kind = self.table.by_name[column].kind
        if rule.constant is not None:
            text, unchanged = pa.repeat(rule.constant, rows.size), None
        else:
            text, unchanged = combine(rows, rule)
        where = rule.source[0] if rule.source else column
        if rule.nulls:
            listed = pc.is_in(text, value_set=pa.array(rule.nulls, pa.utf8()))
            text = pc.if_else(listed, pa.scalar(None, pa.utf8()), text)
        if rule.text is not None:
            text = by_value(text, functools.partial(normal_text, rule.text))
        if rule.codes is not None:
            codes = rule.codes, self._mapping.code_lists[rule.codes]
            text = recode(rows, text, codes, where, column)
        zone = parse_text.parse_zone(rule.zone or self._mapping.zone)
        array, bad = parse(text, kind, rule.formats, zone)
        if bad is not None:
            noted = (rule.invalid or self._mapping.invalid) == "note"
            rows.invalid(noted, bad, f"bad_{kind}", where, column, text)
        out.put(column, array, unchanged)

    def _take_from_parent(self, rows: Rows, out: Outputs, lookups: Lookups) -> None:
        """Fills what the parent's row tells; without a parent it is null and remarked on."""
        parent = self._source.parent
        unchanged = all_or_refused(rows, parent.by)
        keys = _prefixed(self._parent_prefix, joined([rows[c] for c in parent.by], _KEY_SEPARATOR))
        lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
        taken, waits, mark = lookups.resolve(self._name, keys, lsn, seq)
        refs = by_value(keys, lambda ids: _prefixed(f"{parent.table} ", ids))
        for column, array in taken.items():
            out.put(column, array, unchanged)
        out.put("parent_ref", refs, unchanged)
        for spared in (unchanged, rows.deletes):
            if spared is not None:
                waits &= ~spared
        if waits.any():
            rows.remark(parent.by[0], mark, AWAITING, waits, refs)

    def _record_id(self, rows: Rows) -> pa.Array:
        parts = [rows[column] for column in self._source.id]
        for column, part in zip(self._source.id, parts, strict=True):
            unchanged = rows.unchanged(column)
            if part.null_count:
                rows.refuse(nulls(part), "missing_key", column, key=True)
            if unchanged is not None:
                rows.refuse(unchanged, "missing_key", column, key=True)
        return _prefixed(self._source.id_prefix, joined(parts, _KEY_SEPARATOR))

    def _prev_id(self, rows: Rows) -> pa.Array:
        """The old record id where the key changed; an old part that is null did not change."""
        names = [OLD + column for column in self._source.id]
        here = [name for name in names if name in rows.batch.schema.names]
        if all(rows[name].null_count == rows.size for name in here):
            return pa.nulls(rows.size, pa.utf8())
        changed = functools.reduce(pc.or_, (rows[name].is_valid() for name in here))
        parts = [
            pc.coalesce(rows[old], rows[new]) if old in here else rows[new]
            for old, new in zip(names, self._source.id, strict=True)
        ]
        ids = _prefixed(self._source.id_prefix, joined(parts, _KEY_SEPARATOR))
        return pc.if_else(changed, ids, pa.scalar(None, pa.utf8()))

    def _ops(self, rows: Rows) -> np.ndarray:
        """The operations, soft deletes among them."""
        ops = rows.ops
        for flag in self._source.deleted_when:
            gone = pc.is_in(rows[flag.column], value_set=pa.array(flag.values, pa.utf8()))
            gone = gone.to_numpy(zero_copy_only=False)
            ops = np.where(gone, np.uint8(Op.DELETE), ops)
        return ops

    def _assemble(self, rows, out: Outputs, ops, record_id, rejects: list) -> pa.RecordBatch:
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
        rejects += rejects_of(self._name, rows.batch, refused, refusals)
        keep = np.ones(rows.size, np.bool_)
        keep[refused] = False
        return batch.filter(pa.array(keep))


def text_inputs(source: Source) -> tuple[str, ...]:
    """Source columns whose text is carried as it is; the parsers judge the others."""
    names = list(source.id)
    for column, rule in source.columns.items():
        if source.canonical.by_name[column].kind is Kind.TEXT:
            names += rule.source
    if rule := source.measurement:
        names += [name for name in (rule.item, rule.text, rule.result, rule.unit) if name]
    return tuple(dict.fromkeys(names))


def words_inputs(source: Source) -> frozenset[str]:
    """Source columns with words for people, which may be damaged; a code is known or not."""
    names = set()
    for column, rule in source.columns.items():
        if source.canonical.by_name[column].kind is Kind.TEXT and not rule.codes:
            names |= set(rule.source)
    if rule := source.measurement:
        names |= {name for name in (rule.text, rule.result) if name}
    return frozenset(names) - set(source.id)


def marking_inputs(mapping: CampusMapping, source: Source) -> tuple[str, ...]:
    """Source columns that a remark may be about: where one is unchanged, the remarks are."""
    names = list(source.parent.by) if source.parent else []
    for column, rule in source.columns.items():
        typed = source.canonical.by_name[column].kind is not Kind.TEXT
        if rule.codes or (typed and (rule.invalid or mapping.invalid) == "note"):
            names += rule.source
    if rule := source.measurement:
        names += [name for name in (rule.item, rule.unit, rule.range, rule.flag) if name]
    return tuple(dict.fromkeys(names))


def _inputs(rule: ColumnRule, source: Source) -> tuple[str, ...]:
    return source.parent.by if rule.parent is not None else rule.source


def _prefixed(prefix: str, ids: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(prefix, ids, "") if prefix else ids
