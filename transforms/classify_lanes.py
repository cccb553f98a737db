"""Classify changes: which rows go to the emergency lane, why, and who is under emergency."""

import collections.abc
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Op
from schemas.emergency_rules import (
    LEVEL_RULES,
    SIGN_OFF,
    EmergencyRules,
    Rule,
    RuleSet,
)
from schemas.entities import TABLES
from transforms.conditions import among, first, floats, ints, is_in, missing, true, valid, words
from transforms.escalations import Change, Escalations, replay
from transforms.item_limits import ItemLimits

_US_PER_HOUR = 3_600_000_000
_UNKNOWN_US = 2**62  # Younger than any commit.
# Tables whose rows say something about one moment; a visit lasts, so its status decides.
_MOMENTARY = ("lab_result", "vital_sign", "medical_order", "diagnosis", "consultation")


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
        self._items = ItemLimits(rules)
        self._visit_ends = words(a.status for a in rules.escalation.sign_off if a.table == "visit")
        acts = [a for a in rules.escalation.sign_off if a.table == "consultation"]
        self._consultation_ends = words(act.status for act in acts)
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
        op = ints(rows, "_op")[at]
        keep = op != Op.DELETE
        if name in _MOMENTARY:
            times = pc.cast(rows.column(TABLES[name].event_time).take(pa.array(at)), pa.int64())
            times = pc.fill_null(times, _UNKNOWN_US).to_numpy()
            age_us = ints(rows, "_commit_us")[at] - times
            keep &= (op == Op.INSERT) | (age_us <= self._age_us)
        return at[keep]

    def _visit(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        rules = self._rules
        over = is_in(rows, "status", self._visit_ends) | valid(rows, "ended_at")
        triage = rows.column("triage_level")
        waits = is_in(rows, "status", words(rules.triage.waiting_statuses))
        waits |= missing(rows, "visit", "status")
        classless = missing(rows, "visit", "class") & (
            valid(rows, "triage_level")
            | valid(rows, "pathway")
            | is_in(rows, "department", words(rules.missing_class.departments))
        )
        found = first(
            (Rule.E1, is_in(rows, "class", words(rules.encounter.emergency_classes))),
            (Rule.E2, among(triage, rules.triage.emergency_levels)),
            (Rule.E2, among(triage, rules.triage.waiting_levels) & waits),
            (Rule.E9, is_in(rows, "pathway", words(rules.chest_pain.pathways))),
            (Rule.E10, is_in(rows, "pathway", words(rules.stroke.pathways))),
            (Rule.E11, classless),
        )
        found[over] = 0
        return found, 0

    def _lab_result(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        found, mismatches = self._items.find(rows)
        marks = self._rules.critical_marks
        marked = None
        if marks.flags:
            marked = is_in(rows, "flag", words(marks.flags))
        if marks.laboratory_mark and (critical := rows.column("critical")).true_count:
            critical = true(critical)
            marked = critical if marked is None else marked | critical
        if marked is not None and marked.any():
            found[marked & (found == 0)] = Rule.E6
        return found, mismatches

    def _vital_sign(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        found = np.zeros(rows.num_rows, np.uint8)
        for sign, levels in self._signs.items():
            values = floats(rows.column(sign))
            for rule, low, high in levels:
                alarm = (values < low) | (values > high)
                found[alarm & ((found == 0) | (found > rule))] = rule
        return found, 0

    def _medical_order(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        orders = self._rules.orders
        urgent = is_in(rows, "priority", words(orders.priorities))
        urgent &= ~is_in(rows, "status", words(orders.ended_statuses))
        return first((Rule.E7, urgent)), 0

    def _diagnosis(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        rules = self._rules
        current = is_in(rows, "type", words(rules.diagnoses.types)) | ~valid(rows, "type")
        found = np.zeros(rows.num_rows, np.uint8)
        for rule, way in ((Rule.E10, rules.stroke), (Rule.E9, rules.chest_pain)):
            for size in self._icd_sizes:
                prefixes = words(code for code in way.icd10 if len(code) == size)
                heads = pc.utf8_slice_codeunits(rows.column("code"), 0, size)
                found[true(pc.is_in(heads, value_set=prefixes)) & current] = rule
        return found, 0

    def _consultation(self, rows: pa.RecordBatch) -> tuple[np.ndarray, int]:
        urgent = is_in(rows, "urgency", words(self._rules.consultations.urgencies))
        return first((Rule.E8, urgent & ~is_in(rows, "status", self._consultation_ends))), 0

    def _signed_off(self, name: str, rows: pa.RecordBatch) -> np.ndarray:
        """Returns where the rows that sign a patient off stand."""
        signed = np.zeros(rows.num_rows, bool)
        for act in self._rules.escalation.sign_off:
            if act.table != name:
                continue
            reached = is_in(rows, "status", words([act.status]))
            if act.classes:
                reached &= is_in(rows, "class", words(act.classes))
            if act.urgencies:
                reached &= is_in(rows, "urgency", words(act.urgencies))
            signed |= reached
        return np.flatnonzero(signed & (ints(rows, "_op") != Op.DELETE))

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
        return replay(sorted(openings + closings), open_patients)


def _events(
    name: str, rows: pa.RecordBatch, at: np.ndarray, rules: np.ndarray | None
) -> list[tuple[int, int, str, str]]:
    """Returns `(lsn, seq, patient, rule)` of the rows at `at` whose patient is known."""
    if not at.size:
        return []
    patients = rows.column(TABLES[name].patient).take(pa.array(at)).to_pylist()
    names = [SIGN_OFF] * at.size if rules is None else [Rule(code).name for code in rules[at]]
    places = zip(ints(rows, "_lsn")[at].tolist(), ints(rows, "_seq")[at].tolist(), strict=True)
    return [
        (*place, patient, rule)
        for place, patient, rule in zip(places, patients, names, strict=True)
        if patient is not None
    ]


def _already_open(
    name: str, rows: pa.RecordBatch, at: np.ndarray, open_patients: Escalations, closers: set[str]
) -> np.ndarray:
    patients = rows.column(TABLES[name].patient).take(pa.array(at))
    settled = true(pc.is_in(patients, value_set=open_patients.ids))
    if closers:
        settled &= ~true(pc.is_in(patients, value_set=words(closers)))
    return settled


def _covered(
    rows: pa.RecordBatch, column: str, covered: pa.Array, ended: dict[str, tuple[int, int]]
) -> np.ndarray:
    """Returns bool[n]: the patient is under emergency at the row's place."""
    patients = rows.column(column)
    follow = true(pc.is_in(patients, value_set=covered))
    if ended and follow.any():
        at = np.flatnonzero(follow)
        found = pc.index_in(patients.take(pa.array(at)), value_set=words(ended))
        found = pc.fill_null(found, -1).to_numpy()
        at, found = at[found >= 0], found[found >= 0]
        ends = np.array(list(ended.values()), np.int64)[found]
        lsn, seq = ints(rows, "_lsn")[at], ints(rows, "_seq")[at]
        after = (lsn > ends[:, 0]) | ((lsn == ends[:, 0]) & (seq > ends[:, 1]))
        follow[at[after]] = False
    return follow


def _complete(rows: pa.RecordBatch, rules: np.ndarray) -> np.ndarray:
    """Returns bool[n]: a rule applies and the row can stand alone (a delete always can)."""
    mask = rules != 0
    if mask.any():
        mask &= (ints(rows, "_unchanged") == 0) | (ints(rows, "_op") == Op.DELETE)
    return mask


def _union(ids: pa.Array, more: list[str]) -> pa.Array:
    return pa.concat_arrays([ids, pa.array(more, pa.utf8())]) if more else ids
