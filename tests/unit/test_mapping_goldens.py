"""What each packaged mapping makes of rows: golden files that a clinician can read."""

import pathlib

import pytest
import yaml

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.mappings import PACKAGED, load_mapping
from tests.raw_changes import raw_batch, raw_of
from transforms.harmonise import Harmoniser

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mappings"
NAMES = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def became(name: str, given: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Returns the canonical rows of each source table's rows, which are one log, in order."""
    mapping = load_mapping(name)
    tables, lsn = {}, 0
    for table, rows in given.items():
        columns = [*dict.fromkeys([*mapping.tables[table].needed, *mapping.tables[table].ignore])]
        placed = []
        for row in rows:
            assert row.keys() <= set(columns), table
            lsn += 1
            placed.append(row | {"_lsn": lsn})
        tables[table] = raw_batch(columns, placed, mapping.tables[table].id)
    done = Harmoniser(mapping).apply(raw_of(tables))
    assert done.rejects == []
    out: dict[str, list[dict]] = {table: [] for table in given}
    for canonical, batch in done.tables.items():
        batch.validate(full=True)
        for row in batch.to_pylist():
            content = {c: row[c] for c in ("record_id", *TABLES[canonical].by_name)}
            content = {c: _plain(v) for c, v in content.items() if v is not None}
            gone = {"deleted": True} if row["_op"] == Op.DELETE else {}
            out[row["_src_table"]].append({"table": canonical, **gone, **content})
    return out


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | bool) else str(value)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    """Write it anew from its own `given`, and read what changed."""
    golden = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text("utf-8"))
    given = {table: [case["given"] for case in cases] for table, cases in golden.items()}
    expected = {table: [case["becomes"] for case in cases] for table, cases in golden.items()}
    assert became(name, given) == expected
    assert set(given) == set(load_mapping(name).tables)
