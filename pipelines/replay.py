"""Replay dead letters: their changes go through mapping and guard into the store once more."""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psycopg
import pyarrow as pa

from schemas.batches import DeadLetter, Lane, Op, RawChanges, Reject
from schemas.clocks import wall_clock_us
from schemas.config import Config, Link
from schemas.entities import TABLES
from schemas.errors import ConfigError, DeadLetterDamagedError, StoreUnavailable, told
from schemas.mappings import CampusMapping, Source, load_mapping
from schemas.positions import Position
from transforms import postgresql_sessions
from transforms.capture.debezium.hints import table_specs
from transforms.capture.debezium.whole_record import is_whole, read_again
from transforms.deliver.merging.outcomes import Outcome
from transforms.deliver.replay_letter import SOURCE_KIND, STORE_KINDS, Retrial
from transforms.deliver.store import Store
from transforms.harmonise import Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.parents_in_store import StoreParents
from transforms.seal_dead_letters import Sealer, letter_id_of

_OLD = "_old."
_MISSING_COLUMN, _INVALID_TEXT, _NO_BASE = "missing_column", "invalid_text", "no_base_row"
_TIME_OUT_OF_RANGE = "time_out_of_range"
_OPTIONS = "-c default_transaction_read_only=on -c timezone=UTC"

_LIST = """\
SELECT letter_id, src_table, lsn, seq, ascii(op::text),
    (extract(epoch FROM committed_at) * 1000000)::bigint, reason, column_name, key_id, ''::bytea,
    link, lane, state
FROM sync.dead_letter WHERE link = ANY(%s) ORDER BY link, lsn, seq, lane"""
_SEALED = "SELECT reason, column_name, key_id, sealed FROM sync.dead_letter WHERE letter_id = %s"


@dataclasses.dataclass(frozen=True)
class Filed:
    """A dead letter as its store has it; `letter.sealed` is empty until it is `fetch`ed."""

    letter: DeadLetter
    link: str
    lane: Lane
    state: str

    @property
    def position(self) -> Position:
        return Position(self.letter.lsn, self.letter.seq)

    @property
    def kind(self) -> str:
        """What its row is, as it was sealed; the id tells."""
        letter = self.letter
        for kind in STORE_KINDS.values():
            place = (self.link, letter.src_table, self.position, letter.op, kind)
            if letter_id_of(*place) == letter.letter_id:
                return kind
        return SOURCE_KIND


class Became(enum.StrEnum):
    """What a replay made of a letter; the last four leave it open."""

    DELIVERED = "delivered"
    DUPLICATE = "duplicate"
    SUPERSEDED = "superseded"
    SETTLED = "replayed before"
    REFUSED = "refused again"
    LOCKED = "sealed with another key"
    DAMAGED = "damaged"
    UNREACHABLE = "store cannot be reached"


STILL_OPEN = (Became.REFUSED, Became.LOCKED, Became.DAMAGED, Became.UNREACHABLE)
_BECAME = {
    Outcome.DELIVERED: Became.DELIVERED,
    Outcome.DUPLICATE: Became.DUPLICATE,
    Outcome.SUPERSEDED: Became.SUPERSEDED,
    Outcome.DEAD: Became.REFUSED,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One letter's replay; `reason` and `column` where it is refused, `remedy` where that helps."""

    filed: Filed
    became: Became
    reason: str = ""
    column: str = ""
    remedy: str = ""


def letters(config: Config) -> tuple[list[Filed], list[str]]:
    """Returns every letter of the configured links, open or not, and the stores not reached."""
    found, unreachable = [], []
    for name, links in config.links_by_store().items():
        try:
            with _connect(config.stores[name].dsn) as conn:
                if conn.execute("SELECT to_regclass('sync.dead_letter')").fetchone()[0] is None:
                    continue
                rows = conn.execute(_LIST, (links,)).fetchall()
        except psycopg.Error as error:
            unreachable.append(f"store {name}: {told(error)}")
            continue
        for *columns, link, lane, state in rows:
            found.append(Filed(DeadLetter(*columns), link, Lane(lane), state))
    return found, [text.strip() for text in unreachable]


def chosen(filed: Sequence[Filed], ids: Sequence[str]) -> list[Filed]:
    """Returns the letters that ids or beginnings of ids name, each once, in the order of `ids`.

    Raises:
      ConfigError: one names no letter, or several.
    """
    picked: dict[str, Filed] = {}
    for name in ids:
        matching = [one for one in filed if one.letter.letter_id.startswith(name)] if name else []
        if len(matching) != 1:
            what = f"names {len(matching)} letters" if matching else "names no dead letter"
            raise ConfigError(
                f"{name}: {what}. Remedy: give more of an id that `dead-letters list --json` has."
            )
        picked[matching[0].letter.letter_id] = matching[0]
    return list(picked.values())


def open_letters(
    config: Config, filed: Sequence[Filed]
) -> Iterator[tuple[Filed, Reject | DeadLetterDamagedError]]:
    """Yields each letter with its content, which is a patient's, or with what is wrong with it.

    Raises:
      ConfigError: the key is not there or another one.
      StoreUnavailable: a letter's store cannot be reached.
    """
    sealer = Sealer(config.dead_letter_key)
    for one in filed:
        link = _link(config, one.link)
        try:
            with _connect(config.stores[link.store].dsn) as conn:
                letter = fetch(conn, one)
        except psycopg.Error as error:
            raise StoreUnavailable(f"store {link.store}: {type(error).__name__}") from None
        try:
            yield one, sealer.open(letter)
        except DeadLetterDamagedError as error:
            yield one, error


def fetch(conn: psycopg.Connection, filed: Filed) -> DeadLetter:
    """Returns the letter with its sealed content, as it is now."""
    row = conn.execute(_SEALED, (filed.letter.letter_id,)).fetchone()
    if row is None:  # Somebody took it away since it was listed.
        raise DeadLetterDamagedError
    reason, column, key_id, sealed = row
    return dataclasses.replace(
        filed.letter, reason=reason, column=column, key_id=key_id, sealed=sealed
    )


def replay(
    config: Config,
    filed: Sequence[Filed],
    wanted: Sequence[Filed] | None = None,
    now_us: Callable[[], int] = wall_clock_us,
) -> Iterator[Result]:
    """Replays letters, each in one transaction, link by link in order of position; yields results.

    A letter's change is harmonised by the mapping that is configured now and merged by its
    original position: a newer row in the store wins. What is refused again stays open. May run
    beside the sync job and be repeated. A replayed change opens no emergency: it is an old one.

    Args:
      filed: all letters of the links concerned, as from `letters`.
      wanted: those to replay; None: all that are open.

    Raises:
      ConfigError: there is no key or no usable mapping; nothing of that link was replayed.
    """
    ids = None if wanted is None else {one.letter.letter_id for one in wanted}
    for link in config.links():
        own = sorted(
            (one for one in filed if one.link == link.name),
            key=lambda one: (one.position, one.lane),
        )
        if ids is None:
            own = [one for one in own if one.state == "open"]
        if any(ids is None or one.letter.letter_id in ids for one in own):
            yield from _Link(config, link, now_us).replay(own, ids)


class _Link:
    """Replays the letters of one link."""

    def __init__(self, config: Config, link: Link, now_us: Callable[[], int]):
        self._sealer = Sealer(config.dead_letter_key)
        self._key_id = self._sealer.key_id  # A missing key shows before anything is done.
        self._mapping: CampusMapping = load_mapping(config.sources[link.source].mapping)
        self._specs = None
        if config.sources[link.source].kind == "debezium":
            self._specs = table_specs(self._mapping, config.sources[link.source].hints)
        self._dsn = config.stores[link.store].dsn
        self._conn: psycopg.Connection | None = None
        parents = StoreParents(lambda: self._conn, link.source, self._mapping)
        self._harmoniser = Harmoniser(self._mapping, Lookups(self._mapping, parents, follow=False))
        self._store = Store(self._dsn, link.name, link.source, self._sealer, now_us)
        # Rows with a change that is refused: what is built on them must wait.
        self._refused: set[tuple[str, str]] = set()

    def replay(self, own: Sequence[Filed], ids: set[str] | None) -> Iterator[Result]:
        down = False
        conn = None
        try:
            for one in own:
                mine = ids is None or one.letter.letter_id in ids
                if one.state != "open":
                    if mine:
                        yield Result(one, Became.SETTLED)
                    continue
                if down:
                    if mine:
                        yield Result(one, Became.UNREACHABLE)
                    continue
                try:
                    conn = self._conn = conn or _connect(self._dsn)
                    result = self._one(conn, one, mine)
                except (psycopg.Error, StoreUnavailable):
                    down = True
                    result = Result(one, Became.UNREACHABLE)
                if mine:
                    yield result
        finally:
            self._store.close()
            if conn is not None:
                conn.close()

    def _one(self, conn: psycopg.Connection, filed: Filed, mine: bool) -> Result:
        try:
            letter = fetch(conn, filed)
            reject = self._sealer.open(letter)
        except DeadLetterDamagedError:
            return Result(filed, Became.DAMAGED)
        except ConfigError as error:
            return Result(filed, Became.LOCKED, remedy=str(error))
        retrial = self._retrial(filed, reject)
        key = (retrial.table, retrial.record_id)
        if not mine:
            self._refused.add(key)
            return Result(filed, Became.REFUSED, letter.reason, letter.column)
        if retrial.rows is not None and self._leans_on_refused(retrial):
            late = dataclasses.replace(reject, reason=_NO_BASE, column="")
            retrial = dataclasses.replace(retrial, reject=late, rows=None)
        settled = self._store.replay(retrial)
        if settled is None:
            return Result(filed, Became.SETTLED)
        if settled.outcome is Outcome.DEAD:
            self._refused.add(key)
        return Result(filed, _BECAME[settled.outcome], settled.reason, settled.column)

    def _leans_on_refused(self, retrial: Retrial) -> bool:
        """Whether a value is unknown and an earlier change of its row is still a letter."""
        rows = retrial.rows
        if rows["_op"][0].as_py() == Op.DELETE or not rows["_unchanged"][0].as_py():
            return False
        base = rows["_prev_id"][0].as_py() or retrial.record_id
        return (retrial.table, base) in self._refused

    def _retrial(self, filed: Filed, reject: Reject) -> Retrial:
        if filed.kind != SOURCE_KIND:
            return _canonical_retrial(filed, reject)
        if self._specs is not None and is_whole(reject):
            return self._whole_retrial(filed, reject)
        source = self._mapping.tables.get(reject.src_table)
        table = source.table if source is not None else None
        record_id = _record_id(reject, source)
        rows = None
        # Undecodable bytes were replaced for the eye: they are not what the source has.
        if reject.reason != _INVALID_TEXT:
            reject, made = self._harmonised(reject, raw_of(reject, source))
            if made is not None:
                table, record_id, rows = made
        return Retrial(
            filed.letter.letter_id, SOURCE_KIND, filed.lane, reject, table, record_id, rows
        )

    def _harmonised(
        self, reject: Reject, raw: RawChanges
    ) -> tuple[Reject, tuple[str, str, pa.RecordBatch] | None]:
        """Returns the canonical table, record id and row of one change; where it is refused
        again, None, and why."""
        made = self._harmoniser.apply(raw)
        if made.rejects:
            again = made.rejects[0]
            return dataclasses.replace(reject, reason=again.reason, column=again.column), None
        ((table, rows),) = made.tables.items()
        return reject, (table, rows["record_id"][0].as_py(), rows)

    def _whole_retrial(self, filed: Filed, reject: Reject) -> Retrial:
        """Reads a record of a topic again that was refused whole."""
        read = read_again(reject, self._specs)
        table = record_id = rows = None
        if read.rows is None:
            reject = dataclasses.replace(reject, reason=read.reason, column=read.column)
        else:
            position = reject.position
            raw = RawChanges(
                Position(position.lsn, position.seq - 1),
                position,
                1,
                reject.commit_us,
                {read.table: read.rows},
            )
            reject, made = self._harmonised(reject, raw)
            if made is not None:
                table, record_id, rows = made
        return Retrial(
            filed.letter.letter_id,
            SOURCE_KIND,
            filed.lane,
            reject,
            table,
            record_id,
            rows,
            src_table=read.table,
        )


def raw_of(reject: Reject, source: Source | None) -> RawChanges:
    """Returns a change that was refused before the store as capture had it: one row.

    A column that `source` needs and the letter has not was unchanged, unless the letter says
    that it was missing, or the operation brings whole rows: then it was not there.
    """
    sent = [column for column in reject.row if not column.startswith(_OLD)]
    old = [column for column in reject.row if column.startswith(_OLD)]
    kept: list[str] = []
    if source is not None and reject.op not in (Op.INSERT, Op.SNAPSHOT):
        missing = reject.column if reject.reason == _MISSING_COLUMN else None
        kept = [name for name in source.needed if name not in reject.row and name != missing]
    position = reject.position
    columns = {
        "_op": pa.array([reject.op], pa.uint8()),
        "_lsn": pa.array([position.lsn], pa.int64()),
        "_seq": pa.array([position.seq], pa.int32()),
        "_commit_us": pa.array([reject.commit_us], pa.int64()),
        "_unchanged": pa.array([(1 << len(kept)) - 1], pa.uint64()),
        **{name: pa.array([None], pa.utf8()) for name in kept},
        **{name: pa.array([reject.row[name]], pa.utf8()) for name in (*sent, *old)},
    }
    return RawChanges(
        begin=Position(position.lsn, position.seq - 1),
        end=position,
        captured=1,
        commit_us_max=reject.commit_us,
        tables={reject.src_table: pa.RecordBatch.from_pydict(columns)},
    )


def canonical_of(reject: Reject) -> pa.RecordBatch:
    """Returns a change that the store refused as it was to be merged: one canonical row.

    Raises:
      pa.ArrowInvalid: a text is not a value of its column.
    """
    table = TABLES[reject.row["_table"]]
    unknown = [bit for bit, name in enumerate(table.by_name) if name not in reject.row]
    values = {
        "_op": np.uint8(reject.op),
        "_lsn": reject.position.lsn,
        "_seq": reject.position.seq,
        "_commit_us": reject.commit_us,
        "_src_table": reject.src_table,
        "_unchanged": sum(1 << bit for bit in unknown),
        "_prev_id": reject.row["_prev_id"],
        "_digest": None,  # Taken anew by the merge, from the content that it writes.
        "record_id": reject.row["record_id"],
    }
    arrays = []
    for field in table.arrow_schema:
        if field.name in values:
            array = pa.array([values[field.name]]).cast(field.type)
        else:
            array = pa.array([reject.row.get(field.name)], pa.utf8()).cast(field.type)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=table.arrow_schema)


def _canonical_retrial(filed: Filed, reject: Reject) -> Retrial:
    row = reject.row
    table, record_id, digest = (row.get(name) for name in ("_table", "record_id", "_digest"))
    rows = None
    # Beyond the calendar a time's text is not its value.
    if table in TABLES and reject.reason != _TIME_OUT_OF_RANGE:
        rows = canonical_of(reject)
    return Retrial(
        filed.letter.letter_id,
        filed.kind,
        filed.lane,
        reject,
        table if table in TABLES else None,
        _clean(record_id),
        rows,
        bytes.fromhex(digest) if digest else None,
    )


def _record_id(reject: Reject, source: Source | None) -> str | None:
    if source is None:
        return None
    values = [reject.row.get(column) for column in source.id]
    return None if None in values else _clean("|".join(values))


def _clean(record_id: str | None) -> str | None:
    """An id with a NUL is nobody's: no store has it."""
    return None if record_id is None or "\0" in record_id else record_id


def _link(config: Config, name: str) -> Link:
    return next(link for link in config.links() if link.name == name)


def _connect(dsn: str) -> psycopg.Connection:
    return postgresql_sessions.connect(
        dsn,
        options=_OPTIONS,
        application_name="campus_sync_letters",
    )
