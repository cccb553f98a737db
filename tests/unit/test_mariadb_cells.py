"""Cells of row images as text: every type from recorded bytes, and any value of some by rule."""

import datetime
import decimal
import struct

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.binlog_bytes import CHARSETS, Col, Log, packets_of
from tests.mariadb_types import NULL
from tests.record_mariadb_types import BEGIN, RECORDED, read_recording
from transforms.capture.mariadb.decode import BinlogDecoder
from transforms.capture.mariadb.floats import float_texts

# Collations of the server that the recording is of, as far as it has them.
COLLATIONS = (
    CHARSETS | dict.fromkeys((33, 2048), "utf8mb3") | dict.fromkeys((46, 224, 2304), "utf8mb4")
)
COLLATIONS |= {1: "big5", 11: "ascii", 13: "sjis", 24: "gb2312", 51: "cp1251"}
COLLATIONS |= {54: "utf16", 60: "utf32", 2560: "ucs2", 2816: "utf16", 3072: "utf32"}


def recorded() -> dict[tuple[str, str], str | None]:
    decoder = BinlogDecoder(10_000, 1 << 24, BEGIN, "binlog", COLLATIONS)
    found = {}
    for batch in decoder.feed(packets_of(read_recording())) + decoder.flush():
        assert not batch.rejects
        for name, rows in batch.tables.items():
            found |= {(name, row["k"]): row["v"] for row in rows.to_pylist()}
    return found


@pytest.fixture(scope="module")
def found():
    return recorded()


@pytest.mark.parametrize("number", range(len(RECORDED)), ids=lambda i: RECORDED[i].type[:40])
def test_every_type_as_a_server_logged_it(found, number):
    values = [text for _, text in [*RECORDED[number].values, NULL]]
    assert [found[f"his.t{number}", str(k)] for k in range(len(values))] == values


def texts_of(column: Col, cells: list[bytes]) -> list[str | None]:
    """What cells of one column become; None for one that is refused."""
    made = Log().rotate(1, 256).format().gtid()
    columns = [Col("k", 3), column]
    made.table(1, "his.T", columns)
    for k, cell in enumerate(cells):
        body = struct.pack("<IHHB", 1, 0, 1, 2) + b"\x03\x00" + struct.pack("<i", k) + cell
        made.event(23, body, False)
    decoder = BinlogDecoder(10_000, 1 << 24, BEGIN, "binlog", CHARSETS, {"his.T": ["k"]})
    (batch,) = decoder.feed(packets_of(made.xid().packets)) + decoder.flush()
    assert batch.captured == len(cells)
    texts: list[str | None] = [None] * len(cells)
    for row in batch.tables["his.T"].to_pylist() if batch.tables else ():
        texts[int(row["k"])] = row["v"]
    assert all(reject.column == "v" for reject in batch.rejects)
    return texts


@hypothesis.given(
    st.data(), st.sampled_from([(1, 1), (2, 2), (9, 3), (3, 4), (8, 8)]), st.booleans()
)
def test_any_integer(data, kind, unsigned):
    number, size = kind
    low, high = (0, 256**size - 1) if unsigned else (-(256**size) // 2, 256**size // 2 - 1)
    values = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=9))
    cells = [value.to_bytes(size, "little", signed=not unsigned) for value in values]
    assert texts_of(Col("v", number, unsigned=unsigned), cells) == list(map(str, values))


def decimal_cell(value: decimal.Decimal, precision: int, scale: int) -> bytes:
    """A decimal as the server packs it: nine digits in four bytes, the rest in as few."""
    sizes = (0, 1, 1, 2, 2, 3, 3, 4, 4, 4)
    digits = str(int(abs(value).scaleb(scale))).zfill(precision)
    whole, fraction = digits[: precision - scale], digits[precision - scale :]
    lead = len(whole) % 9
    groups = [whole[:lead], *[whole[i : i + 9] for i in range(lead, len(whole), 9)]]
    groups += [fraction[i : i + 9] for i in range(0, len(fraction), 9)]
    packed = bytearray(b"".join(int(g).to_bytes(sizes[len(g)], "big") for g in groups if g))
    packed[0] ^= 0x80
    return bytes(byte ^ 0xFF for byte in packed) if value < 0 else bytes(packed)


@hypothesis.given(st.data(), st.integers(1, 65))
def test_any_decimal(data, precision):
    scale = data.draw(st.integers(0, min(30, precision)))
    top = 10**precision - 1
    with decimal.localcontext(prec=80):
        values = [
            decimal.Decimal(n).scaleb(-scale)
            for n in data.draw(st.lists(st.integers(-top, top), min_size=1, max_size=6))
        ]
        cells = [decimal_cell(value, precision, scale) for value in values]
        expected = [f"{value:.{scale}f}" for value in values]
    column = Col("v", 246, bytes([precision, scale]))
    assert texts_of(column, cells) == expected


@hypothesis.given(st.lists(st.datetimes(), min_size=1, max_size=5))
def test_any_datetime(values):
    cells = []
    for v in values:
        day = ((v.year * 13 + v.month) << 5) | v.day
        clock = v.hour << 12 | v.minute << 6 | v.second
        cells.append(
            ((day << 17 | clock) + (1 << 39)).to_bytes(5, "big") + v.microsecond.to_bytes(3, "big")
        )
    expected = [v.isoformat(" ", "microseconds") for v in values]
    assert texts_of(Col("v", 18, b"\6"), cells) == expected


@hypothesis.given(
    st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=5), st.integers(0, 999_999)
)
def test_any_instant(seconds, micros):
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC).replace(tzinfo=None)
    cells = [s.to_bytes(4, "big") + micros.to_bytes(3, "big") for s in seconds]
    expected = [
        (epoch + datetime.timedelta(seconds=s, microseconds=micros)).isoformat(" ", "microseconds")
        + "+00"
        for s in seconds
    ]
    assert texts_of(Col("v", 17, b"\6"), cells) == expected


@hypothesis.given(
    st.booleans(),
    st.integers(0, 838),
    st.integers(0, 59),
    st.integers(0, 59),
    st.integers(0, 999_999),
)
def test_any_time(negative, hours, minutes, seconds, micros):
    value = (hours << 12 | minutes << 6 | seconds) << 24 | micros
    cell = ((1 << 47) + (-value if negative else value)).to_bytes(6, "big")
    sign = "-" if negative and value else ""
    expected = f"{sign}{hours:02}:{minutes:02}:{seconds:02}.{micros:06}"
    assert texts_of(Col("v", 19, b"\6"), [cell]) == [expected]


@hypothesis.given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_any_double_reads_back(values):
    texts = texts_of(Col("v", 5, b"\x08"), [struct.pack("<d", value) for value in values])
    assert [struct.pack("<d", float(text)) for text in texts] == [
        struct.pack("<d", value) for value in values
    ]


@hypothesis.given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_float_reads_back_in_few_digits(values):
    texts = texts_of(Col("v", 4, b"\x04"), [struct.pack("<f", value) for value in values])
    assert [np.float32(text) for text in texts] == [np.float32(value) for value in values]
    assert all(len(text) <= 15 for text in texts)


def test_floats_as_old_keys():
    columns = [Col("k", 5, b"\x08"), Col("v", 4, b"\x04")]
    made = Log().rotate(1, 256).format().gtid().table(1, "his.T", columns)
    images = b"".join(b"\0" + struct.pack("<df", k, v) for k, v in [(0.1, 1.5), (2.5, 0.1)])
    made.event(24, struct.pack("<IHHB", 1, 0, 1, 2) + b"\x03\x03" + images, False).xid()
    decoder = BinlogDecoder(100, 1 << 20, BEGIN, "binlog", CHARSETS, {"his.T": ["k"]})
    (batch,) = decoder.feed(packets_of(made.packets)) + decoder.flush()
    rows = [(r["k"], r["v"], r["_old.k"]) for r in batch.tables["his.T"].to_pylist()]
    assert rows == [("0.1", "1.5", None), ("2.5", "0.1", "0.1")]


BAD = [
    pytest.param(Col("v", 246, b"\x02\x00"), [b"\xff"], id="a decimal of too many digits"),
    pytest.param(Col("v", 18, b"\0"), [bytes(5)], id="a time before all times"),
    pytest.param(Col("v", 245, b"\4"), [b"\2\0\0\0{}"], id="MySQL's binary JSON"),
    pytest.param(Col("v", 140, b"\1"), [b"\2ab"], id="a compressed column"),
    pytest.param(
        Col("v", 254, b"\xf7\x01", labels=("a", "b")), [b"\3"], id="a label that is not in the list"
    ),
    pytest.param(
        Col("v", 254, b"\xf8\x01", labels=("a",)), [b"\2", b"\3"], id="a set of no such label"
    ),
    pytest.param(Col("v", 15, b"\x28\0", collation=99), [b"\2\xc4\xe3"], id="no such collation"),
    pytest.param(Col("v", 15, b"\x28\0", collation=45), [b"\2\xc4\xe3"], id="not UTF-8"),
    pytest.param(Col("v", 15, b"\x28\0", collation=35), [b"\2\xd8\0"], id="half a UCS-2 pair"),
]


@pytest.mark.parametrize(("column", "cells"), BAD)
def test_what_cannot_be_read_is_refused_by_column(column, cells):
    assert texts_of(column, cells) == [None] * len(cells)


def test_ascii_is_read_whatever_the_collation():
    column = Col("v", 15, b"\x28\0", collation=99)
    assert texts_of(column, [b"\2K+"]) == ["K+"]


def test_float_texts():
    bits = np.array([1.0, -0.5, 1e300], np.float64).view(np.int64)
    assert float_texts(bits, 8).to_pylist() == ["1", "-0.5", "1e+300"]
