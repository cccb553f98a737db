"""Decode Debezium's change events, as JSON with or without schema, into `RawChanges`."""

import functools
import re
import typing
from collections.abc import Mapping, Sequence

import msgspec

from schemas.batches import Op, RawChanges, Reject
from schemas.positions import SEQ_END, Position
from transforms.capture.debezium.hints import TableSpec
from transforms.capture.debezium.record import (
    Event,
    NotAnEvent,
    Payload,
    Record,
    Source,
    parse,
    refuse_rows,
    unwrapped,
)
from transforms.capture.debezium.replays import Replays, place_of
from transforms.capture.debezium.table_rows import Row, TableForm, TableRows
from transforms.capture.debezium.unchanged import DEFAULT, placeholder

CONNECTORS = ("postgresql", "mysql", "mariadb", "oracle", "sqlserver")
_OPS = {"c": Op.INSERT, "u": Op.UPDATE, "d": Op.DELETE, "r": Op.SNAPSHOT}
OLD_KEY = "__debezium.oldkey"
_POSTGRES_TX = re.compile(r"(\d+):\d+")
# Events of other tables fill no batch; after so many a position is told all the same.
_EVENTS_MAX_FACTOR = 10


class DebeziumDecoder:
    """Turns the records of one Kafka partition into `RawChanges` that join on from `start`.

    Position: `lsn` is the record's offset plus one, `seq` the ordinal of the row in its event,
    from 1; an update that changes the key takes two. A `RawChanges` ends behind an event, and
    where the topic has transaction boundaries behind a transaction, unless that alone exceeds
    a limit. What is cut where depends only on the records and the calls of `flush`.

    What a connector sends again after a restart is left out and not counted (docs/adr/0013).
    A change that cannot be read becomes a reject and never stops the stream; what is known to
    be no change (heartbeats, tombstones, schema changes, messages, notifications) only moves the
    position.

    Args:
      batch_rows, batch_bytes: largest content of one `RawChanges`, unless one change is larger.
        Bytes are those of the records.
      start: changes up to it were applied before; they are passed over and not counted.
      tables: by source table; changes of other tables are passed over and not counted.
      sweep: whether the end of a snapshot says that older rows of its tables are gone: only if
        every snapshot of the connector reads its tables whole.
      unavailable: the connector's `unavailable.value.placeholder`.

    Attributes:
      duplicates: events left out since the start because they had come before.
      replays: memory of what has come.
    """

    def __init__(
        self,
        batch_rows: int,
        batch_bytes: int,
        start: Position,
        tables: Mapping[str, TableSpec],
        *,
        sweep: bool = False,
        unavailable: str = DEFAULT,
    ):
        if batch_rows < 1 or batch_bytes < 1:
            raise ValueError("batch_rows and batch_bytes must be positive")
        self._limits = batch_rows, batch_bytes
        self._tables, self._sweep = tables, sweep
        self._placeholder = placeholder(unavailable)
        self._start = self._end = start
        self._at = Position(start.lsn if start.seq == SEQ_END else start.lsn - 1, SEQ_END)
        self._done = self._end
        self._commit_us = self._done_us = 0
        self._rows = self._bytes = self._events = 0
        self._done_bytes = self._done_events = 0
        self._gathered: dict[str, TableRows] = {}
        self._forms: dict[str, TableForm] = {}
        # Of each table, what its newest row was told with: a deletion may tell its key alone.
        self.columns: dict[str, tuple[str, ...]] = {}
        self._rejects: list[Reject] = []
        self._truncates: list[tuple[str, Position]] = []
        self._sweeps: list[tuple[int, tuple[str, Position]]] = []
        self._transaction = self._passing = ""
        self._counts: dict[str, int] | None = None
        self._snapshot: dict[str, None] | None = None
        self._snapshot_lsn = 0  # 0: it began before all that was fed.
        self._before_all = True
        self.duplicates = 0
        self.replays = Replays()

    @property
    def position(self) -> Position:
        """Where the last `RawChanges` ended."""
        return self._end

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and its end has not come."""
        return bool(self._transaction)

    @property
    def lacks_snapshot_begin(self) -> bool:
        """Whether a whole snapshot is under way that began before all that was taken."""
        return self._snapshot is not None and not self._snapshot_lsn

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return self._at <= self._end

    def remember(self, records: Sequence[Record]) -> None:
        """Takes records from before `start`: what they hold is known if it comes again.

        They are to come in order, up to the start without a hole.
        """
        for record in records:
            if record.value is None:
                continue
            try:
                payload = parse(record).payload
            except NotAnEvent:
                continue
            if payload.op is None:
                self._remember_boundary(payload)
            elif payload.source is not None:
                self._is_replay(payload, record)
                self._follow_snapshot(payload.source, payload.op, record.offset)
            self._before_all = False
        self._sweeps = []

    def feed(self, records: Sequence[Record]) -> list[RawChanges]:
        """Takes records in order of offset and returns what they fill.

        Raises:
          FlattenedEvents: the connector sends rows, not events.
          TooManyColumns: a table cannot be carried.
        """
        taken: list[RawChanges] = []
        for record in records:
            if record.offset < self._at.lsn:
                continue
            taken += self._take(record)
        return taken

    def flush(self, next_offset: int = 0, whole: bool = True) -> list[RawChanges]:
        """Returns what is complete, whatever its size.

        Args:
          next_offset: everything before this offset was fed or is no record (the marks of
            transactions of Kafka's own): if nothing waits, the position moves there.
          whole: False: an open transaction too, since its end does not come.
        """
        if not whole:
            self._close_transaction()
        taken = [self._cut(self._done)] if self._done > self._end else []
        end = Position(next_offset, SEQ_END)
        if self.idle and not self.open and end > self._end:
            taken.append(RawChanges(self._end, end, 0, self._commit_us, {}))
            self._end = self._at = self._done = end
        return taken

    # One record.

    def _take(self, record: Record) -> list[RawChanges]:
        at = Position(record.offset + 1, SEQ_END)
        size = len(record.value or b"") + len(record.key or b"")
        rows, size_max = self._limits
        taken: list[RawChanges] = []
        # Two rows may come of one event.
        while self._rows and (self._rows + 2 > rows or self._bytes + size > size_max):
            taken.append(self._cut(self._done if self._done > self._end else self._at))
        try:
            taken += self._take_event(record)
        except NotAnEvent as error:
            self._reject_record(record, error.reason)
        self._at, self._before_all = at, False
        self._bytes += size
        self._events += 1
        if not self.open:
            self._mark_done()
            if self._events >= rows * _EVENTS_MAX_FACTOR:
                taken.append(self._cut(self._done))
        return taken

    def _take_event(self, record: Record) -> list[RawChanges]:
        if record.value is None:  # A tombstone, for Kafka's own compaction.
            return []
        event = parse(record)
        payload = event.payload
        if payload.op is None or payload.source is None:
            self._take_other(payload, record)
            return []
        source = payload.source
        if source.connector not in CONNECTORS:
            raise NotAnEvent("unknown_connector")
        if payload.op == "m":
            return []
        if payload.op not in _OPS and payload.op != "t":
            raise NotAnEvent("unknown_event")
        table = source.name
        self._commit_us = max(self._commit_us, source.commit_us)
        if self._counts is not None and not self._passing:
            self._counts[table] = self._counts.get(table, 0) + 1
        if self._is_replay(payload, record):
            self.duplicates += 1
            return []
        self._follow_snapshot(source, payload.op, record.offset)
        spec = self._tables.get(table)
        if spec is None:
            return []
        if payload.op == "t":
            self._truncates.append((table, Position(record.offset + 1, 1)))
            return []
        return self._take_change(record, event, table, spec)

    def _take_other(self, payload: Payload, record: Record) -> None:
        """Takes what is no change: boundaries, heartbeats, schema changes, notifications."""
        if payload.source is not None and payload.op is None:
            if payload.ddl is None and payload.tableChanges is None:
                raise NotAnEvent("unknown_event")
            return
        if payload.status in ("BEGIN", "END") and isinstance(payload.id, str):
            self._take_boundary(payload, record)
            return
        refuse_rows(record)
        if isinstance(payload.ts_ms, int):
            # All that was committed before a heartbeat was sent has come before it.
            self._commit_us = max(self._commit_us, payload.ts_ms * 1000)

    def _take_boundary(self, payload: Payload, record: Record) -> None:
        name = _transaction_name(payload.id)
        if self._passes(payload, name):
            return
        if payload.status == "BEGIN":
            if name != self._transaction:
                # The end of the one before is lacking: after a schema change none comes.
                self._close_transaction()
                self._counts = {}
            self._transaction = name
            return
        self._count_missing(payload, record)
        self.replays.close(payload.id)
        self._transaction, self._counts = "", None

    def _passes(self, payload: Payload, name: str) -> bool:
        """Whether a boundary is of a transaction that comes again while another is open.

        Its connector has gone back before the open one, and will send that again from its first
        change: what there is of it waits, or an older row of it would be shown for a newer one.
        """
        if payload.status == "BEGIN":
            again = self.open and name != self._transaction and self.replays.knows(payload.id)
            self._passing = name if again else ""
            return again
        ended, self._passing = self._passing, ""
        return bool(ended) and ended == name

    def _remember_boundary(self, payload: Payload) -> None:
        if not isinstance(payload.id, str):
            return
        name = _transaction_name(payload.id)
        if self._passes(payload, name):
            return
        if payload.status == "BEGIN":
            self._transaction = name
        elif payload.status == "END":
            self.replays.close(payload.id)
            self._transaction = ""

    def _count_missing(self, payload: Payload, record: Record) -> None:
        """Notes the events that a transaction's end counts and that have not come.

        More may have come: after a restart within it a connector sends some again, and counts,
        until version 3.6, from there.
        """
        if self._counts is None or not isinstance(payload.data_collections, list):
            return
        seq = 0
        for entry in payload.data_collections:
            name, expected = str(entry.get("data_collection")), entry.get("event_count")
            table = ".".join(name.split(".")[-2:])
            seen = self._counts.get(table, 0)
            if table in self._tables and isinstance(expected, int) and seen < expected:
                seq += 1
                row = {"expected": str(expected), "seen": str(seen)}
                self._reject(record.offset, seq, Op.UPDATE, "missing_events", table, row)

    def _is_replay(self, payload: Payload, record: Record) -> bool:
        source = payload.source
        if payload.op == "r":
            # Read from the table just now: never sent again. A whole snapshot begins anew.
            if self._snapshot is None and source.snapshot != "incremental":
                self.replays.forget()
            return False
        place = place_of(source)
        if place is None:
            return False
        return self.replays.seen(place, (payload.op, source.table, record.key))

    # Snapshots.

    def _follow_snapshot(self, source: Source, op: str, offset: int) -> None:
        """Keeps where a whole snapshot began and what it read; at its end that is swept."""
        whole = op == "r" and source.snapshot != "incremental"
        if not whole:
            self._end_snapshot(offset)
            return
        # A connector that is killed in the midst of a snapshot reads everything once more.
        if self._snapshot is None or source.snapshot == "first":
            known = not self._before_all or offset == 0 or source.snapshot == "first"
            self._snapshot, self._snapshot_lsn = {}, offset + 1 if known else 0
        if source.name in self._tables:
            self._snapshot[source.name] = None
        if source.snapshot == "last":
            self._end_snapshot(offset + 1)

    def _end_snapshot(self, lsn: int) -> None:
        if self._snapshot is None:
            return
        if self._sweep and self._snapshot_lsn:
            first = Position(self._snapshot_lsn, 0)
            self._sweeps += [(lsn, (table, first)) for table in self._snapshot]
        self._snapshot = None

    # Changes.

    def _take_change(
        self, record: Record, event: Event, table: str, spec: TableSpec
    ) -> list[RawChanges]:
        payload, op = event.payload, _OPS[event.payload.op]
        values = payload.before if op is Op.DELETE else payload.after
        if op is not Op.DELETE and values:
            self.columns[table] = tuple(values)
        if op is Op.DELETE and not _has_key(values, spec):
            values = _key_of(record.key)
        if not _has_key(values, spec):
            raise NotAnEvent("missing_key")
        known = self._forms.get(table)
        columns = tuple(values)
        if op is Op.DELETE and known is not None and known.schema == event.schema:
            columns = known.columns
        elif op is Op.DELETE and not _covers(columns, spec):
            columns = tuple(dict.fromkeys((*values, *_read(spec))))
        if op is Op.UPDATE and payload.before is None and not _names_row(record, spec):
            raise NotAnEvent("key_unknown")
        taken: list[RawChanges] = []
        if known is None or known.columns != columns or known.schema != event.schema:
            form = TableForm(table, columns, event.schema, spec)
            taken = self._close_form(table)
            self._forms[table] = form
            self._gathered[table] = TableRows(form, self._placeholder)
        # From here on nothing may be refused: what was cut would be lost with it.
        self._add(self._gathered[table], record, payload, op, values, spec)
        return taken

    def _add(
        self,
        rows: TableRows,
        record: Record,
        payload: Payload,
        op: Op,
        values: dict[str, typing.Any],
        spec: TableSpec,
    ) -> None:
        """Adds the rows of one event: two where the key changed."""
        before, old_key = payload.before, None
        if op is Op.UPDATE:
            old_key = _changed_key(before, values, spec)
        elif op is Op.INSERT and record.headers:
            # The second half of a key change; the first was a delete of the old key (trap 5).
            old_key = _old_key(record, spec)
            op = Op.INSERT if old_key is None else Op.UPDATE
        lsn, us, seq = record.offset + 1, payload.source.commit_us, 1
        whole = [Row(op, lsn, seq, us, values, before, old_key)]
        if op is Op.UPDATE and payload.op == "u" and old_key is not None:
            old = values | old_key
            whole = [
                Row(Op.DELETE, lsn, 1, us, old),
                Row(op, lsn, 2, us, values, before, old_key),
            ]
        passed = self._start.seq if lsn == self._start.lsn else 0
        for row in whole:
            if row.seq > passed:
                rows.add(row)
                self._rows += 1

    def _close_form(self, table: str) -> list[RawChanges]:
        """Cuts so that the batch holds no row of the table in another form."""
        taken = []
        for until in (self._done, self._at):
            rows = self._gathered.get(table)
            if rows is not None and len(rows) and until > self._end:
                taken.append(self._cut(until))
        return taken

    def _reject_record(self, record: Record, reason: str) -> None:
        """Refuses a whole record, unless it is of a table that nobody reads."""
        table, op = "", Op.UPDATE
        try:
            payload = parse(record).payload
            if payload.source is not None and payload.source.table is not None:
                table = payload.source.name
            op = _OPS.get(payload.op, Op.UPDATE)
        except NotAnEvent:
            pass
        value = (record.value or b"").decode(errors="backslashreplace")
        key = None if record.key is None else record.key.decode(errors="backslashreplace")
        row = {"key": key, "value": value}
        for name, text in record.headers:
            if name == OLD_KEY and text:
                row[OLD_KEY] = text.decode(errors="backslashreplace")
        self._reject(record.offset, 1, op, reason, table, row)

    def _reject(
        self, offset: int, seq: int, op: Op, reason: str, table: str, row: dict[str, str | None]
    ) -> None:
        position = Position(offset + 1, seq)
        if position > self._start:
            self._rejects.append(Reject(table, position, int(op), self._commit_us, reason, "", row))

    # Cuts.

    def _close_transaction(self) -> None:
        self._transaction, self._counts = "", None
        self._mark_done()

    def _mark_done(self) -> None:
        self._done, self._done_us = self._at, self._commit_us
        self._done_bytes, self._done_events = self._bytes, self._events

    def _cut(self, end: Position) -> RawChanges:
        """Makes a `RawChanges` of everything up to `end` and moves the position there."""
        tables, refused, captured = {}, [], 0
        for name, gathered in self._gathered.items():
            part = gathered.cut(gathered.up_to(end.lsn))
            if not len(part):
                continue
            captured += len(part)
            batch, rejects = part.batch()
            refused += rejects
            if batch.num_rows:
                tables[name] = batch
        own = [reject for reject in self._rejects if reject.position <= end]
        self._rejects = self._rejects[len(own) :]
        truncates = tuple(item for item in self._truncates if item[1] <= end)
        self._truncates = self._truncates[len(truncates) :]
        sweeps = tuple(sweep for lsn, sweep in self._sweeps if lsn <= end.lsn)
        self._sweeps = self._sweeps[len(sweeps) :]
        rejects = tuple(sorted((*refused, *own), key=lambda reject: reject.position))
        commit_us = self._done_us if end == self._done else self._commit_us
        begin, self._end = self._end, end
        committed = end == self._done
        self._rows -= captured
        self._bytes -= self._done_bytes if committed else self._bytes
        self._events -= self._done_events if committed else self._events
        self._done_bytes = self._done_events = 0
        return RawChanges(
            begin,
            end,
            captured + len(own),
            commit_us,
            tables,
            truncates=truncates,
            sweeps=sweeps,
            rejects=rejects,
        )


def _transaction_name(name: str) -> str:
    """PostgreSQL's has the LSN of each event in it, and so another text at its end."""
    match = _POSTGRES_TX.fullmatch(name)
    return match[1] if match else name


def _has_key(values: typing.Any, spec: TableSpec) -> bool:
    return values is not None and None not in map(values.get, spec.key)


def _read(spec: TableSpec) -> tuple[str, ...]:
    return spec.columns or spec.key


def _covers(columns: tuple[str, ...], spec: TableSpec) -> bool:
    return set(_read(spec)) <= set(columns)


def _key_of(text: bytes | None) -> dict | None:
    """The record's key by column, or None if it has none."""
    try:
        key = unwrapped(text) if text else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return key if isinstance(key, dict) else None


@functools.lru_cache(maxsize=256)
def _marks(columns: tuple[str, ...]) -> tuple[bytes, ...]:
    """Bytes that JSON has where an object has these members: inside a text a quote is escaped."""
    return tuple(msgspec.json.encode(column) + b":" for column in columns)


def _names_row(record: Record, spec: TableSpec) -> bool:
    """Whether a change of the row's key would have come as a delete and an insert."""
    if record.key and all(map(record.key.__contains__, _marks(spec.key))):
        return True
    key = _key_of(record.key)
    return key is not None and set(spec.key) <= key.keys()


def _changed_key(before: dict | None, after: dict, spec: TableSpec) -> dict | None:
    """The old key where an update changed it; an old row may lack it, and then it did not."""
    if before is None or not _has_key(before, spec):
        return None
    if all(before[k] == after[k] for k in spec.key):
        return None
    return {k: before[k] for k in spec.key}


def _old_key(record: Record, spec: TableSpec) -> dict | None:
    """The old key as a header tells it, as far as it is of the mapping's own key."""
    for name, text in record.headers:
        if name == OLD_KEY and text:
            old = _key_of(text) or {}
            return {k: old[k] for k in spec.key if k in old} or None
    return None
