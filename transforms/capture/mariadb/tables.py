"""Know the tables of a log as it is read: by id for the kernels, by name for everyone else."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from transforms.capture.columns import Layout
from transforms.capture.mariadb import charsets, table_map
from transforms.capture.mariadb.events import PROGRAM_SIZE
from transforms.capture.mariadb.layouts import table_layout
from transforms.capture.mariadb.table_map import Program, TableMap

_IDS_MAX = 256  # A server numbers a table anew whenever it opens it; a statement uses few.


@dataclasses.dataclass(frozen=True)
class Followed:
    """A table whose rows are wanted, as one TABLE_MAP tells it.

    Attributes:
      layout: of its record batches. program: of its cells.
      columns: of the source, with those that are not wanted.
    """

    layout: Layout
    program: Program
    source: TableMap


class Tables:
    """What the log has told of tables; see `BinlogDecoder` for the arguments."""

    def __init__(
        self,
        names: Mapping[int, str],
        keys: Mapping[str, Sequence[str]] | None,
        columns: Mapping[str, Sequence[str]] | None,
        fold: bool,
    ):
        self._charsets, self._keys, self._columns = names, keys, columns or {}
        self._fold = fold
        self._by_key = {self._key(name): name for name in keys or {}}
        self._ids: dict[int, int] = {}
        self._signatures: list[bytes] = []
        self._programs: list[Program] = []
        self._followed: list[Followed | None] = []
        self._codecs: list[str] = []
        self.codec_tables = charsets.tables(())
        self._publish_maps()
        self._publish()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the followed tables that are known: all wanted ones, else those met."""
        if self._keys is not None:
            return tuple(self._keys)
        return tuple({table.layout.table for table in self._followed if table is not None})

    def followed(self, index: int) -> Followed:
        """Returns the table of a kept row's map."""
        return self._followed[index]

    def learn(self, body: bytes) -> list[int]:
        """Takes a TABLE_MAP's body; returns other maps of the table that rows may be kept by.

        Raises:
          MetadataMissing, KeyUnknown, TooManyColumns: a wanted table cannot be followed.
          ValueError, KeyError, IndexError: it is damaged.
        """
        table_id, signature = int.from_bytes(body[:6], "little"), body[8:]
        index = self._signatures.index(signature) if signature in self._signatures else -1
        if index < 0:
            index = self._add(signature)
        others = self._others(index)
        self._ids = {
            number: i for number, i in self._ids.items() if number != table_id and i not in others
        } | {table_id: index}
        if len(self._ids) > _IDS_MAX:
            self._ids = dict(list(self._ids.items())[_IDS_MAX // 2 :])
        self._publish()
        return others

    def _others(self, index: int) -> list[int]:
        """Returns the other maps of the same table, if it is followed."""
        found = self._followed[index]
        return [
            i
            for i, other in enumerate(self._followed)
            if i != index and found and other and other.layout.table == found.layout.table
        ]

    def _add(self, signature: bytes) -> int:
        name = self._wanted(signature)
        if name is None:
            # Its rows are counted, whatever the log names.
            source = table_map.parse(signature, named=False)
            program = table_map.compile_program(source, {}, (), {})
            followed = None
        else:
            source = table_map.parse(signature)
            layout = self._layout(source, name)
            targets = {column: i for i, column in enumerate(layout.columns)}
            key = [layout.columns[i] for i in layout.key]
            program = table_map.compile_program(source, targets, key, self._charsets)
            followed = Followed(layout, self._shared(program), source)
        self._signatures.append(signature)
        self._programs.append(program)
        self._followed.append(followed)
        self._publish_maps()
        return len(self._signatures) - 1

    def _shared(self, program: Program) -> Program:
        """Renumbers the codecs of a program to those of all programs."""
        for codec in program.codecs:
            if codec not in self._codecs:
                self._codecs.append(codec)
                self.codec_tables = charsets.tables(self._codecs)
        return table_map.renumber(program, self._codecs)

    def _key(self, name: str) -> str:
        return name.casefold() if self._fold else name

    def _wanted(self, signature: bytes) -> str | None:
        """Returns our name of the table, or None if it is passed over."""
        size = signature[0]
        database = signature[1 : 1 + size].decode()
        at = size + 2
        name = f"{database}.{signature[at + 1 : at + 1 + signature[at]].decode()}"
        if self._keys is None:
            return name
        return self._by_key.get(self._key(name))

    def _layout(self, source: TableMap, name: str) -> Layout:
        columns = tuple(column.name for column in source.columns)
        key = tuple(columns[i] for i in source.key) if self._keys is None else self._keys[name]
        return table_layout(name, columns, key, self._columns.get(name))

    def _publish_maps(self) -> None:
        """Sets what the kernels read of all maps; see `events.scan`."""
        widths = np.array([len(program.lines) for program in self._programs], np.int64)
        sizes = [len(signature) for signature in self._signatures]
        lines = [program.lines for program in self._programs]
        self._maps = (
            np.frombuffer(b"".join(self._signatures) or b"\0", np.uint8),
            np.cumsum([0, *sizes], dtype=np.int64),
            np.cumsum([0, *widths[:-1]], dtype=np.int64)[: len(widths)],
            widths,
            np.array([table is not None for table in self._followed], np.bool_),
            np.array([program.walkable for program in self._programs], np.bool_),
            np.concatenate([np.zeros((0, PROGRAM_SIZE), np.int64), *lines]),
        )
        widest = max([1, *widths])
        self.scratch = (np.zeros((2, widest), np.int64), np.zeros((2, widest), np.int64))

    def _publish(self) -> None:
        numbers = np.array(list(self._ids), np.int64)
        self.arrays = (numbers, np.array(list(self._ids.values()), np.int64), *self._maps)
