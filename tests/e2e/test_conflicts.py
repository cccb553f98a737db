"""`campus-sync conflicts` and `policies`: a person's part, and what is never printed unasked."""

import contextlib
import io
import itertools
import json
import logging

import pytest

from runners import cli
from runners.exchange import Exchange
from tests.edited_stores import RULES, EditedStore, agree, config_of, settle
from tests.faults.harness import until

SECRET = "张三的方案"
_numbers = itertools.count()


@pytest.fixture
def world(postgres_server, tmp_path):
    names = ("primary", "main", "east")
    mark = next(_numbers)
    dsns = {name: postgres_server.create_database(f"person_{mark}_{name}") for name in names}
    stores = [EditedStore(name, dsn) for name, dsn in dsns.items()]
    config = config_of(tmp_path, dsns)
    yield stores, config, tmp_path / "campuses.yaml"
    for store in stores:
        store.close()


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def disputed(stores: list[EditedStore]) -> None:
    """A consultant's emergency edit against the attending doctor's routine one."""
    stores[0].insert("R-77", patient_id="P", title="t", content=f"{SECRET} 0")
    settle(stores)
    stores[0].as_("C1", "consultant", "emergency")
    stores[1].as_("D1", "attending", "routine")
    stores[0].update("R-77", content=f"{SECRET} 1")
    stores[1].update("R-77", content=f"{SECRET} 2")
    settle(stores)


def test_list_show_and_resolve(world, caplog):
    stores, _, path = world
    disputed(stores)
    caplog.set_level(logging.DEBUG)
    code, text, _ = call("conflicts", "list", "--config", path, "--json")
    (one,) = json.loads(text)["conflicts"]
    assert code == 0 and (one["table"], one["group"], one["asked"]) == (
        "treatment_plan",
        "plan",
        "attending",
    )
    for verb in (["list"], ["list", "--json"], ["show", one["id"]], ["show", one["id"], "--json"]):
        code, text, err = call("conflicts", *verb, "--config", path)
        assert code == 0
        assert not any(word in text + err for word in (SECRET, "R-77"))
    code, _, err = call("conflicts", "show", one["id"], "--reveal", "--config", path)
    assert code == 2 and "no terminal" in err
    code, text, _ = call("conflicts", "show", one["id"], "--reveal", "--json", "--config", path)
    (shown,) = json.loads(text)
    versions = shown["versions"]
    assert [v["author"] for v in versions] == ["C1", "D1"]
    assert [v["role"] for v in versions] == ["consultant", "attending"]
    assert [v["values"]["content"] for v in versions] == [f"{SECRET} 1", f"{SECRET} 2"]
    assert shown["rule"] == "person" and len(shown["history"]) == 3 and shown["shown"] == 1
    who = ["--who", "D9", "--role", "superior", "--why", "both spoke"]
    code, _, err = call("conflicts", "resolve", one["id"], "--choose", 2, "--config", path)
    assert code == 2 and "--who" in err
    code, _, err = call("conflicts", "resolve", one["id"], "--choose", 3, *who, "--config", path)
    assert code == 2 and "1 to 2" in err
    code, text, _ = call(
        "conflicts", "resolve", one["id"], "--choose", 2, *who, "--store", "east", "--config", path
    )
    assert code == 0 and SECRET not in text
    settle(stores)
    assert agree(stores)
    for store in stores:
        assert store.row("R-77", "content") == (f"{SECRET} 2",)
        assert store.open_conflicts() == 0
        states = store.own.execute("SELECT state FROM sync.incident WHERE kind = 'conflict'")
        assert {state for (state,) in states} == {"closed"}
        met = "SELECT count(*) FROM sync.version WHERE edit #>> '{wrote,plan,values,content}' = %s"
        assert store.own.execute(met, (f"{SECRET} 1",)).fetchone() == (1,)  # Readable for ever.
    assert SECRET not in caplog.text and "R-77" not in caplog.text


def test_a_decision_in_words_and_a_deletion_in_dispute(world):
    stores, _, path = world
    stores[0].insert("p", title="t", content="0")
    settle(stores)
    stores[0].delete("p")
    stores[1].update("p", content="1")
    settle(stores)
    assert all(store.row("p", "content") == ("1",) for store in stores)
    (one,) = json.loads(call("conflicts", "list", "--config", path, "--json")[1])["conflicts"]
    assert one["group"] == "row"
    who = ["--who", "D9", "--role", "attending", "--why", "discharged", "--config", path]
    code, _, err = call("conflicts", "resolve", one["id"], "--set", "content=x", *who)
    assert code == 2 and "deleted" in err
    assert call("conflicts", "resolve", one["id"][:8], "--set", "deleted=true", *who)[0] == 0
    settle(stores)
    assert agree(stores)
    assert all(store.row("p", "content") is None for store in stores)


def test_elements_that_somebody_wants_out_of_a_list(world):
    stores, _, path = world
    stores[0].insert("p", title="t", participants="A,B,C")
    settle(stores)
    stores[1].update("p", participants="A,B")
    settle(stores)
    assert stores[2].row("p", "participants") == ("A,B,C",)
    (one,) = json.loads(call("conflicts", "list", "--config", path, "--json")[1])["conflicts"]
    who = ["--who", "D9", "--role", "attending", "--why", "left", "--config", path]
    code, _, err = call("conflicts", "resolve", one["id"], "--choose", 1, *who)
    assert code == 2 and "--set" in err
    assert call("conflicts", "resolve", one["id"], "--set", "participants=A,B", *who)[0] == 0
    settle(stores)
    assert agree(stores) and stores[2].row("p", "participants") == ("A,B",)


def test_policies_are_printed_in_both_languages():
    assert "sends" not in call("policies")[1] and "Treatment plan" in call("policies")[1]
    assert "诊疗方案" in call("policies", "--language", "zh")[1]


def test_open_conflicts_are_counted_while_the_exchange_runs(world):
    stores, config, _ = world
    disputed(stores)
    stores[2].as_("D5", "attending", "emergency")
    with Exchange(config, RULES) as exchange:
        stores[2].insert("q", title="t")
        until(lambda: stores[0].row("q", "lane") == ("E",), 20, "an urgent edit")

        def counted() -> dict:
            return {
                (metric.name, *sample.labels.values()): sample.value
                for metric in exchange.collector.collect()
                for sample in metric.samples
            }

        name = ("campus_sync_open_conflicts", "east", "treatment_plan", "alarm")
        until(lambda: counted().get(name) == 1, 20, lambda: str(counted()))
        lag = ("campus_sync_edit_lag_seconds", "primary", "east", "emergency")
        until(lambda: lag in counted(), 20, lambda: str(counted()))
