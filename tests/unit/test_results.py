"""What laboratories print, read: every form, and nothing guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.harmonise.results import read_range, read_result

MARKS = ("↑", "↓", "↑↑", "↓↓", "H", "L")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("6.80", ("6.80", None, None, None)),
        ("6.80↑", ("6.80", None, None, "↑")),
        ("6.80 ↑↑", ("6.80", None, None, "↑↑")),
        ("↓2.1", ("2.1", None, None, "↓")),
        ("7.2 H", ("7.2", None, None, "H")),
        ("*7.2", ("7.2", None, None, None)),
        ("-1.5", ("-1.5", None, None, None)),
        ("6．８↑", ("6.8", None, None, "↑")),
        ("\u30006.8 ", ("6.8", None, None, None)),
        ("<1.0", ("1.0", "<", "<1.0", None)),
        ("＜1.0", ("1.0", "<", "＜1.0", None)),
        ("≤0.5↓", ("0.5", "<=", "≤0.5↓", "↓")),
        (">= 200", ("200", ">=", ">= 200", None)),
        ("＞1000↑↑", ("1000", ">", "＞1000↑↑", "↑↑")),
        ("=5", ("5", None, None, None)),
        ("阴性(-)", (None, None, "阴性(-)", None)),
        ("阳性(+)", (None, None, "阳性(+)", None)),
        ("溶血", (None, None, "溶血", None)),
        ("见报告", (None, None, "见报告", None)),
        ("1+", (None, None, "1+", None)),
        ("+++", (None, None, "+++", None)),
        ("1:80", (None, None, "1:80", None)),
        ("1,250", (None, None, "1,250", None)),
        ("5.2 mmol/L", (None, None, "5.2 mmol/L", None)),
        ("3-5", (None, None, "3-5", None)),
        ("H", (None, None, "H", None)),
        ("阳性↑", (None, None, "阳性↑", None)),
        ("", (None, None, "", None)),
        ("6.8.1", (None, None, "6.8.1", None)),
    ],
)
def test_results(written, expected):
    assert read_result(written, MARKS, trim="*") == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("3.5-5.5", ("3.5", "5.5")),
        ("3.5～5.5", ("3.5", "5.5")),
        ("3.5~5.5", ("3.5", "5.5")),
        ("3.5--5.5", ("3.5", "5.5")),
        ("3.5 — 5.5", ("3.5", "5.5")),
        ("3.5－5.5", ("3.5", "5.5")),
        ("3.5至5.5", ("3.5", "5.5")),
        ("-2--1", ("-2", "-1")),
        ("-3-3", ("-3", "3")),
        ("<5.2", (None, "5.2")),
        ("≤5.2", (None, "5.2")),
        ("＜5.2", (None, "5.2")),
        (">60", ("60", None)),
        (">=60", ("60", None)),
        ("", (None, None)),
        ("阴性", (None, None)),
        ("阴性(-)", (None, None)),
        ("5.5-3.5", None),
        ("男:130-175 女:115-150", None),
        ("3.5", None),
        ("1:80", None),
    ],
)
def test_ranges(written, expected):
    assert read_range(written) == expected


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_itself(text):
    result = read_result(text, MARKS)
    assert (result.number is None) == (result.text == text and result.comparator is None)
    if result.number is not None:
        float(result.number)


@given(st.decimals(-1000, 1000, places=2), st.sampled_from(["", "<", ">", "≤", "≥"]))
def test_numbers_come_back(number, sign):
    result = read_result(f"{sign}{number}")
    assert result.number == str(number)
    assert (result.comparator is None) == (sign == "")


@given(st.decimals(-1000, 1000, places=2), st.decimals(-1000, 1000, places=2))
def test_ranges_come_back(one, other):
    low, high = sorted((one, other))
    assert read_range(f"{low}-{high}") == (str(low), str(high))
