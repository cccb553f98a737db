"""Late, changed and missing parents: every child ends with its patient, whatever the order."""

import dataclasses
import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.embedded.dialect import RowChange
from schemas.batches import Op
from schemas.mappings import load_mapping
from schemas.positions import START, Position
from tests.memory_store import MemoryStore
from tests.said_rows import raw_changes
from transforms.harmonise import Harmoniser, Lookups, Note

MAPPING = load_mapping("mariadb_his_gbk")
# Table to its key, what leads to its parent, and that parent.
TABLES = {
    "MS_BRDA": ("BRID", None, None),
    "ZY_BRRY": ("ZYH", "BRID", "MS_BRDA"),
    "JYJG": ("JYXH", "BRID", "MS_BRDA"),
    "YS_ZY_HZSQ": ("SQXH", "JZHM", "ZY_BRRY"),
}
COLUMNS = {
    "MS_BRDA": "BRID MZHM BRXM BRXB CSNY SFZH JTDH XX RHXX GMS ZFPB XGSJ",
    "ZY_BRRY": "ZYH BRID ZYHM KSDM CWHM CYPB RYRQ CYRQ ZFPB XGSJ",
    "JYJG": "JYXH BRID JZHM XMDM XMMC JG DW CKZ TS WJBZ JGZT CYSJ BGSJ ZFPB XGSJ",
    "YS_ZY_HZSQ": "SQXH JZHM SQSJ SQKS SQYS JJBZ HZMD HZYS HZYJ HZZT DCSJ HFSJ ZFBZ XGSJ",
}
CANONICAL = {"ZY_BRRY": "visit", "JYJG": "lab_result", "YS_ZY_HZSQ": "consultation"}
PREFIX = {"ZY_BRRY": "ZY", "YS_ZY_HZSQ": "ZY"}
FLAG = {"YS_ZY_HZSQ": "ZFBZ"}


def row_of(table: str, **values) -> dict:
    flag = {FLAG.get(table, "ZFPB"): "0"}
    return dict.fromkeys(COLUMNS[table].split()) | flag | {c: str(v) for c, v in values.items()}


def put(table: str, before: dict | None, after: dict | None) -> RowChange:
    op = "insert" if before is None else "delete" if after is None else "update"
    return RowChange(op, table, before, after, (TABLES[table][0],))


def insert(table: str, **values) -> RowChange:
    return put(table, None, row_of(table, **values))


def update(change: RowChange, **values) -> RowChange:
    return put(change.table, change.after, change.after | {c: str(v) for c, v in values.items()})


class Link:
    """One link: reads a log in pieces, with a store that lags, until everything is applied."""

    def __init__(self, log: list[list[RowChange]]):
        self.log = log
        self.store = MemoryStore(MAPPING)
        self.issued = 0
        self.acked, self.acked_at = 0, START
        self.restart()

    def restart(self) -> None:
        """A kill: what was under way is lost, and read again from the ledger on."""
        self.lookups = Lookups(MAPPING, self.store)
        self.harmoniser = Harmoniser(MAPPING, self.lookups)
        self.queue: list[tuple[int, Position, dict]] = []
        self.read, self.read_at = self.acked, self.acked_at

    def take(self, count: int) -> None:
        """Reads transactions as one batch."""
        some = self.log[self.read : self.read + count]
        if not some:
            return
        raw = raw_changes("his", some, self.read + 1, self.read_at)
        self.lookups.acknowledged(self.acked_at)
        done = self.harmoniser.apply(raw)
        assert done.rejects == []
        rows = sum(batch.num_rows for batch in done.tables.values())
        assert rows == raw.captured + done.reissued
        for batch in done.tables.values():
            batch.validate(full=True)
            places = list(zip(batch["_lsn"].to_pylist(), batch["_seq"].to_pylist(), strict=True))
            assert places == sorted(places)
            assert all(raw.begin < place <= raw.end for place in places)
        self.issued += done.reissued
        self.read, self.read_at = self.read + len(some), raw.end
        self.queue.append((self.read, raw.end, done.tables))

    def deliver(self) -> None:
        """The store applies the next batch, and its ledger moves."""
        if self.queue:
            self.acked, self.acked_at, tables = self.queue.pop(0)
            self.store.apply(tables)

    def overtake(self) -> None:
        """The emergency lane: copies of whole rows arrive before their batch."""
        for _, _, tables in self.queue[-1:]:
            whole = {
                name: rows.filter(
                    pa.array(
                        (rows["_unchanged"].to_numpy() == 0) & (rows["_op"].to_numpy() != Op.DELETE)
                    )
                )
                for name, rows in tables.items()
            }
            self.store.apply(whole)

    def finish(self) -> "Link":
        while self.read < len(self.log) or self.queue:
            self.take(3)
            self.deliver()
        assert self.store.refused == []
        return self


def whose(store: MemoryStore) -> dict[tuple[str, str], tuple[str | None, str | None]]:
    """Live children: (canonical table, record id) to patient and visit."""
    return {
        (name, key): (row["patient_id"], row["visit_no"])
        for name in CANONICAL.values()
        for key, row in store.live(name).items()
    }


def truth(log: list[list[RowChange]]) -> dict[tuple[str, str], tuple[str | None, str | None]]:
    """What naive joins say after every single change; a deleted row is as it was."""
    rows: dict[str, dict[str, dict]] = {table: {} for table in TABLES}
    for change in (change for transaction in log for change in transaction):
        table = change.table
        key = (change.after or change.before)[TABLES[table][0]]
        if change.after is None or change.after[FLAG.get(table, "ZFPB")] == "1":
            if key in rows[table]:
                rows[table][key]["gone"] = True
            elif change.after is not None:
                rows[table][key] = {"gone": True, "never": True}
        else:
            rows[table][key] = dict(change.after) | {"gone": False}
        for name, (_, by, parent) in TABLES.items():
            for row in rows[name].values():
                if row["gone"]:
                    continue
                if parent is None:
                    row["patient"], row["visit"] = row["MZHM"], None
                    continue
                above = rows[parent].get(row[by], {})
                row["patient"] = above.get("patient")
                own = {"ZY_BRRY": "ZYHM", "JYJG": "JZHM"}.get(name)
                row["visit"] = row[own] if own else above.get("visit")
    return {
        (CANONICAL[table], f"{PREFIX.get(table, '')}{key}"): (row["patient"], row["visit"])
        for table, some in rows.items()
        if table in CANONICAL
        for key, row in some.items()
        if not row["gone"]
    }


def hospital(draw: random.Random) -> list[list[RowChange]]:
    """A history in which children come before their parents, parents change, and all is voided."""
    now: dict[str, dict[str, dict]] = {table: {} for table in TABLES}
    log = []
    for _ in range(draw.randint(1, 30)):
        transaction = []
        for _ in range(draw.randint(1, 4)):
            table = draw.choice(list(TABLES))
            key, by, _ = TABLES[table]
            number = str(draw.randint(1, 4))
            before = now[table].get(number)
            # A visit stays: what its own patient says after it was deleted is anybody's guess.
            gone = draw.random() < 0.15 and table != "ZY_BRRY"
            if before is not None and gone:
                transaction.append(put(table, before, None))
                del now[table][number]
                continue
            values = {key: number}
            if by:
                values[by] = draw.randint(1, 4)
            if table == "MS_BRDA":
                values["MZHM"] = f"M{draw.randint(1, 3)}"
            if table == "ZY_BRRY":
                values["ZYHM"] = f"V{draw.randint(1, 3)}"
            if table == "JYJG":
                values |= {"XMDM": "KAL", "JG": f"{draw.randint(3, 6)}.1", "DW": "mmol/L"}
            after = row_of(table, **values)
            if gone or (draw.random() < 0.15 and table != "ZY_BRRY"):
                after[FLAG.get(table, "ZFPB")] = "1"
            transaction.append(put(table, before, after))
            now[table][number] = after
        log.append(transaction)
    return log


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32))
def test_every_child_ends_with_its_patient(seed):
    draw = random.Random(seed)
    log = hospital(draw)
    link = Link(log)
    for _ in range(draw.randint(0, 40)):
        action = draw.random()
        if action < 0.45:
            link.take(draw.randint(1, 6))
        elif action < 0.8:
            link.deliver()
        elif action < 0.92:
            link.overtake()
        else:
            link.restart()
    link.finish()
    assert whose(link.store) == truth(log)
    for table in CANONICAL.values():
        for row in link.store.live(table).values():
            waits = (row["remarks"] or "").startswith("awaiting_parent")
            assert waits == (row["patient_id"] is None)


def test_a_late_parent_brings_its_child_along():
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="7.5↑↑", DW="mmol/L", JZHM="V1")
    link = Link([[child], [insert("MS_BRDA", BRID=5, MZHM="M5")]])
    link.take(1)
    [(_, _, tables)] = link.queue
    [row] = tables["lab_result"].to_pylist()
    assert (row["patient_id"], row["value"], row["parent_ref"]) == (None, "7.5", "his.MS_BRDA 5")
    assert row["remarks"] == "awaiting_parent patient_id: his.MS_BRDA 5"
    link.take(1)
    [again] = link.queue[1][2]["lab_result"].to_pylist()
    [parent] = link.queue[1][2]["patient"].to_pylist()
    # Whole, so that an emergency in it is seen; at its parent's place, behind its own.
    assert (again["patient_id"], again["value"], again["flag"]) == ("M5", "7.5", "HH")
    assert (again["_op"], again["_unchanged"], again["remarks"]) == (Op.UPDATE, 0, None)
    assert (again["_lsn"], again["_seq"]) == (parent["_lsn"], parent["_seq"]) > (1, 1)
    assert again["_src_table"] == "his.JYJG"
    assert link.issued == 1
    assert link.lookups.waiting == 0


def test_who_waits_is_known_after_a_restart():
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="ABC", JG="7.5", DW="mmol/L")
    link = Link([[child], [insert("MS_BRDA", BRID=5, MZHM="M5")]])
    link.take(1)
    link.deliver()
    link.restart()
    link.finish()
    row = link.store.live("lab_result")["7"]
    assert row["patient_id"] == "M5"
    assert row["remarks"] == "unknown_code item_code: ABC"  # The other remark stays.
    assert row["value"] == "7.5"


def test_a_changed_number_moves_all_rows_of_the_patient():
    patient = insert("MS_BRDA", BRID=5, MZHM="M5")
    visit = insert("ZY_BRRY", ZYH=9, BRID=5, ZYHM="V9")
    asked = insert("YS_ZY_HZSQ", SQXH=3, JZHM=9, HZMD="请会诊")
    result = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    other = insert("JYJG", JYXH=8, BRID=6, XMDM="KAL", JG="4.1", DW="mmol/L")
    link = Link([[patient, visit, asked, result, other], [update(patient, MZHM="M55")]])
    link.take(1)
    link.deliver()
    link.take(1)
    link.finish()
    assert whose(link.store) == {
        ("visit", "ZY9"): ("M55", "V9"),
        ("consultation", "ZY3"): ("M55", "V9"),
        ("lab_result", "7"): ("M55", None),
        ("lab_result", "8"): (None, None),
    }
    assert link.issued == 3
    assert link.store.live("consultation")["ZY3"]["purpose"] == "请会诊"


def test_nothing_is_issued_again_where_a_parent_tells_nothing_new():
    patient = insert("MS_BRDA", BRID=5, MZHM="M5")
    result = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    link = Link([[patient, result], [update(patient, JTDH="154")], [update(patient, JTDH="155")]])
    for _ in range(3):
        link.take(1)
        link.deliver()
        link.restart()
    assert link.issued == 0


def test_a_deleted_child_is_not_brought_back_by_its_parent():
    result = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    voided = update(result, ZFPB=1)
    link = Link([[result], [voided], [insert("MS_BRDA", BRID=5, MZHM="M5")]]).finish()
    assert whose(link.store) == {}
    assert link.lookups.waiting == 0


def test_an_unvoided_child_comes_back_whole():
    patient = insert("MS_BRDA", BRID=5, MZHM="M5")
    result = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    voided = update(result, ZFPB=1)
    link = Link([[patient, result], [voided], [update(voided, ZFPB=0)]])
    link.take(2)
    link.deliver()
    assert whose(link.store) == {}
    assert link.store.rows["lab_result"]["7"]["value"] == "4.1"  # The tombstone keeps it.
    link.finish()
    assert whose(link.store) == {("lab_result", "7"): ("M5", None)}


def test_a_swept_child_is_not_brought_back():
    """A snapshot of the table found it gone: whoever waited for its parent waits no more."""
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    parent = [insert("MS_BRDA", BRID=5, MZHM="M5")]
    lookups = Lookups(MAPPING)
    harmoniser = Harmoniser(MAPPING, lookups)
    harmoniser.apply(raw_changes("his", [[child]], 1, START))
    assert lookups.waiting == 1
    swept = raw_changes("his", [parent], 5, Position(1, 1))
    swept = dataclasses.replace(swept, sweeps=(("his.JYJG", Position(5, 0)),))
    done = harmoniser.apply(swept)
    assert (done.reissued, set(done.tables), lookups.waiting) == (0, {"patient"}, 0)


def test_a_parent_that_came_by_another_way_is_found_on_doubt():
    """A dead letter of the parent was replayed into the store: the log says nothing of it."""
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    link = Link([[child], [insert("MS_BRDA", BRID=6, MZHM="M6")]])
    link.take(1)
    link.deliver()
    parents = raw_changes("his", [[insert("MS_BRDA", BRID=5, MZHM="M5")]], 1, START)
    link.store.apply(Harmoniser(MAPPING).apply(parents).tables)
    link.lookups.doubt()
    link.finish()
    assert whose(link.store) == {("lab_result", "7"): ("M5", None)}


class Lost(Exception):
    """The store cannot be reached."""


class Unsure:
    """A store that is away at every question but the first few."""

    def __init__(self, store: MemoryStore, answers: int):
        self._store, self._answers = store, answers

    def __getattr__(self, name: str):
        def ask(*args):
            if self._answers == 0:
                raise Lost
            self._answers -= 1
            return getattr(self._store, name)(*args)

        return ask


@pytest.mark.parametrize("answers", range(12))
def test_a_batch_may_be_tried_again_when_the_store_was_away(answers):
    patient = insert("MS_BRDA", BRID=5, MZHM="M5")
    visit = insert("ZY_BRRY", ZYH=9, BRID=5, ZYHM="V9")
    asked = insert("YS_ZY_HZSQ", SQXH=3, JZHM=9)
    late = insert("JYJG", JYXH=7, BRID=6, XMDM="KAL", JG="4.1", DW="mmol/L")
    log = [
        [patient, visit, asked, late],
        [update(patient, MZHM="M55"), insert("MS_BRDA", BRID=6, MZHM="M6")],
    ]
    link = Link(log)
    link.take(1)
    link.deliver()
    link.restart()
    link.lookups = Lookups(MAPPING, Unsure(link.store, answers))
    link.harmoniser = Harmoniser(MAPPING, link.lookups)
    raw = raw_changes("his", log[1:], 2, link.acked_at)
    try:
        done = link.harmoniser.apply(raw)
    except Lost:
        link.lookups._store = link.store
        done = link.harmoniser.apply(raw)
    link.store.apply(done.tables)
    assert done.reissued == 3
    assert whose(link.store) == truth(log)


def test_parents_that_are_not_followed_are_only_looked_up():
    """As a comparison needs it: rows as they are, one table after the other."""
    store = MemoryStore(MAPPING)
    patients = raw_changes("his", [[insert("MS_BRDA", BRID=5, MZHM="M5")]], 1, START)
    store.apply(Harmoniser(MAPPING).apply(patients).tables)
    harmoniser = Harmoniser(MAPPING, Lookups(MAPPING, store, follow=False))
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    for _ in range(2):
        done = harmoniser.apply(raw_changes("his", [[child]], 1, START))
        assert done.tables["lab_result"]["patient_id"].to_pylist() == ["M5"]
        assert done.reissued == 0


def test_memory_is_bounded_by_what_is_under_way():
    lookups = Lookups(MAPPING, MemoryStore(MAPPING), cached_max=100)
    harmoniser = Harmoniser(MAPPING, lookups)
    end = START
    for first in range(1, 11):
        some = [insert("MS_BRDA", BRID=first * 1000 + i, MZHM=f"M{i}") for i in range(50)]
        raw = raw_changes("his", [some], first, end)
        lookups.acknowledged(end if first < 8 else START)
        harmoniser.apply(raw)
        end = raw.end
    assert not lookups.crowded
    for first in range(11, 16):  # Nothing is acknowledged any more.
        some = [insert("MS_BRDA", BRID=first * 1000 + i, MZHM=f"M{i}") for i in range(50)]
        raw = raw_changes("his", [some], first, end)
        harmoniser.apply(raw)
        end = raw.end
    assert lookups.crowded


def test_a_row_without_its_key_waits_for_nobody():
    link = Link([[insert("JYJG", JYXH=7, XMDM="KAL", JG="4.1", DW="mmol/L")]]).finish()
    row = link.store.live("lab_result")["7"]
    assert (row["patient_id"], row["parent_ref"], row["remarks"]) == (None, None, None)


def test_notes_tell_how_many_wait():
    harmoniser = Harmoniser(MAPPING)
    child = insert("JYJG", JYXH=7, BRID=5, XMDM="KAL", JG="4.1", DW="mmol/L")
    done = harmoniser.apply(raw_changes("his", [[child]], 1, START))
    assert done.notes == {Note("his.JYJG", "BRID", "awaiting_parent"): 1}
