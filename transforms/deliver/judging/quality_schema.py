"""The part of a consult store's schema that keeps the alarms of quality."""

from schemas.entities import TABLES

# One alarm a rule and version of a row: its position, and once clients have edited it, `version`,
# its version vector. It is settled once the row has a newer version or what it contradicted was
# mended; history stays.
QUALITY_DDL = """\
CREATE TABLE IF NOT EXISTS sync.quality_alarm (
    campus text COLLATE "C", table_name text COLLATE "C", record_id text COLLATE "C",
    lsn bigint, seq integer, rule smallint, column_name text NOT NULL, reason text NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now(), settled_at timestamptz,
    version text COLLATE "C" NOT NULL DEFAULT '',
    PRIMARY KEY (record_id, table_name, campus, rule, lsn, seq, version));
CREATE INDEX IF NOT EXISTS quality_alarm_open ON sync.quality_alarm (campus, table_name, rule)
    WHERE settled_at IS NULL;
CREATE TABLE IF NOT EXISTS sync.quality_progress (
    campus text COLLATE "C" PRIMARY KEY, lsn bigint NOT NULL, seq integer NOT NULL,
    rules bytea NOT NULL, checked_at timestamptz NOT NULL,
    change bigint NOT NULL DEFAULT 0, incarnation text NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS sync.quality_later (
    campus text COLLATE "C", patient_id text COLLATE "C", due_at timestamptz NOT NULL,
    PRIMARY KEY (campus, patient_id));
"""


def changed_ddl() -> str:
    """Returns indexes that find what changed since a position without reading whole tables.

    Block ranges with several intervals each: campuses count their positions apart, and their
    rows share pages. An insert pays nothing that can be measured, and HOT updates stay HOT.
    """
    return "".join(
        f"CREATE INDEX IF NOT EXISTS {name}_changed ON consult.{name}\n"
        "    USING brin (src_lsn int8_minmax_multi_ops)"
        " WITH (pages_per_range = 32, autosummarize = on);\n"
        for name in TABLES
    )
