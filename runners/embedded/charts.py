"""The rows of a visit: how a campus writes down what was found, ordered, given and asked."""

import collections.abc
import dataclasses
import datetime
import decimal

import numpy as np

from runners.embedded.campus import Campus
from runners.embedded.changes import Change, insert
from runners.embedded.documents import Documents
from runners.embedded.ids import Ids
from runners.embedded.knowledge import CONTRAINDICATED, DRUGS, INDEX, PANELS, WARDS, Illness
from runners.embedded.laboratory import Laboratory, Results
from runners.embedded.people import FEMALE, Person

Clock = collections.abc.Callable[[], int]
MINUTE_US = 60_000_000

# (mean, standard deviation), (least, greatest) of the calm, (least, greatest) of anybody alive.
_VITALS = {
    "temp_c": ((36.6, 0.25), (35.8, 40.2), (33.0, 41.8)),
    "pulse": ((76, 8), (57, 128), (24, 195)),
    "resp": ((17, 1.5), (12, 26), (5, 42)),
    "sbp": ((122, 10), (92, 178), (48, 245)),
    "dbp": ((76, 7), (52, 108), (25, 140)),
    "spo2": ((98, 0.8), (95, 100), (62, 100)),
    "gcs": ((15, 0), (15, 15), (3, 15)),
}
_LONG_DOCUMENT = (20_000, 200_000)


@dataclasses.dataclass(eq=False)
class Visit:
    """An open visit as the clinic keeps it in mind; `row` is its row as last written."""

    person: Person
    patient: dict[str, object]
    row: dict[str, object]
    illness: Illness
    doctor: str

    @property
    def mrn(self) -> str:
        return self.patient["mrn"]

    @property
    def visit_no(self) -> str:
        return self.row["visit_no"]

    @property
    def woman(self) -> bool:
        return self.person.sex == FEMALE


class Charts:
    """Writes rows of visits; see `Clinic` for the arguments."""

    def __init__(self, campus: Campus, rng: np.random.Generator, ids: Ids, clock: Clock):
        self.campus, self.rng, self.ids, self.clock = campus, rng, ids, clock
        self.laboratory = Laboratory(campus.mass_units)
        self._documents = Documents(rng)

    def now(self) -> datetime.datetime:
        """Returns the clock's time."""
        return time_of(self.clock())

    def patient(self, person: Person) -> dict:
        """Returns a new patient's row."""
        pid = self.ids.take()
        head = {"pid": pid, "mrn": f"{self.campus.letter}{pid}"}
        return {**head, **self.identity(person), "row_ver": 1, "updated_at": self.now()}

    def identity(self, person: Person) -> dict[str, object]:
        """Returns the columns that say who it is."""
        return {
            "name": person.name,
            "sex_code": self.campus.sex[person.sex],
            "birth_date": person.birth_date,
            "id_no": person.id_no,
            "phone": person.phone,
            "abo": self.campus.abo[person.abo],
            "rh": self.campus.rh[person.rh],
            "allergies": person.allergies,
        }

    def visit(self, mrn: str, illness: Illness, provisional: bool) -> dict:
        """Returns the row of a visit that begins; `provisional`: under a number to be replaced."""
        now = self.clock()
        ward = WARDS.get(illness.department, "K")
        in_bed = illness.visit_class != "AMB"
        waited = 0 if illness.triage is not None else 5 * MINUTE_US
        return {
            "visit_no": self.visit_no("T" if provisional else "V"),
            "mrn": mrn,
            "visit_class": self.campus.visit_class[illness.visit_class],
            "triage_level": illness.triage,
            "pathway": illness.pathway,
            "dept": illness.department,
            "bed": f"{ward}{int(self.rng.integers(1, 60)):02d}" if in_bed else None,
            "status": "open",
            "started_at": time_of(now - waited),
            "ended_at": None,
            "updated_at": time_of(now),
        }

    def visit_no(self, letter: str) -> str:
        """Returns a new visit number."""
        return f"{letter}{self.ids.take():017d}"

    def doctor(self) -> str:
        """Returns somebody's staff number."""
        return f"D{int(self.rng.integers(1000, 1400))}"

    def vital(self, visit: Visit, recovered: float) -> Change:
        """Returns a set of bedside measurements; `recovered` from 0, as found, to 1, healthy."""
        calm = visit.illness.triage is None
        drawn = {}
        for column, (healthy, calm_range, range_) in _VITALS.items():
            mean, deviation = visit.illness.vitals.get(column, healthy)
            mean += (healthy[0] - mean) * recovered
            low, high = calm_range if calm or recovered >= 1.0 else range_
            value = min(max(mean + deviation * self.rng.standard_normal(), low), high)
            drawn[column] = value
        drawn["dbp"] = min(drawn["dbp"], drawn["sbp"] - 15)
        row = {column: round(value) for column, value in drawn.items()}
        row["temp_c"] = decimal.Decimal(f"{drawn['temp_c']:.1f}")
        if calm and self.rng.random() < 0.5:
            row["gcs"] = None  # Nobody scores the coma of who walks in.
        bedside = f"MON-{int(self.rng.integers(1, 200)):03d}" if visit.row["bed"] else None
        return insert(
            "his.vital_sign",
            {
                "vital_id": self.ids.take(),
                "mrn": visit.mrn,
                "visit_no": visit.visit_no,
                **row,
                "measured_at": self.now(),
                "device": bedside,
            },
        )

    def diagnosis(self, visit: Visit, dx_type: str) -> Change:
        """Returns the visit's diagnosis."""
        now = self.now()
        return insert(
            "his.diagnosis",
            {
                "diagnosis_id": self.ids.take(),
                "mrn": visit.mrn,
                "visit_no": visit.visit_no,
                "icd10": self.campus.icd(visit.illness.code),
                "name": visit.illness.name,
                "dx_type": dx_type,
                "is_primary": True,
                "doctor": visit.doctor,
                "diagnosed_at": now,
                "updated_at": now,
            },
        )

    def order(self, visit: Visit, code: str, name: str, priority: str) -> dict:
        """Returns the row of an order."""
        now = self.now()
        return {
            "order_id": self.ids.take(),
            "mrn": visit.mrn,
            "visit_no": visit.visit_no,
            "item_code": code,
            "item_name": name,
            "priority": self.campus.priority[priority],
            "status": "active",
            "ordered_by": visit.doctor,
            "ordered_at": now,
            "updated_at": now,
        }

    def results(self, visit: Visit, panel: str, waited_us: int) -> list[dict]:
        """Returns a panel's preliminary results, of a specimen taken `waited_us` ago."""
        now = self.clock()
        taken, ready = time_of(now - waited_us), time_of(now)
        rows = []
        for result in self.measured(visit, PANELS[panel].items).rows():
            number = self.ids.uuid(self.ids.take())
            head = {"result_id": number, "mrn": visit.mrn, "visit_no": visit.visit_no}
            times = {"collected_at": taken, "result_at": ready, "updated_at": ready}
            rows.append({**head, **result, "status": "preliminary", **times})
        return rows

    def measured(
        self,
        visit: Visit,
        codes: tuple[str, ...],
        unlike: collections.abc.Mapping[str, tuple[float, float] | str] | None = None,
    ) -> Results:
        """Returns results of items, by default as the visit's illness makes them."""
        items = np.array([INDEX[code] for code in codes])
        women = np.full(len(items), visit.woman)
        calm = visit.illness.triage is None and unlike is None
        unlike = visit.illness.labs if unlike is None else unlike
        return self.laboratory.measure(self.rng, items, women, unlike, calm)

    def prescription(self, visit: Visit) -> tuple[Change, ...]:
        """Lines of one prescription: nothing that the patient is known not to bear."""
        known = visit.person.allergies or ""
        banned = tuple(code for word, code in CONTRAINDICATED.items() if word in known)
        number, now = f"R{self.ids.take():017d}", self.now()
        changes: list[Change] = []
        for code in visit.illness.drugs:
            if banned and code.startswith(banned):
                continue
            drug = DRUGS[code]
            row = {
                "rx_no": number,
                "line_no": len(changes) + 1,
                "mrn": visit.mrn,
                "visit_no": visit.visit_no,
                "drug_code": code,
                "drug_name": drug.name,
                "dose": decimal.Decimal(str(drug.dose)),
                "dose_unit": drug.unit,
                "route": drug.route,
                "frequency": drug.frequency,
                "days": drug.days,
                "status": "active",
                "doctor": visit.doctor,
                "prescribed_at": now,
                "updated_at": now,
            }
            changes.append(insert("his.prescription", row))
        return tuple(changes)

    def consultation(self, visit: Visit, department: str) -> dict:
        """Returns the row of an urgent consultation (急会诊) that is asked for."""
        now = self.now()
        return {
            "consultation_id": self.ids.take(),
            "mrn": visit.mrn,
            "visit_no": visit.visit_no,
            "urgency": self.campus.urgency["emergency"],
            "purpose": f"{visit.illness.complaint}，考虑{visit.illness.name}，请急会诊协助诊治。",
            "requested_dept": department,
            "requested_by": visit.doctor,
            "consultant": None,
            "opinion": None,
            "status": "requested",
            "requested_at": now,
            "arrived_at": None,
            "answered_at": None,
            "updated_at": now,
        }

    def document(self, visit: Visit, kind: str, long_share: float) -> dict:
        """Returns the row of a draft; `long_share` of them have 20 to 200 kB."""
        now = self.now()
        long = self.rng.random() < long_share
        nbytes = int(self.rng.integers(*(_LONG_DOCUMENT if long else (800, 6000))))
        heading = f"{kind}\n主诉：{visit.illness.complaint}。\n诊断：{visit.illness.name}。"
        return {
            "doc_id": self.ids.take(),
            "mrn": visit.mrn,
            "visit_no": visit.visit_no,
            "doc_type": kind,
            "title": f"{visit.illness.department}{kind}",
            "author": visit.doctor,
            "signed_by": None,
            "status": "draft",
            "content": self._documents.text(self.rng, heading, nbytes),
            "written_at": now,
            "updated_at": now,
        }


def time_of(us: int) -> datetime.datetime:
    """Returns microseconds since 1970 as a time in UTC, exactly."""
    return datetime.datetime.fromtimestamp(us // 1_000_000, datetime.UTC).replace(
        microsecond=us % 1_000_000
    )
