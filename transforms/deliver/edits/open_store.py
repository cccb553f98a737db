"""Open a store for edits: its trigger is told who it is and which policies hold."""

import psycopg

from schemas.conflict_policy import ConflictRules, Immutable, Never, Owner

_OPEN = """\
INSERT INTO sync.store AS s (name, rules, policies) VALUES (%(name)s, %(rules)s, %(policies)s)
ON CONFLICT (id) DO UPDATE
SET name = excluded.name, rules = excluded.rules, policies = excluded.policies
WHERE (s.name, s.rules, s.policies)
    IS DISTINCT FROM (excluded.name, excluded.rules, excluded.policies)"""
_POLICY = """\
INSERT INTO sync.policy AS p VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (table_name) DO UPDATE
SET editable = excluded.editable, created = excluded.created,
    archived_column = excluded.archived_column, archived_values = excluded.archived_values,
    roles = excluded.roles"""


def open_store(conn: psycopg.Connection, name: str, rules: ConflictRules) -> None:
    """Opens a store for edits: gives it its name and tells its trigger the policies; idempotent.

    Commits. The schema must be in place (`store_schema.ensure`).
    """
    with conn.transaction():
        names = {"name": name, "rules": rules.digest, "policies": rules.content}
        conn.execute(_OPEN, names)
        for table in rules.edited_at_stores:
            conn.execute(_POLICY, _policy_row(table, rules))


def _policy_row(name: str, rules: ConflictRules) -> tuple:
    groups = rules.tables[name].groups
    closed = (Immutable, Never, Owner)
    editable = [c for group in groups if not isinstance(group, closed) for c in group.columns]
    marks = [mark for group in groups if (mark := getattr(group, "archived", None)) is not None]
    column, values = (marks[0].column, list(marks[0].values)) if marks else (None, [])
    created = not any(isinstance(group, Never) for group in groups)
    return name, sorted([*editable, "deleted"]), created, column, values, list(rules.roles)
