"""What judging quality costs: the routine lane would pay it for every row."""

import pyarrow as pa
import pytest

from schemas.quality_rules import load_quality_rules
from tests.benchmarks.test_classify import ROWS, lab_results
from tests.quality_cases import NOW_US
from tests.unit.test_clinic import clinic, harmonised
from transforms.check_quality import QualityChecker

LIMIT_US_PER_ROW = 1.0
DOCUMENTS_US_PER_ROW = 3.0  # Where one row of ten is a document, some of them of 200 kB.


def with_columns(batch: pa.RecordBatch, **columns: pa.Array) -> pa.RecordBatch:
    """Returns the batch with some columns replaced."""
    for name, values in columns.items():
        place = batch.schema.get_field_index(name)
        batch = batch.set_column(place, batch.schema.field(place), values)
    return batch


def results() -> pa.RecordBatch:
    """Whole results: with ranges, times and names, and nothing odd about them."""
    moment = pa.scalar(NOW_US - 10**9, pa.timestamp("us", "UTC"))
    return with_columns(
        lab_results(),
        visit_no=pa.array([f"V{i % 4000:017}" for i in range(ROWS)]),
        item_name=pa.array([f"白细胞计数{i % 40}" for i in range(ROWS)]),
        reference_low=pa.repeat("0", ROWS),
        reference_high=pa.repeat("1000", ROWS),
        status=pa.repeat("final", ROWS),
        collected_at=pa.repeat(moment, ROWS),
        reported_at=pa.repeat(moment, ROWS),
    )


@pytest.mark.parametrize("odd_every", [0, 100])
def test_check_results(benchmark, odd_every):
    batch = results()
    if odd_every:
        flags = pa.array(["H" if i % odd_every == 0 else "N" for i in range(ROWS)])
        batch = with_columns(batch, flag=flags)
    checker = QualityChecker(load_quality_rules(), "main")
    found = benchmark(checker.check, {"lab_result": batch}, NOW_US)
    assert found.num_rows == (ROWS // odd_every if odd_every else 0)
    us_per_row = benchmark.stats.stats.min / ROWS * 1e6
    benchmark.extra_info["us_per_row"] = round(us_per_row, 4)
    assert us_per_row <= LIMIT_US_PER_ROW


def test_check_ordinary_days(benchmark):
    """Every table as a campus's days mix them, long documents among them."""
    one = clinic(41)
    done = harmonised(
        "postgresql_his", (s for _ in range(150) for s in (one.routine(), one.emergency()))
    )
    rows = sum(batch.num_rows for batch in done.tables.values())
    checker = QualityChecker(load_quality_rules(), "main")
    newest = max(int(batch["_commit_us"].to_numpy().max()) for batch in done.tables.values())
    found = benchmark(checker.check, done.tables, newest)
    assert found.num_rows == 0
    us_per_row = benchmark.stats.stats.min / rows * 1e6
    benchmark.extra_info["us_per_row"] = round(us_per_row, 4)
    assert us_per_row <= DOCUMENTS_US_PER_ROW
