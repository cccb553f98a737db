"""Spans of a PostgreSQL source's table: read stretch by stretch, and ids held against them."""

import dataclasses
import typing
from collections.abc import Collection, Sequence

import psycopg
from psycopg import sql

from schemas.batches import RawChanges
from schemas.errors import ConfigError
from schemas.mappings import Source
from schemas.reread import Key, Span

SEPARATOR = "|"
# Their texts are the log's whatever the session, and their order is one for table and constant.
_TYPES = {
    *("int2", "int4", "int8", "numeric", "text", "varchar", "uuid", "date", "timestamp"),
}
_COLUMNS = """\
SELECT a.attname, t.typname, format_type(a.atttypid, NULL),
    CASE WHEN a.attcollation <> 0 THEN
        (SELECT quote_ident(n.nspname) || '.' || quote_ident(c.collname)
        FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
        WHERE c.oid = a.attcollation) END
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped"""
_INDEXES = """\
SELECT array_agg(a.attname::text ORDER BY k.place)
FROM pg_index i
CROSS JOIN unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k (attnum, place)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = to_regclass(%s) AND i.indisvalid AND i.indisunique
    AND i.indpred IS NULL AND i.indexprs IS NULL
GROUP BY i.indexrelid, i.indisprimary ORDER BY i.indisprimary DESC, i.indexrelid"""
# A stretch is one of the key's index, whatever the planner takes a condition for.
_BY_INDEX = "SET LOCAL enable_sort = off; SET LOCAL enable_seqscan = off; SET LOCAL jit = off"
_DAYS = {"date", "timestamp", "timestamptz"}


class Told(typing.NamedTuple):
    """Keys, as in record ids, held against a span.

    Attributes:
      gone: that lie in it and are no row of the source.
      untold: that are no value of the key's columns, or of several ways: a text may hold a `|`.
    """

    gone: list[str]
    untold: list[str]


class Chunk(typing.NamedTuple):
    """The next rows of a span in the order of its key.

    Attributes:
      raws: as they were read. behind: key of the last; None: there are no more.
    """

    raws: list[RawChanges]
    behind: Key | None


class Spans(typing.Protocol):
    """One span of a source, in one view of it."""

    def read(self, after: Key, most: int) -> Chunk:
        """Returns at most so many rows behind the key `after`; an empty one is the beginning."""
        ...

    def held_against(self, keys: Collection[str]) -> Told:
        """Returns which keys lie in the span and are no row, by the source's own order."""
        ...

    def estimated(self) -> int:
        """Returns about how many rows it has, as the source's planner takes it."""
        ...


def unfit(name: str, why: str) -> ConfigError:
    """Returns the error for a table that cannot be read by spans."""
    return ConfigError(
        f"table {name} cannot be read again in parts: {why}. Remedy: `campus-sync reconcile "
        "--repair` mends what differs in it."
    )


def order_of(name: str, ids: Sequence[str], indexes: list[list[str]], span: Span) -> list[str]:
    """Returns the columns of the index that a span is read by, in its order.

    Raises:
      ConfigError: there is none.
    """
    key = ", ".join(ids)
    fitting = [index for index in indexes if sorted(index) == sorted(ids)]
    fitting.sort(key=lambda index: index != list(ids))
    if not fitting:
        raise unfit(name, f"it has no unique index of ({key}), the mapping's id")
    if (span.low or span.high) and fitting[0] != list(ids):
        raise unfit(name, f"its index is ({', '.join(fitting[0])}), the mapping's id ({key})")
    for bound in (span.low, span.high):
        if bound and len(bound) != len(ids):
            raise ConfigError(
                f"--from and --to of {name} need {len(ids)} parts, for ({key}). "
                f"Remedy: join them by {SEPARATOR}."
            )
    return fitting[0]


@dataclasses.dataclass(frozen=True)
class _Column:
    name: str
    type: str
    cast: sql.SQL
    collation: sql.SQL

    @property
    def of_row(self) -> sql.Composed:
        return sql.SQL("s.{}").format(sql.Identifier(self.name))

    def constant(self, text: str) -> sql.Composed:
        return sql.SQL("{}::{}").format(sql.Literal(text), self.cast)


class PostgresqlSpans:
    """`Spans` of a PostgreSQL table, in the transaction of `conn`.

    Args:
      read: reads the mapping's columns of a place in SQL. zone: of the campus, `+08:00`.

    Raises:
      ConfigError: the table has no key to be read by, or a bound or a column is none of it.
    """

    def __init__(self, conn: psycopg.Connection, part: Source, span: Span, zone: str, read):
        self._conn, self._read = conn, read
        words = span.table.split(".", 1)
        self._table = sql.Identifier(*words)
        place = self._table.as_string(conn)
        columns = {
            row[0]: _Column(row[0], row[1], sql.SQL(row[2]), _collate(row[3]))
            for row in conn.execute(_COLUMNS, [place])
        }
        indexes = [names for (names,) in conn.execute(_INDEXES, [place])]
        order = order_of(span.table, part.id, indexes, span)
        for name in order:
            if columns[name].type not in _TYPES:
                raise unfit(span.table, f"its key {name} is {columns[name].type}")
        self._order = [columns[name] for name in order]
        self._id = [columns[name] for name in part.id]
        self._bounds = [(">=", span.low), ("<=", span.high)]
        conditions = [
            _compared([c.of_row for c in self._id], sign, self._constants(bound))
            for sign, bound in self._bounds
            if bound
        ]
        if span.column:
            conditions.append(_since(columns.get(span.column), span, zone))
        self._within = conditions
        conn.execute(_BY_INDEX)

    def read(self, after: Key, most: int) -> Chunk:
        conditions = list(self._within)
        if after:
            last = [c.constant(after[c.name].decode()) for c in self._order]
            conditions.append(_compared([c.of_row for c in self._order], ">", last))
        place = sql.SQL("{} AS s {} ORDER BY {} LIMIT {}").format(
            self._table,
            _where(conditions),
            # By the columns themselves: the select list has texts under their names.
            sql.SQL(", ").join(c.of_row for c in self._order),
            sql.Literal(most),
        )
        raws = list(self._read(place.as_string(self._conn)))
        if sum(raw.captured for raw in raws) < most:
            return Chunk(raws, None)
        (rows,) = raws[-1].tables.values()
        last = rows.slice(rows.num_rows - 1)
        behind = {c.name: last.column(c.name)[0].as_py().encode() for c in self._order}
        return Chunk(raws, behind)

    def held_against(self, keys: Collection[str]) -> Told:
        split = [(key, key.split(SEPARATOR) if len(self._id) > 1 else [key]) for key in keys]
        whole = [(key, parts) for key, parts in split if len(parts) == len(self._id)]
        told = self._told(whole)
        told.untold.extend(key for key, parts in split if len(parts) != len(self._id))
        return told

    def _told(self, keys: list[tuple[str, list[str]]]) -> Told:
        """Asks; where one is no value of its column, each half by itself."""
        if not keys:
            return Told([], [])
        try:
            with self._conn.transaction():
                found = self._conn.execute(self._question(), self._answers(keys)).fetchall()
        except psycopg.DataError:
            if len(keys) == 1:
                return Told([], [keys[0][0]])
            middle = len(keys) // 2
            first, second = self._told(keys[:middle]), self._told(keys[middle:])
            return Told(first.gone + second.gone, first.untold + second.untold)
        return Told([keys[place - 1][0] for (place,) in found], [])

    def _question(self) -> sql.Composed:
        names = [sql.Identifier(f"k{i}") for i in range(len(self._id))]
        asked = [
            sql.SQL("k.{}::{}{}").format(name, c.cast, c.collation)
            for name, c in zip(names, self._id, strict=True)
        ]
        texts = sql.SQL(", ").join([sql.SQL("%s::text[]")] * len(names))
        same = [
            sql.SQL("{} = k.{}::{} AND {}::text = k.{}").format(c.of_row, n, c.cast, c.of_row, n)
            for n, c in zip(names, self._id, strict=True)
        ]
        conditions = [
            _compared(asked, sign, [sql.SQL("%s::{}").format(c.cast) for c in self._id])
            for sign, bound in self._bounds
            if bound
        ]
        conditions.append(
            sql.SQL("NOT EXISTS (SELECT FROM {} AS s WHERE {})").format(
                self._table, sql.SQL(" AND ").join(same)
            )
        )
        return sql.SQL("SELECT place FROM unnest({}) WITH ORDINALITY AS k ({}, place) {}").format(
            texts, sql.SQL(", ").join(names), _where(conditions)
        )

    def _answers(self, keys: list[tuple[str, list[str]]]) -> list:
        columns = [list(values) for values in zip(*(parts for _, parts in keys), strict=True)]
        return columns + [value for _, bound in self._bounds for value in bound]

    def estimated(self) -> int:
        query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} AS s {}").format(
            self._table, _where(self._within)
        )
        (plan,) = self._conn.execute(query).fetchone()
        return int(plan[0]["Plan"]["Plan Rows"])

    def _constants(self, bound: Sequence[str]) -> list[sql.Composed]:
        for column, text in zip(self._id, bound, strict=True):
            try:
                with self._conn.transaction():
                    self._conn.execute(sql.SQL("SELECT %s::{}").format(column.cast), [text])
            except psycopg.DataError:
                raise ConfigError(
                    f"{text} is no value of {column.name}, which is {column.type}. "
                    "Remedy: correct --from or --to."
                ) from None
        return [c.constant(text) for c, text in zip(self._id, bound, strict=True)]


def _collate(name: str | None) -> sql.SQL:
    return sql.SQL(f" COLLATE {name}" if name else "")


def _compared(left: list, sign: str, right: list) -> sql.Composed:
    comma = sql.SQL(", ")
    if len(left) == 1:
        return sql.SQL("{} {} {}").format(left[0], sql.SQL(sign), right[0])
    return sql.SQL("({}) {} ({})").format(comma.join(left), sql.SQL(sign), comma.join(right))


def _where(conditions: list[sql.Composed]) -> sql.Composable:
    if not conditions:
        return sql.SQL("")
    return sql.SQL("WHERE {}").format(sql.SQL(" AND ").join(conditions))


def _since(column: _Column | None, span: Span, zone: str) -> sql.Composed:
    if column is None or column.type not in _DAYS:
        raise not_a_day(span, sorted(_DAYS))
    moment = f"{span.since} 00:00:00{zone}" if column.type == "timestamptz" else span.since
    return sql.SQL("{} >= {}").format(column.of_row, column.constant(moment))


def not_a_day(span: Span, kinds: Sequence[str]) -> ConfigError:
    """Returns the error for a `column` that no day can be held against."""
    return ConfigError(
        f"{span.table} has no column {span.column} of a type that has days ({', '.join(kinds)}). "
        "Remedy: name one with --where-column, or use --from and --to."
    )
