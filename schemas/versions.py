"""Version vectors and dots: which edits of a record a store or a version has seen (ADR 0017).

A dot names one edit of one record: the actor that took it and that actor's count of them. A
vector says for each actor up to which count edits are seen; it has one entry an actor. Because
a store always passes on a record's whole state, what is seen has no holes and a vector holds it.
"""

import collections.abc
import enum
import json
import typing

from schemas.errors import WireFormatError
from schemas.positions import SEQ_END, Position

VersionVector = collections.abc.Mapping[str, int]  # Actor to count; never changed in place.
EMPTY: VersionVector = {}
SOURCE_MARK = "@"  # Begins the actor of a hospital's own system; no store's name may.

_SEQ_BITS = SEQ_END.bit_length()

# True where `{above}` has seen all that `{below}` has: both are jsonb, as `to_text` writes.
# numeric: a source's counts are beyond bigint. Equal vectors, the usual case, cost no loop.
COVERS_SQL = (
    "({above} = {below} OR NOT EXISTS (SELECT FROM jsonb_each({below}) AS entry"
    " WHERE coalesce(({above} -> entry.key)::numeric, 0) < entry.value::numeric))"
)


class Dot(typing.NamedTuple):
    """One edit of one record: the `counter`-th that `actor` took."""

    actor: str
    counter: int

    @property
    def of_source(self) -> bool:
        """Whether a hospital's own system wrote it, not a client of a consult store."""
        return self.actor.startswith(SOURCE_MARK)


class Order(enum.StrEnum):
    """How one vector stands to another."""

    BEFORE = "before"
    AFTER = "after"
    EQUAL = "equal"
    CONCURRENT = "concurrent"


def includes(vector: VersionVector, dot: Dot) -> bool:
    """Whether the edit is seen."""
    return vector.get(dot.actor, 0) >= dot.counter


def covers(above: VersionVector, below: VersionVector) -> bool:
    """Whether `above` has seen all that `below` has."""
    return above is below or all(above.get(actor, 0) >= n for actor, n in below.items())


def compare(one: VersionVector, other: VersionVector) -> Order:
    """Returns how `one` stands to `other`: before it if all that it has seen is in `other`."""
    if covers(one, other):
        return Order.EQUAL if covers(other, one) else Order.AFTER
    return Order.BEFORE if covers(other, one) else Order.CONCURRENT


def join(one: VersionVector, other: VersionVector) -> VersionVector:
    """Returns what both together have seen: associative, commutative, idempotent."""
    joined = dict(one)
    for actor, n in other.items():
        if joined.get(actor, 0) < n:
            joined[actor] = n
    return joined


def next_dot(vector: VersionVector, actor: str) -> Dot:
    """Returns the actor's next edit of a record of which it has seen `vector`."""
    return Dot(actor, vector.get(actor, 0) + 1)


def with_dot(vector: VersionVector, dot: Dot) -> VersionVector:
    """Returns `vector` after the edit."""
    return {**vector, dot.actor: max(dot.counter, vector.get(dot.actor, 0))}


def store_actor(store: str, incarnation: str) -> str:
    """Returns the actor of a store's edits while it is one incarnation (ADR 0017)."""
    return f"{store}.{incarnation}"


def source_dot(campus: str, position: Position) -> Dot:
    """Returns the edit that a source's row version is: its place in the log is its count."""
    return Dot(SOURCE_MARK + campus, position.lsn << _SEQ_BITS | position.seq)


def to_text(vector: VersionVector) -> str:
    """Returns the canonical text, which is jsonb's own: `{"east.1": 3, "primary.1": 12}`.

    Equal vectors have equal texts, here and as `version_vector::text` in a store.
    """
    return canonical_json({actor: n for actor, n in vector.items() if n > 0})


def from_text(text: str) -> VersionVector:
    """Returns the vector of a canonical text, or of any JSON that says the same.

    Raises:
      WireFormatError: it is no vector.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise WireFormatError from None
    return checked_vector(found)


def checked_vector(found: object) -> VersionVector:
    """Returns decoded JSON as a vector.

    Raises:
      WireFormatError: it is none.
    """
    if not isinstance(found, dict) or not all(type(n) is int and n > 0 for n in found.values()):
        raise WireFormatError
    return found


def canonical_json(value: object) -> str:
    """Returns JSON as jsonb prints it: keys by length in bytes, then bytewise, at every depth."""
    return json.dumps(_in_order(value), ensure_ascii=False, separators=(", ", ": "))


def _in_order(value: object) -> object:
    if isinstance(value, collections.abc.Mapping):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return {key: _in_order(value[key]) for key in keys}
    if isinstance(value, list | tuple):
        return [_in_order(item) for item in value]
    return value
