"""Make a record batch of kept rows: the kernels' text, and what they leave to others."""

import numpy as np
import pyarrow as pa

from schemas.batches import Op, Reject
from transforms.capture.columns import NULL, UNCHANGED, Rows, record_batch
from transforms.capture.mariadb import cells, events
from transforms.capture.mariadb.charsets import Tables as CodecTables
from transforms.capture.mariadb.errors import LogSettingsWrong
from transforms.capture.mariadb.floats import float_texts
from transforms.capture.mariadb.places import describe
from transforms.capture.mariadb.refuse import refuse_partial, unmarked
from transforms.capture.mariadb.tables import Followed
from transforms.capture.mariadb.text_area import TextArea, decode_slowly
from transforms.capture.postgresql.pgoutput import ProtocolError


class RowWriter:
    """Writes rows as text; keeps its room from one batch to the next."""

    def __init__(self) -> None:
        self._area = TextArea()

    def write(
        self, table: Followed, codecs: CodecTables, buffer: np.ndarray, rows: np.ndarray
    ) -> tuple[pa.RecordBatch, tuple[Reject, ...]]:
        """Returns the rows whose values can be read, and the others as rejects.

        Args:
          rows: lines of `events.R_MAP` and so on, all of this table.

        Raises:
          ProtocolError: a row is damaged.
          LogSettingsWrong: the key of a row was not logged.
        """
        layout, program = table.layout, table.program
        count, columns = len(rows), len(layout.columns)
        start = np.zeros((count, layout.width), np.int64)
        length = np.full((count, layout.width), NULL, np.int32)
        floats = np.zeros((len(program.floats), 2, count), np.int64)
        words = (program.labels, program.bounds, codecs.single, codecs.double, codecs.four)
        area = self._area
        area.clear()
        at = 0
        while at >= 0:
            at, area.used = cells.write_rows(
                buffer,
                rows,
                at,
                program.lines,
                words,
                floats,
                start,
                length,
                columns,
                area.room,
                area.used,
            )
            if at < -1:
                lsn = int(rows[-2 - at, events.R_LSN])
                raise ProtocolError(f"a row of {layout.table} at {describe(lsn)} is damaged.")
            if at >= 0:
                area.grow()
        if (length[:, list(layout.key)] == UNCHANGED).any():
            raise LogSettingsWrong(
                f"rows of {layout.table} were logged without all of {_names(table)}: "
                "SET GLOBAL binlog_row_image = 'FULL', or let the primary key have them."
            )
        partial = self._partial_inserts(rows, length, columns)
        self._finish(table, floats, start, length)
        fixed = Rows(
            op=rows[:, events.R_OP].astype(np.uint8),
            lsn=rows[:, events.R_LSN].copy(),
            seq=rows[:, events.R_SEQ].astype(np.int32),
            commit_us=rows[:, events.R_US].copy(),
        )
        batch, rejects = record_batch(layout, fixed, area.room, start, length)
        if partial.any():
            batch, refused = refuse_partial(layout.table, layout.columns, batch)
            rejects = sorted((*rejects, *refused), key=lambda reject: reject.position)
        return batch, tuple(unmarked(reject) for reject in rejects)

    @staticmethod
    def _partial_inserts(rows: np.ndarray, length: np.ndarray, columns: int) -> np.ndarray:
        """Finds new rows of which the log lacks a column: its default, which nobody tells."""
        inserts = rows[:, events.R_OP] == Op.INSERT
        return inserts & (length[:, :columns] == UNCHANGED).any(axis=1)

    def _finish(
        self, table: Followed, floats: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> None:
        """Writes what the kernels left: numbers of floating point and rare character sets."""
        program, columns = table.program, len(table.layout.columns)
        for index, (column, size) in enumerate(program.floats):
            for old, place in _places(program.lines[column], columns):
                texts = float_texts(floats[index, old], size)
                self._area.put(texts, start[:, place], length[:, place])
        for column, codec in program.slow.items():
            for _, place in _places(program.lines[column], columns):
                decode_slowly(self._area, codec, start[:, place], length[:, place])


def _places(line: np.ndarray, columns: int) -> list[tuple[int, int]]:
    """Returns where a column's cells stand in a row: its own place, and the old key's."""
    target, key = int(line[events.P_TARGET]), int(line[events.P_KEY])
    places = [(0, target)] if target >= 0 else []
    return places + ([(1, columns + key - 1)] if key else [])


def _names(table: Followed) -> str:
    return ", ".join(table.layout.columns[i] for i in table.layout.key)
