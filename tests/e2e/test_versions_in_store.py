"""Version vectors in PostgreSQL: the same text, the same comparison, over whole sets of rows."""

import random

import psycopg
import pytest

from schemas.versions import COVERS_SQL, canonical_json, covers, from_text, to_text

ACTORS = ["b", "east.1", "east.2", "primary.1", "院.1", "@main"]


@pytest.fixture
def pairs():
    """Seeded pairs of vectors, a third of them in order."""
    rng = random.Random(17)

    def vector():
        beyond_bigint = 1 << 90
        return {
            actor: rng.choice([1, 2, 3, 10, 9, beyond_bigint, beyond_bigint + 1])
            for actor in rng.sample(ACTORS, rng.randint(0, 4))
        }

    found = [(vector(), vector()) for _ in range(2000)]
    return found + [
        (a, {k: v for k, v in a.items() if rng.random() < 0.7}) for a, _ in found[:1000]
    ]


def test_the_store_compares_as_the_rules_do(database, pairs):
    compare = COVERS_SQL.format(above="p.above", below="p.below")
    with psycopg.connect(database) as conn:
        conn.execute("CREATE TEMP TABLE p (n int, above jsonb, below jsonb)")
        with conn.cursor().copy("COPY p FROM STDIN") as copy:
            for n, (above, below) in enumerate(pairs):
                copy.write_row((n, to_text(above), to_text(below)))
        rows = conn.execute(f"SELECT {compare}, above::text FROM p ORDER BY n").fetchall()
    assert [row[0] for row in rows] == [covers(above, below) for above, below in pairs]
    assert [row[1] for row in rows] == [to_text(above) for above, _ in pairs]
    assert [from_text(row[1]) for row in rows] == [above for above, _ in pairs]
    assert 500 < sum(row[0] for row in rows) < 2500


def test_any_json_of_ours_is_as_jsonb_prints_it(database):
    value = {"bb": [{"zz": None, "a": True, "é": '\t"\\ 诊\u007f'}], "a": {}, "会诊": -3, "z": []}
    with psycopg.connect(database) as conn:
        text = canonical_json(value)
        assert conn.execute("SELECT %s::jsonb::text", [text]).fetchone() == (text,)
