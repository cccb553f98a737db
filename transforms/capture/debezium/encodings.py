"""How a JSON value of an event becomes canonical text: by one encoding a column.

The text is what PostgreSQL itself would write for the value, so that one mapping serves both ways
of reading a source: `t` and `f`, `\\x00ff`, `2026-03-01 08:30:00.5`, `{1,NULL,3}`, `101`.
"""

import typing
from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from transforms.capture.debezium import decimals, times
from transforms.capture.debezium.record import Number

_QUOTED = set('{}",\\ \t\n\r\v\f')  # In an array's element.
_DOUBLE_PLAIN, _FLOAT_PLAIN = 15, 6
_INT64 = pa.int64()
# The only type in a decoded event that msgspec does not know: a number, in its own digits.
_ENCODER = msgspec.json.Encoder(enc_hook=lambda number: msgspec.Raw(number.encode()))


class Ambiguous(ValueError):
    """The value could be read in two ways and nothing says which."""


class Encoding(typing.NamedTuple):
    """How a column is written.

    Attributes:
      name: a key of `TEXT_OF`.
      scale: of a `decimal`; of `instant`, `clock`: unused.
      unit: of `instant` and `clock`: `s`, `ms`, `us` or `ns`.
      length: bits of `bits`.
      item: of an `array`.
    """

    name: str
    scale: int = 0
    unit: str = ""
    length: int = 0
    item: "Encoding | None" = None


def text_of(encoding: Encoding, value: typing.Any) -> str | None:
    """Returns the canonical text of a JSON value, None for null.

    Raises:
      ValueError: it is no value of the encoding. Ambiguous: it could be two.
    """
    return None if value is None else TEXT_OF[encoding.name](encoding, value)


def _text(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _anything(encoding: Encoding, value: typing.Any) -> str:
    """A value that is wanted as text, of a type that is not told."""
    if isinstance(value, Number):
        return _number_text(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict) and value.keys() == {"scale", "value"}:
        return _variable(encoding, value)
    return _json(encoding, value)


def _number_text(literal: Number) -> str:
    """The digits as they came, or with an exponent PostgreSQL's form of them; always exact."""
    if literal.isascii() and not set("eE") & set(literal):
        return str(literal)
    return decimals.float_text(literal, _DOUBLE_PLAIN)


def _int(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return str(value)


def _bool(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, bool):
        raise ValueError("not a boolean")
    return "t" if value else "f"


def _float(encoding: Encoding, value: typing.Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("not a number")
    return decimals.float_text(str(value), encoding.length)


def _bytes(encoding: Encoding, value: typing.Any) -> str:
    return f"\\x{decimals.bytes_of(_text(encoding, value)).hex()}"


def _hex(encoding: Encoding, value: typing.Any) -> str:
    return f"\\x{bytes.fromhex(_text(encoding, value)).hex()}"


def _decimal(encoding: Encoding, value: typing.Any) -> str:
    if isinstance(value, Number):  # decimal.format NUMERIC.
        return _number_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return decimals.unscaled_text(decimals.bytes_of(_text(encoding, value)), encoding.scale)


def _variable(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("scale"), int):
        raise ValueError("not a decimal of variable scale")
    unscaled = decimals.bytes_of(_text(encoding, value.get("value")))
    return decimals.unscaled_text(unscaled, value["scale"])


def _any_number(encoding: Encoding, value: typing.Any) -> str:
    """A number of a type that is not told: a text of digits may be base64 of something else."""
    if isinstance(value, dict):
        return _variable(encoding, value)
    if isinstance(value, Number | int):
        return _anything(encoding, value)
    text = _text(encoding, value)
    if not decimals.is_plain(text) or decimals.is_base64(text):
        raise Ambiguous("a number or base64")
    return text


def _number(encoding: Encoding, value: typing.Any) -> str:
    return _anything(encoding, value)


def _any_bool(encoding: Encoding, value: typing.Any) -> str:
    return _anything(encoding, value)


def _any_date(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, str) or isinstance(value, Number):
        raise Ambiguous("days or a time")
    return _iso_or_own(value)


def _any_time(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, str) or isinstance(value, Number):
        raise Ambiguous("milliseconds, microseconds or nanoseconds")
    if value.endswith("Z") and ":" in value:
        raise Ambiguous("UTC, or a time without zone in ISO mode")
    return _iso_or_own(value)


def _iso_or_own(text: str) -> str:
    """ISO in canonical form; a campus's own format as it is, for the mapping's `formats`."""
    try:
        return times.iso_text(text, True)
    except ValueError:
        return str(text)


def _days(encoding: Encoding, value: typing.Any) -> str:
    return times.days_text(int(_int(encoding, value)))


def _instant(encoding: Encoding, value: typing.Any) -> str:
    return times.instant_text(int(_int(encoding, value)), encoding.unit)


def _clock(encoding: Encoding, value: typing.Any) -> str:
    return times.clock_text(int(_int(encoding, value)), encoding.unit)


def _iso(encoding: Encoding, value: typing.Any) -> str:
    return times.iso_text(_text(encoding, value), False)


def _zoned(encoding: Encoding, value: typing.Any) -> str:
    return times.iso_text(_text(encoding, value), True)


def _iso_clock(encoding: Encoding, value: typing.Any) -> str:
    return times.iso_clock_text(_text(encoding, value), False)


def _zoned_clock(encoding: Encoding, value: typing.Any) -> str:
    return times.iso_clock_text(_text(encoding, value), True)


def _bits(encoding: Encoding, value: typing.Any) -> str:
    number = int.from_bytes(decimals.bytes_of(_text(encoding, value)), "little")
    if number.bit_length() > encoding.length:
        raise ValueError("more bits than the column has")
    return f"{number:0{encoding.length}b}" if encoding.length else ""


def _array(encoding: Encoding, value: typing.Any) -> str:
    if not isinstance(value, list):
        raise ValueError("not an array")
    parts = []
    for item in value:
        text = "NULL" if item is None else text_of(encoding.item, item)
        plain = item is None or encoding.item.name == "array"
        parts.append(text if plain else _quoted(text))
    return f"{{{','.join(parts)}}}"


def _quoted(text: str) -> str:
    if text and text.upper() != "NULL" and not _QUOTED & set(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _json(encoding: Encoding, value: typing.Any) -> str:
    return str(value) if isinstance(value, str) else _ENCODER.encode(value).decode()


TEXT_OF: dict[str, Callable[[Encoding, typing.Any], str]] = {
    "text": _text,
    "int": _int,
    "bool": _bool,
    "float": _float,
    "bytes": _bytes,
    "hex": _hex,
    "decimal": _decimal,
    "variable": _variable,
    "number": _number,
    "days": _days,
    "instant": _instant,
    "clock": _clock,
    "iso": _iso,
    "zoned": _zoned,
    "iso_clock": _iso_clock,
    "zoned_clock": _zoned_clock,
    "bits": _bits,
    "array": _array,
    "json": _json,
    # Where neither a schema nor a hint says what the value is.
    "any_text": _anything,
    "any_number": _any_number,
    "any_bool": _any_bool,
    "any_date": _any_date,
    "any_time": _any_time,
}

TEXT = Encoding("text")
DOUBLE = Encoding("float", length=_DOUBLE_PLAIN)
FLOAT = Encoding("float", length=_FLOAT_PLAIN)


def column_text(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    """Returns `text_of` of all values as utf8, or None if they must be taken one by one.

    It knows the common encodings; a value that is not of its column's type, a placeholder for
    one, makes the whole column go one by one.
    """
    convert = _COLUMNS.get(encoding.name)
    if convert is None:
        return None
    try:
        return convert(encoding, values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None


def _text_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array:
    return pa.array(values, pa.utf8())


def _any_text_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    if set(map(type, values)) <= {str, type(None)}:
        return pa.array(values, pa.utf8())
    return _distinct_column(encoding, values)


def _int_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    return None if _holds_bool(values) else pa.array(values, _INT64).cast(pa.utf8())


def _bool_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array:
    return pc.if_else(pa.array(values, pa.bool_()), "t", "f")


def _days_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    return None if _holds_bool(values) else times.days_column(pa.array(values, _INT64))


def _instant_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    if _holds_bool(values):
        return None
    return times.instant_column(pa.array(values, _INT64), encoding.unit)


def _zoned_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    return times.zoned_column(pa.array(values, pa.utf8()))


def _distinct_column(encoding: Encoding, values: Sequence[typing.Any]) -> pa.Array | None:
    """Decodes each distinct text once: results, units and codes repeat."""
    types = set(map(type, values))
    if bool in types or {Number, str} <= types:  # Equal in a set, and yet not the same.
        return None
    known: dict[typing.Any, str | None] = {None: None}
    try:
        for value in set(values):
            known[value] = text_of(encoding, value)
    except (ValueError, TypeError):
        return None
    return pa.array([known[value] for value in values], pa.utf8())


def _holds_bool(values: Sequence[typing.Any]) -> bool:
    """Whether Arrow, to which True is 1, could take a boolean for a number."""
    return bool in set(map(type, values))


_COLUMNS: dict[str, Callable[[Encoding, Sequence[typing.Any]], pa.Array | None]] = {
    "text": _text_column,
    "json": _text_column,
    "int": _int_column,
    "bool": _bool_column,
    "days": _days_column,
    "instant": _instant_column,
    "zoned": _zoned_column,
    "decimal": _distinct_column,
    "bytes": _distinct_column,
    "float": _distinct_column,
    "clock": _distinct_column,
    "bits": _distinct_column,
    "any_number": _distinct_column,
    "any_text": _any_text_column,
    "any_date": _distinct_column,
    "any_time": _distinct_column,
    "number": _distinct_column,
    "iso": _distinct_column,
}
