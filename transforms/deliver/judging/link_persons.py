"""Link persons in a consult store: what `match_patients` finds, kept up to date set by set.

One transaction a run, beside deliveries: patients that changed since the last run, and all who
share a blocking key with them, are matched again; links, reviews and persons are brought to what
matching everything anew would give. Nothing is deleted from history: a link has an end, a record
a past. Persons are groups without direction, so a merge can be neither circular nor reversed.
"""

import collections.abc
import dataclasses
import datetime
import hashlib
import json

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import sql

from schemas.entities import TABLES
from schemas.patient_matching import FIELDS, MatchingRules
from schemas.positions import Position
from transforms.deliver.changed import WHERE, changed
from transforms.deliver.judging import edited
from transforms.deliver.judging.edited import Edits, edits_since
from transforms.match_patients import (
    INPUT_SCHEMA,
    Evidence,
    Excluded,
    Features,
    Outcome,
    Pairs,
    candidates,
    common_keys,
    features_of,
    group,
    judge,
    number_of,
    person_id,
    without_common,
)
from transforms.read_rows import ColumnRead, Form, read_rows

AUTOMATIC = "rules"  # Who made a link that no person made.
_ADVISORY_LOCK = 0x656D7069  # "empi": one session at a time creates tables or links.
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_WHOLE_MIN, _WHOLE_SHARE = 20_000, 0.2  # Changed patients from which all are matched at once.

Key = tuple[str, str]  # (campus, patient_id).
PairKey = tuple[str, str, str, str]
_Reached = dict[str, tuple[Position, Edits]]  # By campus: in the ledger, and among edits.

_TEMPORARY = """\
CREATE TEMPORARY TABLE person_changed (campus text COLLATE "C", patient_id text COLLATE "C",
    PRIMARY KEY (campus, patient_id)) ON COMMIT DROP;
CREATE TEMPORARY TABLE person_near (LIKE person_changed INCLUDING ALL) ON COMMIT DROP;
CREATE TEMPORARY TABLE person_all (LIKE person_changed INCLUDING ALL) ON COMMIT DROP;
CREATE TEMPORARY TABLE person_key (key bigint PRIMARY KEY) ON COMMIT DROP;
CREATE TEMPORARY TABLE person_scope (person_id text COLLATE "C" PRIMARY KEY) ON COMMIT DROP;
CREATE TEMPORARY TABLE person_pair (campus text COLLATE "C", patient_id text COLLATE "C",
    other_campus text COLLATE "C", other_patient_id text COLLATE "C", linked boolean,
    who text, why text, score real, evidence jsonb,
    PRIMARY KEY (campus, patient_id, other_campus, other_patient_id, linked)) ON COMMIT DROP"""

# A row that changed its patient number leaves the old one behind.
_TOUCH = (
    """\
INSERT INTO person_changed
SELECT r.campus, r.patient_id FROM consult.patient r
    WHERE r.campus = %(campus)s AND r.patient_id IS NOT NULL AND """
    + WHERE
    + """
UNION SELECT m.campus, m.patient_id FROM consult.patient r
    JOIN sync.person_record m ON m.record_id = r.record_id AND m.campus = r.campus
    WHERE r.campus = %(campus)s AND """
    + WHERE
    + " ON CONFLICT DO NOTHING"
)
_TOUCH_EDITED = f"""\
INSERT INTO person_changed
SELECT r.campus, r.patient_id FROM sync.record e
    JOIN consult.patient r ON r.record_id = e.record_id AND r.campus = e.campus
    WHERE {edited.WHERE} AND e.table_name || '' = 'patient' AND r.patient_id IS NOT NULL
UNION SELECT m.campus, m.patient_id FROM sync.record e
    JOIN sync.person_record m ON m.record_id = e.record_id AND m.campus = e.campus
    WHERE {edited.WHERE} AND e.table_name || '' = 'patient' ON CONFLICT DO NOTHING"""
# One that is committed a moment later is left for the next run.
_TOUCH_DECIDED = """\
WITH taken AS (UPDATE sync.person_decision SET applied = true WHERE NOT applied
    RETURNING campus, patient_id, other_campus, other_patient_id)
INSERT INTO person_changed SELECT campus, patient_id FROM taken
UNION SELECT other_campus, other_patient_id FROM taken ON CONFLICT DO NOTHING"""
_TOUCH_ALL = """\
INSERT INTO person_changed
SELECT campus, patient_id FROM consult.patient WHERE patient_id IS NOT NULL
UNION SELECT campus, patient_id FROM sync.person_record ON CONFLICT DO NOTHING"""
_ROWS = """\
(SELECT DISTINCT ON (r.campus, r.patient_id) r.*
    FROM {wanted} w JOIN consult.patient r ON r.patient_id = w.patient_id AND r.campus = w.campus
    WHERE NOT r.deleted
    ORDER BY r.campus, r.patient_id, r.src_lsn DESC, r.src_seq DESC, r.record_id) x"""
_OLD_KEYS = """\
INSERT INTO person_key SELECT DISTINCT unnest(m.keys) FROM {wanted} w
JOIN sync.person_record m USING (campus, patient_id) ON CONFLICT DO NOTHING"""
_SHARING = """\
INSERT INTO {into} SELECT * FROM {wanted}
UNION SELECT m.campus, m.patient_id FROM person_key k
    CROSS JOIN LATERAL (SELECT campus, patient_id FROM sync.person_record
        WHERE keys @> ARRAY[k.key] LIMIT {limit} + 1) m
    WHERE NOT EXISTS (SELECT FROM sync.person_record WHERE keys @> ARRAY[k.key]
        OFFSET {limit})
ON CONFLICT DO NOTHING"""
_COMMON = """\
SELECT k.key FROM person_key k
WHERE EXISTS (SELECT FROM sync.person_record WHERE keys @> ARRAY[k.key] OFFSET %s)"""
_LEAVE = """\
WITH gone AS (DELETE FROM sync.person_record m USING person_changed c
    WHERE m.campus = c.campus AND m.patient_id = c.patient_id AND NOT EXISTS (
        SELECT FROM consult.patient r WHERE r.campus = m.campus
            AND r.patient_id = m.patient_id AND NOT r.deleted)
    RETURNING m.campus, m.patient_id, m.person_id, m.since),
past AS (INSERT INTO sync.person_past (campus, patient_id, person_id, since, until, why)
    SELECT campus, patient_id, person_id, since, %(now)s, 'gone' FROM gone
    ON CONFLICT DO NOTHING)
INSERT INTO person_scope SELECT DISTINCT person_id FROM gone ON CONFLICT DO NOTHING"""
_ENTER = """\
INSERT INTO sync.person_record AS m (campus, patient_id, person_id, own_id, since, excluded,
    record_id, keys)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (campus, patient_id) DO UPDATE
SET excluded = excluded.excluded, record_id = excluded.record_id, keys = excluded.keys
WHERE (m.excluded, m.record_id, m.keys)
    IS DISTINCT FROM (excluded.excluded, excluded.record_id, excluded.keys)"""
_DECIDED = """\
SELECT DISTINCT ON (d.campus, d.patient_id, d.other_campus, d.other_patient_id)
    d.campus, d.patient_id, d.other_campus, d.other_patient_id, d.kind, d.who, d.why
FROM sync.person_decision d
JOIN sync.person_record a ON (a.campus, a.patient_id) = (d.campus, d.patient_id)
JOIN sync.person_record b ON (b.campus, b.patient_id) = (d.other_campus, d.other_patient_id)
WHERE {where}
ORDER BY d.campus, d.patient_id, d.other_campus, d.other_patient_id, d.decided_us DESC,
    d.decision_id DESC"""
_NEAR = """\
EXISTS (SELECT FROM person_near n WHERE n.campus = {0}.campus AND n.patient_id = {0}.patient_id)
OR EXISTS (SELECT FROM person_near n WHERE n.campus = {0}.other_campus
    AND n.patient_id = {0}.other_patient_id)"""
_SAME_PAIR = """\
(p.campus, p.patient_id, p.other_campus, p.other_patient_id)
    = ({0}.campus, {0}.patient_id, {0}.other_campus, {0}.other_patient_id)"""
_UNLINK = (
    """\
UPDATE sync.person_link l SET until = %(now)s
WHERE l.until IS NULL AND ("""
    + _NEAR.format("l")
    + """) AND NOT EXISTS (SELECT FROM person_pair p
    WHERE p.linked AND p.who = l.who AND """
    + _SAME_PAIR.format("l")
    + """)
RETURNING campus, patient_id, other_campus, other_patient_id"""
)
# What speaks for a link is told as it stands now: it decides which of two links is held.
_RENEW = (
    """\
UPDATE sync.person_link l SET why = p.why, score = p.score, evidence = p.evidence
FROM person_pair p WHERE p.linked AND p.who = l.who AND l.until IS NULL AND """
    + _SAME_PAIR.format("l")
    + """
    AND (l.why, l.score, l.evidence) IS DISTINCT FROM (p.why, p.score, p.evidence)"""
)
_LINK = (
    """\
INSERT INTO sync.person_link (campus, patient_id, other_campus, other_patient_id, since, who, why,
    score, evidence)
SELECT p.campus, p.patient_id, p.other_campus, p.other_patient_id, %(now)s, p.who, p.why, p.score,
    p.evidence
FROM person_pair p WHERE p.linked AND NOT EXISTS (SELECT FROM sync.person_link l
    WHERE l.until IS NULL AND """
    + _SAME_PAIR.format("l")
    + ")"
)
_SCOPE = """\
INSERT INTO person_scope SELECT m.person_id FROM person_near
JOIN sync.person_record m USING (campus, patient_id) ON CONFLICT DO NOTHING"""
_SCOPE_PAIRS = """\
INSERT INTO person_scope SELECT m.person_id
FROM unnest(%s::text[], %s::text[]) AS u(campus, patient_id)
JOIN sync.person_record m USING (campus, patient_id) ON CONFLICT DO NOTHING"""
_SCOPE_MORE = """\
INSERT INTO person_scope SELECT DISTINCT o.person_id FROM person_scope s
JOIN sync.person_record m USING (person_id)
CROSS JOIN LATERAL (
    SELECT l.other_campus AS campus, l.other_patient_id AS patient_id FROM sync.person_link l
    WHERE l.until IS NULL AND l.campus = m.campus AND l.patient_id = m.patient_id
    UNION ALL SELECT l.campus, l.patient_id FROM sync.person_link l
    WHERE l.until IS NULL AND l.other_campus = m.campus AND l.other_patient_id = m.patient_id) l
JOIN sync.person_record o ON o.campus = l.campus AND o.patient_id = l.patient_id
ON CONFLICT DO NOTHING"""
_MEMBERS = """\
SELECT m.campus, m.patient_id, m.own_id, m.person_id FROM person_scope
JOIN sync.person_record m USING (person_id) ORDER BY m.campus, m.patient_id"""
_LINKS = """\
SELECT l.campus, l.patient_id, l.other_campus, l.other_patient_id, l.who, l.score
FROM person_scope JOIN sync.person_record m USING (person_id)
JOIN sync.person_link l ON l.campus = m.campus AND l.patient_id = m.patient_id
WHERE l.until IS NULL"""
_APART = "a.person_id IN (SELECT person_id FROM person_scope)"
_MOVE = """\
WITH moved AS (
    SELECT m.campus, m.patient_id, m.person_id, m.since, u.person_id AS next
    FROM unnest(%s::text[], %s::text[], %s::text[]) AS u(campus, patient_id, person_id)
    JOIN sync.person_record m USING (campus, patient_id) WHERE m.person_id <> u.person_id),
past AS (INSERT INTO sync.person_past (campus, patient_id, person_id, since, until, why)
    SELECT campus, patient_id, person_id, since, %s, 'regrouped' FROM moved
    WHERE since < %s ON CONFLICT DO NOTHING)
UPDATE sync.person_record m SET person_id = o.next, since = %s FROM moved o
WHERE m.campus = o.campus AND m.patient_id = o.patient_id"""
_CLOSE_REVIEWS = (
    """\
UPDATE sync.person_review v SET settled_at = %(now)s, state = CASE
    WHEN EXISTS (SELECT FROM sync.person_link p WHERE p.until IS NULL AND """
    + _SAME_PAIR.format("v")
    + """) THEN 'linked'
    WHEN (SELECT p.kind FROM sync.person_decision p WHERE """
    + _SAME_PAIR.format("v")
    + """ ORDER BY p.decided_us DESC, p.decision_id DESC LIMIT 1) = 'unlink' THEN 'unlinked'
    ELSE 'gone' END
WHERE v.state = 'open' AND ((v.why <> 'held' AND ("""
    + _NEAR.format("v")
    + """)) OR (v.why = 'held' AND EXISTS (SELECT FROM sync.person_record m JOIN person_scope s
        USING (person_id) WHERE m.campus = v.campus AND m.patient_id = v.patient_id)))
    AND NOT EXISTS (SELECT FROM person_pair p WHERE NOT p.linked AND p.why = v.why AND """
    + _SAME_PAIR.format("v")
    + ")"
)
_REVIEW = """\
INSERT INTO sync.person_review AS v (review_id, campus, patient_id, other_campus, other_patient_id,
    why, score, evidence, state, noted_at)
SELECT encode(sha256(convert_to(concat_ws(chr(31), campus, patient_id, other_campus,
        other_patient_id), 'UTF8')), 'hex'),
    campus, patient_id, other_campus, other_patient_id, why, score, evidence, 'open', %(now)s
FROM person_pair WHERE NOT linked
ON CONFLICT (review_id) DO UPDATE
SET state = 'open', why = excluded.why, score = excluded.score, evidence = excluded.evidence,
    noted_at = CASE WHEN v.state = 'open' THEN v.noted_at ELSE excluded.noted_at END,
    settled_at = NULL
WHERE (v.state, v.why, v.score, v.evidence)
    IS DISTINCT FROM ('open', excluded.why, excluded.score, excluded.evidence)"""
_PROGRESS = """\
SELECT campus, lsn, seq, rules, linked_at, change, incarnation FROM sync.person_progress"""
_SAVE = """\
INSERT INTO sync.person_progress (campus, lsn, seq, rules, linked_at, change, incarnation)
VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (campus) DO UPDATE SET lsn = excluded.lsn,
    seq = excluded.seq, rules = excluded.rules, linked_at = excluded.linked_at,
    change = excluded.change, incarnation = excluded.incarnation"""
_DECIDE = """\
INSERT INTO sync.person_decision (decision_id, kind, campus, patient_id, other_campus,
    other_patient_id, who, why, decided_us)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (decision_id) DO NOTHING"""


@dataclasses.dataclass(frozen=True)
class Linked:
    """What one run came to.

    Attributes:
      changed: patients looked at again. matched: records compared, with those near them.
      links, unlinks: pairs joined and parted. moved: records that changed their person.
      reviews: pairs newly put to a person. held: links that a decision holds apart.
      common: keys too common to compare by. whole: everything was matched.
    """

    changed: int
    matched: int
    links: int
    unlinks: int
    moved: int
    reviews: int
    held: int
    common: int
    whole: bool


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a person decided of a pair, in the order of (campus, patient_id); never changed."""

    kind: str
    pair: PairKey
    who: str
    why: str
    decided_us: int

    @property
    def decision_id(self) -> str:
        parts = [self.kind, *self.pair, self.who, self.why, self.decided_us]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def pair_of(one: Key, other: Key) -> PairKey:
    """Returns two records as a pair."""
    return (*min(one, other), *max(one, other))


def put_decisions(conn: psycopg.Connection, decisions: collections.abc.Iterable[Decision]) -> int:
    """Writes decisions that the store has not; returns how many. They take effect at `link`."""
    new = 0
    for one in decisions:
        row = (one.decision_id, one.kind, *one.pair, one.who, one.why, one.decided_us)
        new += conn.execute(_DECIDE, row).rowcount
    return new


def all_decisions(conn: psycopg.Connection) -> list[Decision]:
    """Returns every decision that a store has."""
    rows = conn.execute(
        "SELECT kind, campus, patient_id, other_campus, other_patient_id, who, why, decided_us"
        " FROM sync.person_decision ORDER BY decided_us, decision_id"
    )
    return [Decision(kind, tuple(pair), who, why, us) for kind, *pair, who, why, us in rows]


def link(
    conn: psycopg.Connection,
    links: collections.abc.Iterable[str],
    rules: MatchingRules,
    whole: bool = False,
) -> Linked:
    """Brings a store's persons up to date, in one transaction.

    Args:
      conn: autocommit; the tables are there (`store_schema.ensure`).
      links: those that feed the store, `campus>store`.
      whole: match everything, as the first run and a run by other rules do.
    """
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s)", (_ADVISORY_LOCK,))
        return _Run(conn, rules).run(list(links), whole)


class _Run:
    def __init__(self, conn: psycopg.Connection, rules: MatchingRules):
        self._conn = conn
        self._rules = rules
        (self._now,) = conn.execute("SELECT now()").fetchone()

    def run(self, links: list[str], whole: bool) -> Linked:
        conn = self._conn
        conn.execute(_TEMPORARY.encode())
        known = {row[0]: row[1:] for row in conn.execute(_PROGRESS)}
        rows = [known.get(name.partition(">")[0]) for name in links]
        whole |= any(row is None or bytes(row[2]) != self._rules.digest for row in rows)
        reached = self._touch(links, known)
        count = self._count("person_changed")
        (total,) = conn.execute("SELECT count(*) FROM sync.person_record").fetchone()
        whole |= count > max(_WHOLE_MIN, total * _WHOLE_SHARE)
        if whole:
            conn.execute(_TOUCH_ALL)
            count = self._count("person_changed")
        if not count:
            self._save(reached)
            return Linked(0, 0, 0, 0, 0, 0, 0, 0, whole)
        conn.execute("ANALYZE person_changed")
        self._enter()
        features, near, common = self._near(whole, count)
        pairs = self._judge(features, near)
        decided = self._decided(_NEAR.format("d"))
        self._put_pairs(features, pairs, decided)
        parted = conn.execute(_UNLINK, {"now": self._now}).fetchall()
        conn.execute(_RENEW)
        joined = conn.execute(_LINK, {"now": self._now}).rowcount
        moved, held = self._regroup(parted)
        values = {"now": self._now}
        conn.execute(_CLOSE_REVIEWS, values)
        reviews = conn.execute(_REVIEW, values).rowcount
        self._save(reached)
        return Linked(
            changed=count,
            matched=len(features),
            links=joined,
            unlinks=len(parted),
            moved=moved,
            reviews=reviews,
            held=held,
            common=common,
            whole=whole,
        )

    def _save(self, reached: _Reached) -> None:
        for campus, (position, edits) in reached.items():
            how_far = (*position, self._rules.digest, self._now, edits.reached, edits.incarnation)
            self._conn.execute(_SAVE, (campus, *how_far))

    def _touch(self, links: list[str], known: dict[str, tuple]) -> _Reached:
        reached = {}
        for name in links:
            campus = name.partition(">")[0]
            row = known.get(campus)
            before, at = (None, _EPOCH) if row is None else (Position(*row[:2]), row[3])
            edits = edits_since(self._conn, *((0, "") if row is None else row[4:]))
            span = changed(self._conn, name, before, at)
            self._conn.execute(_TOUCH, {"campus": campus, **span.names})
            if edits.any:
                self._conn.execute(_TOUCH_EDITED, {"campus": campus, "edited": edits.after})
            reached[campus] = (span.reached, edits)
        self._conn.execute(_TOUCH_DECIDED)
        return reached

    def _enter(self) -> None:
        """Brings `sync.person_record` to the patients that there are, with their keys."""
        conn = self._conn
        conn.execute(sql.SQL(_OLD_KEYS).format(wanted=sql.Identifier("person_changed")))
        batch, ids = self._read("person_changed")
        features = features_of(self._rules, batch)
        conn.execute(_LEAVE, {"now": self._now})
        rows = []
        keys = features.keys.view(np.int64).tolist()
        numbered = number_of(features)
        for (campus, patient), i in numbered.items():
            own = person_id(campus, patient)
            why = Excluded(int(features.excluded[i])).name.lower()
            excluded = why if features.excluded[i] else None
            there = [key for key in keys[i] if key]
            row = (campus, patient, own, own, self._now, excluded, ids[campus, patient], there)
            rows.append(row)
        with conn.cursor() as cursor:
            cursor.executemany(_ENTER, rows)

    def _near(self, whole: bool, count: int) -> tuple[Features, np.ndarray | None, int]:
        """Returns records to compare, which of them are to be matched again (None: all), and how
        many keys were too common."""
        conn, most = self._conn, self._rules.content.block_records
        if whole:
            conn.execute("INSERT INTO person_near SELECT * FROM person_changed")
            features = features_of(self._rules, self._read("person_changed")[0])
            common = common_keys(self._rules, features)
        else:
            # Who shares a key, of before or now, with a patient that changed: the key may have
            # become too common by it, or a phone one of more than one household.
            self._collect_keys("person_changed")
            self._share("person_changed", "person_near", most + count)
            self._collect_keys("person_near")
            self._share("person_near", "person_all", most)
            found = conn.execute(_COMMON, (most,)).fetchall()
            common = np.array([key for (key,) in found], np.int64).view(np.uint64)
            features = features_of(self._rules, self._read("person_all")[0])
        conn.execute("ANALYZE person_near")
        near = None if whole else self._marks(features)
        return without_common(features, common), near, len(common)

    def _collect_keys(self, wanted: str) -> None:
        self._conn.execute(sql.SQL(_OLD_KEYS).format(wanted=sql.Identifier(wanted)))
        self._conn.execute("ANALYZE person_key")

    def _share(self, wanted: str, into: str, limit: int) -> None:
        names = {"wanted": sql.Identifier(wanted), "into": sql.Identifier(into)}
        self._conn.execute(sql.SQL(_SHARING).format(limit=sql.Literal(limit), **names))
        self._conn.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(into)))

    def _marks(self, features: Features) -> np.ndarray:
        number = number_of(features)
        marks = np.zeros(len(features), np.bool_)
        for key in self._conn.execute("SELECT campus, patient_id FROM person_near"):
            if key in number:
                marks[number[key]] = True
        return marks

    def _judge(self, features: Features, near: np.ndarray | None) -> Pairs:
        left, right = candidates(features, near)
        pairs = judge(self._rules, features, left, right)
        return pairs.where(pairs.outcome != Outcome.NEW)

    def _decided(self, where: str) -> dict[PairKey, tuple[str, str, str]]:
        """Returns the decision that stands of each pair: kind, who and why."""
        rows = self._conn.execute(_DECIDED.format(where=where))
        return {tuple(row[:4]): tuple(row[4:]) for row in rows}

    def _put_pairs(self, features: Features, pairs: Pairs, decided: dict) -> None:
        """Lays down what is to be linked and what to be reviewed among records near by."""
        campus, patient = features.campus.to_pylist(), features.patient_id.to_pylist()
        columns = zip(
            pairs.left.tolist(),
            pairs.right.tolist(),
            (pairs.outcome == Outcome.LINK).tolist(),
            pairs.score.tolist(),
            pairs.evidence.tolist(),
            strict=True,
        )
        rows = {}
        for a, b, linked, score, evidence in columns:
            pair = (campus[a], patient[a], campus[b], patient[b])
            if pair in decided:
                continue
            why = "id_no and name" if linked else "similar"
            words = json.dumps(_words(evidence))
            rows[pair] = (*pair, linked, AUTOMATIC, why, score, words)
        for pair, (kind, who, why) in decided.items():
            if kind == "link":
                rows[pair] = (*pair, True, who, why, 1.0, json.dumps({"decision": "link"}))
        self._copy_pairs(rows.values())
        self._conn.execute("ANALYZE person_pair")

    def _copy_pairs(self, rows: collections.abc.Iterable[tuple]) -> None:
        with self._conn.cursor() as cursor, cursor.copy("COPY person_pair FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def _regroup(self, parted: list[tuple]) -> tuple[int, int]:
        """Brings records to their persons; returns how many moved and how many links are held."""
        conn = self._conn
        conn.execute(_SCOPE)
        ends = [(row[0], row[1]) for row in parted] + [(row[2], row[3]) for row in parted]
        conn.execute(_SCOPE_PAIRS, [[end[0] for end in ends], [end[1] for end in ends]])
        while True:
            conn.execute("ANALYZE person_scope")
            if not conn.execute(_SCOPE_MORE).rowcount:
                break
        members = conn.execute(_MEMBERS).fetchall()
        number = {(row[0], row[1]): i for i, row in enumerate(members)}
        links = conn.execute(_LINKS).fetchall()
        left = np.array([number[row[0], row[1]] for row in links], np.int64)
        right = np.array([number[row[2], row[3]] for row in links], np.int64)
        human = np.array([row[4] != AUTOMATIC for row in links], np.bool_)
        score = np.array([row[5] for row in links], np.float64)
        decided = self._decided(_APART)
        apart = [
            (number[pair[:2]], number[pair[2:]])
            for pair, decision in decided.items()
            if decision[0] == "unlink" and pair[:2] in number and pair[2:] in number
        ]
        rank = np.where(human, 0.0, 2 - score)
        groups, held = group(len(members), left, right, rank, apart)
        moved = [
            (campus, patient, members[own][2])
            for (campus, patient, _, person), own in zip(members, groups.tolist(), strict=True)
            if person != members[own][2]
        ]
        now = self._now
        columns = [list(column) for column in zip(*moved, strict=True)] or [[], [], []]
        conn.execute(_MOVE, [*columns, now, now, now])
        waiting = [links[i] for i in np.flatnonzero(held).tolist()]
        words = json.dumps({"decision": "unlink"})
        self._copy_pairs((*row[:4], False, AUTOMATIC, "held", row[5], words) for row in waiting)
        return len(moved), len(waiting)

    def _read(self, wanted: str) -> tuple[pa.RecordBatch, dict[Key, str]]:
        """Returns the live patients that a temporary table names, and their record ids."""
        address = "x.address" if "address" in TABLES["patient"].by_name else "NULL::text"
        columns = [
            ColumnRead("campus", "x.campus", Form.TEXT),
            ColumnRead("patient_id", "x.patient_id", Form.TEXT),
            ColumnRead("name", "x.name", Form.TEXT),
            ColumnRead("sex", "x.sex", Form.TEXT),
            ColumnRead("birth_date", "x.birth_date", Form.DATE),
            ColumnRead("id_no", "x.id_no", Form.TEXT),
            ColumnRead("phone", "x.phone", Form.TEXT),
            ColumnRead("address", address, Form.TEXT),
            ColumnRead("record_id", "x.record_id", Form.TEXT),
        ]
        place = sql.SQL(_ROWS).format(wanted=sql.Identifier(wanted)).as_string(self._conn)
        table = pa.Table.from_batches(
            list(read_rows(self._conn, columns, place)),
            schema=pa.schema([*INPUT_SCHEMA, pa.field("record_id", pa.utf8())]),
        ).combine_chunks()
        names = [table.column(name).to_pylist() for name in ("campus", "patient_id", "record_id")]
        ids = {(campus, patient): record for campus, patient, record in zip(*names, strict=True)}
        batches = table.select(INPUT_SCHEMA.names).to_batches()
        return (batches or [pa.RecordBatch.from_pylist([], schema=INPUT_SCHEMA)])[0], ids

    def _count(self, table: str) -> int:
        text = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
        return self._conn.execute(text).fetchone()[0]


def _words(evidence: list[int]) -> dict[str, str]:
    """Evidence in words: of each field that says anything, what; never a value."""
    return {
        field: Evidence(code).name.lower()
        for field, code in zip(FIELDS, evidence, strict=True)
        if code != Evidence.MISSING
    }
