"""Sets of rows for comparing: read from a source or a store, digested, summed by buckets."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numba as nb
import numpy as np
import psycopg
import pyarrow as pa
from psycopg import sql

from schemas.batches import Op, RawChanges, Reject
from schemas.entities import TABLES
from schemas.mappings import CampusMapping, load_mapping
from schemas.positions import SEQ_END, Position
from schemas.tables import Table
from transforms.checksum import digest_rows
from transforms.harmonise import Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.read_rows import ColumnRead, Form, content_columns, read_rows

# A difference is looked for among the rows of unequal buckets only: memory is this many sums
# (40 bytes each) a table, whatever its size.
BUCKETS = 1 << 12
_CONNECT_TIMEOUT_S = 5
_OPTIONS = (
    "-c default_transaction_read_only=on -c timezone=UTC -c datestyle=ISO -c jit=off"
    " -c client_encoding=UTF8 -c extra_float_digits=1 -c bytea_output=hex"
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one campus and canonical table, each with what a comparison needs.

    Attributes:
      hashes: of the record ids (uint64[n]). words: of the contents' digests (uint64[n, 4]).
      live: False for a tombstone. lsn: position of the row's last change, 0 in a source.
      rotten: whether the digest that is stored with the row is not the content's.
      ids: record ids. src_tables: source tables (utf8, or a dictionary of it).
    """

    hashes: np.ndarray
    words: np.ndarray
    live: np.ndarray
    lsn: np.ndarray
    rotten: np.ndarray
    ids: pa.Array
    src_tables: pa.Array

    def __len__(self) -> int:
        return len(self.hashes)

    def where(self, mask: np.ndarray) -> "Rows":
        """Returns the rows in `mask` (bool[n])."""
        if mask.all():
            return self
        chosen = pa.array(mask)
        arrays = (self.hashes, self.words, self.live, self.lsn, self.rotten)
        texts = (self.ids.filter(chosen), self.src_tables.filter(chosen))
        return Rows(*(array[mask] for array in arrays), *texts)


NO_ROWS = Rows(
    np.empty(0, np.uint64),
    np.empty((0, 4), np.uint64),
    np.empty(0, np.bool_),
    np.empty(0, np.int64),
    np.empty(0, np.bool_),
    pa.array([], pa.utf8()),
    pa.array([], pa.utf8()),
)


def concat(parts: list[Rows]) -> Rows:
    """Returns the rows of all parts."""
    if not parts:
        return NO_ROWS
    numbers = [
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("hashes", "words", "live", "lsn", "rotten")
    ]
    texts = [
        pa.concat_arrays([getattr(part, name).cast(pa.utf8()) for part in parts])
        for name in ("ids", "src_tables")
    ]
    return Rows(*numbers, *texts)


_MARIADB_ROWS, _MARIADB_BYTES = 50_000, 16 << 20
_LOG_END = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"


class Sums:
    """A set of rows by buckets of its ids: counts and sums of digests, independent of order."""

    def __init__(self):
        self.rows = np.zeros(BUCKETS, np.int64)
        self.words = np.zeros((BUCKETS, 4), np.uint64)

    def add(self, hashes: np.ndarray, words: np.ndarray) -> None:
        """Adds rows: hashes of ids (uint64[n]) and words of digests (uint64[n, 4])."""
        _add(self.rows, self.words, hashes, np.ascontiguousarray(words))

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    @property
    def digest(self) -> bytes:
        """The digest of the whole set, as `transforms.checksum.digest_set` has it."""
        return self.words.sum(axis=0, dtype=np.uint64).astype("<u8").tobytes()

    def unequal(self, other: "Sums") -> np.ndarray:
        """Returns the buckets in which two sets differ (int64[n])."""
        same = (self.rows == other.rows) & (self.words == other.words).all(axis=1)
        return np.flatnonzero(~same)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A consistent view of a source.

    Attributes:
      read_lsn: all that was committed before it is in the view.
      covered_lsn: a store whose ledger is here has all of the view.
      rows: yields a canonical table's rows as the source has them; soft-deleted ones not.
    """

    read_lsn: int
    covered_lsn: int
    rows: Callable[[str], Iterator[Rows]]


class SourceSide:
    """One campus's source, read through its mapping.

    Attributes:
      tables: canonical tables that it feeds.
      refused: by canonical table, hashes of the ids of rows that the mapping refused.
    """

    def __init__(self, campus: str, dsn: str, mapping: str):
        self.campus = campus
        self._dsn = dsn
        self._mapping: CampusMapping = load_mapping(mapping)
        self._parts = self._mapping.tables
        self.tables = tuple(dict.fromkeys(part.table for part in self._mapping.tables.values()))
        self.refused: dict[str, set[int]] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator["Reading"]:
        """Yields one consistent view of the source.

        Raises:
          psycopg.Error: of the connection.
        """
        with _connect(self._dsn) as conn:
            # What commits after this may or may not be in the source's rows; what has committed
            # by the second asking covers all of them.
            (read_lsn,) = conn.execute(_LOG_END).fetchone()
            with conn.transaction():
                conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                (covered_lsn,) = conn.execute(_LOG_END).fetchone()
                yield Reading(
                    read_lsn,
                    covered_lsn,
                    lambda table: self._rows(table, lambda name: self._read(conn, name)),
                )

    def _read(self, conn: psycopg.Connection, name: str) -> Iterator[RawChanges]:
        columns = [
            ColumnRead(column, f"{_quoted(column)}::text", Form.TEXT)
            for column in self._parts[name].needed
        ]
        place = ".".join(_quoted(word) for word in name.split(".", 1))
        for batch in read_rows(conn, columns, place):
            yield _as_snapshot(name, batch)

    def _rows(self, table: str, read: Callable[[str], Iterator[RawChanges]]) -> Iterator[Rows]:
        """Reads the source tables that feed a canonical one; those that they lean on, first."""
        harmoniser = Harmoniser(self._mapping, Lookups(self._mapping, follow=False))
        own = [name for name, part in self._parts.items() if part.table == table]
        wanted = self._with_parents(own)
        for generation, name in enumerate(name for name in self._parts if name in wanted):
            for raw in read(name):
                rows = self._canonical(harmoniser, TABLES[self._parts[name].table], raw, generation)
                if name in own:
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
        return None if None in values else (part.table, "|".join(values))

    def _canonical(
        self, harmoniser: Harmoniser, table: Table, raw: RawChanges, generation: int
    ) -> Rows:
        harmonised = harmoniser.apply(_at(raw, generation))
        for reject in harmonised.rejects:
            if (found := self.id_of(reject)) is not None:
                self.refused.setdefault(found[0], set()).add(hash_id(found[1]))
        rows = harmonised.tables.get(table.name)
        if rows is None:
            return NO_ROWS
        here = rows.column("_op").to_numpy() != Op.DELETE
        if not here.all():
            rows = rows.filter(pa.array(here))
        n = rows.num_rows
        return Rows(
            hash_ids(rows.column("record_id")),
            words_of(digest_rows(table, rows)),
            np.ones(n, np.bool_),
            np.zeros(n, np.int64),
            np.zeros(n, np.bool_),
            rows.column("record_id"),
            rows.column("_src_table"),
        )


class StoreSide:
    """One consult store."""

    def __init__(self, name: str, dsn: str):
        self.name = name
        self._dsn = dsn

    def connect(self) -> psycopg.Connection:
        """Returns a read-only autocommit connection, for a `with`."""
        return _connect(self._dsn)

    def rows(self, conn: psycopg.Connection, campus: str, table: str) -> Iterator[Rows]:
        """Yields one campus's rows of a canonical table, tombstones among them."""
        declared = TABLES[table]
        columns = [
            *content_columns(declared),
            ColumnRead("_stored", "digest", Form.DIGEST),
            ColumnRead("_src_lsn", "src_lsn", Form.INT),
            ColumnRead("_deleted", "deleted", Form.BOOL),
            ColumnRead("_from", "src_table", Form.TEXT),
        ]
        literal = sql.Literal(campus).as_string(conn)
        place = f"consult.{_quoted(table)} WHERE campus = {literal}"
        for batch in read_rows(conn, columns, place):
            words = words_of(digest_rows(declared, batch))
            live = ~batch.column("_deleted").to_numpy(zero_copy_only=False)
            stored = words_of(batch.column("_stored"))
            yield Rows(
                hash_ids(batch.column("record_id")),
                words,
                live,
                batch.column("_src_lsn").to_numpy(),
                live & (words != stored).any(axis=1),
                batch.column("record_id"),
                batch.column("_from"),
            )


def hash_ids(ids: pa.Array) -> np.ndarray:
    """Returns a 64-bit hash of every text (uint64[n]): the same everywhere, not secret."""
    offsets = np.frombuffer(ids.buffers()[1] or bytes(4), np.int32)
    offsets = offsets[ids.offset : ids.offset + len(ids) + 1].astype(np.int64)
    data = ids.buffers()[2]
    return _hash(offsets, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8))


def hash_id(record_id: str) -> int:
    """Returns `hash_ids` of one id."""
    return int(hash_ids(pa.array([record_id]))[0])


def words_of(digests: pa.Array) -> np.ndarray:
    """Returns digests (binary[32]) as their little-endian words (uint64[n, 4]); a null is zeros."""
    n = len(digests)
    data = np.frombuffer(digests.buffers()[1] or b"", np.uint8)
    words = data[digests.offset * 32 : (digests.offset + n) * 32].view("<u8").reshape(n, 4)
    if digests.null_count:
        words = np.where(digests.is_valid().to_numpy(zero_copy_only=False)[:, None], words, 0)
    return words


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
    """The same of a MariaDB or MySQL source, by the snapshot that a link starts with."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Yields one consistent view of the source.

        Raises:
          CampusSyncError: it cannot be read.
        """
        from transforms.capture.mariadb.places import border_at
        from transforms.capture.mariadb.snapshot import consistent_point, snapshot

        def read(name: str) -> Iterator[RawChanges]:
            part = self._parts[name]
            for raw in snapshot(
                point,
                (name,),
                batch_rows=_MARIADB_ROWS,
                batch_bytes=_MARIADB_BYTES,
                keys={name: part.id},
                columns={name: part.needed},
            ):
                if raw.tables:
                    yield raw

        with consistent_point(self._dsn) as point:
            # A ledger at the log's end stands at the border, before every snapshot there.
            yield Reading(point.lsn, border_at(point.lsn), lambda table: self._rows(table, read))


def _connect(dsn: str) -> psycopg.Connection:
    return psycopg.connect(
        dsn,
        autocommit=True,
        connect_timeout=_CONNECT_TIMEOUT_S,
        options=_OPTIONS,
        application_name="campus_sync_compare",
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@nb.njit(nogil=True, cache=True)
def _hash(offsets, data):
    """FNV-1a with MurmurHash3's finish, so that low bits (the buckets) are mixed."""
    out = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(out)):
        h = np.uint64(0xCBF29CE484222325)
        for k in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        out[i] = h ^ (h >> np.uint64(33))
    return out


@nb.njit(nogil=True, cache=True)
def _add(rows, sums, hashes, words):
    mask = np.uint64(len(rows) - 1)
    for i in range(len(hashes)):
        bucket = np.int64(hashes[i] & mask)
        rows[bucket] += 1
        for k in range(4):
            sums[bucket, k] += words[i, k]
