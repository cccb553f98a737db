"""Keep the list of records about which a person is asked, and its alarms."""

import collections.abc
import hashlib
import json

import psycopg

from schemas.versions import canonical_json
from transforms.conflicts.show import Shown
from transforms.deliver.edits.record_keys import KEYS, OF_KEY, Key, names_of, plain_key

CONFLICT = "conflict"  # A kind of incident.
_LOUD = ("alarm", "emergency")

_CONFLICTS = """\
INSERT INTO sync.conflict AS c (id, record_id, table_name, campus, group_name, rule, alarm,
    assignee, versions, state)
SELECT * FROM json_to_recordset(%s) AS v(id text, record_id text, table_name text, campus text,
    group_name text, rule text, alarm text, assignee text, versions integer, state text)
ON CONFLICT (id) DO UPDATE SET rule = excluded.rule, alarm = excluded.alarm,
    assignee = excluded.assignee, versions = excluded.versions, state = excluded.state,
    opened_at = CASE WHEN c.state = excluded.state THEN c.opened_at ELSE now() END,
    closed_at = NULL"""
_CLOSE = (
    "UPDATE sync.conflict AS r SET state = 'closed', closed_at = now() FROM "
    + KEYS
    + " WHERE "
    + OF_KEY
    + " AND r.state || '' <> 'closed' AND r.id <> ALL (%(named)s)"
)
_INCIDENTS = f"""\
INSERT INTO sync.incident (link, kind, detail)
SELECT c.table_name || ' ' || c.id, '{CONFLICT}',
    format('%%s of %%s: %%s is asked', c.group_name, c.table_name, c.assignee)
FROM sync.conflict c WHERE c.id = ANY (%(named)s) AND c.state = 'open'
    AND c.alarm = ANY (%(loud)s) AND NOT EXISTS (SELECT FROM sync.incident i
        WHERE (i.link, i.kind, i.state) = (c.table_name || ' ' || c.id, '{CONFLICT}', 'open'))"""
_END_INCIDENTS = f"""\
UPDATE sync.incident i SET state = 'closed', closed_at = now() FROM sync.conflict r, {KEYS}
WHERE {OF_KEY} AND r.state <> 'open' AND i.link = r.table_name || ' ' || r.id
    AND i.kind = '{CONFLICT}' AND i.state = 'open'"""


def conflict_id(key: Key, group: str) -> str:
    """Returns a conflict's name, the same at every store: of one group of one record."""
    return hashlib.sha256(canonical_json([*key, group]).encode()).hexdigest()[:16]


def note_conflicts(conn: psycopg.Connection, shown: collections.abc.Mapping[Key, Shown]) -> None:
    """Opens, changes and closes conflicts as what these records show says; so their incidents."""
    rows = [
        {
            **plain_key(key),
            "id": conflict_id(key, conflict.group),
            "group_name": conflict.group,
            "rule": conflict.rule,
            "alarm": conflict.alarm,
            "assignee": conflict.assignee,
            "versions": len(conflict.dots),
            "state": "open" if conflict.open else "settled",
        }
        for key, one in shown.items()
        for conflict in one.conflicts
    ]
    named = [row["id"] for row in rows]
    names = names_of(list(shown)) | {"named": named, "loud": list(_LOUD)}
    closed = conn.execute(_CLOSE.encode(), names).rowcount
    if rows:
        conn.execute(_CONFLICTS, (json.dumps(rows, ensure_ascii=False),))
        conn.execute(_INCIDENTS.encode(), names)
    if rows or closed:
        conn.execute(_END_INCIDENTS.encode(), names)
