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
from transforms.checksum import digest_rows, manifest, with_digests
from transforms.harmonise import Harmoniser, Lookups
from transforms.harmonise.damaged_text import damage_of
from transforms.hash_rows import ALGORITHMS

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


def old_results(count: int) -> pa.RecordBatch:
    """Returns results of campus B: one in seven with an arrow, one in fifty that is no number."""
    at = range(count)
    items = [("KAL", "mEq/L"), ("GLU", "mg/dl"), ("CRE", "mg/dl"), ("HGB", "g/dl")]
    odd = {0: "<0.1", 1: "阴性(-)", 2: "溶血"}
    printed = [f"{i * 7919 % 200}.{i * 104_729 % 100:02d}" for i in at]
    columns = {
        "JYXH": [str(10**12 + i) for i in at],
        "BRID": [str(10**10 + i % 5000) for i in at],
        "JZHM": [f"V2026{i % 9000:08d}" for i in at],
        "XMDM": [items[i % 4][0] for i in at],
        "XMMC": ["血钾", "葡萄糖", "肌酐", "血红蛋白"] * (count // 4),
        "JG": [
            odd[i % 3] if i % 50 == 0 else text + "↑" if i % 7 == 0 else text
            for i, text in enumerate(printed)
        ],
        "DW": [items[i % 4][1] for i in at],
        "CKZ": ["3.9-6.1"] * count,
        "TS": [None if i % 7 == 0 else "正常" for i in at],
        "WJBZ": ["0"] * count,
        "JGZT": ["1"] * count,
        "CYSJ": [f"2026.11.23 7:{i // 60 % 60:02d}:{i % 60:02d}" for i in at],
        "BGSJ": [f"2026112316{i // 60 % 60:02d}{i % 60:02d}" for i in at],
        "ZFPB": ["0"] * count,
        "XGSJ": [f"2026-11-23 16:{i // 60 % 60:02d}:{i % 60:02d}" for i in at],
    }
    meta = laboratory_results(count).select(["_op", "_lsn", "_seq", "_commit_us", "_unchanged"])
    texts = {name: pa.array(values, pa.utf8()) for name, values in columns.items()}
    return pa.RecordBatch.from_pydict({n: meta[n] for n in meta.schema.names} | texts)


def old_patients(count: int) -> pa.RecordBatch:
    """Returns patients of campus B, one transaction before everything else."""
    nothing = pa.nulls(count, pa.utf8())
    columns = {
        "BRID": pa.array([str(10**10 + i) for i in range(count)]),
        "MZHM": pa.array([f"M{10**10 + i}" for i in range(count)]),
        "BRXM": pa.array(["王小东"] * count),
        "BRXB": pa.array(["男"] * count),
        "CSNY": pa.array([f"19{i % 90 + 10}.{i % 12 + 1}.{i % 28 + 1}" for i in range(count)]),
        **dict.fromkeys(["SFZH", "JTDH", "XX", "RHXX", "GMS"], nothing),
        "ZFPB": pa.array(["0"] * count),
        "XGSJ": pa.array(["2026-11-23 16:00:00"] * count),
    }
    meta = laboratory_results(count).select(["_op", "_seq", "_commit_us", "_unchanged"])
    meta = {name: meta[name] for name in meta.schema.names}
    meta |= {"_lsn": pa.array([1] * count), "_seq": pa.array(range(1, count + 1), pa.int32())}
    return pa.RecordBatch.from_pydict(meta | columns)


def test_harmonise_campus_b_results(measured):
    """Local items, arrows, ranges as text, four date formats, and a lookup of every patient."""
    mapping = load_mapping("mariadb_his_gbk")
    lookups = Lookups(mapping, follow=False)
    harmoniser = Harmoniser(mapping, lookups)
    harmoniser.apply(raw_of({"his.MS_BRDA": old_patients(5000)}))
    measured(harmoniser.apply, raw_of({"his.JYJG": old_results(ROWS)}))


def test_harmonise_campus_b_results_following_their_parents(measured):
    """As a reader has it; what is on its way is acknowledged at once."""
    mapping = load_mapping("mariadb_his_gbk")
    lookups = Lookups(mapping)
    harmoniser = Harmoniser(mapping, lookups)
    harmoniser.apply(raw_of({"his.MS_BRDA": old_patients(5000)}))
    raw = raw_of({"his.JYJG": old_results(ROWS)})

    def follow():
        lookups.acknowledged(raw.end)
        harmoniser.apply(raw)

    measured(follow)


def test_harmonise_campus_b_patients(measured):
    """Parents: each of them is learned."""
    mapping = load_mapping("mariadb_his_gbk")
    raw = raw_of({"his.MS_BRDA": old_patients(ROWS)})
    measured(lambda: Harmoniser(mapping).apply(raw))


def test_damage_of_chinese_texts(measured):
    measured(damage_of, pa.array(["急性ST段抬高型心肌梗死", "王小东"] * (ROWS // 2)))


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
