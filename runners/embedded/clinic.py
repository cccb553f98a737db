"""Visits that hang together: who comes, what is done in which order, and how it ends."""

import collections.abc
import dataclasses
import decimal

import numpy as np

from runners.embedded.campus import Campus
from runners.embedded.changes import Change, Step, delete, insert, update
from runners.embedded.charts import MINUTE_US, Charts, Clock, Visit
from runners.embedded.ids import Ids
from runners.embedded.knowledge import EMERGENCIES, EXAMINATIONS, PANELS, ROUTINE, Illness
from runners.embedded.laboratory import Results
from runners.embedded.people import SEVERITIES, People, Person

Steps = collections.abc.Iterator[Step]
ROUTINE_ROWS, EMERGENCY_ROWS = 30, 48  # Of one visit, on average.
_REMEMBERED = 5000  # Patients who may come again.
_NEW_SHARE = 0.4  # Visits by somebody who was never here.
_UNKNOWN_SHARE = 0.15  # Emergencies without papers.
_ALARM_SHARE = 0.2  # Uploads with a critical value in them.


@dataclasses.dataclass(frozen=True)
class Upload:
    """What a laboratory machine sends at once: `results[i]` is of `visits[whose[i]]`.

    `alarmed` is the visit whose result, the last, is critical; None if none is.
    """

    results: Results
    visits: list[Visit]
    whose: list[int]
    alarmed: Visit | None


class Clinic:
    """One campus's daily work, as transactions to be run one after the other.

    Every story is a generator: it draws and reads the clock when its next step is asked
    for, so stories may be interleaved at will. The same rng, ids, clock and order of asking
    give the same steps. Not thread-safe.

    Args:
      campus: how rows are written.
      rng: every choice comes from it.
      ids: of new rows.
      clock: microseconds since 1970; all times in rows come from it.
      allergies: write known allergies as rows of their own, too.

    Attributes:
      open_visits: calm visits, whose specimens the laboratory's machines measure.
    """

    def __init__(
        self,
        campus: Campus,
        rng: np.random.Generator,
        ids: Ids,
        clock: Clock,
        allergies: bool = False,
    ):
        self.open_visits: list[Visit] = []
        self._rng = rng
        self._allergies = allergies
        self._charts = Charts(campus, rng, ids, clock)
        self._people = People(rng, self._charts.now().date())
        self._patients: list[tuple[Person, dict]] = []
        self._illnesses = (_with_ends(ROUTINE), _with_ends(EMERGENCIES))

    def routine(self) -> Steps:
        """Yields the steps of a visit that is no emergency."""
        visit, arrival = self._admit(self._draw())
        yield Step(arrival)
        self.open_visits.append(visit)
        yield from self._examine(visit)
        yield from self._order(visit, "routine")
        yield Step((self._charts.diagnosis(visit, _dx_type(visit)),))
        for panel in visit.illness.panels:
            yield from self._report(visit, panel, waited_us=45 * MINUTE_US)
        yield from self._slips(visit)
        if lines := self._charts.prescription(visit):
            yield Step(lines)
        kind = "门诊病历" if visit.illness.visit_class == "AMB" else "病程记录"
        yield from self._write(visit, kind, long_share=0.04)
        if visit in self.open_visits:  # Unless a critical value has made it another story.
            self.open_visits.remove(visit)
            yield Step((self._visit(visit, status="closed", ended_at=self._charts.now()),))

    def emergency(self) -> Steps:
        """Yields the steps of an emergency, from arrival to sign-off."""
        unknown = self._rng.random() < _UNKNOWN_SHARE
        visit, arrival = self._admit(self._draw(emergency=True), unknown)
        yield Step(arrival)
        if unknown:  # The provisional number gives way to the real one: a key changes.
            yield Step((self._visit(visit, visit_no=self._charts.visit_no("V")),))
        yield from self._examine(visit)
        yield from self._order(visit, "stat")
        yield Step((self._charts.diagnosis(visit, "emergency"),))
        consultation = self._charts.consultation(visit, visit.illness.consulted)
        yield Step((insert("his.consultation", dict(consultation)),))
        for panel in visit.illness.panels:
            yield from self._report(visit, panel, waited_us=12 * MINUTE_US)
        yield self._consulted(consultation, "arrived")
        if lines := self._charts.prescription(visit):
            yield Step(lines)
        yield Step((self._charts.vital(visit, recovered=0.6),))
        yield from self._write(visit, "急诊抢救记录", long_share=0.2)
        yield self._consulted(consultation, "answered")
        if unknown:
            yield Step((self._identified(visit), *self._told(visit)))
        yield Step((self._charts.vital(visit, recovered=1.0),))
        yield from self._sign_off(visit, consultation)

    def alarm(self, visit: Visit) -> Steps:
        """Yields what follows a critical glucose of a calm patient, to sign-off."""
        order = self._charts.order(visit, "GLU", PANELS["GLU"].name, "stat")
        yield Step((insert("his.medical_order", dict(order)),))
        consultation = self._charts.consultation(visit, "内分泌科")
        yield Step((insert("his.consultation", dict(consultation)),))
        yield self._consulted(consultation, "arrived")
        yield from self._report(visit, "GLU", waited_us=12 * MINUTE_US)
        yield self._consulted(consultation, "answered")
        yield Step((self._order_update(order, status="completed"),))
        yield from self._sign_off(visit, consultation)

    def registrations(self, count: int) -> Step:
        """Returns one transaction that opens `count` calm visits."""
        changes: list[Change] = []
        for _ in range(count):
            visit, arrival = self._admit(self._draw())
            self.open_visits.append(visit)
            changes += arrival
        return Step(tuple(changes))

    def upload(self, count: int, calm: bool = False) -> Upload:
        """Returns `count` results of open visits; unless `calm`, one of five raises an alarm.

        Raises:
          ValueError: no visit is open.
        """
        laboratory, visits = self._charts.laboratory, list(self.open_visits)
        whose = self._rng.integers(0, len(visits), count)
        items = self._rng.choice(laboratory.numeric_items, count)
        women = np.array([visit.woman for visit in visits])[whose]
        results = laboratory.measure(self._rng, items, women, calm=True)
        alarmed = None
        if not calm and self._rng.random() < _ALARM_SHARE:
            alarmed = visits[int(whose[-1])]
            self.open_visits.remove(alarmed)
            worst = self._charts.measured(alarmed, ("14749-6",), {"14749-6": (25.5, 0.8)})
            for field in dataclasses.fields(Results):
                getattr(results, field.name)[-1] = getattr(worst, field.name)[0]
        return Upload(results, visits, whose.tolist(), alarmed)

    def _draw(self, emergency: bool = False) -> Illness:
        illnesses, ends = self._illnesses[emergency]
        return illnesses[int(np.searchsorted(ends, self._rng.random()))]

    def _admit(self, illness: Illness, unknown: bool = False) -> tuple[Visit, tuple[Change, ...]]:
        known = None if illness.triage else self._returning(illness)
        if known is not None:
            person, patient = known
            arrival = ()
        else:
            if unknown:
                person = self._people.unidentified()
            else:
                person = self._people.person(illness.sex, illness.ages)
            patient = self._charts.patient(person)
            arrival = (insert("his.patient", dict(patient)),)
            # Who came as an emergency does not come again as a calm patient: until sign-off
            # is everywhere, all that is theirs travels as urgent.
            if illness.triage is None:
                self._remember(person, patient)
        row = self._charts.visit(patient["mrn"], illness, provisional=unknown)
        visit = Visit(person, patient, row, illness, self._charts.doctor())
        told = self._told(visit) if arrival else ()
        return visit, (*arrival, *told, insert("his.visit", dict(row)))

    def _told(self, visit: Visit) -> tuple[Change, ...]:
        """Each allergy that a patient tells of: `青霉素(皮疹)；海鲜(荨麻疹)`."""
        known = visit.person.allergies
        if not self._allergies or known in (None, "无"):
            return ()
        now, changes = self._charts.now(), []
        for one in known.split("；"):
            substance, _, reaction = one.rstrip(")").partition("(")
            row = {
                "allergy_id": self._charts.ids.take(),
                "mrn": visit.mrn,
                "substance": substance,
                "reaction": reaction,
                "severity": SEVERITIES.get(reaction, "mild"),
                "verification": "confirmed" if reaction == "皮试阳性" else "unconfirmed",
                "recorded_by": visit.doctor,
                "recorded_at": now,
                "updated_at": now,
            }
            changes.append(insert("his.allergy", row))
        return tuple(changes)

    def _returning(self, illness: Illness) -> tuple[Person, dict] | None:
        """Somebody who was here before and can have this; None for a new face."""
        if not self._patients or self._rng.random() < _NEW_SHARE:
            return None
        today = self._charts.now().date()
        for _ in range(4):
            person, patient = self._patients[int(self._rng.integers(len(self._patients)))]
            of_age = illness.ages[0] <= person.age(today) < illness.ages[1]
            if of_age and illness.sex in (None, person.sex):
                return person, patient
        return None

    def _remember(self, person: Person, patient: dict) -> None:
        if len(self._patients) < _REMEMBERED:
            self._patients.append((person, patient))
        else:
            self._patients[int(self._rng.integers(_REMEMBERED))] = (person, patient)

    def _identified(self, visit: Visit) -> Change:
        sex = None if visit.person.sex == "0" else visit.person.sex
        visit.person = self._people.person(sex, visit.illness.ages)
        return self._patient(visit, **self._charts.identity(visit.person))

    def _examine(self, visit: Visit) -> Steps:
        yield Step((self._charts.vital(visit, recovered=0.0),))
        if self._rng.random() < 0.03:  # Two monitors sent the same set; one is taken back.
            twice = self._charts.vital(visit, recovered=0.0)
            yield Step((twice,))
            yield Step((delete("his.vital_sign", twice.values),))

    def _order(self, visit: Visit, priority: str) -> Steps:
        wanted = [(code, PANELS[code].name) for code in visit.illness.panels]
        wanted += [(code, EXAMINATIONS[code]) for code in visit.illness.examinations]
        rows = [self._charts.order(visit, code, name, priority) for code, name in wanted]
        orders = [insert("his.medical_order", dict(row)) for row in rows]
        if priority == "stat":  # One after the other, as they are called out.
            for order in orders:
                yield Step((order,))
        else:
            yield Step(tuple(orders))
        yield Step((self._order_update(rows[0], status="completed"),))

    def _report(self, visit: Visit, panel: str, waited_us: int) -> Steps:
        """A panel's results: preliminary, then final, one of thirty corrected."""
        rows = self._charts.results(visit, panel, waited_us)
        yield Step(tuple(insert("lis.result", dict(row)) for row in rows))
        now = self._charts.now()
        yield Step(tuple(update("lis.result", r, status="final", updated_at=now) for r in rows))
        row = rows[0]
        if self._rng.random() < 0.03 and row["val_num"] is not None:
            value = decimal.Decimal(row["val_num"])
            last_digit = decimal.Decimal((0, (1,), value.as_tuple().exponent))
            changes = {"val_num": str(value + last_digit), "status": "corrected"}
            yield Step((update("lis.result", row, **changes, updated_at=self._charts.now()),))

    def _write(self, visit: Visit, kind: str, long_share: float) -> Steps:
        """A document, drafted and then signed: the signature leaves the long text alone."""
        row = self._charts.document(visit, kind, long_share)
        yield Step((insert("emr.document", dict(row)),))
        changes = {"status": "signed", "signed_by": visit.doctor, "updated_at": self._charts.now()}
        yield Step((update("emr.document", row, **changes),))

    def _consulted(self, row: dict, status: str) -> Step:
        now = self._charts.now()
        changes: dict[str, object] = {"status": status, "updated_at": now}
        if status == "arrived":
            changes |= {"consultant": self._charts.doctor(), "arrived_at": now}
        elif status == "answered":
            opinion = "同意目前诊断，建议收入专科进一步治疗，动态复查相关指标，密切监护。"
            changes |= {"opinion": opinion, "answered_at": now}
        return Step((update("his.consultation", row, **changes),))

    def _sign_off(self, visit: Visit, consultation: dict) -> Steps:
        yield self._consulted(consultation, "signed_off")
        yield Step((self._visit(visit, status="signed_off", ended_at=self._charts.now()),))

    def _slips(self, visit: Visit) -> Steps:
        """What goes otherwise than planned, in about one visit of four."""
        luck = self._rng.random()
        if luck >= 0.24:
            return
        order = self._charts.order(visit, "ECG", EXAMINATIONS["ECG"], "routine")
        placed = insert("his.medical_order", dict(order))
        if luck < 0.04:  # Ordered for the wrong patient, noticed before it was saved.
            yield Step((placed,), rolled_back=True)
        elif luck < 0.08:  # A second order is taken back within the transaction.
            second = self._charts.order(visit, "ABDUS", EXAMINATIONS["ABDUS"], "urgent")
            yield Step((placed,), undone=(insert("his.medical_order", second),))
        elif luck < 0.12:  # Ordered, then withdrawn.
            yield Step((placed,))
            yield Step((delete("his.medical_order", order),))
        elif luck < 0.15:  # An order is renumbered: its key changes.
            yield Step((placed,))
            yield Step((self._order_update(order, order_id=self._charts.ids.take()),))
        elif luck < 0.20:  # A new telephone, or none any more.
            phone = self._people.phone() if luck < 0.18 else None
            yield Step((self._patient(visit, phone=phone),))
        else:  # A second diagnosis, withdrawn.
            second = self._charts.diagnosis(visit, _dx_type(visit))
            second.values["is_primary"] = False
            yield Step((second,))
            yield Step((delete("his.diagnosis", second.values),))

    def _visit(self, visit: Visit, **values: object) -> Change:
        return update("his.visit", visit.row, **values, updated_at=self._charts.now())

    def _patient(self, visit: Visit, **values: object) -> Change:
        version = {"row_ver": visit.patient["row_ver"] + 1, "updated_at": self._charts.now()}
        return update("his.patient", visit.patient, **values, **version)

    def _order_update(self, row: dict, **values: object) -> Change:
        return update("his.medical_order", row, **values, updated_at=self._charts.now())


def _with_ends(illnesses: tuple[Illness, ...]) -> tuple[tuple[Illness, ...], np.ndarray]:
    """Returns illnesses and the ends of their shares of the interval from 0 to 1."""
    ends = np.cumsum([illness.share for illness in illnesses])
    return illnesses, ends / ends[-1]


def _dx_type(visit: Visit) -> str:
    return "admission" if visit.illness.visit_class == "IMP" else "outpatient"
