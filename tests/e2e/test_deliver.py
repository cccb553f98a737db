"""Delivery into a real consult store: whatever comes, how often and in which order."""

import dataclasses
import itertools
import threading
from hashlib import sha256

import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runners.embedded.postgres import PostgresServer
from schemas.batches import ChangeBatch, DeadLetter, Lane, ManifestEntry, Op, Reject
from schemas.entities import EMR_DOCUMENT, TABLES
from schemas.errors import ConservationBroken, StoreUnavailable
from schemas.links import LinkSettings
from schemas.panes import RoutinePane
from schemas.positions import SEQ_END, START, Position
from schemas.store_tables import STORE_TABLES
from tests.canonical import COMMIT_US, rows_of
from tests.deliveries import LINK, batch_of, lab_results, part_of, resealed
from tests.faults.harness import until
from transforms.checksum import digest_rows
from transforms.deliver import ledger, store_schema
from transforms.deliver.deliver import _DeliverRoutineFn
from transforms.deliver.merging.merge import EXPRESS_ROWS_MAX
from transforms.deliver.store import Store
from transforms.parking import HERE
from transforms.seal_dead_letters import Sealer, make_key

NOW_US = COMMIT_US + 5_000_000


@pytest.fixture(scope="module")
def sealer(tmp_path_factory) -> Sealer:
    path = tmp_path_factory.mktemp("key") / "key"
    make_key(path)
    return Sealer(f"file:{path}")


@pytest.fixture(scope="module")
def dsn(postgres_server) -> str:
    return postgres_server.create_database("deliver")


@pytest.fixture(scope="module")
def eye(dsn) -> psycopg.Connection:
    """Looks at the store from outside."""
    with ledger.connect(dsn) as conn:
        yield conn


@pytest.fixture
def store(dsn, eye, sealer) -> Store:
    schemas = ["consult", "sync"]
    tables = eye.execute(
        "SELECT format('%%I.%%I', schemaname, tablename) FROM pg_tables WHERE schemaname = ANY(%s)"
        " AND tablename <> 'schema_version'",
        (schemas,),
    )
    eye.execute("TRUNCATE " + ", ".join(row[0] for row in tables.fetchall()))
    made = Store(dsn, LINK, "main", sealer, lambda: NOW_US)
    yield made
    made.close()


def routine(store: Store, *batches: ChangeBatch):
    return store.apply(batches, Lane.ROUTINE)


def stored(eye, table: str, *columns: str, campus: str = "main") -> dict[str, tuple]:
    names = ", ".join(columns)
    rows = eye.execute(
        f"SELECT record_id, {names} FROM consult.{table} WHERE campus = %s", (campus,)
    )
    return {row[0]: row[1:] for row in rows.fetchall()}


def progress(eye, lane: Lane = Lane.ROUTINE, link: str = LINK) -> tuple:
    """Position and counts: captured, delivered, duplicates, superseded, held, dead, swept."""
    row = eye.execute(
        "SELECT lsn, seq, captured, delivered, duplicates, superseded, held, dead, swept"
        " FROM sync.progress WHERE link = %s AND lane = %s",
        (link, lane.value),
    ).fetchone()
    return Position(*row[:2]), row[2:]


def visit(lsn: int, seq: int, record_id: str, op: Op = Op.INSERT, **more) -> dict:
    return {"_lsn": lsn, "_seq": seq, "record_id": record_id, "_op": int(op), **more}


def visits(*rows: dict, begin: Position = START, **more) -> ChangeBatch:
    return batch_of({"visit": rows_of("visit", rows)}, begin, **more)


# The property: a log of changes, cut, repeated, shuffled and sent in two lanes.

TEXT_COLUMNS = ("title", "content", "status")


@dataclasses.dataclass
class _Model:
    """What the source has after its log, and the log."""

    rows: list[dict] = dataclasses.field(default_factory=list)
    live: dict[str, dict] = dataclasses.field(default_factory=dict)
    gone: dict[str, Position] = dataclasses.field(default_factory=dict)
    express: list[int] = dataclasses.field(default_factory=list)

    def change(self, key: str, other: str, kind: int, unchanged: set[str], urgent: bool) -> None:
        """Does what `kind` says, or the nearest that the row's state allows."""
        i = len(self.rows)
        place = Position(1 + i // 3, 1 + i % 3 * 2)
        fresh = {name: f"{name} {i}" for name in TEXT_COLUMNS}
        if key not in self.live:
            self._log(place, key, Op.INSERT, fresh, urgent)
        elif kind == 0:
            self._log(place, key, Op.DELETE, None, urgent)
        elif kind == 1 and other not in self.live:
            old = self.live[key]
            # As capture has it: the old key's end, then the new key's beginning (trap 5).
            self._log(place, key, Op.DELETE, None, urgent and not unchanged)
            place = Position(place.lsn, place.seq + 1)
            values = {**fresh, **{name: old[name] for name in unchanged}}
            self._log(place, other, Op.UPDATE, values, urgent, unchanged, key)
        else:
            old = self.live[key]
            values = {**fresh, **{name: old[name] for name in unchanged}}
            self._log(place, key, Op.UPDATE, values, urgent, unchanged)

    def _log(self, place, key, op, values, urgent, unchanged=frozenset(), prev=None):
        row = {"_lsn": place.lsn, "_seq": place.seq, "record_id": key, "_op": int(op)}
        if op is Op.DELETE:
            del self.live[key]
            self.gone[key] = place
        else:
            self.live[key] = {**values, "place": place}
            self.gone.pop(key, None)
            row |= {name: values[name] for name in TEXT_COLUMNS if name not in unchanged}
            row |= {"unchanged": unchanged, "_prev_id": prev}
        if urgent and not unchanged:
            self.express.append(len(self.rows))
        self.rows.append(row)


@st.composite
def deliveries(draw):
    """A model, and steps of delivery: (lane, from row, to row) in the lane's own log."""
    model = _Model()
    keys = st.sampled_from("abcd")
    for _ in range(draw(st.integers(1, 18))):
        model.change(
            draw(keys),
            draw(keys),
            draw(st.integers(0, 3)),
            draw(st.sets(st.sampled_from(TEXT_COLUMNS), max_size=2))
            if draw(st.booleans())
            else set(),
            draw(st.booleans()),
        )
    # The emergency lane shall not overtake what a changed key takes its values from: that is
    # a dead letter, and another test's.
    bases = {row.get("_prev_id") for row in model.rows if row.get("unchanged")}
    model.express = [i for i in model.express if model.rows[i]["record_id"] not in bases]
    steps = []
    for _ in range(draw(st.integers(0, 8))):
        lane = draw(st.sampled_from(Lane))
        length = len(model.rows if lane is Lane.ROUTINE else model.express)
        cuts = sorted(draw(st.integers(0, length)) for _ in range(2))
        if cuts[0] < cuts[1]:
            steps.append((lane, *cuts))
    return model, steps


def _log_of(rows: list[dict], lane: Lane, campus: str) -> "_Log":
    places = [Position(row["_lsn"], row["_seq"]) for row in rows]
    return _Log(rows, places, lane, f"{campus}>primary")


@dataclasses.dataclass
class _Log:
    rows: list[dict]
    places: list[Position]
    lane: Lane
    link: str

    def batch(self, start: int, stop: int) -> ChangeBatch:
        begin = self.places[start - 1] if start else START
        chosen = self.rows[start:stop]
        if not chosen:
            return resealed(batch_of({}, begin, begin, self.lane), link=self.link)
        rows = {"emr_document": rows_of("emr_document", chosen)}
        batch = batch_of(rows, begin, self.places[stop - 1], self.lane)
        return resealed(batch, link=self.link)

    def index_after(self, position: Position) -> int:
        return sum(place <= position for place in self.places)


CAMPUSES = itertools.count()


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(deliveries())
def test_any_order_split_and_repetition_leaves_the_source_content(dsn, eye, sealer, case):
    model, steps = case
    campus = f"c{next(CAMPUSES)}"
    link = f"{campus}>primary"
    logs = {
        Lane.ROUTINE: _log_of(model.rows, Lane.ROUTINE, campus),
        Lane.EMERGENCY: _log_of([model.rows[i] for i in model.express], Lane.EMERGENCY, campus),
    }
    store = Store(dsn, link, campus, sealer, lambda: NOW_US)
    for lane, start, stop in steps:
        store.apply([logs[lane].batch(start, stop)], lane)
    # The sender, at last, sends each lane again from where its ledger stands.
    for lane, log in logs.items():
        known = ledger.read(eye, link)
        at = known.routine if lane is Lane.ROUTINE else known.emergency
        start = log.index_after(at or START)
        if start < len(log.rows):
            store.apply([log.batch(start, len(log.rows))], lane)
    store.close()
    _check_content(eye, model, campus)
    for lane, log in logs.items():
        if log.rows:
            end, counts = progress(eye, lane, link)
            assert end == log.places[-1]
            assert counts[0] == len(log.rows)
            assert counts[5] == 0
    uneven = eye.execute(
        "SELECT * FROM sync.manifest WHERE link = %s AND (source_count, source_digest)"
        " <> (store_count, store_digest)",
        (link,),
    )
    assert uneven.fetchall() == []
    totals = "SELECT lane, sum(source_count) FROM sync.manifest WHERE link = %s GROUP BY lane"
    for lane, count in eye.execute(totals, (link,)).fetchall():
        assert count == len(logs[Lane(lane)].rows)
    islands = eye.execute("SELECT count(*) FROM sync.island WHERE link = %s", (link,))
    assert islands.fetchone() == (0,)


def _check_content(eye, model: _Model, campus: str) -> None:
    columns = ("deleted", "src_lsn", "src_seq", *TEXT_COLUMNS, "patient_id", "digest")
    rows = stored(eye, "emr_document", *columns, campus=campus)
    # An emergency's copy of a change that the routine lane compacted away is all there may be
    # beyond the model: keys that came and went within one batch still leave tombstones.
    assert {key for key, row in rows.items() if not row[0]} == model.live.keys()
    for key, (deleted, lsn, seq, *content, patient, digest) in rows.items():
        if deleted:
            assert model.gone[key] == (lsn, seq)
            continue
        wanted = model.live[key]
        assert (lsn, seq) == wanted["place"]
        assert content == [wanted[name] for name in TEXT_COLUMNS]
        row = {**dict(zip(TEXT_COLUMNS, content, strict=True)), "patient_id": patient}
        batch = rows_of("emr_document", [{"record_id": key, **row}])
        assert digest == digest_rows(EMR_DOCUMENT, batch)[0].as_py()


# Guards and counts.


def test_an_older_change_is_superseded_and_the_same_a_duplicate(store, eye):
    newer = visits(visit(5, 1, "a", status="newer"), lane=Lane.EMERGENCY)
    store.apply([newer], Lane.EMERGENCY)
    receipt = routine(
        store,
        visits(
            visit(4, 1, "a", status="older"),
            visit(5, 1, "b", status="other"),
        ),
    )
    assert receipt.counts == (2, 1, 0, 1, 0, 0)
    again = visits(visit(5, 2, "b", status="later"), begin=Position(5, 1), end=Position(5, 2))
    assert routine(store, again).counts == (0,) * 6  # (5, SEQ_END] was reached before.
    assert stored(eye, "visit", "status") == {"a": ("newer",), "b": ("other",)}


def test_the_express_copy_makes_the_routine_change_a_duplicate(store, eye):
    rows = [visit(1, i + 1, f"r{i:03}") for i in range(EXPRESS_ROWS_MAX * 2)]
    receipt = store.apply([visits(*rows[::2], lane=Lane.EMERGENCY)], Lane.EMERGENCY)
    assert receipt.counts.delivered == EXPRESS_ROWS_MAX
    receipt = routine(store, visits(*rows))
    assert receipt.counts == (len(rows), len(rows) // 2, len(rows) // 2, 0, 0, 0)
    assert receipt.rows_per_commit.tolist() == [len(rows) // 2]
    assert receipt.visible_us == NOW_US


@pytest.mark.parametrize("rows", [5, 3000])
def test_insert_then_update_then_delete(store, eye, rows):
    first = batch_of({"lab_result": lab_results(0, rows, 10)})
    second = batch_of({"lab_result": lab_results(0, rows, 100, Op.UPDATE, "7.25")}, first.end)
    gone = lab_results(0, rows, 200, Op.DELETE)
    third = batch_of({"lab_result": gone}, second.end)
    for batch in (first, second, third):
        assert routine(store, batch).counts.delivered == rows
        assert not routine(store, batch).applied
    content = stored(eye, "lab_result", "value::text", "deleted", "digest IS NOT NULL")
    assert set(content.values()) == {("7.25", True, True)}
    assert progress(eye) == (third.end, (3 * rows, 3 * rows, 0, 0, 0, 0, 0))


def test_values_arrive_as_they_are(store, eye):
    row = {
        "record_id": "1",
        "name": "张三\t\\N",
        "birth_date": -25_567,
        "updated_at": -1,
        "allergies": "",
    }
    vital = {"record_id": "1", "temperature_cel": "36.60000000000000000001", "gcs": 15}
    for extra in (0, EXPRESS_ROWS_MAX):
        more = [{"record_id": f"x{i}", "_seq": 10 + i} for i in range(extra)]
        tables = {
            "patient": rows_of("patient", [{**row, "_lsn": 1 + extra}, *more]),
            "vital_sign": rows_of("vital_sign", [{**vital, "_lsn": 1 + extra}, *more]),
        }
        begin = START if not extra else Position(1, SEQ_END)
        assert routine(store, batch_of(tables, begin)).counts.delivered == 2 * (1 + extra)
        content = stored(
            eye,
            "patient",
            *("name", "birth_date::text", "updated_at = '1969-12-31 23:59:59.999999Z'"),
            *("allergies", "phone", "lane::text", "security_level", "src_table", "committed_at"),
        )["1"]
        assert content[:8] == ("张三\t\\N", "1900-01-01", True, "", None, "R", 4, "source.patient")
        assert content[8].timestamp() * 1e6 == COMMIT_US
        found = stored(eye, "vital_sign", "temperature_cel::text", "gcs", "pulse_per_min")["1"]
        assert found == ("36.60000000000000000001", 15, None)


# Islands.


def test_islands_join_when_the_gap_fills_and_are_counted_once(store, eye):
    whole = batch_of({"lab_result": lab_results(0, 60, 1, per_commit=10)})
    cuts = [START, *(Position(lsn, SEQ_END) for lsn in (1, 2, 3, 4, 5, 6))]
    one, two, three, four, five, six = (part_of(whole, *ends) for ends in itertools.pairwise(cuts))
    assert routine(store, three, five).progress == START
    assert routine(store, four).applied
    spans = "SELECT begin_lsn, end_lsn FROM sync.island ORDER BY 1"
    assert eye.execute(spans).fetchall() == [(2, 5)]
    assert routine(store, one).progress == cuts[1]
    receipt = routine(store, part_of(whole, START, cuts[6]))
    assert receipt.progress == cuts[6]
    assert receipt.counts == (20, 20, 0, 0, 0, 0)
    assert not routine(store, two, six).applied
    assert eye.execute(spans).fetchall() == []
    assert progress(eye) == (cuts[6], (60, 60, 0, 0, 0, 0, 0))
    manifest = "SELECT source_count, store_count, source_digest = store_digest FROM sync.manifest"
    assert eye.execute(manifest).fetchall() == [(60, 60, True)]


def test_what_needs_the_changes_before_it_waits_for_them(store, eye):
    first = visits(visit(1, 1, "a", status="open", bed="1"))
    partial = visits(visit(2, 1, "a", Op.UPDATE, bed="2", unchanged=["status"]), begin=first.end)
    assert not routine(store, partial).applied
    assert stored(eye, "visit", "bed") == {}
    assert routine(store, partial, first).counts == (2, 1, 0, 1, 0, 0)
    assert stored(eye, "visit", "bed", "status") == {"a": ("2", "open")}


def test_empty_batches_move_the_ledger(store, eye):
    beat = batch_of({}, START, Position(9, SEQ_END))
    receipt = routine(store, beat)
    assert (receipt.applied, receipt.progress) == (True, beat.end)
    assert ledger.read(eye, LINK) == ledger.Progress(beat.end, None)


# Unchanged columns, changed keys.


def test_unchanged_columns_keep_what_the_store_has(store, eye):
    content = "".join(chr(0x4E00 + i % 5000) for i in range(20_000))
    first = rows_of("emr_document", [visit(1, 1, "a", content=content, title="t", written_at=77)])
    update = visit(2, 1, "a", Op.UPDATE, status="signed", unchanged=["content", "written_at"])
    one = batch_of({"emr_document": first})
    two = batch_of({"emr_document": rows_of("emr_document", [update])}, one.end)
    routine(store, one)
    assert routine(store, two).counts.delivered == 1
    row = stored(eye, "emr_document", "content", "status", "title", "digest")["a"]
    assert row[:3] == (content, "signed", None)
    whole = {"record_id": "a", "content": content, "status": "signed", "written_at": 77}
    wanted = digest_rows(EMR_DOCUMENT, rows_of("emr_document", [whole]))
    assert row[3] == wanted[0].as_py()


def test_a_changed_key_takes_unchanged_columns_along(store, eye):
    one = visits(visit(1, 1, "old", status="open", bed="1"))
    two = visits(
        visit(2, 1, "old", Op.DELETE),
        visit(2, 2, "new", Op.UPDATE, _prev_id="old", bed="2", unchanged=["status"]),
        begin=one.end,
    )
    halves = (
        part_of(two, one.end, Position(2, 1)),
        part_of(two, Position(2, 1), two.end),
    )
    for batch in (one, *halves):
        assert routine(store, batch).counts.delivered == 1
    content = stored(eye, "visit", "status", "bed", "deleted")
    assert content == {"old": ("open", "1", True), "new": ("open", "2", False)}


def test_unchanged_columns_without_a_base_are_a_dead_letter(store, eye, sealer):
    batch = visits(
        visit(1, 1, "a", Op.UPDATE, bed="2", unchanged=["status"]),
        visit(1, 2, "b", bed="3"),
    )
    assert routine(store, batch).counts == (2, 1, 0, 0, 0, 1)
    letters = eye.execute("SELECT reason, op::text, lsn, seq, state FROM sync.dead_letter")
    assert letters.fetchall() == [("no_base_row", "U", 1, 1, "open")]
    assert stored(eye, "visit", "bed") == {"b": ("3",)}


def test_a_tombstone_that_overtook_is_no_base(store, eye):
    """The emergency lane's delete may hide what the routine lane had yet to write."""
    one = visits(visit(1, 1, "old", status="open"))
    routine(store, one)
    gone = visits(visit(3, 1, "old", Op.DELETE), lane=Lane.EMERGENCY)
    store.apply([gone], Lane.EMERGENCY)
    rest = visits(
        visit(2, 1, "old", Op.UPDATE, status="closed"),
        visit(3, 1, "old", Op.DELETE),
        begin=one.end,
        end=Position(3, 1),
    )
    moved = visits(
        visit(3, 2, "new", Op.UPDATE, _prev_id="old", unchanged=["status"]), begin=rest.end
    )
    routine(store, rest)
    assert routine(store, moved).counts.dead == 1
    assert "new" not in stored(eye, "visit", "status")


# Refused rows.


@pytest.mark.parametrize("rows", [9, 700])
def test_bad_rows_become_letters_and_all_others_are_written(store, eye, sealer, rows):
    good = [visit(1, i + 1, f"r{i:03}", triage_level=1 + i % 4) for i in range(rows)]
    good[3]["triage_level"] = 9
    good[5]["status"] = "nul \0"
    good[8]["record_id"] = "".join(sha256(bytes([k])).hexdigest() for k in range(256))
    batch = visits(*good)
    assert routine(store, batch).counts == (rows, rows - 3, 0, 0, 0, 3)
    assert not routine(store, batch).applied
    letters = eye.execute(
        "SELECT reason, column_name, seq, letter_id, src_table, lsn, op::text, key_id, sealed"
        " FROM sync.dead_letter ORDER BY seq"
    ).fetchall()
    assert [row[0] for row in letters] == ["check_violation", "invalid_text", "sqlstate_54000"]
    assert letters[0][1] == "triage_level"
    assert len(stored(eye, "visit", "bed")) == rows - 3
    counts = "SELECT source_count, store_count, source_digest = store_digest FROM sync.manifest"
    assert eye.execute(counts).fetchall() == [(rows, rows - 3, False)]


def test_a_refused_row_can_be_opened_again(store, eye, sealer):
    routine(store, visits(visit(1, 1, "a", triage_level=0, bed="7", started_at=1)))
    row = eye.execute(
        "SELECT letter_id, src_table, lsn, seq, ascii(op::text),"
        " (extract(epoch FROM committed_at) * 1000000)::bigint, reason, column_name, key_id,"
        " sealed FROM sync.dead_letter"
    ).fetchone()
    reject = sealer.open(DeadLetter(*row))
    assert reject.position == (1, 1)
    assert (reject.row["record_id"], reject.row["bed"]) == ("a", "7")
    assert reject.row["triage_level"] == "0"


def test_bad_decimals_and_times_out_of_range(store, eye):
    rows = [
        {"record_id": "a", "_seq": 1, "value": "1e5"},
        {"record_id": "b", "_seq": 2, "updated_at": -(2**62)},
        {"record_id": "c", "_seq": 3, "value": "1" + "0" * 140_000},
        {"record_id": "d", "_seq": 4, "value": "-0.5"},
    ]
    batch = batch_of({"lab_result": rows_of("lab_result", [{**row, "_lsn": 1} for row in rows])})
    assert routine(store, batch).counts == (4, 1, 0, 0, 0, 3)
    reasons = eye.execute("SELECT reason, column_name FROM sync.dead_letter ORDER BY seq")
    found = reasons.fetchall()
    assert found[0] == ("invalid_value", "value")
    assert found[1] == ("time_out_of_range", "updated_at")
    assert stored(eye, "lab_result", "value::text") == {"d": ("-0.5",)}


# Sweeps, holds, letters, escalations.


def test_what_a_snapshot_reads_has_no_lag_though_it_is_marked_as_void(store):
    read = visits(
        visit(1, 1, "kept", Op.SNAPSHOT, _commit_us=COMMIT_US),
        visit(1, 2, "void", Op.DELETE, _commit_us=COMMIT_US),
        visit(2, 1, "gone", Op.DELETE, _commit_us=COMMIT_US + 7),
        visit(3, 1, "new", _commit_us=COMMIT_US + 9),
    )
    receipt = routine(store, read)
    assert receipt.counts.captured == 4
    assert receipt.commit_us.tolist() == [COMMIT_US + 7, COMMIT_US + 9]


def test_a_sweep_ends_what_the_snapshot_did_not_find(store, eye):
    before = visits(visit(1, 1, "kept"), visit(1, 2, "lost", status="open"))
    other = batch_of({"patient": rows_of("patient", [visit(2, 1, "p")])}, before.end)
    routine(store, before, other)
    ledger.begin_snapshot(eye, LINK, 50, "slot_missing")
    snapshot = visits(
        visit(50, 1, "kept", Op.SNAPSHOT, status="closed"),
        begin=other.end,
        end=Position(50, SEQ_END),
        sweeps=(("source.visit", Position(50, 1)),),
    )
    early = resealed(snapshot, begin=Position(3, 1))
    assert not routine(store, early).applied  # A snapshot's end waits for what is before it.
    assert routine(store, snapshot).counts == (1, 1, 0, 0, 0, 0)
    content = stored(eye, "visit", "deleted", "status", "src_lsn", "src_seq")
    assert content == {"kept": (False, "closed", 50, 1), "lost": (True, "open", 50, 0)}
    assert stored(eye, "patient", "deleted") == {"p": (False,)}
    assert progress(eye)[1][-1] == 1
    known = ledger.read(eye, LINK)
    assert known == ledger.Progress(snapshot.end, None, 50)
    assert eye.execute("SELECT state FROM sync.snapshot").fetchall() == [("done",)]


def test_an_old_copy_does_not_bring_back_what_a_sweep_ended(store, eye):
    swept = batch_of({}, START, Position(50, SEQ_END), sweeps=(("source.visit", Position(50, 1)),))
    routine(store, swept)
    late = visits(visit(7, 1, "gone"), lane=Lane.EMERGENCY)
    assert store.apply([late], Lane.EMERGENCY).counts == (1, 0, 0, 1, 0, 0)
    assert stored(eye, "visit", "deleted") == {}


def test_letters_and_holds_are_counted_and_kept_once(store, eye, sealer):
    reject = Reject(
        "his.visit", Position(1, 2), int(Op.INSERT), COMMIT_US, "bad", "bed", {"a": "b"}
    )
    letter = sealer.seal(reject, LINK)
    holds = (("his.visit", Position(1, 3)),)
    batch = visits(visit(1, 1, "a"), dead=(letter,), holds=holds)
    assert routine(store, batch).counts == (3, 1, 0, 0, 1, 1)
    assert not routine(store, batch).applied
    longer = visits(
        visit(1, 1, "a"), visit(2, 1, "b"), dead=(letter,), holds=holds, end=Position(2, 1)
    )
    assert routine(store, longer).counts == (1, 1, 0, 0, 0, 0)
    assert eye.execute("SELECT letter_id, reason FROM sync.dead_letter").fetchall() == [
        (letter.letter_id, "bad")
    ]
    assert eye.execute("SELECT kind, src_table, lsn, seq, state FROM sync.hold").fetchall() == [
        ("truncate", "his.visit", 1, 3, "open")
    ]


def test_escalations_go_by_position(store, eye):
    def change(lsn: int, is_open: bool, lane_end: int, begin: Position = START):
        return batch_of(
            {},
            begin,
            Position(lane_end, SEQ_END),
            Lane.EMERGENCY,
            escalations=(("P1", "triage", lsn, 1, is_open),),
        )

    newer = change(8, False, 8, Position(4, SEQ_END))
    store.apply([newer], Lane.EMERGENCY)
    store.apply([change(4, True, 4)], Lane.EMERGENCY)
    rows = eye.execute('SELECT patient_id, lsn, "open" FROM sync.escalation').fetchall()
    assert rows == [("P1", 8, False)]
    assert ledger.escalations(eye, "main").patients == frozenset()
    reopened = change(9, True, 9, Position(8, SEQ_END))
    store.apply([reopened], Lane.EMERGENCY)
    assert ledger.escalations(eye, "main").opened_at("P1") == (9, 1)


def test_rows_from_before_an_emergency_batch_are_delivered_with_it(store, eye):
    """A patient newly under emergency brings along what the routine lane has waiting."""
    store.apply([visits(visit(5, 1, "a"), lane=Lane.EMERGENCY)], Lane.EMERGENCY)
    batch = visits(
        visit(3, 1, "waiting"),
        visit(6, 1, "b"),
        begin=Position(5, SEQ_END),
        lane=Lane.EMERGENCY,
    )
    assert store.apply([batch], Lane.EMERGENCY).counts == (2, 2, 0, 0, 0, 0)


# What must not be.


def test_a_broken_seal_is_not_applied(store, eye):
    batch = dataclasses.replace(visits(visit(1, 1, "a")), captured=7)
    assert not routine(store, batch).applied
    assert stored(eye, "visit", "bed") == {}


def test_a_count_that_is_not_the_contents_rolls_back(store, eye):
    batch = visits(visit(1, 1, "a"), captured=2)
    with pytest.raises(ConservationBroken):
        routine(store, batch)
    assert stored(eye, "visit", "bed") == {}
    assert routine(store, visits(visit(1, 1, "a"))).counts.delivered == 1


def test_a_batch_of_another_link_is_refused(store):
    with pytest.raises(ValueError, match="other>primary"):
        routine(store, resealed(visits(visit(1, 1, "a")), link="other>primary"))


def test_manifest_is_by_table_and_window(store, eye):
    rows = [visit(i + 1, 1, str(i), _commit_us=COMMIT_US + i * 40_000_000) for i in range(4)]
    routine(store, visits(*rows))
    counts = "SELECT source_count, store_count FROM sync.manifest ORDER BY window_start"
    assert eye.execute(counts).fetchall() == [(2, 2), (1, 1), (1, 1)]


def test_a_loss_between_capture_and_store_shows_in_the_manifest(store, eye):
    batch = visits(visit(1, 1, "a"))
    (entry,) = batch.manifest
    more = ManifestEntry(entry.table, entry.window_start_us, 2, b"\1" + entry.digest[1:])
    routine(store, resealed(batch, manifest=(more,)))
    found = eye.execute("SELECT source_count, store_count FROM sync.manifest").fetchall()
    assert found == [(2, 1)]


def test_both_lanes_at_once_lose_nothing(dsn, eye, store, sealer):
    """Two sessions write the same keys in every interleaving that comes about."""
    rows = 1500
    whole = {
        lane: [
            batch_of(
                {"lab_result": lab_results(0, rows, 1 + 10 * k, Op.UPDATE if k else Op.INSERT)},
                Position(10 * k, SEQ_END) if k else START,
                Position(10 * (k + 1), SEQ_END),
                lane,
            )
            for k in range(8)
        ]
        for lane in Lane
    }
    failures = []

    def send(lane: Lane) -> None:
        other = Store(dsn, LINK, "main", sealer, lambda: NOW_US)
        for batch in whole[lane]:
            for _ in range(50):
                try:
                    other.apply([batch], lane)
                    break
                except StoreUnavailable as error:
                    failures.append(str(error))
        other.close()

    threads = [threading.Thread(target=send, args=(lane,)) for lane in Lane]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [progress(eye, lane)[1] for lane in Lane]
    assert [c[0] for c in counts] == [8 * rows] * 2
    last = stored(eye, "lab_result", "src_lsn")
    assert {lsn // 10 for (lsn,) in last.values()} == {7}
    assert len(last) == rows
    # Each change was delivered by at most one lane, the newest of each key by exactly one.
    assert sum(c[1] for c in counts) <= 8 * rows


# Failures of the store.


def test_a_store_that_cannot_be_reached(sealer):
    store = Store("host=127.0.0.1 port=1 dbname=none", LINK, "main", sealer, lambda: NOW_US)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        routine(store, visits(visit(1, 1, "a")))


def test_a_connection_that_is_cut_leaves_nothing_and_the_next_try_succeeds(store, eye):
    routine(store, visits(visit(1, 1, "a")))
    eye.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'campus_sync' AND pid <> pg_backend_pid()"
    )
    batch = visits(visit(2, 1, "b"), begin=Position(1, SEQ_END))
    with pytest.raises(StoreUnavailable):
        routine(store, batch)
    assert routine(store, batch).counts.delivered == 1


def test_the_server_killed_at_any_moment_loses_and_doubles_nothing(tmp_path, sealer):
    rows, per_batch = 400, 40
    with PostgresServer(tmp_path / "server", durable=False) as server:
        dsn = server.create_database("consult")
        with ledger.connect(dsn):
            pass
        whole = batch_of({"lab_result": lab_results(0, rows, 1, per_commit=per_batch // 2)})
        cuts = [START, *(Position(lsn, SEQ_END) for lsn in range(2, 21, 2))]
        parts = [part_of(whole, *ends) for ends in itertools.pairwise(cuts)]
        store = Store(dsn, LINK, "main", sealer, lambda: NOW_US)
        killed = 0
        for attempt in range(200):
            with ledger.connect(dsn) as conn:
                at = ledger.read(conn, LINK).routine or START
            if at == cuts[-1]:
                break
            delay_s = 0.002 * (attempt % 7)
            killer = threading.Timer(delay_s, server.kill) if killed < 4 else None
            if killer:
                killer.start()
            try:
                for part in parts[cuts.index(at) :]:
                    store.apply([part], Lane.ROUTINE)
            except StoreUnavailable:
                pass
            if killer:
                killer.join()
                killed += 1
                server.start()
        store.close()
        with ledger.connect(dsn) as conn:
            position, counts = progress(conn)
            assert position == cuts[-1]
            assert counts == (rows, rows, 0, 0, 0, 0, 0)
            assert conn.execute("SELECT count(*) FROM consult.lab_result").fetchone() == (rows,)
        assert killed == 4


def test_the_schema_is_made_once_and_by_anybody(dsn, eye):
    for _ in range(2):
        store_schema.ensure(eye)
    assert store_schema.store_ddl() == store_schema.store_ddl()
    names = eye.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'consult'").fetchall()
    assert {name for (name,) in names} == {*TABLES, *STORE_TABLES}
    for table in TABLES.values():
        columns = eye.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
            " ORDER BY attnum",
            (f"consult.{table.name}",),
        ).fetchall()
        assert [name for (name,) in columns][2 : 2 + len(table.columns)] == list(table.by_name)


def test_tables_of_pyarrow_views_are_written(store, eye):
    """A decoded batch's columns are slices of one buffer."""
    rows = lab_results(0, 30, 1)
    sliced = pa.Table.from_batches([rows]).slice(10, 10).to_batches()[0]
    assert routine(store, batch_of({"lab_result": sliced})).counts.delivered == 10
    assert set(stored(eye, "lab_result", "unit")) == set(sliced["record_id"].to_pylist())


def test_a_batch_delivered_before_its_pane_is_told_of_with_it(store, dsn, eye, tmp_path):
    make_key(tmp_path / "key")
    settings = LinkSettings(
        LINK, "main", "primary", "", dsn, "", "", "", "", f"file:{tmp_path / 'key'}",
        one_worker=True,
    )  # fmt: skip
    places = [Position(lsn, SEQ_END) if lsn else START for lsn in range(4)]
    batches = [
        batch_of({"patient": rows_of("patient", [{"record_id": str(end.lsn), "_lsn": end.lsn}])},
                 begin, end)
        for begin, end in itertools.pairwise(places)
    ]  # fmt: skip
    stubs = [HERE.park(batch) for batch in batches]
    panes = [
        RoutinePane(LINK, 0, 1, timing, (stub,), late)
        for stub, timing, late in zip(stubs, ("early", "late", "early"), (0, 1, 0), strict=True)
    ]
    deliver = _DeliverRoutineFn(settings, Lane.ROUTINE, lambda: NOW_US)
    deliver.setup()
    try:
        receipts = list(deliver.process((LINK, panes[0])))
        until(lambda: progress(eye)[0] == places[3], 20, "all three, though two panes are to come")
        for pane in panes[1:]:
            receipts += deliver.process((LINK, pane))
    finally:
        deliver.teardown()
        HERE.clear(LINK, Lane.ROUTINE)
    assert [receipt.progress for receipt in receipts] == places[1:]
    assert [receipt.late for receipt in receipts] == [0, 1, 0]
    assert [receipt.counts for receipt in receipts] == [(1, 1, 0, 0, 0, 0)] * 3
