"""Invented people: plausible to every check, and nobody."""

import collections
import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.embedded.people import DISTRICTS, PHONE_PREFIX, People, check_digit

TODAY = datetime.date(2026, 11, 23)
# First two digits of every administrative division of GB/T 2260.
PROVINCES = {
    *range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55),
    *range(61, 66), 71, 81, 82, 83,
}  # fmt: skip


def people(seed: int) -> People:
    return People(np.random.default_rng(seed), TODAY)


@pytest.mark.parametrize(
    ("body", "digit"), [("11010519491231002", "X"), ("44052418800101001", "4")]
)
def test_check_digit_agrees_with_the_standards_examples(body, digit):
    assert check_digit(body) == digit


@given(st.integers(0, 2**32))
def test_identity_is_valid_and_agrees_with_birth_and_sex(seed):
    draw = people(seed)
    for _ in range(5):
        person = draw.person()
        if person.id_no is None:
            continue
        assert len(person.id_no) == 18
        assert check_digit(person.id_no[:17]) == person.id_no[17]
        assert person.id_no[6:14] == f"{person.birth_date:%Y%m%d}"
        assert int(person.id_no[16]) % 2 == (person.sex == "1")


def test_identity_numbers_belong_to_no_district():
    draw = people(1)
    for number in (draw.person().id_no for _ in range(500)):
        assert number is None or number[:6] in DISTRICTS
    assert not {int(district[:2]) for district in DISTRICTS} & PROVINCES
    assert not any(district.startswith("9") for district in DISTRICTS)  # Foreigners' numbers.


@given(st.integers(0, 2**32), st.integers(0, 80), st.integers(1, 15))
def test_ages_are_as_asked(seed, youngest, years):
    ages = (youngest, youngest + years)
    assert ages[0] <= people(seed).person(ages=ages).age(TODAY) < ages[1]


def test_same_seed_same_people():
    first, second, other = people(7), people(7), people(8)
    some = [first.person() for _ in range(50)]
    assert some == [second.person() for _ in range(50)]
    assert some != [other.person() for _ in range(50)]


def test_people_are_distributed_as_in_china():
    draw = people(2)
    some = [draw.person() for _ in range(20_000)]
    share = collections.Counter(person.name[0] for person in some)
    assert 0.06 < share["王"] / len(some) < 0.09
    assert 0.06 < share["李"] / len(some) < 0.09
    assert any(person.name.startswith("欧阳") for person in some)
    assert 0.48 < sum(person.sex == "1" for person in some) / len(some) < 0.54

    typed = [person for person in some if person.abo]
    groups = collections.Counter(person.abo for person in typed)
    shares = {group: count / len(typed) for group, count in groups.items()}
    assert shares == pytest.approx({"A": 0.30, "B": 0.27, "O": 0.34, "AB": 0.09}, abs=0.02)
    assert 0.001 < sum(person.rh == "-" for person in typed) / len(typed) < 0.006

    phones = [person.phone for person in some if person.phone]
    assert all(len(phone) == 11 and phone.startswith(PHONE_PREFIX) for phone in phones)
    assert all(len(person.name) <= 50 for person in some)


def test_some_names_are_beyond_gbk():
    draw = people(3)
    names = [draw.person().name for _ in range(5000)]

    def fits_gbk(name: str) -> bool:
        try:
            return bool(name.encode("gbk"))
        except UnicodeEncodeError:
            return False

    rare = [name for name in names if not fits_gbk(name)]
    assert 0.001 < len(rare) / len(names) < 0.01
    assert all(name.encode("gb18030").decode("gb18030") == name for name in rare)


def test_somebody_without_papers_has_no_number():
    draw = people(4)
    unknown = [draw.unidentified() for _ in range(200)]
    assert all(p.name.startswith("无名氏") and p.id_no is None for p in unknown)
    assert {p.sex for p in unknown} == {"0", "1", "2"}
