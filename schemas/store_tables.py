"""Canonical tables that no source has: they are written at the consult stores alone."""

from schemas.tables import Column, Kind, Table

TREATMENT_PLAN = Table(
    "treatment_plan",
    "A treatment plan (诊疗方案) that the attending doctor and the experts write together.",
    (
        Column("patient_id", Kind.TEXT, "The campus's patient number (MRN).", level=4),
        Column("visit_no", Kind.TEXT, "The campus's visit number.", level=4),
        Column("title", Kind.TEXT, "Title."),
        Column("content", Kind.TEXT, "The plan.", level=5),
        Column("author", Kind.TEXT, "Staff number."),
        Column("signed_by", Kind.TEXT, "Staff number of who signed, or null."),
        Column("status", Kind.TEXT, "draft, signed or archived."),
        Column("participants", Kind.TEXT, "Staff numbers, divided by commas."),
        Column("follow_up", Kind.TEXT, "Contact for questions about the plan.", level=4),
        Column("written_at", Kind.TIME, "When."),
        Column("updated_at", Kind.TIME, "When it was last changed."),
    ),
    event_time="written_at",
    level=5,
    standard="FHIR CarePlan",
)

STORE_TABLES: dict[str, Table] = {TREATMENT_PLAN.name: TREATMENT_PLAN}
