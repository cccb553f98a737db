"""What it costs that clients may edit: the sync's own writes, an edit, its way to another store."""

import itertools
import pathlib
import time
from collections.abc import Callable

import pytest

from runners.embedded.postgres import PostgresServer
from schemas.batches import Lane, Op
from schemas.positions import SEQ_END, START, Position
from tests.benchmarks.test_deliver import SETTINGS, cpu_s
from tests.canonical import COMMIT_US, rows_of
from tests.deliveries import LINK, batch_of
from tests.edited_stores import PLAN, EditedStore
from transforms.deliver.store import Store

ROWS, BATCHES, EDITS, LAPS, SET = 10_000, 4, 2_000, 4, 5_000
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PostgresServer(tmp_path_factory.mktemp("edits") / "store", settings=SETTINGS) as made:
        yield made


@pytest.mark.parametrize("op", [Op.INSERT, Op.UPDATE], ids=["insert", "update"])
@pytest.mark.parametrize("trigger", [False, True], ids=["without trigger", "with trigger"])
def test_rows_of_a_source(benchmark, server, op, trigger):
    """Patients, whom nobody has edited, by 10,000 rows a transaction."""
    store = Store(
        server.create_database(f"source_{next(_numbers)}"), LINK, "main", None, lambda: COMMIT_US
    )
    store.apply([batch_of({}, START, Position(1, SEQ_END))], Lane.ROUTINE)
    if not trigger:
        store._conn.execute("DROP TRIGGER campus_sync_edit ON consult.patient")
    batches = []
    for lsn, kind in ((2, Op.INSERT), (100, op)) if op is Op.UPDATE else ((2, op),):
        for i in range(BATCHES):
            rows = rows_of(
                "patient",
                [
                    {"record_id": str(i * ROWS + n), "name": "某某", "phone": "13800000000",
                     "_op": kind, "_lsn": lsn + i, "_seq": n + 1}
                    for n in range(ROWS)
                ],
            )  # fmt: skip
            begin = batches[-1].end if batches else Position(1, SEQ_END)
            batches.append(batch_of({"patient": rows}, begin))
    for batch in batches[:-BATCHES]:
        store.apply([batch], Lane.ROUTINE)
    left, pid = iter(batches[-BATCHES:]), store._conn.info.backend_pid
    before_s = cpu_s(pid)
    benchmark.pedantic(
        lambda batch: store.apply([batch], Lane.ROUTINE),
        setup=lambda: ((next(left),), {}),
        rounds=BATCHES,
    )
    used_s = cpu_s(pid) - before_s
    benchmark.extra_info["backend_cpu_s_per_million_rows"] = round(
        used_s / (ROWS * BATCHES) * 1e6, 2
    )
    store.close()


@pytest.mark.parametrize("what", ["create", "change"])
def test_edits_on_their_way(benchmark, server, what):
    """A client's edits one by one, taken in, pulled by another store and asked back by the first.

    `_us`: CPU microseconds an edit, of backends and of Python; the least of the rounds.
    """
    a = EditedStore("primary", server.create_database(f"edits_{next(_numbers)}"))
    b = EditedStore("main", server.create_database(f"edits_{next(_numbers)}"))
    client, *own = (conn.info.backend_pid for conn in (a.client, a.own, b.own))
    steps = {"fold": a.fold, "pull": lambda: b.pull(a), "echo": lambda: a.pull(b)}
    spent: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object], pids: list[int]) -> None:
        before_s, began_s = sum(map(_cpu_s, pids)), time.process_time()
        work()
        used_s = sum(map(_cpu_s, pids)) - before_s
        if pids is own:
            used_s += time.process_time() - began_s
        spent.setdefault(f"{name}_us", []).append(used_s / EDITS * 1e6)

    def lap(first: int) -> None:
        numbers = range(first, first + EDITS)
        edits = {
            "create": lambda: [a.insert(f"r{i}", title="t", content="文" * 80) for i in numbers],
            "change": lambda: [a.update(f"r{i}", content=f"{i}" + "字" * 80) for i in numbers],
        }
        for name, edit in edits.items():
            if name == what:
                note("edit", edit, [client])
            else:
                edit()
            for step, work in steps.items():
                if name == what:
                    note(step, work, own)
                else:
                    work()

    laps = iter(range(0, LAPS * EDITS, EDITS))
    benchmark.pedantic(lap, setup=lambda: ((next(laps),), {}), rounds=LAPS)
    found = {name: round(min(values)) for name, values in spent.items()}
    benchmark.extra_info |= found | {"all_us": sum(found.values())}
    assert b.row("r7", "title") == ("t",)
    assert b.own.execute(f"SELECT count(*) FROM consult.{PLAN}").fetchone() == (LAPS * EDITS,)
    a.close()
    b.close()


@pytest.mark.parametrize("what", ["create", "change"])
def test_sets_of_edits_beside_a_single_writer(benchmark, server, what):
    """Documents of a source by 5,000 a transaction, and plans that clients write, in one run.

    `of_single_writer`: the pull's rate by that of a source's rows of the same length.
    """
    single_s = _single_writer(server, Op.INSERT if what == "create" else Op.UPDATE)
    a = EditedStore("primary", server.create_database(f"sets_{next(_numbers)}"))
    b = EditedStore("main", server.create_database(f"sets_{next(_numbers)}"))
    create = (
        f"INSERT INTO consult.{PLAN} (campus, record_id, title, content, participants)"
        f" SELECT 'main', 'r' || i, 't', repeat('文', 80), 'A' FROM generate_series(1, {SET}) i"
    )
    change = f"UPDATE consult.{PLAN} SET content = 'x' || content"
    for statement in (create, change)[: 1 if what == "create" else 2]:
        a.fold()
        b.pull(a)
        edit = _seconds(lambda statement=statement: a.client.execute(statement))
    fold = _seconds(a.fold)
    benchmark.pedantic(lambda: b.pull(a), rounds=1)
    pull = benchmark.stats.stats.mean
    for name, seconds in (("edit", edit), ("fold", fold), ("pull", pull)):
        benchmark.extra_info[f"{name}_per_s"] = round(SET / seconds)
    benchmark.extra_info["single_writer_per_s"] = round(SET / single_s)
    benchmark.extra_info["of_single_writer"] = round(single_s / pull, 3)
    assert a.digest() == b.digest()
    a.close()
    b.close()


def _single_writer(server, op: Op) -> float:
    """Returns how long as many rows of a source take as one set of edits has."""
    store = Store(
        server.create_database(f"single_{next(_numbers)}"), LINK, "main", None, lambda: COMMIT_US
    )
    store.apply([batch_of({}, START, Position(1, SEQ_END))], Lane.ROUTINE)
    end, found = Position(1, SEQ_END), 0.0
    for lsn, kind in ((10, Op.INSERT), (20, op)):
        rows = rows_of(
            "emr_document",
            [
                {"record_id": f"{lsn if kind is Op.INSERT else 10}d{n}", "title": "t",
                 "content": f"{lsn}" + "文" * 80, "_op": kind, "_lsn": lsn, "_seq": n + 1}
                for n in range(SET)
            ],
        )  # fmt: skip
        batch = batch_of({"emr_document": rows}, end)
        end = batch.end
        found = _seconds(lambda batch=batch: store.apply([batch], Lane.ROUTINE))
    store.close()
    return found


def _cpu_s(pid: int) -> float:
    """As `cpu_s`, finer."""
    return int(pathlib.Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _seconds(work) -> float:
    timed = _Timed()
    timed.pedantic(work, rounds=1)
    return timed.seconds


class _Timed:
    def pedantic(self, work, rounds: int) -> None:
        began = time.perf_counter()
        work()
        self.seconds = time.perf_counter() - began
