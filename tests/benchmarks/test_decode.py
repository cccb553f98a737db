"""How many rows a second the decoder takes: 13 columns, 250 bytes a row, as in a laboratory."""

import pytest

from schemas.positions import START
from tests.pgoutput_bytes import begin, commit, insert, relation, update, xlog
from transforms.capture.postgresql.pgoutput import PgOutputDecoder

ROWS = 100_000
FEED = 4_000  # Payloads a call: about a megabyte, as the stream hands them over.
COLUMNS = [f"c{i}" for i in range(13)]


def row(i: int) -> list[str]:
    time = f"2024-05-01 08:30:{i % 60:02}.123456+00"
    limits = ["4.5", "mmol/L", "3.9", "6.1", "N"]
    return [
        *(str(i), f"P{i % 1000}", f"V{i % 5000}", "14749-6"),
        *limits,
        *(time, time, f"D{i % 100}", "正常范围内。" * 4 + str(i)),
    ]


def stream(transaction_rows: int, kind: str) -> list[list[bytes]]:
    payloads = [xlog(relation(7, "lis.result", COLUMNS))]
    for first in range(0, ROWS, transaction_rows):
        lsn = 1000 + first
        payloads.append(xlog(begin(lsn), lsn))
        for i in range(first, first + transaction_rows):
            if kind == "insert":
                message = insert(7, row(i))
            elif kind == "update":
                message = update(7, row(i))
            else:
                message = update(7, row(i), [f"{i}", *[None] * 12])
            payloads.append(xlog(message, lsn))
        payloads.append(xlog(commit(lsn), lsn))
    return [payloads[i : i + FEED] for i in range(0, len(payloads), FEED)]


def decode(feeds: list[list[bytes]]) -> int:
    decoder = PgOutputDecoder(20_000, 8_000_000, START)
    rows = 0
    for payloads in feeds:
        rows += sum(batch.captured for batch in decoder.feed(payloads))
    return rows + sum(batch.captured for batch in decoder.flush())


@pytest.mark.parametrize("kind", ["insert", "update", "update with key"])
@pytest.mark.parametrize("transaction_rows", [1, 1000])
def test_decode(benchmark, transaction_rows, kind):
    feeds = stream(transaction_rows, kind)
    assert decode(feeds) == ROWS
    benchmark.pedantic(decode, args=[feeds], rounds=7, warmup_rounds=1)
    benchmark.extra_info["rows_per_s_median"] = round(ROWS / benchmark.stats.stats.median)


def test_decode_one_row_at_a_time(benchmark):
    """The latency of one urgent row, from payload to record batch."""
    decoder = PgOutputDecoder(20_000, 8_000_000, START)
    decoder.feed([xlog(relation(7, "lis.result", COLUMNS))])
    message = xlog(insert(7, row(1)))
    lsns = iter(range(1000, 10**9, 8))

    def turn() -> None:
        lsn = next(lsns)
        decoder.feed([xlog(begin(lsn)), message, xlog(commit(lsn))])
        (batch,) = decoder.flush()
        assert batch.captured == 1

    benchmark.pedantic(turn, rounds=2000, warmup_rounds=50)
