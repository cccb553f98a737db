"""The binary COPY encoding: field by field against PostgreSQL's own reading of it."""

import decimal
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.deliver.merging.copy_binary import Wire, WireColumn, encode_rows, encode_text_array


def fields_of(column: WireColumn, rows: int) -> list[bytes | None]:
    """Returns the one field of each encoded row."""
    encoded = encode_rows([column], rows)
    fields = []
    for i in range(rows):
        row = encoded.data[encoded.offsets[i] : encoded.offsets[i + 1]].tobytes()
        count, length = struct.unpack_from(">hi", row)
        assert count == 1
        assert len(row) == 6 + max(length, 0)
        fields.append(None if length < 0 else row[6:])
    return fields


def numeric_of(field: bytes) -> decimal.Decimal:
    """Reads a binary numeric as PostgreSQL's numeric_recv does."""
    count, weight, sign, scale = struct.unpack_from(">hhHH", field)
    digits = struct.unpack_from(f">{count}h", field, 8)
    assert len(field) == 8 + 2 * count
    assert all(0 <= digit < 10_000 for digit in digits)
    value = sum(decimal.Decimal(digit).scaleb(4 * (weight - i)) for i, digit in enumerate(digits))
    value = decimal.Decimal(value)
    assert -value.as_tuple().exponent <= max(scale, 4 * count)
    return -value if sign == 0x4000 else value


@given(
    st.lists(
        st.none()
        | st.decimals(
            allow_nan=False, allow_infinity=False, places=12, min_value=-1e15, max_value=1e15
        )
        | st.integers(-(10**40), 10**40).map(decimal.Decimal),
        min_size=1,
    )
)
def test_numeric_is_exact(values):
    with decimal.localcontext(prec=80):
        texts = [None if value is None else format(value, "f") for value in values]
        array = pa.array(texts, pa.utf8())
        fields = fields_of(WireColumn(Wire.NUMERIC, array), len(values))
        for value, field in zip(values, fields, strict=True):
            assert (field is None) == (value is None)
            if value is not None:
                assert numeric_of(field) == value


@pytest.mark.parametrize(
    "text", ["", "-", ".5", "1.", "1e5", "NaN", "12a", "1 ", "--1", "1" * 99_999]
)
def test_what_is_no_decimal_becomes_a_numeric_that_the_server_refuses(text):
    (field,) = fields_of(WireColumn(Wire.NUMERIC, pa.array([text])), 1)
    assert struct.unpack(">hhHHh", field)[4] == 10_000


@given(st.lists(st.none() | st.text()), st.integers(0, 3))
def test_text_and_slices_of_it(values, skip):
    array = pa.array(values, pa.utf8())[skip:]
    wanted = [None if value is None else value.encode() for value in values[skip:]]
    assert fields_of(WireColumn(Wire.BYTES, array), len(array)) == wanted
    coded = array.dictionary_encode()
    assert fields_of(WireColumn(Wire.BYTES, coded), len(array)) == wanted


@given(st.lists(st.none() | st.binary(min_size=4, max_size=4)), st.integers(0, 3))
def test_fixed_binary(values, skip):
    array = pa.array(values, pa.binary(4))[skip:]
    assert fields_of(WireColumn(Wire.BYTES, array), len(array)) == values[skip:]


@pytest.mark.parametrize(
    ("wire", "kind", "value", "field"),
    [
        (Wire.INT8, pa.int64(), -2, struct.pack(">q", -2)),
        (Wire.INT4, pa.int32(), 7, struct.pack(">i", 7)),
        (Wire.BOOL, pa.bool_(), True, b"\1"),
        (Wire.DATE, pa.date32(), 10_957, struct.pack(">i", 0)),
        (Wire.DATE, pa.date32(), -(2**31), struct.pack(">i", -(2**31) + 1)),
        (Wire.TIMESTAMPTZ, pa.timestamp("us", "UTC"), 946_684_800_000_001, struct.pack(">q", 1)),
        (Wire.TIMESTAMPTZ, pa.timestamp("us", "UTC"), -(2**63), struct.pack(">q", -(2**63) + 1)),
    ],
)
def test_fixed_widths(wire, kind, value, field):
    raw = {Wire.DATE: pa.int32(), Wire.BOOL: pa.bool_()}.get(wire, pa.int64())
    array = pa.array([value, None], raw).cast(kind)
    assert fields_of(WireColumn(wire, array), 2) == [field, None]


def test_constants_and_rows_of_several_columns():
    columns = [
        WireColumn(Wire.CONSTANT, b"main"),
        WireColumn(Wire.INT4, np.array([1, 2], np.int32)),
        WireColumn(Wire.CONSTANT, None),
    ]
    encoded = encode_rows(columns, 2)
    first = encoded.data[: encoded.offsets[1]].tobytes()
    assert first == b"\0\3" + b"\0\0\0\4main" + b"\0\0\0\4\0\0\0\1" + b"\xff\xff\xff\xff"
    assert len(encoded) == 2


def test_no_rows():
    encoded = encode_rows([WireColumn(Wire.BYTES, pa.array([], pa.utf8()))], 0)
    assert len(encoded) == 0
    assert len(encoded.data) == 0


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 rows among 3"):
        encode_rows([WireColumn(Wire.INT8, pa.array([1, 2]))], 3)


def test_text_array():
    assert encode_text_array(pa.array(["a", "bc"])) == (
        struct.pack(">iiiii", 1, 0, 25, 2, 1) + b"\0\0\0\1a" + b"\0\0\0\2bc"
    )
