"""Recorded and made-up events of every connector, and what each kind of event becomes."""

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, START, Position
from tests.debezium_events import CONNECTORS, PLACEHOLDER, Topic, dump, field, load, save
from tests.debezium_made_up import FILES, ORACLE_KEYS, PATIENT, RESULT, SQLSERVER_KEYS
from transforms.capture.columns import TooManyColumns
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.hints import TableSpec, encoding_of_hint
from transforms.capture.debezium.record import FlattenedEvents, Record

TABLE = "his.t"
FIELDS = {TABLE: [field("id", "int32"), field("c", "string")]}
KEYS = {TABLE: ("id",)}
SPECS = {TABLE: TableSpec(("id",))}
POSTGRES_KEYS = {"his.patient": ("pid",), "his.result": ("result_id",), "his.kinds": ("id",)}
MARIADB_KEYS = {"his.MS_BRDA": ("BRID",), "his.kinds": ("id",)}
RECORDED = {
    "postgresql": POSTGRES_KEYS,
    "mariadb": MARIADB_KEYS,
    "oracle": ORACLE_KEYS,
    "sqlserver": SQLSERVER_KEYS,
}
FILES_AND_KEYS = [
    *(
        (f"{name}{mode}", RECORDED[name])
        for name in ("postgresql", "mariadb")
        for mode in ("", "_plain", "_iso", "_connect", "_nanos")
    ),
    *(
        (f"{name}{mode}", RECORDED[name])
        for name in ("oracle", "sqlserver")
        for mode in ("", "_plain")
    ),
]
# What a schema would tell of the tables, for the files that have none.
HINTS = {
    "postgresql_plain": {
        "by": "hex",
        "d": "days",
        "ti": "micros_of_day",
        "ti3": "millis_of_day",
        "tz": "zoned_time",
        "ts": "micros",
        "ts3": "millis",
        "tsz": "zoned",
        "iv": "micros_of_day",
        "bi4": "bits:12",
        "vb": "bits:20",
        "birth_date": "days",
        "updated_at": "zoned",
        "result_at": "zoned",
    },
    "postgresql_iso": {
        "n2": "decimal:4",
        "m": "decimal:2",
        "by": "base64",
        "d": "iso",
        "ti": "iso_time",
        "ti3": "iso_time",
        "tz": "zoned_time",
        "ts": "iso",
        "ts3": "iso",
        "tsz": "zoned",
        "bi4": "bits:12",
        "vb": "bits:20",
        "birth_date": "iso",
        "updated_at": "zoned",
        "result_at": "zoned",
        "val_num": "decimal:4",
    },
    "mariadb_plain": {
        "vb": "hex",
        "bl": "hex",
        "d": "days",
        "ti": "micros_of_day",
        "dt": "millis",
        "dt3": "millis",
        "dt6": "micros",
        "ts": "zoned",
        "bi12": "bits:12",
        "XGSJ": "millis",
    },
    "mariadb_iso": {
        "n": "decimal:4",
        "vb": "base64",
        "bl": "base64",
        "d": "iso",
        "ti": "iso_time",
        "dt": "iso",
        "dt3": "iso",
        "dt6": "iso",
        "ts": "zoned",
        "bi12": "bits:12",
        "XGSJ": "iso",
    },
    "oracle_plain": {
        "DATE_OF_BIRTH": "millis",
        "REQUESTED_DATE_TIME": "millis",
        "RESULT_DATE_TIME": "millis",
        "RESULTS_RPT_DATE_TIME": "micros",
        "TZ": "zoned",
        "TS9": "nanos",
        "IV": "micros_of_day",
        "RW": "base64",
        "BF": "float",
        "BD": "float",
    },
    "sqlserver_plain": {
        "VALUE": "decimal:4",
        "PRICE": "decimal:4",
        "DAY": "days",
        "AT_TIME": "nanos_of_day",
        "STARTED": "millis",
        "ENDED": "nanos",
        "REPORTED": "zoned",
        "IMAGE": "base64",
    },
}
POSTGRES_KINDS = {
    "id": "1",
    "b": "t",
    "i2": "-32768",
    "i8": "9223372036854775807",
    "f4": "1.5",
    "f8": "-2.25e-07",
    "n": "12345678901234567890.123456789",
    "n2": "6.8000",
    "m": "12.34",
    "t": "血钾 6.8",
    "c": "ab  ",
    "v": "vvv",
    "by": "\\x00ff10",
    "d": "2026-03-01",
    "ti": "23:59:59.999999",
    "ti3": "08:30:00.5",
    "tz": "00:30:00.123456+00",
    "ts": "2026-03-01 08:30:00.123456",
    "ts3": "2026-03-01 08:30:00.25",
    "tsz": "2026-03-01 00:30:00.123456+00",
    "iv": "10303:05:06.789",
    "u": "0190a6b2-7c1e-7000-8000-000000000001",
    "j": '{"a": 1}',
    "jb": '{"b": [1, 2]}',
    "bi": "t",
    "bi4": "101000000001",
    "vb": "00000000000000001101",
    "e": "II",
    "ia": "{1,NULL,-3}",
    "ta": '{"a,b",NULL,"c\\"d"}',
    "inet": "10.0.0.1",
    "r": "[1,5)",
}
MARIADB_KINDS = {
    "id": "4294967295",
    "b1": "1",
    "i1": "255",
    "i3": "-8388608",
    "i8": "-1",
    "f4": "1.5",
    "f8": "-2.25e-07",
    "n": "-6.8000",
    "t": "血钾 6.8 乗俓",
    "c": "20160305081500",
    "vb": "\\x00ff10",
    "bl": "\\x00",
    "d": "2026-03-01",
    "ti": "-838:59:59",
    "dt": "2026-03-01 08:30:00",
    "dt3": "2026-03-01 08:30:00.25",
    "dt6": "9999-12-31 23:59:59.999999",
    "ts": "2026-03-01 00:30:00.123456+00",
    "y": "2026",
    "e": "II",
    "s": "a,c",
    "bi": "t",
    "bi12": "101000000001",
    "j": '{"a": 1}',
}
ORACLE_NUMBERS = {
    "ID": "1",
    "N": "-12345678901234567890.5",
    "BF": "1.5",
    "BD": "-2.25e-07",
    "TZ": "2026-03-01 08:30:00.123456+08",
    "TS9": "2026-03-01 08:30:00.123456",
    "IV": "27:04:05",
    "RW": "\\x00ff10",
}
_INTERVAL = {"iv": "P1Y2M3DT4H5M6.789S"}
_LESS_JSON = {"ia": "[1,null,-3]", "ta": '["a,b",null,"c\\"d"]'}
_NO_MORE_THAN_MS = {"ti": "23:59:59.999", "ts": "2026-03-01 08:30:00.123"}
# What a mode changes in the first row of `kinds`.
CHANGED = {
    "postgresql": {},
    "postgresql_plain": _LESS_JSON,
    "postgresql_iso": _LESS_JSON | _INTERVAL,
    "postgresql_nanos": _INTERVAL,
    "postgresql_connect": _NO_MORE_THAN_MS | {"n": "1.2345678901234567e+19", "n2": "6.8"},
    "mariadb": {},
    "mariadb_plain": {},
    # A TIME beyond a day has no ISO form: the connector itself leaves it out.
    "mariadb_iso": {"ti": None},
    "mariadb_connect": {"ti": None, "n": "-6.8", "dt6": "9999-12-31 23:59:59.999"},
    # Beyond 2262 nanoseconds leave 64 bits, and the connector says nothing.
    "mariadb_nanos": {
        "i8": "18446744073709551615",
        "ti": "-838:59:59",
        "dt6": "1816-03-30 05:56:08.066276",
    },
}


def specs(name: str, keys: dict) -> dict[str, TableSpec]:
    hints = {c: encoding_of_hint(hint) for c, hint in HINTS.get(name, {}).items()}
    return {table: TableSpec(key, None, hints) for table, key in keys.items()}


def decode(records, tables=SPECS, **options) -> list[RawChanges]:
    decoder = DebeziumDecoder(1000, 1 << 24, START, tables, **options)
    batches = decoder.feed(records) + decoder.flush()
    for raw in batches:
        held = sum(table.num_rows for table in raw.tables.values())
        assert raw.captured == held + len(raw.rejects)
    return batches


def rows_of(batches: list[RawChanges], table: str) -> list[dict]:
    return [row for raw in batches if table in raw.tables for row in raw.tables[table].to_pylist()]


def short(rows: list[dict]) -> list[tuple]:
    return [
        (chr(row["_op"]), *(v for n, v in row.items() if n[0] != "_" or n[:4] == "_old"))
        for row in rows
    ]


# What differs from one recording to the next.
TOLD_ONCE = ("_lsn", "_commit_us", "updated_at", "result_at", "XGSJ")

# Recorded.


@pytest.mark.parametrize("name", CHANGED)
def test_recorded_kinds(name):
    connector = name.partition("_")[0]
    batches = decode(load(name), specs(name, RECORDED[connector]))
    row = rows_of(batches, "his.kinds")[0]
    expected = POSTGRES_KINDS if connector == "postgresql" else MARIADB_KINDS
    assert {n: v for n, v in row.items() if n[0] != "_"} == expected | CHANGED[name]


@pytest.mark.parametrize("name", ["oracle", "oracle_plain"])
def test_made_up_oracle_kinds(name):
    (row,) = rows_of(decode(load(name), specs(name, ORACLE_KEYS)), "LAB.NUMBERS")
    assert {n: v for n, v in row.items() if n[0] != "_"} == ORACLE_NUMBERS


@pytest.mark.parametrize("name", ["postgresql", "mariadb", "oracle", "sqlserver"])
def test_with_and_without_schema_the_rows_are_the_same(name):
    keys = RECORDED[name]
    ways = [(decode(load(f), specs(f, keys))) for f in (name, f"{name}_plain")]
    for table in keys.keys() - {"his.kinds"}:
        both = [
            [{n: v for n, v in row.items() if n not in TOLD_ONCE} for row in rows_of(way, table)]
            for way in ways
        ]
        assert both[0] == both[1]


@pytest.mark.parametrize(("name", "keys"), FILES_AND_KEYS)
def test_every_recorded_event_is_accounted_for(name, keys):
    records = load(name)
    batches = decode(records, specs(name, keys))
    # A connector that is stopped leaves its last transaction, a TRUNCATE, without an end.
    end = batches[-1].end
    assert end in (
        Position(len(records), SEQ_END),
        Position(len(records) - 2, SEQ_END),
        Position(len(records) - 1, SEQ_END),
    ) or name.startswith("mariadb")
    # `infinity`, and an insert without its CLOB, cannot be carried; all else can.
    reasons = {reject.reason for raw in batches for reject in raw.rejects}
    assert reasons <= {"bad_value", "partial_row"}


@pytest.mark.parametrize("name", FILES)
def test_the_made_up_files_are_what_the_generator_makes(name):
    records = FILES[name]().records
    assert [r._replace(headers=tuple(r.headers)) for r in records] == load(name)
    assert save(name, records)


def test_recorded_patients_of_postgresql():
    batches = decode(load("postgresql"), specs("postgresql", POSTGRES_KEYS))
    rows = rows_of(batches, "his.patient")
    assert [(chr(r["_op"]), r["pid"], r["name"], r["_old.pid"]) for r in rows] == [
        ("R", "1", "测试1", None),
        ("R", "2", "测试2", None),
        ("R", "3", "测试3", None),
        ("I", "4", "䶮𬭎", None),
        ("U", "4", "改名", None),
        ("D", "4", None, None),
        ("U", "40", "改名", "4"),
        ("U", "1", "测试1", None),
        ("U", "2", "测试2", None),
        ("D", "3", None, None),
        ("U", "1", "测试1", None),
    ]
    # The long text was not in the log: neither null nor the placeholder (traps 8, 9).
    assert [r["_unchanged"] for r in rows[3:7]] == [0, 1 << 5, 0b1111110, 1 << 5]
    assert {raw.truncates[0][0] for raw in batches if raw.truncates} == {"his.result"}
    # The five rows of a COPY have one LSN (trap 4).
    copied = [r for r in rows_of(batches, "his.result") if r["mrn"] in ("M0", "M1", "M2", "M3")]
    assert len(copied) == 4


def test_recorded_patients_of_mariadb():
    batches = decode(load("mariadb"), specs("mariadb", MARIADB_KEYS))
    rows = rows_of(batches, "his.MS_BRDA")
    assert [(chr(r["_op"]), r["BRID"], r["BRXM"], r["_old.BRID"]) for r in rows] == [
        ("R", "1", "张三", None),
        ("R", "2", "李四", None),
        ("I", "3", "王五", None),
        ("U", "3", "王小五", None),  # At the same place of the log as the insert.
        ("D", "3", None, None),
        ("U", "30", "王小五", "3"),
        ("D", "2", None, None),
        ("U", "1", "张三", None),
    ]
    assert "SFZH" not in batches[0].tables["his.MS_BRDA"].schema.names
    assert rows[-1]["SFZH"] == "11010519491231002X"


def test_oracle_s_nodes_commit_each_in_its_own_order():
    batches = decode(load("oracle"), specs("oracle", ORACLE_KEYS))
    names = [r["PATIENT_ID"] for r in rows_of(batches, PATIENT) if r["_op"] != Op.SNAPSHOT]
    assert names == ["P000000", "P000014", "P000013", "P000001", "P900001"]
    (rekeyed,) = [r for r in rows_of(batches, PATIENT) if r["_old.PATIENT_ID"]]
    assert (rekeyed["_old.PATIENT_ID"], rekeyed["PATIENT_ID"]) == ("P000001", "P900001")
    first = rows_of(batches, RESULT)[0]
    assert first["RESULT_DATE_TIME"] == "2026-03-01 08:00:00"  # DATE has no zone, nor this.


# Kinds of events.


@pytest.fixture(params=CONNECTORS)
def topic(request) -> Topic:
    return Topic(request.param, FIELDS, KEYS)


def row(i: int, c: str | None = "x") -> dict:
    return {"id": i, "c": c}


@pytest.mark.parametrize("schemas", [True, False])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_each_operation(connector, schemas):
    topic = Topic(connector, FIELDS, KEYS, schemas)
    topic.change("r", TABLE, None, row(1), {"snapshot": "true"})
    topic.change("c", TABLE, None, row(2))
    topic.change("u", TABLE, row(2), row(2, None))
    topic.change("d", TABLE, row(2, None), None)
    topic.tombstone(TABLE, {"id": 2})
    topic.change("t", TABLE, None, None)
    (raw,) = decode(topic.records)
    assert short(rows_of([raw], TABLE)) == [
        ("R", "1", "x", None),
        ("I", "2", "x", None),
        ("U", "2", None, None),
        ("D", "2", None, None),
    ]
    assert raw.tables[TABLE]["_unchanged"].to_pylist() == [0, 0, 0, 2]
    assert raw.tables[TABLE]["_lsn"].to_pylist() == [1, 2, 3, 4]
    assert raw.truncates == ((TABLE, Position(6, 1)),)
    assert (raw.begin, raw.end, raw.captured) == (START, Position(6, SEQ_END), 4)


def test_an_update_of_the_key_is_two_rows_at_one_place(topic):
    topic.change("u", TABLE, row(1, "a"), row(2, "b"))
    topic.change("u", TABLE, row(2, "b"), row(2, "c"))
    (raw,) = decode(topic.records)
    rows = rows_of([raw], TABLE)
    assert short(rows) == [("D", "1", None, None), ("U", "2", "b", "1"), ("U", "2", "c", None)]
    assert [(r["_lsn"], r["_seq"]) for r in rows] == [(1, 1), (1, 2), (2, 1)]
    assert raw.captured == 3
    halfway = DebeziumDecoder(9, 999_999, Position(1, 1), SPECS)
    (rest,) = halfway.feed(topic.records) + halfway.flush()
    assert rest.captured == 2
    assert rows_of([rest], TABLE) == rows[1:]


def test_a_key_change_in_two_events_is_joined_by_its_header(topic):
    """Trap 5: the new row may lack what did not change."""
    topic.change("d", TABLE, row(1), None, headers={"__debezium.newkey": {"id": 2}})
    topic.tombstone(TABLE, {"id": 1})
    old = {"__debezium.oldkey": {"id": 1}}
    topic.change("c", TABLE, None, row(2, PLACEHOLDER), headers=old)
    (raw,) = decode(topic.records)
    assert short(rows_of([raw], TABLE)) == [("D", "1", None, None), ("U", "2", None, "1")]
    assert raw.tables[TABLE]["_unchanged"].to_pylist() == [2, 2]


def test_a_delete_needs_its_key_only(topic):
    topic.change("c", TABLE, None, row(1))
    topic.change("d", TABLE, {"id": 1}, None)
    topic.change("d", TABLE, None, None, key={"id": 2})
    topic.change("d", TABLE, {"id": None, "c": ""}, None, key={"id": 3})
    (raw,) = decode(topic.records)
    assert short(rows_of([raw], TABLE))[1:] == [(("D"), str(i), None, None) for i in (1, 2, 3)]


def test_a_delete_before_all_else_has_the_columns_that_the_mapping_reads():
    topic = Topic("postgresql", FIELDS, KEYS, schemas=False)
    topic.change("d", TABLE, {"id": 1}, None)
    (raw,) = decode(topic.records, {TABLE: TableSpec(("id",), ("id", "c"))})
    assert raw.tables[TABLE].schema.names[5:] == ["id", "c", "_old.id"]


def test_what_is_no_change_moves_the_position(topic):
    topic.heartbeat(1_800_000_000_000)
    topic.schema_change(TABLE, "ALTER TABLE t ADD d int")
    topic.tombstone(TABLE, {"id": 1})
    topic.put({"prefix": "p"}, {"op": "m", "source": topic.source(TABLE), "message": {}})
    topic.put({"id": "1"}, {"id": "1", "aggregate_type": "Initial Snapshot", "type": "COMPLETED"})
    (raw,) = decode(topic.records)
    assert (raw.captured, raw.tables, raw.rejects) == (0, {}, ())
    assert raw.end == Position(5, SEQ_END)
    assert raw.commit_us_max == 1_800_000_000_000_000


def test_other_tables_are_passed_over_and_not_counted(topic):
    other = Topic(topic.connector, {"his.other": FIELDS[TABLE]}, {"his.other": ("id",)})
    other.change("c", "his.other", None, row(1))
    other.change("t", "his.other", None, None)
    (raw,) = decode(other.records)
    assert (raw.captured, raw.tables, raw.truncates) == (0, {}, ())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not_json"),
        (b"\xff\xfe", "not_json"),
        (b'{"op": "c"', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"null", "unknown_event"),
        (b"[]", "unknown_event"),
        (b"5", "unknown_event"),
        (b'{"a": 1}', "unknown_event"),
        (b'{"op": 5}', "unknown_event"),
        (b'{"op": "c", "source": {"ts_ms": "x"}}', "unknown_event"),
        (b'{"op": "c", "source": {"connector": "db2"}}', "unknown_connector"),
        (b'{"op": "c", "source": {}}', "unknown_connector"),
        (
            b'{"op": "z", "source": {"connector": "mysql", "db": "his", "table": "t"}}',
            "unknown_event",
        ),
        (
            b'{"op": "c", "source": {"connector": "mysql", "db": "his", "table": "t"}}',
            "missing_key",
        ),
        (
            b'{"op":"c","after":{"c":"x"},"source":{"connector":"mysql","db":"his","table":"t"}}',
            "missing_key",
        ),
        (
            b'{"op":"u","after":{"id":1},"source":{"connector":"mysql","db":"his","table":"t"}}',
            "key_unknown",
        ),
        (
            b'{"op":"d","before":{"c":1},"source":{"connector":"mysql","db":"his","table":"t"}}',
            "missing_key",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_the_stream_goes_on(value, reason):
    topic = Topic("mysql", FIELDS, KEYS)
    topic.change("c", TABLE, None, row(1))
    records = [*topic.records, Record(1, None, value)]
    topic.change("c", TABLE, None, row(2))
    records.append(topic.records[1]._replace(offset=2))
    batches = decode(records)
    assert [r["id"] for r in rows_of(batches, TABLE)] == ["1", "2"]
    (reject,) = [reject for raw in batches for reject in raw.rejects]
    assert (reject.reason, reject.position) == (reason, Position(2, 1))
    assert reject.row["value"] == value.decode(errors="backslashreplace")
    assert reject.src_table in ("", TABLE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ({"id": 1}, {"id": 1, "c": "x"}),
        ({"id": 1}, {"id": 1, "c": "x", "ts_ms": 5}),
        ({"id": 1}, {"id": 1, "op": "c", "status": "final"}),
        ({"id": 1}, {"id": 1, "c": "x", "__deleted": "false"}),
        (None, {"c": "x", "__op": "u", "__source_ts_ms": 1}),
        ({"schema": {}, "payload": {"id": 1}}, {"schema": {}, "payload": {"id": 1, "c": "x"}}),
    ],
)
def test_flattened_events_stop_the_stream_with_the_remedy(key, value):
    with pytest.raises(FlattenedEvents, match="Remove that transform"):
        decode([Record(0, key and dump(key), dump(value))])


def test_more_columns_than_a_mask_has_bits():
    names = [f"c{i}" for i in range(80)]
    fields = {TABLE: [field("id", "int32"), *(field(name, "string") for name in names)]}
    topic = Topic("oracle", fields, KEYS)
    topic.change("c", TABLE, None, {"id": 1} | dict.fromkeys(names, "x"))
    (raw,) = decode(topic.records, {TABLE: TableSpec(("id",), ("id", "c3", "c79"))})
    assert raw.tables[TABLE].schema.names[5:] == ["id", "c3", "c79", "_old.id"]
    with pytest.raises(TooManyColumns):
        decode(topic.records)


# Transactions.


def test_a_batch_ends_with_a_transaction(topic):
    topic.boundary("BEGIN", "a")
    topic.change("c", TABLE, None, row(1))
    topic.heartbeat(1_772_352_000_000)  # It may come in between.
    topic.change("c", TABLE, None, row(2))
    decoder = DebeziumDecoder(1000, 1 << 20, START, SPECS)
    assert decoder.feed(topic.records) + decoder.flush() == []
    assert decoder.open
    topic.boundary("END", "a", {TABLE: 2})
    decoder.feed(topic.records)
    (raw,) = decoder.flush()
    assert (raw.captured, raw.end) == (2, Position(5, SEQ_END))
    assert decoder.idle
    assert not decoder.open


def test_a_transaction_whose_end_does_not_come_is_not_kept_back(topic):
    topic.boundary("BEGIN", "a")
    topic.change("c", TABLE, None, row(1))
    decoder = DebeziumDecoder(1000, 1 << 20, START, SPECS)
    decoder.feed(topic.records)
    (raw,) = decoder.flush(whole=False)
    assert raw.captured == 1


def test_a_boundary_may_be_lacking_after_a_schema_change(topic):
    topic.boundary("BEGIN", "a")
    topic.schema_change(TABLE, "ALTER TABLE t ADD d int")
    topic.boundary("BEGIN", "b")
    topic.change("c", TABLE, None, row(1))
    topic.boundary("END", "b", {TABLE: 1})
    batches = decode(topic.records)
    assert batches[-1].end == Position(5, SEQ_END)
    assert not any(raw.rejects for raw in batches)


def test_a_transaction_larger_than_a_batch_is_cut_inside(topic):
    topic.boundary("BEGIN", "a")
    for i in range(10):
        source = {"txId": 1, "lsn": i} if topic.connector == "postgresql" else {}
        topic.change("c", TABLE, None, row(i), source)
    topic.boundary("END", "a", {TABLE: 10})
    decoder = DebeziumDecoder(4, 1 << 20, START, SPECS)
    batches = decoder.feed(topic.records) + decoder.flush()
    assert [raw.captured for raw in batches] == [3, 3, 3, 1]
    assert [raw.begin for raw in batches[1:]] == [raw.end for raw in batches[:-1]]


def test_events_that_a_transaction_s_end_counts_and_that_did_not_come_are_told(topic):
    topic.boundary("BEGIN", "a")
    topic.change("c", TABLE, None, row(1))
    topic.boundary("END", "a", {f"cdb.{TABLE}": 3, "his.not_mapped": 5})
    (raw,) = decode(topic.records)
    (reject,) = raw.rejects
    assert (reject.reason, reject.src_table) == ("missing_events", TABLE)
    assert reject.row == {"expected": "3", "seen": "1"}
    assert raw.captured == 2


def test_an_end_after_a_restart_within_may_count_less(topic):
    for repeat in range(2):
        topic.boundary("BEGIN", "a")
        for i in range(3 - repeat):
            topic.change("c", TABLE, None, row(i))
    topic.boundary("END", "a", {TABLE: 2})
    assert not any(raw.rejects for raw in decode(topic.records))


def test_postgresql_names_a_transaction_anew_in_every_event():
    topic = Topic("postgresql", FIELDS, KEYS)
    topic.boundary("BEGIN", "772:32614176")
    topic.change("c", TABLE, None, row(1), {"txId": 772, "lsn": 32614176})
    topic.boundary("BEGIN", "772:32614999")  # Restarted within.
    topic.change("c", TABLE, None, row(2), {"txId": 772, "lsn": 32614999})
    decoder = DebeziumDecoder(1000, 1 << 20, START, SPECS)
    assert decoder.feed(topic.records) + decoder.flush() == []
    topic.boundary("END", "772:32615424", {TABLE: 1})
    decoder.feed(topic.records[-1:])
    (raw,) = decoder.flush()
    assert raw.captured == 2


# Limits, position, snapshots.


def test_the_position_moves_over_what_is_no_record():
    decoder = DebeziumDecoder(10, 1000, START, SPECS)
    assert decoder.flush(0) == []
    (raw,) = decoder.flush(7)
    assert (raw.begin, raw.end, raw.captured) == (START, Position(7, SEQ_END), 0)
    assert decoder.flush(7) == []


def test_a_batch_is_bounded_by_bytes(topic):
    for i in range(6):
        topic.change("c", TABLE, None, row(i, "x" * 1000), {"txId": i, "lsn": i})
    size = len(topic.records[0].value) + len(topic.records[0].key)
    decoder = DebeziumDecoder(1000, 2 * size + 10, START, SPECS)
    batches = decoder.feed(topic.records) + decoder.flush()
    assert [raw.captured for raw in batches] == [2, 2, 2]


def test_a_table_that_changes_its_form_is_cut(topic):
    topic.change("c", TABLE, None, row(1), {"txId": 1, "lsn": 1})
    topic.fields = {TABLE: [*FIELDS[TABLE], field("d", "int32")]}
    topic.change("c", TABLE, None, row(2) | {"d": 5}, {"txId": 2, "lsn": 2})
    batches = decode(topic.records)
    assert [raw.tables[TABLE].schema.names[5:] for raw in batches] == [
        ["id", "c", "_old.id"],
        ["id", "c", "d", "_old.id"],
    ]


def snapshot_of(topic: Topic, markers: list[str]) -> list[Record]:
    for i, marker in enumerate(markers):
        topic.change("r", TABLE, None, row(i), {"snapshot": marker})
    return topic.records


def test_the_end_of_a_snapshot_sweeps_what_it_read(topic):
    topic.heartbeat(1)
    records = snapshot_of(topic, ["first", "true", "last"])
    (raw,) = decode(records, sweep=True)
    assert raw.sweeps == ((TABLE, Position(2, 0)),)
    assert not decode(records)[0].sweeps


def test_a_snapshot_without_its_last_mark_ends_with_the_next_change(topic):
    snapshot_of(topic, ["first", "true"])
    topic.change("c", TABLE, None, row(9))
    (raw,) = decode(topic.records, sweep=True)
    assert raw.sweeps == ((TABLE, Position(1, 0)),)


def test_a_snapshot_that_was_broken_off_is_read_again_and_sweeps_what_it_had_read(topic):
    """A row of the first try may be gone by the second."""
    snapshot_of(topic, ["first", "true"])
    for marker, number in (("first", 0), ("last", 7)):
        topic.change("r", TABLE, None, row(number), {"snapshot": marker})
    (raw,) = decode(topic.records, sweep=True)
    assert raw.sweeps == ((TABLE, Position(3, 0)),)


def test_a_snapshot_whose_beginning_was_not_seen_sweeps_nothing(topic):
    """Else the rows from before the restart, of the same snapshot, would be swept away."""
    records = snapshot_of(topic, ["first", "true", "last_in_data_collection", "true", "last"])
    late = DebeziumDecoder(99, 999_999, Position(2, SEQ_END), SPECS, sweep=True)
    assert not any(raw.sweeps for raw in late.feed(records[2:]) + late.flush())
    told = DebeziumDecoder(99, 999_999, Position(2, SEQ_END), SPECS, sweep=True)
    told.remember(records[1:2])
    assert told.lacks_snapshot_begin
    known = DebeziumDecoder(99, 999_999, Position(2, SEQ_END), SPECS, sweep=True)
    known.remember(records[:2])
    assert not known.lacks_snapshot_begin
    (raw,) = known.feed(records[2:]) + known.flush()
    assert raw.sweeps == ((TABLE, Position(1, 0)),)


def test_limits_must_be_positive():
    for limits in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            DebeziumDecoder(*limits, START, SPECS)


# Whatever comes.

_WHOLE = [record for name, _ in FILES_AND_KEYS for record in load(name) if record.value]


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_damaged_events_never_stop_the_stream(data):
    record = data.draw(st.sampled_from(_WHOLE))
    value = bytearray(record.value)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(value) - 1))
        if data.draw(st.booleans()):
            value[at] = data.draw(st.integers(0, 255))
        else:
            del value[at : at + data.draw(st.integers(1, 40))]
        if not value:
            break
    tables = {table: TableSpec(key) for keys in RECORDED.values() for table, key in keys.items()}
    try:
        batches = decode([record._replace(offset=0, value=bytes(value))], tables)
    except FlattenedEvents:
        return
    assert sum(raw.captured for raw in batches) <= 2
