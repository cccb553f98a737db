"""Sets of rows for comparing: read from a source or a store, whole or by their ids, digested."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from schemas.batches import Op, RawChanges, Reject
from schemas.clocks import monotonic_s
from schemas.entities import TABLES
from schemas.mappings import CampusMapping, load_mapping
from schemas.mappings import Source as SourceTable
from schemas.positions import SEQ_END, Position, lsn_in
from schemas.reread import Key, Span
from transforms import postgresql_sessions
from transforms.checksum import digest_rows
from transforms.deliver.edits.edit_schema import EDITED
from transforms.harmonise import Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.read_rows import ColumnRead, Form, content_columns, read_rows
from transforms.row_spans import SEPARATOR, PostgresqlSpans, Spans
from transforms.set_sums import hash_id, hash_ids

_OPTIONS = (
    "-c default_transaction_read_only=on -c timezone=UTC -c datestyle=ISO -c jit=off"
    " -c client_encoding=UTF8 -c extra_float_digits=1 -c bytea_output=hex"
)
_ARRAYS = ("hashes", "words", "live", "lsn", "rotten", "edited")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one campus and canonical table, each with what a comparison needs.

    Attributes:
      hashes: of the record ids (uint64[n]). words: of the contents' digests (uint64[n, 4]).
      live: False for a tombstone. lsn: position of the row's last change, 0 in a source.
      rotten: whether the digest that is stored with the row is not the content's.
      edited: whether clients of the stores have edited the record: it may differ from its source.
      ids: record ids. src_tables: source tables (utf8, or a dictionary of it).
    """

    hashes: np.ndarray
    words: np.ndarray
    live: np.ndarray
    lsn: np.ndarray
    rotten: np.ndarray
    edited: np.ndarray
    ids: pa.Array
    src_tables: pa.Array

    def __len__(self) -> int:
        return len(self.hashes)

    def where(self, mask: np.ndarray) -> "Rows":
        """Returns the rows in `mask` (bool[n])."""
        if mask.all():
            return self
        chosen = pa.array(mask)
        arrays = (getattr(self, name) for name in _ARRAYS)
        texts = (self.ids.filter(chosen), self.src_tables.filter(chosen))
        return Rows(*(array[mask] for array in arrays), *texts)


NO_ROWS = Rows(
    np.empty(0, np.uint64),
    np.empty((0, 4), np.uint64),
    np.empty(0, np.bool_),
    np.empty(0, np.int64),
    np.empty(0, np.bool_),
    np.empty(0, np.bool_),
    pa.array([], pa.utf8()),
    pa.array([], pa.utf8()),
)


def concat(parts: list[Rows]) -> Rows:
    """Returns the rows of all parts."""
    if not parts:
        return NO_ROWS
    numbers = [np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS]
    texts = [
        pa.concat_arrays([getattr(part, name).cast(pa.utf8()) for part in parts])
        for name in ("ids", "src_tables")
    ]
    return Rows(*numbers, *texts)


# A chunk is there several times while it is digested, at every end at once: this is what the
# memory of a whole reading is made of, and larger ones are no faster.
_CHUNK_BYTES = 1 << 20
_MARIADB_ROWS, _MARIADB_BYTES = 10_000, 2 << 20
_LOG_END = """\
SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint,
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"""
_BEGUN = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
_ENDED = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_IDS = 1000  # Asked for at once.
_PATIENCE_S = 2.0  # With transactions that may be about to end.
_POLL_S = 0.01
Read = Callable[[str, Collection[str] | None], Iterator[RawChanges]]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The next rows of a span, in the order of its key.

    Attributes:
      ids: record ids of all of them, soft-deleted ones too; a refused row's may be lacking.
      rows: the live ones, as `Reading.changes` yields them, one batch or more.
      behind: key of the last; None: there are no more. size: bytes as they were read.
    """

    ids: list[str]
    rows: list[pa.RecordBatch]
    behind: Key | None
    size: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """A consistent view of a source.

    Attributes:
      read_lsn: all that was committed before it is in the view.
      covered_lsn: a store whose ledger is here has all of the view.
      given_lsn: where in the log the view's rows may be delivered: everything that is in it lies
        before or here, everything that is not lies behind. None: no such place is known, since
        transactions that were under way did not end.
      taken_us: the source's clock, microseconds since 1970.
      changes: yields the source's rows of a canonical table, those of some ids or all, as
        canonical snapshot changes without position or digest; soft-deleted ones not.
      spans: returns a span of one source table. stretch: reads the next rows of such a span.
    """

    read_lsn: int
    covered_lsn: int
    given_lsn: int | None
    taken_us: int
    changes: Callable[[str, Collection[str] | None], Iterator[pa.RecordBatch]]
    spans: Callable[[Span], Spans]
    stretch: Callable[[Span, Spans, Key, int], Stretch]

    def rows(self, table: str, ids: Collection[str] | None = None) -> Iterator[Rows]:
        """Yields a canonical table's rows, those of some ids or all."""
        for changes in self.changes(table, ids):
            n = changes.num_rows
            nothing = np.zeros(n, np.bool_)
            yield Rows(
                hash_ids(changes.column("record_id")),
                words_of(digest_rows(TABLES[table], changes)),
                np.ones(n, np.bool_),
                np.zeros(n, np.int64),
                nothing,
                nothing,
                changes.column("record_id"),
                changes.column("_src_table"),
            )


class SourceSide:
    """One campus's source, read through its mapping.

    Args:
      generation: of its log.

    Attributes:
      tables: canonical tables that it feeds.
      refused: by canonical table, hashes of the ids of rows that the mapping refused.
    """

    _ids_at_once = _IDS

    def __init__(self, campus: str, dsn: str, mapping: str, generation: int = 0):
        self.campus = campus
        self._dsn = dsn
        self._at = functools.partial(lsn_in, generation)
        self._mapping: CampusMapping = load_mapping(mapping)
        self._parts = self._mapping.tables
        self.tables = tuple(dict.fromkeys(part.table for part in self._mapping.tables.values()))
        self.refused: dict[str, set[int]] = {}

    @contextlib.contextmanager
    def reading(self, patience_s: float = _PATIENCE_S) -> Iterator["Reading"]:
        """Yields one consistent view of the source.

        Args:
          patience_s: how long to wait for transactions that were under way: they may stand in the
            log already and be seen by nobody yet.

        Raises:
          psycopg.Error: of the connection.
        """
        with _connect(self._dsn) as conn:
            read_lsn, taken_us = conn.execute(_LOG_END).fetchone()
            exact = _all_ended(conn, patience_s)
            with conn.transaction():
                conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                # What commits after the first asking may or may not be in the source's rows; what
                # has committed by the second covers all of them.
                covered_lsn, _ = conn.execute(_LOG_END).fetchone()
                read = functools.partial(self._read, conn)
                yield Reading(
                    self._at(read_lsn),
                    self._at(covered_lsn),
                    # A commit may start exactly at the log's end: as in ADR 0010.
                    self._at(read_lsn - 1) if exact else None,
                    taken_us,
                    lambda table, ids: self._changes(table, ids, read),
                    lambda span: self._spans(conn, span),
                    lambda span, spans, after, most: self._stretch(span, spans, after, most, read),
                )

    def _columns(self, name: str) -> list[ColumnRead]:
        return [
            ColumnRead(column, f"{_quoted(column)}::text", Form.TEXT)
            for column in self._parts[name].needed
        ]

    def _spans(self, conn: psycopg.Connection, span: Span) -> Spans:
        columns = self._columns(span.table)

        def read(place: str) -> Iterator[RawChanges]:
            for batch in read_rows(conn, columns, place, _CHUNK_BYTES):
                yield _as_snapshot(span.table, batch)

        return PostgresqlSpans(conn, self._parts[span.table], span, self._mapping.zone, read)

    def _read(
        self, conn: psycopg.Connection, name: str, keys: Collection[str] | None
    ) -> Iterator[RawChanges]:
        columns = self._columns(name)
        place = ".".join(_quoted(word) for word in name.split(".", 1))
        if keys is None:
            batches = read_rows(conn, columns, place, _CHUNK_BYTES)
        else:
            batches = _read_keys(conn, columns, place, self._parts[name].id, keys)
        for batch in batches:
            yield _as_snapshot(name, batch)

    def _changes(
        self, table: str, ids: Collection[str] | None, read: Read
    ) -> Iterator[pa.RecordBatch]:
        """Reads the source tables that feed a canonical one; those that they lean on, first."""
        if ids is None:
            everything = ((name, read(name, None)) for name in self._parts)
            yield from self._harmonised(self.feeding(table), everything)
            return
        ordered = sorted(ids)
        for start in range(0, len(ordered), self._ids_at_once):
            found = self._of_keys(table, ordered[start : start + self._ids_at_once], read)
            yield from self._harmonised(self.feeding(table), found.items())

    def feeding(self, table: str) -> list[str]:
        """Returns the source tables that feed a canonical one."""
        return [name for name, part in self._parts.items() if part.table == table]

    def part(self, name: str) -> SourceTable | None:
        """Returns what the mapping says of a source table; None: it is not mapped."""
        return self._parts.get(name)

    def _stretch(self, span: Span, spans: Spans, after: Key, most: int, read: Read) -> Stretch:
        """Reads the next rows of a span, and the parents that they lean on."""
        raws, behind = spans.read(after, most)
        part, ids, size = self._parts[span.table], [], 0
        for raw in raws:
            for rows in raw.tables.values():
                keys = _keys_of(rows, part.id).drop_null().to_pylist()
                ids += [part.id_prefix + key for key in keys]
                size += rows.nbytes
        found = self._and_parents({span.table: raws}, {}, read)
        return Stretch(ids, list(self._harmonised([span.table], found.items())), behind, size)

    def _of_keys(self, table: str, ids: Collection[str], read: Read) -> dict[str, list[RawChanges]]:
        """Returns the rows of some ids and those that they lean on, parents first."""
        wanted: dict[str, set[str]] = {}
        for name, part in self._parts.items():
            if part.table == table:
                head = len(part.id_prefix)
                wanted[name] = {key[head:] for key in ids if key.startswith(part.id_prefix)}
        return self._and_parents({}, wanted, read)

    def _and_parents(
        self, found: dict[str, list[RawChanges]], wanted: dict[str, set[str]], read: Read
    ) -> dict[str, list[RawChanges]]:
        """Returns what was found, what is wanted besides, and what these lean on, parents first."""
        for name in reversed(self._parts):  # A parent stands before its children.
            part, keys = self._parts[name], wanted.get(name)
            if name not in found and not keys:
                continue
            if name not in found:
                found[name] = [_of_these(raw, name, part.id, keys) for raw in read(name, keys)]
            if part.parent is not None:
                parents = wanted.setdefault(part.parent.table, set())
                for rows in (rows for raw in found[name] for rows in raw.tables.values()):
                    parents |= set(_keys_of(rows, part.parent.by).to_pylist()) - {None}
        return {name: found[name] for name in self._parts if name in found}

    def _harmonised(
        self, own: list[str], found: Iterable[tuple[str, Iterable[RawChanges]]]
    ) -> Iterator[pa.RecordBatch]:
        harmoniser = Harmoniser(self._mapping, Lookups(self._mapping, follow=False))
        wanted = self._with_parents(own)
        for generation, (name, raws) in enumerate(found):
            for raw in raws if name in wanted else ():
                rows = self._canonical(harmoniser, self._parts[name].table, raw, generation)
                if name in own and rows is not None:
                    yield rows

    def _with_parents(self, names: list[str]) -> set[str]:
        wanted = set(names)
        for name in reversed(self._parts):  # A parent stands before its children.
            parent = self._parts[name].parent
            if name in wanted and parent is not None:
                wanted.add(parent.table)
        return wanted

    def id_of(self, reject: Reject) -> tuple[str, str] | None:
        """Returns canonical table and record id of a refused change, None if it names no row."""
        part = self._mapping.tables.get(reject.src_table)
        if part is None:
            return None
        if reject.row.get("record_id") is not None:  # Refused by the store: canonical content.
            return part.table, reject.row["record_id"]
        values = [reject.row.get(column) for column in part.id]
        if None in values:
            return None
        return part.table, part.id_prefix + SEPARATOR.join(values)

    def _canonical(
        self, harmoniser: Harmoniser, table: str, raw: RawChanges, generation: int
    ) -> pa.RecordBatch | None:
        harmonised = harmoniser.apply(_at(raw, generation))
        for reject in (*raw.rejects, *harmonised.rejects):
            if (found := self.id_of(reject)) is not None:
                self.refused.setdefault(found[0], set()).add(hash_id(found[1]))
        rows = harmonised.tables.get(table)
        if rows is None:
            return None
        here = rows.column("_op").to_numpy() != Op.DELETE
        return rows if here.all() else rows.filter(pa.array(here))


class StoreSide:
    """One consult store."""

    def __init__(self, name: str, dsn: str):
        self.name = name
        self._dsn = dsn

    def connect(self) -> psycopg.Connection:
        """Returns a read-only autocommit connection, for a `with`."""
        return _connect(self._dsn)

    def rows(
        self,
        conn: psycopg.Connection,
        campus: str,
        table: str,
        ids: Collection[str] | None = None,
        only: str = "true",
    ) -> Iterator[Rows]:
        """Yields one campus's rows of a canonical table, tombstones among them.

        Args:
          ids: only theirs. only: a condition in SQL.
        """
        declared = TABLES[table]
        columns = [
            *content_columns(declared),
            ColumnRead("_stored", "digest", Form.DIGEST),
            ColumnRead("_src_lsn", "src_lsn", Form.INT),
            ColumnRead("_deleted", "deleted", Form.BOOL),
            ColumnRead("_from", "src_table", Form.TEXT),
            ColumnRead("_edited", EDITED.format(""), Form.BOOL),
        ]
        literal = sql.Literal(campus).as_string(conn)
        place = f"consult.{_quoted(table)} WHERE campus = {literal} AND {only}"
        if ids is None:
            batches = read_rows(conn, columns, place, _CHUNK_BYTES)
        else:
            batches = (
                batch
                for some in _in_parts(ids)
                for batch in read_rows(conn, columns, f"{place} AND record_id = {_any(conn, some)}")
            )
        for batch in batches:
            words = words_of(digest_rows(declared, batch))
            live = ~batch.column("_deleted").to_numpy(zero_copy_only=False)
            stored = words_of(batch.column("_stored"))
            yield Rows(
                hash_ids(batch.column("record_id")),
                words,
                live,
                batch.column("_src_lsn").to_numpy(),
                live & (words != stored).any(axis=1),
                batch.column("_edited").to_numpy(zero_copy_only=False),
                batch.column("record_id"),
                batch.column("_from"),
            )


def words_of(digests: pa.Array) -> np.ndarray:
    """Returns digests (binary[32]) as their little-endian words (uint64[n, 4]); a null is zeros."""
    n = len(digests)
    data = np.frombuffer(digests.buffers()[1] or b"", np.uint8)
    words = data[digests.offset * 32 : (digests.offset + n) * 32].view("<u8").reshape(n, 4)
    if digests.null_count:
        words = np.where(digests.is_valid().to_numpy(zero_copy_only=False)[:, None], words, 0)
    return words


def _all_ended(conn: psycopg.Connection, patience_s: float) -> bool:
    """Waits until no transaction is under way that was when this began; False: in vain.

    A transaction is in the log before others see it, for as long as a disk or a standby takes:
    until it has ended, the log's end says nothing of a view.
    """
    (begun,) = conn.execute(_BEGUN).fetchone()
    deadline = monotonic_s() + patience_s
    while conn.execute(_ENDED).fetchone()[0] < begun:
        if monotonic_s() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _in_parts(ids: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(ids)
    for start in range(0, len(ordered), _IDS):
        yield ordered[start : start + _IDS]


def _any(conn: psycopg.Connection, values: Collection[str]) -> str:
    """`ANY (..)` of values whose type is what they are held against: an index serves it."""
    marks = str.maketrans({"\\": "\\\\", '"': '\\"'})
    text = "{" + ",".join(f'"{value.translate(marks)}"' for value in values) + "}"
    return f"ANY ({sql.Literal(text).as_string(conn)})"


def _read_keys(
    conn: psycopg.Connection,
    columns: list[ColumnRead],
    place: str,
    key: tuple[str, ...],
    keys: Collection[str],
) -> list[pa.RecordBatch]:
    """Reads the rows of some keys by the key's index; by its text where one is no value of it."""
    names = [_quoted(name) for name in key]
    parts = [found for text in keys if len(found := text.split(SEPARATOR)) == len(key)]
    if len(key) == 1:
        condition = f"{names[0]} = {_any(conn, keys)}"
    else:
        tuples = (", ".join(sql.Literal(v).as_string(conn) for v in found) for found in parts)
        condition = f"({', '.join(names)}) IN ({', '.join(f'({one})' for one in tuples)})"
    if len(key) == 1 or len(parts) == len(keys):
        try:
            with conn.transaction():
                return list(read_rows(conn, columns, f"{place} WHERE {condition}"))
        except psycopg.DataError:
            pass
    texts = ", ".join(f"{name}::text" for name in names)
    condition = f"concat_ws('{SEPARATOR}', {texts}) = {_any(conn, keys)}"
    return list(read_rows(conn, columns, f"{place} WHERE {condition}"))


def _ways(key: str, parts: int) -> Iterator[list[str]]:
    """Yields every key of so many columns that is written like this: a text may hold a `|`."""
    words = key.split(SEPARATOR)
    for ends in itertools.combinations(range(1, len(words)), parts - 1):
        bounds = [0, *ends, len(words)]
        yield [SEPARATOR.join(words[a:b]) for a, b in itertools.pairwise(bounds)]


def _keys_of(rows: pa.RecordBatch, columns: tuple[str, ...]) -> pa.Array:
    """Returns the columns' texts joined as in a record id; null where one is."""
    texts = [rows.column(name).cast(pa.utf8()) for name in columns]
    return texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, SEPARATOR)


def _of_these(
    raw: RawChanges, name: str, key: tuple[str, ...], keys: Collection[str]
) -> RawChanges:
    if not raw.tables:
        return raw  # All were refused.
    rows = raw.tables[name]
    mask = pc.is_in(_keys_of(rows, key), pa.array(list(keys), pa.utf8()))
    return dataclasses.replace(raw, tables={name: rows.filter(mask)})


def _as_snapshot(name: str, batch: pa.RecordBatch) -> RawChanges:
    n = batch.num_rows
    meta = {
        "_op": pa.array(np.full(n, Op.SNAPSHOT, np.uint8)),
        "_lsn": pa.array(np.zeros(n, np.int64)),
        "_seq": pa.array(np.arange(1, n + 1, dtype=np.int32)),
        "_commit_us": pa.array(np.zeros(n, np.int64)),
        "_unchanged": pa.array(np.zeros(n, np.uint64)),
    }
    arrays, names = [*meta.values(), *batch.columns], [*meta, *batch.schema.names]
    changes = {name: pa.RecordBatch.from_arrays(arrays, names=names)}
    return RawChanges(Position(0, 0), Position(0, SEQ_END), n, 0, changes)


def _at(raw: RawChanges, generation: int) -> RawChanges:
    """Returns the same rows at a place behind their parents', who are of an earlier generation."""
    tables = {}
    for name, rows in raw.tables.items():
        at = rows.schema.get_field_index("_lsn")
        lsn = pa.array(np.full(rows.num_rows, generation, np.int64))
        tables[name] = rows.set_column(at, rows.schema.field(at), lsn)
    return RawChanges(
        Position(generation, 0), Position(generation, SEQ_END), raw.captured, 0, tables,
        rejects=raw.rejects,
    )  # fmt: skip


class MariadbSide(SourceSide):
    """The same of a MariaDB or MySQL source, by the snapshot that a link starts with.

    Rows of some ids are found by an index; a table without one of its key's is read whole, once.
    """

    _ids_at_once = 1 << 30

    @contextlib.contextmanager
    def reading(self, patience_s: float = _PATIENCE_S) -> Iterator[Reading]:
        """Yields one consistent view of the source.

        Raises:
          CampusSyncError: it cannot be read.
        """
        from transforms.capture.mariadb.keyed_rows import conditions
        from transforms.capture.mariadb.places import border_at, last_before_transaction
        from transforms.capture.mariadb.snapshot import consistent_point, snapshot
        from transforms.capture.mariadb.spans import MariadbSpans

        def read(name: str, keys: Collection[str] | None) -> Iterator[RawChanges]:
            part = self._parts[name]
            chosen = [""]
            if keys is not None:
                split = [way for key in keys for way in _ways(key, len(part.id))]
                with point.connection.cursor() as cursor:
                    cursor.execute("SET character_set_results = utf8mb4")
                    chosen = list(conditions(cursor, name, part.id, split))
            for only in chosen:
                for raw in snapshot(
                    point,
                    (name,),
                    batch_rows=_MARIADB_ROWS,
                    batch_bytes=_MARIADB_BYTES,
                    keys={name: part.id},
                    columns={name: part.needed},
                    only=only,
                ):
                    if raw.tables or raw.rejects:
                        yield raw

        with consistent_point(self._dsn) as point:
            # A ledger at the log's end stands at the border, before every snapshot there.
            # Whatever else was read at this place of the log is the same.
            place = self._at(last_before_transaction(point.lsn))
            yield Reading(
                place,
                self._at(border_at(point.lsn)),
                place,
                point.taken_us,
                lambda table, ids: self._changes(table, ids, read),
                lambda span: MariadbSpans(point, self._parts[span.table], span, self._mapping.zone),
                lambda span, spans, after, most: self._stretch(span, spans, after, most, read),
            )


def _connect(dsn: str) -> psycopg.Connection:
    return postgresql_sessions.connect(
        dsn,
        options=_OPTIONS,
        application_name="campus_sync_compare",
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
