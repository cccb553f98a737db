"""The decoder of the stream: each message by its bytes, any stream beside a slow decoder."""

import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, START, Position
from tests.pgoutput_bytes import (
    TOAST,
    begin,
    commit,
    delete,
    insert,
    relation,
    truncate,
    update,
    values,
    xlog,
)
from tests.raw_changes import rows_of
from transforms.capture.columns import TooManyColumns
from transforms.capture.postgresql.pgoutput import (
    POSTGRES_EPOCH_US,
    KeyUnknown,
    PgOutputDecoder,
    ProtocolError,
)

OID = 0x4001
PATIENT = relation(OID, "his.patient", ["pid", "name", "note"])


def decoder(rows: int = 100, size: int = 1 << 20, start: Position = START, keys=None):
    return PgOutputDecoder(rows, size, start, keys)


def transaction(lsn: int, *messages: bytes) -> list[bytes]:
    return [xlog(message, lsn) for message in (begin(lsn, lsn), *messages, commit(lsn, lsn))]


def decode(*payloads: bytes, **arguments) -> list[RawChanges]:
    made = decoder(**arguments)
    return made.feed(payloads) + made.flush()


def test_insert_byte_by_byte():
    payloads = [
        b"w" + bytes(24)  # XLogData: start, end, clock.
        + b"B"
        + b"\x00\x00\x00\x16\xb3\x74\xd8\x48"  # LSN of the commit: 16/B374D848.
        + b"\x00\x00\x00\x00\x00\x00\x00\x07"  # 7 us after 2000-01-01.
        + b"\x00\x00\x02\xda",  # Transaction id.
        b"w" + bytes(24)
        + b"R"
        + b"\x00\x00\x40\x01"  # Relation id.
        + b"his\x00" + b"patient\x00"
        + b"d"  # Replica identity: the primary key.
        + b"\x00\x03"  # Three columns.
        + b"\x01" + b"pid\x00" + b"\x00\x00\x00\x14" + b"\xff\xff\xff\xff"  # In the key; int8.
        + b"\x00" + b"name\x00" + b"\x00\x00\x00\x19" + b"\xff\xff\xff\xff"
        + b"\x00" + b"note\x00" + b"\x00\x00\x00\x19" + b"\xff\xff\xff\xff",
        b"w" + bytes(24)
        + b"I"
        + b"\x00\x00\x40\x01"
        + b"N"
        + b"\x00\x03"
        + b"t" + b"\x00\x00\x00\x02" + b"42"
        + b"t" + b"\x00\x00\x00\x06" + "会诊".encode()
        + b"n",
        b"w" + bytes(24)
        + b"C"
        + b"\x00"  # Flags.
        + b"\x00\x00\x00\x16\xb3\x74\xd8\x48"
        + b"\x00\x00\x00\x16\xb3\x74\xd8\x80"  # Its end.
        + b"\x00\x00\x00\x00\x00\x00\x00\x07",
    ]  # fmt: skip
    (batch,) = decode(*payloads)
    assert (batch.begin, batch.end) == (START, Position(0x16_B374D848, SEQ_END))
    assert (batch.captured, batch.commit_us_max) == (1, POSTGRES_EPOCH_US + 7)
    assert rows_of([batch]) == [
        {
            "table": "his.patient",
            "_op": Op.INSERT,
            "_lsn": 0x16_B374D848,
            "_seq": 1,
            "_commit_us": POSTGRES_EPOCH_US + 7,
            "_unchanged": 0,
            "pid": "42",
            "name": "会诊",
            "note": None,
            "_old.pid": None,
        }
    ]


def test_helpers_write_what_postgresql_writes():
    assert insert(OID, ["42", None]) == b"I\x00\x00\x40\x01N\x00\x02t\x00\x00\x00\x0242n"
    assert update(OID, [TOAST]) == b"U\x00\x00\x40\x01N\x00\x01u"
    assert update(OID, ["1"], ["0"]) == (
        b"U\x00\x00\x40\x01K\x00\x01t\x00\x00\x00\x010N\x00\x01t\x00\x00\x00\x011"
    )
    assert delete(OID, ["1"], "O") == b"D\x00\x00\x40\x01O\x00\x01t\x00\x00\x00\x011"
    assert truncate(OID) == b"T\x00\x00\x00\x01\x00\x00\x00\x40\x01"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param(
            update(OID, ["1", "b", TOAST]), [("U", 1, ["1", "b", None], 0b100, None)], id="toast"
        ),
        pytest.param(
            update(OID, ["2", "b", TOAST], ["1", None, None]),
            [("D", 1, ["1", None, None], 0b110, None), ("U", 2, ["2", "b", None], 0b100, "1")],
            id="key changed",
        ),
        pytest.param(
            update(OID, ["1", "b", "n"], ["1", None, None]),
            [("U", 1, ["1", "b", "n"], 0, None)],
            id="key sent, not changed",
        ),
        pytest.param(
            update(OID, [TOAST, "b", "n"], ["1", None, None]),
            [("U", 1, ["1", "b", "n"], 0, None)],
            id="long key filled",
        ),
        pytest.param(
            delete(OID, ["1", None, None]), [("D", 1, ["1", None, None], 0b110, None)], id="delete"
        ),
    ],
)
def test_old_tuples_of_a_key(message, expected):
    batches = decode(*transaction(9, PATIENT, message))
    assert [
        (chr(r["_op"]), r["_seq"], [r["pid"], r["name"], r["note"]], r["_unchanged"], r["_old.pid"])
        for r in rows_of(batches)
    ] == expected
    assert sum(batch.captured for batch in batches) == len(expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            update(OID, ["1", "b", TOAST], ["1", "a", "long"], "O"),
            [("U", 1, ["1", "b", "long"], 0, None)],
        ),
        (
            update(OID, ["2", "a", TOAST], ["1", "a", "long"], "O"),
            [("D", 1, ["1", "a", "long"], 0, None), ("U", 2, ["2", "a", "long"], 0, "1")],
        ),
        (
            update(OID, ["1", "b", None], ["1", "a", None], "O"),
            [("U", 1, ["1", "b", None], 0, None)],
        ),
        (delete(OID, ["1", None, "long"], "O"), [("D", 1, ["1", None, "long"], 0, None)]),
    ],
)
def test_old_tuples_of_a_whole_row(message, expected):
    whole = relation(OID, "his.patient", ["pid", "name", "note"], identity="f")
    batches = decode(*transaction(9, whole, message), keys={"his.patient": ["pid"]})
    assert [
        (chr(r["_op"]), r["_seq"], [r["pid"], r["name"], r["note"]], r["_unchanged"], r["_old.pid"])
        for r in rows_of(batches)
    ] == expected


def test_small_transactions_are_packed_and_a_large_one_is_split():
    small = [transaction(lsn, insert(OID, [str(lsn), "x", None])) for lsn in (10, 20)]
    large = transaction(30, *[insert(OID, [str(i), "x", None]) for i in range(5)])
    batches = decode(xlog(PATIENT), *small[0], *small[1], *large, rows=3)
    assert [(batch.captured, batch.end) for batch in batches] == [
        (2, Position(20, SEQ_END)),
        (3, Position(30, 3)),
        (2, Position(30, SEQ_END)),
    ]


def test_a_transaction_sent_again_goes_on_where_it_was_cut():
    payloads = transaction(30, PATIENT, *[insert(OID, [str(i), None, None]) for i in range(1, 6)])
    batches = decode(*payloads, start=Position(30, 3))
    assert [row["pid"] for row in rows_of(batches)] == ["4", "5"]
    assert [(b.begin, b.end, b.captured) for b in batches] == [
        (Position(30, 3), Position(30, SEQ_END), 2)
    ]
    assert decode(*payloads, start=Position(30, SEQ_END)) == []


def test_a_commit_at_the_consistent_point_is_after_the_snapshot():
    """A new slot's stream may begin with a commit at the very byte of its consistent point."""
    consistent_point = 100
    snapshot_end = Position(consistent_point - 1, SEQ_END)
    payloads = transaction(consistent_point, PATIENT, insert(OID, ["1", None, None]))
    assert len(rows_of(decode(*payloads, start=snapshot_end))) == 1
    assert snapshot_end.acknowledgeable_lsn == consistent_point


def test_a_truncate_has_a_place_and_is_no_row():
    batches = decode(
        *transaction(
            9, PATIENT, insert(OID, ["1", None, None]), truncate(OID), insert(OID, ["2"] * 3)
        )
    )
    (batch,) = batches
    assert batch.truncates == (("his.patient", Position(9, 2)),)
    assert (batch.captured, [row["_seq"] for row in rows_of(batches)]) == (2, [1, 3])


def test_tables_that_are_not_wanted_are_passed_over_but_numbered():
    wide = relation(7, "his.log", [f"c{i}" for i in range(80)])
    payloads = transaction(9, wide, insert(7, ["x"] * 80), PATIENT, insert(OID, ["1", None, None]))
    batches = decode(*payloads, keys={"his.patient": ["pid"]})
    assert [(b.captured, list(b.tables)) for b in batches] == [(1, ["his.patient"])]
    assert [row["_seq"] for row in rows_of(batches)] == [2]


def test_new_columns_begin_a_new_batch_even_inside_a_transaction():
    wider = relation(OID, "his.patient", ["pid", "name", "note", "bed"])
    batches = decode(
        *transaction(8, PATIENT, insert(OID, ["0", None, None])),
        *transaction(
            9, insert(OID, ["1", "a", "b"]), wider, insert(OID, ["2", "a", "b", "c"]), PATIENT
        ),
    )
    assert [(b.end, b.captured) for b in batches] == [
        (Position(8, SEQ_END), 1),
        (Position(9, 1), 1),
        (Position(9, 2), 1),
        (Position(9, SEQ_END), 0),
    ]
    assert [row.get("bed") for row in rows_of(batches)] == [None, None, "c"]


def test_a_relation_sent_again_unchanged_cuts_nothing():
    row = insert(OID, ["1", None, None])
    (batch,) = decode(*transaction(8, PATIENT, row), *transaction(9, PATIENT, row))
    assert batch.captured == 2


def test_flush_moves_an_idle_decoder_to_the_keepalive():
    made = decoder()
    made.feed(transaction(9, PATIENT, insert(OID, ["1", None, None])))
    assert not made.idle
    assert [batch.end for batch in made.flush(wal_end=50, server_us=77)] == [
        Position(9, SEQ_END),
        Position(49, SEQ_END),
    ]
    assert made.idle
    assert made.flush(wal_end=50) == []
    (beat,) = made.flush(wal_end=60, server_us=78)
    assert (beat.begin, beat.captured, beat.commit_us_max) == (Position(49, SEQ_END), 0, 78)


def test_flush_never_passes_an_open_transaction():
    made = decoder()
    payloads = transaction(90, PATIENT, insert(OID, ["1", None, None]))
    made.feed(payloads[:-1])
    assert made.flush(wal_end=60) == []
    assert not made.idle
    assert [b.end for b in made.feed(payloads[-1:]) + made.flush()] == [Position(90, SEQ_END)]


def test_empty_transactions_move_the_position():
    (batch,) = decode(*transaction(9), *transaction(19))
    assert (batch.captured, batch.end, batch.tables) == (0, Position(19, SEQ_END), {})


def test_a_value_that_is_not_utf8_refuses_its_row_only():
    bad = insert(OID, ["2", b"\xff\xfe", None])
    (batch,) = decode(
        *transaction(
            9, PATIENT, insert(OID, ["1", "会", None]), bad, update(OID, ["3", b"\xe4\xbc", TOAST])
        )
    )
    assert batch.captured == 3
    assert [row["pid"] for row in rows_of([batch])] == ["1"]
    first, second = batch.rejects
    assert (first.src_table, first.position, first.op) == ("his.patient", Position(9, 2), Op.INSERT)
    assert (first.reason, first.column) == ("invalid_text", "name")
    assert first.row == {"pid": "2", "name": "\\xff\\xfe", "note": None, "_old.pid": None}
    assert "note" not in second.row  # Unchanged is not null.


def test_a_character_torn_between_two_cells_is_found():
    torn = [insert(OID, ["1", b"\xe4\xbc", None]), insert(OID, ["2", b"\x9a", None])]
    (batch,) = decode(*transaction(9, PATIENT, *torn))
    assert len(batch.rejects) == 2 and not batch.tables


def test_too_many_columns_are_refused_by_name():
    names = [f"c{i}" for i in range(65)]
    with pytest.raises(TooManyColumns, match=r"his\.wide has 65 columns"):
        decode(xlog(relation(1, "his.wide", names)))
    row = insert(1, ["v"] * 63 + [None])
    last = update(1, ["v"] * 63 + [TOAST])
    batches = decode(*transaction(9, relation(1, "his.wide", names[:64]), row, last))
    assert [r["_unchanged"] for r in rows_of(batches)] == [0, 1 << 63]


def test_a_key_that_the_identity_lacks_is_refused():
    with pytest.raises(KeyUnknown, match="lacks mrn"):
        decode(
            xlog(relation(1, "his.patient", ["pid", "mrn"])), keys={"his.patient": ["pid", "mrn"]}
        )
    with pytest.raises(KeyUnknown, match="REPLICA IDENTITY FULL"):
        decode(xlog(relation(1, "his.patient", ["pid"], identity="f")))


@pytest.mark.parametrize(
    "payloads",
    [
        [xlog(b"S" + bytes(5), 0xAB)],  # A streamed transaction begins: never asked for.
        [xlog(b"?", 0xAB)],
        [xlog(insert(OID, ["1"]), 0xAB)],  # Outside of a transaction.
        [xlog(begin(1), 0xAB), xlog(insert(99, ["1"]), 0xAB)],  # Of no known relation.
        [xlog(begin(1), 0xAB), xlog(begin(2), 0xAB)],
        [xlog(begin(1), 0xAB), xlog(commit(2), 0xAB)],
        [xlog(begin(1)[:-1], 0xAB)],
        [xlog(PATIENT[:-3], 0xAB)],
        [xlog(begin(1), 0xAB), xlog(truncate(99), 0xAB)],
        [xlog(truncate(OID), 0xAB)],
    ],
)
def test_what_is_unknown_or_out_of_place_is_named(payloads):
    kind = payloads[-1][25]
    with pytest.raises(ProtocolError, match=f"0x{kind:02x} at 0/AB"):
        decode(*payloads)


@hypothesis.given(st.data())
def test_damage_is_an_error_or_other_values_never_a_crash(data):
    row = update(OID, ["12", "会诊", TOAST], ["1", None, None])
    damaged = bytearray(row)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(1, len(row)))])
    try:
        batches = decode(*transaction(9, PATIENT, damaged))
    except ProtocolError:
        return
    assert sum(batch.captured for batch in batches) <= 2


# Any stream, beside a slow decoder.

TABLES = {1: ("his.a", "d"), 2: ("lis.b", "f"), 3: ("emr.c", "d")}
KEYS = {"his.a": ["c0"], "lis.b": ["c0"], "emr.c": ["c0"]}
text = st.sampled_from(["", "1", "2", "会诊", "x" * 15, "y" * 16, "z" * 17, "w" * 40])


@st.composite
def streams(draw) -> list[bytes]:
    """Payloads of transactions over tables that grow and shrink, and are truncated."""
    widths = {oid: draw(st.integers(1, 4)) for oid in TABLES}
    payloads: list[bytes] = []
    announced: set[int] = set()
    lsn = 100
    for _ in range(draw(st.integers(0, 5))):
        lsn += 8 * draw(st.integers(1, 3))
        messages = []
        for _ in range(draw(st.integers(0, 6))):
            oid = draw(st.sampled_from(sorted(TABLES)))
            if draw(st.integers(0, 9)) == 0:
                widths[oid] = draw(st.integers(1, 4))
                announced.discard(oid)
            name, identity = TABLES[oid]
            if oid not in announced:
                columns = [f"c{i}" for i in range(widths[oid])]
                messages.append(relation(oid, name, columns, identity=identity))
                announced.add(oid)
            messages.append(draw(changes(oid, widths[oid], identity == "f")))
        payloads += transaction(lsn, *messages)
        if draw(st.booleans()):
            payloads.append(b"k" + bytes(17))
    return payloads


@st.composite
def changes(draw, oid: int, width: int, whole: bool) -> bytes:
    cell = st.one_of(st.none(), text)
    full = [draw(text), *(draw(cell) for _ in range(width - 1))]
    kind = draw(st.sampled_from("IIUUUDT"))
    if kind == "I":
        return insert(oid, full)
    if kind == "T":
        return truncate(oid)
    old = [draw(text), *(draw(cell) for _ in range(width - 1))]
    if not whole:
        old = [old[0], *[None] * (width - 1)]
    tag = "O" if whole else "K"
    if kind == "D":
        return delete(oid, old, tag)
    new = [TOAST if draw(st.integers(0, 3)) == 0 else value for value in full]
    if whole or new[0] is TOAST or draw(st.booleans()):
        return update(oid, new, old, tag)
    return update(oid, new)


def slow_decode(payloads: list[bytes]) -> tuple[list[dict], list[tuple[str, Position]]]:
    """What the decoder must give: rows in order, and truncates."""
    relations: dict[int, tuple[str, list[str]]] = {}
    rows, truncates = [], []
    lsn = us = seq = 0

    def cells(at: int) -> tuple[list, int]:
        (count,) = struct.unpack_from("!H", message, at)
        at += 2
        row = []
        for _ in range(count):
            kind = message[at : at + 1]
            at += 1
            if kind == b"t":
                (size,) = struct.unpack_from("!I", message, at)
                row.append(message[at + 4 : at + 4 + size].decode())
                at += 4 + size
            else:
                row.append(None if kind == b"n" else TOAST)
        return row, at

    def add(op: str, row: list, old_key: str | None = None) -> None:
        name, columns = relations[oid]
        mask = sum(1 << i for i, value in enumerate(row) if value is TOAST)
        rows.append(
            {"table": name, "_op": ord(op), "_lsn": lsn, "_seq": seq, "_commit_us": us}
            | {"_unchanged": mask, "_old.c0": old_key}
            | {c: None if v is TOAST else v for c, v in zip(columns, row, strict=True)}
        )

    for payload in payloads:
        message = payload[25:] if payload[:1] == b"w" else b"-"
        kind = message[:1].decode()
        if kind == "B":
            lsn, us = struct.unpack_from("!Qq", message, 1)
            us, seq = us + POSTGRES_EPOCH_US, 0
        elif kind == "R":
            (oid,) = struct.unpack_from("!I", message, 1)
            schema, name, rest = message[5:].split(b"\0", 2)
            columns = [f"c{i}" for i in range(struct.unpack_from("!H", rest, 1)[0])]
            relations[oid] = (f"{schema.decode()}.{name.decode()}", columns)
        elif kind == "T":
            seq += 1
            (oid,) = struct.unpack_from("!I", message, 6)
            truncates.append((relations[oid][0], Position(lsn, seq)))
        elif kind in "IUD":
            (oid,) = struct.unpack_from("!I", message, 1)
            tag, at = message[5:6], 6
            old = new = None
            if tag in b"KO":
                old, at = cells(6)
                if tag == b"K":
                    old = [value if i == 0 else TOAST for i, value in enumerate(old)]
                at += 1
            if kind != "D":
                new, at = cells(at)
                if old is not None:
                    new = [o if n is TOAST else n for o, n in zip(old, new, strict=True)]
            seq += 1
            moved = old is not None and new is not None and new[0] != old[0]
            if moved or kind == "D":
                add("D", old)
                seq += moved
            if new is not None:
                add(kind, new, old[0] if moved else None)
    return rows, truncates


def in_chunks(payloads: list[bytes], sizes: list[int]) -> list[list[bytes]]:
    chunks = []
    while payloads:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(payloads[:size])
        payloads = payloads[size:]
    return chunks


def check_joins(batches: list[RawChanges], start: Position) -> None:
    at = start
    for batch in batches:
        assert batch.begin == at < batch.end
        at = batch.end
        held = sum(table.num_rows for table in batch.tables.values())
        assert batch.captured == held + len(batch.rejects)
        for table in batch.tables.values():
            table.validate(full=True)
            assert table.num_rows
            for row in table.to_pylist():
                assert batch.begin < (row["_lsn"], row["_seq"]) <= batch.end
        for _, position in batch.truncates:
            assert batch.begin < position <= batch.end


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    streams(),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([1, 60, 200, 1 << 20]),
    st.data(),
)
def test_any_stream_in_any_chunks_resumed_anywhere(payloads, sizes, batch_rows, batch_bytes, data):
    expected, truncates = slow_decode(payloads)
    whole = decode(*payloads, rows=batch_rows, size=batch_bytes, keys=KEYS)
    check_joins(whole, START)
    assert rows_of(whole) == expected
    assert [item for batch in whole for item in batch.truncates] == truncates

    made = decoder(batch_rows, batch_bytes, keys=KEYS)
    chunked = [batch for chunk in in_chunks(payloads, sizes) for batch in made.feed(chunk)]
    assert chunked + made.flush() == whole

    made = decoder(batch_rows, batch_bytes, keys=KEYS)
    flushed = []
    for chunk in in_chunks(payloads, sizes):
        flushed += made.feed(chunk)
        flushed += made.flush() if data.draw(st.booleans()) else []
    flushed += made.flush()
    check_joins(flushed, START)
    assert rows_of(flushed) == expected

    if whole:
        start = data.draw(st.sampled_from([batch.end for batch in whole + flushed]))
        again = decode(*payloads, rows=batch_rows, size=batch_bytes, keys=KEYS, start=start)
        check_joins(again, start)
        assert rows_of(again) == [r for r in expected if (r["_lsn"], r["_seq"]) > start]


def test_memory_does_not_grow_with_the_stream():
    made = decoder(rows=10)
    payloads = transaction(9, PATIENT, *[insert(OID, ["1", "x" * 1000, None])] * 100)
    for lsn in range(10, 200):
        made.feed([xlog(begin(lsn), lsn), *payloads[1:-1], xlog(commit(lsn), lsn)])
    assert len(made._buffer) < 10 * sum(map(len, payloads))


def test_values_are_laid_out_whatever_their_length():
    row = [str(i) * i for i in range(64)]
    names = [f"c{i}" for i in range(64)]
    message = b"I" + struct.pack("!I", 1) + b"N" + values(row)
    batches = decode(*transaction(9, relation(1, "his.wide", names), *[message] * 3))
    assert [[r[name] for name in names] for r in rows_of(batches)] == [row] * 3
