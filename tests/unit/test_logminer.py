"""Campus C's events: Debezium's form, Oracle's encodings, and the rows that went in."""

import dataclasses
import decimal
import itertools
import json

import pytest

from runners.embedded.campus_c import SCHEMA, OracleDialect
from runners.embedded.dialect import RowChange
from runners.embedded.logminer import (
    UNAVAILABLE,
    Commit,
    Event,
    Redo,
    Transaction,
    marked,
    snapshot_event,
)
from runners.embedded.oracle_tables import OracleType, hints, oracle_tables, postgresql_script
from schemas.mappings import load_mapping
from schemas.positions import START
from tests.debezium_events import load as recorded
from tests.memory_store import MemoryStore
from tests.unit.test_dialects import Told, assert_same, plain_key, tell
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.hints import table_specs
from transforms.capture.debezium.record import Record
from transforms.harmonise import Harmoniser

TABLES = oracle_tables()
MAPPING = load_mapping("oracle_his")
NOW_US = 1_790_000_000_600_000


def as_postgresql_tells(table: str, row: dict | None) -> dict | None:
    """A dialect's row as `to_jsonb` has it."""
    if row is None:
        return None
    told = dict.fromkeys(TABLES[table].columns)
    for name, value in row.items():
        kind = TABLES[table].columns[name]
        if value is not None and kind.name == "NUMBER":
            value = decimal.Decimal(value).quantize(decimal.Decimal(1).scaleb(-kind.scale))
            value = value if kind.scale else int(value)
        if value is not None and kind.name == "DATE":
            value = value.replace(" ", "T")
        told[name] = value
    return told


def redo(seq: int, change: RowChange) -> Redo:
    rows = (as_postgresql_tells(change.table, row) for row in (change.before, change.after))
    op = {"insert": "c", "update": "u", "delete": "d"}[change.op]
    return Redo(seq, op, change.table, *rows, NOW_US)


def mined(transactions: list[list[RowChange]]) -> list[list[Event]]:
    """Every transaction's events."""
    seq, found = itertools.count(1), []
    for number, changes in enumerate(filter(None, transactions), 700):
        log = [redo(next(seq), change) for change in changes]
        transaction = Transaction(Commit(number, log[0].seq, log[-1].seq, NOW_US), TABLES)
        events = [transaction.begin()]
        events += itertools.chain.from_iterable(map(transaction.events, log))
        found.append([*events, transaction.end()])
    return found


def records(events) -> list[Record]:
    return [Record(i, e.key, e.value, e.headers) for i, e in enumerate(events)]


def decoder() -> DebeziumDecoder:
    return DebeziumDecoder(500, 1 << 20, START, table_specs(MAPPING, hints()), sweep=True)


def stored(events) -> MemoryStore:
    """What a store holds of the events; nothing may be refused, odd or unknown."""
    store, harmoniser, reader = MemoryStore(MAPPING), Harmoniser(MAPPING), decoder()
    for raw in (*reader.feed(records(events)), *reader.flush()):
        done = harmoniser.apply(raw)
        assert (raw.rejects, done.rejects, done.notes, done.unknown_codes) == ((), [], {}, {})
        store.apply(done.tables)
    return store


@pytest.fixture(scope="module")
def told() -> Told:
    return tell("cloud", False, OracleDialect(), 29, 60)


def key_of_campus_c(told: Told):
    def key_of(table: str, row: dict) -> str:
        if table == "lis.result":
            report, place = told.dialect._places[row["result_id"]]
            return f"{report}|{place}|{place}"
        if table == "his.patient":
            return row["mrn"]
        if table == "his.visit":
            return f"{row['mrn']}|{told.dialect.number_of(row['visit_no'])}"
        return plain_key(table, row)

    return key_of


def test_stories_arrive_through_the_events_as_they_were(told):
    events = list(itertools.chain.from_iterable(mined(told.transactions)))
    # A department's code is the campus's own: test_dialects has it.
    left = {table: rows for table, rows in told.left.items() if table != "his.department"}
    told = dataclasses.replace(told, left=left)
    counts = assert_same(told, stored(events), True, key_of_campus_c(told))
    assert counts["lab_result"] > 300 and counts["prescription"] > 50


def test_what_is_sent_again_changes_nothing(told):
    """After a crash a connector sends a stretch again, from the beginning or the midst of one."""
    events = mined(told.transactions[:40])
    once = stored(itertools.chain.from_iterable(events))
    broken = [*events[:30], events[30][:-2], *events[20:]]
    again = stored(itertools.chain.from_iterable(broken))
    for table in ("patient", "visit", "lab_result", "medical_order"):
        assert again.live(table) == once.live(table)


def shape(value: dict) -> dict:
    return {name: sorted(part) if isinstance(part, dict) else None for name, part in value.items()}


def test_events_have_the_form_of_the_recorded_ones(told):
    """The members of envelope, source and transaction; before and after are the table's."""
    known = {}
    for record in recorded("oracle_plain"):
        if record.value is not None:
            value = json.loads(record.value)
            known[value.get("op") or value.get("status")] = value
    made = {}
    for event in itertools.chain.from_iterable(mined(told.transactions)):
        if event.value is not None:
            value = json.loads(event.value)
            made[value.get("op") or value["status"]] = value
    row = as_postgresql_tells("ORDERS", {"ORDER_NO": 1})
    made["r"] = json.loads(snapshot_event(TABLES["ORDERS"], row, "first", 0, NOW_US).value)
    for kind in ("c", "u", "d", "r", "BEGIN", "END"):
        ours, theirs = (dict(all_of[kind]) for all_of in (made, known))
        for side in (ours, theirs):
            side.pop("before", None), side.pop("after", None)
        assert shape(ours) == shape(theirs), kind
    # Times in V$LOGMNR_CONTENTS have no part of a second.
    assert made["c"]["source"]["commit_ts_ms"] % 1000 == 0


def one(change: RowChange) -> list[dict | None]:
    transaction = Transaction(Commit(1, 1, 1, NOW_US), TABLES)
    events = transaction.events(redo(1, change))
    return [None if event.value is None else json.loads(event.value) for event in events]


def test_values_are_encoded_as_the_connector_does():
    row = {"REC_NO": 7, "TEMPERATURE": "36.5", "PULSE": 80, "TIME_POINT": "2026-03-01 08:30:00"}
    (event,) = one(RowChange("insert", "VITAL_SIGNS_REC", None, row, ("REC_NO",)))
    after = event["after"]
    assert (after["REC_NO"], after["PULSE"], after["SPO2"]) == (7, 80, None)
    assert after["TEMPERATURE"] == "AW0="  # 365, big-endian.
    assert after["TIME_POINT"] == 1_772_353_800_000  # 08:30 as if it were UTC.


def test_a_changed_key_is_a_delete_a_tombstone_and_an_insert():
    old = {"ORDER_NO": 1, "ORDER_TEXT": "心电图"}
    change = RowChange("update", "ORDERS", old, old | {"ORDER_NO": 2}, ("ORDER_NO",))
    transaction = Transaction(Commit(1, 1, 1, NOW_US), TABLES)
    events = transaction.events(redo(1, change))
    assert [e.value and json.loads(e.value)["op"] for e in events] == ["d", None, "c"]
    assert events[0].headers == (("__debezium.newkey", b'{"ORDER_NO":2}'),)
    assert events[2].headers == (("__debezium.oldkey", b'{"ORDER_NO":1}'),)
    end = json.loads(transaction.end().value)
    counts = [{"data_collection": "ORCLPDB1.HIS.ORDERS", "event_count": 2}]
    assert (end["event_count"], end["data_collections"]) == (2, counts)


def test_a_clob_that_is_left_alone_is_not_in_the_redo():
    row = {"FILE_NO": 1, "FILE_CONTENT": "很长", "STATUS": "0"}
    signed, corrected = row | {"STATUS": "1"}, row | {"FILE_CONTENT": "更长"}
    (left,) = one(RowChange("update", "MR_FILE_INDEX", row, signed, ("FILE_NO",)))
    (new,) = one(RowChange("update", "MR_FILE_INDEX", row, corrected, ("FILE_NO",)))
    assert left["after"]["FILE_CONTENT"] == left["before"]["FILE_CONTENT"] == UNAVAILABLE
    assert new["after"]["FILE_CONTENT"] == "更长"
    assert new["before"]["FILE_CONTENT"] == UNAVAILABLE


def test_a_snapshot_marks_where_it_begins_and_ends():
    a, b, c = (TABLES[name] for name in ("ORDERS", "DIAGNOSIS", "DEPT_DICT"))
    rows = [(a, iter([{"n": 1}, {"n": 2}, {"n": 3}])), (c, iter([])), (b, iter([{"n": 4}]))]
    rows.append((c, iter([{"n": 5}, {"n": 6}])))
    assert [(row["n"], marker) for _, row, marker in marked(rows)] == [
        *((1, "first"), (2, "true"), (3, "last_in_data_collection")),
        (4, "first_in_data_collection"),
        *((5, "first_in_data_collection"), (6, "last")),
    ]
    assert list(marked([])) == []


def test_tables_are_those_that_the_mapping_reads():
    assert {f"{SCHEMA}.{name}" for name in TABLES} == set(MAPPING.tables)
    for name, part in MAPPING.tables.items():
        table = TABLES[name.partition(".")[2]]
        assert set(part.needed) | set(part.ignore) == set(table.columns)
        assert tuple(part.id) == table.key
    assert TABLES["DRUG_PRESC_DETAIL"].columns["DOSAGE"] == OracleType("NUMBER", 12, 4)
    script = postgresql_script()
    assert script.count("CREATE TABLE") == len(TABLES)
    assert '"DOSAGE" numeric(12, 4)' in script and '"ENTER_DATE_TIME" timestamp(0)' in script


def test_what_the_dialect_says_an_oracle_could_hold(told):
    """VARCHAR2 counts bytes of ZHS16GBK."""
    for change in itertools.chain.from_iterable(told.transactions):
        for name, value in (change.after or {}).items():
            kind = TABLES[change.table].columns[name]
            if kind.name == "VARCHAR2" and value is not None:
                assert len(str(value).encode("gbk")) <= kind.length, (change.table, name, value)
            if kind.name == "NUMBER" and value is not None:
                assert abs(decimal.Decimal(value)) < 10 ** (kind.length - kind.scale)
