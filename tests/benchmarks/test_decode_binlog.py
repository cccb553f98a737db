"""How many rows a second the binlog decoder takes: 13 columns, GBK, 250 bytes a row."""

import datetime
import struct

import pytest

from schemas.positions import SEQ_END, Position
from tests.binlog_bytes import CHARSETS, Col, Log, integer, packets_of, text
from transforms.capture.mariadb.decode import BinlogDecoder
from transforms.capture.mariadb.packets import Packets
from transforms.capture.mariadb.places import border

ROWS = 100_000
EVENT_ROWS = 40  # The server ends an event at 8 KiB.
FEED = 1 << 20  # Bytes a call, as the stream hands them over.
BEGIN = Position(border(1, 256), SEQ_END)
COLUMNS = [
    integer("JYXH"),
    integer("BRID"),
    integer("JZHM"),
    text("XMDM"),
    text("XMMC"),
    text("JG"),
    Col("JGZ", 246, b"\x0e\x04"),
    text("DW"),
    text("CKZ"),
    text("TS"),
    Col("BGSJ", 18, b"\0"),
    Col("ZFPB", 1),
    text("BZ", size=400),
]


def image(i: int) -> bytes:
    """A laboratory result as the server lays it out."""
    at = datetime.datetime(2026, 3, 5, 8, i // 60 % 60, i % 60, tzinfo=datetime.UTC)
    day = (at.year * 13 + at.month) << 5 | at.day
    clock = at.hour << 12 | at.minute << 6 | at.second

    def words(value: str, width: int = 1) -> bytes:
        encoded = value.encode("gbk")
        return len(encoded).to_bytes(width, "little") + encoded

    return b"".join(
        (
            b"\0\0",
            struct.pack("<iii", i, i % 5000, i % 9000),
            words(f"K{i % 50}"),
            words("血钾测定"),
            words(f"{i % 9}.{i % 10}↑"),
            struct.pack(">IB", 0x80000000 | i % 200, 0)[:5],
            struct.pack(">H", i % 10_000),
            words("mmol/L"),
            words("3.50-5.50"),
            words("N"),
            ((day << 17 | clock) + (1 << 39)).to_bytes(5, "big"),
            b"\0",
            words("正常范围内。" * 4 + str(i), 2),
        )
    )


def stream(transaction_rows: int, kind: str) -> list[Packets]:
    made = Log().rotate(1, 256).format()
    head = struct.pack("<IHHB", 7, 0, 1, len(COLUMNS)) + b"\xff\x1f" * (
        2 if kind == "update" else 1
    )
    for first in range(0, ROWS, transaction_rows):
        made.gtid().table(7, "his.JYJG", COLUMNS)
        for start in range(first, first + transaction_rows, EVENT_ROWS):
            rows = range(start, min(start + EVENT_ROWS, first + transaction_rows))
            images = [image(i) * (2 if kind == "update" else 1) for i in rows]
            made.event({"insert": 23, "update": 24}[kind], head + b"".join(images), False)
        made.xid()
    feeds, waiting, size = [], [], 0
    for packet in made.packets:
        waiting.append(packet)
        size += len(packet)
        if size >= FEED:
            feeds.append(packets_of(waiting))
            waiting, size = [], 0
    return [*feeds, packets_of(waiting)]


def decoder() -> BinlogDecoder:
    return BinlogDecoder(20_000, 8_000_000, BEGIN, "binlog", CHARSETS, {"his.JYJG": ["JYXH"]})


def decode(feeds: list[Packets]) -> int:
    taking = decoder()
    rows = 0
    for packets in feeds:
        rows += sum(batch.captured for batch in taking.feed(packets))
    return rows + sum(batch.captured for batch in taking.flush())


@pytest.mark.parametrize("kind", ["insert", "update"])
@pytest.mark.parametrize("transaction_rows", [1, 1000])
def test_decode_binlog(benchmark, transaction_rows, kind):
    feeds = stream(transaction_rows, kind)
    assert decode(feeds) == ROWS
    benchmark.pedantic(decode, args=[feeds], rounds=7, warmup_rounds=1)
    benchmark.extra_info["rows_per_s_median"] = round(ROWS / benchmark.stats.stats.median)


def test_decode_one_transaction_at_a_time(benchmark):
    """The latency of one urgent row, from packets to record batch."""
    taking = decoder()
    made = Log().rotate(1, 256).format()
    taking.feed(packets_of(made.packets))
    body = struct.pack("<IHHB", 7, 0, 1, len(COLUMNS)) + b"\xff\x1f" + image(1)

    def turn() -> None:
        made.packets.clear()
        made.gtid().table(7, "his.JYJG", COLUMNS).event(23, body, False).xid()
        taking.feed(packets_of(made.packets))
        (batch,) = taking.flush()
        assert batch.captured == 1

    benchmark.pedantic(turn, rounds=2000, warmup_rounds=50)
