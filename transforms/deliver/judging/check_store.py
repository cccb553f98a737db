"""Check a consult store against the rules that need other rows, and keep all alarms.

Set-based and incremental: the patients of rows that came since the last time are judged again,
whole, so that a row which comes late is met by those before it. An alarm whose reason is gone
is settled, never deleted. Rows that clients edit stand nowhere in a log: they are found by the
change number of their record.
"""

import collections.abc
import dataclasses
import datetime

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from schemas import quality_rules as q
from schemas.batches import Op
from schemas.conflict_policy import ALL_TABLES, EDITED_AT_STORES
from schemas.entities import TABLES
from schemas.positions import Position
from schemas.tables import Table
from transforms.check_quality import QualityChecker
from transforms.deliver.changed import WHERE, Changed, changed
from transforms.deliver.judging import edited
from transforms.deliver.judging.edited import Edits, edits_since
from transforms.deliver.judging.quality_sql import STORE_KINDS, due_later, statements
from transforms.read_rows import ColumnRead, Form, content_columns, read_rows

_ADVISORY_LOCK = 0x7175616C  # "qual": one session at a time judges a store.
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_KEY = "campus, table_name, record_id, lsn, seq, rule"
_SAID = "column_name, reason, version"

_TEMPORARY = """\
CREATE TEMPORARY TABLE quality_touched (patient_id text COLLATE "C" PRIMARY KEY) ON COMMIT DROP;
CREATE TEMPORARY TABLE quality_found (
    place bigint GENERATED ALWAYS AS IDENTITY,
    campus text COLLATE "C", table_name text COLLATE "C", record_id text COLLATE "C",
    lsn bigint, seq integer, rule smallint, column_name text, reason text,
    version text COLLATE "C") ON COMMIT DROP;
CREATE TEMPORARY TABLE quality_edited (record_id text COLLATE "C", table_name text COLLATE "C",
    PRIMARY KEY (record_id, table_name)) ON COMMIT DROP;
CREATE TEMPORARY TABLE quality_item (item text, code text, unit text, factor float8)
    ON COMMIT DROP"""
_UNNEST = """\
unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::int[], %s::smallint[], %s::text[],
    %s::text[], %s::text[]) WITH ORDINALITY AS u(campus, table_name, record_id, lsn, seq, rule,
    column_name, reason, version, place)"""
_KEEP = f"""\
INSERT INTO sync.quality_alarm AS a ({_KEY}, {_SAID})
SELECT DISTINCT ON ({_KEY}, version) {_KEY}, {_SAID} FROM {{}} ORDER BY {_KEY}, version, place
ON CONFLICT (record_id, table_name, campus, rule, lsn, seq, version) DO UPDATE
SET settled_at = NULL, column_name = excluded.column_name, reason = excluded.reason
WHERE a.settled_at IS NOT NULL"""
# Rows are to be found by block ranges. A store that was never analysed is misjudged by the
# planner: by campus it would read every row of it, through the index that ends in the campus.
_NEW = "r.campus || '' = %(campus)s AND " + WHERE
_BY_BLOCKS = "SET LOCAL enable_seqscan = off"
_TOUCHED = "SELECT r.{} FROM consult.{} r WHERE " + _NEW
_LINKED = "SELECT patient_id FROM sync.person_record WHERE campus = %(campus)s AND since >= %(at)s"
_EDITED = (
    "INSERT INTO quality_edited SELECT e.record_id, e.table_name FROM sync.record e WHERE "
    + edited.WHERE
)
_TOUCHED_EDITED = """\
SELECT r.{patient} FROM quality_edited e JOIN consult.{table} r ON r.record_id = e.record_id
    AND r.campus || '' = %(campus)s WHERE e.table_name = {name}"""
# A record of which no row is left names its patients in its history.
_TOUCHED_REMOVED = """\
SELECT g.value -> 'values' ->> {patient} FROM quality_edited e JOIN sync.version v
    ON v.record_id = e.record_id AND v.table_name || '' = e.table_name
    AND v.campus || '' = %(campus)s
CROSS JOIN LATERAL jsonb_each(v.edit -> 'wrote') AS g
WHERE e.table_name = {name} AND NOT EXISTS (SELECT FROM consult.{table} r
    WHERE r.record_id = e.record_id AND r.campus || '' = %(campus)s)"""
_EDITED_IDS = "(SELECT e.record_id FROM quality_edited e WHERE e.table_name = {name})"
_DUE = "SELECT patient_id FROM sync.quality_later WHERE campus = %(campus)s AND due_at <= %(now)s"
_FOUND = f"INSERT INTO quality_found ({_KEY}, {_SAID}) "
# What a version of a row was blamed for ends with the version.
_SETTLE_OLD = """\
UPDATE sync.quality_alarm a SET settled_at = %(now)s FROM consult.{table} r
WHERE a.settled_at IS NULL AND a.campus = %(campus)s AND a.table_name = {table_name}
    AND r.record_id = a.record_id AND r.campus = a.campus
    AND ((r.src_lsn, r.src_seq) > (a.lsn, a.seq) OR r.deleted)"""
# What other rows made odd ends when they do.
_GONE = """
    AND NOT EXISTS (SELECT FROM quality_found f
        WHERE (f.record_id, f.table_name, f.campus, f.rule, f.lsn, f.seq, f.version)
            = (a.record_id, a.table_name, a.campus, a.rule, a.lsn, a.seq, a.version))"""
_SETTLE_GONE = (
    """\
UPDATE sync.quality_alarm a SET settled_at = %(now)s
FROM quality_touched t JOIN consult.{table} r
    ON r.{patient} = t.patient_id AND r.campus = %(campus)s
WHERE a.settled_at IS NULL AND a.campus = %(campus)s AND a.table_name = {table_name}
    AND a.record_id = r.record_id AND a.reason = ANY (%(reasons)s)"""
    + _GONE
)
# All of an edited row is judged anew. What it shows may change while its version does not: an edit
# that waits to be folded is shown as its client wrote it.
_SETTLE_EDITED = (
    """\
UPDATE sync.quality_alarm a SET settled_at = %(now)s FROM quality_edited e
WHERE a.settled_at IS NULL AND a.campus = %(campus)s AND a.table_name = e.table_name
    AND a.record_id = e.record_id"""
    + _GONE
)
_SETTLE_PERSONS = (
    """\
UPDATE sync.quality_alarm a SET settled_at = %(now)s
FROM quality_touched t
JOIN sync.person_record m ON m.patient_id = t.patient_id AND m.campus = %(campus)s
JOIN sync.person_record o ON o.person_id = m.person_id
JOIN consult.patient r ON r.patient_id = o.patient_id AND r.campus = o.campus
WHERE a.settled_at IS NULL AND a.campus = r.campus AND a.table_name = 'patient'
    AND a.record_id = r.record_id AND a.reason = ANY (%(reasons)s)"""
    + _GONE
)
_SETTLE_RULES = (
    "UPDATE sync.quality_alarm a SET settled_at = %(now)s"
    " WHERE a.settled_at IS NULL AND a.campus = %(campus)s" + _GONE
)
_PROGRESS = """\
SELECT lsn, seq, rules, checked_at, change, incarnation FROM sync.quality_progress
WHERE campus = %s"""
_SAVE = """\
INSERT INTO sync.quality_progress (campus, lsn, seq, rules, checked_at, change, incarnation)
VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (campus) DO UPDATE
SET lsn = excluded.lsn, seq = excluded.seq, rules = excluded.rules,
    checked_at = excluded.checked_at, change = excluded.change,
    incarnation = excluded.incarnation"""
_LIST = f"""\
SELECT {_KEY}, column_name, reason, noted_at, version FROM sync.quality_alarm
WHERE settled_at IS NULL AND (%(rules)s::smallint[] IS NULL OR rule = ANY (%(rules)s))
ORDER BY rule, campus, table_name, noted_at DESC, record_id LIMIT %(limit)s"""
_COUNT = """\
SELECT rule, campus, table_name, column_name, reason, count(*) FILTER (WHERE settled_at IS NULL),
    count(*) FROM sync.quality_alarm GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What one check of a campus in a store came to.

    `whole`: everything was judged, for the first time or by other rules.
    """

    campus: str
    patients: int
    rows: int
    found: int
    settled: int
    whole: bool


def put_alarms(conn: psycopg.Connection, alarms: pa.RecordBatch) -> int:
    """Writes alarms (`ALARM_SCHEMA`) in the caller's transaction; returns how many were new.

    Idempotent: an alarm is its rule and the version of its row, which a source alone wrote.
    """
    if not alarms.num_rows:
        return 0
    versions = [""] * alarms.num_rows
    return conn.execute(_KEEP.format(_UNNEST).encode(), [*_columns(alarms), versions]).rowcount


def _columns(alarms: pa.RecordBatch) -> list[list]:
    names = ("campus", "table", "record_id", "lsn", "seq", "rule", "column", "reason")
    return [alarms.column(name).to_pylist() for name in names]


def check_campus(
    conn: psycopg.Connection,
    link: str,
    rules: q.QualityRules,
    now_us: int,
    judge_rows: bool = True,
) -> Checked:
    """Judges what came to a store by `link` since the last time, in one transaction.

    Safe beside deliveries and beside itself. By rules that differ from those of the last time,
    or the first time, everything is judged.

    Args:
      link: `campus>store`.
      judge_rows: judge single rows too; False where each delivery does (`put_alarms`). Those that
        clients have edited are judged in any case.
    """
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s)", (_ADVISORY_LOCK,))
        return _Check(conn, link, rules, now_us).run(judge_rows)


class _Check:
    def __init__(self, conn: psycopg.Connection, link: str, rules: q.QualityRules, now_us: int):
        self._conn = conn
        self._link = link
        self._campus = link.partition(">")[0]
        self._rules = rules
        self._checks = rules.for_campus(self._campus)
        self._now_us = now_us
        self._now = _EPOCH + datetime.timedelta(microseconds=now_us)

    def run(self, judge_rows: bool) -> Checked:
        conn = self._conn
        (at,) = conn.execute("SELECT now()").fetchone()
        row = conn.execute(_PROGRESS, (self._campus,)).fetchone()
        whole = row is None or bytes(row[2]) != self._rules.version
        known, known_at = (None, _EPOCH) if whole else (Position(*row[:2]), row[3])
        edits = edits_since(conn, *((0, "") if whole else row[4:]))
        span = changed(conn, self._link, known, known_at)
        reached = (*span.reached, self._rules.version, at, edits.reached, edits.incarnation)
        if not whole:
            conn.execute(_BY_BLOCKS)
            if not self._is_anything_new(span, edits, known_at):
                conn.execute(_SAVE, (self._campus, *reached))
                return Checked(self._campus, 0, 0, 0, 0, whole)
        conn.execute(_TEMPORARY.encode())
        patients = self._touch(span, edits, known_at)
        rows = self._judge_rows(span, judge_rows or whole)
        conn.execute("SET LOCAL enable_seqscan = on")
        self._fill_items()
        for rule, check in self._checks:
            for text, values in statements(rule, check, self._campus, self._now):
                conn.execute(sql.SQL(_FOUND) + text, values)
            if isinstance(check, q.NoticeCheck):
                self._wait_for(check)
        conn.execute("ANALYZE quality_found")
        found = conn.execute(_KEEP.format("quality_found").encode()).rowcount
        settled = self._settle(whole)
        conn.execute(_SAVE, (self._campus, *reached))
        return Checked(self._campus, patients, rows, found, settled, whole)

    def _is_anything_new(self, span: Changed, edits: Edits, known_at: datetime.datetime) -> bool:
        parts = self._new_patients()
        if edits.any:
            parts.append(sql.SQL("SELECT FROM sync.record e WHERE " + edited.WHERE))
        text = sql.SQL("SELECT {}").format(
            sql.SQL(" OR ").join(sql.SQL("EXISTS ({})").format(part) for part in parts)
        )
        values = self._since(span, known_at) | {"edited": edits.after}
        return self._conn.execute(text, values).fetchone()[0]

    def _new_patients(self) -> list[sql.Composable]:
        """Selects patients of rows with new positions, of links made since, and those whose time
        came."""
        parts: list[sql.Composable] = [
            sql.SQL(_TOUCHED).format(sql.Identifier(table.patient), sql.Identifier(table.name))
            for table in TABLES.values()
        ]
        return [*parts, sql.SQL(_LINKED), sql.SQL(_DUE)]

    def _since(self, span: Changed, known_at: datetime.datetime) -> dict:
        return {"campus": self._campus, "at": known_at, "now": self._now, **span.names}

    def _edited_patients(self) -> list[sql.Composable]:
        """Selects patients of records that clients have edited."""
        return [
            sql.SQL(text).format(
                name=sql.Literal(name),
                table=sql.Identifier(name),
                patient=kind(ALL_TABLES[name].patient),
            )
            for name in EDITED_AT_STORES
            for text, kind in ((_TOUCHED_EDITED, sql.Identifier), (_TOUCHED_REMOVED, sql.Literal))
        ]

    def _touch(self, span: Changed, edits: Edits, known_at: datetime.datetime) -> int:
        parts = self._new_patients()
        names = {"campus": self._campus, "edited": edits.after}
        if edits.any and self._conn.execute(_EDITED, names).rowcount:
            self._conn.execute("ANALYZE quality_edited")
            parts += self._edited_patients()
        text = sql.SQL(
            "INSERT INTO quality_touched SELECT * FROM ({}) AS u(id) WHERE id IS NOT NULL"
        ).format(sql.SQL(" UNION ").join(parts))
        count = self._conn.execute(text, self._since(span, known_at)).rowcount
        self._conn.execute(
            "DELETE FROM sync.quality_later l USING quality_touched t"
            " WHERE l.campus = %s AND l.patient_id = t.patient_id",
            (self._campus,),
        )
        self._conn.execute("ANALYZE quality_touched")
        return count

    def _fill_items(self) -> None:
        rows = [
            (name, code, unit, factor)
            for name, item in self._rules.items.items()
            for code in item.codes
            for unit, factor in item.factors.items()
        ]
        columns = [list(column) for column in zip(*rows, strict=True)]
        self._conn.execute(
            "INSERT INTO quality_item SELECT * FROM"
            " unnest(%s::text[], %s::text[], %s::text[], %s::float8[])",
            columns,
        )
        self._conn.execute("ANALYZE quality_item")

    def _wait_for(self, check: q.NoticeCheck) -> None:
        text, values = due_later(check, self._campus, self._now)
        self._conn.execute(
            sql.SQL(
                "INSERT INTO sync.quality_later AS l (campus, patient_id, due_at)"
                " SELECT %(campus)s, * FROM ({}) AS d ON CONFLICT (campus, patient_id)"
                " DO UPDATE SET due_at = least(l.due_at, excluded.due_at)"
            ).format(text),
            values,
        )

    def _judge_rows(self, span: Changed, with_delivered: bool) -> int:
        """Judges single rows as a delivery does, of what it delivered only if wanted; returns how
        many."""
        checker = QualityChecker(self._rules, self._campus)
        given = {name: sql.Literal(value) for name, value in span.names.items()}
        given["campus"] = sql.Literal(self._campus)
        new = _NEW.replace("%(", "{").replace(")s", "}")  # A COPY takes no parameters.
        judged = 0
        for table in ALL_TABLES.values():
            places = [new] if with_delivered and table.name in TABLES else []
            if table.name in EDITED_AT_STORES:
                places = [f"{place} AND r.record_id NOT IN {_EDITED_IDS}" for place in places]
                places.append(f"r.campus || '' = {{campus}} AND r.record_id IN {_EDITED_IDS}")
            given["name"] = sql.Literal(table.name)
            for place in places:
                where = sql.SQL("NOT r.deleted AND " + place).format(**given)
                judged += self._judge_place(checker, table, where)
        return judged

    def _judge_place(self, checker: QualityChecker, table: Table, where: sql.Composed) -> int:
        place = sql.SQL("consult.{} r WHERE ").format(sql.Identifier(table.name)) + where
        judged = 0
        found = []
        for batch in read_rows(self._conn, _store_columns(table), place.as_string(self._conn)):
            judged += batch.num_rows
            alarms = checker.check({table.name: _as_changes(table, batch)}, self._now_us)
            if alarms.num_rows:
                found.append([*_columns(alarms), _versions(batch, alarms)])
        for columns in found:
            text = f"{_FOUND} SELECT {_KEY}, {_SAID} FROM {_UNNEST}"
            self._conn.execute(text.encode(), columns)
        return judged

    def _settle(self, whole: bool) -> int:
        conn, values = self._conn, {"now": self._now, "campus": self._campus}
        settled = 0
        for table in ALL_TABLES.values():
            names = {
                "table": sql.Identifier(table.name),
                "table_name": sql.Literal(table.name),
                "patient": sql.Identifier(table.patient),
            }
            settled += conn.execute(sql.SQL(_SETTLE_OLD).format(**names), values).rowcount
            reasons = self._reasons(lambda kind: kind in STORE_KINDS and kind != "blood_group")
            text = sql.SQL(_SETTLE_GONE).format(**names)
            settled += conn.execute(text, values | {"reasons": reasons}).rowcount
        reasons = self._reasons(lambda kind: kind == "blood_group")
        settled += conn.execute(_SETTLE_PERSONS, values | {"reasons": reasons}).rowcount
        settled += conn.execute(_SETTLE_EDITED, values).rowcount
        if whole:
            settled += conn.execute(_SETTLE_RULES, values).rowcount
        return settled

    def _reasons(self, wanted: collections.abc.Callable[[str], bool]) -> list[str]:
        return [check.reason for _, check in self._checks if wanted(check.kind)]


def _store_columns(table: Table) -> list[ColumnRead]:
    return [
        *content_columns(table),
        ColumnRead("_lsn", "src_lsn", Form.INT),
        ColumnRead("_seq", "src_seq::bigint", Form.INT),
        ColumnRead("_version", "coalesce(version_vector::text, '')", Form.TEXT),
    ]


def _versions(batch: pa.RecordBatch, alarms: pa.RecordBatch) -> list[str]:
    """Returns the versions of the rows that alarms are about."""
    place = pc.index_in(alarms.column("record_id"), value_set=batch.column("record_id"))
    return batch.column("_version").take(place).to_pylist()


def _as_changes(table: Table, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of a store as changes, with what a checker looks at."""
    n = batch.num_rows
    given = {name: batch.column(name) for name in batch.schema.names}
    given["_seq"] = given["_seq"].cast(pa.int32())
    given["_op"] = pa.repeat(pa.scalar(int(Op.SNAPSHOT), pa.uint8()), n)
    given["_unchanged"] = pa.repeat(pa.scalar(0, pa.uint64()), n)
    return pa.RecordBatch.from_pydict(given)


def open_alarms(
    conn: psycopg.Connection,
    rules: collections.abc.Iterable[int] | None = None,
    limit: int | None = None,
) -> list[tuple]:
    """Returns open alarms: campus, table, record id, lsn, seq, rule, column, reason, noted at,
    version.

    Record ids are numbers of a source's rows; values of columns are never kept. `version` is the
    version vector of a row that clients have edited, else empty.
    """
    wanted = None if rules is None else list(rules)
    return conn.execute(_LIST, {"rules": wanted, "limit": limit}).fetchall()


def counts(conn: psycopg.Connection) -> list[tuple]:
    """Returns `(rule, campus, table, column, reason, open, ever)`, ordered."""
    return conn.execute(_COUNT).fetchall()
