"""Sums over sets: equal for equal sets in any order, and what differs is read off."""

import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.set_sums import Sketch, Sums, hash_id, hash_ids

IDS = st.text(max_size=15)
SETS = st.dictionaries(IDS, st.integers(0, 3), max_size=40)


def parts(rows: dict[str, int]) -> tuple[np.ndarray, pa.Array]:
    texts = [f"{key}\0{value}".encode() for key, value in rows.items()]
    digests = b"".join(hashlib.sha256(text).digest() for text in texts)
    return np.frombuffer(digests, "<u8").reshape(-1, 4), pa.array(list(rows), pa.utf8())


def sketch_of(rows: dict[str, int]) -> Sketch:
    sketch = Sketch()
    sketch.add(*parts(rows))
    return sketch


@settings(max_examples=60)
@given(SETS, SETS)
def test_a_sketch_names_exactly_the_rows_that_differ(mine, theirs):
    unlike = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
    assert sketch_of(mine).difference(sketch_of(theirs)) == sorted(unlike)


@settings(max_examples=60)
@given(SETS, SETS, st.randoms())
def test_sums_are_equal_as_sets_are_in_any_order(mine, theirs, chance):
    def sums_of(rows):
        order = list(rows)
        chance.shuffle(order)
        words, ids = parts({key: rows[key] for key in order})
        sums = Sums()
        sums.add(hash_ids(ids), words)
        return sums

    one, two = sums_of(mine), sums_of(theirs)
    assert one.count == len(mine)
    assert (len(one.unequal(two)) == 0) == (mine == theirs)


def test_one_row_of_a_hundred_thousand_and_too_many():
    words = np.random.default_rng(5).integers(0, 1 << 63, (100_000, 4), np.uint64)
    ids = pa.array([f"record-{i}" for i in range(100_000)])
    whole = Sketch()
    whole.add(words, ids)
    for kept, named in ((99_999, ["record-99999"]), (92_000, 8_000), (50_000, None)):
        part = Sketch()
        part.add(words[:kept], ids[:kept])
        found = whole.difference(part)
        assert (len(found) if isinstance(named, int) else found) == named


def test_an_id_that_is_too_long_is_not_told_wrongly():
    assert sketch_of({"x" * 65: 1}).difference(Sketch()) is None
    assert sketch_of({"x" * 64: 1}).difference(Sketch()) == ["x" * 64]


def test_a_hash_is_that_of_the_text_wherever_it_stands():
    ids = pa.array(["a", "", "王"])
    assert hash_ids(ids).tolist() == [hash_id("a"), hash_id(""), hash_id("王")]
    assert hash_ids(ids.slice(2)).tolist() == [hash_id("王")]
