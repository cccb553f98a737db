"""The part of a consult store's schema that remembers what was written to several stores at once.

It is used in the primary store alone. `content` is there while a branch may be without it.
"""

TWO_PHASE_DDL = """\
CREATE TABLE IF NOT EXISTS sync.two_phase_log (
    id boolean PRIMARY KEY DEFAULT true CHECK (id), last bigint NOT NULL);
CREATE TABLE IF NOT EXISTS sync.two_phase (
    id text COLLATE "C" PRIMARY KEY,
    state text NOT NULL CHECK
        (state IN ('preparing', 'commit', 'abort', 'held', 'committed', 'aborted')),
    reason text NOT NULL DEFAULT '', deadline timestamptz NOT NULL, content json,
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at timestamptz, finished_at timestamptz);
CREATE INDEX IF NOT EXISTS two_phase_unfinished ON sync.two_phase (state)
    WHERE state NOT IN ('committed', 'aborted');
CREATE TABLE IF NOT EXISTS sync.two_phase_branch (
    id text COLLATE "C" REFERENCES sync.two_phase ON DELETE CASCADE, branch text COLLATE "C",
    state text NOT NULL CHECK (state IN ('asked', 'missing', 'done')), done_at timestamptz,
    PRIMARY KEY (id, branch));
"""
