"""Merge the changes of one canonical table into its store: set-based, guarded by position."""

import dataclasses
import enum
import functools
import json
import re
import typing
from collections.abc import Sequence

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg.adapt import Dumper
from psycopg.pq import Format

from schemas.batches import Lane, Op
from schemas.tables import ARROW_TYPES, POSTGRES_TYPES, Kind, Table
from transforms.checksum import digest_rows
from transforms.deliver.compact import Compacted, every_column
from transforms.deliver.copy_binary import (
    CopyRows,
    Wire,
    WireColumn,
    copy_rows,
    encode_rows,
    encode_text_array,
)
from transforms.deliver.join_source_rows import EDITED_NAMES, SourceRows
from transforms.deliver.store_schema import DELIVERED_SYNC_COLUMNS, constraint_name, quoted

_WIRES = {
    Kind.TEXT: Wire.BYTES,
    Kind.INT: Wire.INT8,
    Kind.DECIMAL: Wire.NUMERIC,
    Kind.BOOL: Wire.BOOL,
    Kind.DATE: Wire.DATE,
    Kind.TIME: Wire.TIMESTAMPTZ,
}
_LANE_CODES = {Lane.EMERGENCY: b"E", Lane.ROUTINE: b"R"}
_TEXT_ARRAY_OID = 1009
_CHUNK_ROWS = 2048  # The server parses one chunk while the next is being encoded.
EXPRESS_ROWS_MAX = 64  # Up to here one round trip as JSON is faster than stage or COPY.
# After a guess went wrong, so many merges of the table look before they write.
_LOOK_MERGES = 16
_CONTENTION_MAX = 8
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
# A value of a row's own: 22 data, 23 constraint, 54 too large for an index or a column.
_DATA_CLASSES = ("22", "23", "54")
_REASONS = {
    "22003": "numeric_out_of_range",
    "22008": "time_out_of_range",
    "22021": "invalid_text",
    "22P03": "invalid_value",
    "23502": "not_null_violation",
    "23514": "check_violation",
}


class Outcome(enum.IntEnum):
    """What became of one compacted row."""

    DELIVERED = 0
    DUPLICATE = 1
    SUPERSEDED = 2
    DEAD = 3


_JOINED = {1: Outcome.DELIVERED, 0: Outcome.DUPLICATE, -1: Outcome.SUPERSEDED}


class Refusal(typing.NamedTuple):
    """Why row `row` of the compacted batch is dead; `column` is empty where it is not known."""

    row: int
    reason: str
    column: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """`outcomes`: uint8[n] of `Outcome`, by compacted row; `refusals` are the dead ones."""

    outcomes: np.ndarray
    refusals: tuple[Refusal, ...] = ()


class ContendedError(Exception):
    """Other writers changed the same keys each time that they were looked at."""


class ExpressRefused(Exception):
    """The server refused a row that was sent express: the transaction is lost, nothing else."""


class _WrongGuess(Exception):
    """The store is not as it was taken to be: nothing was written."""


class _TextArray:
    """A text[] parameter in its binary form already."""

    def __init__(self, values: pa.Array):
        self.encoded = encode_text_array(values)


class _TextArrayDumper(Dumper):
    format = Format.BINARY
    oid = _TEXT_ARRAY_OID

    def dump(self, obj: _TextArray) -> bytes:
        return obj.encoded


def hlc_of(commit_us: np.ndarray) -> np.ndarray:
    """Returns the hybrid logical clock of commit times: 48 bits of ms, 10 of µs, 6 of count.

    Order is that of the commit times; fits a signed 64-bit integer until the year 6429.
    """
    return (commit_us // 1000 << 16) | (commit_us % 1000 << 6)


@functools.cache
def _names(table: Table) -> tuple[str, ...]:
    own = [quoted(column.name) for column in table.columns]
    sync = [name for name, _, _ in DELIVERED_SYNC_COLUMNS]
    return ("campus", "record_id", *own, *sync)


def _shape(table: Table) -> list[tuple[str, str]]:
    """Every column but the campus with its type, as an express row has them."""
    own = [(quoted(column.name), POSTGRES_TYPES[column.kind]) for column in table.columns]
    sync = [(name, kind.split()[0]) for name, kind, _ in DELIVERED_SYNC_COLUMNS]
    return [("record_id", "text"), *own, *sync]


class _Statements:
    """The SQL of one table's merge: derived from its declaration, the same for every store."""

    def __init__(self, table: Table):
        target, stage = f"consult.{table.name}", f"stage_{table.name}"
        names = ", ".join(_names(table))
        # Should a client edit a row after it was looked for, the guess was wrong.
        self._unedited = " AND t.version_vector IS NULL" if table.name in EDITED_NAMES else ""
        # In a store COPY is the fastest insert by far: pages are filled and logged whole.
        self.copy_target = f"COPY {target} ({names}) FROM STDIN (FORMAT binary)".encode()
        self.copy_stage = f"COPY {stage} ({names}, unchanged) FROM STDIN (FORMAT binary)".encode()
        self.create_stage = (
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {stage} (LIKE {target}, unchanged bigint)"
            " ON COMMIT DELETE ROWS"
        )
        self.clear_stage = f"TRUNCATE {stage}"
        plain = [f"{name} = s.{name}" for name in _names(table)[2:]]
        self.update = self._update(target, stage, plain)
        self.update_known = self._update(target, stage, self._known(table))
        shape = ", ".join(f"{name} {kind}" for name, kind in _shape(table))
        put = (
            f"INSERT INTO {target} AS t ({names}) SELECT %s, {', '.join(_names(table)[1:])}"
            f" FROM json_to_recordset(%s) AS s ({shape})"
        )
        self.put = self._upsert(put, _names(table)[2:])
        self.put_tombstone = self._upsert(
            put, [n for n in _names(table)[2 + len(table.columns) :] if n != "digest"]
        )
        # Found by the key's index, one by one, whatever the planner thinks of a fresh stage.
        self.look = (
            "SELECT array_agg((k.place - 1)::int4), array_agg(t.src_lsn), array_agg(t.src_seq)"
            f" FROM unnest(%s) WITH ORDINALITY AS k (record_id, place) JOIN {target} AS t"
            " ON t.record_id = k.record_id AND t.campus = %s"
        )
        self.base = (
            f"SELECT k.place - 1, t.src_lsn, t.src_seq, {', '.join(_fetched(table))}"
            f" FROM unnest(%s) WITH ORDINALITY AS k (record_id, place) JOIN {target} AS t"
            " ON t.record_id = k.record_id AND t.campus = %s"
            # A tombstone of the emergency lane may have overtaken changes of what it keeps.
            " WHERE NOT t.deleted OR (t.digest IS NOT NULL AND t.lane = 'R')"
            " ORDER BY t.record_id FOR UPDATE OF t"
        )
        self.sweep = (
            f"UPDATE {target} SET deleted = true, src_lsn = %(lsn)s, src_seq = 0,"
            " committed_at = to_timestamp(%(us)s / 1e6), hlc = %(hlc)s, lane = %(lane)s"
            " WHERE campus = %(campus)s AND src_table = %(src_table)s"
            " AND src_lsn < %(lsn)s AND NOT deleted" + self._unedited.replace("t.", "")
        )

    def _update(self, target: str, stage: str, assignments: list[str]) -> str:
        return (
            f"UPDATE {target} AS t SET {', '.join(assignments)} FROM {stage} AS s"
            " WHERE t.record_id = s.record_id AND t.campus = s.campus"
            " AND (t.src_lsn, t.src_seq) < (s.src_lsn, s.src_seq)" + self._unedited
        )

    def _upsert(self, put: str, names: Sequence[str]) -> str:
        return (
            f"{put} ON CONFLICT (record_id, campus) DO UPDATE"
            f" SET {', '.join(f'{name} = excluded.{name}' for name in names)}"
            f" WHERE (t.src_lsn, t.src_seq) < (excluded.src_lsn, excluded.src_seq){self._unedited}"
            " RETURNING t.record_id"
        )

    @staticmethod
    def _known(table: Table) -> list[str]:
        """Assigns known columns only: a kept value keeps its place out of line, too (trap 8)."""
        own = [
            f"{name} = CASE WHEN s.unchanged & {1 << bit} = 0 THEN s.{name} ELSE t.{name} END"
            for bit, name in enumerate(quoted(column.name) for column in table.columns)
        ]
        sync = [f"{name} = s.{name}" for name in _names(table)[2 + len(own) :] if name != "digest"]
        digest = (
            "digest = CASE WHEN s.unchanged = 0 OR s.digest IS NOT NULL"
            " THEN s.digest ELSE t.digest END"
        )
        return [*own, *sync, digest]


def _fetched(table: Table) -> list[str]:
    """Select expressions that give every column in a form that Arrow takes, free of zones."""
    forms = {
        Kind.DECIMAL: "t.{0}::text",
        Kind.DATE: "t.{0} - date '1970-01-01'",
        Kind.TIME: "(extract(epoch FROM t.{0}) * 1000000)::bigint",
    }
    return [forms.get(c.kind, "t.{0}").format(quoted(c.name)) for c in table.columns]


@functools.cache
def _statements(table: Table) -> _Statements:
    return _Statements(table)


def prepare(conn: psycopg.Connection) -> None:
    """Makes a connection fit for merges: session settings and adapters, once."""
    conn.adapters.register_dumper(_TextArray, _TextArrayDumper)
    conn.execute(
        # A stage has no statistics: left alone, the planner may read a whole table for it.
        # Compiling a plan takes longer than running it here.
        "SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off;"
        " SET jit = off; SET work_mem = '32MB'; SET temp_buffers = '64MB'"
    )


class TableMerger:
    """Merges batches of one canonical table over one connection prepared by `prepare`.

    Rows are first written as guessed from their operation (created: absent; else: present and
    older), which a count and the key's uniqueness prove or refute; once refuted, the next
    merges look at the stored positions before they write. The outcome is the same either way.

    Args:
      table: the canonical table. campus: whose rows. lane: noted in every row.
    """

    def __init__(self, conn: psycopg.Connection, table: Table, campus: str, lane: Lane):
        self._conn = conn
        self._cursor = conn.cursor()
        self._table = table
        self._campus = campus
        self._lane = lane
        self._sql = _statements(table)
        self._look_merges = 0
        self._staged = False
        self._sources = SourceRows(conn, table, campus) if table.name in EDITED_NAMES else None
        conn.execute(self._sql.create_stage)

    def begin(self) -> None:
        """To be called once in each transaction, before `merge`: the stage is empty."""
        self._staged = False

    def merge(self, compacted: Compacted) -> Merged:
        """Writes every row that is newer than the store's; must be in a transaction.

        A row that the server refuses for its content, or whose unchanged values are
        nowhere, becomes a refusal; all others are written. Where clients have edited the
        record, the row is joined with their edits (ADR 0019).

        Raises:
          ContendedError: to be tried again from the start of the transaction.
          psycopg.Error: anything but a row's content; the transaction is lost.
        """
        edited = self._edited(compacted)
        if edited is None:
            return self._merge(compacted)
        outcomes = np.full(compacted.rows.num_rows, Outcome.DEAD, np.uint8)
        refusals = []
        plain = np.flatnonzero(~edited)
        if len(plain):
            merged = self._merge(compacted.part(plain))
            outcomes[plain] = merged.outcomes
            refusals += [
                refusal._replace(row=int(plain[refusal.row])) for refusal in merged.refusals
            ]
        self._join(compacted.rows, np.flatnonzero(edited), outcomes, refusals)
        return Merged(outcomes, tuple(refusals))

    def _join(
        self,
        rows: pa.RecordBatch,
        places: np.ndarray,
        outcomes: np.ndarray,
        refusals: list[Refusal],
    ) -> None:
        """Joins rows with edited records; where the server refuses one, one by one."""
        chosen = rows.take(pa.array(places))
        hlcs = hlc_of(chosen["_commit_us"].to_numpy()).tolist()
        values = [_texts(chosen[name]) for name in self._table.by_name]
        try:
            with self._conn.transaction():
                found = self._sources.join(chosen, hlcs, values)
        except psycopg.errors.UniqueViolation:
            raise ContendedError from None
        except psycopg.Error as error:
            if not is_data(error):
                raise
            if len(places) > 1:
                for place in places:
                    self._join(rows, np.array([place]), outcomes, refusals)
                return
            refusals.append(self._refusal(error, int(places[0])))
            return
        for place, newer in zip(places.tolist(), found, strict=True):
            if newer is None:
                refusals.append(Refusal(place, "no_base_row", ""))
            else:
                outcomes[place] = _JOINED[newer]

    def _merge(self, compacted: Compacted) -> Merged:
        """Writes rows of records that no client has edited."""
        outcomes = np.full(compacted.rows.num_rows, Outcome.DEAD, np.uint8)
        ready, orphans = self._with_base(compacted, outcomes)
        if self._look_merges == 0:
            try:
                with self._conn.transaction():
                    self._write(ready, ready.fresh, ~ready.fresh)
                outcomes[ready.places] = Outcome.DELIVERED
                return Merged(outcomes, orphans)
            except (_WrongGuess, psycopg.errors.UniqueViolation):
                self._look_merges = _LOOK_MERGES
            except psycopg.Error as error:
                if not is_data(error):
                    raise
        else:
            self._look_merges -= 1
        refusals = list(orphans)
        self._look_and_write(ready, outcomes, refusals)
        return Merged(outcomes, tuple(refusals))

    def fits_express(self, compacted: Compacted) -> bool:
        """Whether `express` can write these rows: few, with nothing about them to be found out."""
        rows = compacted.rows
        if rows.num_rows > EXPRESS_ROWS_MAX:
            return False
        unknown = rows["_unchanged"].to_numpy() != 0
        undigested = rows["_digest"].is_null().to_numpy(zero_copy_only=False)
        if not (~(unknown | undigested) | _bare(self._table, rows)).all():
            return False
        decimals = [rows[c.name] for c in self._table.columns if c.kind is Kind.DECIMAL]
        # PostgreSQL reads more texts as a number than are canonical: COPY refuses the others.
        return all(
            text is None or _DECIMAL.fullmatch(text)
            for values in decimals
            for text in values.to_pylist()
        )

    def meets_edits(self, compacted: Compacted) -> bool:
        """Whether clients have edited one of these records, which only `merge` joins; asks the
        store."""
        return self._edited(compacted) is not None

    def _edited(self, compacted: Compacted) -> np.ndarray | None:
        return self._sources and self._sources.edited(compacted.rows["record_id"])

    def express(self, compacted: Compacted) -> list[psycopg.Cursor]:
        """Sends all rows in one statement, or two, within the caller's pipeline."""
        rows = compacted.rows
        bare = _bare(self._table, rows)
        digests = rows["_digest"].to_pylist()
        columns = [
            *(_texts(rows[name]) for name in ("record_id", *self._table.by_name)),
            *(_texts(rows[name]) for name in ("_src_table", "_lsn", "_seq")),
            _texts(rows["_commit_us"].cast(pa.timestamp("us", "UTC"))),
            hlc_of(rows["_commit_us"].to_numpy()).tolist(),
            [_LANE_CODES[self._lane].decode()] * len(bare),
            [self._table.level] * len(bare),
            [None if digest is None else f"\\x{digest.hex()}" for digest in digests],
            (rows["_op"].to_numpy() == Op.DELETE).tolist(),
        ]
        keys = [name.strip('"') for name in _names(self._table)[1:]]
        records = [
            {key: value for key, value in zip(keys, row, strict=True) if value is not None}
            for row in zip(*columns, strict=True)
        ]
        sent = []
        for statement, chosen in ((self._sql.put, ~bare), (self._sql.put_tombstone, bare)):
            if chosen.any():
                content = json.dumps([records[i] for i in np.flatnonzero(chosen)])
                sent.append(self._conn.execute(statement, (self._campus, content), prepare=True))
        return sent

    def express_outcomes(self, compacted: Compacted, sent: list[psycopg.Cursor]) -> np.ndarray:
        """Returns the outcomes of rows sent by `express`, once the pipeline has been read."""
        rows = compacted.rows
        if sum(cursor.rowcount for cursor in sent) == rows.num_rows:
            return np.full(rows.num_rows, Outcome.DELIVERED, np.uint8)
        # What is in the store is not older: it can only be the same or newer.
        found = self._look(_Ready(rows, compacted.fresh, np.arange(rows.num_rows)))
        ids = [row[0] for cursor in sent for row in cursor.fetchall()]
        written = pc.is_in(rows["record_id"], pa.array(ids, pa.utf8()))
        written = written.to_numpy(zero_copy_only=False)
        if (found.older & ~written).any():  # But where a client edited it just now.
            raise ExpressRefused
        return np.where(written, np.uint8(Outcome.DELIVERED), found.outcomes)

    def sweep(self, src_table: str, lsn: int, commit_us: int) -> int:
        """Makes tombstones of the campus's rows of a source table from before `lsn`; how many."""
        arguments = {
            "lsn": lsn,
            "us": commit_us,
            "hlc": int(hlc_of(np.int64(commit_us))),
            "lane": _LANE_CODES[self._lane].decode(),
            "campus": self._campus,
            "src_table": src_table,
        }
        swept = self._conn.execute(self._sql.sweep, arguments).rowcount
        if self._sources:
            swept += self._sources.sweep(src_table, lsn, arguments["hlc"])
        return swept

    def _look_and_write(self, ready: "_Ready", outcomes: np.ndarray, refusals: list) -> None:
        """Writes by stored positions; halves what the server refuses until it is one row."""
        for _ in range(_CONTENTION_MAX):
            try:
                with self._conn.transaction():
                    found = self._look(ready)
                    self._write(ready, found.absent, found.older)
                outcomes[ready.places] = found.outcomes
                return
            except (_WrongGuess, psycopg.errors.UniqueViolation):
                continue  # Another lane committed in between: look again.
            except psycopg.Error as error:
                if not is_data(error):
                    raise
                if len(ready.places) == 1:
                    refusals.append(self._refusal(error, int(ready.places[0])))
                    return
                half = len(ready.places) // 2
            self._look_and_write(ready.part(0, half), outcomes, refusals)
            self._look_and_write(ready.part(half, len(ready.places)), outcomes, refusals)
            return
        raise ContendedError

    def _look(self, ready: "_Ready") -> "_Found":
        keys = _TextArray(ready.rows["record_id"])
        cursor = self._conn.execute(self._sql.look, (keys, self._campus), binary=True)
        lsn, seq = ready.rows["_lsn"].to_numpy(), ready.rows["_seq"].to_numpy()
        absent = np.ones(len(lsn), np.bool_)
        older = np.zeros(len(lsn), np.bool_)
        outcomes = np.zeros(len(lsn), np.uint8)
        result = cursor.pgresult
        if result.get_value(0, 0) is not None:
            at = _fixed_array(result.get_value(0, 0), 4).astype(np.int64)
            known_lsn = _fixed_array(result.get_value(0, 1), 8)
            known_seq = _fixed_array(result.get_value(0, 2), 4)
            absent[at] = False
            same = (known_lsn == lsn[at]) & (known_seq == seq[at])
            older[at] = (known_lsn < lsn[at]) | ((known_lsn == lsn[at]) & (known_seq < seq[at]))
            outcomes[at[same]] = Outcome.DUPLICATE
            outcomes[at[~same & ~older[at]]] = Outcome.SUPERSEDED
        return _Found(absent, older, outcomes)

    def _write(self, ready: "_Ready", absent: np.ndarray, older: np.ndarray) -> None:
        """Updates the `older` rows and inserts the `absent` ones.

        Raises:
          _WrongGuess: fewer rows were older than given; to be rolled back.
        """
        if older.any():
            if self._staged:
                self._conn.execute(self._sql.clear_stage)
            self._staged = True
            rows = ready.rows if older.all() else ready.rows.filter(pa.array(older))
            self._copy(self._sql.copy_stage, rows, staged=True)
            known_only = rows["_unchanged"].to_numpy().any()
            update = self._sql.update_known if known_only else self._sql.update
            if self._conn.execute(update).rowcount != rows.num_rows:
                raise _WrongGuess
        if absent.any():
            rows = ready.rows if absent.all() else ready.rows.filter(pa.array(absent))
            self._copy(self._sql.copy_target, rows, staged=False)

    def _copy(self, statement: bytes, rows: pa.RecordBatch, staged: bool) -> None:
        chunks = (
            self._encode(rows.slice(start, _CHUNK_ROWS), staged)
            for start in range(0, rows.num_rows, _CHUNK_ROWS)
        )
        copy_rows(self._cursor, statement, chunks)

    def _encode(self, rows: pa.RecordBatch, staged: bool) -> CopyRows:
        commit_us = rows["_commit_us"].to_numpy()
        columns = [
            WireColumn(Wire.CONSTANT, self._campus.encode()),
            WireColumn(Wire.BYTES, rows["record_id"]),
            *(WireColumn(_WIRES[c.kind], rows[c.name]) for c in self._table.columns),
            WireColumn(Wire.BYTES, rows["_src_table"]),
            WireColumn(Wire.INT8, rows["_lsn"]),
            WireColumn(Wire.INT4, rows["_seq"]),
            WireColumn(Wire.TIMESTAMPTZ, rows["_commit_us"]),
            WireColumn(Wire.INT8, hlc_of(commit_us)),
            WireColumn(Wire.CONSTANT, _LANE_CODES[self._lane]),
            WireColumn(Wire.CONSTANT, self._table.level.to_bytes(2, "big")),
            WireColumn(Wire.BYTES, rows["_digest"]),
            WireColumn(Wire.BOOL, pa.array(rows["_op"].to_numpy() == Op.DELETE)),
        ]
        if staged:
            columns.append(WireColumn(Wire.INT8, rows["_unchanged"].to_numpy().astype(np.int64)))
        return encode_rows(columns, rows.num_rows)

    def _with_base(
        self, compacted: Compacted, outcomes: np.ndarray
    ) -> tuple["_Ready", list[Refusal]]:
        """Digests rows that were filled in; fetches what rows with unknown values stand on.

        A row without a base is refused, unless the store is past it anyway: `outcomes`.
        """
        rows = compacted.rows
        masks = rows["_unchanged"].to_numpy()
        bare = _bare(self._table, rows)
        needs = (masks != 0) & ~bare
        places = np.arange(rows.num_rows)
        refusals: list[Refusal] = []
        whole = None
        if needs.any():
            whole, rebased, orphans = self._fill(compacted, needs)
            if orphans.any():
                refusals = self._orphaned(compacted, np.flatnonzero(orphans), outcomes)
            # Only a changed key has its values written anew: they stand in another row.
            rows = _choose(rebased, whole, rows, self._table)
            keep = ~orphans
            places, bare = places[keep], bare[keep]
            rows, whole = rows.filter(pa.array(keep)), whole.filter(pa.array(keep))
        digest = rows["_digest"]
        undigested = digest.is_null().to_numpy(zero_copy_only=False) & ~bare
        if undigested.any():
            digest = self._digested(rows if whole is None else whole, digest, undigested)
            at = rows.schema.get_field_index("_digest")
            rows = rows.set_column(at, rows.schema.field(at), digest)
        return _Ready(rows, compacted.fresh[places], places), refusals

    def _orphaned(
        self, compacted: Compacted, orphans: np.ndarray, outcomes: np.ndarray
    ) -> list[Refusal]:
        rows = compacted.rows.take(pa.array(orphans))
        found = self._look(_Ready(rows, compacted.fresh[orphans], orphans))
        wanted = found.absent | found.older
        outcomes[orphans[~wanted]] = found.outcomes[~wanted]
        return [Refusal(int(i), "no_base_row", "") for i in orphans[wanted]]

    def _digested(self, whole: pa.RecordBatch, digest: pa.Array, at: np.ndarray) -> pa.Array:
        # Neither operation nor mask goes along: the content is complete now, deleted or not.
        content = ["record_id", *(column.name for column in self._table.columns)]
        made = digest_rows(self._table, whole.select(content).filter(pa.array(at)))
        unknown = at & (whole["_unchanged"].to_numpy() != 0)
        made = pc.if_else(pa.array(~unknown[at]), made, pa.scalar(None, made.type))
        order = np.full(len(digest), -1, np.int64)
        order[at] = np.arange(len(made))
        spread = made.take(pa.array(order, mask=order < 0))
        return pc.if_else(pa.array(at), spread, digest)

    def _fill(self, compacted: Compacted, needs: np.ndarray):
        """(rows with the store's values filled in, rows whose key changed, rows without a base).

        The base is locked, so that it is still the base when the rows are written.
        """
        rows, wanted = compacted.rows, np.flatnonzero(needs)
        base_ids = compacted.base_id.take(pa.array(wanted))
        arguments = (_TextArray(base_ids), self._campus)
        found = self._conn.execute(self._sql.base, arguments).fetchall()
        masks = rows["_unchanged"].to_numpy().copy()
        lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
        own = pc.equal(compacted.base_id, rows["record_id"]).fill_null(True)
        rebased = needs & ~own.to_numpy(zero_copy_only=False)
        source = np.full(rows.num_rows, -1, np.int64)
        for k, row in enumerate(found):
            i = wanted[row[0]]
            # A base that is newer is none, unless the guard will set the row aside anyway.
            if not rebased[i] or row[1:3] < (lsn[i], seq[i]):
                source[i] = k
        columns = list(rows.columns)
        for bit, column in enumerate(self._table.columns):
            lacks = needs & (masks >> np.uint64(bit) & np.uint64(1) == 1) & (source >= 0)
            if lacks.any():
                stored = pa.array([row[3 + bit] for row in found], _FETCHED[column.kind])
                stored = stored.cast(ARROW_TYPES[column.kind])
                stored = stored.take(pa.array(source, mask=source < 0))
                at = rows.schema.get_field_index(column.name)
                columns[at] = pc.if_else(pa.array(lacks), stored, columns[at])
        # A deleted row may lack its base: an incomplete tombstone has no digest.
        deleted = rows["_op"].to_numpy() == Op.DELETE
        masks[source >= 0] = 0
        columns[rows.schema.get_field_index("_unchanged")] = pa.array(masks)
        filled = pa.record_batch(columns, schema=rows.schema)
        return filled, rebased & (source >= 0), needs & (source < 0) & ~deleted

    def _refusal(self, error: psycopg.Error, row: int) -> Refusal:
        code = error.sqlstate or ""
        reason = _REASONS.get(code, f"sqlstate_{code.lower()}")
        column = error.diag.column_name or ""
        for candidate in self._table.columns:
            if error.diag.constraint_name == constraint_name(self._table.name, candidate.name):
                column = candidate.name
        return Refusal(row, reason, column or _column_in(error.diag.context, self._table))


@dataclasses.dataclass(frozen=True)
class _Ready:
    """Rows to write; `places` are their rows in the compacted batch."""

    rows: pa.RecordBatch
    fresh: np.ndarray
    places: np.ndarray

    def part(self, lo: int, hi: int) -> "_Ready":
        return _Ready(self.rows.slice(lo, hi - lo), self.fresh[lo:hi], self.places[lo:hi])


@dataclasses.dataclass(frozen=True)
class _Found:
    absent: np.ndarray
    older: np.ndarray
    outcomes: np.ndarray


# What a driver's value of `_fetched` is, before it is cast to the column's type.
_FETCHED = {
    **ARROW_TYPES,
    Kind.DATE: pa.int32(),
    Kind.TIME: pa.int64(),
}


def _bare(table: Table, rows: pa.RecordBatch) -> np.ndarray:
    """Which rows are tombstones of which nothing is known: the store keeps what it has."""
    unknown = rows["_unchanged"].to_numpy() == np.uint64(every_column(table))
    return unknown & (rows["_op"].to_numpy() == Op.DELETE)


_PLAIN = (pa.utf8(), pa.int64(), pa.int32(), pa.bool_())


def _texts(values: pa.Array) -> list:
    """The values as what becomes JSON that PostgreSQL reads: exact, whatever the type."""
    if values.null_count == len(values):
        return [None] * len(values)
    plain = pa.types.is_dictionary(values.type) or values.type in _PLAIN
    return (values if plain else values.cast(pa.utf8())).to_pylist()


def _choose(first: np.ndarray, a: pa.RecordBatch, b: pa.RecordBatch, table: Table):
    """Rows of `a` where `first`, else of `b`, in the columns where the two may differ."""
    if not first.any():
        return b
    columns = list(b.columns)
    condition = pa.array(first)
    for name in ("_unchanged", *(column.name for column in table.columns)):
        at = b.schema.get_field_index(name)
        columns[at] = pc.if_else(condition, a.column(at), columns[at])
    return pa.record_batch(columns, schema=b.schema)


def _column_in(context: str | None, table: Table) -> str:
    """Returns the column that the context of a COPY error names, or an empty string.

    The text is the server's and may be translated; only a declared name is taken from it.
    """
    words = set((context or "").split("\n")[0].replace(",", " ").replace(":", " ").split())
    names = [column.name for column in table.columns if column.name in words]
    return names[0] if len(names) == 1 else ""


def _fixed_array(encoded: bytes, width: int) -> np.ndarray:
    """The values of a binary array of int4 or int8 without nulls."""
    fields = np.frombuffer(encoded, np.uint8)[20:].reshape(-1, 4 + width)[:, 4:]
    return np.ascontiguousarray(fields).view(f">i{width}").ravel().astype(np.int64)


def is_data(error: psycopg.Error) -> bool:
    """Whether the server refused a row for its content, not the work as a whole."""
    return (error.sqlstate or "")[:2] in _DATA_CLASSES
