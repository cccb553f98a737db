"""The decoder of the binlog: each event by its bytes, any log in any chunks."""

import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, Position
from tests.binlog_bytes import ABSENT, CHARSETS, GBK, Log, integer, packets_of, text
from tests.raw_changes import rows_of
from transforms.capture.columns import TooManyColumns
from transforms.capture.mariadb.decode import BinlogDecoder
from transforms.capture.mariadb.errors import LogSettingsWrong, LogUnusable, ServerRefused
from transforms.capture.mariadb.places import border, transaction
from transforms.capture.mariadb.table_map import MetadataMissing
from transforms.capture.postgresql.pgoutput import KeyUnknown, ProtocolError

BEGIN = Position(border(1, 256), SEQ_END)
ID = 0x4001
COLUMNS = [integer("BRID"), text("BRXM"), text("GMS", size=300)]
KEYS = {"his.MS_BRDA": ["BRID"]}


def log() -> Log:
    return Log().rotate(1, 256).format()


def decoder(rows=100, size=1 << 20, start=BEGIN, keys=None, columns=None, **more):
    keys = KEYS if keys is None else keys
    return BinlogDecoder(rows, size, start, "binlog", CHARSETS, keys, columns, **more)


def decode(made: Log, **arguments) -> list[RawChanges]:
    taking = decoder(**arguments)
    return taking.feed(packets_of(made.packets)) + taking.flush()


def patients(made: Log) -> Log:
    return made.table(ID, "his.MS_BRDA", COLUMNS)


def test_insert_byte_by_byte():
    made = log()
    at = made.offset
    packets = [
        *made.packets,
        b"\0"  # OK.
        + b"\x40\x42\x0f\x00"  # 1,000,000 s after 1970.
        + b"\xa2"  # GTID.
        + b"\x07\x00\x00\x00"  # Server 7.
        + b"\x26\x00\x00\x00"  # 38 bytes.
        + struct.pack("<I", at + 38)  # Where it ends.
        + b"\x00\x00"  # Flags.
        + b"\x05\x00\x00\x00\x00\x00\x00\x00" + b"\x00\x00\x00\x00"  # Number 5 of domain 0.
        + b"\x00" + bytes(6),
        b"\0" + b"\x40\x42\x0f\x00" + b"\x13" + b"\x07\x00\x00\x00" + b"\x45\x00\x00\x00"
        + bytes(4)  # An event inside a transaction has no place.
        + b"\x00\x00"
        + b"\x01\x40\x00\x00\x00\x00" + b"\x01\x00"  # Table id and flags.
        + b"\x03his\x00" + b"\x07MS_BRDA\x00"
        + b"\x02" + b"\x03\x0f"  # Two columns: INT and VARCHAR.
        + b"\x02" + b"\x28\x00"  # Metadata: 40 bytes at most.
        + b"\x02"  # The second may be null.
        + b"\x01\x01\x00"  # Signed.
        + b"\x02\x01\x1c"  # Default collation 28, GBK.
        + b"\x04\x0a" + b"\x04BRID" + b"\x04BRXM"
        + b"\x08\x01\x00",  # The key: the first column.
        b"\0" + b"\x40\x42\x0f\x00" + b"\x17" + b"\x07\x00\x00\x00" + b"\x27\x00\x00\x00"
        + bytes(4) + b"\x00\x00"
        + b"\x01\x40\x00\x00\x00\x00" + b"\x01\x00"
        + b"\x02" + b"\x03"  # Two columns, both present.
        + b"\x00" + b"\xfe\xff\xff\xff" + b"\x04\xd5\xc5\xc8\xfd",  # No nulls; -2; 张三.
        b"\0" + b"\x40\x42\x0f\x00" + b"\x10" + b"\x07\x00\x00\x00" + b"\x1b\x00\x00\x00"
        + struct.pack("<I", at + 38 + 69 + 39 + 27) + b"\x00\x00" + bytes(8),  # XID.
    ]  # fmt: skip
    plain = Log(checksum=False).rotate(1, 256).format()
    assert at == plain.offset
    packets[: len(made.packets)] = plain.packets
    taking = decoder(checksum=False)
    (batch,) = taking.feed(packets_of(packets)) + taking.flush()
    place = transaction(1, at)
    assert (batch.begin, batch.end) == (BEGIN, Position(place, SEQ_END))
    assert (batch.captured, batch.commit_us_max) == (1, 1_000_000_000_000)
    assert rows_of([batch]) == [
        {
            "table": "his.MS_BRDA",
            "_op": Op.INSERT,
            "_lsn": place,
            "_seq": 1,
            "_commit_us": 1_000_000_000_000,
            "_unchanged": 0,
            "BRID": "-2",
            "BRXM": "张三",
            "_old.BRID": None,
        }
    ]
    assert (taking.gtid, taking.anchor) == ("0-7-5", "0-7-5")
    assert taking.log_end == border(1, at + 38 + 69 + 39 + 27)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            [1, "a", "n"], [1, "b", "n"], [("U", 1, ["1", "b", "n"], 0, None)], id="whole"
        ),
        pytest.param(
            [1, "a", "n"],
            [2, "a", None],
            [("D", 1, ["1", "a", "n"], 0, None), ("U", 2, ["2", "a", None], 0, "1")],
            id="key moved",
        ),
        pytest.param(
            [1, ABSENT, ABSENT],
            [ABSENT, "b", ABSENT],
            [("U", 1, ["1", "b", None], 0b100, None)],
            id="minimal",
        ),
        pytest.param(
            [1, ABSENT, ABSENT],
            [2, ABSENT, ABSENT],
            [("D", 1, ["1", None, None], 0b110, None), ("U", 2, ["2", None, None], 0b110, "1")],
            id="minimal, key moved",
        ),
        pytest.param(
            [1, "a", "n"],
            [ABSENT, "b", ABSENT],
            [("U", 1, ["1", "b", "n"], 0, None)],
            id="no duplicates",
        ),
        pytest.param(
            [1, None, ABSENT],
            [1, "b", ABSENT],
            [("U", 1, ["1", "b", None], 0b100, None)],
            id="no blob",
        ),
    ],
)
def test_images_of_an_update(old, new, expected):
    made = patients(log().gtid()).update(ID, COLUMNS, old, new).xid()
    batches = decode(made)
    assert [
        (
            chr(r["_op"]),
            r["_seq"],
            [r["BRID"], r["BRXM"], r["GMS"]],
            r["_unchanged"],
            r["_old.BRID"],
        )
        for r in rows_of(batches)
    ] == expected
    assert sum(batch.captured for batch in batches) == len(expected)


def test_delete_and_several_rows_in_an_event():
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, "a", None], [2, None, "b"])
    made.delete(ID, COLUMNS, [1, "a", None], [2, None, "b"]).xid()
    rows = rows_of(decode(made))
    assert [(chr(r["_op"]), r["_seq"], r["BRID"], r["BRXM"], r["GMS"]) for r in rows] == [
        ("I", 1, "1", "a", None),
        ("I", 2, "2", None, "b"),
        ("D", 3, "1", "a", None),
        ("D", 4, "2", None, "b"),
    ]


def test_a_key_that_was_not_logged_is_refused():
    made = patients(log().gtid()).update(ID, COLUMNS, [1, ABSENT, ABSENT], [ABSENT, "b", ABSENT])
    with pytest.raises(LogSettingsWrong, match="binlog_row_image"):
        decode(made.xid(), keys={"his.MS_BRDA": ["GMS"]})


def test_small_transactions_are_packed_and_a_large_one_is_split_in_the_middle_of_an_event():
    made = log()
    places = []
    for rows in ([1], [2], [3, 4, 5, 6, 7]):
        places.append(transaction(1, made.offset))
        patients(made.gtid()).insert(ID, COLUMNS, *[[i, "x", None] for i in rows]).xid()
    batches = decode(made, rows=3)
    assert [(batch.captured, batch.end) for batch in batches] == [
        (2, Position(places[1], SEQ_END)),
        (3, Position(places[2], 3)),
        (2, Position(places[2], SEQ_END)),
    ]


def test_a_transaction_read_again_goes_on_where_it_was_cut():
    made = log()
    place = transaction(1, made.offset)
    patients(made.gtid()).insert(ID, COLUMNS, *[[i, "x", None] for i in range(1, 6)]).xid()
    batches = decode(made, start=Position(place, 3))
    assert [row["BRID"] for row in rows_of(batches)] == ["4", "5"]
    assert [(b.begin, b.end, b.captured) for b in batches] == [
        (Position(place, 3), Position(place, SEQ_END), 2)
    ]
    assert decode(made, start=Position(place, SEQ_END)) == []


def test_tables_that_are_not_wanted_are_numbered_even_if_they_name_no_columns():
    wide = [text(f"c{i}") for i in range(300)]
    made = log().gtid().table(9, "his.LOG", wide).table(10, "his.NAMELESS", COLUMNS, names=False)
    made.insert(9, wide, ["x"] * 300).insert(10, COLUMNS, [1, None, None])
    patients(made).insert(ID, COLUMNS, [1, "a", None]).xid()
    batches = decode(made)
    assert [(b.captured, list(b.tables)) for b in batches] == [(1, ["his.MS_BRDA"])]
    assert [row["_seq"] for row in rows_of(batches)] == [3]


def test_a_wanted_table_without_column_names_is_refused():
    made = log().gtid().table(ID, "his.MS_BRDA", COLUMNS, names=False)
    with pytest.raises(MetadataMissing, match="binlog_row_metadata = 'FULL'"):
        decode(made)


def test_new_columns_begin_a_new_batch_even_inside_a_transaction():
    wider = [*COLUMNS, text("CH")]
    made = patients(log().gtid()).insert(ID, COLUMNS, [0, None, None]).xid()
    first = made.offset
    patients(made.gtid()).insert(ID, COLUMNS, [1, "a", "b"])
    made.table(ID + 1, "his.MS_BRDA", wider).insert(ID + 1, wider, [2, "a", "b", "c"])
    patients(made).xid()
    batches = decode(made)
    place = transaction(1, first)
    assert [(b.end.seq if b.end.lsn == place else "before", b.captured) for b in batches] == [
        ("before", 1),
        (1, 1),
        (2, 1),
        (SEQ_END, 0),
    ]
    assert [row.get("CH") for row in rows_of(batches)] == [None, None, "c"]


def test_a_table_under_another_number_cuts_nothing():
    made = log()
    for table_id in (ID, 5, 6, ID):
        made.gtid().table(table_id, "his.MS_BRDA", COLUMNS)
        made.insert(table_id, COLUMNS, [1, "a", None]).xid()
    (batch,) = decode(made)
    assert batch.captured == 4


def test_a_number_that_means_another_table_after_a_restart():
    other = [integer("JYXH"), integer("BRID")]
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, "a", None]).xid()
    made.rotate(2).format(placed=True).gtid().table(ID, "his.JYJG", other)
    made.insert(ID, other, [8, 9]).xid()
    rows = rows_of(decode(made, keys=KEYS | {"his.JYJG": ["JYXH"]}))
    assert [(row["table"], row["_lsn"] >> 40) for row in rows] == [
        ("his.MS_BRDA", 1),
        ("his.JYJG", 2),
    ]


def test_hundreds_of_table_numbers_are_forgotten_in_turn():
    made = log()
    for table_id in range(1000):
        made.gtid().table(table_id, "his.MS_BRDA", COLUMNS)
        made.insert(table_id, COLUMNS, [table_id, None, None]).xid()
    taking = decoder(rows=10_000)
    (batch,) = taking.feed(packets_of(made.packets)) + taking.flush()
    assert batch.captured == 1000
    assert len(taking._tables.arrays[0]) <= 256


def test_names_ignore_case_where_the_server_does():
    made = log().gtid().table(ID, "his.ms_brda", COLUMNS).insert(ID, COLUMNS, [1, None, None]).xid()
    assert decode(made)[0].captured == 0
    (batch,) = decode(made, fold=True)
    assert list(batch.tables) == ["his.MS_BRDA"]


def test_only_some_columns_are_carried():
    made = patients(log().gtid()).update(ID, COLUMNS, [1, "a", "b"], [2, "c", "d"]).xid()
    batches = decode(made, columns={"his.MS_BRDA": ["GMS"]})
    assert [(r["BRID"], r["GMS"], r["_old.BRID"], "BRXM" in r) for r in rows_of(batches)] == [
        ("1", "b", None, False),
        ("2", "d", "1", False),
    ]


def test_too_many_columns_are_refused_by_name():
    wide = [integer("BRID"), *[text(f"c{i}") for i in range(64)]]
    with pytest.raises(TooManyColumns, match=r"his\.MS_BRDA has 65 columns"):
        decode(log().gtid().table(ID, "his.MS_BRDA", wide))


def test_rows_without_their_key_or_a_wanted_column_are_told_whole():
    """Whoever refuses them keeps what a mended mapping will want."""
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, "a", "b"]).xid()
    (lacking_key,) = rows_of(decode(made, keys={"his.MS_BRDA": ["MZHM"]}))
    wanted = {"his.MS_BRDA": ["GMS", "GONE"]}
    (lacking_wanted,) = rows_of(decode(made, columns=wanted))
    for row in (lacking_key, lacking_wanted):
        assert (row["BRID"], row["BRXM"], row["GMS"]) == ("1", "a", "b")
    assert "_old.BRID" not in lacking_key and "MZHM" not in lacking_key


def test_a_wide_table_that_lacks_a_column_tells_the_others_that_are_wanted():
    wide = [integer("BRID"), *[text(f"c{i}") for i in range(64)]]
    made = log().gtid().table(ID, "his.MS_BRDA", wide)
    made = made.insert(ID, wide, [1, *["x"] * 64]).xid()
    (row,) = rows_of(decode(made, columns={"his.MS_BRDA": ["c3", "GONE"]}))
    assert row["c3"] == "x" and "c4" not in row


def test_flush_moves_an_idle_decoder_to_the_end_of_the_log():
    taking = decoder()
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, None, None]).xid()
    taking.feed(packets_of(made.packets))
    assert not taking.idle
    first, second = taking.flush(77)
    assert (second.begin, second.end) == (first.end, Position(border(1, made.offset), SEQ_END))
    assert (second.captured, second.commit_us_max) == (0, 77)
    assert taking.flush(78) == []
    assert taking.anchor == "0-7-1"
    taking.feed(packets_of(made.heartbeat().packets[-1:]))
    assert taking.flush(79) == []


def test_flush_never_passes_an_open_transaction():
    taking = decoder()
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, None, None]).xid()
    taking.feed(packets_of(made.packets[:-1]))
    assert taking.flush(1) == []
    assert not taking.idle
    assert [b.captured for b in taking.feed(packets_of(made.packets[-1:])) + taking.flush()] == [1]


def test_empty_transactions_move_the_position():
    made = log().gtid().xid().gtid().query("COMMIT")
    (batch,) = decode(made)
    assert (batch.captured, batch.tables) == (0, {})


def test_bytes_that_are_no_text_refuse_their_row_only():
    made = patients(log().gtid()).insert(
        ID, COLUMNS, [1, "张", None], [2, b"\xd5\xc5\xff", None], [3, b"\xd5", "x"]
    )
    made.update(ID, COLUMNS, [4, ABSENT, ABSENT], [ABSENT, b"\x80", ABSENT]).xid()
    (batch,) = decode(made)
    assert batch.captured == 4
    assert [row["BRID"] for row in rows_of([batch])] == ["1"]
    assert [(r.column, r.reason, r.position.seq, r.row["BRXM"]) for r in batch.rejects] == [
        ("BRXM", "invalid_text", 2, "\\xd5\\xc5\\xff"),
        ("BRXM", "invalid_text", 3, "\\xd5"),
        ("BRXM", "invalid_text", 4, "\\x80"),
    ]
    assert "GMS" not in batch.rejects[2].row  # Unchanged is not null.


# Statements.


def test_a_truncate_has_a_place_and_is_no_row():
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, None, None]).xid()
    place = transaction(1, made.offset)
    made.gtid(1).query("TRUNCATE TABLE MS_BRDA")
    (batch,) = decode(made)
    assert batch.truncates == (("his.MS_BRDA", Position(place, 1)),)
    assert (batch.captured, batch.end) == (1, Position(place, SEQ_END))
    assert decode(made, start=Position(place, SEQ_END)) == []


def test_a_rolled_back_group_leaves_nothing():
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, None, None]).query("ROLLBACK")
    patients(made.gtid()).insert(ID, COLUMNS, [2, None, None]).xid()
    assert [row["BRID"] for row in rows_of(decode(made))] == ["2"]


def test_a_rollback_to_a_savepoint_is_none():
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, None, None])
    made.query("SAVEPOINT a", placed=False).query("ROLLBACK TO `a`", placed=False).xid()
    assert [row["BRID"] for row in rows_of(decode(made))] == ["1"]


@pytest.mark.parametrize("end", ["rollback", "crash", "next group"])
def test_a_torn_transaction_that_was_given_out_in_part_is_a_gap(end):
    def write(made: Log) -> Log:
        patients(made.gtid()).insert(ID, COLUMNS, *[[i, None, None] for i in range(6)])
        if end == "rollback":
            return made.query("ROLLBACK")
        if end == "crash":
            made.rotate(2).format(placed=True)
        return patients(made.gtid()).insert(ID, COLUMNS, [7, None, None]).xid()

    made = write(log())
    with pytest.raises(LogUnusable, match="needs a new snapshot"):
        decode(made, rows=3)
    # What an earlier reader gave out counts too.
    with pytest.raises(LogUnusable):
        decode(made, start=Position(transaction(1, log().offset), 2))
    expected = [] if end == "rollback" else ["7"]
    assert [row["BRID"] for row in rows_of(decode(made))] == expected


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: log().gtid().query("INSERT INTO MS_BRDA VALUES (1)"), "changed by a statement"),
        (lambda: log().gtid(1).query("RENAME TABLE x TO MS_BRDA"), "renamed"),
        (lambda: log().event(26, b"\1\0\0"), "lost events"),
        (lambda: log().event(18, bytes(30)), "loaded by a statement"),
        (lambda: log().gtid(0x81, XID_A).query("XA COMMIT X'61',X'',1"), "distributed"),
        (lambda: Log().event(4, bytes(8) + b"other.000001", False, 0x20), "another name"),
    ],
)  # fmt: skip
def test_what_the_log_does_not_tell_is_a_gap(made, match):
    with pytest.raises(LogUnusable, match=match):
        decode(made())


XID_A = struct.pack("<IBB", 1, 1, 0) + b"a"
PREPARE_A = b"\0" + struct.pack("<III", 1, 1, 0) + b"a"


def prepared(made: Log, row: int) -> Log:
    patients(made.gtid(0x40, XID_A)).insert(ID, COLUMNS, [row, None, None])
    return made.query("XA END X'61',X'',1", placed=False).event(38, PREPARE_A)


def test_prepared_rows_count_where_they_are_committed():
    made = prepared(log(), 1)
    patients(made.gtid()).insert(ID, COLUMNS, [2, None, None]).xid()
    place = transaction(1, made.offset)
    made.gtid(0x81, XID_A).query("XA COMMIT X'61',X'',1")
    prepared(made, 3).gtid(0x81, XID_A).query("XA ROLLBACK X'61',X'',1")
    rows = rows_of(decode(made))
    assert [row["BRID"] for row in rows] == ["2", "1"]
    assert (rows[1]["_lsn"], rows[1]["_seq"]) == (place, 1)
    assert rows_of(decode(made, start=Position(place, SEQ_END))) == []


def test_prepared_rows_that_are_too_many_are_a_gap():
    made = log().gtid(0x40, XID_A)
    patients(made).insert(ID, COLUMNS, *[[i, "x" * 30, None] for i in range(100)])
    made.event(38, PREPARE_A).gtid(0x81, XID_A).query("XA COMMIT X'61',X'',1")
    with pytest.raises(LogUnusable):
        decode(made, size=1000)
    assert len(rows_of(decode(made, size=10_000))) == 100


# MySQL's own events.


def mysql_gtid(made: Log, commit_us: int = 0) -> Log:
    made.number += 1
    body = b"\1" + bytes(16) + struct.pack("<QB", made.number, 2) + struct.pack("<qq", 0, 1)
    return made.event(33, body + commit_us.to_bytes(7, "little") + bytes(3))


def test_transactions_and_statements_of_mysql():
    made = mysql_gtid(log(), 1_700_000_000_123_456).query("BEGIN")
    patients(made)
    body = struct.pack("<IHH", ID, 0, 1) + b"\x02\0" + b"\x03\x07" + b"\x06" + struct.pack("<i", 5)
    made.event(30, body).xid()
    place = transaction(1, made.offset)
    mysql_gtid(made).query("TRUNCATE TABLE MS_BRDA")
    mysql_gtid(made).query("BEGIN")
    patients(made).insert(ID, COLUMNS, [6, None, None]).query("COMMIT")
    (batch,) = decode(made)
    rows = rows_of([batch])
    assert [(row["BRID"], row["BRXM"]) for row in rows] == [("5", None), ("6", None)]
    assert rows[0]["_commit_us"] == 1_700_000_000_123_456
    assert batch.truncates == (("his.MS_BRDA", Position(place, 1)),)


@pytest.mark.parametrize("kind", [39, 40])
def test_forms_of_mysql_that_cannot_be_read_are_named(kind):
    with pytest.raises(ProtocolError, match="SET GLOBAL"):
        decode(log().event(kind, bytes(40)))


# What is damaged or out of place.


def test_an_error_of_the_server_is_told_by_its_number():
    packet = b"\xff" + struct.pack("<H", 1236) + b"#HY000Could not find first log file"
    with pytest.raises(ServerRefused) as caught:
        decoder().feed(packets_of([packet]))
    assert caught.value.code == 1236
    with pytest.raises(ServerRefused):
        decoder().feed(packets_of([b"\xfe\0\0\0\0"]))


def test_a_flipped_bit_fails_the_checksum():
    made = patients(log().gtid()).insert(ID, COLUMNS, [1, "张三", None]).xid()
    for packet, content in enumerate(made.packets[2:], 2):
        for at in (20, 25, len(content) - 5):
            damaged = bytearray(content)
            damaged[at] ^= 4
            packets = [*made.packets[:packet], bytes(damaged), *made.packets[packet + 1 :]]
            with pytest.raises(ProtocolError, match="checksum"):
                decoder().feed(packets_of(packets))


@pytest.mark.parametrize(
    "made",
    [
        lambda made: made.event(99, b""),
        lambda made: made.insert(ID, COLUMNS, [1, None, None]),  # Outside of a transaction.
        lambda made: made.gtid().insert(5, COLUMNS, [1, None, None]),  # Of no known table.
        lambda made: made.xid(),
        lambda made: patients(made.gtid()).event(23, struct.pack("<IHH", ID, 0, 1) + b"\4\x0f"),
        lambda made: patients(made.gtid()).event(23, struct.pack("<IHH", ID, 0, 1) + b"\3\7\0\1"),
        lambda made: made.gtid().event(19, bytes(12)),
        lambda made: made.event(15, bytes(60)),
    ],
)
def test_what_is_unknown_or_out_of_place_is_named(made):
    with pytest.raises(ProtocolError, match=r"after binlog\.000001:"):
        decode(made(log()))


@hypothesis.given(st.data())
def test_damage_is_an_error_or_other_values_never_a_crash(data):
    made = patients(Log(checksum=False).rotate(1, 256).format().gtid())
    made.update(ID, COLUMNS, [12, "会诊", ABSENT], [1, "b", ABSENT]).xid()
    which = data.draw(st.integers(2, len(made.packets) - 1))
    damaged = bytearray(made.packets[which])
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    made.packets[which] = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    taking = decoder(checksum=False)
    try:
        batches = taking.feed(packets_of(made.packets)) + taking.flush()
    except (ProtocolError, ServerRefused, LogUnusable, KeyUnknown, LogSettingsWrong):
        return
    except (MetadataMissing, TooManyColumns):
        return
    assert sum(batch.captured for batch in batches) <= 30


# Any log, beside what was written.

TABLES = {"his.A": 1, "his.B": 2, "his.C": 3}
ANY_KEYS = {name: ["k"] for name in ("his.A", "his.B")}
words = st.sampled_from(["", "1", "会诊", "x" * 15, "y" * 17, "匼" * 20])


@st.composite
def logs(draw) -> tuple[Log, list[tuple]]:
    """A log over tables that grow and shrink, and the rows that are in it."""
    made, expected = log(), []
    widths = {name: draw(st.integers(1, 3)) for name in TABLES}
    for _ in range(draw(st.integers(0, 5))):
        place, seq = transaction(1, made.offset), 0
        made.gtid()
        for _ in range(draw(st.integers(0, 4))):
            name = draw(st.sampled_from(sorted(TABLES)))
            if draw(st.integers(0, 5)) == 0:
                widths[name] = draw(st.integers(1, 3))
            columns = [integer("k"), *[text(f"c{i}") for i in range(widths[name])]]
            made.table(TABLES[name] + 10 * widths[name], name, columns)
            images = draw(
                st.lists(
                    st.tuples(st.integers(0, 3), *[st.none() | words for _ in columns[1:]]),
                    min_size=2, max_size=6,
                )
            )  # fmt: skip
            kind = draw(st.sampled_from("IUD"))
            images = images[: len(images) // 2 * 2]
            write = {"I": made.insert, "U": made.update, "D": made.delete}[kind]
            write(TABLES[name] + 10 * widths[name], columns, *images)
            wanted = name in ANY_KEYS
            for i in range(0, len(images), 2 if kind == "U" else 1):
                row = images[i + 1] if kind == "U" else images[i]
                seq += 1
                if kind == "U" and wanted and row[0] != images[i][0]:
                    expected.append((name, "D", place, seq, *_texts(images[i]), None))
                    seq += 1
                    expected.append((name, "U", place, seq, *_texts(row), str(images[i][0])))
                elif wanted:
                    expected.append((name, kind, place, seq, *_texts(row), None))
        made.xid()
        if draw(st.booleans()):
            made.heartbeat()
    return made, expected


def _texts(row: tuple) -> list:
    return [None if value is None else str(value) for value in row]


def plain(batches: list[RawChanges]) -> list[tuple]:
    return [
        (
            row["table"],
            chr(row["_op"]),
            row["_lsn"],
            row["_seq"],
            *[value for name, value in row.items() if name[:1] not in ("_", "t")],
            row["_old.k"],
        )
        for row in rows_of(batches)
    ]


def check_joins(batches: list[RawChanges], start: Position) -> None:
    at = start
    for batch in batches:
        assert batch.begin == at < batch.end
        at = batch.end
        assert batch.captured == sum(table.num_rows for table in batch.tables.values())
        for table in batch.tables.values():
            table.validate(full=True)
            for row in table.to_pylist():
                assert batch.begin < (row["_lsn"], row["_seq"]) <= batch.end


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    logs(),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([1, 60, 200, 1 << 20]),
    st.data(),
)
def test_any_log_in_any_chunks_resumed_anywhere(given, sizes, batch_rows, batch_bytes, data):
    made, expected = given
    options = {"rows": batch_rows, "size": batch_bytes, "keys": ANY_KEYS}
    whole = decode(made, **options)
    check_joins(whole, BEGIN)
    assert plain(whole) == expected

    taking, flushing = decoder(**options), decoder(**options)
    chunked, flushed, rest = [], [], made.packets
    turn = 0
    while rest:
        size = sizes[turn % len(sizes)]
        packets, rest, turn = packets_of(rest[:size]), rest[size:], turn + 1
        chunked += taking.feed(packets)
        flushed += flushing.feed(packets)
        flushed += flushing.flush() if data.draw(st.booleans()) else []
    assert chunked + taking.flush() == whole
    flushed += flushing.flush()
    check_joins(flushed, BEGIN)
    assert plain(flushed) == expected

    if whole:
        start = data.draw(st.sampled_from([batch.end for batch in whole + flushed]))
        again = decode(made, start=start, **options)
        check_joins(again, start)
        assert plain(again) == [row for row in expected if row[2:4] > start]


def test_memory_does_not_grow_with_the_log():
    taking = decoder(rows=10)
    for _ in range(100):
        made = log()
        made.packets.clear()
        patients(made.gtid()).insert(ID, COLUMNS, *[[i, None, "x" * 299] for i in range(100)])
        taking.feed(packets_of(made.xid().packets))
    assert len(taking._buffer) < 10 * 40_000


def test_places_go_on_behind_four_gibibytes():
    """Places of events have 32 bits; a long transaction makes a file longer."""
    taking = decoder(start=Position(border(1, (1 << 32) - 500), SEQ_END), checksum=True)
    made = Log(offset=(1 << 32) - 500)
    places = []
    for i in range(5):
        places.append(transaction(1, made.offset))
        patients(made.gtid()).insert(ID, COLUMNS, [i, None, None]).xid()
    batches = taking.feed(packets_of(made.packets)) + taking.flush()
    assert [row["_lsn"] for row in rows_of(batches)] == places
    assert taking.log_end == border(1, made.offset)
    assert made.offset > 1 << 32


def test_gbk_is_the_collation_of_the_tables_here():
    assert CHARSETS[GBK] == "gbk"
