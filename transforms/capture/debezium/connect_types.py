"""The encoding of a column by its Connect schema: type, name and parameters."""

import typing

from transforms.capture.debezium.encodings import DOUBLE, FLOAT, TEXT, Encoding

_INT = Encoding("int")
_JSON = Encoding("json")
_DAYS = Encoding("days")
_PLAIN = {
    "string": TEXT,
    "boolean": Encoding("bool"),
    "int8": _INT,
    "int16": _INT,
    "int32": _INT,
    "int64": _INT,
    "float": FLOAT,
    "float32": FLOAT,
    "double": DOUBLE,
    "float64": DOUBLE,
    "bytes": Encoding("bytes"),
    "struct": _JSON,
    "map": _JSON,
}
_NAMED = {
    "io.debezium.data.VariableScaleDecimal": Encoding("variable"),
    "io.debezium.time.Date": _DAYS,
    "io.debezium.time.Time": Encoding("clock", unit="ms"),
    "io.debezium.time.MicroTime": Encoding("clock", unit="us"),
    "io.debezium.time.NanoTime": Encoding("clock", unit="ns"),
    "io.debezium.time.Timestamp": Encoding("instant", unit="ms"),
    "io.debezium.time.MicroTimestamp": Encoding("instant", unit="us"),
    "io.debezium.time.NanoTimestamp": Encoding("instant", unit="ns"),
    "io.debezium.time.MicroDuration": Encoding("clock", unit="us"),
    "io.debezium.time.NanoDuration": Encoding("clock", unit="ns"),
    "io.debezium.time.ZonedTimestamp": Encoding("zoned"),
    "io.debezium.time.ZonedTime": Encoding("zoned_clock"),
    "io.debezium.time.IsoDate": Encoding("iso"),
    "io.debezium.time.IsoTime": Encoding("iso_clock"),
    "io.debezium.time.IsoTimestamp": Encoding("iso"),
    "org.apache.kafka.connect.data.Date": _DAYS,
    "org.apache.kafka.connect.data.Time": Encoding("clock", unit="ms"),
    "org.apache.kafka.connect.data.Timestamp": Encoding("instant", unit="ms"),
}


def encoding_of(field: dict[str, typing.Any]) -> Encoding:
    """Returns how the values of a Connect field are written.

    A name that says nothing of the form (Json, Uuid, Enum, EnumSet, Xml, Year, Interval, and what
    is not known here) leaves it to the type; a type that is not known is taken as JSON.
    """
    kind, name = field.get("type"), field.get("name")
    parameters = field.get("parameters") or {}
    if name == "org.apache.kafka.connect.data.Decimal":
        return Encoding("decimal", scale=int(parameters.get("scale", 0)))
    if name == "io.debezium.data.Bits":
        return Encoding("bits", length=int(parameters.get("length", 0)))
    if name in _NAMED:
        return _NAMED[name]
    if kind == "array":
        return Encoding("array", item=encoding_of(field.get("items") or {}))
    return _PLAIN.get(kind, _JSON)
