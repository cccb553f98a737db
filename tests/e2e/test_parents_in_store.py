"""Children find their parents in a real consult store, and move with them."""

import random

import psycopg
import pytest

from schemas.batches import Lane
from schemas.positions import SEQ_END, START, Position
from tests.deliveries import LINK, batch_of
from tests.said_rows import raw_changes
from tests.unit.test_lookups import CANONICAL, MAPPING, hospital, insert, truth, update
from transforms.deliver import ledger
from transforms.deliver.store import Store
from transforms.harmonise import Harmoniser, Lookups
from transforms.harmonise.parents_in_store import StoreParents
from transforms.seal_dead_letters import Sealer, make_key

NOW_US = 1_772_352_005_000_000


@pytest.fixture
def sealer(tmp_path) -> Sealer:
    make_key(tmp_path / "key")
    return Sealer(f"file:{tmp_path / 'key'}")


class Link:
    """A reader and its store, one batch at a time."""

    def __init__(self, dsn: str, sealer: Sealer):
        self._store = Store(dsn, LINK, "main", sealer, lambda: NOW_US)
        self._eye = ledger.connect(dsn)
        self.at, self.read = START, 0
        self.receipts = []
        self.restart()

    def restart(self) -> None:
        self.lookups = Lookups(MAPPING, StoreParents(lambda: self._eye, "main", MAPPING))
        self.harmoniser = Harmoniser(MAPPING, self.lookups)

    def take(self, log, count: int) -> None:
        raw = raw_changes("his", log[self.read : self.read + count], self.read + 1, self.at)
        self.lookups.acknowledged(self.at)
        done = self.harmoniser.apply(raw)
        assert done.rejects == []
        if done.tables:
            batch = batch_of(done.tables, self.at, raw.end, captured=raw.captured + done.reissued)
            receipt = self._store.apply([batch], Lane.ROUTINE)
            assert receipt.counts.dead == 0
            assert receipt.counts.captured == raw.captured + done.reissued
        self.read, self.at = self.read + count, raw.end

    def whose(self) -> dict:
        return {
            (table, key): (patient, visit)
            for table in CANONICAL.values()
            for key, patient, visit in self._eye.execute(
                f"SELECT record_id, patient_id, visit_no FROM consult.{table} WHERE NOT deleted"
            )
        }

    def one(self, query: str) -> tuple:
        return self._eye.execute(query).fetchone()

    def close(self) -> None:
        self._store.close()
        self._eye.close()


@pytest.fixture
def link(database, sealer):
    with psycopg.connect(database, autocommit=True):
        link = Link(database, sealer)
        first = [[insert("MS_BRDA", BRID=99, MZHM="M99")]]
        link.take(first, 1)  # Makes the store's schema.
        link.read, link.at = 0, START
        link._eye.execute("TRUNCATE consult.patient, sync.progress")
        link.restart()
    yield link
    link.close()


@pytest.mark.parametrize("seed", range(8))
def test_histories_end_as_joins_say(link, seed):
    draw = random.Random(seed)
    log = hospital(draw)
    while link.read < len(log):
        link.take(log, min(draw.randint(1, 5), len(log) - link.read))
        if draw.random() < 0.3:
            link.restart()
    assert link.whose() == truth(log)


def test_who_is_issued_again_keeps_the_rest_of_its_row(link):
    patient = insert("MS_BRDA", BRID=5, MZHM="M5")
    result = insert("JYJG", JYXH=7, BRID=5, XMDM="GLU", JG="95", DW="mg/dL", TS="正常")
    link.take([[patient, result]], 1)
    link.restart()
    link.read, log = 0, [[update(patient, MZHM="M55")]]
    raw = raw_changes("his", log, 9, link.at)
    done = link.harmoniser.apply(raw)
    link._store.apply(
        [batch_of(done.tables, link.at, Position(9, SEQ_END), captured=2)], Lane.ROUTINE
    )
    assert link.one(
        "SELECT patient_id, item_code, value::text, unit, raw_value, flag, src_lsn, digest IS NULL"
        " FROM consult.lab_result"
    ) == ("M55", "14749-6", "5.2725", "mmol/L", "95", "N", 9, False)
