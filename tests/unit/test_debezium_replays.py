"""Connectors that are killed at any place: nothing is lost, and no older row wins again."""

import itertools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, START, Position
from tests.debezium_events import COMMIT_MS, Topic, field
from transforms.capture.debezium.decoder import DebeziumDecoder
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import Source
from transforms.capture.debezium.replays import Replays, place_of

TABLE = "his.t"
FIELDS = {TABLE: [field("id", "int32"), field("v", "int32")]}
SPECS = {TABLE: TableSpec(("id",))}
# Connectors whose events can all be told apart, and those where events of the last transaction
# cannot.
EXACT, IN_ORDER = ("postgresql", "oracle", "sqlserver"), ("mysql", "mariadb")


def place(connector: str, number: int, step: int, chance: random.Random) -> dict:
    """Returns the source fields of a change, as each connector numbers them."""
    ms = {"ts_ms": COMMIT_MS + number * 10}
    if connector == "postgresql":
        # Transactions overlap in the log; two steps share an LSN, as rows of one COPY do.
        return ms | {"txId": 700 + number, "lsn": 10_000 + number * 7 + step // 2 * 20}
    if connector == "mariadb":
        return ms | {"gtid": f"0-7-{number + 1}", "pos": 4 + number * 1000, "row": 0}
    if connector == "mysql":
        return ms | {"file": f"b.{number // 5 + 1:06}", "pos": (number % 5) * 1000 + step * 50 + 4}
    if connector == "oracle":
        thread = 1 + number % 2
        commit = 2_000_000 + number - 30 * thread  # The second node's are lower throughout.
        found = {"txId": f"0a00{number:04x}", "redo_thread": thread, "commit_scn": str(commit)}
        return ms | found | {"txSeq": step + 1, "scn": str(commit - 5), "ssn": 0}
    serial = {"event_serial_no": 1 + step % 2}
    change = f"00000027:{chance.randrange(16**4):08x}:{step:04x}"
    return ms | serial | {"commit_lsn": f"00000027:{number:08x}:0005", "change_lsn": change}


class Story:
    """A source's transactions, and a connector that sends them and is killed now and then."""

    def __init__(self, connector: str, seed: int, boundaries: bool):
        chance = random.Random(seed)
        self.topic = Topic(connector, FIELDS, {TABLE: ("id",)}, schemas=False)
        version = itertools.count(1)
        self.log = []  # (transaction, step, op, id, version, source)
        self.sizes = []
        for number in range(chance.randrange(1, 9)):
            ids = [chance.randrange(4) for _ in range(chance.randrange(1, 6))]
            if connector == "postgresql":  # Two rows at one LSN are two rows.
                ids = [2 * identity + step % 2 for step, identity in enumerate(ids)]
            self.sizes.append(len(ids))
            for step, identity in enumerate(ids):
                source = place(connector, number, step, chance)
                self.log.append((number, step, identity, next(version), source))
        self._send(chance, boundaries)

    def _send(self, chance: random.Random, boundaries: bool) -> None:
        at, kills = 0, chance.randrange(0, 5)
        counted, open_ = 0, None
        while at < len(self.log):
            number, step, identity, version, source = self.log[at]
            name = source.get("gtid", str(number))
            if boundaries and (step == 0 or open_ != number):
                self.topic.boundary("BEGIN", name)
                counted, open_ = 0, number
            counted += 1
            row = {"id": identity, "v": version}
            self.topic.change("u", TABLE, row | {"v": version - 1}, row, source)
            if boundaries and step == self.sizes[number] - 1:
                self.topic.boundary("END", name, {TABLE: counted})
                open_ = None
            at += 1
            if kills and chance.random() < 0.25:
                kills -= 1
                # From an offset that this incarnation has passed, or that somebody put back.
                at, open_ = chance.randrange(0, at + 1), None

    @property
    def final(self) -> dict[str, str]:
        return {str(identity): str(version) for _, _, identity, version, _ in self.log}


def rows_of(batches: list[RawChanges]) -> list[tuple]:
    rows = [
        (row["_lsn"], row["_seq"], row["id"], row["v"])
        for raw in batches
        for table in raw.tables.values()
        for row in table.to_pylist()
    ]
    return sorted(rows)


def decode(records, batch_rows=1000, start=START, before=(), chunk=7) -> list[RawChanges]:
    decoder = DebeziumDecoder(batch_rows, 1 << 20, start, SPECS)
    decoder.remember(before)
    batches = []
    for at in range(0, len(records), chunk):
        batches += decoder.feed(records[at : at + chunk])
    batches += decoder.flush()
    batches += decoder.flush(whole=False)
    end = start
    for raw in batches:
        assert raw.begin == end < raw.end
        assert raw.captured == sum(b.num_rows for b in raw.tables.values())
        end = raw.end
    return batches


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.integers(0, 2**32), st.booleans(), st.integers(2, 9), st.integers(1, 9))
@pytest.mark.parametrize("connector", EXACT)
def test_what_can_be_told_apart_comes_once_and_in_order(connector, seed, boundaries, rows, chunk):
    story = Story(connector, seed, boundaries)
    batches = decode(story.topic.records, rows, chunk=chunk)
    versions = [int(version) for *_, version in rows_of(batches)]
    assert versions == [version for _, _, _, version, _ in story.log]
    assert not any(raw.rejects for raw in batches)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.integers(0, 2**32), st.integers(1, 9))
@hypothesis.example(344, 1)  # Gone back before a transaction of which a part had come.
@pytest.mark.parametrize("connector", IN_ORDER)
def test_what_cannot_be_told_apart_ends_in_its_own_transaction(connector, seed, chunk):
    """A store that applies batch by batch never goes back, and ends as the source did."""
    story = Story(connector, seed, boundaries=True)
    state: dict[str, str] = {}
    decoder = DebeziumDecoder(1000, 1 << 20, START, SPECS)
    records = story.topic.records
    for at in range(0, len(records), chunk):
        batches = decoder.feed(records[at : at + chunk]) + decoder.flush()
        if at + chunk >= len(records):
            batches += decoder.flush(whole=False)
        for raw in batches:
            assert not raw.rejects
            last = {identity: version for *_, identity, version in rows_of([raw])}
            for identity, version in last.items():
                assert int(state.get(identity, 0)) <= int(version)
            state |= last
    assert state == story.final


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(0, 2**32), st.booleans(), st.integers(2, 9), st.integers(1, 9))
@pytest.mark.parametrize("connector", EXACT + IN_ORDER)
def test_a_restart_from_any_position_gives_the_same_rows(connector, seed, boundaries, rows, chunk):
    records = Story(connector, seed, boundaries).topic.records
    whole = rows_of(decode(records, 1000))
    for raw in decode(records, rows, chunk=chunk):
        at = raw.end.lsn
        again = decode(records[at:], rows, raw.end, records[:at])
        assert rows_of(again) == [row for row in whole if row[:2] > raw.end]


def test_where_a_batch_is_cut_does_not_depend_on_the_feeding():
    records = Story("postgresql", 5, True).topic.records
    cuts = {
        chunk: [(raw.begin, raw.end, raw.captured) for raw in decode(records, 4, chunk=chunk)]
        for chunk in (1, 2, 5, 1000)
    }
    assert len({tuple(cut) for cut in cuts.values()}) == 1


def test_a_log_that_goes_back_is_taken_as_it_comes():
    """After a failover that lost the end of the log, what follows is new, whatever its number."""
    replays = Replays()
    places = [place_of(Source("oracle", txId=f"t{n}", commit_scn=n, txSeq=1)) for n in (5, 6, 3, 4)]
    assert [replays.seen(each, ("u", "t", b"1")) for each in places] == [False] * 4
    assert replays.rewinds == 1


def test_a_replay_beyond_memory_is_taken_from_its_beginning():
    """Not half of it: the newest of the replay must win again."""
    replays = Replays(transactions=2)
    numbers = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7]
    taken = []
    for n in numbers:
        here = place_of(Source("sqlserver", commit_lsn=f"{n:08}", change_lsn="1"))
        if not replays.seen(here, ("u", "t", b"1")):
            taken.append(n)
    assert taken == numbers
    assert replays.rewinds == 1


def test_a_number_that_comes_again_with_another_time_is_another_transaction():
    """PostgreSQL's new primary after a failover goes on from an older number."""
    replays = Replays()
    for us in (1, 2):
        here = place_of(Source("postgresql", txId=700, lsn=9, ts_us=us))
        assert not replays.seen(here, ("u", "t", b"1"))


def test_a_transaction_on_another_server_is_the_same():
    """MySQL's replica has it at another place of its own log, under the same GTID."""
    replays = Replays()
    uuid = "3e11fa47-71ca-11e1-9e33-c80aa9429562"
    for server, gtid, known in ((1, 1, False), (1, 2, False), (2, 1, True), (2, 3, False)):
        source = Source("mysql", gtid=f"{uuid}:{gtid}", file="a.1", pos=9 - gtid, server_id=server)
        assert replays.seen(place_of(source), ("u", "t", b"1")) is known


def test_events_without_a_place_are_never_known():
    for connector in ("postgresql", "mysql", "oracle", "sqlserver", "db2", None):
        assert place_of(Source(connector)) is None


def test_a_whole_snapshot_begins_anew_and_an_incremental_one_does_not():
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)}, schemas=False)
    change = {"txId": 700, "lsn": 5}
    topic.change("u", TABLE, None, {"id": 1, "v": 1}, change)
    topic.change("r", TABLE, None, {"id": 1, "v": 2}, {"snapshot": "incremental"})
    topic.change("u", TABLE, None, {"id": 1, "v": 1}, change)
    topic.change("r", TABLE, None, {"id": 1, "v": 3}, {"snapshot": "first"})
    topic.change("u", TABLE, None, {"id": 1, "v": 4}, change)
    rows = rows_of(decode(topic.records))
    assert [int(version) for *_, version in rows] == [1, 2, 3, 4]


def test_the_rows_of_one_copy_at_one_place_are_all_taken():
    """Trap 4, and the connector's restart behind the third of five."""
    topic = Topic("postgresql", FIELDS, {TABLE: ("id",)}, schemas=False)
    for i in [0, 1, 2, 3, 4, 3, 4]:
        topic.change("c", TABLE, None, {"id": i, "v": i}, {"txId": 700, "lsn": 5})
    (raw,) = decode(topic.records)
    assert raw.tables[TABLE]["id"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert set(raw.tables[TABLE]["_op"].to_pylist()) == {Op.INSERT}
    assert raw.end == Position(7, SEQ_END)
