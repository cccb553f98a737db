"""Benchmarks of the hot path on lis.result, 17 canonical columns, about 250 bytes a row.

Run: `pytest tests/benchmarks/test_harmonise.py --benchmark-only`. Rows/s = 20,000 / mean.
"""

import dataclasses

import pyarrow as pa
import pytest

from schemas.batches import ChangeBatch, Lane
from schemas.entities import LAB_RESULT
from schemas.mappings import load_mapping
from schemas.positions import SEQ_END, Position
from schemas.wire import ChangeBatchCoder, seal, verify
from tests.raw_changes import laboratory_results, raw_of
from transforms.checksum import ALGORITHMS, digest_rows, manifest, with_digests
from transforms.harmonise import Harmoniser

ROWS = 20_000


@pytest.fixture(scope="module")
def raw():
    return raw_of({"lis.result": laboratory_results(ROWS)})


@pytest.fixture(scope="module")
def rows(raw):
    harmonised = Harmoniser(load_mapping("postgresql_his")).apply(raw)
    return with_digests(LAB_RESULT, harmonised.tables["lab_result"])


@pytest.fixture(scope="module")
def batch(rows):
    return ChangeBatch(
        link="main>primary",
        lane=Lane.ROUTINE,
        begin=Position(0, SEQ_END),
        end=Position(9, SEQ_END),
        captured=ROWS,
        commit_us_max=0,
        watermark_us=0,
        read_us=0,
        tables={"lab_result": rows},
        manifest=manifest(LAB_RESULT, rows, 60_000_000),
    )


@pytest.fixture
def measured(benchmark):
    """Runs `rule` warmed up and notes microseconds a row."""

    def run(rule, *args, count=ROWS):
        benchmark.pedantic(rule, args, rounds=20, warmup_rounds=2)
        benchmark.extra_info["us_per_row"] = round(benchmark.stats.stats.median / count * 1e6, 4)

    return run


@pytest.mark.parametrize("mapping", ["postgresql_his", "postgresql_his_us_units"])
def test_harmonise(measured, raw, mapping):
    measured(Harmoniser(load_mapping(mapping)).apply, raw)


def test_harmonise_with_every_row_converted(measured, raw):
    batch = raw.tables["lis.result"]
    for name, value in (("loinc", "2160-0"), ("unit", "mg/dL")):
        place = batch.schema.get_field_index(name)
        batch = batch.set_column(place, name, pa.repeat(value, ROWS))
    converted = dataclasses.replace(raw, tables={"lis.result": batch})
    measured(Harmoniser(load_mapping("postgresql_his_us_units")).apply, converted)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_digest(measured, rows, algorithm):
    measured(digest_rows, LAB_RESULT, rows, algorithm)


def test_manifest(measured, rows):
    measured(manifest, LAB_RESULT, rows, 60_000_000)


def test_seal(measured, batch):
    measured(seal, batch)


def test_verify(measured, batch):
    measured(verify, seal(batch))


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_encode(measured, batch, compression):
    measured(ChangeBatchCoder(compression).encode, batch)


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_decode(measured, batch, compression):
    measured(ChangeBatchCoder().decode, ChangeBatchCoder(compression).encode(batch))


def test_one_row_there_and_back(measured, batch):
    """What the wire costs an emergency."""
    one = dataclasses.replace(batch, tables={"lab_result": batch.tables["lab_result"].slice(7, 1)})
    coder = ChangeBatchCoder()

    def travel():
        verify(coder.decode(coder.encode(seal(one))))

    measured(travel, count=1)
