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

# Versions by edit: what an edit says of itself stood once in each group that it wrote.
_SAID_AND_WROTE = """\
CROSS JOIN LATERAL (SELECT
        (x.entry - '{values,base,drops,decides,reason,distrusted}'::text[])
        || CASE WHEN x.entry -> 'decides' = 'true' THEN '{"decides": true}' ELSE '{}' END::jsonb
        || CASE WHEN x.entry ->> 'reason' = '' THEN '{}'
            ELSE jsonb_build_object('reason', x.entry -> 'reason') END
        || CASE WHEN x.entry -> 'distrusted' = '[]' THEN '{}'
            ELSE jsonb_build_object('distrusted', x.entry -> 'distrusted') END AS said,
        x.entry - '{dot,hlc,lane,role,editor,decides,reason,distrusted}'::text[] AS wrote) AS s"""
_BY_EDIT_OF_5 = f"""\
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attname = 'entry'
        AND attrelid = to_regclass('sync.version') AND NOT attisdropped)
    THEN RETURN; END IF;
    UPDATE sync.record AS r SET record = jsonb_build_object('seen', r.record -> 'seen', 'edits',
        (SELECT coalesce(jsonb_agg(e.edit ORDER BY (e.edit -> 'dot' ->> 0) COLLATE "C",
            (e.edit -> 'dot' ->> 1)::numeric), '[]')
        FROM (SELECT s.said || jsonb_build_object('wrote',
                jsonb_object_agg(g.key, s.wrote)) AS edit
            FROM jsonb_each(r.record -> 'live') AS g
            CROSS JOIN LATERAL jsonb_array_elements(g.value) AS x(entry)
            {_SAID_AND_WROTE} GROUP BY s.said) AS e))
    WHERE r.record ? 'live';
    CREATE TEMP TABLE version_of_5 ON COMMIT DROP AS
    SELECT x.record_id, x.table_name, x.campus, x.actor, x.counter,
        (array_agg(s.said))[1] || jsonb_build_object('wrote',
            jsonb_object_agg(x.group_name, s.wrote)) AS edit, min(x.met_at) AS met_at
    FROM sync.version AS x {_SAID_AND_WROTE}
    GROUP BY x.record_id, x.table_name, x.campus, x.actor, x.counter;
    DROP TABLE sync.version;
    CREATE TABLE sync.version (
        record_id text COLLATE "C", table_name text COLLATE "C", campus text COLLATE "C",
        actor text COLLATE "C", counter numeric, edit jsonb NOT NULL,
        met_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (record_id, table_name, campus, actor, counter));
    INSERT INTO sync.version TABLE version_of_5;
END $$;
"""

# How far edits by clients were judged and matched, and alarms of an edited row's version. Stores
# of before begin at 0: all that was edited is looked at once.
_JUDGED_OF_5 = """\
ALTER TABLE IF EXISTS sync.quality_progress
    ADD COLUMN IF NOT EXISTS change bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS incarnation text NOT NULL DEFAULT '';
ALTER TABLE IF EXISTS sync.person_progress
    ADD COLUMN IF NOT EXISTS change bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS incarnation text NOT NULL DEFAULT '';
ALTER TABLE IF EXISTS sync.quality_alarm
    ADD COLUMN IF NOT EXISTS version text COLLATE "C" NOT NULL DEFAULT '',
    DROP CONSTRAINT IF EXISTS quality_alarm_pkey,
    ADD PRIMARY KEY (record_id, table_name, campus, rule, lsn, seq, version);
"""

# An edit's number is given where it is folded in, and its row and record are left until then.
_FOLDED_OF_6 = """\
ALTER TABLE IF EXISTS sync.edit DROP COLUMN IF EXISTS counter;
ALTER TABLE IF EXISTS sync.edit SET (toast_tuple_target = 8160);
ALTER TABLE IF EXISTS sync.record ADD COLUMN IF NOT EXISTS taken_from text;
DO $$ BEGIN
    IF to_regclass('sync.record') IS NULL THEN RETURN; END IF;
    DELETE FROM sync.record WHERE record IS NULL AND src_table = '';
    UPDATE sync.record SET seen = record -> 'seen' WHERE seen <> record -> 'seen';
END $$;
"""


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
    Migration(5, _BY_EDIT_OF_5 + _JUDGED_OF_5),
    Migration(6, _FOLDED_OF_6),
)


def pending(version: int) -> tuple[Migration, ...]:
    """Returns what a store of `version` has yet to go through; 0 for one that has no version."""
    return tuple(step for step in MIGRATIONS if step.to > version)
