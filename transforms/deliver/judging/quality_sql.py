"""The rules of quality that need other rows, as SQL over the patients in `quality_touched`.

Every statement selects `campus, table_name, record_id, lsn, seq, rule, column_name, reason,
version`.
Names come from the checked rules file only, and are quoted; values are parameters.
"""

import datetime

from psycopg import sql

from schemas import quality_rules as q
from schemas.conflict_policy import ALL_TABLES
from transforms.check_quality import TOLERANCE

Statement = tuple[sql.Composed, dict[str, object]]

_ALARM = """\
SELECT r.campus, {table_name}::text, r.record_id, r.src_lsn, r.src_seq, {rule}::smallint,
    {column_name}::text, {reason}::text, coalesce(r.version_vector::text, '')"""
_ROWS = """
FROM quality_touched t JOIN consult.{table} r
    ON r.{patient} = t.patient_id AND r.campus = %(campus)s AND NOT r.deleted"""
_PATIENT = """
JOIN consult.patient p ON p.patient_id = t.patient_id AND p.campus = r.campus AND NOT p.deleted"""

# Results in the unit of their item; `quality_item` has '' for a result without a unit.
_MEASURED = """\
FROM quality_touched t JOIN consult.lab_result r
    ON r.patient_id = t.patient_id AND r.campus = %(campus)s AND NOT r.deleted
JOIN quality_item i ON i.code = r.item_code AND i.unit = coalesce(r.unit, '')
WHERE i.item = ANY (%(items)s) AND r.value IS NOT NULL AND r.comparator IS NULL"""
_SPECIMENS = (
    """\
WITH measured AS (
    SELECT r.record_id, r.src_lsn, r.src_seq, r.patient_id, r.collected_at, i.item,
        r.value::float8 * i.factor AS v, row_number() OVER (
            PARTITION BY r.patient_id, r.collected_at, i.item
            ORDER BY r.src_lsn DESC, r.src_seq DESC) AS nth
    """
    + _MEASURED
    + """ AND r.collected_at IS NOT NULL),
specimen AS (
    SELECT patient_id, collected_at,
        array_agg(v ORDER BY array_position(%(items)s, item)) AS v,
        (array_agg(record_id ORDER BY src_lsn DESC, src_seq DESC))[1] AS record_id,
        max(src_lsn) AS src_lsn
    FROM measured WHERE nth = 1 GROUP BY 1, 2
    HAVING count(*) = cardinality(%(items)s))
{alarm}
FROM specimen s JOIN consult.lab_result r ON r.record_id = s.record_id AND r.campus = %(campus)s
WHERE {odd}"""
)
_DELTA = (
    """\
WITH measured AS (
    SELECT r.record_id, r.patient_id, i.item, r.value::float8 * i.factor AS v,
        coalesce(r.collected_at, r.reported_at) AS at, r.src_lsn, r.src_seq
    """
    + _MEASURED
    + """),
pairs AS (
    SELECT *, lag(v) OVER w AS before, lag(at) OVER w AS before_at FROM measured
    WINDOW w AS (PARTITION BY patient_id, item ORDER BY at, src_lsn, src_seq))
{alarm}
FROM pairs d
JOIN unnest(%(items)s, %(absolutes)s::float8[], %(ratios)s::float8[]) AS l(item, absolute, ratio)
    ON l.item = d.item
JOIN consult.lab_result r ON r.record_id = d.record_id AND r.campus = %(campus)s
WHERE d.at - d.before_at <= %(within)s AND abs(d.v - d.before) > l.absolute
    AND greatest(d.v, d.before) > l.ratio * least(d.v, d.before)"""
)
_CRITICAL = """
WHERE r.status = ANY (%(statuses)s) AND (r.critical OR r.flag = ANY (%(flags)s))"""
_NOTICE = """
    AND NOT EXISTS (SELECT FROM consult.{table} n
        WHERE n.{patient} = r.patient_id AND n.campus = r.campus AND NOT n.deleted
            AND n.{column} = ANY (%({values})s)
            AND n.{time} BETWEEN r.reported_at - %({before})s::interval
                AND r.reported_at + %(wait)s::interval)"""
_SAID = """\
SELECT r.{patient} AS patient_id, {said} AS said {rows}
WHERE r.{column} <> '' {unless}"""
_ALLERGY = """
WITH said AS ({said})
{alarm} {rows}
JOIN said ON said.patient_id = t.patient_id
WHERE coalesce(r.status, '') <> ALL (%(ended)s)
    AND EXISTS (SELECT FROM unnest(%(words)s::text[]) w
        WHERE strpos(lower(said.said), lower(w)) > 0)
    AND (EXISTS (SELECT FROM unnest(%(codes)s::text[]) w WHERE starts_with(r.drug_code, w))
        OR EXISTS (SELECT FROM unnest(%(names)s::text[]) w WHERE strpos(r.drug_name, w) > 0))"""
# At whatever campus: one person's records.
_BLOOD = """\
WITH persons AS (
    SELECT DISTINCT m.person_id FROM quality_touched t
    JOIN sync.person_record m ON m.patient_id = t.patient_id AND m.campus = %(campus)s),
known AS (
    SELECT m.person_id, p.campus, p.record_id, p.{column} AS value
    FROM persons JOIN sync.person_record m USING (person_id)
    JOIN consult.patient p ON p.patient_id = m.patient_id AND p.campus = m.campus
    WHERE NOT p.deleted AND p.{column} IS NOT NULL)
{alarm}
FROM consult.patient r
JOIN known k ON k.record_id = r.record_id AND k.campus = r.campus
WHERE EXISTS (SELECT FROM known o WHERE o.person_id = k.person_id AND o.value <> k.value)"""


def statements(rule: int, check: q.Check, campus: str, now: datetime.datetime) -> list[Statement]:
    """Returns what finds the alarms of a check; nothing for one that a row alone decides."""
    make = _MAKERS.get(check.kind)
    return [] if make is None else make(rule, check, {"campus": campus, "now": now})


def due_later(check: q.NoticeCheck, campus: str, now: datetime.datetime) -> Statement:
    """Selects `(patient_id, due_at)` of critical values whose notice may still come."""
    wait = datetime.timedelta(minutes=check.minutes)
    text = (
        "SELECT r.patient_id, min(r.reported_at) + %(wait)s::interval AS due_at"
        + _ROWS
        + _CRITICAL
        + " AND r.reported_at + %(wait)s::interval > %(now)s GROUP BY 1"
    )
    values = {"campus": campus, "now": now, "wait": wait}
    values |= {"statuses": list(check.statuses), "flags": list(check.flags)}
    return _named(text, "lab_result"), values


def _named(text: str, table: str, **more: sql.Composable) -> sql.Composed:
    names = {"table": sql.Identifier(table), "patient": sql.Identifier(ALL_TABLES[table].patient)}
    return sql.SQL(text).format(**names | more)


def _alarm(rule: int, check: q.Check, table: str, column: str) -> sql.Composed:
    return sql.SQL(_ALARM).format(
        table_name=sql.Literal(table),
        rule=sql.Literal(rule),
        column_name=sql.Literal(column),
        reason=sql.Literal(check.reason),
    )


def _specimen(rule: int, check: q.SpecimenCheck, values: dict) -> list[Statement]:
    if isinstance(check, q.ItemSumCheck):
        odd = "(SELECT sum(x) FROM unnest(s.v) x) NOT BETWEEN %(low)s::float8 AND %(high)s::float8"
        values |= {"low": check.low - TOLERANCE, "high": check.high + TOLERANCE}
    elif isinstance(check, q.ItemAtMostCheck):
        odd = "s.v[1] > s.v[2] * %(most)s::float8"
        values |= {"most": 1 + TOLERANCE}
    else:
        odd = (
            "abs(s.v[1] - s.v[2] * %(factor)s::float8)"
            " > s.v[2] * %(factor)s::float8 * %(tolerance)s::float8"
        )
        values |= {"factor": check.factor, "tolerance": check.tolerance + TOLERANCE}
    values["items"] = list(q.items_of(check))
    alarm = _alarm(rule, check, "lab_result", "value")
    return [(sql.SQL(_SPECIMENS).format(alarm=alarm, odd=sql.SQL(odd)), values)]


def _delta(rule: int, check: q.DeltaCheck, values: dict) -> list[Statement]:
    values |= {
        "items": [limit.item for limit in check.limits],
        "absolutes": [limit.absolute for limit in check.limits],
        "ratios": [limit.ratio for limit in check.limits],
        "within": datetime.timedelta(hours=check.hours),
    }
    alarm = _alarm(rule, check, "lab_result", "value")
    return [(sql.SQL(_DELTA).format(alarm=alarm), values)]


def _before_birth(rule: int, check: q.BeforeBirthCheck, values: dict) -> list[Statement]:
    values["grace"] = check.grace_days
    text = (
        "{alarm}"
        + _ROWS
        + _PATIENT
        + "\nWHERE r.{column} < (p.birth_date - %(grace)s::int)::timestamp AT TIME ZONE 'UTC'"
    )
    found = []
    for table, columns in check.columns.items():
        for column in columns:
            alarm = _alarm(rule, check, table, column)
            name = sql.Identifier(column)
            found.append((_named(text, table, alarm=alarm, column=name), values))
    return found


def _sex(rule: int, check: q.SexCheck, values: dict) -> list[Statement]:
    values |= {"sex": check.sex, "prefixes": list(check.prefixes)}
    text = (
        "{alarm}"
        + _ROWS
        + _PATIENT
        + "\nWHERE p.sex = %(sex)s AND EXISTS ("
        + "SELECT FROM unnest(%(prefixes)s::text[]) x WHERE starts_with(r.{column}, x))"
    )
    more = {}
    if check.from_age_years:
        text += "\n    AND r.{time} >= (p.birth_date + make_interval(years => %(age)s::int))"
        values["age"] = check.from_age_years
        more["time"] = sql.Identifier(ALL_TABLES[check.table].event_time)
    alarm = _alarm(rule, check, check.table, check.column)
    name = sql.Identifier(check.column)
    return [(_named(text, check.table, alarm=alarm, column=name, **more), values)]


def _notice(rule: int, check: q.NoticeCheck, values: dict) -> list[Statement]:
    values |= {
        "statuses": list(check.statuses),
        "flags": list(check.flags),
        "wait": datetime.timedelta(minutes=check.minutes),
    }
    alarm = _alarm(rule, check, "lab_result", "critical")
    text = "{alarm}" + _ROWS + _CRITICAL + " AND r.reported_at + %(wait)s::interval <= %(now)s"
    parts = [_named(text, "lab_result", alarm=alarm)]
    for i, notice in enumerate(check.notices):
        names = {"values": f"values{i}", "before": f"before{i}"}
        values[names["values"]] = list(notice.values)
        values[names["before"]] = datetime.timedelta(minutes=notice.before_minutes)
        parts.append(
            _named(
                _NOTICE,
                notice.table,
                column=sql.Identifier(notice.column),
                time=sql.Identifier(notice.time),
                **{key: sql.SQL(name) for key, name in names.items()},
            )
        )
    return [(sql.Composed(parts), values)]


def _allergy(rule: int, check: q.AllergyCheck, values: dict) -> list[Statement]:
    values["ended"] = list(check.ended_statuses)
    parts = []
    for place in check.recorded:
        said: sql.Composable = sql.SQL("r.{}").format(sql.Identifier(place.column))
        for i, pattern in enumerate(check.negated):
            values[f"negated{i}"] = pattern
            name = sql.SQL(f"%(negated{i})s")
            said = sql.SQL("regexp_replace({}, {}, '', 'g')").format(said, name)
        column = sql.Identifier(place.column)
        rows = _named(_ROWS, place.table)
        unless = sql.Composed([])
        for name, denied in place.unless.items():
            values[f"denied_{name}"] = list(denied)
            unless += sql.SQL(f"AND coalesce(r.{{}}, '') <> ALL (%(denied_{name})s)").format(
                sql.Identifier(name)
            )
        more = {"said": said, "rows": rows, "column": column, "unless": unless}
        parts.append(_named(_SAID, place.table, **more))
    alarm = _alarm(rule, check, "prescription", "drug_code")
    rows = _named(_ROWS, "prescription")
    text = sql.SQL(_ALLERGY).format(said=sql.SQL(" UNION ALL ").join(parts), alarm=alarm, rows=rows)
    return [
        (
            text,
            values
            | {
                "words": list(substance.words),
                "codes": list(substance.codes),
                "names": list(substance.names),
            },
        )
        for substance in check.substances
    ]


def _blood_group(rule: int, check: q.BloodGroupCheck, values: dict) -> list[Statement]:
    alarm = _alarm(rule, check, "patient", check.column)
    return [(sql.SQL(_BLOOD).format(alarm=alarm, column=sql.Identifier(check.column)), values)]


_MAKERS = {
    "item_sum": _specimen,
    "item_at_most": _specimen,
    "item_ratio": _specimen,
    "delta": _delta,
    "before_birth": _before_birth,
    "sex": _sex,
    "notice": _notice,
    "allergy": _allergy,
    "blood_group": _blood_group,
}
STORE_KINDS = frozenset(_MAKERS)
