"""Row changes as Debezium's Oracle connector tells what it mines: JSON events without schema.

No Oracle and no LogMiner is behind them. The form is that of connector 3.5 with
`decimal.handling.mode=precise`, `time.precision.mode=adaptive`, `lob.enabled=true`,
`provide.transaction.metadata=true` and all events routed into one topic.
"""

import base64
import collections
import collections.abc
import datetime
import decimal
import typing

import msgspec

from runners.embedded.campus_c import SCHEMA
from runners.embedded.oracle_tables import OracleTable, OracleType

DATABASE, SERVER, VERSION = "ORCLPDB1", "west", "3.5.0.Final"
UNAVAILABLE = "__debezium_unavailable_value"
_SCN_FROM = 2_868_546  # A number of the redo log is counted from here: an SCN is never small.
_EPOCH = datetime.datetime.fromisoformat("1970-01-01")  # As DATE, without a zone.
_MS = datetime.timedelta(milliseconds=1)

Row = dict[str, object]


class Event(typing.NamedTuple):
    """A record for the topic; a value of None is a tombstone."""

    key: bytes
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Commit(typing.NamedTuple):
    """A transaction: its number, the first and last of its changes, and when it committed."""

    tx: int
    first: int
    last: int
    at_us: int


class Redo(typing.NamedTuple):
    """One row change: `op` is c, u or d; the rows as PostgreSQL's JSON has them."""

    seq: int
    op: str
    table: str
    before: Row | None
    after: Row | None
    changed_us: int


class Transaction:
    """Makes the events of one committed transaction, which are the same whenever they are made."""

    def __init__(self, commit: Commit, tables: collections.abc.Mapping[str, OracleTable]):
        self._commit, self._tables = commit, tables
        self._id = f"{commit.tx:016x}"
        self._steps = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def begin(self) -> Event:
        """Returns the boundary that comes first."""
        return self._boundary("BEGIN", None, None)

    def end(self) -> Event:
        """Returns the boundary that comes last and counts the events of every table."""
        counts = [
            {"data_collection": f"{DATABASE}.{SCHEMA}.{table}", "event_count": count}
            for table, count in self._counts.items()
        ]
        return self._boundary("END", self._counts.total(), counts)

    def events(self, redo: Redo) -> list[Event]:
        """Returns the events of a row change: of a changed key, a delete, a tombstone, an insert.

        Redo has no LOB that a statement leaves alone, and none as it was before.
        """
        table = self._tables[redo.table]
        self._steps += 1
        before = redo.before and _encoded(table, redo.before, redo.before)
        after = redo.after and _encoded(table, redo.after, redo.before)
        if redo.op == "d":
            key = _key(table, before)
            return [self._change("d", redo, before, None, key), Event(_json(key), None)]
        new = _key(table, after)
        if redo.op == "c" or _key(table, before) == new:
            return [self._change(redo.op, redo, before, after, new)]
        old = _key(table, before)
        # The half that inserts knows nothing of the LOBs either.
        return [
            self._change("d", redo, before, None, old, ("__debezium.newkey", _json(new))),
            Event(_json(old), None),
            self._change("c", redo, None, after, new, ("__debezium.oldkey", _json(old))),
        ]

    def _change(
        self,
        op: str,
        redo: Redo,
        before: Row | None,
        after: Row | None,
        key: Row,
        *headers: tuple[str, bytes],
    ) -> Event:
        self._counts[redo.table] += 1
        commit = self._commit
        block = {
            "id": self._id,
            "total_order": self._counts.total(),
            "data_collection_order": self._counts[redo.table],
        }
        scn = _SCN_FROM + redo.seq
        source = _source(redo.table, redo.changed_us) | {
            "txId": self._id,
            "scn": str(scn),
            "commit_scn": str(_SCN_FROM + commit.last),
            "rs_id": f" 0x{scn >> 20:06x}.{scn & 0xFFFFF:08x}.0010 ",
            "ssn": 0,
            "redo_thread": 1,
            "user_name": SCHEMA,
            "commit_ts_ms": _whole_second_ms(commit.at_us),
            "start_scn": str(_SCN_FROM + commit.first),
            "txSeq": self._steps,
        }
        value = _envelope(op, before, after, source, block, commit.at_us)
        return Event(_json(key), value, headers)

    def _boundary(self, status: str, count: int | None, tables: list | None) -> Event:
        value = {
            "status": status,
            "id": self._id,
            "event_count": count,
            "data_collections": tables,
            "ts_ms": _whole_second_ms(self._commit.at_us),
        }
        return Event(_json({"id": self._id}), _json(value))


def snapshot_event(table: OracleTable, row: Row, marker: str, scn: int, now_us: int) -> Event:
    """Returns the event of a row that the connector's initial snapshot has read.

    Args:
      marker: `first`, `first_in_data_collection`, `true`, `last_in_data_collection` or `last`.
      scn: number of the last change before it.
    """
    after = _encoded(table, row, None)
    source = _source(table.name, now_us) | {"snapshot": marker, "scn": str(_SCN_FROM + scn)}
    value = _envelope("r", None, after, source, None, now_us)
    return Event(_json(_key(table, after)), value)


def marked(
    tables: collections.abc.Iterable[tuple[OracleTable, collections.abc.Iterator[Row]]],
) -> collections.abc.Iterator[tuple[OracleTable, Row, str]]:
    """Yields every row with its place in the snapshot, as Debezium marks it."""
    held: tuple[OracleTable, Row] | None = None
    marker = "first"
    for table, rows in tables:
        for row in rows:
            if held is not None:
                ends = held[0] is not table and marker == "true"
                yield *held, "last_in_data_collection" if ends else marker
                marker = "true" if held[0] is table else "first_in_data_collection"
            held = table, row
    if held is not None:
        yield *held, "last"


def _encoded(table: OracleTable, row: Row, before: Row | None) -> Row:
    """Returns a row in Connect's types; `before` is what it replaces, or itself."""
    return {
        name: UNAVAILABLE
        if kind.name == "CLOB" and before is not None and before[name] == row[name]
        else _value(kind, row[name])
        for name, kind in table.columns.items()
    }


def _value(kind: OracleType, value: typing.Any) -> object:
    if value is None or kind.name in ("VARCHAR2", "CLOB"):
        return value
    if kind.name == "DATE":  # Without a zone, counted as if it were UTC.
        return (datetime.datetime.fromisoformat(value) - _EPOCH) // _MS
    if not kind.scale:
        return int(value)
    number = int(decimal.Decimal(value).scaleb(kind.scale))
    size = (number + (number < 0)).bit_length() // 8 + 1
    return base64.b64encode(number.to_bytes(size, "big", signed=True)).decode()


def _key(table: OracleTable, row: Row) -> Row:
    return {name: row[name] for name in table.key}


def _source(table: str, at_us: int) -> Row:
    ms = _whole_second_ms(at_us)
    known = {"version": VERSION, "connector": "oracle", "name": SERVER, "ts_ms": ms}
    known |= {"snapshot": "false", "db": DATABASE, "sequence": None}
    known |= {"ts_us": ms * 1000, "ts_ns": ms * 1_000_000, "schema": SCHEMA, "table": table}
    absent = ("txId", "scn", "commit_scn", "lcr_position", "rs_id", "ssn", "redo_thread")
    absent += ("user_name", "redo_sql", "row_id", "commit_ts_ms", "start_scn", "start_ts_ms")
    return known | dict.fromkeys((*absent, "txSeq"))


def _envelope(
    op: str, before: Row | None, after: Row | None, source: Row, block: Row | None, at_us: int
) -> bytes:
    times = {"ts_ms": at_us // 1000, "ts_us": at_us, "ts_ns": at_us * 1000}
    value = {"before": before, "after": after, "source": source, "transaction": block, "op": op}
    return _json(value | times)


def _whole_second_ms(at_us: int) -> int:
    """As the times in V$LOGMNR_CONTENTS are: a DATE has no part of a second."""
    return at_us // 1_000_000 * 1000


_json = msgspec.json.encode
