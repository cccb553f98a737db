"""Compile the kernels of the reading side before a source or an emergency waits for them."""

import functools
import struct

from schemas.links import LinkSettings
from schemas.mappings import CampusMapping
from schemas.positions import START
from transforms.capture.interpret import Interpreter
from transforms.capture.postgresql.pgoutput import PgOutputDecoder
from transforms.capture.prepare import Preparer
from transforms.escalations import Escalations

_OID = 1


def warm_up(settings: LinkSettings, mapping: CampusMapping) -> None:
    """Takes one made-up row of every mapped table through everything a reader does.

    A machine that runs this software for the first time compiles for some ten seconds, in
    which no sign of life could reach a source; later starts load what was compiled.
    """
    if settings.source_kind == "mariadb":
        from transforms.capture.mariadb.warm_up import warm_up as warm_up_binlog

        warm_up_binlog()
    interpreter = Interpreter(settings, mapping, Escalations(), silent=True)
    preparer = Preparer(settings)
    for name, table in mapping.tables.items():
        for raw in warm_up_decoder(name, table.needed, table.id):
            preparer.finish(preparer.routine(interpreter.interpret(raw, raw.begin), 0))


@functools.cache
def warm_up_decoder(
    table: str = "none.none", columns: tuple[str, ...] = ("id",), key: tuple[str, ...] = ("id",)
) -> tuple:
    """Decodes one transaction that inserts, changes and deletes a row; returns what it gave."""
    cells = struct.pack("!H", len(columns)) + b"t\0\0\0\x011" * len(columns)
    schema, _, name = table.partition(".")
    heads = b"".join(
        struct.pack("!B", column in key) + column.encode() + b"\0" + struct.pack("!Ii", 25, -1)
        for column in columns
    )
    relation = struct.pack("!I", _OID) + f"{schema}\0{name}\0f".encode()
    messages = (
        b"B" + struct.pack("!QqI", 1, 0, 1),
        b"R" + relation + struct.pack("!H", len(columns)) + heads,
        b"I" + struct.pack("!I", _OID) + b"N" + cells,
        b"U" + struct.pack("!I", _OID) + b"O" + cells + b"N" + cells,
        b"D" + struct.pack("!I", _OID) + b"O" + cells,
        b"C" + struct.pack("!BQQq", 0, 1, 9, 0),
    )
    decoder = PgOutputDecoder(1000, 1 << 20, START, {table: key})
    frames = [b"w" + struct.pack("!QQq", 1, 1, 0) + message for message in messages]
    return (*decoder.feed(frames), *decoder.flush())
