CREATE SCHEMA IF NOT EXISTS consult;
CREATE SCHEMA IF NOT EXISTS sync;
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
    finished_at timestamptz, PRIMARY KEY (link, lsn));
CREATE TABLE IF NOT EXISTS sync.incident (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, link text NOT NULL, kind text NOT NULL,
    detail text NOT NULL DEFAULT '', state text NOT NULL DEFAULT 'open',
    opened_at timestamptz NOT NULL DEFAULT now(), closed_at timestamptz);
CREATE TABLE IF NOT EXISTS sync.lag (
    link text COLLATE "C", lane text COLLATE "C", window_start timestamptz,
    incarnation text COLLATE "C", sketch bytea STORAGE EXTERNAL NOT NULL, rows bigint NOT NULL,
    late bigint NOT NULL, PRIMARY KEY (link, lane, window_start, incarnation))
    WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS consult.patient (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "name" text,
    "sex" text,
    "birth_date" date,
    "id_no" text,
    "phone" text,
    "abo" text,
    "rh" text,
    "allergies" text,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 90);
CREATE INDEX IF NOT EXISTS patient_patient
    ON consult.patient ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.visit (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "class" text,
    "triage_level" bigint CONSTRAINT visit_triage_level_range CHECK ("triage_level" >= 1 AND "triage_level" <= 4),
    "pathway" text,
    "department" text,
    "bed" text,
    "status" text,
    "started_at" timestamptz,
    "ended_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS visit_patient
    ON consult.visit ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.medical_order (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "item_code" text,
    "item_name" text,
    "priority" text,
    "status" text,
    "ordered_by" text,
    "ordered_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS medical_order_patient
    ON consult.medical_order ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.lab_result (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "item_code" text,
    "item_name" text,
    "value" numeric,
    "value_text" text,
    "unit" text,
    "raw_value" text,
    "raw_unit" text,
    "reference_low" numeric,
    "reference_high" numeric,
    "flag" text,
    "critical" boolean,
    "status" text,
    "collected_at" timestamptz,
    "reported_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS lab_result_patient
    ON consult.lab_result ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.vital_sign (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "temperature_cel" numeric CONSTRAINT vital_sign_temperature_cel_range CHECK ("temperature_cel" >= 10 AND "temperature_cel" <= 50),
    "pulse_per_min" bigint CONSTRAINT vital_sign_pulse_per_min_range CHECK ("pulse_per_min" >= 0 AND "pulse_per_min" <= 300),
    "respiration_per_min" bigint CONSTRAINT vital_sign_respiration_per_min_range CHECK ("respiration_per_min" >= 0 AND "respiration_per_min" <= 150),
    "systolic_mmhg" bigint CONSTRAINT vital_sign_systolic_mmhg_range CHECK ("systolic_mmhg" >= 0 AND "systolic_mmhg" <= 400),
    "diastolic_mmhg" bigint CONSTRAINT vital_sign_diastolic_mmhg_range CHECK ("diastolic_mmhg" >= 0 AND "diastolic_mmhg" <= 300),
    "spo2_percent" bigint CONSTRAINT vital_sign_spo2_percent_range CHECK ("spo2_percent" >= 0 AND "spo2_percent" <= 100),
    "gcs" bigint CONSTRAINT vital_sign_gcs_range CHECK ("gcs" >= 3 AND "gcs" <= 15),
    "measured_at" timestamptz,
    "device" text,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 90);
CREATE INDEX IF NOT EXISTS vital_sign_patient
    ON consult.vital_sign ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.diagnosis (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "code" text,
    "name" text,
    "type" text,
    "is_primary" boolean,
    "diagnosed_by" text,
    "diagnosed_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 90);
CREATE INDEX IF NOT EXISTS diagnosis_patient
    ON consult.diagnosis ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.prescription (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "prescription_no" text,
    "line_no" bigint,
    "drug_code" text,
    "drug_name" text,
    "dose" numeric CONSTRAINT prescription_dose_range CHECK ("dose" >= 0),
    "dose_unit" text,
    "route" text,
    "frequency" text,
    "days" bigint,
    "status" text,
    "prescribed_by" text,
    "prescribed_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS prescription_patient
    ON consult.prescription ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.emr_document (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "type" text,
    "title" text,
    "author" text,
    "signed_by" text,
    "status" text,
    "content" text,
    "written_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS emr_document_patient
    ON consult.emr_document ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.consultation (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "urgency" text,
    "purpose" text,
    "requested_department" text,
    "requested_by" text,
    "consultant" text,
    "opinion" text,
    "status" text,
    "requested_at" timestamptz,
    "arrived_at" timestamptz,
    "answered_at" timestamptz,
    "updated_at" timestamptz,
    src_table text NOT NULL,
    src_lsn bigint NOT NULL,
    src_seq integer NOT NULL,
    committed_at timestamptz NOT NULL,
    hlc bigint NOT NULL,
    lane "char" NOT NULL,
    security_level smallint NOT NULL,
    digest bytea STORAGE PLAIN,
    deleted boolean NOT NULL,
    version_vector jsonb,
    PRIMARY KEY (record_id, campus)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS consultation_patient
    ON consult.consultation ("patient_id", campus);
