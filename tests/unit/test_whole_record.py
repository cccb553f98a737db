"""Records of a topic that were refused whole, read again under what is known now."""

import dataclasses

import pytest

from schemas.positions import SEQ_END, Position
from tests.debezium_events import Topic
from tests.unit.test_debezium_decoder import FIELDS, KEYS, SPECS, TABLE
from transforms.capture.debezium.decoder import OLD_KEY, DebeziumDecoder
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import Record
from transforms.capture.debezium.whole_record import is_whole, read_again

WRONG = {TABLE: TableSpec(("nobody_has_it",))}


def refused(record: Record, specs=WRONG):
    """Returns what became of a record when it came."""
    decoder = DebeziumDecoder(10, 1 << 20, Position(record.offset, SEQ_END), specs)
    (raw,) = [*decoder.feed([record]), *decoder.flush(whole=False)]
    (reject,) = raw.rejects
    return reject


def topic() -> Topic:
    return Topic("postgresql", FIELDS, KEYS)


@pytest.mark.parametrize("op", ["c", "r", "u", "d"])
def test_a_record_becomes_what_capture_would_have_made_of_it(op):
    row = {"id": 7, "c": "张三\\ \n"}
    before = row if op in "ud" else None
    record = topic().change(op, TABLE, before, None if op == "d" else row)
    reject = refused(record)
    assert (reject.reason, is_whole(reject)) == ("missing_key", True)
    read = read_again(reject, SPECS)
    decoder = DebeziumDecoder(10, 1 << 20, Position(record.offset, SEQ_END), SPECS)
    (raw,) = [*decoder.feed([record]), *decoder.flush()]
    assert read.table == TABLE
    assert read.rows.equals(raw.tables[TABLE])
    assert read.rows["_lsn"][0].as_py() == reject.position.lsn


def test_the_old_key_of_a_moved_row_is_kept():
    made = topic()
    record = made.change("c", TABLE, None, {"id": 8, "c": "a"}, headers={OLD_KEY: {"id": 7}})
    reject = refused(record)
    assert is_whole(reject)
    rows = read_again(reject, SPECS).rows.to_pylist()
    assert [(chr(row["_op"]), row["id"], row["_old.id"]) for row in rows] == [("U", "8", "7")]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{", "not_json"),
        (b'{"a": "\xff"}', "not_json"),
        (b"[1]", "unknown_event"),
        (b'{"op": "z", "source": {"connector": "mysql", "db": "his", "table": "t"}}', None),
    ],
)
def test_what_is_no_event_stays_refused(value, reason):
    reject = refused(Record(4, None, value), SPECS)
    read = read_again(reject, SPECS)
    assert (read.rows, read.reason) == (None, reason or reject.reason)


def test_two_changes_of_one_record_are_not_one():
    made = topic()
    record = made.change("u", TABLE, {"id": 1, "c": "a"}, {"id": 2, "c": "a"})
    read = read_again(refused(record), SPECS)
    assert (read.rows, read.reason, read.table) == (None, "key_changed", TABLE)


def test_a_table_that_nobody_reads_any_more_is_told():
    record = topic().change("c", TABLE, None, {"id": 7, "c": "a"})
    assert read_again(refused(record), {}).reason == "unknown_table"


def test_a_rows_own_columns_are_no_record():
    record = topic().change("c", TABLE, None, {"id": 7, "c": "a"})
    reject = refused(record)
    for row in ({"id": "1"}, {"key": "1"}, {"key": "1", "value": "2", "unit": "3"}):
        assert not is_whole(dataclasses.replace(reject, row=row))
