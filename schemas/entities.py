"""The clinical entities of a consultation, as canonical tables (DOMAIN.md 2)."""

from schemas.tables import Column, Kind, Table

_TEXT, _INT, _DECIMAL = Kind.TEXT, Kind.INT, Kind.DECIMAL
_BOOL, _DATE, _TIME = Kind.BOOL, Kind.DATE, Kind.TIME

_PATIENT_ID = Column("patient_id", _TEXT, "The campus's patient number (MRN).", level=4)
_VISIT_NO = Column("visit_no", _TEXT, "The campus's visit number.", level=4)
_UPDATED_AT = Column("updated_at", _TIME, "When the source last changed the row.")
# Harmonising fills these two itself, at every campus; see docs/adr/0014.
_PARENT_REF = Column(
    "parent_ref", _TEXT, "Row of the campus that leads to the patient: table and id.", level=4
)
_REMARKS = Column(
    "remarks", _TEXT, "What could not be settled: a line each, with the text as written.", level=4
)
OWN_COLUMNS = (_PARENT_REF.name, _REMARKS.name)

PATIENT = Table(
    "patient",
    "A person as one campus knows them.",
    (
        _PATIENT_ID,
        Column("name", _TEXT, "Name.", level=4, standard="DE02.01.039"),
        Column("sex", _TEXT, "0 unknown, 1 male, 2 female, 9 unstated.", standard="GB/T 2261.1"),
        Column("birth_date", _DATE, "Date of birth.", level=4),
        Column("id_no", _TEXT, "Citizen identity number.", level=4, standard="GB 11643"),
        Column("phone", _TEXT, "Telephone.", level=4),
        Column("abo", _TEXT, "ABO group: A, B, O, AB.", standard="CV04.50.005"),
        Column("rh", _TEXT, "RhD: + or -."),
        Column("allergies", _TEXT, "Allergies as free text."),
        _UPDATED_AT,
        _REMARKS,
    ),
    standard="FHIR Patient; HL7 v2 PID",
)

VISIT = Table(
    "visit",
    "A stay or a contact: outpatient, emergency or inpatient.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("class", _TEXT, "AMB, EMER or IMP.", standard="HL7 v3 ActCode"),
        Column("triage_level", _INT, "1 most urgent .. 4.", min=1, max=4),
        Column("pathway", _TEXT, "chest_pain, stroke or null."),
        Column("department", _TEXT, "Department."),
        Column("bed", _TEXT, "Bed."),
        Column("status", _TEXT, "open, signed_off or closed."),
        Column("started_at", _TIME, "Arrival."),
        Column("ended_at", _TIME, "Departure."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="started_at",
    standard="FHIR Encounter; HL7 v2 PV1",
)

ORDER = Table(
    "medical_order",
    "A request for a service.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("item_code", _TEXT, "What is ordered."),
        Column("item_name", _TEXT, "Its name."),
        Column("priority", _TEXT, "routine, urgent, asap or stat.", standard="request-priority"),
        Column("status", _TEXT, "active, completed or stopped."),
        Column("ordered_by", _TEXT, "Staff number."),
        Column("ordered_at", _TIME, "When."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="ordered_at",
    standard="FHIR ServiceRequest; HL7 v2 ORC/OBR, TQ1-9",
)

LAB_RESULT = Table(
    "lab_result",
    "One item of a laboratory report.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("item_code", _TEXT, "LOINC of item and unit.", standard="LOINC"),
        Column("item_name", _TEXT, "Name at the campus."),
        Column("value", _DECIMAL, "Value in `unit`, or its bound; null where it is text."),
        Column("value_text", _TEXT, "Value as text, where it is not a plain number."),
        Column("unit", _TEXT, "Unit after normalisation.", standard="UCUM"),
        Column("raw_value", _TEXT, "Value as the campus wrote it."),
        Column("raw_unit", _TEXT, "Unit as the campus wrote it."),
        Column("reference_low", _DECIMAL, "Lower reference limit in `unit`."),
        Column("reference_high", _DECIMAL, "Upper reference limit in `unit`."),
        Column("flag", _TEXT, "N, L, H, LL or HH."),
        Column("critical", _BOOL, "Marked critical by the laboratory."),
        Column("status", _TEXT, "preliminary, final or corrected."),
        Column("collected_at", _TIME, "Specimen taken."),
        Column("reported_at", _TIME, "Reported."),
        _UPDATED_AT,
        Column("comparator", _TEXT, "<, <=, >= or > where `value` is a bound."),
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="reported_at",
    standard="FHIR Observation; HL7 v2 OBX; WS 445.4",
)

VITAL_SIGN = Table(
    "vital_sign",
    "One set of bedside measurements.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("temperature_cel", _DECIMAL, "Axillary temperature.", "Cel", min=10, max=50),
        Column("pulse_per_min", _INT, "Heart rate.", "/min", min=0, max=300),
        Column("respiration_per_min", _INT, "Respiratory rate.", "/min", min=0, max=150),
        Column("systolic_mmhg", _INT, "Systolic blood pressure.", "mm[Hg]", min=0, max=400),
        Column("diastolic_mmhg", _INT, "Diastolic blood pressure.", "mm[Hg]", min=0, max=300),
        Column("spo2_percent", _INT, "Oxygen saturation.", "%", min=0, max=100),
        Column("gcs", _INT, "Glasgow coma scale.", min=3, max=15),
        Column("measured_at", _TIME, "When."),
        Column("device", _TEXT, "Device."),
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="measured_at",
    standard="FHIR Observation (vital-signs)",
)

DIAGNOSIS = Table(
    "diagnosis",
    "A diagnosis of a visit.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("code", _TEXT, "ICD-10, 国临版, upper case with a dot.", standard="GB/T 14396"),
        Column("name", _TEXT, "Name."),
        Column("type", _TEXT, "admission, discharge, outpatient or emergency."),
        Column("is_primary", _BOOL, "Primary diagnosis."),
        Column("diagnosed_by", _TEXT, "Staff number."),
        Column("diagnosed_at", _TIME, "When."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="diagnosed_at",
    standard="FHIR Condition; HL7 v2 DG1",
)

PRESCRIPTION = Table(
    "prescription",
    "One line of a prescription.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("prescription_no", _TEXT, "The prescription."),
        Column("line_no", _INT, "Line in it."),
        Column("drug_code", _TEXT, "Drug."),
        Column("drug_name", _TEXT, "Its name."),
        Column("dose", _DECIMAL, "Single dose in `dose_unit`.", min=0),
        Column("dose_unit", _TEXT, "Unit of the dose.", standard="UCUM"),
        Column("route", _TEXT, "Route."),
        Column("frequency", _TEXT, "qd, bid, tid, q8h, prn .."),
        Column("days", _INT, "Days."),
        Column("status", _TEXT, "active or stopped."),
        Column("prescribed_by", _TEXT, "Staff number."),
        Column("prescribed_at", _TIME, "When."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="prescribed_at",
    standard="FHIR MedicationRequest; HL7 v2 RXE; WS/T 500.4",
)

EMR_DOCUMENT = Table(
    "emr_document",
    "One clinical document.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("type", _TEXT, "Kind of document."),
        Column("title", _TEXT, "Title."),
        Column("author", _TEXT, "Staff number."),
        Column("signed_by", _TEXT, "Staff number of who signed, or null."),
        Column("status", _TEXT, "draft, signed or archived."),
        Column("content", _TEXT, "The text.", level=5),
        Column("written_at", _TIME, "When."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="written_at",
    level=5,
    standard="FHIR DocumentReference; HL7 v2 TXA; WS/T 500",
)

CONSULTATION = Table(
    "consultation",
    "A consultation (会诊): request, arrival, opinion.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("urgency", _TEXT, "emergency (急会诊) or routine."),
        Column("purpose", _TEXT, "What is asked.", level=5),
        Column("requested_department", _TEXT, "Who is asked."),
        Column("requested_by", _TEXT, "Staff number."),
        Column("consultant", _TEXT, "Staff number."),
        Column("opinion", _TEXT, "The consultant's opinion.", level=5),
        Column("status", _TEXT, "requested, arrived, answered or signed_off."),
        Column("requested_at", _TIME, "When asked."),
        Column("arrived_at", _TIME, "When at the bedside."),
        Column("answered_at", _TIME, "When answered."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="requested_at",
    level=5,
    standard="FHIR ServiceRequest and Task; HL7 v2 REF^I12",
)

LAB_REPORT = Table(
    "lab_report",
    "A laboratory report: what its results have in common.",
    (
        _PATIENT_ID,
        _VISIT_NO,
        Column("name", _TEXT, "What was examined, as a whole."),
        Column("specimen", _TEXT, "Specimen."),
        Column("status", _TEXT, "preliminary, final or corrected."),
        Column("priority", _TEXT, "routine or stat.", standard="request-priority"),
        Column("ordered_by", _TEXT, "Staff number."),
        Column("collected_at", _TIME, "Specimen taken."),
        Column("reported_at", _TIME, "Reported."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="reported_at",
    standard="FHIR DiagnosticReport; HL7 v2 OBR; WS/T 500.7",
)

ALLERGY = Table(
    "allergy",
    "Something that a patient does not bear.",
    (
        _PATIENT_ID,
        Column("substance", _TEXT, "To what."),
        Column("reaction", _TEXT, "What happens."),
        Column("severity", _TEXT, "mild, moderate or severe.", standard="reaction-event-severity"),
        Column("verification", _TEXT, "confirmed, unconfirmed or refuted."),
        Column("recorded_by", _TEXT, "Staff number."),
        Column("recorded_at", _TIME, "When."),
        _UPDATED_AT,
        _PARENT_REF,
        _REMARKS,
    ),
    event_time="recorded_at",
    standard="FHIR AllergyIntolerance; HL7 v2 AL1; DE05.01.022",
)

# Nobody's record. The column that every row is followed by is there all the same.
_NO_PATIENT = Column("patient_id", _TEXT, "Always null.", level=1)

STAFF = Table(
    "staff",
    "Who works at the campus: the staff numbers of all other tables.",
    (
        _NO_PATIENT,
        Column("staff_no", _TEXT, "Staff number.", level=2),
        Column("name", _TEXT, "Name."),
        Column("title", _TEXT, "Professional title.", level=2),
        Column("role", _TEXT, "doctor, nurse, technician or other.", level=2),
        Column("department", _TEXT, "Department's code.", level=2),
        Column("status", _TEXT, "active or left.", level=2),
        _UPDATED_AT,
        _REMARKS,
    ),
    level=3,
    standard="FHIR Practitioner and PractitionerRole; HL7 v2 STF; WS 364",
)

DEPARTMENT = Table(
    "department",
    "A department of the campus.",
    (
        _NO_PATIENT,
        Column("code", _TEXT, "The campus's code.", level=1),
        Column("name", _TEXT, "Name.", level=1),
        Column("kind", _TEXT, "clinical, technical or other.", level=1),
        Column("status", _TEXT, "active or closed.", level=1),
        _UPDATED_AT,
        _REMARKS,
    ),
    level=1,
    standard="FHIR Organization; HL7 v2 MFN",
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        PATIENT,
        VISIT,
        ORDER,
        LAB_RESULT,
        VITAL_SIGN,
        DIAGNOSIS,
        PRESCRIPTION,
        EMR_DOCUMENT,
        CONSULTATION,
        LAB_REPORT,
        ALLERGY,
        STAFF,
        DEPARTMENT,
    )
}
