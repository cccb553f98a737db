"""campuses.yaml: what is accepted, what is refused, and that a refusal shows line and remedy."""

import pathlib
import urllib.parse

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import Config, ConfigError, load, redact
from schemas.links import Limits, LinkSettings
from schemas.yaml_lines import load_yaml

GOOD = """\
version: 1
sources:
  main: {kind: postgresql, dsn: "postgresql://sync@127.0.0.1:5501/his", mapping: postgresql_his}
  east-2:
    kind: postgresql
    dsn: "host=10.0.0.2 dbname=his user=sync passfile=secrets/east"
    mapping: maps/east.yaml
    publication: sync_all
stores:
  primary: {dsn: "postgresql://sync@127.0.0.1:5510/consult"}
  main: {dsn: "service=consult_main"}
links: all
dead_letter_key: "file:dead-letter.key"
"""


@pytest.fixture
def write(tmp_path: pathlib.Path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "east.yaml").write_text("version: 1\n")

    def write(text: str) -> pathlib.Path:
        path = tmp_path / "campuses.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


TOPIC = """\
  west: {kind: debezium, dsn: "kafka://127.0.0.1:9092/c", mapping: oracle_his, content: "CONTENT"}
stores:
"""


def with_content(dsn: str) -> str:
    return GOOD.replace("stores:\n", TOPIC.replace("CONTENT", dsn))


def test_content_is_a_database_behind_a_topic(write):
    path = write(with_content("postgresql://sync@127.0.0.1:5503/his?passfile=c.pw"))
    assert load(path).sources["west"].content.count(f"passfile={path.parent}/c.pw")
    for dsn, what in (
        ("postgresql://sync:x@127.0.0.1/his", "holds a password"),
        ("kafka://127.0.0.1/c", "is not a PostgreSQL connection string"),
        ("postgresql://sync@127.0.0.1:5510/consult", "is the database of sources.west"),
    ):
        assert what in refusal(write(with_content(dsn)))
    wrong = GOOD.replace("postgresql_his}", "postgresql_his, content: 'dbname=x'}")
    assert "is only for `kind: debezium`" in refusal(write(wrong))


def test_all_links_is_every_source_to_every_store(write):
    config = load(write(GOOD))
    assert [link.name for link in config.links()] == [
        "main>primary",
        "main>main",
        "east-2>primary",
        "east-2>main",
    ]
    assert config.links()[2].slot == "campus_sync_east_2_primary"
    assert config.local_store("main") == "main"
    assert config.local_store("east-2") is None


def test_links_may_be_listed(write):
    config = load(write(GOOD.replace("links: all", "links: [main>primary]")))
    assert [link.name for link in config.links()] == ["main>primary"]


def test_references_are_resolved_against_the_file(write):
    path = write(GOOD)
    config = load(path)
    folder = path.parent
    assert config.sources["east-2"].mapping == str(folder / "maps" / "east.yaml")
    assert pathlib.Path(config.sources["main"].mapping).name == "postgresql_his.yaml"
    assert pathlib.Path(config.sources["main"].mapping).is_file()
    assert f"passfile={folder}/secrets/east" in config.sources["east-2"].dsn
    assert config.dead_letter_key == f"file:{folder}/dead-letter.key"
    assert pathlib.Path(config.emergency_rules).is_file()


def test_settings_of_a_link_carry_the_limits(write):
    config = load(write(GOOD + "limits: {batch_rows: 7, early_s: 0.25}\n"))
    settings = config.settings(config.links()[0])
    assert isinstance(settings, LinkSettings)
    assert settings.limits == Limits(batch_rows=7, early_s=0.25)
    assert settings.publication == "campus_sync"
    assert settings.store_dsn == "postgresql://sync@127.0.0.1:5510/consult"


def test_what_goes_on_beside_the_job_is_on_until_switched_off(write):
    config = load(write(GOOD))
    assert (config.quality_rules, config.patient_matching) == ("default", "default")
    assert config.retention.warn_s > config.retention.critical_s
    off = load(write(GOOD + "quality_rules: off\npatient_matching: 'off'\n"))
    assert (off.quality_rules, off.patient_matching) == ("off", "off")
    path = write(GOOD + "quality_rules: maps/east.yaml\n")
    assert load(path).quality_rules == str(path.parent / "maps" / "east.yaml")


# What is changed in GOOD, then what the refusal must say: line, what, and remedy.
REFUSED = {
    "unknown setting": (
        ("publication:", "publicaton:"),
        ["line 8: sources.east-2.publicaton", "did you mean `publication`"],
    ),
    "rules that are nowhere": (
        ("links:", "quality_rules: nowhere.yaml\nlinks:"),
        ["line 12: quality_rules", "neither packaged nor a file"],
    ),
    "critical before the warning": (
        ("links:", "retention: {warn_s: 60, critical_s: 3600}\nlinks:"),
        ["retention.warn_s", "is less than critical_s"],
    ),
    "unknown top setting": (
        ("links:", "linsk:"),
        ["line 12: linsk", "did you mean `links`"],
    ),
    "missing": (('dead_letter_key: "file:dead-letter.key"', ""), ["dead_letter_key: is missing"]),
    "kind": (("kind: postgresql, dsn", "kind: oracle, dsn"), ["line 3: sources.main.kind"]),
    "password": (
        ("sync@127.0.0.1:5501", "sync:geheim@127.0.0.1:5501"),
        ["line 3: sources.main.dsn", "holds a password", "passfile"],
    ),
    "password of keywords": (
        ("user=sync passfile", "user=sync password=geheim passfile"),
        ["line 6: sources.east-2.dsn", "holds a password"],
    ),
    "not a dsn": (
        ("postgresql://sync@127.0.0.1:5501/his", "jdbc:postgresql://geheim"),
        ["line 3: sources.main.dsn", "is not a PostgreSQL connection string"],
    ),
    "bad key": (("file:dead", "fil:dead"), ["line 13: dead_letter_key", "openssl rand"]),
    "mapping": (
        ("mapping: postgresql_his}", "mapping: postgresql_hs}"),
        ["line 3: sources.main.mapping", "did you mean `postgresql_his`"],
    ),
    "no primary": (("  primary:", "  prime:"), ["line 9: stores", "`primary`"]),
    "no such source": (
        ("links: all", "links:\n- main>primary\n- eats-2>primary"),
        ["line 14: links", "no source `eats-2`", "did you mean `east-2`"],
    ),
    "not a link": (("links: all", "links: [main]"), ["line 12", "source>store"]),
    "link twice": (("links: all", "links: [main>main, main>main]"), ["stands twice"]),
    "same database": (
        ("host=10.0.0.2 dbname=his", "host=127.0.0.1 port=5510 dbname=consult"),
        ["line 10: stores.primary.dsn", "is the database of sources.east-2"],
    ),
    "same slot": (
        ("  main: {kind", "  EAST_2: {kind"),
        ["would share the slot campus_sync_east_2_primary", "rename"],
    ),
    "name": (("  east-2:", "  东院:"), ["line 4: sources.东院"]),
    "version": (("version: 1", "version: 2"), ["line 1: version"]),
    "twice": (("links: all", "links: all\nlinks: all"), ["line 13", "`links` stands twice"]),
    "no yaml": (("links: all", "links: [all"), ["line 1", "YAML"]),
    "limit": (
        ("links: all", "links: all\nlimits: {batch_rows: 0}"),
        ["line 13: limits.batch_rows", "greater than 0"],
    ),
    "limits in relation": (
        ("links: all", "links: all\nlimits: {in_flight_rows: 5}"),
        ["line 13: limits.in_flight_rows", "less than batch_rows"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_line_and_remedy(write, case):
    (old, new), said = REFUSED[case]
    assert old in GOOD
    text = refusal(write(GOOD.replace(old, new, 1)))
    for part in said:
        assert part in text
    assert "campuses.yaml" in text
    assert "geheim" not in text


def test_all_problems_are_told_at_once_in_line_order(write):
    text = GOOD.replace("version: 1", "version: 9").replace("publication:", "publicaton:")
    lines = [line for line in refusal(write(text)).splitlines() if line.startswith("  line")]
    assert [line.split(":")[0] for line in lines] == ["  line 1", "  line 8"]


def test_a_missing_file_and_a_foreign_encoding_are_told(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    path = tmp_path / "gbk.yaml"
    path.write_bytes("# 会诊\n".encode("gb18030"))
    assert "iconv -f GB18030" in refusal(path)


@given(st.text(min_size=4).filter(lambda text: not set(text) & set("\x00")))
def test_redact_never_shows_a_password(password):
    from psycopg.conninfo import make_conninfo

    dsn = make_conninfo(host="h", user="u", dbname="d", password=password + "#geheim")
    assert redact(dsn) == "u@h/d"


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://u:p%40ss@h:1/d?sslmode=require", "u@h:1/d"),
        ("postgresql://u:pa@ss@h:1/d", "u@h:1/d"),
        ("host=h hostaddr=10.0.0.1 dbname=d", "h/d"),
        ("service=lab", "service lab"),
        ("nonsense", "(unreadable connection string)"),
    ],
)
def test_redact(dsn, shown):
    assert redact(dsn) == shown


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("abcNoYes: 01#'\"-", max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abcxyz", min_size=1), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_yaml_round_trip_and_every_place_has_a_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    text = yaml.safe_dump(data, default_flow_style=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    read, line_of = load_yaml(path)
    assert read == data
    count = len(text.splitlines())

    def walk(value, place):
        assert 1 <= line_of(place) <= max(count, 1)
        for key, inner in (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        ):
            walk(inner, (*place, key))

    walk(read, ())


def test_codes_stay_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: No\nb: 010\nc: 2024-01-01\nd: 12:30\ne: 7\nf: 1E10\n")
    data, line_of = load_yaml(path)
    assert data == {"a": "No", "b": "010", "c": "2024-01-01", "d": "12:30", "e": 7, "f": "1E10"}
    assert line_of(("c",)) == 3
    assert line_of(("c", "deeper")) == 3


def test_model_declares_each_limit_once():
    assert Config.model_fields["limits"].annotation.model_fields.keys() == vars(Limits()).keys()


def test_two_phase_names_mariadb_copies_beside_the_stores(write):
    assert load(write(GOOD)).two_phase.mode == "off"
    assert load(write(GOOD + "two_phase: {mode: off}\n")).two_phase.mode == "off"  # YAML's false.
    text = (
        GOOD + 'two_phase: {mode: degrade, branches: {west: "mariadb://u@h/c?password_file=p"}}\n'
    )
    path = write(text)
    found = load(path).two_phase
    assert (found.mode, found.deadline_s) == ("degrade", 10)
    assert urllib.parse.unquote(found.branches["west"]).endswith(f"password_file={path.parent}/p")
    assert "is a store's name" in refusal(write(text.replace("west:", "main:")))
    assert "is not the address of a mariadb source" in refusal(
        write(text.replace("mariadb://", "postgresql://"))
    )
    assert "two_phase.deadline_s" in refusal(write(GOOD + "two_phase: {deadline_s: 0}\n"))


def test_sets_are_words_for_tables_that_go_together(write):
    def settings(text: str, **change):
        config = load(write(text))
        return [config.settings(link).sets for link in config.links()]

    assert not any(settings(GOOD + "two_phase: {mode: refuse}\n"))
    text = GOOD + "two_phase: {mode: refuse, sets: [prescription, lab_report]}\n"
    config = load(write(text))
    for link, found in zip(config.links(), settings(text), strict=True):
        stores = {other.store for other in config.links() if other.source == link.source}
        if len(stores) == 1:
            assert found is None  # One store is one transaction already.
        else:
            assert found.tables == (("prescription",), ("lab_report", "lab_result"))
            assert {name for name, _ in found.stores} == stores
    assert any(settings(text))
    for word, told in (
        ("lab_result", "is a part of the set `lab_report`"),
        ("patient", "are edited at the stores"),
        ("rx", "no set `rx`"),
    ):
        said = refusal(write(text.replace("lab_report", word)))
        assert told in said and "two_phase.sets.1" in said
    assert "stands twice" in refusal(write(text.replace("lab_report", "prescription")))
    assert "needs a mode" in refusal(write(text.replace("mode: refuse, ", "")))
