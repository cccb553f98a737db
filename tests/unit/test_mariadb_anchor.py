"""Whether a described event is of a transaction, and two lists of GTIDs are of one place."""

import pytest

from transforms.capture.mariadb.anchor import Anchor, is_named, same_gtids


@pytest.mark.parametrize(
    ("info", "gtid", "mariadb", "same"),
    [
        ("BEGIN GTID 0-1-7", "0-1-7", True, True),
        ("GTID 0-1-7", "0-1-7", True, True),
        ("BEGIN GTID 0-1-77", "0-1-7", True, False),
        ("BEGIN GTID 10-1-7", "0-1-7", True, False),
        ("BEGIN GTID 0-1-7 cid=12", "0-1-7", True, True),
        ("use `his`; INSERT INTO t VALUES (1)", "0-1-7", True, False),
        ("SET @@SESSION.GTID_NEXT= '3e11fa47-71ca:7'", "0-0-7", False, True),
        ("SET @@SESSION.GTID_NEXT= '3e11fa47-71ca:17'", "0-0-7", False, False),
        ("SET @@SESSION.GTID_NEXT= 'ANONYMOUS'", "0-0-7", False, False),
    ],
)
def test_an_event_is_named_by_its_gtid(info, gtid, mariadb, same):
    assert is_named(info, gtid, mariadb) is same


def test_domains_have_no_order():
    assert same_gtids("0-1-7,1-1-3", Anchor(64, "1-1-3,0-1-7"))
    assert not same_gtids("0-1-7", Anchor(64, "1-1-3,0-1-7"))
    assert not same_gtids("", Anchor(64, "0-1-7"))
