"""Settle one dead letter in its store: row, letter, manifest and counts in one transaction."""

import dataclasses
import datetime
from collections.abc import Callable

import psycopg
import pyarrow as pa

from schemas.batches import Lane, Reject
from schemas.entities import TABLES
from schemas.receipts import Counts
from transforms.checksum import EMPTY_SET, add_sets
from transforms.deliver import ledger
from transforms.deliver.ledger import LedgerState
from transforms.deliver.merging.compact import compact
from transforms.deliver.merging.merge import TableMerger
from transforms.deliver.merging.outcomes import Outcome
from transforms.seal_dead_letters import Sealer

# What a store refused is sealed as a canonical row, what was refused before as the source's.
# Each lane that counted a row as dead has a letter of its own, so that counts and letters agree.
SOURCE_KIND = "row"
STORE_KINDS = {Lane.ROUTINE: "canonical", Lane.EMERGENCY: "canonical emergency"}

_OPEN = """\
SELECT reason, column_name FROM sync.dead_letter WHERE letter_id = %s AND state = 'open'
FOR UPDATE"""
_REPLAYED = """\
UPDATE sync.dead_letter SET state = 'replayed', replayed_at = clock_timestamp()
WHERE letter_id = %s"""
_STILL = """\
UPDATE sync.dead_letter SET reason = %s, column_name = %s, key_id = %s, sealed = %s
WHERE letter_id = %s"""
# The window that lacks the row: the newest short one that begins before its commit.
_SHORT = """\
SELECT window_start, store_digest FROM sync.manifest
WHERE link = %s AND lane = %s AND table_name = %s AND window_start <= %s
    AND store_count < source_count
ORDER BY window_start DESC LIMIT 1"""
_FILL = """\
UPDATE sync.manifest SET store_count = store_count + 1, store_digest = %s
WHERE link = %s AND lane = %s AND table_name = %s AND window_start = %s"""


@dataclasses.dataclass(frozen=True)
class Retrial:
    """A dead letter's change, made anew.

    Attributes:
      letter_id, kind: of the letter. lane: whose ledger counts it.
      reject: its content; where `rows` is None, with the reason why it is refused now.
      table, record_id: the row that it changes, None where nobody can tell; free of NUL.
      rows: the change as a canonical batch of one row, or None.
      digest: what the manifest counted at capture, None if it has none; store kinds only.
      src_table: the source's table where the letter does not know it.
    """

    letter_id: str
    kind: str
    lane: Lane
    reject: Reject
    table: str | None
    record_id: str | None
    rows: pa.RecordBatch | None
    digest: bytes | None = None
    src_table: str = ""


@dataclasses.dataclass(frozen=True)
class Settled:
    """What became of it; `reason` and `column` say why, where it is dead still."""

    outcome: Outcome
    reason: str = ""
    column: str = ""


def settle(
    conn: psycopg.Connection,
    link: str,
    campus: str,
    retrial: Retrial,
    merger_of: Callable[[str, Lane], TableMerger],
    sealer: Sealer,
) -> Settled | None:
    """Tries a letter's change again and commits; None if the letter is not open, or no more.

    The lane's ledger is locked meanwhile, as for a delivery. A row in the store that is not
    older wins, whatever the letter holds. What is refused again stays open, its new reason
    sealed in.
    """
    before = ledger.lock(conn, link, retrial.lane)
    known = conn.execute(_OPEN, (retrial.letter_id,)).fetchone()
    if known is None:
        conn.execute("ROLLBACK")
        return None
    settled = _tried(conn, campus, retrial, merger_of, before)
    if settled.outcome is Outcome.DEAD:
        if known != (settled.reason, settled.column):
            _seal_again(conn, link, retrial, settled, sealer)
        conn.execute("COMMIT")
        return settled
    conn.execute(_REPLAYED, (retrial.letter_id,))
    if retrial.kind != SOURCE_KIND:
        _fill_manifest(conn, link, retrial)
    counts = {
        Outcome.DELIVERED: Counts(delivered=1, dead=-1),
        Outcome.DUPLICATE: Counts(duplicates=1, dead=-1),
        Outcome.SUPERSEDED: Counts(superseded=1, dead=-1),
    }[settled.outcome]
    ledger.save(conn, link, retrial.lane, before, before, counts, 0, 0, 0)
    conn.execute("COMMIT")
    return settled


def _tried(
    conn: psycopg.Connection,
    campus: str,
    retrial: Retrial,
    merger_of: Callable[[str, Lane], TableMerger],
    before: LedgerState,
) -> Settled:
    reject = retrial.reject
    # A finished snapshot of its table had the last word: what it did not find is gone.
    if reject.position.lsn < before.sweeps.get(retrial.src_table or reject.src_table, 0):
        return Settled(Outcome.SUPERSEDED)
    if retrial.table is not None and retrial.record_id is not None:
        stored = conn.execute(
            f"SELECT src_lsn, src_seq FROM consult.{TABLES[retrial.table].name}"
            " WHERE record_id = %s AND campus = %s",
            (retrial.record_id, campus),
        ).fetchone()
        if stored is not None and stored >= reject.position:
            same = stored == reject.position
            return Settled(Outcome.DUPLICATE if same else Outcome.SUPERSEDED)
    if retrial.rows is None:
        return Settled(Outcome.DEAD, reject.reason, reject.column)
    merger = merger_of(retrial.table, retrial.lane)
    merger.begin()
    merged = merger.merge(compact(TABLES[retrial.table], retrial.rows))
    if merged.refusals:
        return Settled(Outcome.DEAD, merged.refusals[0].reason, merged.refusals[0].column)
    return Settled(Outcome(int(merged.outcomes[0])))


def _seal_again(conn, link: str, retrial: Retrial, settled: Settled, sealer: Sealer) -> None:
    reject = dataclasses.replace(retrial.reject, reason=settled.reason, column=settled.column)
    letter = sealer.seal(reject, link, retrial.kind)
    values = (letter.reason, letter.column, letter.key_id, letter.sealed, retrial.letter_id)
    conn.execute(_STILL, values)


def _fill_manifest(conn: psycopg.Connection, link: str, retrial: Retrial) -> None:
    """Counts the row as applied: the manifest has it as committed from its capture on."""
    place = (link, retrial.lane.value, retrial.table)
    commit = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(
        microseconds=retrial.reject.commit_us
    )
    short = conn.execute(_SHORT, (*place, commit)).fetchone()
    if short is not None:
        start, known = short
        digest = add_sets(known, retrial.digest or EMPTY_SET)
        conn.execute(_FILL, (digest, *place, start))
