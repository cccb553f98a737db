"""A consult store as a link delivers to it: rows, counts and ledger in one transaction."""

import collections
import datetime
import hashlib
import itertools
import json
import logging
import typing
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import psycopg
import pyarrow as pa

from schemas import wire
from schemas.batches import ChangeBatch, DeadLetter, Lane, Op, Reject
from schemas.entities import TABLES
from schemas.errors import ConservationBroken, SealBrokenError, StoreUnavailable
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from transforms.checksum import EMPTY_SET
from transforms.deliver import ledger, mend_rows, merge
from transforms.deliver.compact import Compacted, compact
from transforms.deliver.edit_schema import OWN_SESSION
from transforms.deliver.ledger import LedgerState
from transforms.deliver.merge import (
    ContendedError,
    ExpressRefused,
    Merged,
    Outcome,
    Refusal,
    TableMerger,
    is_data,
)
from transforms.deliver.replay_letter import STORE_KINDS, Retrial, Settled, settle
from transforms.deliver.trim import (
    Part,
    Sums,
    add_to,
    negative,
    new_parts,
    runs_of,
    sums_of,
)
from transforms.seal_dead_letters import Sealer
from transforms.turns import turn

_LOGGER = logging.getLogger(__name__)

_T = typing.TypeVar("_T")
_ATTEMPTS = 5  # Of one transaction, where another lane's locks crossed ours.
_RETRYABLE = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    ContendedError,
    ExpressRefused,
)
_SESSION = f"""\
SET default_transaction_isolation = 'read committed'; {OWN_SESSION};
SET TimeZone = 'UTC';
-- Safe, as rows and ledger are lost together or not at all and `ledger.read` tells only what
-- is on disk: a commit does not wait for it (trap 3).
SET synchronous_commit = off;
-- A worker that vanished must not hold the ledger's lock.
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
SET idle_in_transaction_session_timeout = '60s'; SET lock_timeout = '30s'"""

_LETTER = """\
INSERT INTO sync.dead_letter (letter_id, link, lane, src_table, lsn, seq, op, committed_at,
    reason, column_name, key_id, sealed)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (letter_id) DO NOTHING"""
_HOLD = """\
INSERT INTO sync.hold (id, link, kind, src_table, lsn, seq)
VALUES (%s, %s, 'truncate', %s, %s, %s) ON CONFLICT (id) DO NOTHING"""
_ESCALATE = """\
INSERT INTO sync.escalation AS e (campus, patient_id, rule, lsn, seq, "open")
VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (campus, patient_id) DO UPDATE
SET rule = excluded.rule, lsn = excluded.lsn, seq = excluded.seq, "open" = excluded."open"
WHERE (e.lsn, e.seq) < (excluded.lsn, excluded.seq)"""
# How often is a hint, not a count: a batch that is applied in two parts tells it twice.
_CODE = """\
INSERT INTO sync.unknown_code AS c (campus, code_list, code, src_table, column_name, seen)
VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (campus, code_list, code, src_table, column_name)
DO UPDATE SET seen = c.seen + excluded.seen, last_at = now()"""
_SWEPT = """\
INSERT INTO sync.sweep AS s (link, src_table, lsn) VALUES (%s, %s, %s)
ON CONFLICT (link, src_table) DO UPDATE SET lsn = greatest(s.lsn, excluded.lsn)"""
_MANIFEST = """\
SELECT table_name, (extract(epoch FROM window_start) * 1000000)::bigint,
    source_count, source_digest, store_count, store_digest
FROM sync.manifest WHERE link = %s AND lane = %s
    AND (table_name, window_start) IN (SELECT * FROM unnest(%s::text[], %s::timestamptz[]))"""
_PUT_MANIFEST = """\
INSERT INTO sync.manifest (link, lane, table_name, window_start, source_count, source_digest,
    store_count, store_digest)
SELECT %s, %s, * FROM unnest(%s::text[], %s::timestamptz[], %s::bigint[], %s::bytea[],
    %s::bigint[], %s::bytea[])
ON CONFLICT (link, lane, table_name, window_start) DO UPDATE
SET source_count = excluded.source_count, source_digest = excluded.source_digest,
    store_count = excluded.store_count, store_digest = excluded.store_digest"""


class Store:
    """One link's way into its consult store, over one connection; not thread-safe.

    Opens its connection when first needed and again after it broke. The session is set up in
    one place, `_connected`: what it is to run as (a replication origin) belongs there.

    Args:
      dsn: libpq connection string of the store.
      link: `source>store`. campus: the source's name, noted in every row.
      sealer: seals what the store refuses.
      now_us: microseconds since 1970.
      verify: raises SealBrokenError where a batch is not as it was sealed.
    """

    def __init__(
        self,
        dsn: str,
        link: str,
        campus: str,
        sealer: Sealer,
        now_us: Callable[[], int],
        verify: Callable[[ChangeBatch], None] = wire.verify,
    ):
        self._dsn = dsn
        self._link = link
        self._campus = campus
        self._sealer = sealer
        self._now_us = now_us
        self._verify = verify
        self._conn: psycopg.Connection | None = None
        self._mergers: dict[tuple[str, Lane], TableMerger] = {}

    def close(self) -> None:
        """Closes the connection; the store may be used again."""
        conn, self._conn = self._conn, None
        self._mergers.clear()
        if conn is not None:
            conn.close()

    def apply(self, batches: Sequence[ChangeBatch], lane: Lane, late: int = 0) -> Receipt:
        """Applies what is new in `batches` of one lane and moves its ledger: all or nothing.

        In any order, split and number of times that batches come, the store ends with the
        same rows, and every change is counted once, when its range is first applied. A batch
        beyond the ledger is applied as an island, unless it needs what is missing before it
        (unchanged columns, the end of a snapshot): it is then left to be sent again, as is one
        whose seal is broken. Rows that the store refuses become dead letters.

        Returns:
          The receipt; `applied` is False where nothing was new, and its counts are then zero.

        Raises:
          StoreUnavailable: nothing was written; send again when the store is back.
          ConservationBroken: nothing was written; the batch's count is not that of its content.
        """
        sound = [batch for batch in batches if self._is_sound(batch)]
        for batch in sound:
            if batch.link != self._link or batch.lane is not lane:
                raise ValueError(f"a batch of {batch.link} {batch.lane} for {self._link} {lane}")
        names = {name for batch in sound for name in batch.tables}
        return self._persistently(
            names,
            lane,
            lambda conn, attempt: self._delivery(conn, sound, lane, late, express=attempt == 1),
        )

    def replay(self, retrial: Retrial) -> Settled | None:
        """Tries a dead letter's change again: row, letter and counts, all or nothing.

        Safe while batches are applied elsewhere; replayed again, nothing happens.

        Returns:
          What became of it, or None: the letter was not open any more.

        Raises:
          StoreUnavailable: nothing was written; try again when the store is back.
        """
        return self._persistently(
            (retrial.table,) if retrial.rows is not None else (),
            retrial.lane,
            lambda conn, _: settle(
                conn, self._link, self._campus, retrial, self._merger, self._sealer
            ),
        )

    def mend(self, table: str, rows: pa.RecordBatch) -> Counts:
        """Delivers rows of the source again, where a reconciliation found the store otherwise.

        Raises:
          StoreUnavailable: nothing was written; try again when the store is back.
        """
        return self._persistently(
            (table,),
            Lane.ROUTINE,
            lambda conn, _: mend_rows.mend(
                conn, self._link, self._campus, table, rows, self._merger
            ),
        )

    def _persistently(
        self, names: Iterable[str], lane: Lane, work: Callable[[psycopg.Connection, int], _T]
    ) -> _T:
        """Does one transaction, again where another writer's crossed it; `names`: its tables."""
        try:
            conn = self._connected()
            for name in names:
                self._merger(name, lane)
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return work(conn, attempt)
                except _RETRYABLE:
                    conn.execute("ROLLBACK")
                    if attempt == _ATTEMPTS:
                        raise
        except ContendedError:
            raise StoreUnavailable(f"{self._place()}: other writers kept its rows") from None
        except psycopg.Error as error:
            self.close()  # Ends the transaction, whatever state it was in.
            raise ledger.unavailable(self._place(), error) from None
        except BaseException:
            self.close()
            raise

    def _delivery(
        self, conn, batches: list[ChangeBatch], lane: Lane, late: int, express: bool
    ) -> Receipt:
        before = ledger.lock(conn, self._link, lane)
        parts, after = new_parts(batches, before)
        if not parts:
            conn.execute("ROLLBACK")
            return _nothing(self._link, lane, before.position, batches)
        delivery = _Delivery(conn, self._link, self._campus, lane, parts, before, after)
        mergers = {name: self._merger(name, lane) for name in delivery.tables}
        for merger in mergers.values():
            merger.begin()
        delivery.write_rows(mergers, express)
        delivery.sweep(lambda name: self._merger(name, lane))
        delivery.finish(self._sealer)
        return delivery.receipt(self._now_us(), late)

    def _is_sound(self, batch: ChangeBatch) -> bool:
        try:
            self._verify(batch)
        except SealBrokenError:
            _LOGGER.error("link %s: a %s batch broke its seal", self._link, batch.lane)
            return False
        return True

    def _connected(self) -> psycopg.Connection:
        if self._conn is None or self._conn.closed:
            self._mergers.clear()
            conn = ledger.connect(self._dsn)
            try:
                merge.prepare(conn)
                conn.execute(_SESSION)
            except BaseException:
                conn.close()
                raise
            self._conn = conn
        return self._conn

    def _merger(self, table: str, lane: Lane) -> TableMerger:
        merger = self._mergers.get((table, lane))
        if merger is None:
            merger = TableMerger(self._conn, TABLES[table], self._campus, lane)
            self._mergers[table, lane] = merger
        return merger

    def _place(self) -> str:
        return f"store of {self._link} at {ledger.server_of(self._dsn)}"


def _nothing(link: str, lane: Lane, at: Position, batches: Sequence[ChangeBatch]) -> Receipt:
    watermark_us = max((batch.watermark_us for batch in batches), default=0)
    none = np.empty(0, np.int64)
    return Receipt(link, lane, at, False, Counts(), 0, watermark_us, none, none)


class _Delivery:
    """One transaction's work; `write_rows`, `sweep` and `finish` are to be called in this order."""

    def __init__(
        self,
        conn: psycopg.Connection,
        link: str,
        campus: str,
        lane: Lane,
        parts: Sequence[Part],
        before: LedgerState,
        after: LedgerState,
    ):
        self._conn = conn
        self._link, self._campus, self._lane = link, campus, lane
        self._batches = [part.batch for part in parts]
        self._before, self._after = before, after
        self._source: Sums = {}
        for part in parts:
            for window, (count, digest) in part.source.items():
                add_to(self._source, window, count, digest)
        self._runs = runs_of(parts)
        self.tables = {name for run in self._runs for name in run}
        self._applied: Sums = {}
        self._refused: list[Reject] = []
        self._delivered_us: list[np.ndarray] = []
        self._outcomes = collections.Counter()
        self._known_manifest: psycopg.Cursor | None = None
        self._swept = 0

    def write_rows(self, mergers: dict[str, TableMerger], express: bool) -> None:
        """Merges every table, always in the same order, so that lanes seldom cross.

        Raises:
          ExpressRefused: with `express`, the server refused a row: begin again without.
        """
        for run in self._runs:
            work: dict[str, Compacted] = {}
            with turn(sum(rows.num_rows for rows in run.values())):
                for name, rows in run.items():
                    self._add_applied(name, rows)
                    rows = self._without_swept(rows)
                    if rows.num_rows:
                        work[name] = compact(TABLES[name], rows)
                express = express and len(self._runs) == 1
                fits = {name: express and mergers[name].fits_express(work[name]) for name in work}
            # Not in turn: it asks the store, which the others' turns must not wait for.
            fits = {n: fit and not mergers[n].meets_edits(work[n]) for n, fit in fits.items()}
            merged = {}
            for together, names in itertools.groupby(work, fits.__getitem__):
                part = {name: work[name] for name in names}
                if together:
                    merged |= self._express(mergers, part)
                else:
                    merged |= {name: mergers[name].merge(rows) for name, rows in part.items()}
            for name, compacted in work.items():
                done = self._without_overtaken(compacted, merged[name])
                self._note_outcomes(compacted, done.outcomes)
                self._note_refused(name, compacted, done.refusals, run[name])

    def _add_applied(self, name: str, rows: pa.RecordBatch, sign: int = 1) -> None:
        entries = [entry for batch in self._batches for entry in batch.manifest]
        for window, (count, digest) in sums_of(name, rows, entries).items():
            add_to(self._applied, window, sign * count, digest if sign > 0 else negative(digest))

    def _express(
        self, mergers: dict[str, TableMerger], work: dict[str, Compacted]
    ) -> dict[str, Merged]:
        try:
            with self._conn.pipeline():
                sent = {name: mergers[name].express(rows) for name, rows in work.items()}
                self._known_manifest = self._ask_manifest()
        except psycopg.Error as error:
            if is_data(error):
                raise ExpressRefused from None
            raise
        return {
            name: Merged(mergers[name].express_outcomes(rows, sent[name]))
            for name, rows in work.items()
        }

    def _note_outcomes(self, compacted: Compacted, outcomes: np.ndarray) -> None:
        found = np.bincount(outcomes, minlength=len(Outcome))
        for outcome in Outcome:
            self._outcomes[outcome] += int(found[outcome])
        self._outcomes[Outcome.SUPERSEDED] += compacted.superseded
        self._outcomes[Outcome.DUPLICATE] += compacted.duplicates
        commit_us = compacted.rows["_commit_us"].to_numpy()
        # When a snapshot's row was committed is not known: it has no lag. One that it found marked
        # as void is a delete by now, and has the time of those that it was read with.
        read = compacted.rows["_op"].to_numpy() == Op.SNAPSHOT
        live = ~np.isin(commit_us, commit_us[read])
        self._delivered_us.append(commit_us[live & (outcomes == Outcome.DELIVERED)])

    def sweep(self, merger_of: Callable[[str], TableMerger]) -> None:
        """Makes tombstones of what a finished snapshot did not find."""
        for batch in self._batches:
            for src_table, (lsn, _) in batch.sweeps:
                for name in TABLES:
                    merger = merger_of(name)
                    self._swept += merger.sweep(src_table, lsn, batch.commit_us_max)
                self._conn.execute(_SWEPT, (self._link, src_table, lsn))

    def finish(self, sealer: Sealer) -> None:
        """Writes letters, holds, escalations, manifest and ledger, and commits.

        Raises:
          ConservationBroken: the outcomes do not add up to what was captured.
        """
        counts = self.counts
        if not counts.balanced:
            raise ConservationBroken(
                f"link {self._link} {self._lane}: {counts.captured} changes captured, "
                f"{sum(counts[1:])} accounted for"
            )
        letters = [letter for batch in self._batches for letter in batch.dead]
        kind = STORE_KINDS[self._lane]
        letters += [sealer.seal(reject, self._link, kind) for reject in self._refused]
        windows = bool(self._source or self._applied)
        known = self._known_manifest or (self._ask_manifest() if windows else None)
        with self._conn.pipeline():
            self._each(_LETTER, [self._letter(letter) for letter in letters])
            self._each(_HOLD, [self._hold(*hold) for b in self._batches for hold in b.holds])
            self._each(_ESCALATE, self._escalations())
            self._each(_CODE, self._codes())
            if known is not None:
                self._put_manifest(known)
            ledger.save(
                self._conn,
                self._link,
                self._lane,
                self._before,
                self._after,
                counts,
                self._swept,
                max(batch.commit_us_max for batch in self._batches),
                max(batch.watermark_us for batch in self._batches),
            )
            self._conn.execute("COMMIT")

    @property
    def counts(self) -> Counts:
        letters = sum(len(batch.dead) for batch in self._batches)
        return Counts(
            captured=sum(batch.captured for batch in self._batches),
            delivered=self._outcomes[Outcome.DELIVERED],
            duplicates=self._outcomes[Outcome.DUPLICATE],
            superseded=self._outcomes[Outcome.SUPERSEDED],
            held=sum(len(batch.holds) for batch in self._batches),
            dead=self._outcomes[Outcome.DEAD] + letters,
        )

    def receipt(self, visible_us: int, late: int) -> Receipt:
        delivered = self._delivered_us or [np.empty(0, np.int64)]
        commit_us, rows = np.unique(np.concatenate(delivered), return_counts=True)
        return Receipt(
            link=self._link,
            lane=self._lane,
            progress=self._after.position,
            applied=True,
            counts=self.counts,
            visible_us=visible_us,
            watermark_us=max(batch.watermark_us for batch in self._batches),
            commit_us=commit_us,
            rows_per_commit=rows.astype(np.int64),
            late=late,
        )

    def _without_swept(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Leaves out what is older than a finished snapshot of its table, which had the last word.

        Without this an old copy that comes late would bring back a row that is gone.
        """
        sweeps = self._before.sweeps
        lsn = rows["_lsn"].to_numpy()
        if not sweeps or lsn.min() >= max(sweeps.values()):
            return rows
        tables = rows["_src_table"]
        bounds = np.array([sweeps.get(t, 0) for t in tables.dictionary.to_pylist()], np.int64)
        old = lsn < bounds[tables.indices.to_numpy()]
        self._outcomes[Outcome.SUPERSEDED] += int(old.sum())
        return rows.filter(pa.array(~old))

    def _without_overtaken(self, compacted: Compacted, merged: Merged) -> Merged:
        """Counts as superseded what has no base since a snapshot went on by a later view.

        The row had gone by then, or had another key, and that view has the last word (ADR 0020).
        """
        lsn = compacted.rows["_lsn"].to_numpy()
        overtaken = [
            refusal.row
            for refusal in merged.refusals
            if refusal.reason == "no_base_row" and lsn[refusal.row] <= self._before.view_lsn
        ]
        if not overtaken:
            return merged
        outcomes = merged.outcomes.copy()
        outcomes[overtaken] = Outcome.SUPERSEDED
        return Merged(outcomes, tuple(r for r in merged.refusals if r.row not in overtaken))

    def _note_refused(
        self,
        name: str,
        compacted: Compacted,
        refusals: Sequence[Refusal],
        captured: pa.RecordBatch,
    ) -> None:
        """Keeps refused rows for sealing, and takes them out of what was applied."""
        if not refusals:
            return
        refused = compacted.rows.take(pa.array([refusal.row for refusal in refusals]))
        captured = _as_captured(captured, refused)
        places = zip(captured["_lsn"].to_pylist(), captured["_seq"].to_pylist(), strict=True)
        digests = dict(zip(places, captured["_digest"].to_pylist(), strict=True))
        for refusal in refusals:
            row = compacted.rows.slice(refusal.row, 1)
            change = row.select(["_src_table", "_lsn", "_seq", "_op", "_commit_us"]).to_pylist()[0]
            self._refused.append(
                Reject(
                    src_table=change["_src_table"],
                    position=Position(change["_lsn"], change["_seq"]),
                    op=change["_op"],
                    commit_us=change["_commit_us"],
                    reason=refusal.reason,
                    column=refusal.column,
                    row=_sealed_row(name, row, digests[change["_lsn"], change["_seq"]]),
                )
            )
        self._add_applied(name, captured, sign=-1)

    def _ask_manifest(self) -> psycopg.Cursor:
        """Asks for what the manifest has so far; the ledger's lock guards it."""
        windows = sorted(self._source.keys() | self._applied.keys())
        tables, starts = [table for table, _ in windows], [_time(start) for _, start in windows]
        arguments = (self._link, self._lane.value, tables, starts)
        return self._conn.execute(_MANIFEST, arguments, prepare=True)

    def _put_manifest(self, known: psycopg.Cursor) -> None:
        """Writes the manifest with this delivery added."""
        for table, start, *sides in known.fetchall():
            add_to(self._source, (table, start), *sides[:2])
            add_to(self._applied, (table, start), *sides[2:])
        none = (0, EMPTY_SET)
        rows = [
            (table, _time(start), *self._source.get(window, none), *self._applied.get(window, none))
            for window in sorted(self._source.keys() | self._applied.keys())
            for table, start in (window,)
        ]
        columns = [list(column) for column in zip(*rows, strict=True)]
        arguments = (self._link, self._lane.value, *columns)
        self._conn.execute(_PUT_MANIFEST, arguments, prepare=True)

    def _codes(self) -> list[tuple]:
        seen = collections.Counter()
        for batch in self._batches:
            for *code, count in batch.codes:
                seen[*code] += count
        return [(self._campus, *code, seen[code]) for code in sorted(seen)]

    def _escalations(self) -> list[tuple]:
        newest: dict[str, tuple] = {}
        for batch in self._batches:
            for change in batch.escalations:
                known = newest.get(change[0])
                if known is None or known[2:4] <= change[2:4]:
                    newest[change[0]] = change
        return [(self._campus, *newest[patient]) for patient in sorted(newest)]

    def _letter(self, letter: DeadLetter) -> tuple:
        return (
            letter.letter_id,
            self._link,
            self._lane.value,
            letter.src_table,
            letter.lsn,
            letter.seq,
            chr(letter.op),
            _time(letter.commit_us),
            letter.reason,
            letter.column,
            letter.key_id,
            letter.sealed,
        )

    def _hold(self, src_table: str, position: Position) -> tuple:
        place = [self._link, src_table, *position]
        name = hashlib.sha256(json.dumps(place, ensure_ascii=False).encode()).hexdigest()
        return (name, self._link, src_table, *position)

    def _each(self, statement: str, rows: Sequence[tuple]) -> None:
        for row in rows:
            self._conn.execute(statement, row, prepare=True)


def _as_captured(rows: pa.RecordBatch, some: pa.RecordBatch) -> pa.RecordBatch:
    """Returns the rows of `rows` at the positions of `some`: with the digests that they came with.

    Compaction fills columns in, and the digest of such a row is no longer what was captured.
    """
    wanted = set(zip(some["_lsn"].to_pylist(), some["_seq"].to_pylist(), strict=True))
    lsn, seq = rows["_lsn"].to_numpy(), rows["_seq"].to_numpy()
    near = np.flatnonzero(np.isin(lsn, some["_lsn"].to_numpy()))
    found = {(int(lsn[i]), int(seq[i])): i for i in near[::-1]}
    return rows.take(pa.array([found[place] for place in sorted(wanted)], pa.int64()))


def _sealed_row(table: str, row: pa.RecordBatch, digest: bytes | None) -> dict[str, str | None]:
    """Returns what a letter keeps of a canonical row; a column that is absent was unchanged.

    `digest` is what the manifest counted of it.
    """
    unchanged = row["_unchanged"][0].as_py()
    known = [name for bit, name in enumerate(TABLES[table].by_name) if not unchanged >> bit & 1]
    return {
        **{name: _text(row[name][0]) for name in ("record_id", *known, "_prev_id")},
        "_table": table,
        "_digest": digest and digest.hex(),
    }


def _text(value: pa.Scalar) -> str | None:
    """As text by Arrow: a time may lie beyond what Python has."""
    return value.as_py() if pa.types.is_string(value.type) else value.cast(pa.utf8()).as_py()


def _time(us: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=us)
