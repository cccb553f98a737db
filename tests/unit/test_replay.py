"""What a dead letter holds becomes the change that it was."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.replay import Filed, canonical_of, chosen, raw_of
from schemas.batches import DeadLetter, Lane, Op, Reject
from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.mappings import PACKAGED, load_mapping
from schemas.positions import Position
from schemas.tables import Kind
from tests.canonical import COMMIT_US, rows_of
from tests.raw_changes import DDL, hospital_batch
from tests.raw_changes import raw_of as raw_changes
from transforms.deliver.merging.refused_rows import sealed_row
from transforms.deliver.replay_letter import SOURCE_KIND, STORE_KINDS
from transforms.harmonise import Harmoniser
from transforms.seal_dead_letters import letter_id_of

MAPPING = load_mapping(str(PACKAGED / "postgresql_his.yaml"))
HARMONISER = Harmoniser(MAPPING)
NOBODY = Harmoniser(MAPPING.model_copy(update={"tables": {}}))
TEXTS = st.sampled_from(
    [
        None,
        "",
        "1",
        "-0.50",
        "NaN",
        "t",
        "M1",
        "2026-01-01",
        "2026-01-01 08:00:00+08",
        "会诊",
        "a|b",
    ]
)


@st.composite
def changes(draw):
    """A source table and one change of it, good or bad."""
    name = draw(st.sampled_from(sorted(DDL)))
    key = MAPPING.tables[name].id
    row = {column: draw(TEXTS) for column in DDL[name].split()}
    row |= {"_op": draw(st.sampled_from(Op)), "_lsn": draw(st.integers(0, 2**62))}
    row |= {"_seq": draw(st.integers(1, 2**31 - 2))}
    if row["_op"] in (Op.UPDATE, Op.DELETE):
        others = [column for column in DDL[name].split() if column not in key]
        row["unchanged"] = draw(st.sets(st.sampled_from(others)))
        row |= dict.fromkeys(row["unchanged"])
    if row["_op"] is Op.UPDATE and draw(st.booleans()):
        row |= {f"_old.{column}": draw(TEXTS) for column in key}
    return name, hospital_batch(name, [row], key)


@given(changes())
def test_a_source_change_comes_back_from_its_letter(case):
    """Harmonised from the letter, it is what it would have been harmonised at once."""
    name, batch = case
    (reject,) = NOBODY.apply(raw_changes({name: batch})).rejects
    assert reject.reason == "unknown_table"
    expected = HARMONISER.apply(raw_changes({name: batch}))
    found = HARMONISER.apply(raw_of(reject, MAPPING.tables[name]))
    assert {t: rows.to_pylist() for t, rows in found.tables.items()} == {
        t: rows.to_pylist() for t, rows in expected.tables.items()
    }
    # A letter keeps all that the new attempt may be refused with.
    assert [(r.reason, r.column, r.position) for r in found.rejects] == [
        (r.reason, r.column, r.position) for r in expected.rejects
    ]
    for again in found.rejects:
        assert {c: v for c, v in reject.row.items() if c in again.row} == again.row


def test_a_missing_column_is_not_an_unchanged_one():
    row = {"visit_no": "V1", "mrn": "M1", "_old.visit_no": None}
    place = {"src_table": "his.visit", "position": Position(7, 2), "commit_us": COMMIT_US}
    source = MAPPING.tables["his.visit"]
    update = Reject(**place, op=Op.UPDATE, reason="missing_column", column="bed", row=row)
    batch = raw_of(update, source).tables["his.visit"]
    assert "bed" not in batch.schema.names
    assert "dept" in batch.schema.names
    (again,) = HARMONISER.apply(raw_of(update, source)).rejects
    assert (again.reason, again.column) == ("missing_column", "bed")
    insert = Reject(**place, op=Op.INSERT, reason="bad_int", column="triage_level", row=row)
    assert batch.num_rows == 1
    assert "dept" not in raw_of(insert, source).tables["his.visit"].schema.names


VALUES = {
    Kind.TEXT: st.text(st.characters(codec="utf-8"), max_size=8),
    Kind.INT: st.integers(-(2**63), 2**63 - 1),
    Kind.DECIMAL: st.sampled_from(["0", "-1.5", "12345678901234567890.5"]),
    Kind.BOOL: st.booleans(),
    Kind.DATE: st.dates(),
    Kind.TIME: st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
}


@st.composite
def canonical_changes(draw):
    table = TABLES[draw(st.sampled_from(sorted(TABLES)))]
    row = {c.name: draw(st.none() | VALUES[c.kind]) for c in table.columns}
    row |= {"record_id": draw(VALUES[Kind.TEXT]), "_prev_id": draw(st.none() | VALUES[Kind.TEXT])}
    row |= {"_op": int(draw(st.sampled_from(Op))), "_lsn": draw(st.integers(0, 2**62))}
    unchanged = draw(st.sets(st.sampled_from(sorted(table.by_name))))
    row |= dict.fromkeys(unchanged)
    return table, rows_of(table.name, [{**row, "unchanged": sorted(unchanged)}])


@given(canonical_changes())
def test_a_canonical_change_comes_back_from_its_letter(case):
    table, batch = case
    reject = Reject(
        src_table=batch["_src_table"][0].as_py(),
        position=Position(batch["_lsn"][0].as_py(), batch["_seq"][0].as_py()),
        op=batch["_op"][0].as_py(),
        commit_us=batch["_commit_us"][0].as_py(),
        reason="check_violation",
        column="",
        row=sealed_row(table.name, batch, bytes(range(32))),
    )
    assert reject.row["_digest"] == bytes(range(32)).hex()
    found = canonical_of(reject)
    assert found.schema == table.arrow_schema
    for name in found.schema.names:
        assert found[name].equals(batch[name]) or name == "_src_table", name
    assert found["_src_table"].to_pylist() == batch["_src_table"].to_pylist()


def filed(letter_id: str, position: tuple[int, int] = (1, 1)) -> Filed:
    letter = DeadLetter(letter_id, "his.visit", *position, Op.INSERT, 0, "r", "", "k", b"")
    return Filed(letter, "main>primary", Lane.ROUTINE, "open")


def test_letters_are_named_by_the_beginnings_of_their_ids():
    some = [filed("ab12"), filed("ab34"), filed("cd56")]
    assert chosen(some, ["cd", "ab3", "cd56"]) == [some[2], some[1]]
    for name in ("ab", "x", ""):
        with pytest.raises(ConfigError):
            chosen(some, [name])


@pytest.mark.parametrize("kind", [SOURCE_KIND, *STORE_KINDS.values()])
def test_a_letter_tells_its_kind_by_its_id(kind):
    position = Position(5, 3)
    letter_id = letter_id_of("main>primary", "his.visit", position, Op.INSERT, kind)
    assert filed(letter_id, position).kind == kind


def test_an_unchanged_mask_of_many_columns_fits():
    source = MAPPING.tables["lis.result"]
    position = Position(1, 1)
    row = {"result_id": "1", **{f"more_{i}": "x" for i in range(63)}}
    reject = Reject("lis.result", position, Op.DELETE, COMMIT_US, "bad_time", "x", row)
    batch = raw_of(reject, source).tables["lis.result"]
    bits = batch["_unchanged"].to_numpy()
    assert bits.dtype == np.uint64
    assert pa.compute.all(batch["result_id"].is_valid()).as_py()
    (rows,) = HARMONISER.apply(raw_of(reject, source)).tables.values()
    assert rows["record_id"].to_pylist() == ["1"]
