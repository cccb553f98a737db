"""What a reconciliation looks at, what it finds, and the report that it leaves behind."""

import dataclasses
import typing
from collections.abc import Iterable, Sequence

from apache_beam import coders

VERSION = 1
DIFFERING = ("missing", "extra", "different", "rotten")
EXCUSED = ("refused", "held", "edited", "moving")


class Unit(typing.NamedTuple):
    """One campus's rows of one canonical table, at its source and at every store.

    `since_us`: only rows that some store has changed since then; 0 for all.
    """

    campus: str
    table: str
    since_us: int


class Suspects(typing.NamedTuple):
    """Rows of one link that the first pass found unlike, or could not clear.

    Attributes:
      part: of several for one link and table.
      ids: their record ids; with `by_buckets` they were too many, and `buckets` have them.
      source_rows, store_rows: read by the first pass. source_digest, store_digest: of the sets.
    """

    campus: str
    table: str
    store: str
    part: int
    ids: Sequence[str]
    by_buckets: bool
    buckets: Sequence[int]
    source_rows: int
    store_rows: int
    source_digest: str
    store_digest: str


class LinkResult(typing.NamedTuple):
    """What the second pass made of a link's suspects.

    Attributes:
      missing, extra, different: rows that differed in two views of the source in a row, each held
        against a store that had passed it. rotten: the same content, and another stored digest.
      refused, held: a dead letter or a truncate that waits for a person accounts for them.
      edited: clients of the stores have edited the record. moving: changed while looked at.
      mended: rows that were delivered again and are equal since, tombstones among them.
      settled: whether the store's ledger had passed what was read; where not, nothing counts.
      keys: `kind:digest` of some record ids; the digest is keyed (`ReportKey.name_of`).
      why: what could not be read or mended, as class names; else empty.
    """

    campus: str
    table: str
    store: str
    part: int = 0
    source_rows: int = 0
    store_rows: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0
    rotten: int = 0
    refused: int = 0
    held: int = 0
    edited: int = 0
    moving: int = 0
    mended: int = 0
    settled: bool = True
    source_digest: str = ""
    store_digest: str = ""
    keys: Sequence[str] = ()
    why: str = ""

    @property
    def differing(self) -> int:
        return self.missing + self.extra + self.different + self.rotten

    @property
    def sound(self) -> bool:
        """Whether all that differed has been mended, and all could be seen."""
        return self.settled and not self.why and self.mended == self.differing


class PairResult(typing.NamedTuple):
    """Two stores' rows of one campus and table, but for those that its links judge.

    `edited_equal`: records that clients have edited. `tombstones_equal`: deletions since both
    have followed the log. `live_equal`: all live rows, only where no source can be read.
    """

    campus: str
    table: str
    store: str
    other: str
    live_equal: bool = True
    edited_equal: bool = True
    tombstones_equal: bool = True

    @property
    def equal(self) -> bool:
        return self.live_equal and self.edited_equal and self.tombstones_equal


@dataclasses.dataclass(frozen=True)
class Reconciliation:
    """The whole of one run.

    Attributes:
      began_us, ended_us: microseconds since 1970. since_us: 0 for everything.
      repair: whether what differed was to be mended. whole: every row was looked at by itself.
    """

    began_us: int
    ended_us: int
    since_us: int
    repair: bool
    links: tuple[LinkResult, ...]
    pairs: tuple[PairResult, ...]
    whole: bool = False

    @property
    def sound(self) -> bool:
        return (
            bool(self.links or self.pairs)
            and all(result.sound for result in self.links)
            and all(pair.equal for pair in self.pairs)
        )

    def to_dict(self) -> dict[str, typing.Any]:
        """Returns the report's content: counts and digests, nothing of a patient."""
        return {
            "version": VERSION,
            "sound": self.sound,
            "began_us": self.began_us,
            "ended_us": self.ended_us,
            "since_us": self.since_us,
            "repair": self.repair,
            "whole": self.whole,
            "links": [
                {**one._asdict(), "keys": list(one.keys), "sound": one.sound} for one in self.links
            ],
            "stores": [{**pair._asdict(), "equal": pair.equal} for pair in self.pairs],
        }


def joined(results: Iterable[LinkResult], keys_max: int) -> tuple[LinkResult, ...]:
    """Returns one result for each link and table: of several parts the sums."""
    found: dict[tuple, LinkResult] = {}
    for result in results:
        place = (result.campus, result.table, result.store)
        known = found.get(place)
        if known is None:
            found[place] = result
            continue
        sums = {
            name: getattr(known, name) + getattr(result, name)
            for name in ("source_rows", "store_rows", "mended", *DIFFERING, *EXCUSED)
        }
        found[place] = known._replace(
            **sums,
            settled=known.settled and result.settled,
            keys=[*known.keys, *result.keys][:keys_max],
            why=known.why or result.why,
        )
    return tuple(found[place] for place in sorted(found))


for _kind in (Unit, Suspects, LinkResult, PairResult):
    coders.registry.register_coder(_kind, coders.RowCoder)
