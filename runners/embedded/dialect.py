"""Say a hospital's changes in another campus's words: the same events, other rows.

The clinic writes changes as the main campus's tables have them. A dialect keeps those rows in
mind, since an update names changed columns only, and says each change as rows of its own tables.
"""

import abc
import collections.abc
import datetime
import typing

from runners.embedded.changes import Change, Step, key_of

CHINA = datetime.timezone(datetime.timedelta(hours=8))
Row = dict[str, object]
Statement = tuple[str, tuple]


class RowChange(typing.NamedTuple):
    """One row change in a dialect: whole rows, as a log with full images has them.

    Attributes:
      op: insert, update or delete.
      table: without schema.
      before: None for an insert. after: None for a delete.
      key: the key's columns.
    """

    op: str
    table: str
    before: Row | None
    after: Row | None
    key: tuple[str, ...]


class Dialect(abc.ABC):
    """Translates one campus's transactions, in order; keeps every row that it has met.

    A subclass says rows: `_say` for a table's row, `_voided` for one that was deleted. Values are
    str, int, Decimal or None: times are text, as the campus writes them.
    """

    def __init__(self):
        self._rows: dict[str, dict[tuple, Row]] = {}
        self._visits: dict[str, int] = {}  # Visit number to the dialect's own number of it.
        self._classes: dict[str, str] = {}
        self._patients: dict[str, Row] = {}

    def say(self, step: Step) -> list[RowChange]:
        """Returns what a transaction does to the dialect's tables; nothing if it is given up."""
        if step.rolled_back:
            return []
        return [said for change in step.changes for said in self._say_change(change)]

    def say_in_vain(self, changes: collections.abc.Iterable[Change]) -> list[RowChange]:
        """Returns what inserts would do that are then given up: nothing of them is kept."""
        said = []
        for change in changes:
            said += self._say_change(change)
            del self._rows[change.table][tuple(key_of(change.table, change.values).values())]
        return said

    def rows(self, step: Step) -> int:
        """Returns the row changes that others see of a transaction in the dialect's tables."""
        return step.rows

    def transaction(self, step: Step) -> list[Statement]:
        """Returns a whole transaction, its savepoint and its end included, as `(SQL, parameters)`;
        the marks are `%s`."""
        if step.rolled_back:
            changes = self.say_in_vain(step.changes)
            return [("BEGIN", ()), *map(self.statement, changes), ("ROLLBACK", ())]
        done = list(map(self.statement, self.say(step)))
        if step.undone:
            undone = map(self.statement, self.say_in_vain(step.undone))
            savepoint, back = "SAVEPOINT second_thoughts", "ROLLBACK TO second_thoughts"
            done[1:1] = [(savepoint, ()), *undone, (back, ())]
        return [("BEGIN", ()), *done, ("COMMIT", ())]

    def number_of(self, visit_no: str) -> int:
        """Returns the dialect's own number of a visit that it has met."""
        return self._visits[visit_no]

    @abc.abstractmethod
    def results(self, rows: collections.abc.Iterable[Row]) -> list[RowChange]:
        """Returns the inserts of results that are not kept in mind, rows of `lis.result`: what a
        laboratory's machine uploads and nobody changes one by one."""

    @abc.abstractmethod
    def statement(self, change: RowChange) -> Statement:
        """Returns `(SQL, parameters)` that makes a row change."""

    def _say_change(self, change: Change) -> list[RowChange]:
        rows = self._rows.setdefault(change.table, {})
        before = rows.pop(tuple(change.key.values())) if change.op != "insert" else None
        after = (before or {}) | change.values if change.op != "delete" else None
        said_before = self._said(change.table, before)
        if after is not None:
            rows[tuple(key_of(change.table, after).values())] = after
            self._remember(change, before, after)
        said = self._said(change.table, after)
        if said is None:
            table, row, key = said_before
            voided = self._voided(table, row)
            if voided is not None:
                return [RowChange("update", table, row, voided, key)]
            return [RowChange("delete", table, row, None, key)]
        table, row, key = said
        if said_before is None:
            return [RowChange("insert", table, None, row, key)]
        return [RowChange("update", table, said_before[1], row, key)]

    def _remember(self, change: Change, before: Row | None, after: Row) -> None:
        if change.table == "his.visit":
            old = before and before["visit_no"]
            # A visit keeps its own number when the printed one changes.
            self._visits[after["visit_no"]] = self._visits[old] if old else self._new_visit(after)
            self._classes[after["visit_no"]] = after["visit_class"]
        if change.table == "his.patient":
            self._patients[after["mrn"]] = after

    def _said(self, table: str, row: Row | None) -> tuple[str, Row, tuple[str, ...]] | None:
        return None if row is None else self._say(table, row)

    @abc.abstractmethod
    def _new_visit(self, row: Row) -> int:
        """Returns the dialect's own number of a visit that begins."""

    @abc.abstractmethod
    def _say(self, table: str, row: Row) -> tuple[str, Row, tuple[str, ...]]:
        """Returns table, row and key columns of one row."""

    @abc.abstractmethod
    def _voided(self, table: str, row: Row) -> Row | None:
        """Returns a row of the dialect once it was deleted; None where it is really gone."""


def statement_of(change: RowChange, table: str, quote: str) -> Statement:
    """Returns `(SQL, parameters)` that makes a row change of `table`, which is quoted already.

    An update writes every column, as those programs do that save a whole form.
    """
    where = " AND ".join(f"{quote}{column}{quote} = %s" for column in change.key)
    if change.op == "insert":
        columns = ", ".join(f"{quote}{column}{quote}" for column in change.after)
        marks = ", ".join(["%s"] * len(change.after))
        return f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(change.after.values())
    old = tuple(change.before[column] for column in change.key)
    if change.op == "delete":
        return f"DELETE FROM {table} WHERE {where}", old
    sets = ", ".join(f"{quote}{column}{quote} = %s" for column in change.after)
    return f"UPDATE {table} SET {sets} WHERE {where}", (*change.after.values(), *old)


def number_of(uuid: str) -> int:
    """Returns the number in a result's UUID (see `ids.Ids.uuid`)."""
    return int(uuid[19:].replace("-", ""), 16) & ((1 << 62) - 1)


def local(time: datetime.datetime | None) -> datetime.datetime | None:
    """Returns a time as the campus's clocks on the wall show it, to the second, without a zone."""
    if time is None:
        return None
    return time.astimezone(CHINA).replace(tzinfo=None, microsecond=0)


def plain(time: datetime.datetime | None) -> str | None:
    """Returns `2016-03-05 08:15:00` of a time, in China."""
    time = local(time)
    return None if time is None else f"{time:%Y-%m-%d %H:%M:%S}"
