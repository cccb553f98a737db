"""Classify changes: which rows go to the emergency lane, why, and who is under emergency."""

import collections.abc
import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.emergency_rules import (
    ITEM_UNITS,
    LEVEL_RULES,
    SIGN_OFF,
    UNITLESS,
    EmergencyRules,
    Rule,
    RuleSet,
    spellings_of,
)
from schemas.entities import TABLES

# `(patient_id, rule, lsn, seq, open)`, as in ChangeBatch.escalations and `sync.escalation`.
Change = tuple[str, str, int, int, bool]

_US_PER_HOUR = 3_600_000_000
_UNKNOWN_US = 2**62  # Younger than any commit.
_DECIMAL = r"^[-+]?[0-9]+(\.[0-9]+)?$"
# Tables whose rows say something about one moment; a visit lasts, so its status decides.
_MOMENTARY = ("lab_result", "vital_sign", "medical_order", "diagnosis", "consultation")


class Escalations:
    """The patients of one campus under emergency: immutable, one set per link.

    Its repr names nobody. `ids` is an Arrow array for membership tests, made once.

    Args:
      opened: patient to `(rule, lsn, seq)`, what opened the emergency and where.
    """

    def __init__(self, opened: collections.abc.Mapping[str, tuple[str, int, int]] | None = None):
        self._opened = dict(opened or {})
        self.ids = pa.array(self._opened, pa.utf8())

    @functools.cached_property
    def patients(self) -> frozenset[str]:
        return frozenset(self._opened)

    @classmethod
    def from_rows(cls, rows: collections.abc.Iterable[Change]) -> "Escalations":
        """Returns the state that rows of `sync.escalation` (or changes, in any order) leave."""
        return cls().after(sorted(rows, key=lambda row: row[2:4]))

    def after(self, changes: collections.abc.Iterable[Change]) -> "Escalations":
        """Returns the state after `changes`, in order; itself if nothing changes.

        A closing that is not newer than the opening it meets is an old one, sent again,
        and does nothing: only a later sign-off ends an emergency.
        """
        opened = None
        for patient, rule, lsn, seq, is_open in changes:
            opened = dict(self._opened) if opened is None else opened
            known = opened.get(patient)
            if is_open:
                if known is None:
                    opened[patient] = (rule, lsn, seq)
            elif known is not None and (lsn, seq) > known[1:]:
                del opened[patient]
        return self if opened is None or opened == self._opened else Escalations(opened)

    def opened_at(self, patient: str) -> tuple[int, int] | None:
        """Returns where the emergency of `patient` began, or None."""
        known = self._opened.get(patient)
        return None if known is None else known[1:]

    def __contains__(self, patient: str) -> bool:
        return patient in self._opened

    def __len__(self) -> int:
        return len(self._opened)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Escalations) and self._opened == other._opened

    __hash__ = None

    def __repr__(self) -> str:
        return f"Escalations({len(self)} open)"


@dataclasses.dataclass(frozen=True)
class Classified:
    """What a classifier found in one batch.

    Attributes:
      masks: table to bool[n]: the rows to copy to the emergency lane. A copy is always
        complete: a row with an unchanged column that the log did not carry stays False.
      rules: table to uint8[n]: the lowest-numbered `Rule` that applies, E11 where only the
        patient's emergency does, 0 where none does. Set on incomplete rows too.
      escalations: every opening and closing in log order, for `Escalations.after`.
      unit_mismatches: lab rows beyond a limit's number but in another unit than the limit's:
        not compared, so not an emergency by E3 or E6. More than none is a mapping's fault.
    """

    masks: dict[str, np.ndarray]
    rules: dict[str, np.ndarray]
    escalations: list[Change]
    unit_mismatches: int

    @property
    def urgent(self) -> int:
        """Number of rows in the emergency lane."""
        return sum(int(np.count_nonzero(mask)) for mask in self.masks.values())


class Classifier:
    """The emergency rules of one campus, made ready for columns. Stateless and pure.

    Escalation, exactly:
      * A row to which a rule of `escalation.opened_by` applies opens its patient's emergency,
        also where the row itself is incomplete.
      * An emergency opened anywhere in a batch covers that patient's rows in the whole batch,
        those before it too. A sign-off covers up to and with its own row.
      * Where both meet in a batch, the later one decides what follows it.
      * Only a sign-off named in the rules closes; a delete, an end time, a corrected value or
        a lower triage level does not. A sign-off at or before the opening does not either.
      * Deletes carry a key only: they follow their patient's emergency where the patient is
        known, and open and close nothing.

    Batch borders do not change the openings and closings. They change the rows as far as a
    later opening no longer reaches back: the rows of a batch classified whole contain those
    of its parts classified in order. Each loosened threshold only adds rows.
    """

    def __init__(self, rules: EmergencyRules, campus: str):
        self._rules = rules.for_campus(campus)
        self._compile(self._rules)
        self._find = {
            "visit": self._visit,
            "lab_result": self._lab_result,
            "vital_sign": self._vital_sign,
            "medical_order": self._medical_order,
            "diagnosis": self._diagnosis,
            "consultation": self._consultation,
        }

    def _compile(self, rules: RuleSet) -> None:
        self._opening = np.zeros(len(Rule), bool)
        for name in rules.escalation.opened_by:
            self._opening[Rule[name]] = True
        counting = rules.vital_levels.counting
        self._signs: dict[str, list[tuple[Rule, float, float]]] = {}
        for limit in sorted(rules.vital_signs, key=lambda limit: limit.level):
            if limit.level in counting:
                entry = (LEVEL_RULES[limit.level], limit.low, limit.high)
                self._signs.setdefault(limit.sign, []).append(entry)
        self._items = _ItemLimits(rules)
        self._visit_ends = _words(a.status for a in rules.escalation.sign_off if a.table == "visit")
        acts = [a for a in rules.escalation.sign_off if a.table == "consultation"]
        self._consultation_ends = _words(act.status for act in acts)
        prefixes = (*rules.chest_pain.icd10, *rules.stroke.icd10)
        self._icd_sizes = sorted({len(prefix) for prefix in prefixes})
        self._age_us = int(rules.freshness.hours * _US_PER_HOUR)

    def classify(
        self, tables: collections.abc.Mapping[str, pa.RecordBatch], open_patients: Escalations
    ) -> Classified:
        """Returns lanes and escalations of one batch of canonical tables (`arrow_schema`).

        `open_patients` is the state before the batch; the caller applies the result's
        `escalations` to it. Never refuses a row: a value that is not a number is no alarm.
        """
        rules, mismatches = {}, 0
        hits: dict[str, np.ndarray] = {}
        for name, rows in tables.items():
            rules[name] = np.zeros(rows.num_rows, np.uint8)
            if name not in self._find or not rows.num_rows:
                continue
            found, refused = self._find[name](rows)
            mismatches += refused
            at = self._counted(name, rows, np.flatnonzero(found))
            if at.size:
                rules[name][at] = found[at]
                hits[name] = at
        changes, ended = self._escalate(tables, rules, hits, open_patients)
        covered = _union(open_patients.ids, [c[0] for c in changes if c[4]])
        masks = {}
        for name, rows in tables.items():
            if len(covered) and rows.num_rows:
                follow = _covered(rows, TABLES[name].patient, covered, ended)
                rules[name][follow & (rules[name] == 0)] = Rule.E11
            masks[name] = _complete(rows, rules[name])
        return Classified(masks, rules, changes, mismatches)

    def _counted(self, name: str, rows: pa.RecordBatch, at: np.ndarray) -> np.ndarray:
        """Drops deletes and, of what is read or changed again, what is history."""
        if not at.size:
            return at
        op = _ints(rows, "_op")[at]
        keep = op != Op.DELETE
        if name in _MOMENTARY:
            times = pc.cast(rows.column(TABLES[name].event_time).take(pa.array(at)), pa.int64())
            times = pc.fill_null(times, _UNKNOWN_US).to_numpy()
            age_us = _ints(rows, "_commit_us")[at] - times
            keep &= (op == Op.INSERT) | (age_us <= self._age_us)
        return at[keep]

    def _visit(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        rules = self._rules
        over = _is_in(rows, "status", self._visit_ends) | _valid(rows, "ended_at")
        triage = rows.column("triage_level")
        waits = _is_in(rows, "status", _words(rules.triage.waiting_statuses))
        waits |= _missing(rows, "visit", "status")
        classless = _missing(rows, "visit", "class") & (
            _valid(rows, "triage_level")
            | _valid(rows, "pathway")
            | _is_in(rows, "department", _words(rules.missing_class.departments))
        )
        found = _first(
            (Rule.E1, _is_in(rows, "class", _words(rules.encounter.emergency_classes))),
            (Rule.E2, _among(triage, rules.triage.emergency_levels)),
            (Rule.E2, _among(triage, rules.triage.waiting_levels) & waits),
            (Rule.E9, _is_in(rows, "pathway", _words(rules.chest_pain.pathways))),
            (Rule.E10, _is_in(rows, "pathway", _words(rules.stroke.pathways))),
            (Rule.E11, classless),
        )
        found[over] = 0
        return found, 0

    def _lab_result(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        found, mismatches = self._items.find(rows)
        marks = self._rules.critical_marks
        marked = None
        if marks.flags:
            marked = _is_in(rows, "flag", _words(marks.flags))
        if marks.laboratory_mark and (critical := rows.column("critical")).true_count:
            critical = _true(critical)
            marked = critical if marked is None else marked | critical
        if marked is not None and marked.any():
            found[marked & (found == 0)] = Rule.E6
        return found, mismatches

    def _vital_sign(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        found = np.zeros(rows.num_rows, np.uint8)
        for sign, levels in self._signs.items():
            values = _floats(rows.column(sign))
            for rule, low, high in levels:
                alarm = (values < low) | (values > high)
                found[alarm & ((found == 0) | (found > rule))] = rule
        return found, 0

    def _medical_order(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        orders = self._rules.orders
        urgent = _is_in(rows, "priority", _words(orders.priorities))
        urgent &= ~_is_in(rows, "status", _words(orders.ended_statuses))
        return _first((Rule.E7, urgent)), 0

    def _diagnosis(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        rules = self._rules
        current = _is_in(rows, "type", _words(rules.diagnoses.types)) | ~_valid(rows, "type")
        found = np.zeros(rows.num_rows, np.uint8)
        for rule, way in ((Rule.E10, rules.stroke), (Rule.E9, rules.chest_pain)):
            for size in self._icd_sizes:
                prefixes = _words(code for code in way.icd10 if len(code) == size)
                heads = pc.utf8_slice_codeunits(rows.column("code"), 0, size)
                found[_true(pc.is_in(heads, value_set=prefixes)) & current] = rule
        return found, 0

    def _consultation(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        urgent = _is_in(rows, "urgency", _words(self._rules.consultations.urgencies))
        return _first((Rule.E8, urgent & ~_is_in(rows, "status", self._consultation_ends))), 0

    def _signed_off(self, name: str, rows: pa.RecordBatch) -> np.ndarray:
        """Returns where the rows that sign a patient off stand."""
        signed = np.zeros(rows.num_rows, bool)
        for act in self._rules.escalation.sign_off:
            if act.table != name:
                continue
            reached = _is_in(rows, "status", _words([act.status]))
            if act.classes:
                reached &= _is_in(rows, "class", _words(act.classes))
            if act.urgencies:
                reached &= _is_in(rows, "urgency", _words(act.urgencies))
            signed |= reached
        return np.flatnonzero(signed & (_ints(rows, "_op") != Op.DELETE))

    def _escalate(
        self,
        tables: collections.abc.Mapping[str, pa.RecordBatch],
        rules: dict[str, np.ndarray],
        hits: dict[str, np.ndarray],
        open_patients: Escalations,
    ) -> tuple[list[Change], dict[str, tuple[int, int]]]:
        """Returns the openings and closings, and where the closed ones end in this batch."""
        closings = []
        for name in ("visit", "consultation"):
            if name in tables and tables[name].num_rows:
                rows = tables[name]
                closings += _events(name, rows, self._signed_off(name, rows), None)
        closers = {event[2] for event in closings}
        openings = []
        for name, at in hits.items():
            at = at[self._opening[rules[name][at]]]
            if at.size and len(open_patients):
                at = at[~_already_open(name, tables[name], at, open_patients, closers)]
            openings += _events(name, tables[name], at, rules[name])
        return _replay(sorted(openings + closings), open_patients)


class _ItemLimits:
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
        self._spellings = _words(spellings)
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
        values = _floats(rows.column("value"))
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
                found[cultures[_true(pc.starts_with(texts, text))]] = Rule.E6
        return found, mismatches

    def _unit_fits(self, units: pa.Array, item: np.ndarray) -> np.ndarray:
        spelling = pc.index_in(units, value_set=self._spellings)
        known = pc.fill_null(spelling, 0).to_numpy()
        known = np.where(_true(pc.is_null(units)), len(self._spellings), known)
        return self._fits[item, known] & _true(pc.or_(pc.is_null(units), pc.is_valid(spelling)))


def _replay(
    events: list[tuple[int, int, str, str]], open_patients: Escalations
) -> tuple[list[Change], dict[str, tuple[int, int]]]:
    """Runs the few rows that open or close, in log order, over the state before them."""
    state: dict[str, tuple[int, int] | None] = {}
    changes: list[Change] = []
    ended: dict[str, tuple[int, int]] = {}
    for lsn, seq, patient, rule in events:
        opened = state[patient] if patient in state else open_patients.opened_at(patient)
        if rule == SIGN_OFF:
            if opened is None or (lsn, seq) <= opened:
                continue
            state[patient] = None
            ended[patient] = (lsn, seq)
        elif opened is None:
            state[patient] = (lsn, seq)
            ended.pop(patient, None)
        else:
            continue
        changes.append((patient, rule, lsn, seq, rule != SIGN_OFF))
    return changes, ended


def _events(
    name: str, rows: pa.RecordBatch, at: np.ndarray, rules: np.ndarray | None
) -> list[tuple[int, int, str, str]]:
    """Returns `(lsn, seq, patient, rule)` of the rows at `at` whose patient is known."""
    if not at.size:
        return []
    patients = rows.column(TABLES[name].patient).take(pa.array(at)).to_pylist()
    names = [SIGN_OFF] * at.size if rules is None else [Rule(code).name for code in rules[at]]
    places = zip(_ints(rows, "_lsn")[at].tolist(), _ints(rows, "_seq")[at].tolist(), strict=True)
    return [
        (*place, patient, rule)
        for place, patient, rule in zip(places, patients, names, strict=True)
        if patient is not None
    ]


def _already_open(
    name: str, rows: pa.RecordBatch, at: np.ndarray, open_patients: Escalations, closers: set[str]
) -> np.ndarray:
    patients = rows.column(TABLES[name].patient).take(pa.array(at))
    settled = _true(pc.is_in(patients, value_set=open_patients.ids))
    if closers:
        settled &= ~_true(pc.is_in(patients, value_set=_words(closers)))
    return settled


def _covered(
    rows: pa.RecordBatch, column: str, covered: pa.Array, ended: dict[str, tuple[int, int]]
) -> np.ndarray:
    """Returns bool[n]: the patient is under emergency at the row's place."""
    patients = rows.column(column)
    follow = _true(pc.is_in(patients, value_set=covered))
    if ended and follow.any():
        at = np.flatnonzero(follow)
        found = pc.index_in(patients.take(pa.array(at)), value_set=_words(ended))
        found = pc.fill_null(found, -1).to_numpy()
        at, found = at[found >= 0], found[found >= 0]
        ends = np.array(list(ended.values()), np.int64)[found]
        lsn, seq = _ints(rows, "_lsn")[at], _ints(rows, "_seq")[at]
        after = (lsn > ends[:, 0]) | ((lsn == ends[:, 0]) & (seq > ends[:, 1]))
        follow[at[after]] = False
    return follow


def _complete(rows: pa.RecordBatch, rules: np.ndarray) -> np.ndarray:
    """Returns bool[n]: a rule applies and the row can stand alone (a delete always can)."""
    mask = rules != 0
    if mask.any():
        mask &= (_ints(rows, "_unchanged") == 0) | (_ints(rows, "_op") == Op.DELETE)
    return mask


def _union(ids: pa.Array, more: list[str]) -> pa.Array:
    return pa.concat_arrays([ids, pa.array(more, pa.utf8())]) if more else ids


def _first(*layers: tuple[Rule, np.ndarray]) -> np.ndarray:
    """Returns the first rule of each row whose mask is set."""
    found = np.zeros(layers[0][1].size, np.uint8)
    for rule, mask in reversed(layers):
        found[mask] = rule
    return found


def _words(words: collections.abc.Iterable[str]) -> pa.Array:
    return pa.array(list(words), pa.utf8())


def _ints(rows: pa.RecordBatch, column: str) -> np.ndarray:
    return rows.column(column).to_numpy()


def _true(mask: pa.BooleanArray) -> np.ndarray:
    """Returns bool[n], null as False."""
    if mask.null_count:
        mask = pc.fill_null(mask, False)
    return mask.to_numpy(zero_copy_only=False)


def _is_in(rows: pa.RecordBatch, column: str, words: pa.Array) -> np.ndarray:
    return _true(pc.is_in(rows.column(column), value_set=words))


def _valid(rows: pa.RecordBatch, column: str) -> np.ndarray:
    return _true(pc.is_valid(rows.column(column)))


def _missing(rows: pa.RecordBatch, table: str, column: str) -> np.ndarray:
    """Returns bool[n]: null because the campus says nothing, not because it is unchanged."""
    bit = np.uint64(1 << TABLES[table].index[column])
    return ~_valid(rows, column) & ((_ints(rows, "_unchanged") & bit) == 0)


def _among(values: pa.Array, levels: collections.abc.Iterable[int]) -> np.ndarray:
    return _true(pc.is_in(values, value_set=pa.array(list(levels), pa.int64())))


def _floats(values: pa.Array) -> np.ndarray:
    """Returns float64[n] of numbers or of their text; NaN for null and for any other text."""
    if pa.types.is_string(values.type):
        try:
            values = pc.cast(values, pa.float64())
        except pa.ArrowInvalid:
            numeric = pc.fill_null(pc.match_substring_regex(values, _DECIMAL), False)
            nothing = pa.scalar(None, pa.utf8())
            values = pc.cast(pc.if_else(numeric, values, nothing), pa.float64())
    elif values.null_count:
        values = pc.cast(values, pa.float64())
    return values.to_numpy(zero_copy_only=False)
