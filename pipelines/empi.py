"""Keep one patient's records together in all consult stores, and what people decided of them.

Every store finds the same persons by itself, from its rows and from the decisions. Decisions are
a set that only grows; each run carries what one store has to the others.
"""

import collections.abc
import contextlib
import dataclasses

import psycopg

from pipelines.quality import connect
from schemas.config import PRIMARY, Config
from schemas.errors import CampusSyncError, ConfigError, reason
from schemas.patient_matching import MatchingRules
from transforms.deliver import store_schema
from transforms.deliver.judging import link_persons
from transforms.deliver.judging.link_persons import Decision, Key, Linked, PairKey, pair_of

_REVIEWS = """\
SELECT v.review_id, v.campus, v.patient_id, v.other_campus, v.other_patient_id, v.why, v.score,
    v.evidence, v.noted_at
FROM sync.person_review v
JOIN sync.person_record a ON (a.campus, a.patient_id) = (v.campus, v.patient_id)
JOIN sync.person_record b ON (b.campus, b.patient_id) = (v.other_campus, v.other_patient_id)
WHERE v.state = 'open' AND a.person_id <> b.person_id
ORDER BY v.score DESC, v.review_id"""
# An id names a record, the smallest that its person had; that record's person is meant, whatever
# its group has become. Where the record is gone, those who were with it tell.
_PERSON = """\
SELECT person_id FROM sync.person_record WHERE own_id = %(name)s
UNION ALL (SELECT m.person_id FROM sync.person_past p
    JOIN sync.person_record m USING (campus, patient_id)
    WHERE p.person_id = %(name)s ORDER BY p.until DESC, campus, patient_id)
LIMIT 1"""
_PERSON_OF = "SELECT person_id FROM sync.person_record WHERE campus = %s AND patient_id = %s"
_SUMMARY = """\
SELECT records, campuses, campuses_without_data, entities_lacking, campuses_late, complete_until,
    reviews_open FROM consult.person WHERE person_id = %s"""
_MEMBERS = """\
SELECT m.campus, m.patient_id, m.since, m.excluded,
    (SELECT jsonb_object_agg(c.entity, c.rows) FROM (
        SELECT entity, count(*) AS rows FROM consult.person_record r
        WHERE r.person_id = m.person_id AND r.campus = m.campus AND r.patient_id = m.patient_id
        GROUP BY 1) c)
FROM sync.person_record m WHERE m.person_id = %s ORDER BY m.campus, m.patient_id"""
_LINKS = """\
SELECT l.campus, l.patient_id, l.other_campus, l.other_patient_id, l.since, l.until, l.who, l.why,
    l.score, l.evidence
FROM sync.person_link l JOIN sync.person_record m USING (campus, patient_id)
WHERE m.person_id = %s ORDER BY l.since, 1, 2, 3, 4"""
_IDENTITIES = """\
SELECT r.campus, r.patient_id, r.name, r.sex, r.birth_date, r.id_no, r.phone
FROM sync.person_record m
JOIN consult.patient r ON r.campus = m.campus AND r.patient_id = m.patient_id
WHERE m.person_id = %s AND NOT r.deleted ORDER BY r.campus, r.patient_id"""
_KEYS_KNOWN = "SELECT DISTINCT key_id FROM sync.dead_letter"


@dataclasses.dataclass(frozen=True)
class StoreLinked:
    """One store: what linking came to, or `why` it could not be done."""

    store: str
    linked: Linked | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Review:
    """A pair that waits for a person; `evidence` says of each field what, never its value."""

    review_id: str
    pair: PairKey
    why: str
    score: float
    evidence: dict[str, str]
    noted_at: str


@dataclasses.dataclass(frozen=True)
class Person:
    """One person as a store has them.

    Attributes:
      missing: `campuses_without_data`, `entities_lacking`, `campuses_late`, `complete_until`.
      members: campus, patient id, since, why it is excluded, rows by entity.
      links: pairs with since, until, who, why, score and evidence, the ended ones too.
    """

    person_id: str
    missing: dict[str, object]
    reviews_open: int
    members: list[tuple]
    links: list[tuple]


def link_stores(config: Config, rules: MatchingRules, whole: bool = False) -> list[StoreLinked]:
    """Carries decisions among the stores and brings each one's persons up to date.

    To be called again and again; safe beside the sync job and beside itself.
    """
    found = []
    links = config.links_by_store()
    with contextlib.ExitStack() as stack:
        stores: dict[str, psycopg.Connection] = {}
        for name in links:
            try:
                conn = stack.enter_context(connect(config.stores[name].dsn))
                store_schema.ensure(conn)
                stores[name] = conn
            except psycopg.Error as error:
                found.append(StoreLinked(name, why=reason(error)))
        decisions = {
            one.decision_id: one for conn in stores.values() for one in _decisions_of(conn)
        }
        for name, conn in stores.items():
            try:
                link_persons.put_decisions(conn, decisions.values())
                linked = link_persons.link(conn, links[name], rules, whole)
                found.append(StoreLinked(name, linked))
            except psycopg.Error as error:
                found.append(StoreLinked(name, why=reason(error)))
    return found


def _decisions_of(conn: psycopg.Connection) -> list[Decision]:
    try:
        return link_persons.all_decisions(conn)
    except psycopg.Error:
        return []  # It is met again, with its reason, when it is written.


def decide(
    config: Config, kind: str, pairs: collections.abc.Iterable[PairKey], who: str, why: str, us: int
) -> list[str]:
    """Writes decisions to every store that can be reached; returns the others.

    They take effect with the next `link_stores`, which also carries them to the others.

    Raises:
      CampusSyncError: no store can be reached, so that nothing was decided.
    """
    decisions = [Decision(kind, pair, who, why, us) for pair in pairs]
    missed = []
    for name in config.links_by_store():
        try:
            with connect(config.stores[name].dsn) as conn:
                store_schema.ensure(conn)
                with conn.transaction():
                    link_persons.put_decisions(conn, decisions)
        except psycopg.Error as error:
            missed.append(f"store {name}: {reason(error)}")
    if len(missed) == len(config.links_by_store()):
        raise CampusSyncError(f"nothing was decided: {'; '.join(missed)}")
    return missed


def open_reviews(conn: psycopg.Connection) -> list[Review]:
    """Returns the pairs that wait for a person, the likeliest first."""
    return [
        Review(review, tuple(pair), why, score, evidence, noted_at.isoformat())
        for review, *pair, why, score, evidence, noted_at in conn.execute(_REVIEWS)
    ]


def chosen_pair(conn: psycopg.Connection, words: list[str]) -> PairKey:
    """Returns the pair that a review's id, or two records as CAMPUS/PATIENT, name.

    Raises:
      ConfigError: they name no pair, or several.
    """
    if len(words) == 2:
        return pair_of(record_of(words[0]), record_of(words[1]))
    if len(words) != 1 or "/" in words[0]:
        raise ConfigError(
            "names no pair. Remedy: give the id of a review, or two records as CAMPUS/PATIENT."
        )
    rows = conn.execute(
        "SELECT campus, patient_id, other_campus, other_patient_id FROM sync.person_review"
        " WHERE starts_with(review_id, %s)",
        (words[0],),
    ).fetchall()
    if len(rows) != 1:
        what = f"names {len(rows)} reviews" if rows else "names no review"
        raise ConfigError(
            f"{words[0]}: {what}. Remedy: give more of an id that `patients review --json` has."
        )
    return tuple(rows[0])


def pairs_with_person(conn: psycopg.Connection, record: Key) -> list[PairKey]:
    """Returns a record with each other record of its person: what parts it from them all."""
    others = conn.execute(
        "SELECT o.campus, o.patient_id FROM sync.person_record m"
        " JOIN sync.person_record o USING (person_id)"
        " WHERE (m.campus, m.patient_id) = (%s, %s) AND (o.campus, o.patient_id) <> (%s, %s)",
        (*record, *record),
    )
    return [pair_of(record, tuple(other)) for other in others]


def record_of(word: str) -> Key:
    """Returns (campus, patient_id) of CAMPUS/PATIENT.

    Raises:
      ConfigError: it is not of that form; the text is not repeated.
    """
    campus, slash, patient = word.partition("/")
    if not campus or not slash or not patient:
        raise ConfigError("a record is written as CAMPUS/PATIENT, e.g. main/M17.")
    return campus, patient


def person(conn: psycopg.Connection, word: str) -> Person:
    """Returns the person of an id, an earlier id of whom still names them, or of CAMPUS/PATIENT.

    Raises:
      ConfigError: the store has no such person.
    """
    if "/" in word:
        row = conn.execute(_PERSON_OF, record_of(word)).fetchone()
    else:
        row = conn.execute(_PERSON, {"name": word}).fetchone()
    if row is None:
        raise ConfigError(
            "there is no such person. Remedy: give an id that `patients show` has printed, or"
            " CAMPUS/PATIENT; run `patients match` if the record is new."
        )
    (found,) = row
    _, _, without, lacking, late, until, reviews = conn.execute(_SUMMARY, (found,)).fetchone()
    return Person(
        person_id=found,
        missing={
            "campuses_without_data": without,
            "entities_lacking": lacking,
            "campuses_late": late,
            "complete_until": None if until is None else until.isoformat(),
        },
        reviews_open=reviews,
        members=conn.execute(_MEMBERS, (found,)).fetchall(),
        links=conn.execute(_LINKS, (found,)).fetchall(),
    )


def identities(conn: psycopg.Connection, person_id: str) -> list[tuple]:
    """Returns who a person's records say they are: A PATIENT'S DATA."""
    return conn.execute(_IDENTITIES, (person_id,)).fetchall()


def keys_in_use(conn: psycopg.Connection) -> set[str]:
    """Returns the ids of the keys that the store's dead letters are sealed with."""
    return {key for (key,) in conn.execute(_KEYS_KNOWN)}


def primary(config: Config) -> psycopg.Connection:
    """Returns a connection to the platform's store, its tables in place, for a `with`.

    Raises:
      CampusSyncError: it cannot be reached.
    """
    try:
        conn = connect(config.stores[PRIMARY].dsn)
    except psycopg.Error as error:
        raise CampusSyncError(f"store {PRIMARY} cannot be reached: {reason(error)}") from None
    store_schema.ensure(conn)
    return conn
