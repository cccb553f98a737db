"""The store's DDL: every change of it is seen, and is a new version of the schema."""

import pathlib

from schemas.entities import TABLES
from transforms.deliver.store_schema import SCHEMA_VERSION, store_ddl, table_ddl

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "store_schema.sql"


def test_ddl_is_the_golden_one():
    """Write it anew with `store_ddl()`, and raise SCHEMA_VERSION once a version is released."""
    assert store_ddl() == GOLDEN.read_text()
    assert SCHEMA_VERSION == 1


def test_plausible_ranges_become_checks():
    ddl = table_ddl(TABLES["vital_sign"])
    assert '"gcs" bigint CONSTRAINT vital_sign_gcs_range CHECK ("gcs" >= 3 AND "gcs" <= 15)' in ddl
    assert '"dose" numeric CONSTRAINT prescription_dose_range CHECK ("dose" >= 0)' in store_ddl()
