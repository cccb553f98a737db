"""What `campus-sync reread` refuses before it asks any server."""

import pytest
import yaml

from runners.cli import main

SOURCES = {
    "main": {
        "kind": "postgresql",
        "dsn": "postgresql://sync@127.0.0.1:1/his",
        "mapping": "postgresql_his",
    },
    "west": {"kind": "debezium", "dsn": "kafka://127.0.0.1:1/topic", "mapping": "oracle_his"},
}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ["west", "--table", "HIS.LAB_RESULT"],
            2,
            "name a PostgreSQL as `content`",
        ),
        (["north", "--table", "his.visit"], 2, "no campus north. Remedy: one of main, west."),
        (["main", "--table", "his.visits"], 2, "did you mean `his.visit`?"),
        (["main", "--table", "his.visit", "--store", "east"], 2, "no link to store east"),
        (["main", "--table", "his.visit", "--rows-s", "-1"], 2, "0 for no limit"),
        (["main", "--table", "his.visit"], 1, "store primary at 127.0.0.1:1"),
    ],
)
def test_it_is_refused_with_the_remedy(arguments, code, told, tmp_path, capsys):
    content = {
        "version": 1,
        "sources": SOURCES,
        "stores": {"primary": {"dsn": "postgresql://sync@127.0.0.1:1/consult"}},
        "dead_letter_key": "file:key",
    }
    path = tmp_path / "campuses.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["reread", *arguments, "--config", str(path)]) == code
    assert told in capsys.readouterr().err
