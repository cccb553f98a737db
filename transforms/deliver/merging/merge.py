"""Merge the changes of one canonical table into its store: set-based, guarded by position."""

import dataclasses
import re

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import Lane
from schemas.conflict_policy import EDITED_AT_STORES
from schemas.tables import Kind, Table
from transforms.deliver.edits.join_source_rows import SourceRows
from transforms.deliver.merging.base_rows import Ready, is_bare, made_whole
from transforms.deliver.merging.compact import Compacted
from transforms.deliver.merging.copy_binary import copy_rows
from transforms.deliver.merging.merge_sql import merge_sql
from transforms.deliver.merging.merge_wire import (
    LANE_CODES,
    TextArray,
    TextArrayDumper,
    copy_chunks,
    fixed_array,
    hlc_of,
    json_rows,
    texts_of,
)
from transforms.deliver.merging.outcomes import (
    ContendedError,
    ExpressRefused,
    Merged,
    Outcome,
    Refusal,
    WrongGuess,
    is_data,
    refusal_of,
)

EXPRESS_ROWS_MAX = 64  # Up to here one round trip as JSON is faster than stage or COPY.
# After a guess went wrong, so many merges of the table look before they write.
_LOOK_MERGES = 16
_CONTENTION_MAX = 8
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_JOINED = {1: Outcome.DELIVERED, 0: Outcome.DUPLICATE, -1: Outcome.SUPERSEDED}


def prepare(conn: psycopg.Connection) -> None:
    """Makes a connection fit for merges: session settings and adapters, once."""
    conn.adapters.register_dumper(TextArray, TextArrayDumper)
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
        self._sql = merge_sql(table)
        self._look_merges = 0
        self._staged = False
        self._sources = SourceRows(conn, table, campus) if table.name in EDITED_AT_STORES else None
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
        values = [texts_of(chosen[name]) for name in self._table.by_name]
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
            refusals.append(refusal_of(error, self._table, int(places[0])))
            return
        for place, newer in zip(places.tolist(), found, strict=True):
            if newer is None:
                refusals.append(Refusal(place, "no_base_row", ""))
            else:
                outcomes[place] = _JOINED[newer]

    def _merge(self, compacted: Compacted) -> Merged:
        """Writes rows of records that no client has edited."""
        outcomes = np.full(compacted.rows.num_rows, Outcome.DEAD, np.uint8)
        whole = made_whole(self._conn, self._table, self._campus, compacted)
        ready = whole.ready
        orphans = self._orphaned(compacted, whole.orphans, outcomes) if len(whole.orphans) else ()
        if self._look_merges == 0:
            try:
                with self._conn.transaction():
                    self._write(ready, ready.fresh, ~ready.fresh)
                outcomes[ready.places] = Outcome.DELIVERED
                return Merged(outcomes, orphans)
            except (WrongGuess, psycopg.errors.UniqueViolation):
                self._look_merges = _LOOK_MERGES
            except psycopg.Error as error:
                if not is_data(error):
                    raise
        else:
            self._look_merges -= 1
        refusals = list(orphans)
        self._look_and_write(ready, outcomes, refusals)
        return Merged(outcomes, tuple(refusals))

    def _orphaned(
        self, compacted: Compacted, orphans: np.ndarray, outcomes: np.ndarray
    ) -> tuple[Refusal, ...]:
        """Returns refusals of rows without a base, unless the store is past them: `outcomes`."""
        rows = compacted.rows.take(pa.array(orphans))
        found = self._look(Ready(rows, compacted.fresh[orphans], orphans))
        wanted = found.absent | found.older
        outcomes[orphans[~wanted]] = found.outcomes[~wanted]
        return tuple(Refusal(int(i), "no_base_row", "") for i in orphans[wanted])

    def fits_express(self, compacted: Compacted) -> bool:
        """Whether `express` can write these rows: few, with nothing about them to be found out."""
        rows = compacted.rows
        if rows.num_rows > EXPRESS_ROWS_MAX:
            return False
        unknown = rows["_unchanged"].to_numpy() != 0
        undigested = rows["_digest"].is_null().to_numpy(zero_copy_only=False)
        if not (~(unknown | undigested) | is_bare(self._table, rows)).all():
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
        bare = is_bare(self._table, compacted.rows)
        sent = []
        for statement, chosen in ((self._sql.put, ~bare), (self._sql.put_tombstone, bare)):
            if chosen.any():
                content = json_rows(self._table, self._lane, compacted.rows, chosen)
                sent.append(self._conn.execute(statement, (self._campus, content), prepare=True))
        return sent

    def express_outcomes(self, compacted: Compacted, sent: list[psycopg.Cursor]) -> np.ndarray:
        """Returns the outcomes of rows sent by `express`, once the pipeline has been read."""
        rows = compacted.rows
        if sum(cursor.rowcount for cursor in sent) == rows.num_rows:
            return np.full(rows.num_rows, Outcome.DELIVERED, np.uint8)
        # What is in the store is not older: it can only be the same or newer.
        found = self._look(Ready(rows, compacted.fresh, np.arange(rows.num_rows)))
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
            "lane": LANE_CODES[self._lane].decode(),
            "campus": self._campus,
            "src_table": src_table,
        }
        swept = self._conn.execute(self._sql.sweep, arguments).rowcount
        if self._sources:
            swept += self._sources.sweep(src_table, lsn, arguments["hlc"])
        return swept

    def _look_and_write(self, ready: Ready, outcomes: np.ndarray, refusals: list) -> None:
        """Writes by stored positions; halves what the server refuses until it is one row."""
        for _ in range(_CONTENTION_MAX):
            try:
                with self._conn.transaction():
                    found = self._look(ready)
                    self._write(ready, found.absent, found.older)
                outcomes[ready.places] = found.outcomes
                return
            except (WrongGuess, psycopg.errors.UniqueViolation):
                continue  # Another lane committed in between: look again.
            except psycopg.Error as error:
                if not is_data(error):
                    raise
                if len(ready.places) == 1:
                    refusals.append(refusal_of(error, self._table, int(ready.places[0])))
                    return
                half = len(ready.places) // 2
            self._look_and_write(ready.part(0, half), outcomes, refusals)
            self._look_and_write(ready.part(half, len(ready.places)), outcomes, refusals)
            return
        raise ContendedError

    def _look(self, ready: Ready) -> "_Found":
        keys = TextArray(ready.rows["record_id"])
        cursor = self._conn.execute(self._sql.look, (keys, self._campus), binary=True)
        lsn, seq = ready.rows["_lsn"].to_numpy(), ready.rows["_seq"].to_numpy()
        absent = np.ones(len(lsn), np.bool_)
        older = np.zeros(len(lsn), np.bool_)
        outcomes = np.zeros(len(lsn), np.uint8)
        result = cursor.pgresult
        if result.get_value(0, 0) is not None:
            at = fixed_array(result.get_value(0, 0), 4).astype(np.int64)
            known_lsn = fixed_array(result.get_value(0, 1), 8)
            known_seq = fixed_array(result.get_value(0, 2), 4)
            absent[at] = False
            same = (known_lsn == lsn[at]) & (known_seq == seq[at])
            older[at] = (known_lsn < lsn[at]) | ((known_lsn == lsn[at]) & (known_seq < seq[at]))
            outcomes[at[same]] = Outcome.DUPLICATE
            outcomes[at[~same & ~older[at]]] = Outcome.SUPERSEDED
        return _Found(absent, older, outcomes)

    def _write(self, ready: Ready, absent: np.ndarray, older: np.ndarray) -> None:
        """Updates the `older` rows and inserts the `absent` ones.

        Raises:
          WrongGuess: fewer rows were older than given; to be rolled back.
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
                raise WrongGuess
        if absent.any():
            rows = ready.rows if absent.all() else ready.rows.filter(pa.array(absent))
            self._copy(self._sql.copy_target, rows, staged=False)

    def _copy(self, statement: bytes, rows: pa.RecordBatch, staged: bool) -> None:
        chunks = copy_chunks(self._table, self._campus, self._lane, rows, staged)
        copy_rows(self._cursor, statement, chunks)


@dataclasses.dataclass(frozen=True)
class _Found:
    absent: np.ndarray
    older: np.ndarray
    outcomes: np.ndarray
