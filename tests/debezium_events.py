"""Debezium events written by hand: any connector, with or without schema, as records of a topic."""

import base64
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence

from transforms.capture.debezium.record import Record

GOLDEN = pathlib.Path(__file__).parent / "golden" / "debezium"
VERSION = "3.5.0.Final"
COMMIT_MS = 1_772_352_000_000  # 2026-03-01 08:00 UTC.
PLACEHOLDER = "__debezium_unavailable_value"

# Fields of the source block that every connector has, and then its own.
_COMMON = [
    ("version", "string"),
    ("connector", "string"),
    ("name", "string"),
    ("ts_ms", "int64"),
    ("snapshot", "string"),
    ("db", "string"),
    ("sequence", "string"),
    ("ts_us", "int64"),
    ("ts_ns", "int64"),
]
_OWN = {
    "postgresql": [
        *[("schema", "string"), ("table", "string"), ("txId", "int64"), ("lsn", "int64")],
        *[("xmin", "int64"), ("origin", "string"), ("origin_lsn", "int64")],
    ],
    "oracle": [
        *[("schema", "string"), ("table", "string"), ("txId", "string"), ("scn", "string")],
        *[("commit_scn", "string"), ("lcr_position", "string"), ("rs_id", "string")],
        *[("ssn", "int64"), ("redo_thread", "int32"), ("user_name", "string")],
        *[("redo_sql", "string"), ("row_id", "string"), ("commit_ts_ms", "int64")],
        *[("start_scn", "string"), ("start_ts_ms", "int64"), ("txSeq", "int64")],
    ],
    "sqlserver": [
        *[("schema", "string"), ("table", "string"), ("change_lsn", "string")],
        *[("commit_lsn", "string"), ("event_serial_no", "int64")],
    ],
}
_OWN["mysql"] = _OWN["mariadb"] = [
    *[("table", "string"), ("server_id", "int64"), ("gtid", "string"), ("file", "string")],
    *[("pos", "int64"), ("row", "int32"), ("thread", "int64"), ("query", "string")],
]
CONNECTORS = tuple(_OWN)


def field(
    name: str,
    kind: str,
    logical: str | None = None,
    optional: bool = True,
    parameters: Mapping[str, str] | None = None,
    **more: typing.Any,
) -> dict:
    """Returns a field of a Connect schema, as JsonConverter writes it."""
    found: dict[str, typing.Any] = {"type": kind, "optional": optional} | more
    if logical:
        found |= {"name": logical, "version": 1}
    if parameters:
        found["parameters"] = dict(parameters)
    return found | {"field": name}


def decimal_field(name: str, scale: int) -> dict:
    parameters = {"scale": str(scale), "connect.decimal.precision": "14"}
    return field(name, "bytes", "org.apache.kafka.connect.data.Decimal", parameters=parameters)


def variable_field(name: str) -> dict:
    parts = [field("scale", "int32", optional=False), field("value", "bytes", optional=False)]
    return field(name, "struct", "io.debezium.data.VariableScaleDecimal", fields=parts)


def unscaled(number: int) -> str:
    """Returns an integer as Connect's Decimal has it: base64 of big-endian two's complement."""
    size = (number + (number < 0)).bit_length() // 8 + 1
    return base64.b64encode(number.to_bytes(size, "big", signed=True)).decode()


class Topic:
    """A topic under construction: every method appends one record and returns it.

    Args:
      connector: of `CONNECTORS`. fields: columns by table, `schema.table`. keys: theirs.
      schemas: whether JsonConverter's `schemas.enable` is on.
    """

    def __init__(
        self,
        connector: str,
        fields: Mapping[str, Sequence[dict]],
        keys: Mapping[str, Sequence[str]],
        schemas: bool = True,
    ):
        self.connector, self.fields, self.keys, self.schemas = connector, fields, keys, schemas
        self.records: list[Record] = []

    def change(
        self,
        op: str,
        table: str,
        before: dict | None,
        after: dict | None,
        source: Mapping[str, typing.Any] | None = None,
        transaction: tuple[str, int] | None = None,
        headers: Mapping[str, dict] | None = None,
        key: dict | None = None,
    ) -> Record:
        row = key or (after if after is not None else before) or {}
        ident = {name: row.get(name) for name in self.keys[table]} if op != "t" else None
        ms = (source or {}).get("ts_ms", COMMIT_MS)
        block = transaction and {
            "id": transaction[0],
            "total_order": transaction[1],
            "data_collection_order": transaction[1],
        }
        payload = {
            "before": before,
            "after": after,
            "source": self.source(table, **(source or {})),
            "transaction": block,
            "op": op,
            "ts_ms": ms + 350,
            "ts_us": (ms + 350) * 1000,
            "ts_ns": (ms + 350) * 1_000_000,
        }
        value = self._wrap(payload, self._envelope(table))
        texts = tuple(
            (name, dump(self._wrap(old, self._key(table)))) for name, old in (headers or {}).items()
        )
        return self.put(ident and self._wrap(ident, self._key(table)), value, texts)

    def tombstone(self, table: str, key: dict) -> Record:
        return self.put(self._wrap(key, self._key(table)), None)

    def boundary(self, status: str, name: str, counts: Mapping[str, int] | None = None) -> Record:
        collections = counts and [
            {"data_collection": table, "event_count": count} for table, count in counts.items()
        ]
        value = {
            "status": status,
            "id": name,
            "event_count": counts and sum(counts.values()),
            "data_collections": collections,
            "ts_ms": COMMIT_MS,
        }
        return self.put(self._wrap({"id": name}), self._wrap(value))

    def heartbeat(self, ms: int) -> Record:
        return self.put(self._wrap({"serverName": "campus"}), self._wrap({"ts_ms": ms}))

    def schema_change(self, table: str, ddl: str) -> Record:
        schema, name = table.split(".")
        value = {
            "source": self.source(table),
            "ts_ms": COMMIT_MS,
            "databaseName": self.source(table)["db"],
            "schemaName": schema,
            "ddl": ddl,
            "tableChanges": [{"type": "ALTER", "id": f'"{schema}"."{name}"', "table": None}],
        }
        return self.put(self._wrap({"databaseName": "his"}), self._wrap(value))

    def put(self, key: typing.Any, value: typing.Any, headers=()) -> Record:
        """Appends any JSON as a record."""
        texts = [None if part is None else dump(part) for part in (key, value)]
        self.records.append(Record(len(self.records), *texts, headers))
        return self.records[-1]

    def source(self, table: str, **more: typing.Any) -> dict:
        """Returns a source block; what is not given is null or a plain default."""
        schema, name = table.split(".")
        ms = more.get("ts_ms", COMMIT_MS)
        known = {"version": VERSION, "connector": self.connector, "name": "campus", "ts_ms": ms}
        known |= {"snapshot": "false", "ts_us": ms * 1000, "ts_ns": ms * 1_000_000}
        known |= {"db": "ORCLPDB1" if self.connector == "oracle" else "his", "table": name}
        if self.connector in ("mysql", "mariadb"):
            known |= {"db": schema, "server_id": 7, "file": "binlog.000003", "pos": 4, "row": 0}
        known |= {"schema": schema} | more
        names = [n for n, _ in (*_COMMON, *_OWN[self.connector])]
        return {name: known.get(name) for name in names}

    def _wrap(self, payload: typing.Any, schema: dict | None = None) -> dict:
        if not self.schemas:
            return payload
        return {"schema": schema or {"type": "struct", "optional": False}, "payload": payload}

    def _key(self, table: str) -> dict:
        fields = [f for f in self.fields[table] if f["field"] in self.keys[table]]
        name = f"campus.{table}.Key"
        return {"type": "struct", "fields": fields, "optional": False, "name": name}

    def _envelope(self, table: str) -> dict:
        row = {"type": "struct", "fields": list(self.fields[table]), "optional": True}
        row |= {"name": f"campus.{table}.Value"}
        source = [field(name, kind) for name, kind in (*_COMMON, *_OWN[self.connector])]
        name = f"io.debezium.connector.{self.connector}.Source"
        block = {"type": "struct", "fields": source, "optional": False, "name": name}
        parts = [row | {"field": "before"}, row | {"field": "after"}, block | {"field": "source"}]
        parts += [field("op", "string", optional=False), field("ts_ms", "int64")]
        name = f"campus.{table}.Envelope"
        return {"type": "struct", "fields": parts, "optional": False, "name": name, "version": 2}


def dump(value: typing.Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def load(name: str) -> list[Record]:
    """Returns the records of a golden file, numbered from offset 0."""
    records = []
    with (GOLDEN / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for offset, line in enumerate(lines):
            found = json.loads(line)
            key, value = (found[part] and found[part].encode() for part in ("key", "value"))
            headers = tuple((n, v and v.encode()) for n, v in found["headers"].items())
            records.append(Record(offset, key, value, headers))
    return records


def save(name: str, records: Sequence[Record]) -> str:
    """Returns the text of a golden file."""
    lines = []
    for record in records:
        key, value = (part and part.decode() for part in (record.key, record.value))
        headers = {n: v and v.decode() for n, v in record.headers}
        line = {"topic": name, "key": key, "value": value, "headers": headers}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)
