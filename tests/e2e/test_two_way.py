"""Two hundred records changed at both sides while cut off: beside PostgreSQL's own replication.

`python -m pytest tests/e2e/test_two_way.py -s` prints diverged, lost, and seconds to heal.
"""

import time

import psycopg
import pytest

from runners.embedded.postgres import PostgresServer
from runners.exchange import Exchange
from tests.edited_stores import HOUR_US, PLAN, EditedStore, agree, config_of, settle
from tests.faults.harness import until
from tests.fixtures_postgres import TEST_SETTINGS

ROWS = 200
UPDATED, DELETED = 100, 50  # At both sides; at one side, then at the other. The rest likewise.


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_way")
    with (
        PostgresServer(folder / "a", settings=TEST_SETTINGS, durable=False) as a,
        PostgresServer(folder / "b", settings=TEST_SETTINGS, durable=False) as b,
    ):
        yield a, b


def change(side: int, update, delete) -> None:
    """What one side does to all records while it is cut off."""
    for i in range(ROWS):
        gone = UPDATED <= i < UPDATED + DELETED if side else i >= UPDATED + DELETED
        delete(f"r{i}") if gone else update(f"r{i}", f"from {side}")


@pytest.mark.parametrize("first", [0, 1], ids=["a heals first", "b heals first"])
def test_beside_native_two_way_replication(servers, tmp_path, first):
    native = _native(servers, first)
    ours = _ours(servers, tmp_path, first)
    print(f"\n{ROWS} records, both sides changed while cut off  diverged  lost  seconds to heal")
    for name, (diverged, lost, seconds) in (
        ("PostgreSQL, origin = none", native),
        ("campus-sync, clocks an hour wrong", ours),
    ):
        print(f"  {name:48}  {diverged:8}  {lost:4}  {seconds:8.1f}")
    assert ours[:2] == (0, 0)
    assert native[0] == UPDATED and native[1] == ROWS - UPDATED  # Why there is an exchange at all.


def _ours(servers, folder, first: int) -> tuple[int, int, float]:
    names, skews = ("primary", "main"), (HOUR_US, -HOUR_US)
    dsns = {
        name: server.create_database(f"consult_{first}")
        for name, server in zip(names, servers, strict=True)
    }
    stores = [EditedStore(name, dsns[name], skew) for name, skew in zip(names, skews, strict=True)]
    for i in range(ROWS):
        stores[0].insert(f"r{i}", title="t", content="before")
    settle(stores)
    for side, store in enumerate(stores):
        store.pullers.clear()
        store.as_(f"D{side}", "attending")
        change(side, lambda r, text, s=store: s.update(r, content=text), store.delete)
    began = time.monotonic()
    config = config_of(folder, dsns)
    order = list(zip(names, names[::-1], strict=True))[:: 1 if first == 0 else -1]
    with Exchange(config, pairs=order[:1]):
        until(lambda: _moved(stores[first]), 60, "the first side learns")
        with Exchange(config, pairs=order[1:]):
            until(lambda: agree(stores), 60, "agreement")
    seconds = time.monotonic() - began
    diverged = lost = 0
    for i in range(ROWS):
        seen = {store.row(f"r{i}", "content") for store in stores}
        diverged += len(seen) > 1
        wanted = {"from 0", "from 1"} if i < UPDATED else {f"from {int(i >= UPDATED + DELETED)}"}
        for store in stores:
            lost += bool(wanted - _readable(store, f"r{i}"))
    # A deletion against a change that it did not know of, and equals whose clocks lie: a person.
    assert stores[0].open_conflicts() == stores[1].open_conflicts() == ROWS
    for store in stores:
        store.close()
    return diverged, lost, seconds


def _moved(store: EditedStore) -> bool:
    query = "SELECT coalesce(sum(learned), 0) >= 200 FROM sync.exchange"
    return store.own.execute(query).fetchone()[0]


def _readable(store: EditedStore, record_id: str) -> set[str]:
    rows = store.own.execute(
        "SELECT edit #>> '{wrote,plan,values,content}' FROM sync.version WHERE record_id = %s"
        " AND edit -> 'wrote' ? 'plan'",
        (record_id,),
    )
    return {text for (text,) in rows}


def _native(servers, first: int) -> tuple[int, int, float]:
    name = f"native_{first}"
    dsns = [server.create_database(name) for server in servers]
    conns = [psycopg.connect(dsn, autocommit=True) for dsn in dsns]
    for conn in conns:
        conn.execute(f"CREATE TABLE {PLAN} (record_id text PRIMARY KEY, content text)")
        conn.execute(f"CREATE PUBLICATION two_way FOR TABLE {PLAN}")
        conn.execute(
            f"INSERT INTO {PLAN} SELECT 'r' || i, 'before' FROM generate_series(0, {ROWS - 1}) i"
        )
    for side, conn in enumerate(conns):
        conn.execute(
            f"CREATE SUBSCRIPTION {name}_{side} CONNECTION '{dsns[1 - side]}' PUBLICATION two_way"
            " WITH (origin = none, copy_data = false)"
        )
        conn.execute(f"ALTER SUBSCRIPTION {name}_{side} DISABLE")
    for side, conn in enumerate(conns):
        update = lambda r, text, c=conn: c.execute(  # noqa: E731
            f"UPDATE {PLAN} SET content = %s WHERE record_id = %s", (text, r)
        )
        delete = lambda r, c=conn: c.execute(  # noqa: E731
            f"DELETE FROM {PLAN} WHERE record_id = %s", (r,)
        )
        change(side, update, delete)
        conn.execute(f"INSERT INTO {PLAN} VALUES ('marker {side}', '')")
    began = time.monotonic()
    for side in (first, 1 - first):
        conns[side].execute(f"ALTER SUBSCRIPTION {name}_{side} ENABLE")
        marker = f"SELECT FROM {PLAN} WHERE record_id = 'marker {1 - side}'"
        until(lambda c=conns[side], m=marker: c.execute(m).rowcount, 60, "the marker")
    seconds = time.monotonic() - began
    found = [
        dict(conn.execute(f"SELECT * FROM {PLAN} WHERE record_id ^@ 'r'").fetchall())
        for conn in conns
    ]
    diverged = sum(found[0].get(f"r{i}") != found[1].get(f"r{i}") for i in range(ROWS))
    # An update that stands nowhere any more, and that nobody was told of.
    lost = sum(f"r{i}" not in found[0] and f"r{i}" not in found[1] for i in range(UPDATED, ROWS))
    for side, conn in enumerate(conns):
        conn.execute(f"DROP SUBSCRIPTION {name}_{side}")
    for conn in conns:
        conn.close()
    return diverged, lost, seconds
