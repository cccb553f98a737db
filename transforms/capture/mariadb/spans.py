"""Spans of a MariaDB source's table: read chunk by chunk, and ids held against them."""

import datetime
import decimal
from collections.abc import Collection, Sequence

import pymysql

from schemas.errors import ConfigError
from schemas.mappings import Source
from schemas.reread import Key, Span
from transforms.capture.mariadb.keyed_rows import conditions
from transforms.capture.mariadb.snapshot import SnapshotPoint, snapshot
from transforms.capture.mariadb.snapshot_columns import INTEGERS, TEXTS, quote, quote_table
from transforms.capture.snapshot_part import Rest
from transforms.row_spans import SEPARATOR, Chunk, Told, not_a_day, order_of, unfit

_COLUMNS = """\
SELECT COLUMN_NAME, DATA_TYPE, CHARACTER_SET_NAME, COLLATION_NAME FROM information_schema.COLUMNS
WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s"""
_PRIMARY = """\
SELECT COLUMN_NAME FROM information_schema.STATISTICS
WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s AND INDEX_NAME = 'PRIMARY' ORDER BY SEQ_IN_INDEX"""
# Those that rows are found by (`keyed_rows`) and that chunks go by.
_TYPES = INTEGERS | (TEXTS - {"enum", "set"}) | {"decimal", "date"}
_DAYS = ("date", "datetime", "timestamp")
_BYTES = 2 << 20
_TOGETHER = 200  # Keys in one question.


class MariadbSpans:
    """`Spans` of a MariaDB table, in the view of `point`.

    Args:
      zone: of the campus, `+08:00`.

    Raises:
      ConfigError: the table has no key to be read by, or a bound or a column is none of it.
    """

    def __init__(self, point: SnapshotPoint, part: Source, span: Span, zone: str):
        self._point, self._part, self._span = point, part, span
        with self._cursor() as cursor:
            cursor.execute(_COLUMNS, span.table.split(".", 1))
            found = {str(row[0]): [str(x or "").lower() for x in row[1:]] for row in cursor}
            cursor.execute(_PRIMARY, span.table.split(".", 1))
            primary = [str(name) for (name,) in cursor]
            self._order = order_of(span.table, part.id, [primary] if primary else [], span)
            for name in self._order:
                if found[name][0] not in _TYPES:
                    raise unfit(span.table, f"its key {name} is {found[name][0]}")
            self._types = [found[name] for name in part.id]
            self._low, self._high = self._values(span.low), self._values(span.high)
            self._only = self._condition(cursor, found, zone)

    def _cursor(self) -> pymysql.cursors.Cursor:
        cursor = self._point.connection.cursor()
        cursor.execute("SET character_set_results = utf8mb4")
        return cursor

    def read(self, after: Key, most: int) -> Chunk:
        name = self._span.table
        parts = list(
            snapshot(
                self._point,
                (name,),
                batch_rows=most,
                batch_bytes=_BYTES,
                keys={name: self._part.id},
                columns={name: self._part.needed},
                rest=Rest(table=name, behind=after),
                only=self._only,
                once=True,
            )
        )
        more = sum(part.captured for part in parts) == most
        return Chunk(list(parts), parts[-1].behind if more else None)

    def held_against(self, keys: Collection[str]) -> Told:
        split = {key: key.split(SEPARATOR) if len(self._types) > 1 else [key] for key in keys}
        asked, untold = {}, []
        for key, parts in split.items():
            try:
                values = self._values(parts) if len(parts) == len(self._types) else None
            except ConfigError:
                values = None
            if values is None:
                untold.append(key)
            elif self._may_hold(values):
                asked[key] = values
        there = self._there([split[key] for key in asked])
        lacking = {key: values for key, values in asked.items() if key not in there}
        return Told(self._held(lacking), untold)

    def _may_hold(self, values: tuple) -> bool:
        """Whether a key may lie in the span, as far as that is known without asking."""
        if not all(isinstance(value, int) for value in values):
            return True
        above = not self._low or values >= self._low
        return above and (not self._high or values <= self._high)

    def _there(self, keys: list[list[str]]) -> set[str]:
        name, ids = self._span.table, self._part.id
        found: set[str] = set()
        with self._cursor() as cursor:
            chosen = list(conditions(cursor, name, ids, keys)) if keys else []
        for only in chosen:
            for part in snapshot(
                self._point,
                (name,),
                batch_rows=10_000,
                batch_bytes=_BYTES,
                keys={name: ids},
                columns={name: ids},
                only=only,
            ):
                for rows in part.tables.values():
                    columns = [rows.column(column).to_pylist() for column in ids]
                    found |= {SEPARATOR.join(map(str, key)) for key in zip(*columns, strict=True)}
        return found

    def _held(self, keys: dict[str, tuple]) -> list[str]:
        """Returns which keys lie between the bounds, by the collations of their columns."""
        bounds = [(sign, b) for sign, b in ((">=", self._low), ("<=", self._high)) if b]
        if not bounds or all(isinstance(v, int) for values in keys.values() for v in values):
            return list(keys)
        row = f"({', '.join(self._term(*kind) for kind in self._types)})"
        condition = " AND ".join(f"{row} {sign} {row}" for sign, _ in bounds)
        held, wanted = [], list(keys)
        with self._cursor() as cursor:
            for start in range(0, len(wanted), _TOGETHER):
                some = wanted[start : start + _TOGETHER]
                values = [v for key in some for _, b in bounds for v in (*keys[key], *b)]
                cursor.execute(f"SELECT {', '.join([condition] * len(some))}", values)
                answers = cursor.fetchone()
                held += [key for key, yes in zip(some, answers, strict=True) if yes]
        return held

    @staticmethod
    def _term(kind: str, charset: str, collation: str) -> str:
        if kind in TEXTS:
            return f"CONVERT(%s USING {charset}) COLLATE {collation}"
        return "CAST(%s AS DATE)" if kind == "date" else "%s"

    def estimated(self) -> int:
        where = f" WHERE {self._only}" if self._only else ""
        with self._cursor() as cursor:
            cursor.execute(f"EXPLAIN SELECT 1 FROM {quote_table(self._span.table)}{where}")
            names = [str(column[0]) for column in cursor.description]
            row = dict(zip(names, cursor.fetchone(), strict=True))
        return int(row["rows"] or 0)

    def _condition(self, cursor: pymysql.cursors.Cursor, found: dict, zone: str) -> str:
        """Returns the span's condition, values written by the driver."""
        first = quote(self._part.id[0])
        row = f"({', '.join(quote(name) for name in self._part.id)})"
        marks = f"({', '.join(['%s'] * len(self._part.id))})"
        parts = [
            # An index serves the first column's alone.
            cursor.mogrify(f"{first} {sign} %s AND {row} {sign} {marks}", (bound[0], *bound))
            for sign, bound in ((">=", self._low), ("<=", self._high))
            if bound
        ]
        if self._span.column:
            kind = found.get(self._span.column, [""])[0]
            if kind not in _DAYS:
                raise not_a_day(self._span, _DAYS)
            since = self._span.since
            if kind == "timestamp":  # The session's zone is UTC.
                local = datetime.datetime.fromisoformat(f"{since} 00:00:00{zone}")
                since = f"{local.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S}"
            parts.append(cursor.mogrify(f"{quote(self._span.column)} >= %s", [since]))
        return " AND ".join(parts)

    def _values(self, texts: Sequence[str]) -> tuple:
        """Returns the parts of a key as values that the server compares with its columns.

        Raises:
          ConfigError: one is no value of its column.
        """
        read = {"decimal": decimal.Decimal, "date": datetime.date.fromisoformat}
        values = []
        for (kind, *_), text in zip(self._types, texts, strict=False):
            try:
                values.append((int if kind in INTEGERS else read.get(kind, str))(text))
            except (ValueError, decimal.InvalidOperation):
                raise ConfigError(
                    f"{text} is no value of a key that is {kind}. Remedy: correct --from or --to."
                ) from None
        return tuple(values)
