"""What the log says of a store that refuses batches, which are sent again and again."""

import dataclasses
import logging

import numpy as np
import psycopg
import pytest

from schemas.batches import ChangeBatch, Lane
from schemas.errors import StoreUnavailable
from schemas.links import LinkSettings, SetSettings
from schemas.positions import SEQ_END, START, Position
from schemas.receipts import Counts, Receipt
from schemas.wire import seal
from tests.canonical import rows_of
from transforms.deliver import ledger
from transforms.deliver.deliver import DeliverEmergency
from transforms.deliver.sets.write_sets import SetsWait, SetWriter

LINK = "main>primary"
BATCH = seal(ChangeBatch(LINK, Lane.EMERGENCY, START, Position(1, SEQ_END), 0, 11, 10, 12, {}))


class Refusing:
    """A store that answers what it is told to: an error, or whether something was applied."""

    def apply(self, batches, lane):
        if isinstance(self.answer, StoreUnavailable):
            raise self.answer
        none = np.empty(0, np.int64)
        return Receipt(LINK, lane, batches[0].end, self.answer, Counts(), 0, 0, none, none)


class Full:
    """A store that answers, and takes no incident."""

    def lacking_sets(self, *_):
        raise SetsWait("sets wait")

    def do(self, work):
        raise StoreUnavailable("full")


@pytest.fixture
def said(caplog):
    """Returns what the log says after batches that were answered so."""
    fn = DeliverEmergency(LinkSettings(LINK, "main", "primary", *[""] * 7))._fn
    fn._store = Refusing()

    def said(*answers) -> list[str]:
        caplog.clear()
        for fn._store.answer in answers:
            list(fn.process(BATCH))
        return [record.getMessage().rpartition(": ")[2] for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        yield said


def test_a_refusal_is_told_once_until_it_changes_or_the_link_goes_on(said):
    full, down = StoreUnavailable("full"), StoreUnavailable("down")
    assert said(True, True) == []
    assert said(*[full] * 300) == ["full"]
    assert said(down, down, full) == ["down", "full"]
    assert said(False, full) == []  # A batch whose turn has not come: nothing was applied.
    assert said(True, True, full) == ["goes on", "full"]


def test_a_store_that_cannot_be_told_that_sets_wait_is_logged_once(caplog):
    sets = SetSettings((("prescription",),), False, 5.0, "host=a", (("primary", "host=a"),))
    settings = LinkSettings(LINK, "main", "primary", *[""] * 7, sets=sets)
    writer = SetWriter(settings, Lane.EMERGENCY)
    batch = dataclasses.replace(BATCH, tables={"prescription": rows_of("prescription", [{}])})
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            with pytest.raises(SetsWait):
                writer.bring(Full(), [batch])
    assert [record.getMessage() for record in caplog.records] == [f"link {LINK}: full"]


def test_a_full_disk_is_told_with_the_remedy():
    told = str(ledger.unavailable("store of main>primary at a:1", psycopg.errors.DiskFull("row")))
    assert told == "store of main>primary at a:1: its disk is full (53100). Remedy: make room."
