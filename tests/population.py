"""A seeded population at three campuses as clerks write it down, with who is who beside it."""

import dataclasses
import datetime

import numpy as np
import pyarrow as pa

from runners.embedded.people import FEMALE, MALE, People, Person, check_digit
from transforms.match_patients import INPUT_SCHEMA

CAMPUSES = ("east", "main", "west")
TODAY = datetime.date(2026, 11, 23)
_TRADITIONAL = str.maketrans(
    "张陈刘杨赵黄吴孙马罗郑谢韩冯许邓国华兰红丽伟", "張陳劉楊趙黃吳孫馬羅鄭謝韓馮許鄧國華蘭紅麗偉"
)
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
_WRONG = "伟强磊军勇杰涛超明刚平芳娜秀英敏静晓小"
_HELD_BY_MANY = "13800000000"


@dataclasses.dataclass(frozen=True)
class Population:
    """Records as `INPUT_SCHEMA`, in no order, and the person of each by (campus, patient_id)."""

    records: pa.RecordBatch
    person_of: dict[tuple[str, str], int]

    def rows(self) -> list[dict]:
        return self.records.to_pylist()


def population(people: int, seed: int) -> Population:
    """Returns `people` invented people, most of them at more than one campus.

    Of them 2 % are twins, 1 % newborns under their mother's name, 8 % share a phone at home; ids
    are missing (6 %), mistyped, another's, or placeholders; names have typos, lost characters,
    traditional forms, blanks, or have been changed.
    """
    rng = np.random.default_rng(seed)
    drawn = _people(People(rng, TODAY), people, rng)
    rows, truth = [], {}
    for number, person in enumerate(drawn):
        places = [campus for campus in CAMPUSES if rng.random() < 0.6] or [CAMPUSES[number % 3]]
        for campus in places:
            for _ in range(1 + (rng.random() < 0.03)):  # Registered twice at one campus.
                patient = f"{campus[0].upper()}{len(rows):07d}"
                relative = drawn[max(0, number - 1)]
                rows.append(
                    {"campus": campus, "patient_id": patient} | _written(person, relative, rng)
                )
                truth[campus, patient] = number
    order = rng.permutation(len(rows)).tolist()
    return Population(batch_of([rows[i] for i in order]), truth)


def batch_of(rows: list[dict]) -> pa.RecordBatch:
    """Returns rows written by hand as `INPUT_SCHEMA`; what a row does not name is null."""
    columns = [pa.array([row.get(f.name) for row in rows], f.type) for f in INPUT_SCHEMA]
    return pa.record_batch(columns, schema=INPUT_SCHEMA)


def id_no(birth: datetime.date, sex: str, serial: int = 7) -> str:
    """Returns an invented, valid citizen identity number."""
    body = f"690101{birth:%Y%m%d}{serial * 2 + (sex == MALE):03d}"
    return body + check_digit(body)


def _people(people: People, count: int, rng: np.random.Generator) -> list[Person]:
    found: list[Person] = []
    while len(found) < count:
        person, luck = people.person(), rng.random()
        if found and luck < 0.08:
            person = dataclasses.replace(person, phone=found[-1].phone)
        elif luck < 0.10 and len(person.name) > 2:
            found.append(_twin(person, rng))
        elif found and luck < 0.11:
            mother = people.person(FEMALE, (20, 40))
            found.append(mother)
            person = _newborn(mother, rng)
        found.append(person)
    return found[:count]


def _twin(person: Person, rng: np.random.Generator) -> Person:
    name = person.name[:-1] + _other(person.name[-1], rng)
    number = id_no(person.birth_date, person.sex, 400) if person.id_no else None
    return dataclasses.replace(person, name=name, id_no=number)


def _newborn(mother: Person, rng: np.random.Generator) -> Person:
    sex = MALE if rng.random() < 0.5 else FEMALE
    name = mother.name + ("之子" if sex == MALE else "之女")
    number = mother.id_no if rng.random() < 0.2 else None
    birth = TODAY - datetime.timedelta(days=int(rng.integers(1, 60)))
    return dataclasses.replace(mother, name=name, sex=sex, birth_date=birth, id_no=number)


def _written(person: Person, relative: Person, rng: np.random.Generator) -> dict:
    """What a clerk makes of a person."""
    luck = rng.random(6)
    birth = person.birth_date
    if luck[1] < 0.01:
        birth += datetime.timedelta(days=int(rng.integers(1, 40)))
    sex: str | None = person.sex
    if luck[2] < 0.01:
        sex = None if luck[2] < 0.005 else "0"
    phone = person.phone
    if luck[3] < 0.10:
        phone = f"154{int(rng.integers(10**8)):08d}"
    elif luck[3] < 0.16:
        phone = None if luck[3] < 0.15 else _HELD_BY_MANY
    elif luck[3] < 0.20 and phone is not None:
        phone = f"+86 {phone[:3]}-{phone[3:7]}-{phone[7:]}"
    return {
        "name": _name(person.name, luck[0], rng),
        "sex": sex,
        "birth_date": None if luck[4] < 0.01 else birth,
        "id_no": _number(person.id_no, relative.id_no, luck[5], rng),
        "phone": phone,
    }


def _name(name: str, luck: float, rng: np.random.Generator) -> str:
    at = int(rng.integers(1, len(name)))
    if luck < 0.02:  # A typo.
        return name[:at] + _other(name[at], rng) + name[at + 1 :]
    if luck < 0.023:  # A new given name.
        return name[0] + _other(name[1], rng) + _other("", rng)
    if luck < 0.03:  # A charset that did not have it.
        return name[:at] + "?" + name[at + 1 :]
    if luck < 0.05:
        return f" {name[0]}\u3000{name[1:]}"
    return name.translate(_TRADITIONAL) if luck < 0.06 else name


def _number(
    number: str | None, relative: str | None, luck: float, rng: np.random.Generator
) -> str | None:
    if number is None or luck < 0.02:
        return None
    if luck < 0.03:  # One digit is wrong.
        at = int(rng.integers(17))
        return number[:at] + str((int(number[at]) + 1) % 10) + number[at + 1 :]
    if luck < 0.035:
        return relative
    if luck < 0.04:
        return "111111111111111111"
    if luck < 0.05:
        return f"{number.lower()} ".translate(_FULL_WIDTH)
    return number


def _other(character: str, rng: np.random.Generator) -> str:
    chosen = _WRONG[int(rng.integers(len(_WRONG)))]
    return chosen if chosen != character else "鑫"
