"""Digests: equal for equal content, different for different, whoever computes them."""

import datetime
import hashlib
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.batches import ManifestEntry, Op
from schemas.entities import PATIENT
from schemas.tables import ARROW_TYPES, Column, Kind, Table
from tests.canonical import COMMIT_US, rows_of
from transforms import hash_rows
from transforms.checksum import (
    EMPTY_SET,
    add_sets,
    digest_rows,
    digest_set,
    encode_rows,
    manifest,
    with_digests,
)

TABLE = Table("thing", "One of each kind.", tuple(Column(kind.value, kind, "") for kind in Kind))
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
VALUES = {
    "record_id": st.text(max_size=12),
    "text": st.none() | st.text(max_size=40),
    "int": st.none() | st.integers(-(2**63), 2**63 - 1),
    "decimal": st.none() | st.from_regex(r"-?[1-9]\d{0,9}(\.\d{0,3}[1-9])?", fullmatch=True),
    "bool": st.none() | st.booleans(),
    "date": st.none() | st.dates(),
    "time": st.none() | st.datetimes(timezones=st.just(datetime.UTC)),
}
ROWS = st.lists(st.fixed_dictionaries(VALUES), max_size=12)


def stored(rows: list[dict], table: Table = TABLE) -> pa.RecordBatch:
    """Rows as they are read back from a store."""
    fields = [pa.field("record_id", pa.utf8())]
    fields += [pa.field(column.name, ARROW_TYPES[column.kind]) for column in table.columns]
    return pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields))


def encoded(table: Table, row: dict) -> bytes:
    """The encoding, spelt out anew from its description."""
    name = table.name.encode()
    out = b"\x01" + struct.pack("<I", len(name)) + name
    kinds = [Kind.TEXT, *(column.kind for column in table.columns)]
    names = ["record_id", *(column.name for column in table.columns)]
    for ordinal, (kind, value) in enumerate(zip(kinds, map(row.get, names), strict=True)):
        if value is None:
            continue
        number = {"text": 1, "int": 2, "decimal": 3, "bool": 4, "date": 5, "time": 6}[kind]
        out += bytes([ordinal, number])
        if kind in (Kind.TEXT, Kind.DECIMAL):
            out += struct.pack("<I", len(value.encode())) + value.encode()
        elif kind is Kind.INT:
            out += struct.pack("<q", value)
        elif kind is Kind.BOOL:
            out += struct.pack("<?", value)
        elif kind is Kind.DATE:
            out += struct.pack("<i", (value - EPOCH.date()).days)
        else:
            out += struct.pack("<q", (value - EPOCH) // datetime.timedelta(microseconds=1))
    return out


@settings(deadline=None)
@given(ROWS, st.data())
def test_the_kernel_writes_the_described_encoding(rows, data):
    cut = data.draw(st.integers(0, len(rows)))
    batch = stored(rows).slice(cut)  # Offsets are honoured.
    content, ends = encode_rows(TABLE, batch)
    expected = [encoded(TABLE, row) for row in rows[cut:]]
    assert content.tobytes() == b"".join(expected)
    assert np.diff(ends).tolist() == [len(part) for part in expected]
    digests = digest_rows(TABLE, batch)
    digests.validate(full=True)
    assert digests.to_pylist() == [hashlib.sha256(part).digest() for part in expected]


def test_golden_digest():
    """What a third party must reproduce; changes only with the encoding's version."""
    row = {"record_id": "7|1", "text": "会诊", "int": -2, "decimal": "6.8", "bool": True}
    row |= {"date": datetime.date(2026, 3, 1), "time": EPOCH + datetime.timedelta(microseconds=1)}
    content, _ = encode_rows(TABLE, stored([row]))
    assert content.tobytes() == bytes.fromhex(
        "01 05000000 7468696e67"  # Version, "thing".
        "00 01 03000000 377c31"  # record_id, text.
        "01 01 06000000 e4bc9ae8af8a"  # text.
        "02 02 feffffffffffffff"  # int.
        "03 03 03000000 362e38"  # decimal.
        "04 04 01"  # bool.
        "05 05 21500000"  # date, day 20513.
        "06 06 0100000000000000"  # time.
    )
    assert digest_rows(TABLE, stored([row]))[0].as_py() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("algorithm", hash_rows.ALGORITHMS)
def test_algorithms(algorithm):
    batch = stored([{"record_id": "1", "text": "a"}, {"record_id": "2"}])
    for row, digest in zip(batch.to_pylist(), digest_rows(TABLE, batch, algorithm), strict=True):
        expected = hashlib.new(algorithm, encoded(TABLE, row)).digest()
        assert digest.as_py() == expected.ljust(32, b"\0")


@pytest.mark.parametrize("found", [True, False])
def test_sha256_of_rows_of_every_length(found, monkeypatch):
    # Without Python's OpenSSL in sight it is hashlib's, and the same.
    monkeypatch.setattr(hash_rows, "_FOUND", found and hash_rows._FOUND)
    data = np.arange(200 * 199 // 2, dtype=np.uint32).view(np.uint8)[: 200 * 199 // 2].copy()
    ends = np.cumsum(np.arange(200))
    digests = hash_rows.hash_rows(data, ends, "sha256")
    for digest, start, end in zip(digests, ends, ends[1:], strict=False):
        assert digest.tobytes() == hashlib.sha256(data[start:end].tobytes()).digest()


def test_an_appended_column_leaves_digests_alone_where_it_is_null():
    longer = Table("thing", "", (*TABLE.columns, Column("new", Kind.TEXT, "")))
    rows = [{"record_id": "1", "text": "a"}]
    before = digest_rows(TABLE, stored(rows))
    assert digest_rows(longer, stored(rows, longer)).equals(before)
    assert not digest_rows(longer, stored([rows[0] | {"new": ""}], longer)).equals(before)


@settings(deadline=None)
@given(st.fixed_dictionaries(VALUES), st.fixed_dictionaries(VALUES))
def test_different_rows_have_different_digests(first, second):
    a, b = digest_rows(TABLE, stored([first, second])).to_pylist()
    assert (a == b) == (first == second)


def test_values_do_not_move_between_columns_or_tables():
    two = Table("thing", "", (Column("a", Kind.TEXT, ""), Column("b", Kind.TEXT, "")))
    other = Table("thin", "", two.columns)
    rows = [
        {"record_id": "1", "a": a, "b": b}
        for a, b in [("xy", None), (None, "xy"), ("x", "y"), ("", "xy"), ("xy", "")]
    ]
    digests = digest_rows(two, stored(rows, two)).to_pylist()
    digests += digest_rows(other, stored(rows, other)).to_pylist()
    assert len(set(digests)) == 10


def test_rows_that_are_not_whole_have_no_digest():
    rows = [{}, {"_op": int(Op.DELETE)}, {"unchanged": ["name"]}, {"_op": int(Op.SNAPSHOT)}]
    batch = rows_of("patient", rows)
    filled = with_digests(PATIENT, batch)
    filled.validate(full=True)
    assert filled.schema.equals(PATIENT.arrow_schema)
    assert filled["_digest"].is_valid().to_pylist() == [True, False, False, True]
    alone = digest_rows(PATIENT, rows_of("patient", rows[:1]))
    assert filled["_digest"][0] == alone[0]


def test_both_ends_agree():
    """Rows of a change batch and the same rows read back, in another order and type."""
    batch = rows_of("patient", [{"name": "王"}, {"sex": "1"}, {"birth_date": datetime.date.min}])
    there = batch.select(["record_id", *PATIENT.by_name]).take([2, 0, 1])
    seconds = there.set_column(
        there.schema.get_field_index("updated_at"),
        "updated_at",
        there["updated_at"].cast(pa.timestamp("us", "Asia/Shanghai")),
    )
    assert digest_set(digest_rows(PATIENT, batch)) == digest_set(digest_rows(PATIENT, seconds))


DIGESTS = st.lists(st.none() | st.binary(min_size=32, max_size=32), max_size=20)


@given(DIGESTS, st.randoms(use_true_random=False), st.data())
def test_sums_of_sets_do_not_depend_on_order_or_parts(values, random, data):
    words = np.zeros(4, object)
    for value in filter(None, values):
        words += np.array(struct.unpack("<4Q", value), object)
    expected = struct.pack("<4Q", *(int(word) % 2**64 for word in words))
    digests = pa.array(values, pa.binary(32))
    assert digest_set(digests) == (len(values), expected)
    cut = data.draw(st.integers(0, len(values)))
    parts = [digest_set(part) for part in (digests.slice(0, cut), digests.slice(cut))]
    assert add_sets(parts[0][1], parts[1][1]) == expected
    random.shuffle(values)
    assert digest_set(pa.array(values, pa.binary(32)))[1] == expected


def test_the_empty_set():
    assert digest_set(pa.array([], pa.binary(32))) == (0, EMPTY_SET)
    assert manifest(TABLE, rows_of("patient", []), 60) == ()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-5, 40), st.sampled_from([Op.INSERT, Op.DELETE])), max_size=12)
)
def test_manifest_counts_every_change_in_its_window(changes):
    rows = [
        {"_commit_us": COMMIT_US + at, "_op": int(op), "record_id": f"r{i}"}
        for i, (at, op) in enumerate(changes)
    ]
    batch = with_digests(PATIENT, rows_of("patient", rows))
    expected = []
    for window in sorted({row["_commit_us"] // 10 for row in rows}):
        mask = [at // 10 == window for at in batch["_commit_us"].to_pylist()]
        count, total = digest_set(batch["_digest"].filter(pa.array(mask)))
        expected.append(ManifestEntry("patient", window * 10, count, total))
    assert manifest(PATIENT, batch, 10) == tuple(expected)
