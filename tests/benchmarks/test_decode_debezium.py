"""How many Debezium events a second the decoder takes: 13 columns, as in a laboratory."""

import pytest

from schemas.positions import START
from tests.debezium_events import Topic, decimal_field, field
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.hints import TableSpec, encoding_of_hint

ROWS = 20_000
FEED = 2_000
TABLE = "lis.result"
_STAMP = "io.debezium.time.MicroTimestamp"
FIELDS = [
    field("id", "int64", optional=False),
    *(field(name, "string") for name in ("mrn", "visit", "loinc", "item")),
    *(decimal_field(name, 4) for name in ("value", "low", "high")),
    *(field(name, "string") for name in ("unit", "flag")),
    *(field(name, "int64", _STAMP) for name in ("collected", "reported")),
    field("remark", "string"),
]
HINTS = {"collected": "micros", "reported": "micros"} | dict.fromkeys(
    ("value", "low", "high"), "decimal:4"
)
SPEC = TableSpec(
    ("id",),
    tuple(f["field"] for f in FIELDS),
    {column: encoding_of_hint(hint) for column, hint in HINTS.items()},
)


def row(i: int) -> dict:
    us = 1_772_352_000_000_000 + i * 1_000_003
    texts = {"mrn": f"P{i % 1000}", "visit": f"V{i % 5000}", "loinc": "14749-6", "item": "葡萄糖"}
    values = {"value": "AQmg", "low": "AJhY", "high": "AO5I", "unit": "mmol/L", "flag": "N"}
    times = {"collected": us, "reported": us + 60_000_000}
    return {"id": i} | texts | values | times | {"remark": "正常范围内。" * 4 + str(i)}


def records(schemas: bool, kind: str) -> list:
    topic = Topic("postgresql", {TABLE: FIELDS}, {TABLE: ("id",)}, schemas)
    for i in range(ROWS):
        before = row(i) if kind == "update, whole before" else None
        source = {"txId": 1000 + i // 100, "lsn": 10_000 + i}
        topic.change("c" if kind == "insert" else "u", TABLE, before, row(i), source)
    return topic.records


def decode(feeds: list) -> int:
    decoder = DebeziumDecoder(20_000, 8_000_000, START, {TABLE: SPEC})
    taken = [raw for feed in feeds for raw in decoder.feed(feed)] + decoder.flush()
    return sum(raw.captured for raw in taken)


@pytest.mark.parametrize("kind", ["insert", "update", "update, whole before"])
@pytest.mark.parametrize("schemas", [False, True], ids=["plain", "with schema"])
def test_decode_debezium(benchmark, schemas, kind):
    every = records(schemas, kind)
    feeds = [every[i : i + FEED] for i in range(0, ROWS, FEED)]
    assert decode(feeds) == ROWS
    benchmark.pedantic(decode, args=[feeds], rounds=5, warmup_rounds=1)
    benchmark.extra_info["rows_per_s_median"] = round(ROWS / benchmark.stats.stats.median)
    benchmark.extra_info["bytes_per_event"] = len(every[0].value)
