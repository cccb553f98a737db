"""Preflight of a MariaDB or MySQL source: each fault with its remedy, and nothing else."""

import dataclasses

import pytest

from tests.unit.test_mariadb_retention import log_state
from transforms.capture.mariadb.check import problems, require_readable
from transforms.capture.mariadb.errors import LogSettingsWrong

GOOD = log_state(
    {1: 9},
    9,
    binlog_format="ROW",
    binlog_row_metadata="FULL",
    binlog_row_image="FULL",
    binlog_expire_logs_seconds="864000",
)
GRANTS = (
    "GRANT REPLICATION SLAVE, BINLOG MONITOR ON *.* TO `SYNC`@`%`",
    "GRANT SELECT ON `HIS`.* TO `SYNC`@`%`",
)
GOOD = dataclasses.replace(GOOD, grants=GRANTS)


def with_settings(**settings: str):
    return dataclasses.replace(GOOD, settings=GOOD.settings | settings)


def test_a_good_source_has_no_fault():
    assert problems(GOOD, ("his.a",), {"his.a": "InnoDB"}) == ((), ())
    require_readable(GOOD)
    require_readable(dataclasses.replace(GOOD, grants=("GRANT ALL PRIVILEGES ON *.* TO X",)))


@pytest.mark.parametrize(
    ("state", "remedy"),
    [
        (dataclasses.replace(GOOD, logging=False), "set log_bin"),
        (with_settings(binlog_format="MIXED"), "SET GLOBAL binlog_format = 'ROW'"),
        (with_settings(binlog_row_metadata="MINIMAL"), "SET GLOBAL binlog_row_metadata = 'FULL'"),
        (with_settings(binlog_row_metadata="NO_LOG"), "SET GLOBAL binlog_row_metadata = 'FULL'"),
        (with_settings(binlog_row_value_options="PARTIAL_JSON"), "binlog_row_value_options = ''"),
        (with_settings(binlog_transaction_compression="ON"), "= 'OFF'"),
        (dataclasses.replace(GOOD, settings={"binlog_format": "ROW"}), "MariaDB 10.5"),
        (dataclasses.replace(GOOD, grants=GRANTS[1:]), "GRANT REPLICATION SLAVE ON"),
        (
            dataclasses.replace(GOOD, grants=("GRANT REPLICATION SLAVE ON *.* TO X",)),
            "GRANT BINLOG MONITOR ON",
        ),
    ],
)
def test_what_keeps_the_log_from_being_read(state, remedy):
    wrong, _ = problems(state, (), {})
    assert any(remedy in text for text in wrong)
    with pytest.raises(LogSettingsWrong, match="source h:3306/his"):
        require_readable(state)


def test_tables():
    filtered = dataclasses.replace(GOOD, ignore_databases=frozenset({"lis"}))
    wrong, odd = problems(
        filtered, ("his.a", "his.b", "lis.c"), {"his.b": "MyISAM", "lis.c": "InnoDB"}
    )
    assert [text.split(":")[0].split(",")[0] for text in wrong] == [
        "table his.a does not exist",
        "table lis.c is not logged",
    ]
    assert len(odd) == 1 and "his.b is of MyISAM" in odd[0]


@pytest.mark.parametrize(
    ("state", "sign"),
    [
        (with_settings(binlog_row_image="MINIMAL"), "binlog_row_image = 'FULL'"),
        (with_settings(binlog_row_image="NOBLOB"), "binlog_row_image = 'FULL'"),
        (with_settings(binlog_expire_logs_seconds="3600"), "kept for 1.0 h"),
    ],
)
def test_what_is_only_to_be_feared(state, sign):
    wrong, odd = problems(state, (), {})
    assert wrong == ()
    assert len(odd) == 1 and sign in odd[0]


def test_images_without_duplicates_are_whole():
    assert problems(with_settings(binlog_row_image="FULL_NODUP"), (), {}) == ((), ())
