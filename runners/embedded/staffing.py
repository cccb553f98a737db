"""Who works at a hospital and where: the same departments and people at every campus."""

import datetime

import numpy as np

from runners.embedded.changes import Step, insert
from runners.embedded.knowledge import DEPARTMENTS
from runners.embedded.people import People

DOCTORS = range(1000, 1400)  # `Charts.doctor` names them D1000 .. D1399.
_NURSES = range(2000, 2060)
_DOCTOR_TITLES = ("住院医师", "主治医师", "副主任医师", "主任医师")
_NURSE_TITLES = ("护士", "护师", "主管护师")
_SEED = 20_260_101


def staffing(now: datetime.datetime) -> tuple[Step, Step]:
    """Returns two transactions that fill his.department and his.staff, once for a database."""
    departments = tuple(
        insert(
            "his.department",
            {
                "dept_code": department.code,
                "name": department.name,
                "kind": department.kind,
                "status": "active",
                "updated_at": now,
            },
        )
        for department in DEPARTMENTS
    )
    people = People(np.random.default_rng(_SEED), now.date())
    staff = [(f"D{n}", "doctor", _DOCTOR_TITLES[n % 4]) for n in DOCTORS]
    staff += [(f"N{n}", "nurse", _NURSE_TITLES[n % 3]) for n in _NURSES]
    rows = [
        {
            "staff_no": number,
            "name": people.person(ages=(25, 60)).name,
            "title": title,
            "role": role,
            "dept_code": DEPARTMENTS[i % len(DEPARTMENTS)].code,
            "status": "left" if i % 50 == 49 else "active",
            "updated_at": now,
        }
        for i, (number, role, title) in enumerate(staff)
    ]
    return Step(departments), Step(tuple(insert("his.staff", row) for row in rows))
