"""Rows of a consult table and records: what each says of the other."""

import datetime

from schemas.batches import Lane
from schemas.conflict_policy import load_conflict_rules
from schemas.entities import PATIENT
from schemas.positions import SEQ_END, Position
from schemas.siblings import UNSEEN, Stamp
from tests.canonical import rows_of
from transforms.checksum import digest_rows
from transforms.conflicts.edit import edit_record
from transforms.conflicts.join import join_records
from transforms.conflicts.show import show
from transforms.conflicts.stored_rows import (
    put_digests,
    record_of_row,
    record_of_source,
    row_of,
    source_position,
    source_values,
)

RULES = load_conflict_rules()
POLICY = RULES.tables["patient"]
VALUES = dict.fromkeys(POLICY.group_of) | {"patient_id": "P1", "name": "某", "phone": "1"}
PLACE = Position(7_000_000_000, 5)
HLC = 1_772_352_000_000 << 16
LATER = Stamp(HLC + (1 << 40), Lane.EMERGENCY, "attending", "D1")


def source(position: Position = PLACE, **values):
    return record_of_source("main", position, HLC, VALUES | values, POLICY, RULES)


def test_a_row_of_a_source_is_the_record_that_it_would_be_on_arrival():
    row = {"campus": "main", "src_table": "his.patient", "src_lsn": PLACE.lsn, "hlc": HLC}
    row |= {"src_seq": PLACE.seq, "deleted": False, **VALUES}
    assert record_of_row(row, POLICY, RULES) == source()
    gone = record_of_row(row | {"deleted": True}, POLICY, RULES)
    assert gone == record_of_source("main", PLACE, HLC, None, POLICY, RULES)
    assert record_of_row(row | {"src_table": ""}, POLICY, RULES) is UNSEEN


def test_a_place_in_the_log_is_found_again_in_what_was_seen():
    for place in (PLACE, Position(1, SEQ_END), Position(2**62, 1)):
        assert source_position(source(place), "main") == place
    assert source_position(source(), "east") == Position(0, 0)


def test_what_the_source_said_last_outlives_edits():
    edited = edit_record(source(), "a", LATER, {"phone": "2"}, POLICY, RULES)
    assert source_values(edited, "main", POLICY) == VALUES
    newer = join_records(edited, source(Position(PLACE.lsn + 1, 1), phone="3"))
    assert source_values(newer, "main", POLICY)["phone"] == "3"
    assert source_values(UNSEEN, "main", POLICY) is None


def test_the_row_of_a_record_shows_its_newest_edit_and_the_sources_place():
    edited = edit_record(source(), "a", LATER, {"phone": "2"}, POLICY, RULES)
    row = row_of("main", "1", edited, show(edited, POLICY, RULES), "his.patient", 4)
    assert (row["phone"], row["name"], row["lane"], row["hlc"]) == ("2", "某", "E", LATER.hlc)
    assert (row["src_lsn"], row["src_seq"], row["deleted"]) == (*PLACE, False)
    assert row["version_vector"] == edited.seen


def test_digests_are_those_of_delivery_and_null_where_there_is_no_arrow_form():
    whole = {"record_id": "1", **VALUES, "birth_date": "1980-02-29"}
    whole["updated_at"] = "2026-03-01T08:00:00.5+00:00"
    beyond = whole | {"record_id": "2", "updated_at": "infinity"}
    rows = [whole, beyond]
    put_digests(PATIENT, rows)
    at = datetime.datetime(2026, 3, 1, 8, 0, 0, 500_000, datetime.UTC)
    arrow = {**VALUES, "birth_date": datetime.date(1980, 2, 29), "updated_at": at}
    expected = digest_rows(PATIENT, rows_of("patient", [arrow]))[0].as_py()
    assert [row["digest"] for row in rows] == [f"\\x{expected.hex()}", None]
