"""The wire form of change batches: golden bytes, zero copies, and a seal that notices."""

import dataclasses
import datetime
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from apache_beam import coders
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.batches import ChangeBatch, DeadLetter, Lane, ManifestEntry, Op
from schemas.errors import SealBrokenError, WireFormatError
from schemas.positions import SEQ_END, Position
from schemas.wire import ChangeBatchCoder, seal, verify
from tests.canonical import rows_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "change_batch_v1.bin"
CODER = ChangeBatchCoder()
LETTERS = (
    DeadLetter("id1", "lis.result", 5, 2, 73, 9, "bad_time", "result_at", "key1", b"\0sealed\xff"),
    DeadLetter("id2", "lis.result", 5, 3, 85, 9, "bad_int", "line_no", "key1", b""),
)


def example() -> ChangeBatch:
    patients = [
        {"name": "王小东", "_prev_id": "0"},
        {"_op": int(Op.DELETE), "_digest": None},
        {"unchanged": ["name"], "_digest": bytes(range(32))},
    ]
    return ChangeBatch(
        link="main>primary",
        lane=Lane.EMERGENCY,
        begin=Position(1, SEQ_END),
        end=Position(5, 3),
        captured=7,
        commit_us_max=11,
        watermark_us=10,
        read_us=12,
        tables={
            "patient": rows_of("patient", patients),
            "lab_result": rows_of("lab_result", [{"value": "6.8", "critical": True}]),
        },
        dead=LETTERS,
        holds=(("his.visit", Position(4, 1)),),
        sweeps=(("his.patient", Position(3, SEQ_END)),),
        manifest=(ManifestEntry("patient", 0, 3, bytes(range(32))),),
        escalations=(("P1", "E6", 5, 1, True),),
    )


def assert_same(first: ChangeBatch, second: ChangeBatch) -> None:
    assert list(first.tables) == list(second.tables)
    for name, rows in first.tables.items():
        second.tables[name].validate(full=True)
        assert rows.schema.equals(second.tables[name].schema)
        assert rows.equals(second.tables[name])
    assert dataclasses.replace(first, tables={}) == dataclasses.replace(second, tables={})


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_round_trip(compression):
    batch = seal(example())
    decoded = CODER.decode(ChangeBatchCoder(compression).encode(batch))
    assert_same(batch, decoded)
    assert type(decoded.begin) is Position
    verify(decoded)


def test_empty_batch_is_exactly_these_bytes():
    batch = ChangeBatch("a>b", Lane.ROUTINE, Position(1, 2), Position(3, 4), 0, 5, 6, 7, {})
    header = (
        b'{"link":"a>b","lane":"routine","begin":[1,2],"end":[3,4],"captured":0,'
        b'"commit_us_max":5,"watermark_us":6,"read_us":7,"holds":[],"sweeps":[],"manifest":[],'
        b'"escalations":[],"dead":[],"tables":[],"seal":""}'
    )
    expected = b"CSB\x01" + len(header).to_bytes(4, "little") + header
    assert CODER.encode(batch) == expected
    assert_same(CODER.decode(expected), batch)


def test_golden_bytes_of_version_1_are_read():
    """Written by the first release. Bytes in flight or spooled must survive an upgrade.

    0    43 53 42 01    magic, version 1
    4    .. .. 00 00    length of the header
    8    {"link": ..    header, with "tables":[["patient",n],["lab_result",m]]
    then, each after zeros up to a multiple of 8, two Arrow IPC streams of n and m bytes
    then `00 "sealed" FF`, the first dead letter; the second has no bytes
    """
    data = GOLDEN.read_bytes()
    assert data[:4] == b"CSB\x01"
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = 8 + size + -(8 + size) % 8
    assert data[8 + size : start] == bytes(start - 8 - size)
    assert data[start : start + 4] == b"\xff\xff\xff\xff"  # Arrow's mark of a message.
    assert [name for name, _ in header["tables"]] == ["patient", "lab_result"]
    assert data.endswith(b"\0sealed\xff")
    decoded = CODER.decode(data)
    verify(decoded)
    assert_same(decoded, seal(example()))


def test_header_keys_that_are_not_known_are_ignored_and_new_ones_may_be_missing():
    header = {
        "link": "a>b", "lane": "routine", "begin": [1, 2], "end": [3, 4], "captured": 0,
        "commit_us_max": 5, "watermark_us": 6, "read_us": 7, "tables": [], "colour": "blue",
    }  # fmt: skip
    head = json.dumps(header).encode()
    decoded = CODER.decode(b"CSB\x01" + len(head).to_bytes(4, "little") + head)
    assert (decoded.holds, decoded.dead, decoded.seal) == ((), (), b"")


def test_decoded_tables_lie_in_the_encoded_bytes():
    encoded = CODER.encode(example())
    start = np.frombuffer(encoded, np.uint8).ctypes.data
    for rows in CODER.decode(encoded).tables.values():
        for column in rows.columns:
            for buffer in column.buffers():
                if buffer is not None and buffer.size:
                    assert start <= buffer.address < start + len(encoded)
                    assert buffer.address % 8 == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"CSB",
        b"CSB\x02\0\0\0\0",
        b"XXX\x01\x02\0\0\0{}",
        b"CSB\x01\x02\0\0\0{}",
        b"CSB\x01\x02\0\0\0[]",
        b"CSB\x01\xff\0\0\0{}",
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(WireFormatError):
        CODER.decode(data)


def test_cut_or_longer_bytes_are_refused():
    encoded = CODER.encode(seal(example()))
    for size in (*range(0, len(encoded), 97), len(encoded) - 1):
        with pytest.raises(WireFormatError):
            CODER.decode(encoded[:size])
    with pytest.raises(WireFormatError):
        CODER.decode(encoded + b"\0")


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_flipped_bit_is_taken_for_the_batch(data):
    batch = seal(example())
    encoded = bytearray(CODER.encode(batch))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = CODER.decode(bytes(encoded))
        verify(decoded)
    except (WireFormatError, SealBrokenError):
        return
    # A bit of padding: what was decoded is what was sealed.
    assert_same(batch, decoded)


def test_no_seal_is_a_broken_seal():
    with pytest.raises(SealBrokenError):
        verify(example())


CHANGES = [
    {"link": "main>other"},
    {"lane": Lane.ROUTINE},
    {"begin": Position(1, 1)},
    {"end": Position(6, 3)},
    {"captured": 8},
    {"commit_us_max": 12},
    {"watermark_us": 11},
    {"read_us": 13},
    {"tables": {}},
    {"tables": dict(reversed(example().tables.items()))},
    {"dead": LETTERS[:1]},
    {"dead": (dataclasses.replace(LETTERS[0], sealed=b"\0sealed\xfe"), LETTERS[1])},
    {"dead": (dataclasses.replace(LETTERS[0], reason="bad_int"), LETTERS[1])},
    {"holds": ()},
    {"sweeps": ()},
    {"manifest": (ManifestEntry("patient", 0, 3, bytes(32)),)},
    {"escalations": (("P1", "E6", 5, 1, False),)},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_the_seal_covers_every_field(change):
    batch = seal(example())
    assert seal(dataclasses.replace(batch, **change)).seal != batch.seal
    with pytest.raises(SealBrokenError):
        verify(dataclasses.replace(batch, **change))


def other_value(kind: pa.DataType) -> object:
    """A value that is nowhere in the example."""
    if pa.types.is_integer(kind):
        return 77
    if pa.types.is_temporal(kind):
        return datetime.datetime(1950, 1, 1, tzinfo=datetime.UTC)
    return bytes(32) if pa.types.is_fixed_size_binary(kind) else "other"


@pytest.mark.parametrize("name", example().tables["patient"].schema.names)
def test_the_seal_covers_every_column(name):
    batch = seal(example())
    rows = batch.tables["patient"]
    field = rows.schema.field(name)
    column = pa.array([other_value(field.type)] * rows.num_rows).cast(field.type)
    changed = rows.set_column(rows.schema.get_field_index(name), field, column)
    with pytest.raises(SealBrokenError):
        verify(dataclasses.replace(batch, tables=batch.tables | {"patient": changed}))


def test_the_seal_is_of_content_not_of_layout():
    """A slice, a concatenation and a copy of the same rows have one seal."""
    batch = example()
    rows = batch.tables["patient"]
    longer = pa.concat_batches([rows, rows, rows])
    for same in (longer.slice(3, 3), rows.take(pa.array([0, 1, 2])), pa.concat_batches([rows])):
        other = dataclasses.replace(batch, tables=batch.tables | {"patient": same})
        assert seal(other).seal == seal(batch).seal
        verify(CODER.decode(CODER.encode(seal(other))))


def test_beam_finds_the_coder():
    assert isinstance(coders.registry.get_coder(ChangeBatch), ChangeBatchCoder)
    assert not CODER.is_deterministic()
