"""The shared log's ring and pen, and stretches that are cut where another reading ended."""

import itertools
import random

import pytest

from schemas.batches import RawChanges
from schemas.links import LinkSettings
from schemas.mappings import PACKAGED, load_mapping
from schemas.positions import SEQ_END, Position
from tests.raw_changes import COMMIT_US, hospital_batch
from transforms.capture import shared_log as module
from transforms.capture.interpret import Interpreted, Interpreter
from transforms.capture.shared_log import SharedLog, Stretch
from transforms.escalations import Escalations

MAPPING = str(PACKAGED / "postgresql_his.yaml")
RULES = str(PACKAGED.parent / "rules" / "default.yaml")


def at(lsn: int) -> Position:
    return Position(lsn, SEQ_END)


def stretch(begin: int, end: int) -> Stretch:
    return Stretch(Interpreted(at(begin), at(end), 0, 0, {}, {}, Escalations(), ()), 0)


def ends(found: list[Stretch] | None) -> list[int] | None:
    return None if found is None else [one.interpreted.end.lsn for one in found]


def written(*lsns: int) -> SharedLog:
    log = SharedLog()
    assert log.take_pen("a", at(lsns[0]))
    for begin, end in itertools.pairwise(lsns):
        log.write("a", stretch(begin, end))
    return log


def test_followers_join_anywhere_in_it_and_miss_nothing():
    log = written(10, 20, 30, 40)
    assert ends(log.follow("b", at(10), 0)) == [20, 30, 40]
    assert ends(log.follow("b", at(25), 0)) == [30, 40]
    assert ends(log.follow("b", at(30), 0)) == [40]
    assert ends(log.follow("b", at(40), 0)) == []
    assert log.follow("b", at(41), 0) is None
    assert log.follow("b", at(9), 0) is None


def test_there_is_one_pen():
    log = written(10, 20)
    assert not log.take_pen("b", at(20))
    assert log.take_pen("a", at(20))
    log.write("b", stretch(20, 30))
    assert ends(log.follow("c", at(20), 0)) == []
    with pytest.raises(ValueError, match="behind"):
        log.write("a", stretch(21, 30))


def test_without_a_writer_nobody_follows():
    log = written(10, 20)
    log.leave("a")
    assert not log.covers(at(20))
    assert log.follow("b", at(10), 0) is None
    assert log.take_pen("b", at(20))
    assert ends(log.follow("c", at(10), 0)) == [20]


def test_a_writer_from_elsewhere_begins_a_new_log():
    log = written(10, 20)
    log.leave("a")
    assert log.take_pen("b", at(50))
    assert not log.covers(at(20))
    assert log.covers(at(50))


def test_what_followers_have_still_to_take_is_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(module, "_TAIL_BYTES", 25)
    monkeypatch.setattr(module, "_MAX_BYTES", 45)
    monkeypatch.setattr(Interpreted, "nbytes", 10)
    log = written(0, 1, 2, 3, 4)
    assert log.covers(at(2)) and not log.covers(at(1))
    assert ends(log.follow("slow", at(2), 0)) == [3, 4]
    for begin in range(4, 6):
        log.write("a", stretch(begin, begin + 1))
    assert ends(log.follow("slow", at(2), 0)) == [3, 4, 5, 6]
    for begin in range(6, 9):
        log.write("a", stretch(begin, begin + 1))
    assert log.follow("slow", at(2), 0) is None
    log.write("a", stretch(9, 10))
    assert not log.covers(at(7)) and log.covers(at(8))


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_stretch_and_what_was_before_make_the_whole(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    rows = [
        {"_lsn": lsn, "_seq": seq, "pid": f"{lsn}{seq}", "mrn": f"P{seq}", "name": "某"}
        for lsn in (5, 6, 7)
        for seq in range(1, chance.randint(2, 5))
    ]
    bad = chance.randrange(len(rows))
    rows[bad]["birth_date"] = "no date"
    raw = RawChanges(
        at(4), at(7), len(rows), COMMIT_US, {"his.patient": hospital_batch("his.patient", rows)},
        truncates=(("his.vital_sign", Position(6, 1)),),
    )  # fmt: skip
    settings = LinkSettings(
        name="main>primary", source="main", store="primary", source_dsn="", store_dsn="",
        slot="s", publication="p", mapping=MAPPING, rules=RULES, key_ref="",
    )  # fmt: skip
    whole = Interpreter(settings, load_mapping(MAPPING), Escalations()).interpret(raw, at(4))
    assert whole.captured == len(rows) + 1
    assert len(whole.rejects) == 1
    place = Position(chance.choice((5, 6, 7)), chance.choice((1, 2, SEQ_END)))
    rest = whole.beyond(place)
    assert rest.begin == place
    places = [Position(row["_lsn"], row["_seq"]) for row in rows]
    after = [p for p in places if p > place]
    left = [row for rows in rest.tables.values() for row in rows.to_pylist()]
    found = [(row["_lsn"], row["_seq"]) for row in left]
    assert found == [p for i, p in enumerate(places) if p > place and i != bad]
    assert [r.position for r in rest.rejects] == [p for p in (places[bad],) if p > place]
    assert rest.captured == len(after) + (Position(6, 1) > place)
    assert whole.beyond(at(4)) is whole
