-- What stands for an Oracle's redo log with supplemental logging of all columns, in the PostgreSQL
-- that holds campus C's tables: every row change, in the order of the transactions' commits.
CREATE SCHEMA redo;

CREATE TABLE redo.change (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tx xid8 NOT NULL DEFAULT pg_current_xact_id(),
    op "char" NOT NULL, table_name text NOT NULL, before jsonb, after jsonb,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp());

-- One transaction writes at a time, so that numbers ascend as commits do and none comes late.
CREATE FUNCTION redo.alone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(4401);
    RETURN NULL;
END $$;

CREATE FUNCTION redo.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO redo.change (op, table_name, before, after) VALUES (
        CASE TG_OP WHEN 'INSERT' THEN 'c' WHEN 'UPDATE' THEN 'u' ELSE 'd' END, TG_TABLE_NAME,
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END);
    RETURN NULL;
END $$;

DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT table_name FROM information_schema.tables WHERE table_schema = 'HIS' LOOP
        EXECUTE format('CREATE TRIGGER alone BEFORE INSERT OR UPDATE OR DELETE ON "HIS".%I'
            ' FOR EACH STATEMENT EXECUTE FUNCTION redo.alone()', name);
        EXECUTE format('CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON "HIS".%I'
            ' FOR EACH ROW EXECUTE FUNCTION redo.note()', name);
    END LOOP;
END $$;
