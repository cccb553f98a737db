"""The schema of a consult store, derived from the canonical tables: DDL, versions, upgrades."""

import functools

import psycopg

from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.store_tables import STORE_TABLES
from schemas.tables import POSTGRES_TYPES, Column, Table
from transforms.deliver.edits.edit_schema import edit_ddl
from transforms.deliver.judging.person_schema import person_ddl
from transforms.deliver.judging.quality_schema import QUALITY_DDL, changed_ddl
from transforms.deliver.store_migrations import MIGRATIONS, pending
from transforms.deliver.two_phase_schema import TWO_PHASE_DDL

SCHEMA_VERSION = MIGRATIONS[-1].to

# After the entity's columns in every consult table: name, PostgreSQL type, suffix.
SYNC_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("src_table", "text", "NOT NULL"),
    ("src_lsn", "bigint", "NOT NULL"),
    ("src_seq", "integer", "NOT NULL"),
    ("committed_at", "timestamptz", "NOT NULL"),
    ("hlc", "bigint", "NOT NULL"),
    ("lane", '"char"', "NOT NULL"),
    ("security_level", "smallint", "NOT NULL"),
    # 32 bytes that neither compress nor move out of line: PLAIN spares the attempt.
    ("digest", "bytea STORAGE PLAIN", ""),
    ("deleted", "boolean", "NOT NULL"),
    ("version_vector", "jsonb", ""),
)

# Those that a delivery writes; the version vector is of rows that clients have edited.
DELIVERED_SYNC_COLUMNS = tuple(part for part in SYNC_COLUMNS if part[0] != "version_vector")

# Rows with a life cycle (preliminary to final, active to completed) get a second version soon
# after the first, and those of one report together: half a page of room lets it stay there and
# leave both indexes alone (HOT), which halves the price of an update. Other rows are corrected
# now and then. Numbers: tests/benchmarks/test_deliver.py.
_FILLFACTOR_LIFE_CYCLE = 50
_FILLFACTOR = 90

_ADVISORY_LOCK = 0x63616D70  # "camp": one session at a time creates or upgrades a store.
# An upgrade that waits for a forgotten transaction would keep every reader waiting behind it.
_PATIENCE = "SET LOCAL lock_timeout = '30s'"
_SET_VERSION = """\
INSERT INTO sync.schema_version (version) VALUES (%s)
ON CONFLICT (id) DO UPDATE SET version = excluded.version, upgraded_at = now()"""

_SYNC_TABLES = """\
CREATE TABLE IF NOT EXISTS sync.schema_version (
    id boolean PRIMARY KEY DEFAULT true CHECK (id),
    version integer NOT NULL,
    upgraded_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS sync.progress (
    link text COLLATE "C", lane text COLLATE "C",
    lsn bigint NOT NULL, seq integer NOT NULL,
    captured bigint NOT NULL, delivered bigint NOT NULL, duplicates bigint NOT NULL,
    superseded bigint NOT NULL, held bigint NOT NULL, dead bigint NOT NULL,
    swept bigint NOT NULL, commit_us bigint NOT NULL, watermark_us bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (link, lane),
    CONSTRAINT progress_law CHECK (captured = delivered + duplicates + superseded + held + dead)
) WITH (fillfactor = 10);
CREATE TABLE IF NOT EXISTS sync.island (
    link text COLLATE "C", lane text COLLATE "C",
    begin_lsn bigint, begin_seq integer, end_lsn bigint NOT NULL, end_seq integer NOT NULL,
    PRIMARY KEY (link, lane, begin_lsn, begin_seq)) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.sweep (
    link text COLLATE "C", src_table text COLLATE "C", lsn bigint NOT NULL,
    PRIMARY KEY (link, src_table));
CREATE TABLE IF NOT EXISTS sync.published (
    link text COLLATE "C", src_table text COLLATE "C", identity text NOT NULL,
    PRIMARY KEY (link, src_table));
CREATE TABLE IF NOT EXISTS sync.manifest (
    link text COLLATE "C", lane text COLLATE "C", table_name text COLLATE "C",
    window_start timestamptz,
    source_count bigint NOT NULL, source_digest bytea STORAGE PLAIN NOT NULL,
    store_count bigint NOT NULL, store_digest bytea STORAGE PLAIN NOT NULL,
    PRIMARY KEY (link, lane, table_name, window_start)) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.dead_letter (
    letter_id text COLLATE "C" PRIMARY KEY, link text NOT NULL, lane text NOT NULL,
    src_table text NOT NULL, lsn bigint NOT NULL, seq integer NOT NULL, op "char" NOT NULL,
    committed_at timestamptz NOT NULL, reason text NOT NULL, column_name text NOT NULL,
    key_id text NOT NULL, sealed bytea STORAGE EXTERNAL NOT NULL,
    state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'replayed')),
    created_at timestamptz NOT NULL DEFAULT now(), replayed_at timestamptz);
CREATE TABLE IF NOT EXISTS sync.hold (
    id text COLLATE "C" PRIMARY KEY, link text NOT NULL, kind text NOT NULL,
    src_table text NOT NULL, lsn bigint NOT NULL, seq integer NOT NULL,
    state text NOT NULL DEFAULT 'open', noted_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS sync.escalation (
    campus text COLLATE "C", patient_id text COLLATE "C", rule text NOT NULL,
    lsn bigint NOT NULL, seq integer NOT NULL, open boolean NOT NULL,
    PRIMARY KEY (campus, patient_id)) WITH (fillfactor = 70);
CREATE TABLE IF NOT EXISTS sync.snapshot (
    link text COLLATE "C", lsn bigint, state text NOT NULL CHECK (state IN ('running', 'done')),
    reason text NOT NULL, started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz, view_lsn bigint, last_seq integer NOT NULL DEFAULT 0,
    rows_read bigint NOT NULL DEFAULT 0, rows_estimated bigint, read_at timestamptz,
    resumes integer NOT NULL DEFAULT 0, resumed_at timestamptz,
    resumed_rows bigint NOT NULL DEFAULT 0, PRIMARY KEY (link, lsn));
CREATE TABLE IF NOT EXISTS sync.snapshot_part (
    link text COLLATE "C", lsn bigint, seq integer, src_table text NOT NULL,
    ended boolean NOT NULL, behind jsonb NOT NULL, rows bigint NOT NULL,
    PRIMARY KEY (link, lsn, seq));
CREATE TABLE IF NOT EXISTS sync.reread (
    link text COLLATE "C", span text COLLATE "C",
    phase text NOT NULL CHECK (phase IN ('rows', 'gone', 'done')),
    behind jsonb NOT NULL, tally jsonb NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT now(), noted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (link, span)) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.unknown_code (
    campus text COLLATE "C", code_list text COLLATE "C", code text COLLATE "C",
    src_table text COLLATE "C", column_name text COLLATE "C", seen bigint NOT NULL,
    first_at timestamptz NOT NULL DEFAULT now(), last_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (campus, code_list, code, src_table, column_name));
CREATE TABLE IF NOT EXISTS sync.incident (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, link text NOT NULL, kind text NOT NULL,
    detail text NOT NULL DEFAULT '', state text NOT NULL DEFAULT 'open',
    opened_at timestamptz NOT NULL DEFAULT now(), closed_at timestamptz);
CREATE TABLE IF NOT EXISTS sync.lag (
    link text COLLATE "C", lane text COLLATE "C", window_start timestamptz,
    incarnation text COLLATE "C", sketch bytea STORAGE EXTERNAL NOT NULL, rows bigint NOT NULL,
    late bigint NOT NULL, PRIMARY KEY (link, lane, window_start, incarnation))
    WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.anchor (
    link text COLLATE "C" PRIMARY KEY, lsn bigint NOT NULL, gtid text NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now()) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS sync.log_rate (
    source text COLLATE "C" PRIMARY KEY, units_per_s double precision NOT NULL,
    measured_at timestamptz NOT NULL) WITH (fillfactor = 50);
"""


def _check(table: Table, column: Column) -> str:
    name = quoted(column.name)
    bounds = []
    if column.min is not None:
        bounds.append(f"{name} >= {column.min:g}")
    if column.max is not None:
        bounds.append(f"{name} <= {column.max:g}")
    if not bounds:
        return ""
    constraint = constraint_name(table.name, column.name)
    return f" CONSTRAINT {constraint} CHECK ({' AND '.join(bounds)})"


def quoted(name: str) -> str:
    """Returns `name` as an SQL identifier; canonical names are plain but may be key words."""
    return f'"{name}"'


def constraint_name(table: str, column: str) -> str:
    """Returns the name of the CHECK of a column's plausible range: names it in an error."""
    return f"{table}_{column}_range"


def table_ddl(table: Table) -> str:
    """Returns the statements that create one consult table and its index, if absent.

    The only second index is by patient, which every consultation reads by; its price is in
    `tests/benchmarks/test_deliver.py`.
    """
    lines = ['campus text COLLATE "C" NOT NULL', 'record_id text COLLATE "C" NOT NULL']
    for column in table.columns:
        collate = ' COLLATE "C"' if column.name == table.patient else ""
        kind = POSTGRES_TYPES[column.kind]
        lines.append(f"{quoted(column.name)} {kind}{collate}{_check(table, column)}")
    lines += [f"{name} {kind} {suffix}".rstrip() for name, kind, suffix in SYNC_COLUMNS]
    # record_id leads: it tells rows apart at its first bytes, where campus never does.
    lines.append("PRIMARY KEY (record_id, campus)")
    body = ",\n    ".join(lines)
    fillfactor = _FILLFACTOR_LIFE_CYCLE if "status" in table.by_name else _FILLFACTOR
    return (
        f"CREATE TABLE IF NOT EXISTS consult.{table.name} (\n    {body}\n"
        f") WITH (fillfactor = {fillfactor});\n"
        f"CREATE INDEX IF NOT EXISTS {table.name}_patient\n"
        f"    ON consult.{table.name} ({quoted(table.patient)}, campus);\n"
        f"{_family_ddl(table)}"
    )


def _family_ddl(table: Table) -> str:
    """Indexes over rows that refer to a parent, which cost nothing where there are none."""
    if "parent_ref" not in table.by_name:
        return ""
    return (
        f"CREATE INDEX IF NOT EXISTS {table.name}_parent\n"
        f"    ON consult.{table.name} (parent_ref, campus) WHERE parent_ref IS NOT NULL;\n"
        f"CREATE INDEX IF NOT EXISTS {table.name}_awaiting\n"
        f"    ON consult.{table.name} (campus, src_table) WHERE remarks ^@ 'awaiting_parent';\n"
    )


@functools.cache
def store_ddl() -> str:
    """Returns the whole DDL of a consult store: deterministic, idempotent, one text."""
    tables = "".join(table_ddl(table) for table in (*TABLES.values(), *STORE_TABLES.values()))
    return (
        f"CREATE SCHEMA IF NOT EXISTS consult;\nCREATE SCHEMA IF NOT EXISTS sync;\n"
        f"{_SYNC_TABLES}{tables}{QUALITY_DDL}{changed_ddl()}{person_ddl()}{edit_ddl()}"
        f"{TWO_PHASE_DDL}"
    )


def ensure(conn: psycopg.Connection) -> None:
    """Makes the store one of this version: creates it, or upgrades it in place.

    Commits; all or nothing. Safe to call at once from many sessions: one does the work and the
    others wait for it. Leaves a store of this version untouched.

    Raises:
      ConfigError: the store is of a newer version; nothing was changed.
      psycopg.OperationalError: somebody kept its tables locked; nothing was changed, try again.
    """
    with conn.transaction():
        if _version(conn) == SCHEMA_VERSION:
            return
        conn.execute("SELECT pg_advisory_xact_lock(%s)", (_ADVISORY_LOCK,))
        version = _version(conn)
        if version == SCHEMA_VERSION:
            return
        conn.execute(_PATIENCE)
        if version is not None:
            for step in pending(version):
                conn.execute(step.statements.encode())
        conn.execute(store_ddl().encode())
        conn.execute(_SET_VERSION, (SCHEMA_VERSION,))


def _version(conn: psycopg.Connection) -> int | None:
    """Returns the store's version: 0 if it has none although it is there, None for no store."""
    known = conn.execute("SELECT to_regclass('sync.schema_version') IS NOT NULL").fetchone()
    if not known[0]:
        return None
    row = conn.execute("SELECT version FROM sync.schema_version").fetchone()
    version = 0 if row is None else row[0]
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"the store's schema is version {version}, this software knows {SCHEMA_VERSION}. "
            "Remedy: install the newer campus-sync that upgraded it, on every host that runs links "
            "to this store; a store is never taken back to an older version."
        )
    return version
