"""What judging quality costs deliveries: within their transactions, and beside them as `run` does.

Rounds of the three ways take turns, so that a busy machine is unkind to all of them alike.
"""

import itertools
import multiprocessing
import statistics
import threading
import time

import pytest

from runners.embedded.postgres import PostgresServer
from runners.upkeep import Judge, Repeated
from schemas.batches import ChangeBatch, Lane
from schemas.config import Config
from schemas.positions import SEQ_END, START, Position
from schemas.quality_rules import load_quality_rules
from tests.benchmarks.test_deliver import SETTINGS
from tests.canonical import COMMIT_US
from tests.deliveries import LINK, batch_of, lab_results
from transforms.check_quality import QualityChecker
from transforms.deliver import delivery
from transforms.deliver.judging import check_store
from transforms.deliver.store import Store

RULES = load_quality_rules()
ROUNDS = 3
EVERY_S = 1.0  # Five times as often as by default: the rounds are short.
WAYS = ("none", "inside", "beside")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = SETTINGS | {"autovacuum": "on"}
    with PostgresServer(tmp_path_factory.mktemp("beside") / "store", settings=settings) as made:
        yield made


def log(rows: int, count: int) -> list[ChangeBatch]:
    batches, begin = [], Position(1, SEQ_END)
    for i in range(count):
        results = lab_results(i * rows, rows, begin.lsn + 1)
        batches.append(batch_of({"lab_result": results}, begin))
        begin = batches[-1].end
    return batches


def judge_beside(dsn: str, ready, stopping) -> None:
    """What `runners.upkeep` does of one store, in a process of its own."""
    source = {"kind": "postgresql", "mapping": "none", "dsn": "postgresql://none@none/none"}
    content = {"sources": {"main": source}, "stores": {"primary": {"dsn": dsn}}}
    content |= {"version": 1, "dead_letter_key": "file:none"}
    judge = Judge(Config.model_validate(content), "primary", RULES)

    def work() -> str:
        wrong = judge()
        ready.set()
        return wrong

    with Repeated("quality", work, EVERY_S, threading.Lock()):
        stopping.wait()


def rows_per_s(dsn: str, batches: list[ChangeBatch], way: str, monkeypatch) -> float:
    store = Store(dsn, LINK, "main", None, lambda: COMMIT_US)
    store.apply([batch_of({}, START, Position(1, SEQ_END))], Lane.ROUTINE)
    ready, stopping = multiprocessing.Event(), multiprocessing.Event()
    judge = multiprocessing.Process(target=judge_beside, args=(dsn, ready, stopping))
    if way == "beside":
        judge.start()
        assert ready.wait(60)
    with monkeypatch.context() as changed:
        if way == "inside":
            changed.setattr(delivery.Delivery, "finish", _judging(QualityChecker(RULES, "main")))
        began = time.perf_counter()
        for batch in batches:
            store.apply([batch], Lane.ROUTINE)
        took_s = time.perf_counter() - began
    stopping.set()
    if way == "beside":
        judge.join()
    store.close()
    return sum(batch.captured for batch in batches) / took_s


def _judging(checker: QualityChecker):
    finish = delivery.Delivery.finish

    def judged(self, sealer) -> None:
        for batch in self._batches:
            check_store.put_alarms(self._conn, checker.check(batch.tables, COMMIT_US))
        finish(self, sealer)

    return judged


@pytest.mark.parametrize(("rows", "count"), [(200, 1500), (20_000, 25)])
def test_deliveries_with_and_without(benchmark, server, rows, count, monkeypatch):
    batches = log(rows, count)
    QualityChecker(RULES, "main").check(batches[0].tables, COMMIT_US)  # Compiles.
    numbers, found = itertools.count(), {way: [] for way in WAYS}

    def round_of_all() -> None:
        for way in WAYS:
            dsn = server.create_database(f"beside_{rows}_{next(numbers)}")
            found[way].append(rows_per_s(dsn, batches, way, monkeypatch))

    benchmark.pedantic(round_of_all, rounds=ROUNDS)
    medians = {way: statistics.median(speeds) for way, speeds in found.items()}
    for way, speed in medians.items():
        benchmark.extra_info[f"{way}_rows_per_s"] = round(speed)
        benchmark.extra_info[f"{way}_ratio"] = round(speed / medians["none"], 3)
