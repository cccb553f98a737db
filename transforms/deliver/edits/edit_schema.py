"""The part of a consult store's schema by which any SQL client edits it (ADR 0019)."""

from schemas.conflict_policy import ALL_TABLES, EDITED_AT_STORES
from schemas.tables import Table

EDITED_TABLES: tuple[Table, ...] = tuple(ALL_TABLES[name] for name in EDITED_AT_STORES)
# The session setting by which the sync's own sessions say who they are. It is believed of those
# alone who may write to sync.store, which no client may.
SESSION_SETTING = "campus_sync.session"
OWN_SESSION = f"SET {SESSION_SETTING} = 'sync'"

# Whether clients have edited a row; the row alone tells. For `format`: the row's alias, or nothing.
EDITED = "({0}version_vector IS NOT NULL OR {0}src_seq < 0)"
# What a client need not give when it creates a record: it stands nowhere in a source's log. Until
# the edit is folded in, `src_seq` says that no source's row may be written over it.
_DEFAULTS = """\
ALTER TABLE consult.{name}
    ALTER src_table SET DEFAULT '', ALTER src_lsn SET DEFAULT 0, ALTER src_seq SET DEFAULT -1,
    ALTER committed_at SET DEFAULT clock_timestamp(), ALTER hlc SET DEFAULT 0,
    ALTER lane SET DEFAULT 'R', ALTER security_level SET DEFAULT {level},
    ALTER deleted SET DEFAULT false;
"""
# AFTER alone: beside a row trigger BEFORE, COPY inserts row by row and UPDATE locks each row
# first, and the sync's own writes would pay for that.
_TRIGGER = """\
CREATE OR REPLACE TRIGGER campus_sync_edit AFTER INSERT OR UPDATE OR DELETE ON consult.{name}
    FOR EACH ROW WHEN (current_setting('campus_sync.session', true) IS DISTINCT FROM 'sync'
        OR NOT has_table_privilege('sync.store'::regclass, 'UPDATE'))
    EXECUTE FUNCTION sync.take_edit();
"""

_TABLES = """\
CREATE TABLE IF NOT EXISTS sync.store (
    id boolean PRIMARY KEY DEFAULT true CHECK (id), name text NOT NULL,
    change bigint NOT NULL DEFAULT 0, salt integer NOT NULL DEFAULT 0,
    clock_offset_us bigint NOT NULL DEFAULT 0, distrusted text[] NOT NULL DEFAULT '{}',
    rules bytea NOT NULL, policies text) WITH (fillfactor = 10);
CREATE TABLE IF NOT EXISTS sync.policy (
    table_name text COLLATE "C" PRIMARY KEY, editable text[] NOT NULL, created boolean NOT NULL,
    archived_column text, archived_values text[] NOT NULL, roles text[] NOT NULL);
CREATE SEQUENCE IF NOT EXISTS sync.hlc;
CREATE TABLE IF NOT EXISTS sync.edit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record_id text COLLATE "C" NOT NULL, table_name text COLLATE "C" NOT NULL,
    campus text COLLATE "C" NOT NULL, op "char" NOT NULL, actor text NOT NULL,
    hlc bigint NOT NULL, lane text NOT NULL, role text NOT NULL,
    editor text NOT NULL, reason text NOT NULL, distrusted text[] NOT NULL,
    before jsonb, after jsonb) WITH (toast_tuple_target = 8160);
CREATE INDEX IF NOT EXISTS edit_record ON sync.edit (record_id, table_name, campus);
CREATE INDEX IF NOT EXISTS edit_urgent ON sync.edit (id) WHERE lane = 'emergency';
CREATE TABLE IF NOT EXISTS sync.record (
    record_id text COLLATE "C", table_name text COLLATE "C", campus text COLLATE "C",
    src_table text NOT NULL DEFAULT '', seen jsonb NOT NULL, record jsonb, change bigint,
    urgent boolean NOT NULL DEFAULT false, taken_from text,
    PRIMARY KEY (record_id, table_name, campus)) WITH (fillfactor = 70);
CREATE INDEX IF NOT EXISTS record_change ON sync.record (change);
CREATE INDEX IF NOT EXISTS record_urgent ON sync.record (change) WHERE urgent;
CREATE INDEX IF NOT EXISTS record_campus ON sync.record (campus, table_name, src_table);
CREATE TABLE IF NOT EXISTS sync.version (
    record_id text COLLATE "C", table_name text COLLATE "C", campus text COLLATE "C",
    actor text COLLATE "C", counter numeric, edit jsonb NOT NULL,
    met_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (record_id, table_name, campus, actor, counter));
CREATE TABLE IF NOT EXISTS sync.conflict (
    id text COLLATE "C" PRIMARY KEY, record_id text NOT NULL, table_name text NOT NULL,
    campus text NOT NULL, group_name text NOT NULL, rule text NOT NULL, alarm text NOT NULL,
    assignee text NOT NULL, versions integer NOT NULL,
    state text NOT NULL CHECK (state IN ('open', 'settled', 'closed')),
    opened_at timestamptz NOT NULL DEFAULT now(), closed_at timestamptz);
CREATE INDEX IF NOT EXISTS conflict_open ON sync.conflict (state) WHERE state <> 'closed';
CREATE INDEX IF NOT EXISTS conflict_record ON sync.conflict (record_id, table_name, campus);
CREATE TABLE IF NOT EXISTS sync.exchange (
    peer text COLLATE "C", lane text COLLATE "C", incarnation text NOT NULL,
    change bigint NOT NULL, received bigint NOT NULL DEFAULT 0, learned bigint NOT NULL DEFAULT 0,
    lag_us bigint NOT NULL DEFAULT 0, lag_us_max bigint NOT NULL DEFAULT 0,
    moved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (peer, lane)) WITH (fillfactor = 50);
"""

# The hybrid logical clock of schemas/hlc.py. A sequence never goes back with a transaction and is
# not held until the end of one, so clients do not wait for each other.
_TICK = """\
(SELECT CASE WHEN t.stamp > t.following THEN setval('sync.hlc', t.stamp) ELSE t.following END
            FROM (SELECT ((w.us / 1000) << 16) | ((w.us % 1000) << 6) AS stamp,
                    nextval('sync.hlc') AS following
                FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
                    + {offset} AS us OFFSET 0) AS w OFFSET 0) AS t)"""

_FUNCTIONS = """\
CREATE OR REPLACE FUNCTION sync.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'campus-sync: %.% is history and is only added to',
        TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = '42501';
END $$;
CREATE OR REPLACE TRIGGER campus_sync_history BEFORE UPDATE OR DELETE ON sync.version
    FOR EACH STATEMENT EXECUTE FUNCTION sync.refuse_change();

-- Another one whenever the store may have gone back to a backup: a copy always runs in another
-- server process or under another oid. salt: for tables that were restored by hand. Both are
-- given, so that it becomes part of the statement that calls it.
CREATE OR REPLACE FUNCTION sync.incarnation_of(oid, integer) RETURNS text LANGUAGE sql STABLE
AS $$
    SELECT substr(md5(concat_ws('/', $1,
        (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint, $2)), 1, 10);
$$;
CREATE OR REPLACE FUNCTION sync.incarnation() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT sync.incarnation_of((SELECT oid FROM pg_database WHERE datname = current_database()),
        (SELECT salt FROM sync.store));
$$;
CREATE OR REPLACE FUNCTION sync.wall_us() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
        + coalesce((SELECT clock_offset_us FROM sync.store), 0);
$$;
CREATE OR REPLACE FUNCTION sync.tick() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT {ticked};
$$;

CREATE OR REPLACE FUNCTION sync.refuse_edit(what text, remedy text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'campus-sync: %', what
        USING HINT = 'Remedy: ' || remedy, ERRCODE = 'raise_exception';
END $$;

CREATE OR REPLACE FUNCTION sync.check_edit(
    op text, policy sync.policy, before jsonb, after jsonb, what text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    own constant text[] := ARRAY['src_table', 'src_lsn', 'src_seq', 'committed_at', 'hlc', 'lane',
        'security_level', 'digest', 'version_vector'];
    changed text[];
    wrong text;
BEGIN
    IF op = 'INSERT' THEN
        IF NOT policy.created THEN
            PERFORM sync.refuse_edit(what || ' is created by the campus''s own system alone',
                'register it there; it arrives here by itself.');
        ELSIF after ->> 'src_table' <> '' OR (after ->> 'src_lsn')::bigint <> 0
            OR (after ->> 'src_seq')::bigint <> -1 OR after ->> 'version_vector' IS NOT NULL
            OR (after ->> 'deleted')::boolean THEN
            PERFORM sync.refuse_edit('a client gives ' || what || ' a place in a source''s log',
                'leave out src_table, src_lsn, src_seq, version_vector and deleted.');
        END IF;
        RETURN;
    END IF;
    IF (before ->> 'deleted')::boolean THEN
        PERFORM sync.refuse_edit(what || ' is deleted and cannot be changed',
            'add `AND NOT deleted` to the WHERE; to bring it back, a person decides.');
    END IF;
    IF before ->> policy.archived_column = ANY (policy.archived_values) THEN
        PERFORM sync.refuse_edit(what || ' is archived and is not changed any more',
            'write a new one, or have a person decide by `campus-sync conflicts resolve`.');
    END IF;
    IF op = 'DELETE' THEN
        IF NOT policy.created THEN
            PERFORM sync.refuse_edit(what || ' is removed by the campus''s own system alone',
                'remove it there.');
        END IF;
        RETURN;
    END IF;
    changed := ARRAY(SELECT o.key FROM jsonb_each(before) o
        WHERE o.value IS DISTINCT FROM after -> o.key AND o.key <> 'deleted' ORDER BY o.key);
    wrong := (SELECT string_agg(name, ', ') FROM unnest(changed) name
        WHERE name <> ALL (policy.editable));
    IF wrong IS NOT NULL AND changed && ARRAY['campus', 'record_id'] THEN
        PERFORM sync.refuse_edit('the key of ' || what || ' is changed',
            'delete it and insert another one.');
    ELSIF wrong IS NOT NULL AND changed && own THEN
        PERFORM sync.refuse_edit(wrong || ' of ' || what || ' are the sync''s own',
            'leave them out of the SET list.');
    ELSIF wrong IS NOT NULL THEN
        PERFORM sync.refuse_edit(wrong || ' of ' || what || ' has one writer, which is not here',
            'edit only ' || array_to_string(policy.editable, ', ')
            || '; the rest changes in the campus''s own system.');
    ELSIF (after ->> 'deleted')::boolean AND changed <> '{}' THEN
        PERFORM sync.refuse_edit(what || ' is changed and deleted at once',
            'do one after the other.');
    ELSIF (after ->> 'deleted')::boolean AND NOT policy.created THEN
        PERFORM sync.refuse_edit(what || ' is removed by the campus''s own system alone',
            'remove it there.');
    END IF;
END $$;

-- The usual edit of a single row is noted by one statement, which passes over all that is not
-- plainly allowed: in each transaction PL/pgSQL prepares anew every expression and statement that
-- it comes by, which costs more than most of them do. Which version an edit is, and what its row
-- shows then, is settled where it is folded in.
CREATE OR REPLACE FUNCTION sync.take_edit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET TimeZone = 'UTC' AS $$
DECLARE
    own constant text[] := ARRAY['src_table', 'src_lsn', 'src_seq', 'committed_at', 'hlc', 'lane',
        'security_level', 'digest', 'version_vector'];
    target text;
    before jsonb;
    after jsonb;
    session text;
    given record;
BEGIN
    {note} AND j.lane IN ('emergency', 'routine') AND (j.role = '' OR j.role = ANY (p.roles))
        AND CASE TG_OP
            WHEN 'INSERT' THEN p.created AND NEW.src_table = '' AND NEW.src_lsn = 0
                AND NEW.src_seq = -1 AND NEW.version_vector IS NULL AND NOT NEW.deleted
            WHEN 'UPDATE' THEN OLD.version_vector IS NOT NULL AND NOT OLD.deleted
                AND NOT NEW.deleted AND j.before - p.editable = j.after - p.editable
                AND j.before <> j.after AND (p.archived_column IS NULL
                    OR coalesce(j.before ->> p.archived_column, '') <> ALL (p.archived_values))
            ELSE false END;
    IF FOUND THEN RETURN NULL; END IF;

    target := format('%I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME);
    IF NOT EXISTS (SELECT FROM sync.store) THEN
        -- Rows laid by hand by whoever owns the store, before it takes part in anything.
        IF NOT has_table_privilege(session_user, 'sync.store', 'UPDATE') THEN
            PERFORM sync.refuse_edit('this consult store is not open for edits yet',
                'start `campus-sync run` once: it gives the store its name and its policies.');
        ELSIF TG_OP = 'INSERT' AND NEW.src_seq < 0 THEN
            EXECUTE format('UPDATE %s SET src_seq = 0 WHERE record_id = $1 AND campus = $2', target)
                USING NEW.record_id, NEW.campus;
        END IF;
        RETURN NULL;
    END IF;
    before := to_jsonb(OLD);
    after := to_jsonb(NEW);
    IF TG_OP = 'UPDATE' AND before = after THEN RETURN NULL; END IF;
    SELECT p.roles, s.lane, s.role, s.session INTO given
    FROM (SELECT coalesce(nullif(current_setting('campus_sync.lane', true), ''), 'routine') AS lane,
            coalesce(current_setting('campus_sync.role', true), '') AS role,
            coalesce(current_setting('campus_sync.session', true), '') AS session) AS s
        LEFT JOIN sync.policy p ON p.table_name = TG_TABLE_NAME;
    IF TG_OP = 'DELETE' AND OLD.deleted THEN  -- It stays, as what it is.
        session := set_config('campus_sync.session', 'sync', true);
        EXECUTE format('INSERT INTO %s SELECT ($1).*', target) USING OLD;
        session := set_config('campus_sync.session', given.session, true);
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE' AND before - own = after - own
        AND has_table_privilege(session_user, 'sync.store', 'UPDATE')
    THEN RETURN NULL; END IF;
    PERFORM sync.check_edit(TG_OP, p, before, after, 'this row of ' || TG_TABLE_NAME)
    FROM sync.policy p WHERE p.table_name = TG_TABLE_NAME;
    IF given.lane NOT IN ('emergency', 'routine') THEN
        PERFORM sync.refuse_edit('campus_sync.lane is neither emergency nor routine',
            'SET campus_sync.lane = ''emergency'', or leave it out.');
    ELSIF given.role <> '' AND given.role <> ALL (given.roles) THEN
        PERFORM sync.refuse_edit('campus_sync.role is no role',
            'SET campus_sync.role to one of ' || array_to_string(given.roles, ', ') || '.');
    END IF;
    {note};
    IF TG_OP = 'INSERT' THEN RETURN NULL; END IF;

    -- What follows is the sync's own. (CREATE FUNCTION .. SET would need a superuser.)
    session := set_config('campus_sync.session', 'sync', true);
    IF OLD.version_vector IS NULL THEN  -- From now on links join what the row's source says.
        INSERT INTO sync.record (record_id, table_name, campus, src_table, seen)
        VALUES (OLD.record_id, TG_TABLE_NAME, OLD.campus, OLD.src_table, '{}')
        ON CONFLICT DO NOTHING;
    END IF;
    IF TG_OP = 'DELETE' AND OLD.src_table <> '' THEN  -- It stays as a guard of its key.
        EXECUTE format('INSERT INTO %s SELECT (jsonb_populate_record($1, $2)).*', target)
            USING OLD, jsonb_build_object('deleted', true,
                'version_vector', coalesce(OLD.version_vector, '{}'));
    ELSIF TG_OP = 'UPDATE' AND NEW.deleted AND OLD.src_table = '' THEN
        EXECUTE format('DELETE FROM %s WHERE record_id = $1 AND campus = $2', target)
            USING OLD.record_id, OLD.campus;
    ELSIF TG_OP = 'DELETE' OR OLD.version_vector IS NOT NULL THEN
        NULL;
    {marked}END IF;
    session := set_config('campus_sync.session', given.session, true);
    RETURN NULL;
END $$;
"""


# What a client did, who, when: where the store is open. What uses it may add to the WHERE.
_NOTE = """\
INSERT INTO sync.edit (record_id, table_name, campus, op, actor, hlc, lane, role, editor,
        reason, distrusted, before, after)
    SELECT coalesce(NEW.record_id, OLD.record_id), TG_TABLE_NAME, coalesce(NEW.campus, OLD.campus),
        CASE WHEN NEW.deleted IS NOT FALSE THEN 'D' ELSE left(TG_OP, 1) END::"char",
        s.name || '.' || sync.incarnation_of(d.oid, s.salt), {tick}, j.lane, j.role,
        coalesce(nullif(current_setting('campus_sync.editor', true), ''), session_user),
        coalesce(current_setting('campus_sync.reason', true), ''), s.distrusted,
        j.before, j.after
    FROM sync.store s, sync.policy p, pg_database d, LATERAL (SELECT
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END AS before,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END AS after,
        coalesce(nullif(current_setting('campus_sync.lane', true), ''), 'routine') AS lane,
        coalesce(current_setting('campus_sync.role', true), '') AS role OFFSET 0) AS j
    WHERE p.table_name = TG_TABLE_NAME AND d.datname = current_database()"""
# A statement of its own for each table: what is put together at each edit is planned at each.
_MARKED = """\
ELSIF TG_TABLE_NAME = '{name}' THEN
        UPDATE consult.{name} SET version_vector = '{{}}'
        WHERE record_id = OLD.record_id AND campus = OLD.campus;
    """


def edit_ddl() -> str:
    """Returns the tables of edits and records, the clock and the trigger: idempotent.

    `sync.store` is empty until `open_store` names the store; until then only its
    owner may write to the tables, unstamped.
    """
    tables = "".join(
        _DEFAULTS.format(name=table.name, level=table.level) + _TRIGGER.format(name=table.name)
        for table in EDITED_TABLES
    )
    parts = {
        "{note}": _NOTE.format(tick=_TICK.format(offset="s.clock_offset_us")),
        "{marked}": "".join(_MARKED.format(name=table.name) for table in EDITED_TABLES),
        "{ticked}": _TICK.format(offset="coalesce((SELECT clock_offset_us FROM sync.store), 0)"),
    }
    functions = _FUNCTIONS
    for place, part in parts.items():
        functions = functions.replace(place, part)
    return f"{_TABLES}{functions}{tables}"
