"""Record keys that a seed gives, not a clock: the same run writes the same rows."""

from runners.embedded.campus import Campus

PER_SEED = 10**10  # Ids that one seed has.


class Ids:
    """Numbers that are the seed's own, ascending: record keys owe nothing to a clock.

    Args:
      seed: 0 .. 999,999; seeds share no id.
      campus: lends its digest to the UUIDs.
      used: ids of this seed that exist already.

    Raises:
      ValueError: the seed is out of range.
    """

    def __init__(self, seed: int, campus: Campus, used: int = 0):
        if not 0 <= seed < 10**6:
            raise ValueError(f"seed {seed} is not in 0 .. 999999")
        self.first = (seed + 1) * PER_SEED
        self._next = self.first + used
        digest = f"{campus.digest:016x}"
        self._prefix = f"{digest[:8]}-{digest[8:12]}-8{digest[12:15]}"

    def take(self, count: int = 1) -> int:
        """Returns the first of `count` new ids."""
        first = self._next
        self._next += count
        return first

    def uuid(self, number: int) -> str:
        """Returns an id as a UUID (version 8); UUIDs ascend with the ids."""
        low = f"{(2 << 62) | number:016x}"
        return f"{self._prefix}-{low[:4]}-{low[4:]}"

    def number(self, key: str) -> int:
        """Returns the id within a key as the database shows it: a number, its text, or a UUID."""
        if key.count("-") == 4:
            return int(key[19:].replace("-", ""), 16) & ((1 << 62) - 1)
        return int(key.lstrip("VTR"))
