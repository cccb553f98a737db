"""The wire form of change batches, and their seal; never pickle.

Version 1, integers little-endian:

    0   4  magic "CSB" and the version, 0x01
    4   4  length of the header
    8   h  header: JSON in ASCII, see `_header`; holds the lengths of what follows
           for every table: zeros up to a multiple of 8, then one Arrow IPC stream
           the sealed bytes of every dead letter, one after the other

Header keys may be added, never changed: a reader ignores those it does not know, and a missing
one has the default of its `ChangeBatch` field.
"""

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pyarrow as pa
from apache_beam import coders

from schemas.batches import ChangeBatch, DeadLetter, Lane, ManifestEntry, ParkingTicket
from schemas.errors import SealBrokenError, WireFormatError
from schemas.positions import Position

_MAGIC = b"CSB\x01"
_HEAD = struct.Struct("<4sI")
# What reading other bytes may raise; StopIteration is Arrow's word for a stream with no batch.
_NOT_OURS = (
    ValueError,
    KeyError,
    TypeError,
    OSError,
    StopIteration,
    struct.error,
    pa.ArrowException,
)
_ALIGNMENT = 8  # Arrow's own; without it a decoded batch could not be used where it lies.


def seal(batch: ChangeBatch) -> ChangeBatch:
    """Returns `batch` with its seal: SHA-256 over everything else in it.

    The seal covers logical content: it is the same before and after a coder, and for a slice
    and a copy of it. Different content has a different seal.
    """
    return dataclasses.replace(batch, seal=_seal_of(batch))


def verify(batch: ChangeBatch) -> None:
    """Checks the seal.

    Raises:
      SealBrokenError: the batch is not as it was sealed, or never was.
    """
    try:
        whole = batch.seal == _seal_of(batch)
    except (ValueError, TypeError, pa.ArrowException):  # No batch that was sealed does this.
        whole = False
    if not whole:
        raise SealBrokenError


class ChangeBatchCoder(coders.Coder):
    """Encodes a change batch; decoded tables are views of the encoded bytes.

    Args:
      compression: of the tables, `lz4` or `zstd`; none by default, as links that need it
        compress below. Any decoder reads either.
    """

    def __init__(self, compression: str | None = None):
        self._compression = compression

    def encode(self, value: ChangeBatch) -> bytes:
        options = pa.ipc.IpcWriteOptions(compression=self._compression)
        streams = {name: _stream(rows, options) for name, rows in value.tables.items()}
        header = _header(value)
        header["tables"] = [[name, stream.size] for name, stream in streams.items()]
        header["seal"] = value.seal.hex()
        head = _ascii(header)
        parts = [_HEAD.pack(_MAGIC, len(head)), head]
        end = _HEAD.size + len(head)
        for stream in streams.values():
            parts += [bytes(-end % _ALIGNMENT), stream]
            end += -end % _ALIGNMENT + stream.size
        parts += [letter.sealed for letter in value.dead]
        return b"".join(parts)

    def decode(self, encoded: bytes) -> ChangeBatch:
        """Returns the batch.

        Raises:
          WireFormatError: not these bytes' format or version, cut short, or with a rest.
        """
        try:
            return _decode(encoded)
        except _NOT_OURS:
            # With no cause: the texts of these errors may quote what was in the bytes.
            raise WireFormatError from None

    def is_deterministic(self) -> bool:
        """False: Arrow does not promise equal bytes across its versions. Never a key."""
        return False

    def to_type_hint(self):
        return ChangeBatch


def _header(batch: ChangeBatch) -> dict:
    """All but tables, sealed bytes and seal; a place is `[lsn, seq]`."""
    header = {
        "link": batch.link,
        "lane": batch.lane.value,
        "begin": list(batch.begin),
        "end": list(batch.end),
        "captured": batch.captured,
        "commit_us_max": batch.commit_us_max,
        "watermark_us": batch.watermark_us,
        "read_us": batch.read_us,
        "holds": [[table, *place] for table, place in batch.holds],
        "sweeps": [[table, *place] for table, place in batch.sweeps],
        "manifest": [[m.table, m.window_start_us, m.count, m.digest.hex()] for m in batch.manifest],
        "escalations": [list(change) for change in batch.escalations],
        # As declared, but the length of the sealed bytes for themselves.
        "dead": [
            [*(getattr(letter, name) for name in _LETTER_FIELDS), len(letter.sealed)]
            for letter in batch.dead
        ],
    }
    if batch.codes:
        header["codes"] = [list(code) for code in batch.codes]
    if batch.ticket is not None:
        header["ticket"] = list(dataclasses.astuple(batch.ticket))
    return header


_LETTER_FIELDS = tuple(f.name for f in dataclasses.fields(DeadLetter) if f.name != "sealed")


def _decode(encoded: bytes) -> ChangeBatch:
    magic, size = _HEAD.unpack_from(encoded)
    if magic != _MAGIC:
        raise ValueError("magic")
    end = _HEAD.size + size
    header = json.loads(encoded[_HEAD.size : end])
    buffer = pa.py_buffer(encoded)
    tables = {}
    for name, length in header["tables"]:
        start = end + -end % _ALIGNMENT
        end = start + length
        if end > len(encoded):
            raise ValueError("length")
        with pa.ipc.open_stream(buffer.slice(start, length)) as stream:
            tables[name] = stream.read_next_batch()
        tables[name].validate()  # That the buffers are as long as they must be.
    dead = []
    for *fields, length in header.get("dead", ()):
        end += length
        known = dict(zip(_LETTER_FIELDS, fields, strict=False))
        dead.append(DeadLetter(**known, sealed=encoded[end - length : end]))
    if end != len(encoded):
        raise ValueError("length")
    return ChangeBatch(
        link=header["link"],
        lane=Lane(header["lane"]),
        begin=Position(*header["begin"]),
        end=Position(*header["end"]),
        captured=header["captured"],
        commit_us_max=header["commit_us_max"],
        watermark_us=header["watermark_us"],
        read_us=header["read_us"],
        tables=tables,
        dead=tuple(dead),
        holds=_places(header.get("holds", ())),
        sweeps=_places(header.get("sweeps", ())),
        manifest=tuple(
            ManifestEntry(table, start, count, bytes.fromhex(digest))
            for table, start, count, digest in header.get("manifest", ())
        ),
        escalations=tuple(tuple(change) for change in header.get("escalations", ())),
        codes=tuple(tuple(code) for code in header.get("codes", ())),
        seal=bytes.fromhex(header.get("seal", "")),
        ticket=ParkingTicket(*header["ticket"]) if "ticket" in header else None,
    )


def _places(items) -> tuple[tuple[str, Position], ...]:
    return tuple((table, Position(lsn, seq)) for table, lsn, seq in items)


def _ascii(header: dict) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("ascii")


def _stream(rows: pa.RecordBatch, options: pa.ipc.IpcWriteOptions) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=options) as stream:
        stream.write_batch(rows)
    return sink.getvalue()


def _seal_of(batch: ChangeBatch) -> bytes:
    digest = hashlib.sha256()
    header = _header(batch)
    header["tables"] = [
        [name, rows.num_rows, [[f.name, str(f.type), f.nullable] for f in rows.schema]]
        for name, rows in batch.tables.items()
    ]
    head = _ascii(header)
    digest.update(len(head).to_bytes(4, "little") + head)
    for rows in batch.tables.values():
        for column in rows.columns:
            _add_array(digest, column)
    for letter in batch.dead:
        digest.update(letter.sealed)
    return digest.digest()


def _add_array(digest, array: pa.Array) -> None:
    """Adds an array's content: nulls and their number, then values; no offset, no padding.

    Unambiguous, since the header says the types and the number of rows.
    """
    if pa.types.is_dictionary(array.type):
        digest.update(len(array.dictionary).to_bytes(4, "little"))
        _add_array(digest, array.indices)
        _add_array(digest, array.dictionary)
        return
    digest.update(array.null_count.to_bytes(4, "little"))
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    if not len(array):
        return
    start, stop = array.offset, array.offset + len(array)
    if pa.types.is_boolean(array.type):
        digest.update(np.packbits(array.fill_null(False).to_numpy(zero_copy_only=False)))
    elif pa.types.is_string(array.type):
        _, offsets, data = array.buffers()
        offsets = np.frombuffer(offsets, np.int32)[start : stop + 1]
        digest.update(offsets if offsets[0] == 0 else offsets - offsets[0])
        digest.update(memoryview(data or b"")[offsets[0] : offsets[-1]])
    else:
        width = array.type.bit_width // 8
        digest.update(memoryview(array.buffers()[1])[start * width : stop * width])


coders.registry.register_coder(ChangeBatch, ChangeBatchCoder)
