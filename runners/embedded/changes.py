"""What a hospital's programs do to its database: changes, in transactions, and as SQL."""

import collections.abc
import contextlib
import functools
import typing

import psycopg
from psycopg import sql

KEYS = {
    "his.patient": ("pid",),
    "his.allergy": ("allergy_id",),
    "his.visit": ("visit_no",),
    "his.medical_order": ("order_id",),
    "his.vital_sign": ("vital_id",),
    "his.diagnosis": ("diagnosis_id",),
    "his.prescription": ("rx_no", "line_no"),
    "his.consultation": ("consultation_id",),
    "lis.result": ("result_id",),
    "emr.document": ("doc_id",),
}


# What no story writes by itself.
OTHER_KEYS = {"his.staff": ("staff_no",), "his.department": ("dept_code",)}


class Change(typing.NamedTuple):
    """One row change.

    Attributes:
      op: insert, update or delete.
      table: `schema.table`.
      key: the row's key before the change; empty for an insert.
      values: the columns written; an update may write the key.
    """

    op: str
    table: str
    key: dict[str, object]
    values: dict[str, object]


class Step(typing.NamedTuple):
    """One transaction.

    Attributes:
      changes: in order.
      undone: done after a savepoint that stands behind the first change, then undone.
      rolled_back: the whole transaction is given up: nothing of it is ever seen.
    """

    changes: tuple[Change, ...]
    undone: tuple[Change, ...] = ()
    rolled_back: bool = False

    @property
    def rows(self) -> int:
        """Row changes that others see."""
        return 0 if self.rolled_back else len(self.changes)


def insert(table: str, values: dict[str, object]) -> Change:
    """Returns the insert of a whole row."""
    return Change("insert", table, {}, values)


def update(table: str, row: dict[str, object], **values: object) -> Change:
    """Returns the update of `values` in a row, and brings `row` up to date."""
    change = Change("update", table, key_of(table, row), values)
    row.update(values)
    return change


def delete(table: str, row: dict[str, object]) -> Change:
    """Returns the deletion of a row."""
    return Change("delete", table, key_of(table, row), {})


def key_of(table: str, row: collections.abc.Mapping[str, object]) -> dict[str, object]:
    """Returns the key columns of a row."""
    columns = KEYS[table] if table in KEYS else OTHER_KEYS[table]
    return {column: row[column] for column in columns}


def perform(connection: psycopg.Connection, step: Step) -> None:
    """Runs one transaction on a connection in autocommit.

    Raises:
      psycopg.Error: the database refuses it.
    """
    # psycopg forgets its prepared statements at a rollback, in a pipeline too late.
    rolls_back = bool(step.rolled_back or step.undone)
    with contextlib.nullcontext() if rolls_back else connection.pipeline():
        if len(step.changes) == 1 and not rolls_back:
            _execute(connection, step.changes[0])
            return
        connection.execute("BEGIN")
        for i, change in enumerate(step.changes):
            _execute(connection, change)
            if i == 0 and step.undone:
                connection.execute("SAVEPOINT second_thoughts")
                for regretted in step.undone:
                    _execute(connection, regretted)
                connection.execute("ROLLBACK TO SAVEPOINT second_thoughts")
        connection.execute("ROLLBACK" if step.rolled_back else "COMMIT")


def apply(tables: dict[str, dict[tuple, dict]], step: Step) -> None:
    """Does to rows in memory, by table and key, what `perform` does to a database."""
    if step.rolled_back:
        return
    for change in step.changes:
        rows = tables.setdefault(change.table, {})
        row = {} if change.op == "insert" else rows.pop(tuple(change.key.values()))
        if change.op != "delete":
            row = row | change.values
            rows[tuple(key_of(change.table, row).values())] = row


def _execute(connection: psycopg.Connection, change: Change) -> None:
    statement = _statement(change.op, change.table, tuple(change.key), tuple(change.values))
    connection.execute(statement, [*change.values.values(), *change.key.values()], prepare=True)


@functools.lru_cache(maxsize=1024)
def _statement(op: str, table: str, key: tuple[str, ...], columns: tuple[str, ...]) -> sql.Composed:
    name = sql.Identifier(*table.split("."))
    where = sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(c)) for c in key)
    if op == "delete":
        return sql.SQL("DELETE FROM {} WHERE {}").format(name, where)
    if op == "update":
        sets = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(c)) for c in columns)
        return sql.SQL("UPDATE {} SET {} WHERE {}").format(name, sets, where)
    return sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        name,
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.Placeholder() * len(columns)),
    )
