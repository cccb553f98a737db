"""How a consult store of an older version becomes one of the next: ordered, each told once.

A migration holds only what the store's DDL, which is idempotent and runs behind them, cannot
say: changes to what exists already. It is never edited once stores have met it.
"""

import typing


class Migration(typing.NamedTuple):
    """`statements` make a store of version `to - 1` ready for the DDL of version `to`.

    Run once each, in order, in the transaction that notes the version. They must pass over what
    is missing: stores of version 1 differ in what had been added by then.
    """

    to: int
    statements: str


# While the version stood still, three columns joined the consult tables. What they would have
# held only the sources know: a link that forgets what it has read whole reads it again.
_COLUMNS_OF_2 = (
    ("parent_ref", "visit medical_order lab_result vital_sign diagnosis prescription"),
    ("parent_ref", "emr_document consultation"),
    ("remarks", "patient visit medical_order lab_result vital_sign diagnosis prescription"),
    ("remarks", "emr_document consultation"),
    ("comparator", "lab_result"),
)
_READ_AGAIN = """\
DO $$ BEGIN
    IF to_regclass('consult.lab_result') IS NOT NULL
        AND to_regclass('sync.published') IS NOT NULL
        AND NOT EXISTS (SELECT FROM pg_attribute WHERE attname = 'comparator'
            AND attrelid = to_regclass('consult.lab_result') AND NOT attisdropped)
    THEN DELETE FROM sync.published;
    END IF;
END $$;
"""


# How far a snapshot has come: one of before has no `read_at`, and begins anew.
_SNAPSHOTS_OF_3 = """\
ALTER TABLE IF EXISTS sync.snapshot ADD COLUMN IF NOT EXISTS view_lsn bigint,
    ADD COLUMN IF NOT EXISTS last_seq integer NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS rows_read bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS rows_estimated bigint,
    ADD COLUMN IF NOT EXISTS read_at timestamptz,
    ADD COLUMN IF NOT EXISTS resumes integer NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS resumed_at timestamptz,
    ADD COLUMN IF NOT EXISTS resumed_rows bigint NOT NULL DEFAULT 0;
"""

# The policies that a store is open with. Without them its links join rows by the packaged ones.
_POLICIES_OF_4 = "ALTER TABLE IF EXISTS sync.store ADD COLUMN IF NOT EXISTS policies text;\n"


def _add_columns() -> str:
    return "".join(
        f'ALTER TABLE IF EXISTS consult.{table} ADD COLUMN IF NOT EXISTS "{column}" text;\n'
        for column, tables in _COLUMNS_OF_2
        for table in tables.split()
    )


MIGRATIONS: tuple[Migration, ...] = (
    Migration(2, _READ_AGAIN + _add_columns()),
    Migration(3, _SNAPSHOTS_OF_3),
    Migration(4, _POLICIES_OF_4),
    Migration(5, ""),  # `sync.reread` is new: the DDL says all of it.
)


def pending(version: int) -> tuple[Migration, ...]:
    """Returns what a store of `version` has yet to go through; 0 for one that has no version."""
    return tuple(step for step in MIGRATIONS if step.to > version)
