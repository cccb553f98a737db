"""A record of the topic, as the decoder takes it, and the parts of the events in it."""

import functools
import typing

import msgspec

from schemas.errors import CampusSyncError

_NO_SCHEMA = msgspec.Raw(b"")
# What a parser says of bytes that are no JSON; it does not look at text that it passes over.
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FlattenedEvents(CampusSyncError):
    """The topic holds rows without their operation: what happened to them cannot be known."""

    def __init__(self, offset: int):
        super().__init__(
            f"the event at offset {offset} is a bare row, as ExtractNewRecordState makes it: it "
            "does not say what happened to the row, nor when. Remove that transform (`unwrap`) "
            "from the connector's `transforms`, and let the connector take a new snapshot."
        )


class NotAnEvent(ValueError):
    """The record's bytes are no event that is known here. `reason` is a dead letter's."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Record(typing.NamedTuple):
    """One record of a Kafka partition. `headers` are name and value, in their order."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: typing.Sequence[tuple[str, bytes | None]] = ()


class Number(str):
    """A JSON number with a point or an exponent, in its own digits: a double would round it."""

    __slots__ = ()


class Source(msgspec.Struct, gc=False):
    """The `source` block: where a change stands in its database's log. None: not told."""

    connector: str | None = None
    snapshot: str | bool | None = None
    ts_ms: int | None = None
    ts_us: int | None = None
    db: str | None = None
    schema: str | None = None
    table: str | None = None
    # PostgreSQL and Oracle.
    txId: int | str | None = None
    lsn: int | None = None
    # MySQL and MariaDB.
    server_id: int | None = None
    gtid: str | None = None
    file: str | None = None
    pos: int | None = None
    # Oracle.
    scn: int | str | None = None
    commit_scn: int | str | None = None
    commit_ts_ms: int | None = None
    redo_thread: int | None = None
    rs_id: str | None = None
    ssn: int | None = None
    txSeq: int | None = None
    # SQL Server.
    commit_lsn: str | None = None
    change_lsn: str | None = None
    event_serial_no: int | None = None

    @property
    def name(self) -> str:
        """The table as mapping files write it: `schema.table`, or `database.table`."""
        return f"{self.schema or self.db}.{self.table}"

    @property
    def commit_us(self) -> int:
        """When the change was committed, as far as the source tells; 0 if it does not."""
        if self.commit_ts_ms is not None:
            return self.commit_ts_ms * 1000
        return self.ts_us or (self.ts_ms or 0) * 1000


class Payload(msgspec.Struct):
    """What every kind of event may have. Unknown fields are passed over unread."""

    op: str | None = None
    before: dict[str, typing.Any] | None = None
    after: dict[str, typing.Any] | None = None
    source: Source | None = None
    ts_ms: int | None = None
    # Transaction boundaries.
    status: str | None = None
    id: typing.Any = None
    data_collections: list[dict[str, typing.Any]] | None = None
    # Schema changes.
    ddl: str | None = None
    tableChanges: list | None = None


class _Value(Payload):
    """An event with its Connect schema (`schema` and `payload`), or without."""

    schema: msgspec.Raw = _NO_SCHEMA
    payload: Payload | None = None


class Event(typing.NamedTuple):
    """An event and the text of its Connect schema, empty if it came without."""

    payload: Payload
    schema: bytes


_DECODER = msgspec.json.Decoder(_Value, float_hook=Number)
_ANYTHING = msgspec.json.Decoder(float_hook=Number)


def parse(record: Record) -> Event:
    """Returns the event of a record that has a value.

    Raises:
      NotAnEvent: `not_json`, or `unknown_event`: its fields are of other types.
      FlattenedEvents: the value is a row.
    """
    try:
        value = _DECODER.decode(record.value)
    except msgspec.ValidationError:
        raise _odd(record) from None
    except _NOT_JSON:
        raise NotAnEvent("not_json") from None
    if value.payload is not None:
        # A copy: the record's own bytes would stay in memory with their slice.
        return Event(value.payload, bytes(value.schema))
    return Event(value, b"")


def _odd(record: Record) -> Exception:
    """Returns what to raise for JSON that has not the shape of an event."""
    try:
        value = unwrapped(record.value)
        key = unwrapped(record.key) if record.key else None
    except _NOT_JSON:
        return NotAnEvent("not_json")
    return _not_known(value, key, record.offset)


def _not_known(value: typing.Any, key: typing.Any, offset: int) -> Exception:
    if isinstance(value, dict):
        marks = {"__deleted", "__op", "__table", "__source_ts_ms", "__lsn"} & value.keys()
        has_key = isinstance(key, dict) and key and key.keys() <= value.keys()
        if marks or has_key:
            return FlattenedEvents(offset)
    return NotAnEvent("unknown_event")


def refuse_rows(record: Record) -> None:
    """Passes a value with nothing of an event if it is a heartbeat or a notification.

    Raises:
      NotAnEvent, FlattenedEvents: it is neither.
    """
    try:
        value = unwrapped(record.value)
        key = unwrapped(record.key) if record.key else None
    except _NOT_JSON:  # In what was passed over before.
        raise NotAnEvent("not_json") from None
    is_object = isinstance(value, dict)
    if is_object and ("ts_ms" in value and value.keys() <= {"ts_ms", "ts_us", "ts_ns"}):
        return
    if is_object and {"aggregate_type", "type"} <= value.keys():
        return
    raise _not_known(value, key, record.offset)


def unwrapped(text: bytes) -> typing.Any:
    """Returns the JSON value of a key, header or value, out of its schema envelope if it has one.

    Raises:
      msgspec.DecodeError, UnicodeDecodeError: it is not JSON.
    """
    value = _ANYTHING.decode(text)
    if isinstance(value, dict) and value.keys() == {"schema", "payload"}:
        return value["payload"]
    return value


@functools.lru_cache(maxsize=64)
def schema_fields(schema: bytes, part: str) -> tuple[dict, ...]:
    """Returns the Connect fields of `before` or `after` in an event's schema, none if it lacks it.

    Raises:
      NotAnEvent: `bad_schema`: it is not a Connect schema.
    """
    try:
        found = _ANYTHING.decode(schema)
        for field in found["fields"]:
            if field["field"] == part:
                return tuple(field["fields"])
    except (*_NOT_JSON, TypeError, KeyError):
        raise NotAnEvent("bad_schema") from None
    return ()
