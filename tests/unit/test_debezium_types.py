"""Every type of every connector: null, extremes and bad values, with the text that they become."""

import base64
import datetime
import decimal
import hashlib
import json
import uuid

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.errors import ConfigError
from schemas.mappings import load_mapping
from schemas.positions import START
from tests.debezium_events import (
    CONNECTORS,
    PLACEHOLDER,
    Topic,
    decimal_field,
    dump,
    field,
    unscaled,
    variable_field,
)
from transforms import parse_text
from transforms.capture.debezium.connect_types import encoding_of
from transforms.capture.debezium.decimals import float_text
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.encodings import Ambiguous, column_text, text_of
from transforms.capture.debezium.hints import TableSpec, encoding_of_hint, table_specs
from transforms.capture.debezium.record import unwrapped

TABLE = "his.t"
TIME, KAFKA = "io.debezium.time.", "org.apache.kafka.connect.data."
BAD = "bad_value"
_I64 = 2**63
ALL = CONNECTORS
PG, MY, ORA, MS = ("postgresql",), ("mysql", "mariadb"), ("oracle",), ("sqlserver",)


def named(kind: str, name: str, **parameters: str) -> dict:
    return field("c", kind, name, parameters=parameters)


def array(kind: str, name: str | None = None) -> dict:
    item = {"type": kind, "optional": True} | ({"name": name, "version": 1} if name else {})
    return field("c", "array", items=item)


# Connectors, the column's Connect schema, and JSON value to text.
TYPES = [
    (ALL, field("c", "string"), {"": "", "血钾 6.8": "血钾 6.8", "\0": "\0", 5: BAD, True: BAD}),
    (MY, named("string", "io.debezium.data.Enum", allowed="I,II"), {"II": "II", "": ""}),
    (MY, named("string", "io.debezium.data.EnumSet", allowed="a,b"), {"a,b": "a,b", "": ""}),
    (PG + MY, named("string", "io.debezium.data.Json"), {'{"a": 1}': '{"a": 1}', "": ""}),
    (PG, named("string", "io.debezium.data.Uuid"), {"0190a6b2": "0190a6b2"}),
    (PG + MS, named("string", "io.debezium.data.Xml"), {"<a/>": "<a/>"}),
    (ALL, field("c", "boolean"), {True: "t", False: "f", 2: BAD, "true": BAD}),
    (MS, field("c", "int16"), {0: "0", 255: "255"}),
    (ALL, field("c", "int8"), {-128: "-128", 127: "127", True: BAD}),
    (ALL, field("c", "int16"), {-32768: "-32768", "1": BAD}),
    (ALL, field("c", "int32"), {2**31 - 1: "2147483647", 1.5: BAD}),
    (ALL, field("c", "int64"), {-_I64: str(-_I64), _I64 - 1: str(_I64 - 1), _I64: str(_I64)}),
    (ALL, field("c", "float"), {1.5: "1.5", 0.1: "0.1", 1e7: "1e+07", "NaN": "NaN", "x": BAD}),
    (ALL, field("c", "double"), {-2.25e-07: "-2.25e-07", 1e14: "100000000000000", 1e15: "1e+15"}),
    (ALL, field("c", "double"), {"Infinity": "Infinity", 0.0: "0", 12: "12", True: BAD}),
    (ALL, decimal_field("c", 4), {"AQmg": "6.8000", "7Hg=": "-0.5000", "AA==": "0.0000"}),
    (ALL, decimal_field("c", 4), {"": BAD, "!": BAD, "AQm": BAD, True: BAD, 6.8: "6.8"}),
    (ALL, decimal_field("c", 0), {"AP//////////": str(2**64 - 1), "/w==": "-1"}),
    (
        PG + MS,
        decimal_field("c", 2),
        {"BNI=": "12.34", unscaled(-(10**37)): "-1" + "0" * 35 + ".00"},
    ),
    (ORA, decimal_field("c", -3), {"BQ==": "5000", "+w==": "-5000"}),
    (ORA, decimal_field("c", 999), {"BQ==": BAD}),
    (ALL, field("c", "bytes"), {"AP8Q": "\\x00ff10", "": "\\x", "%": BAD, 1: BAD}),
    (ALL, named("int32", TIME + "Date"), {0: "1970-01-01", -719162: "0001-01-01"}),
    (ALL, named("int32", TIME + "Date"), {2932896: "9999-12-31", 2932897: BAD, -719163: BAD}),
    (PG, named("int32", TIME + "Date"), {-2147472692: BAD}),
    (ALL, named("int32", KAFKA + "Date"), {20513: "2026-03-01", "2026": BAD}),
    (ALL, named("int32", TIME + "Time"), {30600500: "08:30:00.5", 0: "00:00:00"}),
    (ALL, named("int32", KAFKA + "Time"), {86399999: "23:59:59.999"}),
    (ALL, named("int64", TIME + "MicroTime"), {86399999999: "23:59:59.999999"}),
    (MY, named("int64", TIME + "MicroTime"), {-3020399000000: "-838:59:59"}),
    (MY, named("int64", TIME + "MicroTime"), {3020399000000: "838:59:59", -1: "-00:00:00.000001"}),
    (MS, named("int64", TIME + "NanoTime"), {30600123456700: "08:30:00.123456"}),
    (ALL, named("int64", TIME + "Timestamp"), {1772353800250: "2026-03-01 08:30:00.25"}),
    (ALL, named("int64", TIME + "Timestamp"), {-1: "1969-12-31 23:59:59.999", "1": BAD}),
    (ALL, named("int64", TIME + "Timestamp"), {-62135596800000: "0001-01-01 00:00:00"}),
    (ALL, named("int64", TIME + "Timestamp"), {253402300799999: "9999-12-31 23:59:59.999"}),
    (ALL, named("int64", TIME + "Timestamp"), {253402300800000: BAD, -62135596800001: BAD}),
    (ALL, named("int64", KAFKA + "Timestamp"), {1772353800000: "2026-03-01 08:30:00"}),
    (PG, named("int64", TIME + "MicroTimestamp"), {9223372036825200000: BAD}),
    (
        ALL,
        named("int64", TIME + "MicroTimestamp"),
        {1772353800123456: "2026-03-01 08:30:00.123456"},
    ),
    (
        ALL,
        named("int64", TIME + "NanoTimestamp"),
        {1772353800123456789: "2026-03-01 08:30:00.123456"},
    ),
    (ALL, named("int64", TIME + "NanoTimestamp"), {-1: "1969-12-31 23:59:59.999999"}),
    (
        ALL,
        named("string", TIME + "ZonedTimestamp"),
        {"2026-03-01T00:30:00.1Z": "2026-03-01 00:30:00.1+00"},
    ),
    (
        MS + ORA,
        named("string", TIME + "ZonedTimestamp"),
        {
            "2026-03-01T08:30:00.1234567+08:00": "2026-03-01 08:30:00.123456+08",
            "2026-03-01T08:30:00+05:30": "2026-03-01 08:30:00+05:30",
            "2026-03-01T08:30Z": "2026-03-01 08:30:00+00",
            "2026-03-01T08:30:00.500Z": "2026-03-01 08:30:00.5+00",
            "yesterday": BAD,
            "2026-03-01T08:30:00.": BAD,
            5: BAD,
        },
    ),
    (PG, named("string", TIME + "ZonedTimestamp"), {"infinity": "infinity"}),
    (PG, named("string", TIME + "ZonedTime"), {"00:30:00.123456Z": "00:30:00.123456+00"}),
    (PG, named("string", TIME + "ZonedTime"), {"08:30:00-03:30": "08:30:00-03:30", "8": BAD}),
    (ALL, named("string", TIME + "IsoDate"), {"2026-03-01Z": "2026-03-01", "-5877611-06-21Z": BAD}),
    (ALL, named("string", TIME + "IsoTime"), {"08:30:00.5Z": "08:30:00.5"}),
    (
        ALL,
        named("string", TIME + "IsoTimestamp"),
        {"2026-03-01T08:30:00.25Z": "2026-03-01 08:30:00.25"},
    ),
    (PG, named("string", TIME + "IsoTimestamp"), {"+294247-01-10T04:00:25.2Z": BAD}),
    (MY, named("int32", TIME + "Year"), {2026: "2026", 1900: "1900"}),
    (PG + ORA, named("string", TIME + "Interval"), {"P1Y2M3DT4H5M6.789S": "P1Y2M3DT4H5M6.789S"}),
    (PG + ORA, named("int64", TIME + "MicroDuration"), {37091106789000: "10303:05:06.789"}),
    (PG + ORA, named("int64", TIME + "NanoDuration"), {-86400000000000: "-24:00:00"}),
    (PG + MY, named("bytes", "io.debezium.data.Bits", length="12"), {"AQo=": "101000000001"}),
    (PG + MY, named("bytes", "io.debezium.data.Bits", length="12"), {"": "0" * 12, "AAD/": BAD}),
    (ALL, named("string", "some.vendor.Unknown"), {"x": "x"}),
]
CASES = [
    pytest.param(
        connector,
        schema,
        value,
        text,
        id=f"{connector}-{schema.get('name') or schema['type']}-{value!r}"[:80],
    )
    for connectors, schema, values in TYPES
    for connector in connectors
    for value, text in [*values.items(), (None, None)]
]
ARRAYS = [
    (array("int32"), [1, None, -3], "{1,NULL,-3}"),
    (array("int32"), [], "{}"),
    (array("string"), ["a,b", None, 'c"d', "", "null", "x"], '{"a,b",NULL,"c\\"d","","null",x}'),
    (array("int32", TIME + "Date"), [0], "{1970-01-01}"),
    (array("int32"), ["x"], BAD),
    (array("int32"), 5, BAD),
    (field("c", "map"), {"a": "b"}, '{"a":"b"}'),
    (
        field("c", "struct", "io.debezium.data.geometry.Point"),
        {"x": 1.50, "y": 2},
        '{"x":1.5,"y":2}',
    ),
    (variable_field("c"), {"scale": 1, "value": "AIA="}, "12.8"),
    (variable_field("c"), {"scale": -2, "value": "AQ=="}, "100"),
    (variable_field("c"), {"scale": 400, "value": "AQ=="}, "0." + "0" * 399 + "1"),
    (variable_field("c"), {"scale": 401, "value": "AQ=="}, BAD),
    (variable_field("c"), {"scale": 10**9, "value": "AQ=="}, BAD),
    (variable_field("c"), {"scale": "1", "value": "AQ=="}, BAD),
    (variable_field("c"), {"value": "AQ=="}, BAD),
    (variable_field("c"), {"scale": 1, "value": None}, BAD),
    (variable_field("c"), 7, BAD),
]


def decode_one(connector: str, schema: dict, value) -> str | None:
    """Returns the text that a value becomes on its way through a whole event, or a reason."""
    topic = Topic(connector, {TABLE: [field("id", "int32"), schema]}, {TABLE: ("id",)})
    for i in (1, 2):
        topic.change("c", TABLE, None, {"id": i, "c": value})
    decoder = DebeziumDecoder(100, 1 << 20, START, {TABLE: TableSpec(("id",))})
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    assert raw.captured == 2
    if raw.rejects:
        assert {reject.column for reject in raw.rejects} == {"c"}
        assert not raw.tables
        return raw.rejects[0].reason
    first, second = raw.tables[TABLE]["c"].to_pylist()
    assert first == second
    return first


@pytest.mark.parametrize(("connector", "schema", "value", "text"), CASES)
def test_every_type_has_its_text(connector, schema, value, text):
    assert decode_one(connector, schema, value) == text


@pytest.mark.parametrize(("schema", "value", "text"), ARRAYS)
def test_nested_types_have_their_text(schema, value, text):
    assert decode_one("postgresql", schema, value) == text
    assert decode_one("postgresql", schema, None) is None


@pytest.mark.parametrize(("connectors", "schema", "values"), TYPES)
def test_a_column_reads_as_its_values_do(connectors, schema, values):
    """The way for whole columns and the way for single values agree, or it leaves it to that."""
    encoding = encoding_of(schema)
    good = [v for v, text in values.items() if text != BAD]
    for column in (good, [*good, None], [None, None], [*values, None], []):
        taken = column_text(encoding, unwrapped(dump(column)))
        if taken is not None:
            values = unwrapped(dump(column))
            assert taken.to_pylist() == [text_of(encoding, value) for value in values]


PLACEHOLDERS = [
    (field("c", "string"), PLACEHOLDER),
    (field("c", "bytes"), base64.b64encode(PLACEHOLDER.encode()).decode()),
    (field("c", "string"), PLACEHOLDER.encode().hex()),
    (decimal_field("c", 4), base64.b64encode(PLACEHOLDER.encode()).decode()),
    (array("string"), [PLACEHOLDER]),
    (array("bytes"), [base64.b64encode(PLACEHOLDER.encode()).decode()]),
    (array("int32"), list(PLACEHOLDER.encode())),
    (array("string", "io.debezium.data.Uuid"), ["fe82e0d6-8a9e-3b0b-8c5c-6c9a2c3f1d2e"]),
    (field("c", "map"), {PLACEHOLDER: PLACEHOLDER}),
    (named("string", "io.debezium.data.Json"), PLACEHOLDER),
    (variable_field("c"), {"scale": 0, "value": base64.b64encode(PLACEHOLDER.encode()).decode()}),
]


def _name_based_uuid() -> str:
    digest = hashlib.md5(PLACEHOLDER.encode(), usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest, version=3))


@pytest.mark.parametrize(("schema", "value"), PLACEHOLDERS)
def test_a_placeholder_is_no_value(schema, value):
    """Trap 8 and 9: unchanged in an update, filled from a whole old row, refused in an insert."""
    if schema.get("items", {}).get("name"):
        value = [_name_based_uuid()]
    topic = Topic("postgresql", {TABLE: [field("id", "int32"), schema]}, {TABLE: ("id",)})
    topic.change("u", TABLE, None, {"id": 1, "c": value})
    topic.change("u", TABLE, {"id": 2, "c": value}, {"id": 2, "c": value})
    topic.change("c", TABLE, None, {"id": 3, "c": value})
    topic.change("u", TABLE, {"id": 4, "c": None}, {"id": 4, "c": None})
    decoder = DebeziumDecoder(100, 1 << 20, START, {TABLE: TableSpec(("id",))})
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    rows = raw.tables[TABLE].to_pylist()
    assert [(row["id"], row["c"], row["_unchanged"]) for row in rows] == [
        ("1", None, 2),
        ("2", None, 2),
        ("4", None, 0),
    ]
    (reject,) = raw.rejects
    assert (reject.reason, reject.column, reject.row) == ("partial_row", "c", {"id": "3"})


def test_an_unavailable_value_comes_from_the_old_row():
    fields = {TABLE: [field("id", "int32"), field("c", "bytes"), field("t", "string")]}
    coded = base64.b64encode(PLACEHOLDER.encode()).decode()
    topic = Topic("postgresql", fields, {TABLE: ("id",)})
    before = {"id": 1, "c": "AP8Q", "t": "old"}
    topic.change("u", TABLE, before, {"id": 1, "c": coded, "t": PLACEHOLDER})
    decoder = DebeziumDecoder(100, 1 << 20, START, {TABLE: TableSpec(("id",))})
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    (row,) = raw.tables[TABLE].to_pylist()
    assert (row["c"], row["t"], row["_unchanged"]) == ("\\x00ff10", "old", 0)


def test_another_placeholder_can_be_configured():
    topic = Topic("oracle", {TABLE: [field("id", "int32"), field("c", "string")]}, {TABLE: ("id",)})
    topic.change("u", TABLE, None, {"id": 1, "c": "(none)"})
    specs = {TABLE: TableSpec(("id",))}
    decoder = DebeziumDecoder(100, 1 << 20, START, specs, unavailable="(none)")
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    assert raw.tables[TABLE]["_unchanged"].to_pylist() == [2]


def test_a_value_that_nobody_reads_refuses_no_row():
    fields = {TABLE: [field("id", "int32"), field("c", "int32", TIME + "Date")]}
    topic = Topic("postgresql", fields, {TABLE: ("id",)})
    topic.change("c", TABLE, None, {"id": 1, "c": -2147472692})
    decoder = DebeziumDecoder(100, 1 << 20, START, {TABLE: TableSpec(("id",), ("id",))})
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    assert raw.tables[TABLE].num_rows == 1
    assert not raw.rejects


# Without a schema.

MAPPING = load_mapping("postgresql_his")
NO_SCHEMA = [
    # Column of the packaged mapping, hints by kind, JSON value, text or reason.
    ("birth_date", {}, "2026-03-01", "2026-03-01"),
    ("birth_date", {}, "2026-03-01Z", "2026-03-01"),
    ("birth_date", {}, "2016.3.5", "2016.3.5"),
    ("birth_date", {}, 20513, "ambiguous_value"),
    ("birth_date", {"date": "days"}, 20513, "2026-03-01"),
    ("birth_date", {"date": "millis"}, 1772323200000, "2026-03-01 00:00:00"),
    ("birth_date", {"date": "days"}, "x", "bad_value"),
    ("updated_at", {}, 1772353800123, "ambiguous_value"),
    ("updated_at", {}, 1.5, "ambiguous_value"),
    ("updated_at", {}, "2026-03-01T00:30:00Z", "ambiguous_value"),
    ("updated_at", {}, "2026-03-01T08:30:00+08:00", "2026-03-01 08:30:00+08"),
    ("updated_at", {}, "2026-03-01 08:30:00", "2026-03-01 08:30:00"),
    ("updated_at", {"time": "zoned"}, "2026-03-01T00:30:00Z", "2026-03-01 00:30:00+00"),
    ("updated_at", {"time": "iso"}, "2026-03-01T08:30:00Z", "2026-03-01 08:30:00"),
    ("updated_at", {"time": "millis"}, 1772353800123, "2026-03-01 08:30:00.123"),
    ("updated_at", {"time": "micros"}, 1772353800123456, "2026-03-01 08:30:00.123456"),
    ("updated_at", {"time": "nanos"}, 1772353800123456789, "2026-03-01 08:30:00.123456"),
    ("name", {}, "张三", "张三"),
    ("name", {}, 7, "7"),
    ("name", {}, 7.10, "7.1"),
    ("name", {}, True, "t"),
    ("name", {}, {"scale": 1, "value": "AIA="}, "12.8"),
    ("name", {}, [1, {"a": None}], '[1,{"a":null}]'),
]
NUMBERS = [
    ({}, 6.80, "6.8"),
    ({}, 12345678901234567890123, "12345678901234567890123"),
    ({}, "6.80", "6.80"),
    ({}, "-1e5", "-1e5"),
    ({}, "1234", "ambiguous_value"),
    ({}, "BOI=", "ambiguous_value"),
    ({}, {"scale": 2, "value": "BNI="}, "12.34"),
    ({"decimal": "number"}, "1234", "1234"),
    ({"decimal": "decimal:2"}, "BNI=", "12.34"),
    ({"decimal": "decimal:2"}, "6.80", "bad_value"),
]


def plain_text(table: str, column: str, hints: dict, value) -> str | None:
    specs = table_specs(MAPPING, hints)
    spec = specs[table]
    row = dict.fromkeys(spec.columns) | {name: f"k{name}" for name in spec.key}
    topic = Topic("postgresql", {table: []}, {table: spec.key}, schemas=False)
    topic.change("c", table, None, row | {column: value})
    decoder = DebeziumDecoder(100, 1 << 20, START, specs)
    (raw,) = decoder.feed(topic.records) + decoder.flush()
    if raw.rejects:
        assert raw.rejects[0].column == column
        return raw.rejects[0].reason
    return raw.tables[table][column][0].as_py()


@pytest.mark.parametrize(("column", "hints", "value", "text"), NO_SCHEMA)
def test_without_a_schema_mapping_and_hints_tell_the_type(column, hints, value, text):
    assert plain_text("his.patient", column, {"*": hints}, value) == text
    assert plain_text("his.patient", column, {"*": hints}, None) is None


@pytest.mark.parametrize(("hints", "value", "text"), NUMBERS)
def test_without_a_schema_a_number_must_be_told_from_base64(hints, value, text):
    assert plain_text("lis.result", "val_num", {"*": hints}, value) == text


def test_a_column_s_own_hint_counts_first():
    hints = {"*": {"time": "zoned"}, "his.patient": {"updated_at": "micros"}}
    assert plain_text("his.patient", "updated_at", hints, 0) == "1970-01-01 00:00:00"


def test_hints_by_name():
    texts = {
        "hex": ("00FF", "\\x00ff"),
        "base64": ("AP8Q", "\\x00ff10"),
        "bits:4": ("Cg==", "1010"),
    }
    texts |= {"millis_of_day": (500, "00:00:00.5"), "zoned_time": ("08:30:00Z", "08:30:00+00")}
    texts |= {
        "iso_time": ("08:30:00Z", "08:30:00"),
        "json": ({"a": 1}, '{"a":1}'),
        "text": (5, "5"),
    }
    texts |= {"seconds": (60, "1970-01-01 00:01:00"), "float": (1e20, "1e+20")}
    for hint, (value, text) in texts.items():
        assert text_of(encoding_of_hint(hint), unwrapped(dump(value))) == text, hint


@pytest.mark.parametrize(
    "hints",
    [
        {"his.nothing": {"a": "days"}},
        {"his.patient": {"nothing": "days"}},
        {"his.patient": {"birth_date": "fortnights"}},
        {"*": {"day": "days"}},
        {"*": {"date": "decimal:x"}},
    ],
)
def test_a_wrong_hint_is_refused_with_its_remedy(hints):
    with pytest.raises(ConfigError, match="Remedy"):
        table_specs(MAPPING, hints)


# Properties.

_DIGITS = st.integers(-(10**38), 10**38)


@hypothesis.given(_DIGITS, st.integers(-40, 60))
def test_a_decimal_survives(number, scale):
    text = text_of(encoding_of(variable_field("c")), {"scale": scale, "value": unscaled(number)})
    with decimal.localcontext(prec=200):
        assert decimal.Decimal(text) == decimal.Decimal(number).scaleb(-scale)
    fixed = text_of(encoding_of(decimal_field("c", scale)), unscaled(number))
    assert fixed == text


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_double_survives(number):
    text = float_text(json.dumps(number), 15)
    assert float(text) == number
    assert float_text(text, 15) == text


@hypothesis.given(st.lists(st.one_of(st.none(), st.datetimes()), min_size=1))
def test_times_survive(times):
    epoch = datetime.datetime.fromisoformat("1970-01-01")
    one = datetime.timedelta(microseconds=1)
    us = [None if time is None else (time - epoch) // one for time in times]
    for name, unit in (("MicroTimestamp", 1), ("Timestamp", 1000)):
        encoding = encoding_of(named("int64", TIME + name))
        values = [None if value is None else value // unit for value in us]
        column = column_text(encoding, values)
        assert column.to_pylist() == [text_of(encoding, value) for value in values]
        parsed, bad = parse_text.parse_time(column, (), 0)
        assert not bad.any()
        expected = [None if value is None else value * unit for value in values]
        assert parsed.cast("int64").to_pylist() == expected


@hypothesis.given(st.lists(st.one_of(st.none(), st.integers(-719162, 2932896)), min_size=1))
def test_dates_survive(days):
    encoding = encoding_of(named("int32", TIME + "Date"))
    column = column_text(encoding, days)
    assert column.to_pylist() == [text_of(encoding, day) for day in days]
    parsed, bad = parse_text.parse_date(column)
    assert not bad.any()
    assert parsed.cast("int32").to_pylist() == days


@hypothesis.given(st.binary())
def test_bytes_survive(raw):
    text = text_of(encoding_of(field("c", "bytes")), base64.b64encode(raw).decode())
    assert bytes.fromhex(text.removeprefix("\\x")) == raw


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@hypothesis.given(
    _JSON, st.sampled_from([schema for _, schema, _ in TYPES] + [a[0] for a in ARRAYS])
)
def test_no_value_does_more_than_refuse_its_row(value, schema):
    encoding = encoding_of(schema)
    try:
        text = text_of(encoding, value)
        assert (text is None) == (value is None)
    except Ambiguous:
        raise AssertionError("a schema leaves no doubt") from None
    except ValueError:
        pass
    column_text(encoding, [value, None, value])
