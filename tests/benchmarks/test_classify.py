"""What classification costs: the routine lane pays it for every row."""

import numpy as np
import pyarrow as pa
import pytest

from schemas.batches import Op
from schemas.emergency_rules import load_rules
from schemas.entities import LAB_RESULT
from tests.canonical import COMMIT_US
from transforms.classify_lanes import Classifier
from transforms.escalations import Escalations

ROWS = 20_000
LIMIT_US_PER_ROW = 0.15
# Item, value, unit: seven of ten have limits, as in a common morning profile.
ITEMS = [
    ("2823-3", "4.2", "mmol/L"),
    ("2951-2", "140", "mmol/L"),
    ("14749-6", "5.6", "mmol/L"),
    ("2000-8", "2.3", "mmol/L"),
    ("718-7", "130", "g/L"),
    ("777-3", "220", "10^9/L"),
    ("6690-2", "6.1", "10^9/L"),
    ("14682-9", "80", "µmol/L"),
    ("14631-6", "12", "µmol/L"),
    ("1742-6", "25", "U/L"),
]


def lab_results(critical_every: int = 0) -> pa.RecordBatch:
    """Returns ROWS results of 1000 patients; every n-th potassium is 7.5, or none."""
    picks = np.random.default_rng(1).integers(0, len(ITEMS), ROWS)
    values = [ITEMS[pick][1] for pick in picks]
    if critical_every:
        for i in range(0, ROWS, critical_every):
            picks[i], values[i] = 0, "7.5"
    given = {
        "_op": np.full(ROWS, Op.INSERT, np.uint8),
        "_lsn": np.full(ROWS, 100),
        "_seq": np.arange(1, ROWS + 1, dtype=np.int32),
        "_commit_us": np.full(ROWS, COMMIT_US),
        "_src_table": ["lis.result"] * ROWS,
        "_unchanged": np.zeros(ROWS, np.uint64),
        "record_id": [f"{i:036}" for i in range(ROWS)],
        "patient_id": [f"MRN{i % 1000:08}" for i in range(ROWS)],
        "item_code": [ITEMS[pick][0] for pick in picks],
        "value": values,
        "unit": [ITEMS[pick][2] for pick in picks],
        "flag": ["N"] * ROWS,
        "critical": [False] * ROWS,
    }
    schema = LAB_RESULT.arrow_schema
    columns = [pa.array(given.get(f.name, [None] * ROWS), f.type) for f in schema]
    return pa.record_batch(columns, schema=schema)


# Critical results, patients under emergency elsewhere, patients under emergency in the batch.
CASES = [(0, 0, 0), (0, 300, 0), (0, 0, 30), (1000, 300, 0), (50, 300, 30)]


@pytest.mark.parametrize(("critical_every", "elsewhere", "here"), CASES)
def test_classify(benchmark, critical_every, elsewhere, here):
    batch = lab_results(critical_every)
    names = [f"OTHER{i}" for i in range(elsewhere)] + [f"MRN{i:08}" for i in range(here)]
    patients = Escalations(dict.fromkeys(names, ("E1", 1, 1)))
    classifier = Classifier(load_rules(), "main")
    done = benchmark(classifier.classify, {"lab_result": batch}, patients)
    assert (done.urgent > 0) == bool(critical_every or here)
    us_per_row = benchmark.stats.stats.min / ROWS * 1e6
    benchmark.extra_info["us_per_row"] = round(us_per_row, 4)
    if not critical_every and not here:
        assert us_per_row <= LIMIT_US_PER_ROW
