"""Change batches: the Beam element that carries a commit-aligned run of one link's changes."""

import dataclasses
import enum

import pyarrow as pa

from schemas.positions import Position


class Lane(enum.StrEnum):
    EMERGENCY = "emergency"
    ROUTINE = "routine"


class Op(enum.IntEnum):
    """What happened to the row; values are the pgoutput message bytes."""

    INSERT = ord("I")
    UPDATE = ord("U")
    DELETE = ord("D")
    SNAPSHOT = ord("R")  # Read in a snapshot: the row exists, how it came is not known.


# Columns that every harmonised batch starts with. Three values are kept apart: NULL is Arrow's
# null; unchanged is a set bit in `_unchanged` (the value is then null and means nothing);
# missing does not occur here (harmonise fills what a campus lacks with null).
CHANGE_FIELDS = (
    pa.field("_op", pa.uint8(), False),
    pa.field("_lsn", pa.int64(), False),
    pa.field("_seq", pa.int32(), False),
    pa.field("_commit_us", pa.int64(), False),
    pa.field("_src_table", pa.dictionary(pa.int32(), pa.utf8()), False),
    pa.field("_unchanged", pa.uint64(), False),
    # A primary key change is two rows at one place: DELETE of the old id (seq n), then UPDATE of
    # the new id (seq n + 1) whose `_prev_id` names the old one (trap 5).
    pa.field("_prev_id", pa.utf8(), True),
    # SHA-256 of the canonical content; null for a delete and where a column is unchanged.
    pa.field("_digest", pa.binary(32), True),
)


@dataclasses.dataclass(frozen=True)
class RawChanges:
    """Decoded changes of one source, before any campus difference is taken out.

    Attributes:
      begin: exclusive; end: inclusive.
      captured: row changes in (begin, end] as counted on the wire; a key change is two.
      commit_us_max: newest commit time in it, or the source's clock if it is empty.
      tables: `schema.table` to a record batch: `_op, _lsn, _seq, _commit_us, _unchanged`
        (bit i = source column i), then the source's columns as utf8 under their own names,
        then the old key as `_old.<column>` (utf8, null unless the key changed).
      truncates: source tables truncated, with the place: held for a person, never applied.
      sweeps: tables whose snapshot ends here: rows of older positions are gone.
      rejects: changes that no table above holds, refused because their text is not UTF-8; each
        is counted in `captured`.
    """

    begin: Position
    end: Position
    captured: int
    commit_us_max: int
    tables: dict[str, pa.RecordBatch]
    truncates: tuple[tuple[str, Position], ...] = ()
    sweeps: tuple[tuple[str, Position], ...] = ()
    rejects: tuple["Reject", ...] = ()


@dataclasses.dataclass(frozen=True)
class Reject:
    """A change that could not be harmonised, with its content: never logged, only sealed."""

    src_table: str
    position: Position
    op: int
    commit_us: int
    reason: str
    column: str
    row: dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class DeadLetter:
    """A refused change: what an engineer may see in the open, and the sealed rest.

    `letter_id` is derived from link and position, so that a replay cannot double it.
    """

    letter_id: str
    src_table: str
    lsn: int
    seq: int
    op: int
    commit_us: int
    reason: str
    column: str
    key_id: str
    sealed: bytes


@dataclasses.dataclass(frozen=True)
class ManifestEntry:
    """Count and digest of the changes of one table committed in one window.

    `digest` is the sum modulo 2^64, lane by lane, of the four little-endian words of the
    rows' digests: independent of order and of batch borders. Rows with no digest count only.
    """

    table: str
    window_start_us: int
    count: int
    digest: bytes


@dataclasses.dataclass(frozen=True)
class ParkingTicket:
    """Where a batch waits that is sent by reference: `number` in the process of `token`.

    `rows` and `nbytes` are those of the batch.
    """

    token: str
    number: int
    rows: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class ChangeBatch:
    """The Beam element: harmonised changes of one link and lane in (begin, end].

    Attributes:
      link: `source>store`. lane: which ledger it moves.
      begin: exclusive end of the batch before it in this lane; end: inclusive. A ledger
        applies only what joins on, so a lost batch is noticed (ADR 0003).
      captured: row changes of the lane in the range as counted at capture.
      commit_us_max: newest commit; watermark_us: no later change is older.
      tables: canonical table name to record batch (`Table.arrow_schema`).
      dead: refused changes. holds: truncated tables. sweeps: see RawChanges.
      manifest: as counted at capture, per table and window.
      escalations: opened or closed by these changes, `(patient_id, rule, lsn, seq, open)`.
      codes: that dictionaries lack, `(code list, code, source table, column, how often)`.
      seal: SHA-256 over the rest, checked before the write.
      ticket: of a stub, whose content waits elsewhere (transforms/parking.py).
    """

    link: str
    lane: Lane
    begin: Position
    end: Position
    captured: int
    commit_us_max: int
    watermark_us: int
    read_us: int
    tables: dict[str, pa.RecordBatch]
    dead: tuple[DeadLetter, ...] = ()
    holds: tuple[tuple[str, Position], ...] = ()
    sweeps: tuple[tuple[str, Position], ...] = ()
    manifest: tuple[ManifestEntry, ...] = ()
    escalations: tuple[tuple[str, str, int, int, bool], ...] = ()
    codes: tuple[tuple[str, str, str, str, int], ...] = ()
    seal: bytes = b""
    ticket: ParkingTicket | None = None

    @property
    def rows(self) -> int:
        if self.ticket is not None:
            return self.ticket.rows
        return sum(batch.num_rows for batch in self.tables.values())

    @property
    def nbytes(self) -> int:
        if self.ticket is not None:
            return self.ticket.nbytes
        return sum(batch.nbytes for batch in self.tables.values())
