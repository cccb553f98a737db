"""One delivery to a consult store: rows, counts and ledger in one transaction."""

import collections
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import psycopg
import pyarrow as pa

from schemas.batches import DeadLetter, Lane, Op, Reject
from schemas.entities import TABLES
from schemas.errors import ConservationBroken
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from transforms.checksum import EMPTY_SET
from transforms.deliver import ledger
from transforms.deliver.ledger import LedgerState
from transforms.deliver.merging.compact import Compacted, compact
from transforms.deliver.merging.merge import TableMerger
from transforms.deliver.merging.outcomes import ExpressRefused, Merged, Outcome, Refusal, is_data
from transforms.deliver.merging.refused_rows import rejected
from transforms.deliver.merging.trim import Part, Sums, add_to, negative, runs_of, sums_of, unswept
from transforms.deliver.replay_letter import STORE_KINDS
from transforms.deliver.sets.claims import Claims
from transforms.seal_dead_letters import Sealer
from transforms.turns import turn

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


class Delivery:
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
        claims: Claims | None = None,
    ):
        self._conn = conn
        self._claims = claims
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
                outcomes = done.outcomes
                if self._claims is not None:
                    outcomes = self._claims.delivered(name, compacted.rows, outcomes)
                self._note_outcomes(compacted, outcomes)
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

    def receipt(self, visible_us: int) -> Receipt:
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
        )

    def _without_swept(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        left = unswept(rows, self._before.sweeps)
        self._outcomes[Outcome.SUPERSEDED] += rows.num_rows - left.num_rows
        return left

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
        if refusals:
            captured, rejects = rejected(name, compacted.rows, refusals, captured)
            self._refused += rejects
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


def _time(us: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=us)
