"""The store's DDL: every change of it is seen, and is a new version of the schema."""

import hashlib
import pathlib

from schemas.entities import TABLES
from transforms.deliver.store_migrations import MIGRATIONS, pending
from transforms.deliver.store_schema import SCHEMA_VERSION, store_ddl, table_ddl

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "store_schema.sql"


def test_ddl_is_the_golden_one():
    """Write it anew with `store_ddl()`, and add a migration once a version is released.

    The version that was is then kept in `tests/golden/store_versions`, for
    `tests/e2e/test_upgrade.py`.
    """
    assert store_ddl() == GOLDEN.read_text()
    assert SCHEMA_VERSION == 6


def test_migrations_are_one_for_each_version_in_order():
    assert [step.to for step in MIGRATIONS] == list(range(2, SCHEMA_VERSION + 1))
    assert [step.to for step in pending(0)] == [step.to for step in MIGRATIONS]
    assert pending(SCHEMA_VERSION) == ()


def test_what_was_released_is_kept():
    """A migration that is edited makes two stores of one version that differ."""
    digests = [hashlib.sha256(step.statements.encode()).hexdigest()[:16] for step in MIGRATIONS]
    assert digests == [
        "6ede037079af8da0",
        "20b3ff5018e16241",
        "3136c6e1154f1591",
        "f044dad9257dd482",
        "ca6e377ed0506b8e",
    ]
    kept = {path.stem.partition("_")[0] for path in (GOLDEN.parent / "store_versions").iterdir()}
    assert kept == {str(version) for version in range(1, SCHEMA_VERSION)}


def test_plausible_ranges_become_checks():
    ddl = table_ddl(TABLES["vital_sign"])
    assert '"gcs" bigint CONSTRAINT vital_sign_gcs_range CHECK ("gcs" >= 3 AND "gcs" <= 15)' in ddl
    assert '"dose" numeric CONSTRAINT prescription_dose_range CHECK ("dose" >= 0)' in store_ddl()
