"""A mergeable sketch of lags: any quantile to 1 % of its value, in a kilobyte (DDSketch)."""

import dataclasses
import struct
from collections.abc import Iterable, Sequence

import numpy as np

RELATIVE_ACCURACY = 0.01
WINDOW_S = 10  # Lag is kept in windows of this length, aligned to 1970.
# Bucket 0 holds all up to 10 µs, also what a skewed clock makes negative; bucket i > 0 holds
# (10 µs * γ^(i-1), 10 µs * γ^i], whose middle 2γ^i / (γ + 1) is within 1 % of both ends.
# 30 days is bucket 1315; nothing caps the index.
_FLOOR_US = 10
_GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)
_LOG_GAMMA = float(np.log(_GAMMA))
_US_PER_MS = 1000

_FORMAT = 1
# Format, buckets, min, max; then the sum (16 bytes: 30 days by a billion rows pass 2^63 µs).
_HEAD = struct.Struct("<BIqq")
_SUM_BYTES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class LagSketch:
    """Weighted lags: exact count, smallest, largest and sum; quantiles to 1 % of their value.

    Immutable. After Masson, Rim and Lee, "DDSketch", VLDB 2019. Everything in it is an
    integer, so `merge` is exactly commutative and associative, and equal content is equal bytes.

    Attributes:
      buckets: indices, ascending (int64[n]); counts: rows in each, above zero (int64[n]).
      min_us, max_us: exact; 0 while it is empty. sum_us: exact, of any size.
    """

    buckets: np.ndarray
    counts: np.ndarray
    min_us: int = 0
    max_us: int = 0
    sum_us: int = 0

    @classmethod
    def of_us(cls, values_us: np.ndarray, weights: np.ndarray | None = None) -> "LagSketch":
        """Returns the sketch of lags in µs (int64[n]), each counted `weights` (int64[n]) times.

        Values of no weight are left out.

        Raises:
          ValueError: a weight is below zero, or the lengths differ.
        """
        values = np.asarray(values_us, np.int64)
        weights = np.ones(len(values), np.int64) if weights is None else weights
        weights = np.asarray(weights, np.int64)
        if values.shape != weights.shape or (len(weights) and weights.min() < 0):
            raise ValueError("weights must be as many as the values and none below 0")
        kept = weights > 0
        if not kept.all():
            values, weights = values[kept], weights[kept]
        if not len(values):
            return EMPTY
        floored = np.maximum(values, _FLOOR_US)
        indices = np.ceil(np.log(floored / _FLOOR_US) / _LOG_GAMMA).astype(np.int64)
        buckets, counts = _gather(indices, weights)
        return cls(buckets, counts, int(values.min()), int(values.max()), _dot(values, weights))

    @classmethod
    def of_ms(cls, values_ms: np.ndarray, weights: np.ndarray | None = None) -> "LagSketch":
        """Returns the sketch of lags in milliseconds (float64[n]), kept to the microsecond."""
        values = np.rint(np.asarray(values_ms, np.float64) * _US_PER_MS)
        return cls.of_us(values.astype(np.int64), weights)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def min_ms(self) -> float:
        return self.min_us / _US_PER_MS

    @property
    def max_ms(self) -> float:
        return self.max_us / _US_PER_MS

    @property
    def mean_ms(self) -> float:
        """The exact mean, 0 while it is empty."""
        return self.sum_us / self.count / _US_PER_MS if len(self.counts) else 0.0

    def merge(self, other: "LagSketch") -> "LagSketch":
        """Returns the sketch of both; the same bytes as one made of all their values."""
        return merge_all((self, other))

    def quantile(self, q: float) -> float:
        """Returns the lag in ms that a share `q` of the rows does not exceed; 0 if empty.

        Within 1 % of the value of rank floor(q * (count - 1)), lags above 10 µs; the ends
        (0 and 1) are exact.
        """
        return self.quantiles((q,))[0]

    def quantiles(self, qs: Sequence[float]) -> tuple[float, ...]:
        """Returns `quantile` of each of `qs`.

        Raises:
          ValueError: one is outside 0 .. 1.
        """
        if any(not 0 <= q <= 1 for q in qs):
            raise ValueError("a quantile is a share from 0 to 1")
        if not len(self.counts):
            return (0.0,) * len(qs)
        reached = np.cumsum(self.counts)
        ranks = [int(q * (int(reached[-1]) - 1)) for q in qs]
        middles = _middle_us(self.buckets[np.searchsorted(reached, ranks, side="right")])
        values = np.clip(middles, self.min_us, self.max_us) / _US_PER_MS
        exact = {0: self.min_ms, 1: self.max_ms}
        return tuple(exact.get(q, float(value)) for q, value in zip(qs, values, strict=True))

    def share_within(self, limit_ms: float) -> float:
        """Returns the share of rows with at most `limit_ms`, counted by bucket; 1 if empty."""
        if not len(self.counts) or self.max_ms <= limit_ms:
            return 1.0
        within = self.counts[_middle_us(self.buckets) <= limit_ms * _US_PER_MS].sum()
        return int(within) / self.count

    def to_bytes(self) -> bytes:
        """Returns the versioned bytes: equal for equal content, some two for each bucket."""
        head = _HEAD.pack(_FORMAT, len(self.buckets), self.min_us, self.max_us)
        steps = np.diff(self.buckets, prepend=0)
        body = _varints(np.stack([steps, self.counts], axis=1).ravel().tolist())
        return head + self.sum_us.to_bytes(_SUM_BYTES, "little", signed=True) + body

    @classmethod
    def from_bytes(cls, encoded: bytes) -> "LagSketch":
        """Returns the sketch of `to_bytes`.

        Raises:
          ValueError: the bytes are of another version or damaged.
        """
        start = _HEAD.size + _SUM_BYTES
        if len(encoded) < start or encoded[0] != _FORMAT:
            raise ValueError("not a lag sketch of this version")
        _, size, min_us, max_us = _HEAD.unpack_from(encoded)
        sum_us = int.from_bytes(encoded[_HEAD.size : start], "little", signed=True)
        pairs = np.array(_read_varints(encoded[start:]), np.int64)
        if len(pairs) != 2 * size:
            raise ValueError("a lag sketch is cut short")
        buckets, counts = np.cumsum(pairs[::2]), pairs[1::2].copy()
        if (counts < 1).any() or (np.diff(buckets) < 1).any():
            raise ValueError("a lag sketch is damaged")
        return cls(buckets, counts, min_us, max_us, sum_us)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LagSketch) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return self.sum_us


EMPTY = LagSketch(np.empty(0, np.int64), np.empty(0, np.int64))


def merge_all(sketches: Iterable[LagSketch]) -> LagSketch:
    """Returns the sketch of all values of `sketches`, in any order the same."""
    parts = [sketch for sketch in sketches if len(sketch.counts)]
    if len(parts) < 2:
        return parts[0] if parts else EMPTY
    buckets, counts = _gather(
        np.concatenate([part.buckets for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )
    return LagSketch(
        buckets,
        counts,
        min(part.min_us for part in parts),
        max(part.max_us for part in parts),
        sum(part.sum_us for part in parts),
    )


def _middle_us(buckets: np.ndarray) -> np.ndarray:
    return _FLOOR_US * 2 * np.exp(buckets * _LOG_GAMMA) / (_GAMMA + 1)


def _gather(indices: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct indices, ascending, and the sum of the weights of each."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return ordered[starts], np.add.reduceat(weights[order], starts)


def _dot(values: np.ndarray, weights: np.ndarray) -> int:
    """Returns the exact sum of products: in int64 where that holds it, else in Python."""
    bound = float(np.abs(values).astype(np.float64).max()) * float(weights.sum(dtype=np.float64))
    if bound < 2**62:
        return int(values @ weights)
    return sum(v * w for v, w in zip(values.tolist(), weights.tolist(), strict=True))


def _varints(numbers: list[int]) -> bytes:
    out = bytearray()
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


def _read_varints(encoded: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in encoded:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if number >= 1 << 63:
                raise ValueError("a lag sketch is damaged")
            numbers.append(number)
            number = shift = 0
    if shift:
        raise ValueError("a lag sketch is cut short")
    return numbers
