"""The wire forms of receipts and lag sketches: what Beam carries of them, never pickled."""

import struct

import numpy as np
from apache_beam import coders

from schemas.batches import Lane
from schemas.positions import Position
from schemas.receipts import Counts, Receipt
from schemas.sketches import LagSketch

_FORMAT = 1
_LANES = tuple(Lane)  # Append only: the wire carries the place in it.
# Format, lane, applied; LSN, seq; six counts; visible, watermark, late; distinct commits.
_HEAD = struct.Struct("<BBBQi6qqqqI")


class ReceiptCoder(coders.Coder):
    """A fixed head, two columns of integers, the link's name; equal receipts are equal bytes."""

    def encode(self, value: Receipt) -> bytes:
        head = _HEAD.pack(
            _FORMAT,
            _LANES.index(value.lane),
            value.applied,
            *value.progress,
            *value.counts,
            value.visible_us,
            value.watermark_us,
            value.late,
            len(value.commit_us),
        )
        columns = (value.commit_us, value.rows_per_commit)
        body = b"".join(np.asarray(column, "<i8").tobytes() for column in columns)
        return head + body + value.link.encode()

    def decode(self, encoded: bytes) -> Receipt:
        """Returns the receipt.

        Raises:
          ValueError: the bytes are of another format or cut short.
        """
        if len(encoded) < _HEAD.size or encoded[0] != _FORMAT:
            raise ValueError("not a receipt of this format")
        _, lane, applied, lsn, seq, *rest = _HEAD.unpack_from(encoded)
        *counts, visible_us, watermark_us, late, commits = rest
        end = _HEAD.size + 16 * commits
        if len(encoded) < end:
            raise ValueError("a receipt is cut short")
        columns = np.frombuffer(encoded, "<i8", 2 * commits, _HEAD.size).astype(np.int64)
        return Receipt(
            link=str(encoded[end:], "utf-8"),
            lane=_LANES[lane],
            progress=Position(lsn, seq),
            applied=bool(applied),
            counts=Counts(*counts),
            visible_us=visible_us,
            watermark_us=watermark_us,
            commit_us=columns[:commits],
            rows_per_commit=columns[commits:],
            late=late,
        )

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self):
        return Receipt


class LagSketchCoder(coders.Coder):
    """`LagSketch.to_bytes`."""

    def encode(self, value: LagSketch) -> bytes:
        return value.to_bytes()

    def decode(self, encoded: bytes) -> LagSketch:
        return LagSketch.from_bytes(encoded)

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self):
        return LagSketch


coders.registry.register_coder(Receipt, ReceiptCoder)
coders.registry.register_coder(LagSketch, LagSketchCoder)
