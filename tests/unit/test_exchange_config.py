"""`conflict_rules` and `exchange` of campuses.yaml: read, refused with a remedy, and checked."""

import argparse
import itertools

import pytest
import yaml

from runners.conflicts import policies
from runners.preflight.exchange import check_exchange
from runners.preflight.findings import Severity
from schemas.config import Config, ConfigError, load
from schemas.conflict_policy import DEFAULT_PATH, conflict_rules_of, load_conflict_rules

STORES = ("primary", "main", "east", "west")


def written(folder, **more):
    content = {
        "version": 1,
        "sources": {"main": {"kind": "postgresql", "dsn": "host=s", "mapping": "postgresql_his"}},
        "stores": {name: {"dsn": f"host=h dbname={name}"} for name in STORES},
        "dead_letter_key": "file:key",
        **more,
    }
    path = folder / "campuses.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def config_with(folder, **more) -> Config:
    return load(written(folder, **more))


def test_every_store_asks_every_other_unless_told_otherwise(tmp_path):
    config = config_with(tmp_path)
    assert set(config.exchange_pairs()) == set(itertools.permutations(STORES, 2))
    assert config.conflict_rules == "default" and config.forget_days is None


def test_chains_rings_and_nothing(tmp_path):
    chain = config_with(tmp_path, exchange=["primary<>main", "main <> east"])
    assert chain.exchange_pairs() == (
        ("primary", "main"), ("main", "primary"), ("main", "east"), ("east", "main"),
    )  # fmt: skip
    ring = config_with(tmp_path, exchange=["primary>main", "main>east", "east>primary"])
    assert ring.exchange_pairs() == (
        ("main", "primary"), ("east", "main"), ("primary", "east"),
    )  # fmt: skip
    assert config_with(tmp_path, exchange=False).exchange_pairs() == ()


@pytest.mark.parametrize(
    ("exchange", "what", "remedy"),
    [
        ([], "names no pair", "write `all`, `off`, or a list"),
        (["primary-main"], "`primary-main` is no pair of stores", "write `store<>store`"),
        (["primary<>mian"], "no store `mian`", "main"),
        (["primary<>primary"], "exchanges with itself", "another store"),
        (["primary<>main", "main>primary"], "stands twice", "remove one"),
    ],
)
def test_what_is_no_exchange_is_refused_with_line_and_remedy(tmp_path, exchange, what, remedy):
    with pytest.raises(ConfigError) as told:
        config_with(tmp_path, exchange=exchange)
    text = str(told.value)
    assert what in text and remedy in text and "exchange" in text and "campuses.yaml" in text


def test_rules_are_a_file_beside_it_or_refused(tmp_path):
    own = DEFAULT_PATH.read_text().replace("skew_bound_s: 300", "skew_bound_s: 60")
    (tmp_path / "ours.yaml").write_text(own)
    config = config_with(tmp_path, conflict_rules="ours.yaml")
    rules = load_conflict_rules(config.conflict_rules)
    assert rules.skew_bound_us == 60_000_000 and rules.path == str(tmp_path / "ours.yaml")
    again = conflict_rules_of(rules.content)
    assert (again.digest, again.tables) == (rules.digest, rules.tables)
    with pytest.raises(ConfigError, match="neither packaged nor a file"):
        config_with(tmp_path, conflict_rules="theirs.yaml")


def test_rules_of_another_version_are_refused():
    content = load_conflict_rules().content
    for other in (content.replace('"phone"', '"fax"'), "{}"):
        with pytest.raises(ConfigError, match="another version"):
            conflict_rules_of(other)


def test_check_tells_gaps_in_the_rules(tmp_path):
    text = DEFAULT_PATH.read_text().replace("columns: [phone]", "columns: [name]")
    (tmp_path / "ours.yaml").write_text(text)
    (found,) = check_exchange(config_with(tmp_path, conflict_rules="ours.yaml"))
    assert found.severity is Severity.ERROR
    assert "`phone` has no policy" in found.what and "ours.yaml" in found.remedy


def test_only_tables_with_a_trigger_have_the_stores_as_writers(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text(DEFAULT_PATH.read_text().replace("writers: source", "writers: stores", 1))
    with pytest.raises(ConfigError, match="visit is not edited at the stores"):
        load_conflict_rules(path)


@pytest.mark.parametrize(
    ("exchange", "warned"),
    [
        ("all", []),
        (["primary>main", "main>east", "east>west", "west>primary"], []),
        (["primary<>main", "main<>east"], ["west", "west", "west", "primary, main, east"]),
        (["primary<>main", "main<>east", "west>main"], ["west"] * 3),
    ],
)
def test_check_tells_whose_edits_stay_away(tmp_path, exchange, warned):
    found = check_exchange(config_with(tmp_path, exchange=exchange))
    assert [one.what.rpartition("never come to ")[2] for one in found] == warned
    assert {one.severity for one in found} <= {Severity.WARNING}


def test_check_tells_that_forgetting_waits_for_the_longest_outage(tmp_path):
    (found,) = check_exchange(config_with(tmp_path, forget_days=30))
    assert "90" in found.what and found.severity is Severity.WARNING


def test_policies_prints_those_that_the_file_names(tmp_path, capsys):
    text = DEFAULT_PATH.read_text().replace("Treatment plan", "Care plan")
    (tmp_path / "ours.yaml").write_text(text)
    path = written(tmp_path, conflict_rules="ours.yaml")
    for config, word in ((path, "Care plan"), (None, "Treatment plan")):
        assert policies(argparse.Namespace(config=config, language="en")) == 0
        assert word in capsys.readouterr().out
