-- A campus's source database, in the shape of a modern Chinese HIS, LIS and EMR.
CREATE SCHEMA his;
CREATE SCHEMA lis;
CREATE SCHEMA emr;

CREATE TABLE his.patient (
    pid bigint PRIMARY KEY, mrn varchar(20) UNIQUE NOT NULL, name varchar(50), sex_code varchar(4),
    birth_date date, id_no varchar(18), phone varchar(20), abo varchar(4), rh varchar(4),
    allergies text, row_ver int NOT NULL DEFAULT 1, updated_at timestamptz NOT NULL);

CREATE TABLE his.allergy (
    allergy_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, substance varchar(40),
    reaction varchar(40), severity varchar(12), verification varchar(12), recorded_by varchar(12),
    recorded_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE his.staff (
    staff_no varchar(12) PRIMARY KEY, name varchar(50), title varchar(20), role varchar(12),
    dept_code varchar(8), status varchar(12), updated_at timestamptz NOT NULL);

CREATE TABLE his.department (
    dept_code varchar(8) PRIMARY KEY, name varchar(40), kind varchar(12), status varchar(12),
    updated_at timestamptz NOT NULL);

CREATE TABLE his.visit (
    visit_no varchar(24) PRIMARY KEY, mrn varchar(20) NOT NULL, visit_class varchar(8),
    triage_level smallint, pathway varchar(16), dept varchar(40), bed varchar(12),
    status varchar(12), started_at timestamptz, ended_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE his.medical_order (
    order_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24), item_code varchar(20),
    item_name varchar(80), priority varchar(10), status varchar(12), ordered_by varchar(12),
    ordered_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE his.vital_sign (
    vital_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24), temp_c numeric(4,1),
    pulse int, resp int, sbp int, dbp int, spo2 int, gcs int, measured_at timestamptz, device varchar(30));

CREATE TABLE his.diagnosis (
    diagnosis_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24), icd10 varchar(20),
    name varchar(120), dx_type varchar(12), is_primary boolean, doctor varchar(12),
    diagnosed_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE his.prescription (
    rx_no varchar(24), line_no smallint, mrn varchar(20) NOT NULL, visit_no varchar(24),
    drug_code varchar(24), drug_name varchar(80), dose numeric(10,3), dose_unit varchar(12),
    route varchar(12), frequency varchar(12), days smallint, status varchar(12), doctor varchar(12),
    prescribed_at timestamptz, updated_at timestamptz NOT NULL, PRIMARY KEY (rx_no, line_no));

CREATE TABLE his.consultation (
    consultation_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24),
    urgency varchar(10), purpose text, requested_dept varchar(40), requested_by varchar(12),
    consultant varchar(12), opinion text, status varchar(12), requested_at timestamptz,
    arrived_at timestamptz, answered_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE lis.result (
    result_id uuid PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24), loinc varchar(10),
    item_name varchar(60), val_num numeric(14,4), val_txt text, unit varchar(20), ref_low numeric(14,4),
    ref_high numeric(14,4), abn_flag varchar(4), critical boolean, status varchar(12),
    collected_at timestamptz, result_at timestamptz, updated_at timestamptz NOT NULL);

CREATE TABLE emr.document (
    doc_id bigint PRIMARY KEY, mrn varchar(20) NOT NULL, visit_no varchar(24), doc_type varchar(20),
    title varchar(120), author varchar(12), signed_by varchar(12), status varchar(12), content text,
    written_at timestamptz, updated_at timestamptz NOT NULL);
