"""The merge's SQL text, its clock, and what the ledger makes of ranges."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Op
from schemas.entities import TABLES
from schemas.positions import SEQ_END, START, Position
from schemas.tables import Table
from tests.canonical import rows_of
from tests.deliveries import batch_of, part_of
from transforms.deliver.ledger import LedgerState
from transforms.deliver.merging.merge import TableMerger
from transforms.deliver.merging.merge_wire import hlc_of
from transforms.deliver.merging.trim import new_parts, runs_of


class Session:
    """Takes statements; answers none."""

    def __init__(self):
        self.statements = []

    def cursor(self):
        return self

    def execute(self, statement, *_):
        self.statements.append(statement)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_write_is_guarded_and_names_every_column(table: Table):
    sql = TableMerger(Session(), table, "main", lane=None)._sql
    for statement in (sql.update, sql.update_known, sql.put, sql.put_tombstone):
        assert "(t.src_lsn, t.src_seq) < (" in statement
    for column in table.columns:
        assert f'"{column.name}" = s."{column.name}"' in sql.update
        assert f'"{column.name}" = excluded."{column.name}"' in sql.put
        assert f'"{column.name}" = excluded' not in sql.put_tombstone
        bit = 1 << table.index[column.name]
        kept = f'CASE WHEN s.unchanged & {bit} = 0 THEN s."{column.name}" ELSE t."{column.name}"'
        assert kept in sql.update_known


@given(st.lists(st.integers(0, 4_102_444_800_000_000), min_size=2))
def test_the_clock_is_ordered_as_commit_times_are(times):
    clocks = hlc_of(np.array(times, np.int64))
    assert (clocks >= 0).all()
    order = sorted(range(len(times)), key=times.__getitem__)
    assert (np.diff(clocks[order]) >= 0).all()
    assert len(set(clocks.tolist())) == len(set(times))


ENDS = st.integers(0, 12)


@given(st.lists(st.tuples(ENDS, ENDS), max_size=12))
def test_ranges_in_any_order_leave_the_same_ledger(spans):
    state = LedgerState(Position(0, SEQ_END))
    covered = set()
    for begin, end in spans:
        if begin >= end:
            continue
        span = Position(begin, SEQ_END), Position(end, SEQ_END)
        assert state.covers(*span) == (set(range(begin, end)) <= covered)
        state = state.with_applied(*span)
        covered |= set(range(begin, end))
    reached = next(i for i in range(13) if i not in covered)
    assert state.position == Position(reached, SEQ_END)
    beyond = {i for low, high in state.islands for i in range(low.lsn, high.lsn)}
    assert beyond == {i for i in covered if i > reached}
    ends = [state.position, *(place for span in state.islands for place in span)]
    assert ends == sorted(set(ends))


@given(
    st.lists(st.tuples(ENDS, ENDS), max_size=6),
    st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4),
)
def test_trimming_keeps_exactly_what_is_new(applied, sent):
    rows = [{"record_id": str(i), "_lsn": i, "_seq": 1} for i in range(1, 13)]
    whole = batch_of({"visit": rows_of("visit", rows)})
    state = LedgerState(START)
    for begin, end in applied:
        if begin < end:
            state = state.with_applied(Position(begin, SEQ_END), Position(end, SEQ_END))
    batches = [
        part_of(whole, Position(begin, SEQ_END), Position(end, SEQ_END))
        for begin, end in sent
        if begin < end
    ]
    parts, after = new_parts(batches, state)
    got = [
        lsn for run in runs_of(parts) for rows in run.values() for lsn in rows["_lsn"].to_pylist()
    ]
    inside = {lsn for begin, end in sent for lsn in range(begin + 1, end + 1)}
    wanted = {lsn for lsn in inside if not state.covers(Position(lsn, 0), Position(lsn, SEQ_END))}
    assert sorted(got) == sorted(wanted)
    assert sum(part.batch.captured for part in parts) == len(wanted)
    assert sum(count for part in parts for count, _ in part.source.values()) == len(wanted)
    for begin, end in sent:
        if begin < end:
            assert after.covers(Position(begin, SEQ_END), Position(end, SEQ_END))


def test_a_hole_parts_the_runs():
    rows = [{"record_id": str(i), "_lsn": i, "_seq": 1, "_op": int(Op.INSERT)} for i in range(1, 7)]
    whole = batch_of({"visit": rows_of("visit", rows)})
    island = LedgerState(START).with_applied(Position(2, SEQ_END), Position(4, SEQ_END))
    runs = runs_of(new_parts([whole], island)[0])
    assert [run["visit"]["_lsn"].to_pylist() for run in runs] == [[1, 2], [5, 6]]
    runs = runs_of(new_parts([whole], LedgerState(START))[0])
    assert [run["visit"].num_rows for run in runs] == [6]


def test_tables_in_order_make_no_island():
    rows = [{"record_id": str(i), "_lsn": i, "_seq": 1, "_op": int(Op.INSERT)} for i in range(1, 7)]
    whole = batch_of({"visit": rows_of("visit", rows)})
    ends = [Position(lsn, SEQ_END) for lsn in (0, 2, 4, 6)]
    first, second, third = (part_of(whole, *span) for span in itertools.pairwise(ends))
    state = LedgerState(ends[0])
    for in_order, sent in ((["patient"], [second, third]), (["visit"], [])):
        parts, after = new_parts([third, second], state, in_order)
        assert [(part.batch.begin, part.batch.end) for part in parts] == [
            (batch.begin, batch.end) for batch in sent
        ]
        assert after.islands == (((ends[1], ends[3]),) if sent else ())
    parts, after = new_parts([third, first, second], state, ["visit"])
    assert len(parts) == 3 and after.position == ends[3]
