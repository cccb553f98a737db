"""Do one thing to a store in two ways and hold against each other all that it then holds."""

import itertools
import json
from collections.abc import Callable, Sequence

from tests.edited_stores import EditedStore
from tests.odd_edits import EDITED

# All that a store holds of edits, but in which order and when it did what.
HELD = (
    "SELECT to_jsonb(r) - 'change' - 'taken_from' FROM sync.record r",
    "SELECT to_jsonb(v) - 'met_at' FROM sync.version v",
    "SELECT to_jsonb(c) - 'opened_at' || jsonb_build_object('closed_at', closed_at IS NULL)"
    " FROM sync.conflict c",
    "SELECT link, kind, detail, state, closed_at IS NULL AS open FROM sync.incident",
    "SELECT to_jsonb(e) FROM sync.edit e",
    "SELECT to_jsonb(s) FROM sync.store s",
    "SELECT count(DISTINCT change), max(change) FROM sync.record",
    "SELECT last_value FROM sync.hlc",
    *(f"SELECT to_jsonb(t) FROM consult.{name} t" for name in EDITED),
)


def state(store: EditedStore, queries: Sequence[str] = HELD) -> list[tuple[int, str]]:
    """Returns every row as text, with the number of its query."""
    parts = (
        f"SELECT {i}, to_jsonb(q)::text FROM ({query}) AS q" for i, query in enumerate(queries)
    )
    return sorted(store.own.execute(" UNION ALL ".join(parts)).fetchall())


def same(one: list[tuple[int, str]], other: list[tuple[int, str]]) -> None:
    apart = [pair for pair in itertools.zip_longest(one, other) if pair[0] != pair[1]]
    assert not apart, [_difference(*pair) for pair in apart[:3]]


def _difference(*pair: tuple[int, str] | None) -> object:
    """Of two rows the values that differ."""
    if None in pair or pair[0][0] != pair[1][0]:
        return pair
    rows = [json.loads(text) for _, text in pair]
    rows = [next(iter(row.values())) if len(row) == 1 else row for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        return pair
    return {name: (value, rows[1].get(name)) for name, value in rows[0].items()
            if value != rows[1].get(name)}  # fmt: skip


def both_ways(store: EditedStore, one: Callable[[], object], other: Callable[[], object]) -> None:
    """Does one thing in two ways; the store holds the same after each, and keeps the second."""
    clock = store.own.execute("SELECT last_value, is_called FROM sync.hlc").fetchone()
    with store.own.transaction(force_rollback=True):
        one()
        held = state(store)
    store.own.execute("SELECT setval('sync.hlc', %s, %s)", clock)  # Sequences roll nothing back.
    other()
    same(held, state(store))
