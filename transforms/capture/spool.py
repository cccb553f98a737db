"""Keep what was read ahead of its delivery: in memory first, then sealed on local disk."""

import collections
import dataclasses
import logging
import os
import pathlib
import tempfile
import typing
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from schemas.batches import ChangeBatch
from schemas.entities import TABLES
from schemas.positions import Position

_LOGGER = logging.getLogger(__name__)

_SEGMENT_BYTES = 64 << 20  # One file of the spool; deleted whole once its batches are applied.


@dataclasses.dataclass
class _Entry:
    begin: Position
    end: Position
    rows: int
    nbytes: int
    batch: ChangeBatch | None
    segment: "_Segment | None" = None
    offset: int = 0
    length: int = 0
    nonce: bytes = b""
    patients: np.ndarray | None = None


class _Segment:
    """An unlinked-on-drop file of ciphertext; its key exists only in this process's memory."""

    def __init__(self, directory: pathlib.Path):
        descriptor, name = tempfile.mkstemp(dir=directory, suffix=".spool")
        self._file = os.fdopen(descriptor, "w+b", buffering=0)
        # The name goes at once: a killed process leaves no file, only space that the kernel frees.
        os.unlink(name)
        self.size = 0
        self.entries = 0
        self.pins = 0

    def append(self, data: bytes) -> int:
        offset = self.size
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, self.size)
            self.size += written
            view = view[written:]
        self.entries += 1
        return offset

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        self._file.close()


class Spool:
    """A first-in first-out run of change batches that can be read again until acknowledged.

    Memory is bounded by `memory_bytes`, then `disk_bytes` of AES-256-GCM ciphertext in
    unlinked files follow. A disk that takes no more (full, broken) makes it full: reading waits,
    and nothing is lost. Everything in it is still in the source's log (a slot moves only
    to the ledger), so it is dropped, not recovered, when the process dies.

    Not thread-safe: the caller holds one lock around it.

    Args:
      encode, decode: the wire form of a batch (`schemas.wire`).
      directory: where segments go; by default the system's temporary directory.
      random_bytes: source of key and nonces, `os.urandom` in production.
    """

    def __init__(
        self,
        memory_bytes: int,
        disk_bytes: int,
        encode: typing.Callable[[ChangeBatch], bytes],
        decode: typing.Callable[[bytes], ChangeBatch],
        directory: str | None = None,
        random_bytes: typing.Callable[[int], bytes] = os.urandom,
    ):
        self._memory_max = memory_bytes
        self._disk_max = disk_bytes
        self._encode = encode
        self._decode = decode
        self._directory = pathlib.Path(directory or tempfile.gettempdir())
        self._random_bytes = random_bytes
        self._cipher = AESGCM(random_bytes(32))
        self._entries: collections.deque[_Entry] = collections.deque()
        self._cursor = 0
        self._segment: _Segment | None = None
        self.pending_rows = 0
        self.memory_bytes = 0
        self.disk_bytes = 0
        self._disk_refuses = False

    @property
    def full(self) -> bool:
        """Whether the reader must stop until something is acknowledged."""
        # Disk is used only once memory was full, which hardly ever is so to the byte.
        return self._disk_refuses or self.disk_bytes >= self._disk_max

    @property
    def pending(self) -> int:
        """Batches not handed out since the last rewind."""
        return len(self._entries) - self._cursor

    @property
    def held_rows(self) -> int:
        """Rows read ahead of the ledger."""
        return sum(entry.rows for entry in self._entries)

    def append(self, batch: ChangeBatch) -> None:
        """Adds a batch; it goes to disk when memory is full or older batches are there already."""
        entry = _Entry(batch.begin, batch.end, batch.rows, batch.nbytes, batch)
        behind_disk = bool(self._entries) and self._entries[-1].batch is None
        if behind_disk or self.memory_bytes + entry.nbytes > self._memory_max:
            self._try_to_spill(entry)
        if entry.segment is None:
            self.memory_bytes += entry.nbytes
        self._entries.append(entry)
        self.pending_rows += entry.rows

    def peek(self) -> tuple[Position, int, int] | None:
        """Returns (end, rows, bytes) of the next batch to hand out, or None."""
        if self._cursor >= len(self._entries):
            return None
        entry = self._entries[self._cursor]
        return entry.end, entry.rows, entry.nbytes

    def take(self) -> ChangeBatch:
        """Hands out the next batch; it stays here until acknowledged."""
        entry = self._entries[self._cursor]
        self._cursor += 1
        self.pending_rows -= entry.rows
        return self._load(entry)

    def acknowledge(self, position: Position) -> int:
        """Drops every batch that ends at or before `position`; returns the rows dropped."""
        rows = 0
        while self._entries and self._entries[0].end <= position:
            entry = self._entries.popleft()
            if self._cursor:
                self._cursor -= 1
            else:
                self.pending_rows -= entry.rows
            rows += entry.rows
            self._release(entry)
        if self._disk_refuses and self.memory_bytes <= self._memory_max / 2:
            self._disk_refuses = False  # Tried again, once memory is full again.
        return rows

    def rewind(self) -> None:
        """Starts handing out again from the oldest batch that was not acknowledged."""
        self._cursor = 0
        self.pending_rows = sum(entry.rows for entry in self._entries)

    def pin(self) -> list[_Entry]:
        """Returns what is spooled, to be read without the lock until it is given to `unpin`."""
        pinned = list(self._entries)
        for entry in pinned:
            if entry.segment is not None:
                entry.segment.pins += 1
        return pinned

    def unpin(self, pinned: list[_Entry]) -> None:
        """Ends a `pin`: what was acknowledged meanwhile goes."""
        for entry in pinned:
            if entry.segment is not None:
                entry.segment.pins -= 1
                if entry.segment is not self._segment:
                    self._retire(entry.segment)

    def rows_of(self, pinned: list[_Entry], patients: set[str]) -> dict[str, list[pa.RecordBatch]]:
        """Returns the pinned rows of these patients, by table, in log order.

        Needs no lock: it may have to read gigabytes, for which nobody should wait.
        """
        wanted = pa.array(sorted(patients), pa.utf8())
        hashes = _hash_patients(wanted)
        found: dict[str, list[pa.RecordBatch]] = {}
        for entry in pinned:
            if entry.patients is not None and not np.isin(hashes, entry.patients).any():
                continue
            for name, rows in self._load(entry).tables.items():
                mask = pc.is_in(rows[TABLES[name].patient], value_set=wanted)
                if pc.any(mask).as_py():
                    found.setdefault(name, []).append(rows.filter(mask))
        return found

    def close(self) -> None:
        """Drops everything."""
        for entry in self._entries:
            self._release(entry)
        self._entries.clear()
        self._cursor = 0
        self.pending_rows = 0
        if self._segment:
            self._segment.close()
            self._segment = None

    def _try_to_spill(self, entry: _Entry) -> None:
        """Puts a batch on disk, or leaves it in memory where the disk does not take it."""
        try:
            self._spill(entry)
        except OSError as error:
            if not self._disk_refuses:
                _LOGGER.warning(
                    "spool in %s: %s; reading waits until the store has taken what is in memory. "
                    "Remedy: make room there, or set TMPDIR to a larger disk.",
                    self._directory,
                    os.strerror(error.errno or 0),
                )
            self._disk_refuses = True

    def _spill(self, entry: _Entry) -> None:
        if self._segment is None or self._segment.size >= _SEGMENT_BYTES:
            self._retire(self._segment)
            self._segment = _Segment(self._directory)
        entry.nonce = self._random_bytes(12)
        sealed = self._cipher.encrypt(entry.nonce, self._encode(entry.batch), None)
        entry.offset, entry.length = self._segment.append(sealed), len(sealed)
        entry.patients = _patients_of(entry.batch)
        entry.segment, entry.batch = self._segment, None
        self.disk_bytes += entry.length

    def _load(self, entry: _Entry) -> ChangeBatch:
        if entry.batch is not None:
            return entry.batch
        sealed = entry.segment.read(entry.offset, entry.length)
        return self._decode(self._cipher.decrypt(entry.nonce, sealed, None))

    def _release(self, entry: _Entry) -> None:
        if entry.segment is None:
            self.memory_bytes -= entry.nbytes
            return
        self.disk_bytes -= entry.length
        entry.segment.entries -= 1
        if entry.segment is not self._segment:
            self._retire(entry.segment)

    @staticmethod
    def _retire(segment: _Segment | None) -> None:
        if segment is not None and segment.entries == 0 and segment.pins == 0:
            segment.close()


def _patients_of(batch: ChangeBatch) -> np.ndarray:
    """Returns the distinct hashes of the batch's patients: what tells a scan to skip it."""
    hashes = [_hash_patients(rows[TABLES[name].patient]) for name, rows in batch.tables.items()]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.int64)


def _hash_patients(patients: pa.Array) -> np.ndarray:
    """Returns one integer a distinct patient; equal patients, equal integers."""
    distinct = patients.unique().drop_null().to_pylist()
    # Distinct patients of one batch are few; a checksum is enough, since a hit is looked at.
    return np.fromiter((zlib.crc32(text.encode()) for text in distinct), np.int64, len(distinct))
