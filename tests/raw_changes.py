"""Raw changes from rows written by hand, and laboratory results by the thousand."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, Position

COMMIT_US = 1_772_352_000_000_000  # 2026-03-01 08:00 UTC.
DDL = {  # As in runners/embedded/hospital.sql.
    "his.patient": "pid mrn name sex_code birth_date id_no phone abo rh allergies row_ver"
    " updated_at",
    "his.diagnosis": "diagnosis_id mrn visit_no icd10 name dx_type is_primary doctor diagnosed_at"
    " updated_at",
    "his.prescription": "rx_no line_no mrn visit_no drug_code drug_name dose dose_unit route"
    " frequency days status doctor prescribed_at updated_at",
    "lis.result": "result_id mrn visit_no loinc item_name val_num val_txt unit ref_low ref_high"
    " abn_flag critical status collected_at result_at updated_at",
}


def raw_batch(columns: Sequence[str], rows: Sequence[dict], key: Sequence[str]) -> pa.RecordBatch:
    """Returns `rows` as the batch of one source table.

    What a row does not name is null. Defaults: an insert at (1, i + 1), committed at COMMIT_US.
    `unchanged` names columns that the log did not carry; `_old.x` is the old key's column.
    """
    names = [*columns, *(f"_old.{column}" for column in key)]
    meta = {
        "_op": pa.array([row.get("_op", Op.INSERT) for row in rows], pa.uint8()),
        "_lsn": pa.array([row.get("_lsn", 1) for row in rows], pa.int64()),
        "_seq": pa.array([row.get("_seq", i + 1) for i, row in enumerate(rows)], pa.int32()),
        "_commit_us": pa.array([row.get("_commit_us", COMMIT_US) for row in rows], pa.int64()),
        "_unchanged": pa.array(
            [sum(1 << columns.index(c) for c in row.get("unchanged", ())) for row in rows],
            pa.uint64(),
        ),
    }
    texts = {name: pa.array([row.get(name) for row in rows], pa.utf8()) for name in names}
    return pa.RecordBatch.from_pydict(meta | texts)


def hospital_batch(table: str, rows: Sequence[dict], key: Sequence[str] = ()) -> pa.RecordBatch:
    """Returns `rows` as the batch of a table of `DDL`; the key is its first column by default."""
    columns = DDL[table].split()
    return raw_batch(columns, rows, key or columns[:1])


def raw_of(tables: dict[str, pa.RecordBatch]) -> RawChanges:
    """Returns batches as the changes of one stretch of the log."""
    count = sum(batch.num_rows for batch in tables.values())
    return RawChanges(Position(0, SEQ_END), Position(9, SEQ_END), count, COMMIT_US, tables)


def rows_of(batches: list[RawChanges]) -> list[dict]:
    """Returns every row with its table, in the order of the source."""
    rows = [
        {"table": name} | row
        for batch in batches
        for name, table in batch.tables.items()
        for row in table.to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["_lsn"], row["_seq"]))


def short(row: dict) -> tuple:
    """Operation, ordinal and the source's columns of a row."""
    values = [
        value
        for name, value in row.items()
        if name != "table" and not (name.startswith("_") and not name.startswith("_old."))
    ]
    return (chr(row["_op"]), row["_seq"], *values)


def laboratory_results(count: int) -> pa.RecordBatch:
    """Returns `count` inserts into lis.result, 50 a transaction, about 250 bytes each."""
    at = range(count)
    codes = [
        ("2823-3", "血钾", "mmol/L"),
        ("14749-6", "葡萄糖", "mmol/L"),
        ("14682-9", "肌酐", "µmol/L"),
        ("718-7", "血红蛋白", "g/L"),
    ]
    kinds = [codes[i % len(codes)] for i in at]
    seconds = [
        f"2026-11-23 16:{i // 60 % 60:02d}:{i % 60:02d}.{i % 899_999 + 100_001}+00" for i in at
    ]
    texts = {
        "result_id": [f"0190a6b2-7c1e-7000-8000-{i:012x}" for i in at],
        "mrn": [f"M{i % 5000:08d}" for i in at],
        "visit_no": [f"V2026{i % 9000:08d}" for i in at],
        "loinc": [kind[0] for kind in kinds],
        "item_name": [kind[1] for kind in kinds],
        "val_num": [f"{i * 7919 % 200}.{i * 104_729 % 10_000:04d}" for i in at],
        "val_txt": [None] * count,
        "unit": [kind[2] for kind in kinds],
        "ref_low": ["3.9000"] * count,
        "ref_high": ["6.1000"] * count,
        "abn_flag": ["NHL"[i % 3] for i in at],
        "critical": ["ft"[i % 50 == 0] for i in at],
        "status": ["final"] * count,
        "collected_at": seconds,
        "result_at": seconds,
        "updated_at": seconds,
    }
    place = np.arange(count)
    meta = {
        "_op": pa.array(np.full(count, Op.INSERT, np.uint8)),
        "_lsn": pa.array(1_000_000 + place // 50 * 300),
        "_seq": pa.array((place % 50 + 1).astype(np.int32)),
        "_commit_us": pa.array(COMMIT_US + place // 50 * 2000),
        "_unchanged": pa.array(np.zeros(count, np.uint64)),
    }
    columns = {name: pa.array(values, pa.utf8()) for name, values in texts.items()}
    return pa.RecordBatch.from_pydict(meta | columns)
