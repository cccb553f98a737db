"""The part of a consult store's schema that says which records are of one person."""

from schemas.entities import TABLES

# A directory's rows are nobody's: there, the column is always null and no secret.
OF_PATIENTS = tuple(t for t in TABLES.values() if t.by_name[t.patient].level > 1)
LAG_S = 300  # Behind this much, a campus's data are named as late: the routine objective.

# `person_record` and `person_link` follow from the patients, the rules and the decisions alone;
# `person_past` is their history; `person_decision` is what people said and is never changed.
_TABLES = """\
CREATE TABLE IF NOT EXISTS sync.person_record (
    campus text COLLATE "C", patient_id text COLLATE "C", person_id text COLLATE "C" NOT NULL,
    own_id text COLLATE "C" NOT NULL, since timestamptz NOT NULL, excluded text,
    record_id text COLLATE "C" NOT NULL, keys bigint[] NOT NULL,
    PRIMARY KEY (campus, patient_id));
CREATE INDEX IF NOT EXISTS person_record_record ON sync.person_record (record_id, campus);
CREATE INDEX IF NOT EXISTS person_record_person ON sync.person_record (person_id);
CREATE INDEX IF NOT EXISTS person_record_own ON sync.person_record (own_id);
CREATE INDEX IF NOT EXISTS person_record_keys ON sync.person_record USING gin (keys)
    WITH (fastupdate = off);
CREATE TABLE IF NOT EXISTS sync.person_past (
    campus text COLLATE "C", patient_id text COLLATE "C", person_id text COLLATE "C" NOT NULL,
    since timestamptz NOT NULL, until timestamptz NOT NULL, why text NOT NULL,
    PRIMARY KEY (campus, patient_id, since));
CREATE INDEX IF NOT EXISTS person_past_person ON sync.person_past (person_id);
CREATE TABLE IF NOT EXISTS sync.person_link (
    campus text COLLATE "C", patient_id text COLLATE "C",
    other_campus text COLLATE "C", other_patient_id text COLLATE "C",
    since timestamptz, until timestamptz, who text NOT NULL, why text NOT NULL,
    score real NOT NULL, evidence jsonb NOT NULL,
    PRIMARY KEY (campus, patient_id, other_campus, other_patient_id, since));
CREATE INDEX IF NOT EXISTS person_link_other
    ON sync.person_link (other_campus, other_patient_id);
CREATE TABLE IF NOT EXISTS sync.person_review (
    review_id text COLLATE "C" PRIMARY KEY,
    campus text COLLATE "C" NOT NULL, patient_id text COLLATE "C" NOT NULL,
    other_campus text COLLATE "C" NOT NULL, other_patient_id text COLLATE "C" NOT NULL,
    why text NOT NULL, score real NOT NULL, evidence jsonb NOT NULL,
    state text NOT NULL CHECK (state IN ('open', 'linked', 'unlinked', 'gone')),
    noted_at timestamptz NOT NULL, settled_at timestamptz);
CREATE INDEX IF NOT EXISTS person_review_open ON sync.person_review (score DESC)
    WHERE state = 'open';
CREATE INDEX IF NOT EXISTS person_review_pair
    ON sync.person_review (campus, patient_id, other_campus, other_patient_id);
CREATE INDEX IF NOT EXISTS person_review_other
    ON sync.person_review (other_campus, other_patient_id);
CREATE TABLE IF NOT EXISTS sync.person_decision (
    decision_id text COLLATE "C" PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('link', 'unlink')),
    campus text COLLATE "C" NOT NULL, patient_id text COLLATE "C" NOT NULL,
    other_campus text COLLATE "C" NOT NULL, other_patient_id text COLLATE "C" NOT NULL,
    who text NOT NULL, why text NOT NULL, decided_us bigint NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT clock_timestamp(), applied boolean NOT NULL DEFAULT false,
    CHECK ((campus, patient_id) < (other_campus, other_patient_id)));
CREATE INDEX IF NOT EXISTS person_decision_pair
    ON sync.person_decision (campus, patient_id, other_campus, other_patient_id);
CREATE TABLE IF NOT EXISTS sync.person_progress (
    campus text COLLATE "C" PRIMARY KEY, lsn bigint NOT NULL, seq integer NOT NULL,
    rules bytea NOT NULL, linked_at timestamptz NOT NULL,
    change bigint NOT NULL DEFAULT 0, incarnation text NOT NULL DEFAULT '');
"""


def _record_view() -> str:
    parts = []
    for table in OF_PATIENTS:
        time = f'r."{table.event_time}"' if table.event_time else "NULL::timestamptz"
        parts.append(
            f"SELECT m.person_id, m.campus, m.patient_id, '{table.name}'::text AS entity,\n"
            f"    r.record_id, {time} AS event_time, r.committed_at, r.security_level\n"
            f"FROM sync.person_record m JOIN consult.{table.name} r\n"
            f'    ON r."{table.patient}" = m.patient_id AND r.campus = m.campus\n'
            "WHERE NOT r.deleted"
        )
    return "CREATE OR REPLACE VIEW consult.person_record AS\n" + "\nUNION ALL\n".join(parts) + ";\n"


def _person_view(lag_s: int) -> str:
    lacking = ",\n        ".join(
        f"CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.{table.name} r\n"
        f'            ON r."{table.patient}" = m.patient_id AND r.campus = m.campus\n'
        f"            WHERE m.person_id = p.person_id AND NOT r.deleted)"
        f" THEN NULL ELSE '{table.name}' END"
        for table in OF_PATIENTS
    )
    return f"""\
CREATE OR REPLACE VIEW consult.person AS
WITH campus_state AS (
    SELECT split_part(link, '>', 1) COLLATE "C" AS campus, max(watermark_us) AS watermark_us
    FROM sync.progress WHERE lane = 'routine' GROUP BY 1)
SELECT p.person_id, p.records, p.campuses,
    ARRAY(SELECT c.campus FROM campus_state c WHERE c.campus <> ALL (p.campuses) ORDER BY 1)
        AS campuses_without_data,
    array_remove(ARRAY[
        {lacking}], NULL) AS entities_lacking,
    ARRAY(SELECT c.campus FROM campus_state c
        WHERE c.watermark_us < extract(epoch FROM now()) * 1000000 - {lag_s * 1_000_000}
        ORDER BY 1) AS campuses_late,
    (SELECT to_timestamp(min(c.watermark_us) / 1000000.0) FROM campus_state c)
        AS complete_until,
    (SELECT count(*) FROM sync.person_review v
        JOIN sync.person_record m ON (m.campus, m.patient_id) IN
            ((v.campus, v.patient_id), (v.other_campus, v.other_patient_id))
        WHERE v.state = 'open' AND m.person_id = p.person_id) AS reviews_open
FROM (SELECT person_id, count(*) AS records, array_agg(DISTINCT campus ORDER BY campus) AS campuses
    FROM sync.person_record GROUP BY person_id) p;
"""


def person_ddl(lag_s: int = LAG_S) -> str:
    """Returns tables and views, idempotent; the consult tables and `sync.progress` are there.

    `consult.person_record` lists every record of every campus for a person; `consult.person`
    says what is missing: campuses that have nothing, entities of which there is no row, campuses
    whose link lags by more than `lag_s`, and pairs that wait for a decision.
    """
    return _TABLES + _record_view() + _person_view(lag_s)
