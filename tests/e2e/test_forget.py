"""Deleted content is forgotten when it is old and every store, without exception, knows."""

import pytest

from pipelines.forget import forget_deleted
from runners.upkeep import Rules, Upkeep
from schemas.errors import CampusSyncError
from schemas.siblings import ROW
from tests.edited_stores import PLAN, RULES, EditedStore, agree, config_of, settle
from tests.faults.harness import until
from tests.store_rows import StoreRows

DAY_US = 86_400_000_000
_numbers = iter(range(1_000))


@pytest.fixture
def stores(postgres_server):
    number = next(_numbers)
    made = [
        EditedStore(name, postgres_server.create_database(f"forget_{number}_{name}"))
        for name in ("primary", "main", "east")
    ]
    yield made
    for store in made:
        store.close()


@pytest.fixture
def config(stores, tmp_path):
    return config_of(tmp_path, {store.name: store.dsn for store in stores})


def later(stores, days: float) -> None:
    for store in stores:
        store.own.execute("UPDATE sync.store SET clock_offset_us = %s", (int(days * DAY_US),))


def groups(store: EditedStore, record_id: str = "p") -> set[str]:
    return set(store.record(record_id).live)


def deleted_everywhere(stores) -> None:
    stores[0].insert("p", title="t", content="text", participants="A")
    stores[0].insert("q", title="stays")
    settle(stores)
    stores[1].delete("p")
    settle(stores)


def test_content_goes_when_all_know_and_the_outage_is_over(stores, config):
    a = stores[0]
    deleted_everywhere(stores)
    assert forget_deleted(config, RULES) == 0 and "plan" in groups(a)
    later(stores, 91)
    later(stores[2:], 89)  # The slowest clock speaks.
    assert forget_deleted(config, RULES) == 0
    later(stores, 91)
    longer = config.model_copy(update={"forget_days": 100.0})
    assert forget_deleted(longer, RULES) == 0
    assert forget_deleted(config.model_copy(update={"forget_days": 1.0}), RULES) == 1
    settle(stores)
    assert agree(stores)
    assert all(groups(store) == {ROW} for store in stores)
    assert forget_deleted(config, RULES) == 0
    kept = (
        "SELECT edit #>> '{wrote,plan,values,content}' FROM sync.version"
        " WHERE edit -> 'wrote' ? 'plan'"
    )
    for store in stores:
        assert ("text",) in store.own.execute(kept).fetchall()
        assert store.row("q", "title") == ("stays",)
    stores[2].insert("p", title="again")  # The number goes on counting.
    settle(stores)
    assert agree(stores) and a.row("p", "title") == ("again",)


def test_a_store_that_has_not_heard_or_has_edited_holds_it(stores, config):
    a, b, c = stores
    a.insert("p", title="t", content="text")
    settle(stores)
    a.delete("p")
    settle([a, b])
    later(stores, 91)
    assert forget_deleted(config, RULES) == 0  # East was cut off.
    c.update("p", content="changed, unaware")
    assert forget_deleted(config, RULES) == 0
    settle(stores)
    assert forget_deleted(config, RULES) == 0 and a.open_conflicts() == 1
    assert agree(stores) and a.row("p", "content") == ("changed, unaware",)


def test_nothing_goes_while_a_store_is_away(stores, config):
    deleted_everywhere(stores)
    later(stores, 91)
    away = config.stores["east"].model_copy(update={"dsn": "host=127.0.0.1 port=9"})
    cut_off = config.model_copy(update={"stores": {**config.stores, "east": away}})
    with pytest.raises(CampusSyncError, match="store east cannot be reached"):
        forget_deleted(cut_off, RULES)
    assert "plan" in groups(stores[0])


def test_what_a_source_has_stays(stores, config):
    for store in stores:
        StoreRows(store.own).put("emr_document", "main", "e", patient_id="P", title="t")
    stores[0].delete("e", "emr_document")
    settle(stores)
    later(stores, 91)
    assert forget_deleted(config, RULES) == 0
    assert len(stores[0].record("e", "emr_document").live) > 1


def test_it_is_done_while_run_runs(stores, config):
    deleted_everywhere(stores)
    later(stores, 91)
    often = config.model_copy(update={"forget_every_s": 0.05})
    with Upkeep(often, Rules(None, None, RULES)):
        until(lambda: groups(stores[0]) == {ROW}, 20, "the content is gone")
    assert stores[0].own.execute(f"SELECT count(*) FROM consult.{PLAN}").fetchone() == (1,)
