"""Parsers of database text, held against Python's own."""

import datetime
import decimal
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.parse_text import (
    parse_bool,
    parse_date,
    parse_decimal,
    parse_int,
    parse_time,
    parse_zone,
    scale_decimal,
)

UTC = datetime.UTC
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
no_deadline = settings(deadline=None)  # A first call compiles.
NOISE = st.text("0123456789+-.eE :TZ/", max_size=32) | st.text(max_size=8)
PLAIN_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def texts(values) -> pa.Array:
    return pa.array(values, pa.utf8())


def one(parsed) -> tuple[object, bool]:
    array, bad = parsed
    array.validate(full=True)
    return array[0].as_py(), bool(bad[0])


def canonical(number: decimal.Decimal) -> str:
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


@no_deadline
@given(st.integers() | st.integers(-(2**63) - 2, -(2**63) + 2) | st.integers(2**63 - 2, 2**63 + 2))
def test_int_is_pythons_within_64_bits(number):
    fits = -(2**63) <= number < 2**63
    assert one(parse_int(texts([str(number)]))) == (number if fits else None, not fits)


@no_deadline
@given(NOISE)
def test_int_refuses_what_is_no_int(text):
    good = re.fullmatch(r"[+-]?\d+", text, re.ASCII) and abs(int(text)) < 2**63
    assert one(parse_int(texts([text]))) == ((int(text), False) if good else (None, True))


@pytest.mark.parametrize(
    ("text", "value"),
    [("t", True), ("f", False), ("true", True), ("false", False), ("1", True), ("0", False)],
)
def test_bool(text, value):
    assert one(parse_bool(texts([text]))) == (value, False)


@pytest.mark.parametrize("text", ["", "T", "yes", "2", "tru", "tru3", "falsey", "null"])
def test_bool_refuses(text):
    assert one(parse_bool(texts([text]))) == (None, True)


@no_deadline
@given(st.dates())
def test_date_is_pythons(day):
    assert one(parse_date(texts([day.isoformat()]))) == (day, False)


@no_deadline
@given(NOISE | st.from_regex(r"\d{4}-\d\d-\d\d", fullmatch=True))
def test_date_refuses_what_python_refuses(text):
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        day = None
    if day and day.isoformat() != text:
        day = None  # Python also takes 20261123 and weeks.
    assert one(parse_date(texts([text]))) == (day, day is None)


@no_deadline
@given(
    st.integers(-62_135_500_000_000_000, 253_402_200_000_000_000),
    st.integers(-15 * 60, 15 * 60),
    st.sampled_from(" T"),
)
def test_time_is_pythons(microseconds, minutes, separator):
    moment = EPOCH + datetime.timedelta(microseconds=microseconds)
    zone = datetime.timezone(datetime.timedelta(minutes=minutes))
    text = moment.astimezone(zone).isoformat(sep=separator)
    assert one(parse_time(texts([text]))) == (moment, False)


MOMENT = datetime.datetime(2026, 11, 23, 16, 0, 29, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-11-23 16:00:29+00", MOMENT),
        ("2026-11-23 16:00:29.5+00", MOMENT.replace(microsecond=500_000)),
        ("2026-11-23 16:00:29.000001+00", MOMENT.replace(microsecond=1)),
        ("2026-11-24 00:00:29+08", MOMENT),
        ("2026-11-23 21:30:29+05:30", MOMENT),
        ("2026-11-23 12:30:29-0330", MOMENT),
        ("2026-11-23T16:00:29Z", MOMENT),
        # Shanghai before 1901 is local mean time, and PostgreSQL prints its seconds.
        ("1900-01-01 00:00:00+08:05:43", datetime.datetime(1899, 12, 31, 15, 54, 17, tzinfo=UTC)),
        ("0001-01-01 00:00:00+00", datetime.datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31 23:59:59.999999+00", datetime.datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_time_of_postgresql(text, value):
    assert one(parse_time(texts([text]))) == (value, False)


@pytest.mark.parametrize(
    "text",
    [
        "infinity",
        "-infinity",
        "",
        "2026-11-23",
        "2026-11-23 16:00:29",  # No zone, and none was given.
        "2026-11-23 16:00:29+00 BC",
        "2026-11-23 16:00:29.+00",
        "2026-11-23 16:00:29.1234567+00",
        "2026-11-23 24:00:00+00",
        "2026-11-23 16:60:00+00",
        "2026-11-23 16:00:60+00",
        "2026-02-29 16:00:00+00",
        "2026-13-01 16:00:00+00",
        "2026-11-23 16:00:29+16",
        "2026-11-23 16:00:29+8",
        "2026-11-23 16:00:29+08:6",
        "2026-11-23_16:00:29+00",
        "2026-11-23 16:00:2é+00",
        "10000-01-01 00:00:00+00",
        "0001-01-01 00:00:00+08",  # Before year 1 in UTC.
        "9999-12-31 23:59:59-01",
    ],
)
def test_time_refuses(text):
    assert one(parse_time(texts([text]))) == (None, True)


def test_time_without_a_zone_is_in_the_given_one():
    moments, bad = parse_time(texts(["2026-11-24 00:00:29", "2026-11-23 16:00:29Z"]), (), 28800)
    assert moments.to_pylist() == [MOMENT, MOMENT]
    assert not bad.any()


def test_days_that_differ_from_their_neighbours_are_read_anew():
    days = [
        f"{year}-{month:02d}-{day:02d}"
        for year in (2024, 2025)
        for month in (1, 2)
        for day in (1, 28, 29, 30, 31)
    ]
    moments, bad = parse_time(texts([f"{day} 01:02:03+00" for day in days]))
    dates, also_bad = parse_date(texts(days))
    assert [m and m.date() for m in moments.to_pylist()] == dates.to_pylist()
    assert bad.tolist() == also_bad.tolist()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20160305081500", datetime.datetime(2016, 3, 5, 0, 15, tzinfo=UTC)),
        ("2016.3.5", datetime.datetime(2016, 3, 4, 16, tzinfo=UTC)),
        ("2016/03/05 08:15:00.25", datetime.datetime(2016, 3, 5, 0, 15, 0, 250_000, tzinfo=UTC)),
        ("2016/03/05 08:15:00+00", datetime.datetime(2016, 3, 5, 8, 15, tzinfo=UTC)),
        ("0000-00-00", None),
        ("2016.3.5.", None),
        ("2016.3", None),
    ],
)
def test_formats_are_tried_in_order(text, value):
    formats = ("%Y%m%d%H%M%S", "%Y.%m.%d", "%Y/%m/%d %H:%M:%S%f%z")
    assert one(parse_time(texts([text]), formats, 28800)) == (value, value is None)


def test_date_by_format_drops_the_time():
    days, bad = parse_date(texts(["1980.3.5", "x", None, "1969.12.31"]), ("%Y.%m.%d",))
    assert days.to_pylist() == [datetime.date(1980, 3, 5), None, None, datetime.date(1969, 12, 31)]
    assert bad.tolist() == [False, True, False, False]


@no_deadline
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30))
def test_decimal_is_exact_and_canonical(number):
    assert one(parse_decimal(texts([str(number)]))) == (canonical(number), False)


@no_deadline
@given(NOISE | st.from_regex(PLAIN_DECIMAL, fullmatch=True))
def test_decimal_agrees_with_python(text):
    value, bad = one(parse_decimal(texts([text])))
    match = PLAIN_DECIMAL.fullmatch(text)
    if match is None or abs(int((match[2] or "e0")[1:])) > 400:
        assert bad
    else:
        with decimal.localcontext(prec=2000):
            assert (value, bad) == (canonical(decimal.Decimal(text)), False)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-", ".", "", "1e", "1e401", "1 ", "٣"])
def test_decimal_refuses(text):
    assert one(parse_decimal(texts([text]))) == (None, True)


def test_canonical_decimals_are_not_copied():
    array = texts(["1.5", None, "-20", "0"])
    assert parse_decimal(array)[0] is array


@no_deadline
@given(
    st.lists(
        st.tuples(
            st.decimals(allow_nan=False, allow_infinity=False, places=4) | st.none(),
            st.integers(1, 10**9),
            st.integers(0, 12),
        ),
        max_size=20,
    )
)
def test_scaling_is_exact(rows):
    array = texts([None if number is None else canonical(number) for number, _, _ in rows])
    mantissas = np.array([mantissa for _, mantissa, _ in rows], np.int64)
    scales = np.array([scale for _, _, scale in rows], np.int64)
    scaled = scale_decimal(array, mantissas, scales)
    scaled.validate(full=True)
    with decimal.localcontext(prec=2000):
        expected = [
            None if number is None else canonical(number * mantissa / decimal.Decimal(10) ** scale)
            for number, mantissa, scale in rows
        ]
    assert scaled.to_pylist() == expected


@no_deadline
@given(st.lists(st.none() | st.sampled_from(["1", "-2.50", "x", "t", "2026-01-02"])), st.data())
def test_a_slice_parses_like_a_copy(values, data):
    start = data.draw(st.integers(0, len(values)))
    part = texts(["7", *values]).slice(start)
    copy = texts(part.to_pylist())
    for parse in (parse_int, parse_bool, parse_date, parse_decimal, parse_time):
        sliced, bad = parse(part)
        whole, also_bad = parse(copy)
        assert sliced.equals(whole)
        assert bad.tolist() == also_bad.tolist()
        assert sliced.null_count == part.null_count + bad.sum()


@pytest.mark.parametrize(("text", "seconds"), [("+08:00", 28800), ("-03:30", -12600)])
def test_zone(text, seconds):
    assert parse_zone(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "+8", "+16:00", "+08:60", "Asia/Shanghai"])
def test_zone_refuses(text):
    with pytest.raises(ValueError, match="zone"):
        parse_zone(text)
