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
    "remarks" text,
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS visit_parent
    ON consult.visit (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS visit_awaiting
    ON consult.visit (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS medical_order_parent
    ON consult.medical_order (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS medical_order_awaiting
    ON consult.medical_order (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "comparator" text,
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS lab_result_parent
    ON consult.lab_result (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS lab_result_awaiting
    ON consult.lab_result (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS vital_sign_parent
    ON consult.vital_sign (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS vital_sign_awaiting
    ON consult.vital_sign (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS diagnosis_parent
    ON consult.diagnosis (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS diagnosis_awaiting
    ON consult.diagnosis (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS prescription_parent
    ON consult.prescription (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS prescription_awaiting
    ON consult.prescription (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS emr_document_parent
    ON consult.emr_document (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS emr_document_awaiting
    ON consult.emr_document (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
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
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS consultation_parent
    ON consult.consultation (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS consultation_awaiting
    ON consult.consultation (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
CREATE TABLE IF NOT EXISTS consult.lab_report (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "name" text,
    "specimen" text,
    "status" text,
    "priority" text,
    "ordered_by" text,
    "collected_at" timestamptz,
    "reported_at" timestamptz,
    "updated_at" timestamptz,
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS lab_report_patient
    ON consult.lab_report ("patient_id", campus);
CREATE INDEX IF NOT EXISTS lab_report_parent
    ON consult.lab_report (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS lab_report_awaiting
    ON consult.lab_report (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
CREATE TABLE IF NOT EXISTS consult.allergy (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "substance" text,
    "reaction" text,
    "severity" text,
    "verification" text,
    "recorded_by" text,
    "recorded_at" timestamptz,
    "updated_at" timestamptz,
    "parent_ref" text,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS allergy_patient
    ON consult.allergy ("patient_id", campus);
CREATE INDEX IF NOT EXISTS allergy_parent
    ON consult.allergy (parent_ref, campus) WHERE parent_ref IS NOT NULL;
CREATE INDEX IF NOT EXISTS allergy_awaiting
    ON consult.allergy (campus, src_table) WHERE remarks ^@ 'awaiting_parent';
CREATE TABLE IF NOT EXISTS consult.staff (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "staff_no" text,
    "name" text,
    "title" text,
    "role" text,
    "department" text,
    "status" text,
    "updated_at" timestamptz,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS staff_patient
    ON consult.staff ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.department (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "code" text,
    "name" text,
    "kind" text,
    "status" text,
    "updated_at" timestamptz,
    "remarks" text,
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
CREATE INDEX IF NOT EXISTS department_patient
    ON consult.department ("patient_id", campus);
CREATE TABLE IF NOT EXISTS consult.treatment_plan (
    campus text COLLATE "C" NOT NULL,
    record_id text COLLATE "C" NOT NULL,
    "patient_id" text COLLATE "C",
    "visit_no" text,
    "title" text,
    "content" text,
    "author" text,
    "signed_by" text,
    "status" text,
    "participants" text,
    "follow_up" text,
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
CREATE INDEX IF NOT EXISTS treatment_plan_patient
    ON consult.treatment_plan ("patient_id", campus);
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
CREATE INDEX IF NOT EXISTS patient_changed ON consult.patient
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS visit_changed ON consult.visit
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS medical_order_changed ON consult.medical_order
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS lab_result_changed ON consult.lab_result
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS vital_sign_changed ON consult.vital_sign
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS diagnosis_changed ON consult.diagnosis
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS prescription_changed ON consult.prescription
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS emr_document_changed ON consult.emr_document
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS consultation_changed ON consult.consultation
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS lab_report_changed ON consult.lab_report
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS allergy_changed ON consult.allergy
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS staff_changed ON consult.staff
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX IF NOT EXISTS department_changed ON consult.department
    USING brin (src_lsn int8_minmax_multi_ops) WITH (pages_per_range = 32, autosummarize = on);
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
CREATE OR REPLACE VIEW consult.person_record AS
SELECT m.person_id, m.campus, m.patient_id, 'patient'::text AS entity,
    r.record_id, NULL::timestamptz AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.patient r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'visit'::text AS entity,
    r.record_id, r."started_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.visit r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'medical_order'::text AS entity,
    r.record_id, r."ordered_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.medical_order r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'lab_result'::text AS entity,
    r.record_id, r."reported_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.lab_result r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'vital_sign'::text AS entity,
    r.record_id, r."measured_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.vital_sign r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'diagnosis'::text AS entity,
    r.record_id, r."diagnosed_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.diagnosis r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'prescription'::text AS entity,
    r.record_id, r."prescribed_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.prescription r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'emr_document'::text AS entity,
    r.record_id, r."written_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.emr_document r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'consultation'::text AS entity,
    r.record_id, r."requested_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.consultation r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'lab_report'::text AS entity,
    r.record_id, r."reported_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.lab_report r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted
UNION ALL
SELECT m.person_id, m.campus, m.patient_id, 'allergy'::text AS entity,
    r.record_id, r."recorded_at" AS event_time, r.committed_at, r.security_level
FROM sync.person_record m JOIN consult.allergy r
    ON r."patient_id" = m.patient_id AND r.campus = m.campus
WHERE NOT r.deleted;
CREATE OR REPLACE VIEW consult.person AS
WITH campus_state AS (
    SELECT split_part(link, '>', 1) COLLATE "C" AS campus, max(watermark_us) AS watermark_us
    FROM sync.progress WHERE lane = 'routine' GROUP BY 1)
SELECT p.person_id, p.records, p.campuses,
    ARRAY(SELECT c.campus FROM campus_state c WHERE c.campus <> ALL (p.campuses) ORDER BY 1)
        AS campuses_without_data,
    array_remove(ARRAY[
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.patient r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'patient' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.visit r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'visit' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.medical_order r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'medical_order' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.lab_result r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'lab_result' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.vital_sign r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'vital_sign' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.diagnosis r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'diagnosis' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.prescription r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'prescription' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.emr_document r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'emr_document' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.consultation r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'consultation' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.lab_report r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'lab_report' END,
        CASE WHEN EXISTS (SELECT FROM sync.person_record m JOIN consult.allergy r
            ON r."patient_id" = m.patient_id AND r.campus = m.campus
            WHERE m.person_id = p.person_id AND NOT r.deleted) THEN NULL ELSE 'allergy' END], NULL) AS entities_lacking,
    ARRAY(SELECT c.campus FROM campus_state c
        WHERE c.watermark_us < extract(epoch FROM now()) * 1000000 - 300000000
        ORDER BY 1) AS campuses_late,
    (SELECT to_timestamp(min(c.watermark_us) / 1000000.0) FROM campus_state c)
        AS complete_until,
    (SELECT count(*) FROM sync.person_review v
        JOIN sync.person_record m ON (m.campus, m.patient_id) IN
            ((v.campus, v.patient_id), (v.other_campus, v.other_patient_id))
        WHERE v.state = 'open' AND m.person_id = p.person_id) AS reviews_open
FROM (SELECT person_id, count(*) AS records, array_agg(DISTINCT campus ORDER BY campus) AS campuses
    FROM sync.person_record GROUP BY person_id) p;
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
    SELECT (SELECT CASE WHEN t.stamp > t.following THEN setval('sync.hlc', t.stamp) ELSE t.following END
            FROM (SELECT ((w.us / 1000) << 16) | ((w.us % 1000) << 6) AS stamp,
                    nextval('sync.hlc') AS following
                FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
                    + coalesce((SELECT clock_offset_us FROM sync.store), 0) AS us OFFSET 0) AS w OFFSET 0) AS t);
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
    INSERT INTO sync.edit (record_id, table_name, campus, op, actor, hlc, lane, role, editor,
        reason, distrusted, before, after)
    SELECT coalesce(NEW.record_id, OLD.record_id), TG_TABLE_NAME, coalesce(NEW.campus, OLD.campus),
        CASE WHEN NEW.deleted IS NOT FALSE THEN 'D' ELSE left(TG_OP, 1) END::"char",
        s.name || '.' || sync.incarnation_of(d.oid, s.salt), (SELECT CASE WHEN t.stamp > t.following THEN setval('sync.hlc', t.stamp) ELSE t.following END
            FROM (SELECT ((w.us / 1000) << 16) | ((w.us % 1000) << 6) AS stamp,
                    nextval('sync.hlc') AS following
                FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
                    + s.clock_offset_us AS us OFFSET 0) AS w OFFSET 0) AS t), j.lane, j.role,
        coalesce(nullif(current_setting('campus_sync.editor', true), ''), session_user),
        coalesce(current_setting('campus_sync.reason', true), ''), s.distrusted,
        j.before, j.after
    FROM sync.store s, sync.policy p, pg_database d, LATERAL (SELECT
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END AS before,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END AS after,
        coalesce(nullif(current_setting('campus_sync.lane', true), ''), 'routine') AS lane,
        coalesce(current_setting('campus_sync.role', true), '') AS role OFFSET 0) AS j
    WHERE p.table_name = TG_TABLE_NAME AND d.datname = current_database() AND j.lane IN ('emergency', 'routine') AND (j.role = '' OR j.role = ANY (p.roles))
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
    INSERT INTO sync.edit (record_id, table_name, campus, op, actor, hlc, lane, role, editor,
        reason, distrusted, before, after)
    SELECT coalesce(NEW.record_id, OLD.record_id), TG_TABLE_NAME, coalesce(NEW.campus, OLD.campus),
        CASE WHEN NEW.deleted IS NOT FALSE THEN 'D' ELSE left(TG_OP, 1) END::"char",
        s.name || '.' || sync.incarnation_of(d.oid, s.salt), (SELECT CASE WHEN t.stamp > t.following THEN setval('sync.hlc', t.stamp) ELSE t.following END
            FROM (SELECT ((w.us / 1000) << 16) | ((w.us % 1000) << 6) AS stamp,
                    nextval('sync.hlc') AS following
                FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
                    + s.clock_offset_us AS us OFFSET 0) AS w OFFSET 0) AS t), j.lane, j.role,
        coalesce(nullif(current_setting('campus_sync.editor', true), ''), session_user),
        coalesce(current_setting('campus_sync.reason', true), ''), s.distrusted,
        j.before, j.after
    FROM sync.store s, sync.policy p, pg_database d, LATERAL (SELECT
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END AS before,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END AS after,
        coalesce(nullif(current_setting('campus_sync.lane', true), ''), 'routine') AS lane,
        coalesce(current_setting('campus_sync.role', true), '') AS role OFFSET 0) AS j
    WHERE p.table_name = TG_TABLE_NAME AND d.datname = current_database();
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
    ELSIF TG_TABLE_NAME = 'patient' THEN
        UPDATE consult.patient SET version_vector = '{}'
        WHERE record_id = OLD.record_id AND campus = OLD.campus;
    ELSIF TG_TABLE_NAME = 'emr_document' THEN
        UPDATE consult.emr_document SET version_vector = '{}'
        WHERE record_id = OLD.record_id AND campus = OLD.campus;
    ELSIF TG_TABLE_NAME = 'consultation' THEN
        UPDATE consult.consultation SET version_vector = '{}'
        WHERE record_id = OLD.record_id AND campus = OLD.campus;
    ELSIF TG_TABLE_NAME = 'treatment_plan' THEN
        UPDATE consult.treatment_plan SET version_vector = '{}'
        WHERE record_id = OLD.record_id AND campus = OLD.campus;
    END IF;
    session := set_config('campus_sync.session', given.session, true);
    RETURN NULL;
END $$;
ALTER TABLE consult.patient
    ALTER src_table SET DEFAULT '', ALTER src_lsn SET DEFAULT 0, ALTER src_seq SET DEFAULT -1,
    ALTER committed_at SET DEFAULT clock_timestamp(), ALTER hlc SET DEFAULT 0,
    ALTER lane SET DEFAULT 'R', ALTER security_level SET DEFAULT 4,
    ALTER deleted SET DEFAULT false;
CREATE OR REPLACE TRIGGER campus_sync_edit AFTER INSERT OR UPDATE OR DELETE ON consult.patient
    FOR EACH ROW WHEN (current_setting('campus_sync.session', true) IS DISTINCT FROM 'sync'
        OR NOT has_table_privilege('sync.store'::regclass, 'UPDATE'))
    EXECUTE FUNCTION sync.take_edit();
ALTER TABLE consult.emr_document
    ALTER src_table SET DEFAULT '', ALTER src_lsn SET DEFAULT 0, ALTER src_seq SET DEFAULT -1,
    ALTER committed_at SET DEFAULT clock_timestamp(), ALTER hlc SET DEFAULT 0,
    ALTER lane SET DEFAULT 'R', ALTER security_level SET DEFAULT 5,
    ALTER deleted SET DEFAULT false;
CREATE OR REPLACE TRIGGER campus_sync_edit AFTER INSERT OR UPDATE OR DELETE ON consult.emr_document
    FOR EACH ROW WHEN (current_setting('campus_sync.session', true) IS DISTINCT FROM 'sync'
        OR NOT has_table_privilege('sync.store'::regclass, 'UPDATE'))
    EXECUTE FUNCTION sync.take_edit();
ALTER TABLE consult.consultation
    ALTER src_table SET DEFAULT '', ALTER src_lsn SET DEFAULT 0, ALTER src_seq SET DEFAULT -1,
    ALTER committed_at SET DEFAULT clock_timestamp(), ALTER hlc SET DEFAULT 0,
    ALTER lane SET DEFAULT 'R', ALTER security_level SET DEFAULT 5,
    ALTER deleted SET DEFAULT false;
CREATE OR REPLACE TRIGGER campus_sync_edit AFTER INSERT OR UPDATE OR DELETE ON consult.consultation
    FOR EACH ROW WHEN (current_setting('campus_sync.session', true) IS DISTINCT FROM 'sync'
        OR NOT has_table_privilege('sync.store'::regclass, 'UPDATE'))
    EXECUTE FUNCTION sync.take_edit();
ALTER TABLE consult.treatment_plan
    ALTER src_table SET DEFAULT '', ALTER src_lsn SET DEFAULT 0, ALTER src_seq SET DEFAULT -1,
    ALTER committed_at SET DEFAULT clock_timestamp(), ALTER hlc SET DEFAULT 0,
    ALTER lane SET DEFAULT 'R', ALTER security_level SET DEFAULT 5,
    ALTER deleted SET DEFAULT false;
CREATE OR REPLACE TRIGGER campus_sync_edit AFTER INSERT OR UPDATE OR DELETE ON consult.treatment_plan
    FOR EACH ROW WHEN (current_setting('campus_sync.session', true) IS DISTINCT FROM 'sync'
        OR NOT has_table_privilege('sync.store'::regclass, 'UPDATE'))
    EXECUTE FUNCTION sync.take_edit();
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
