"""Read what a table looks like where its rows stand in the log: the TABLE_MAP event."""

import dataclasses
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from schemas.errors import CampusSyncError
from transforms.capture.mariadb import cells, charsets
from transforms.capture.mariadb.events import P_A, P_B, P_KIND, PROGRAM_SIZE

# Types of columns.
_TINY, _SHORT, _LONG, _FLOAT, _DOUBLE, _NULL, _TIMESTAMP, _LONGLONG, _INT24 = range(1, 10)
_DATE, _TIME, _DATETIME, _YEAR, _NEWDATE, _VARCHAR, _BIT = range(10, 17)
_TIMESTAMP2, _DATETIME2, _TIME2 = 17, 18, 19
_BLOB_COMPRESSED, _VARCHAR_COMPRESSED = 140, 141
_JSON, _NEWDECIMAL, _ENUM, _SET = 245, 246, 247, 248
_BLOB, _VAR_STRING, _STRING, _GEOMETRY = 252, 253, 254, 255
_INTEGERS = {_TINY: 1, _SHORT: 2, _INT24: 3, _LONG: 4, _LONGLONG: 8}
_SIGNED = {*_INTEGERS, _FLOAT, _DOUBLE, _NEWDECIMAL, _YEAR}  # Those that signedness is told of.
_CHARACTER = {_VARCHAR, _VAR_STRING, _STRING, _BLOB, _BLOB_COMPRESSED, _VARCHAR_COMPRESSED}
# Bytes that a type's metadata has; of the others none.
_META = {
    **dict.fromkeys((_FLOAT, _DOUBLE, _TIMESTAMP2, _DATETIME2, _TIME2), 1),
    **dict.fromkeys((_BLOB, _GEOMETRY, _JSON, _BLOB_COMPRESSED), 1),
    **dict.fromkeys((_VARCHAR, _VAR_STRING, _STRING, _BIT, _NEWDECIMAL, _ENUM, _SET), 2),
    _VARCHAR_COMPRESSED: 2,
}
_DIGIT_BYTES = (0, 1, 1, 2, 2, 3, 3, 4, 4, 4)
# Kinds of optional metadata.
_SIGNEDNESS, _DEFAULT_CHARSET, _COLUMN_CHARSET, _NAME, _SET_LABELS, _ENUM_LABELS = range(1, 7)
_SIMPLE_KEY, _PREFIX_KEY, _CHOICE_DEFAULT_CHARSET, _CHOICE_CHARSET = 8, 9, 10, 11
_BINARY_COLLATION = 63
_UNKNOWN_SIZE = -1


class MetadataMissing(CampusSyncError):
    """The log names no columns (`binlog_row_metadata`): its rows cannot be told apart by name."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column as the log tells it.

    Attributes:
      type, meta: the server's; an ENUM's or SET's own type, not the STRING that carries it.
      unsigned: for numbers.
      collation: id of a text's or label's collation, 63 for bytes.
      labels: of an ENUM or SET, in its character set.
    """

    name: str
    type: int
    meta: tuple[int, ...]
    unsigned: bool = False
    collation: int = _BINARY_COLLATION
    labels: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class TableMap:
    """A table as the log tells it: `key` are indices of the primary key's columns."""

    database: str
    table: str
    columns: tuple[Column, ...]
    key: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.database}.{self.table}"


class _Bytes:
    """Reads integers and strings one after another.

    Raises:
      ValueError: there are not as many bytes.
    """

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    @property
    def left(self) -> bool:
        return self._at < len(self._content)

    def take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("shorter than it says")
        self._at += count
        return taken

    def number(self) -> int:
        """Returns an integer of the protocol's variable length."""
        first = self.take(1)[0]
        if first < 0xFB:
            return first
        return int.from_bytes(self.take({0xFC: 2, 0xFD: 3, 0xFE: 8}[first]), "little")

    def string(self) -> bytes:
        return self.take(self.number())

    def numbers(self) -> list[int]:
        found = []
        while self.left:
            found.append(self.number())
        return found


def parse(body: bytes, named: bool = True) -> TableMap:
    """Returns what the body of a TABLE_MAP event, from its flags' end on, says.

    Raises:
      MetadataMissing: it does not name the columns, as it must if `named`.
      ValueError, KeyError, struct.error: it is damaged.
    """
    read = _Bytes(body)
    database = read.take(read.take(1)[0]).decode()
    read.take(1)
    table = read.take(read.take(1)[0]).decode()
    read.take(1)
    types = list(read.take(read.number()))
    metas = _metas(types, _Bytes(read.string()))
    for i, (kind, meta) in enumerate(zip(types, metas, strict=True)):
        types[i], metas[i] = _real(kind, meta)
    read.take((len(types) + 7) // 8)
    optional: dict[int, bytes] = {}
    while read.left:
        kind = read.take(1)[0]
        optional[kind] = read.string()
    if _NAME not in optional:
        if named:
            raise MetadataMissing(
                f"the log has no column names of {database}.{table}: SET GLOBAL "
                "binlog_row_metadata = 'FULL', also in the server's option file."
            )
        optional[_NAME] = bytes(len(types))
    columns = _columns(types, metas, optional)
    if _PREFIX_KEY in optional:
        key = _Bytes(optional[_PREFIX_KEY]).numbers()[::2]
    else:
        key = _Bytes(optional.get(_SIMPLE_KEY, b"")).numbers()
    return TableMap(database, table, columns, tuple(key))


def _metas(types: Sequence[int], read: _Bytes) -> list[tuple[int, ...]]:
    return [tuple(read.take(_META.get(kind, 0))) for kind in types]


def _real(kind: int, meta: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Undoes how a STRING hides its real type and a length above 255 in one another."""
    if kind != _STRING:
        return kind, meta
    real, size = meta
    if real & 0x30 != 0x30:
        return real | 0x30, (size | ((real & 0x30) ^ 0x30) << 4,)
    return real, (size,)


def _columns(
    types: Sequence[int],
    metas: Sequence[tuple[int, ...]],
    optional: Mapping[int, bytes],
) -> tuple[Column, ...]:
    names = _Bytes(optional[_NAME])
    signs = _signs(types, optional.get(_SIGNEDNESS, b""))
    text = [i for i, kind in enumerate(types) if kind in _CHARACTER]
    choices = [i for i, kind in enumerate(types) if kind in (_ENUM, _SET)]
    collations = _collations(text, optional, _DEFAULT_CHARSET, _COLUMN_CHARSET)
    collations |= _collations(choices, optional, _CHOICE_DEFAULT_CHARSET, _CHOICE_CHARSET)
    labels: dict[int, tuple[bytes, ...]] = {}
    for kind, field in ((_ENUM, _ENUM_LABELS), (_SET, _SET_LABELS)):
        read = _Bytes(optional.get(field, b""))
        for i in (i for i in choices if types[i] == kind and field in optional):
            labels[i] = tuple(read.string() for _ in range(read.number()))
    return tuple(
        Column(
            names.string().decode(),
            kind,
            metas[i],
            signs.get(i, False),
            collations.get(i, _BINARY_COLLATION),
            labels.get(i, ()),
        )
        for i, kind in enumerate(types)
    )


def _signs(types: Sequence[int], bits: bytes) -> dict[int, bool]:
    """Returns which numbers are unsigned; the bits stand in the order of the numbers alone."""
    numbers = [i for i, kind in enumerate(types) if kind in _SIGNED]
    return {i: bool(bits[k // 8] >> (7 - k % 8) & 1) for k, i in enumerate(numbers)}


def _collations(
    indices: Sequence[int], optional: Mapping[int, bytes], default: int, each: int
) -> dict[int, int]:
    """Returns collations by column: told for each, or one and what differs from it."""
    if each in optional:
        return dict(zip(indices, _Bytes(optional[each]).numbers(), strict=True))
    if default not in optional:
        return {}
    first, *rest = _Bytes(optional[default]).numbers()
    found = dict.fromkeys(indices, first)
    for k, collation in zip(rest[::2], rest[1::2], strict=True):
        found[indices[k]] = collation
    return found


@dataclasses.dataclass(frozen=True)
class Program:
    """How the kernels read and write a table's cells.

    Attributes:
      lines: int64 (columns, PROGRAM_SIZE), as `events.P_KIND` and so on say.
      walkable: False if the size of some column's cells is not known.
      labels, bounds: uint8 and int64, the labels of all ENUMs and SETs as UTF-8, and where each
        begins; one more bound than labels.
      codecs: of text read by tables, by their line in `charsets.tables`.
      slow: column to codec, where text is read cell by cell.
      floats: columns of floating point, in the order of their `P_A`, with bytes of a number.
    """

    lines: np.ndarray
    walkable: bool
    labels: np.ndarray
    bounds: np.ndarray
    codecs: tuple[str, ...]
    slow: dict[int, str]
    floats: tuple[tuple[int, int], ...]


def compile_program(
    found: TableMap, targets: Mapping[str, int], key: Sequence[str], names: Mapping[int, str]
) -> Program:
    """Returns the program of a table.

    Args:
      targets: which place of a row the wanted columns go to.
      key: columns of the key, in its order.
      names: collation ids to character sets.
    """
    lines = np.zeros((len(found.columns), PROGRAM_SIZE), np.int64)
    labels: list[bytes] = []
    codecs: list[str] = []
    slow: dict[int, str] = {}
    floats: list[tuple[int, int]] = []
    walkable = True
    for i, column in enumerate(found.columns):
        charset = names.get(column.collation, "")
        target = targets.get(column.name, -1)
        fixed, prefix = _size(column)
        walkable &= fixed != _UNKNOWN_SIZE
        kind, a, b = _kind(column)
        if kind == cells.FLOAT:
            a = len(floats)
            floats.append((i, fixed))
        elif kind in (cells.ENUM, cells.SET):
            a, b = len(labels), len(column.labels)
            labels += [_label(label, charset) for label in column.labels]
        elif kind == cells.TEXT:
            reading = charsets.reading(charset)
            a = reading.mode
            if reading.mode == charsets.SLOW:
                slow[i] = reading.codec
            elif reading.mode != charsets.COPIED:
                if reading.codec not in codecs:
                    codecs.append(reading.codec)
                b = codecs.index(reading.codec)
        place = key.index(column.name) + 1 if column.name in key else 0
        lines[i] = (kind, fixed, prefix, a, b, target, place)
    bounds = np.cumsum([0, *map(len, labels)], dtype=np.int64)
    joined = np.frombuffer(b"".join(labels) or b"\0", np.uint8)
    return Program(lines, walkable, joined, bounds, tuple(codecs), slow, tuple(floats))


def _label(text: bytes, charset: str) -> bytes:
    """Returns a label as UTF-8, or marked."""
    reading = charsets.reading(charset)
    return charsets.decoded(text, reading.codec)


def _size(column: Column) -> tuple[int, int]:
    """Returns the bytes of a cell, or of the length before it; the other is 0."""
    kind, meta = column.type, column.meta
    if kind in _INTEGERS:
        return _INTEGERS[kind], 0
    fixed = {
        _FLOAT: 4,
        _DOUBLE: 8,
        _NULL: 0,
        _YEAR: 1,
        _DATE: 3,
        _NEWDATE: 3,
        _TIME: 3,
        _TIMESTAMP: 4,
        _DATETIME: 8,
    }
    if kind in fixed:
        return fixed[kind], 0
    if kind in (_TIMESTAMP2, _DATETIME2, _TIME2):
        return {_TIMESTAMP2: 4, _DATETIME2: 5, _TIME2: 3}[kind] + (meta[0] + 1) // 2, 0
    if kind == _NEWDECIMAL:
        whole, fraction = meta[0] - meta[1], meta[1]
        return sum(n // 9 * 4 + _DIGIT_BYTES[n % 9] for n in (whole, fraction)), 0
    if kind == _BIT:
        return meta[1] + (meta[0] > 0), 0
    if kind in (_ENUM, _SET):
        return meta[0], 0
    if kind in (_VARCHAR, _VAR_STRING, _VARCHAR_COMPRESSED):
        return 0, 1 if struct.unpack("<H", bytes(meta))[0] < 256 else 2
    if kind in (_BLOB, _GEOMETRY, _JSON, _BLOB_COMPRESSED):
        return 0, meta[0]
    if kind == _STRING:
        return 0, 1 if meta[0] < 256 else 2
    return _UNKNOWN_SIZE, 0


def _kind(column: Column) -> tuple[int, int, int]:
    """Returns a cell's kind and its arguments, as far as the column alone tells them."""
    kind, meta = column.type, column.meta
    if kind in _INTEGERS:
        return (cells.UNSIGNED if column.unsigned else cells.INTEGER), 0, 0
    if kind == _NEWDECIMAL:
        return cells.DECIMAL, meta[0], meta[1]
    if kind in (_TIMESTAMP2, _DATETIME2, _TIME2):
        kinds = {_TIMESTAMP2: cells.TIMESTAMP, _DATETIME2: cells.DATETIME, _TIME2: cells.TIME}
        return kinds[kind], meta[0], 0
    if kind in _CHARACTER - {_BLOB_COMPRESSED, _VARCHAR_COMPRESSED}:
        if column.collation != _BINARY_COLLATION:
            return cells.TEXT, 0, 0
        return cells.HEX, meta[0] if kind == _STRING else 0, 0
    others = {
        _FLOAT: cells.FLOAT,
        _DOUBLE: cells.FLOAT,
        _YEAR: cells.YEAR,
        _DATE: cells.DATE,
        _NEWDATE: cells.DATE,
        _TIME: cells.OLD_TIME,
        _DATETIME: cells.OLD_DATETIME,
        _TIMESTAMP: cells.OLD_TIMESTAMP,
        _BIT: cells.BIT,
        _ENUM: cells.ENUM,
        _SET: cells.SET,
        _GEOMETRY: cells.HEX,
    }
    # Compressed columns, MySQL's binary JSON and what is newer: never guessed.
    return others.get(kind, cells.REFUSED), 0, 0


def renumber(program: Program, codecs: Sequence[str]) -> Program:
    """Returns the program with its texts' tables numbered as in `codecs`."""
    lines = program.lines.copy()
    for line in lines:
        if line[P_KIND] == cells.TEXT and line[P_A] in (charsets.TABLED, charsets.GB18030):
            line[P_B] = codecs.index(program.codecs[line[P_B]])
    return dataclasses.replace(program, lines=lines, codecs=tuple(codecs))
