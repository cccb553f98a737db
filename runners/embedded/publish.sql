-- What a hospital's administrator does once, so that campus-sync may read this database.
GRANT USAGE ON SCHEMA his, lis, emr TO sync;
GRANT SELECT ON ALL TABLES IN SCHEMA his, lis, emr TO sync;

-- Tables with long texts: without this an update that leaves the text alone does not carry it.
ALTER TABLE his.patient REPLICA IDENTITY FULL;
ALTER TABLE his.consultation REPLICA IDENTITY FULL;
ALTER TABLE lis.result REPLICA IDENTITY FULL;
ALTER TABLE emr.document REPLICA IDENTITY FULL;

CREATE PUBLICATION campus_sync FOR TABLE
    his.patient, his.visit, his.medical_order, his.vital_sign, his.diagnosis, his.prescription,
    his.consultation, his.allergy, his.staff, his.department, lis.result, emr.document;
