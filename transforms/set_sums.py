"""Sums of fixed size over sets of rows: equal sets have equal sums, and unequal ones tell apart.

Two kinds. `Sums` adds digests by ranges of the ids' hashes: what differs lies in the ranges that
do. `Sketch` is an invertible Bloom lookup table (Goodrich and Mitzenmacher, 2011): the difference
of two sketches spells out the very rows that only one of the sets has, as long as they are not
too many.
"""

import numba as nb
import numpy as np
import pyarrow as pa

# A difference is looked for among the rows of unequal buckets only: memory is this many sums
# (40 bytes each) a table, whatever its size.
BUCKETS = 1 << 12
_THIRD = 1 << 12  # Cells of a sketch for each of an element's three places: 120 bytes each.
_ID_WORDS = 8
_ID_BYTES = 8 * _ID_WORDS  # A longer id cannot be told from its sum.
_LENGTH = 4  # Words of a cell: the digest's four, the id's length, the id.
_ID = 5
_WORDS = _ID + _ID_WORDS


class Sums:
    """A set of rows by buckets of its ids: counts and sums of digests, independent of order."""

    def __init__(self):
        self.rows = np.zeros(BUCKETS, np.int64)
        self.words = np.zeros((BUCKETS, 4), np.uint64)

    def add(self, hashes: np.ndarray, words: np.ndarray) -> None:
        """Adds rows: hashes of ids (uint64[n]) and words of digests (uint64[n, 4])."""
        _add(self.rows, self.words, hashes, np.ascontiguousarray(words))

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    @property
    def digest(self) -> bytes:
        """The digest of the whole set, as `transforms.checksum.digest_set` has it."""
        return self.words.sum(axis=0, dtype=np.uint64).astype("<u8").tobytes()

    def unequal(self, other: "Sums") -> np.ndarray:
        """Returns the buckets in which two sets differ (int64[n])."""
        same = (self.rows == other.rows) & (self.words == other.words).all(axis=1)
        return np.flatnonzero(~same)


class Sketch:
    """A set of rows, in 1.4 MiB whatever its size; about 9,000 differing rows can be read off."""

    def __init__(self):
        self._counts = np.zeros(3 * _THIRD, np.int64)
        self._cells = np.zeros((3 * _THIRD, _WORDS), np.uint64)

    def add(self, words: np.ndarray, ids: pa.Array) -> None:
        """Adds rows: words of digests (uint64[n, 4]) and record ids (utf8)."""
        offsets, data = _texts(ids)
        _sketch(self._counts, self._cells, np.ascontiguousarray(words), offsets, data)

    def difference(self, other: "Sketch") -> list[str] | None:
        """Returns the ids of the rows that only one of the sets has, in order; None: too many.

        Also None where an id among them has more than 64 bytes, or a row stands twice in a set.
        """
        counts = self._counts - other._counts
        cells = self._cells - other._cells
        found: set[str] = set()
        left = len(
            counts
        )  # To be taken out; a sum that only looks like a row could go on for ever.
        alone = np.flatnonzero(np.abs(counts) == 1).tolist()
        while alone and left:
            place = alone.pop()
            sign = int(counts[place])
            if sign not in (1, -1):
                continue
            cell = cells[place].copy() if sign == 1 else np.uint64(0) - cells[place]
            places = [_THIRD * k + int(cell[k]) % _THIRD for k in range(3)]
            record_id = _id_of(cell)
            if place not in places or record_id is None:
                continue  # Several rows of both sets whose counts cancel.
            found.add(record_id)
            left -= 1
            for other_place in places:
                counts[other_place] -= sign
                cells[other_place] -= cell if sign == 1 else np.uint64(0) - cell
                if counts[other_place] in (1, -1):
                    alone.append(other_place)
        return None if counts.any() or cells.any() else sorted(found)


def hash_ids(ids: pa.Array) -> np.ndarray:
    """Returns a 64-bit hash of every text (uint64[n]): the same everywhere, not secret."""
    return _hash(*_texts(ids))


def hash_id(record_id: str) -> int:
    """Returns `hash_ids` of one id."""
    return int(hash_ids(pa.array([record_id]))[0])


def _texts(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.frombuffer(texts.buffers()[1] or bytes(4), np.int32)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    data = texts.buffers()[2]
    return offsets, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)


def _id_of(cell: np.ndarray) -> str | None:
    length = int(cell[_LENGTH])
    if length > _ID_BYTES:
        return None
    text = cell[_ID:].astype("<u8").tobytes()
    if any(text[length:]):
        return None
    try:
        return text[:length].decode()
    except UnicodeDecodeError:
        return None


@nb.njit(nogil=True, cache=True)
def _hash(offsets, data):
    """FNV-1a with MurmurHash3's finish, so that low bits (the buckets) are mixed."""
    out = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(out)):
        h = np.uint64(0xCBF29CE484222325)
        for k in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        out[i] = h ^ (h >> np.uint64(33))
    return out


@nb.njit(nogil=True, cache=True)
def _add(rows, sums, hashes, words):
    mask = np.uint64(len(rows) - 1)
    for i in range(len(hashes)):
        bucket = np.int64(hashes[i] & mask)
        rows[bucket] += 1
        for k in range(4):
            sums[bucket, k] += words[i, k]


@nb.njit(nogil=True, cache=True)
def _sketch(counts, cells, words, offsets, data):
    """Adds every row to three cells, which its digest names; a long id as its first bytes."""
    third = np.uint64(len(counts) // 3)
    element = np.zeros(cells.shape[1], np.uint64)
    for i in range(len(words)):
        for k in range(4):
            element[k] = words[i, k]
        length = offsets[i + 1] - offsets[i]
        element[_LENGTH] = np.uint64(length)
        for w in range(_ID_WORDS):
            value = np.uint64(0)
            for b in range(8):
                if 8 * w + b < length:
                    value |= np.uint64(data[offsets[i] + 8 * w + b]) << np.uint64(8 * b)
            element[_ID + w] = value
        for k in range(3):
            place = np.int64(element[k] % third) + np.int64(third) * k
            counts[place] += 1
            for w in range(len(element)):
                cells[place, w] += element[w]
