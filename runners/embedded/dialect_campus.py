"""What campuses have in common that say the same events in other words: a dialect's rows."""

import collections.abc
import typing

from runners.embedded.campus_source import CampusSource, Row, Tables, result_rows
from runners.embedded.changes import Step
from runners.embedded.charts import Clock
from runners.embedded.clinic import Upload
from runners.embedded.dialect import Dialect, RowChange, Statement


class DialectCampus(CampusSource):
    """`CampusSource` through a dialect: the database sees its own tables only.

    Rows that stories may still change are kept in memory, for as long as the object lives.
    """

    def __init__(self, name: str, mapping: str, seed: int, clock: Clock, dialect: Dialect):
        self._dialect = dialect
        super().__init__(name, mapping, seed, clock)

    def _transaction(self, step: Step) -> tuple[collections.abc.Callable, int]:
        statements = self._dialect.transaction(step)
        return lambda connection: self._run(connection, statements), self._dialect.rows(step)

    def _run(self, connection: typing.Any, statements: list[Statement]) -> None:
        with connection.cursor() as cursor:
            for text, parameters in statements:
                cursor.execute(text, parameters)

    def _lines(self, upload: Upload, first: int, status: str) -> list[RowChange]:
        uuids = (self._ids.uuid(first + i) for i in range(len(upload.whose)))
        return self._dialect.results(result_rows(upload, uuids, status, self._clock()))

    def _apply(self, tables: Tables, step: Step) -> None:
        for change in self._dialect.say(step):
            rows = tables.setdefault(change.table, {})
            if change.before is not None:
                del rows[tuple(change.before[column] for column in change.key)]
            if change.after is not None:
                rows[tuple(change.after[column] for column in change.key)] = change.after

    def _one_row(self, table: str, values: Row) -> collections.abc.Callable:
        statement = self._dialect.statement(RowChange("insert", table, None, values, ()))
        return lambda connection: self._run(connection, [statement])


def by_table(
    lines: collections.abc.Iterable[RowChange],
) -> collections.abc.Iterator[tuple[str, list[Row]]]:
    """Yields inserts table by table, in the order in which the tables first come."""
    tables: dict[str, list[Row]] = {}
    for change in lines:
        tables.setdefault(change.table, []).append(change.after)
    yield from tables.items()
