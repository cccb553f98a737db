"""What is proposed where a source's column is gone: a line that makes the mapping whole again."""

import pytest
import yaml

from schemas.mapping_proposals import proposal, successor
from schemas.mappings import load_mapping
from schemas.tables import Kind


@pytest.mark.parametrize(
    ("column", "kinds", "fresh", "expected"),
    [
        ("pulse", {Kind.INT}, {"pulse_rate": "int", "device2": "text"}, "pulse_rate"),
        ("pulse", {Kind.INT}, {"pulse_rate": "timestamp", "puls": "integer"}, "puls"),
        ("phone", {Kind.TEXT}, {"nickname": "text"}, ""),  # The only one, and nothing like it.
        ("CSNY", {Kind.DATE}, {"CSRQ": "date", "BZ": "varchar(20)"}, "CSRQ"),
        ("mrn", {Kind.TEXT}, {"mrn_no": "varchar(20)", "mrn": "varchar(20)"}, "mrn"),
        ("mrn", {Kind.TEXT}, {}, ""),
        ("visit_no", {Kind.TEXT}, {"VisitNo": ""}, "VisitNo"),
        ("a", {Kind.TIME}, {"b": "int"}, ""),
    ],
)
def test_the_likest_name_whose_type_fits_is_the_successor(column, kinds, fresh, expected):
    assert successor(column, kinds, fresh) == expected


def line_of(text: str) -> dict:
    """The YAML behind `under tables: NAME: `, which must be YAML as it stands."""
    line = text.partition("under tables: ")[2].split(": ", 1)[1]
    assert ";" not in line
    return yaml.safe_load("{" + line + "}") if not line.startswith("columns: ") else {
        "columns": yaml.safe_load("{" + line.removeprefix("columns: ") + "}")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mapping", "table", "column", "new", "expected"),
    [
        (
            "postgresql_his",
            "his.vital_sign",
            "pulse",
            "pulse_rate",
            {"columns": {"pulse_per_min": "pulse_rate"}},
        ),
        (
            "postgresql_his",
            "his.diagnosis",
            "icd10",
            "icd10_code",
            {"columns": {"code": {"from": "icd10_code", "text": "icd10"}}},
        ),
        ("postgresql_his", "his.vital_sign", "vital_id", "vitals_id", {"id": "vitals_id"}),
    ],
)
def test_a_renamed_column_s_rule_is_written_whole(mapping, table, column, new, expected):
    part = load_mapping(mapping).tables[table]
    assert line_of(proposal(table, part, column, {new: ""})) == expected


def test_every_mapped_column_has_a_proposal_that_can_be_pasted(tmp_path):
    """Each column of each packaged mapping, renamed: the mapping with the lines in it is sound."""
    for name in ("postgresql_his", "mariadb_his_gbk", "oracle_his"):
        for table, part in load_mapping(name).tables.items():
            for column in part.needed:
                text = proposal(table, part, column, {f"{column}_new": ""})
                assert text.startswith(f"write under tables: {table}: "), text
                assert f"{column}_new" in text


def test_one_that_is_gone_for_good_goes_to_absent():
    part = load_mapping("postgresql_his").tables["his.vital_sign"]
    text = proposal("his.vital_sign", part, "device", {})
    assert "take device out of columns:" in text and text.endswith("absent: [device]")
    assert "restore it" in proposal("his.vital_sign", part, "vital_id", {})
