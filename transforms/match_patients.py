"""Match patients: which records, at whatever campus, are one person's.

Pure: the same records and decisions give the same persons and pairs, in whatever order they came.
Three outcomes for a pair: a link, a pair for a person to decide, or nothing. A link needs a valid
and equal id_no and a name that is alike, with birth date and sex not contradicting; nothing is
ever linked by a name, and records of newborns, of unidentified and of test patients never.
"""

import collections.abc
import dataclasses
import enum
import hashlib
import re
import unicodedata

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.patient_matching import FIELDS, MatchingRules
from transforms.citizen_id import read_citizen_ids
from transforms.row_sets import hash_ids

_NO_DAY = np.iinfo(np.int64).min
_NOISE = r"[\s\p{Z}\p{Cf}\x{FE00}-\x{FE0F}\x{E0100}-\x{E01EF}·•・‧∙⋅.．'’\-]+"
_ID, _SURNAME_BIRTH, _PHONE_SURNAME, _PHONE_BIRTH, _PHONE = range(1, 6)
BLOCK_KEYS = 5  # Places of a record's keys: as above; the last finds who else has the phone.
LOST = 0xFFFF  # Stands for a lost character.
_NAME_CHARACTERS = 32  # Of a name that are compared one by one.

INPUT_SCHEMA = pa.schema(
    [
        pa.field("campus", pa.utf8()),
        pa.field("patient_id", pa.utf8()),
        pa.field("name", pa.utf8()),
        pa.field("sex", pa.utf8()),
        pa.field("birth_date", pa.date32()),
        pa.field("id_no", pa.utf8()),
        pa.field("phone", pa.utf8()),
        pa.field("address", pa.utf8()),
    ]
)


class Excluded(enum.IntEnum):
    """Why a record is never matched; the name is kept with it."""

    NONE = 0
    NEWBORN = 1
    UNIDENTIFIED = 2
    TEST = 3
    NAMELESS = 4


class Evidence(enum.IntEnum):
    """What a field says of a pair; never its value."""

    MISSING = 0
    EQUAL = 1
    SIMILAR = 2
    DIFFERENT = 3
    EXCLUDED = 4  # Invalid, a placeholder, or shared by too many.


class Outcome(enum.IntEnum):
    NEW = 0
    REVIEW = 1
    LINK = 2


@dataclasses.dataclass(frozen=True)
class Features:
    """Records as they are compared, ordered by (campus, patient_id); arrays are one a record.

    Attributes:
      keys: blocking keys, uint64[n, BLOCK_KEYS], 0 for none.
      names: code points of the folded names' beginnings, uint32[n, width], 0 behind the end.
      name: hash of the folded name. birth: days since 1970, from the id_no where the record has
        none. sex: 0 unknown, 1, 2, likewise. id_no, phone, address: hashes, 0 for none.
      id_unusable: there is an id_no, but it is no evidence. phone_unusable: likewise.
      id_common: too many records have the same id_no. phone_common: likewise.
    """

    campus: pa.Array
    patient_id: pa.Array
    excluded: np.ndarray
    keys: np.ndarray
    names: np.ndarray
    name: np.ndarray
    birth: np.ndarray
    sex: np.ndarray
    id_no: np.ndarray
    phone: np.ndarray
    address: np.ndarray
    id_unusable: np.ndarray
    phone_unusable: np.ndarray
    id_common: np.ndarray
    phone_common: np.ndarray

    def __len__(self) -> int:
        return len(self.campus)

    def __repr__(self) -> str:
        return f"Features({len(self)} records)"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Judged pairs of record numbers, `left < right`.

    Attributes:
      score: the weights of what agrees, together. evidence: int8[n, 6], `Evidence` by FIELDS.
      outcome: `Outcome`.
    """

    left: np.ndarray
    right: np.ndarray
    outcome: np.ndarray
    score: np.ndarray
    evidence: np.ndarray

    def where(self, mask: np.ndarray) -> "Pairs":
        """Returns the pairs in the mask."""
        return Pairs(*(getattr(self, field.name)[mask] for field in dataclasses.fields(self)))


def features_of(rules: MatchingRules, batch: pa.RecordBatch) -> Features:
    """Returns records (`INPUT_SCHEMA`, one a campus and patient_id) as they are compared."""
    order = pc.sort_indices(batch, [("campus", "ascending"), ("patient_id", "ascending")])
    batch = batch.take(order)
    content = rules.content
    names = _folded(rules, batch.column("name"))
    ids = read_citizen_ids(pc.utf8_normalize(batch.column("id_no"), "NFKC"))
    texts = _texts(ids.texts)
    placeholder = _matches(texts, content.excluded.id_numbers)
    usable = ids.valid & ~placeholder
    phones = _phones(batch.column("phone"))
    has_phone = _true(pc.greater(pc.binary_length(phones), 0))
    odd_phone = has_phone & _matches(phones, content.excluded.phones)
    birth, sex = _birth(rules, batch.column("birth_date")), _sex(batch.column("sex"))
    birth = np.where((birth == _NO_DAY) & usable, ids.birth_days, birth)
    sex = np.where((sex == 0) & usable, np.where(ids.male, 1, 2), sex)
    points = _points(names, content.lost_characters)
    phone = np.where(has_phone & ~odd_phone, hash_ids(phones), np.uint64(0))
    id_no = np.where(usable, hash_ids(texts), np.uint64(0))
    excluded = _excluded(rules, batch.column("name"), points)
    address = pc.fill_null(_folded(rules, batch.column("address")), "")
    has_address = _true(pc.greater(pc.binary_length(address), 0))
    return Features(
        campus=batch.column("campus"),
        patient_id=batch.column("patient_id"),
        excluded=excluded,
        keys=_keys(excluded, points, birth, phone, id_no),
        names=points,
        name=hash_ids(names),
        birth=birth,
        sex=sex,
        id_no=id_no,
        phone=phone,
        address=np.where(has_address, hash_ids(address), np.uint64(0)),
        id_unusable=ids.present & ~usable,
        phone_unusable=odd_phone,
        id_common=np.zeros(len(batch), np.bool_),
        phone_common=np.zeros(len(batch), np.bool_),
    )


def common_keys(rules: MatchingRules, features: Features) -> np.ndarray:
    """Returns the keys that more records have than are compared by one."""
    keys, counts = np.unique(features.keys[features.keys != 0], return_counts=True)
    return keys[counts > rules.content.block_records]


def without_common(features: Features, common: np.ndarray) -> Features:
    """Returns the records without keys that are too common; such id_nos and phones say nothing."""
    out = np.isin(features.keys, common)
    return dataclasses.replace(
        features,
        keys=np.where(out, np.uint64(0), features.keys),
        id_common=out[:, 0],
        phone_common=out[:, BLOCK_KEYS - 1],
    )


def candidates(features: Features, near: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns pairs that share a key, each once, ordered, `left < right`.

    The last key of a record is not for pairs.

    Args:
      near: bool[n]; only pairs with one of these. None: all.
    """
    count = max(len(features), 1)
    codes = [np.empty(0, np.int64)]
    for place in range(BLOCK_KEYS - 1):
        keys = features.keys[:, place]
        rows = np.flatnonzero(keys)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        starts = np.flatnonzero(np.diff(keys[rows], prepend=np.uint64(0)))
        sizes = np.diff(starts, append=len(rows))
        # The i-th record of a block meets the i before it.
        meets = np.arange(len(rows)) - np.repeat(starts, sizes)
        right = np.repeat(np.arange(len(rows)), meets)
        left = right - 1 - (np.arange(len(right)) - np.repeat(np.cumsum(meets) - meets, meets))
        a, b = rows[left], rows[right]  # Stable sort: rows of a block ascend, so a < b.
        if near is not None:
            chosen = near[a] | near[b]
            a, b = a[chosen], b[chosen]
        codes.append(a * count + b)
    unique = np.unique(np.concatenate(codes))
    return unique // count, unique % count


def judge(rules: MatchingRules, features: Features, left: np.ndarray, right: np.ndarray) -> Pairs:
    """Judges pairs of records that went through `without_common`.

    Whose phone or id_no is shared is counted among all of `features`: of every record in a pair
    that has the same, all that have it must be there.
    """
    shared, f = rules.content.shared, features
    evidence = np.zeros((len(left), len(FIELDS)), np.int8)
    likeness = np.zeros((len(left), len(FIELDS)))

    def compare(field: str, values: np.ndarray, none, out: np.ndarray | None = None) -> None:
        a, b = values[left], values[right]
        known, same = (a != none) & (b != none), a == b
        found = np.where(same, Evidence.EQUAL, Evidence.DIFFERENT)
        found = np.where(known, found, Evidence.MISSING)
        if out is not None:
            found = np.where(out[left] | out[right], Evidence.EXCLUDED, found)
        place = FIELDS.index(field)
        evidence[:, place] = found
        likeness[:, place] = found == Evidence.EQUAL

    compare("id_no", f.id_no, 0, f.id_unusable)
    compare("birth_date", f.birth, _NO_DAY)
    compare("phone", f.phone, 0, f.phone_unusable)
    compare("sex", f.sex, 0)
    compare("address", f.address, 0)
    # What is shared says nothing where it is equal; where it differs, it differs.
    for field, values, common, names in (
        ("id_no", f.id_no, f.id_common, shared.id_names),
        ("phone", f.phone, f.phone_common, shared.phone_names),
    ):
        place = FIELDS.index(field)
        nothing = (common | _shared(f, values, names))[left]
        nothing &= evidence[:, place] == Evidence.EQUAL
        evidence[nothing, place], likeness[nothing, place] = Evidence.EXCLUDED, 0
    place = FIELDS.index("name")
    alike = _likeness(f.names, left, right)
    alike[(alike == 1) & (f.name[left] != f.name[right])] = 0.8  # Unlike behind what is compared.
    likeness[:, place] = alike
    evidence[:, place] = np.select(
        [alike == 1, alike >= 0.5], [Evidence.EQUAL, Evidence.SIMILAR], Evidence.DIFFERENT
    )
    return _decided(rules, f, left, right, evidence, likeness)


def _decided(rules, f: Features, left, right, evidence, likeness) -> Pairs:
    content = rules.content
    weights = np.array([getattr(content.weights, field) for field in FIELDS])
    score = likeness @ weights
    known = (evidence != Evidence.MISSING) & (evidence != Evidence.EXCLUDED)
    told = known @ weights
    share = np.divide(score, told, out=np.zeros(len(score)), where=told > 0)
    equal = evidence == Evidence.EQUAL
    of = {field: i for i, field in enumerate(FIELDS)}
    same_id = equal[:, of["id_no"]]
    unlike = (evidence[:, [of["birth_date"], of["sex"]]] == Evidence.DIFFERENT).any(axis=1)
    link = same_id & ~unlike & (likeness[:, of["name"]] >= content.automatic.name_likeness)
    link &= score >= content.thresholds.link - 1e-9
    strong = equal[:, [of["id_no"], of["birth_date"], of["phone"]]].sum(axis=1)
    strong += likeness[:, of["name"]] >= content.automatic.name_likeness
    review = (strong >= content.review.agreeing) & (told >= content.review.evidence - 1e-9)
    review &= share >= content.thresholds.review - 1e-9
    review |= same_id
    outcome = np.where(link, Outcome.LINK, np.where(review, Outcome.REVIEW, Outcome.NEW))
    outcome[(f.excluded[left] != 0) | (f.excluded[right] != 0)] = Outcome.NEW
    return Pairs(left, right, outcome.astype(np.int8), score, evidence)


def group(
    count: int,
    left: np.ndarray,
    right: np.ndarray,
    rank: np.ndarray,
    apart: collections.abc.Collection[tuple[int, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each record's group, named by its smallest record, and which links were held back.

    Links join records, in order of (rank, left, right), unless that would put a pair of `apart`
    into one group: such a link is held for a person. Groups are sets without direction, so no
    order of links makes a circle of them.

    Args:
      left, right: links as record numbers, `left < right`. rank: the lower, the earlier.
      apart: pairs, `(smaller, larger)`, that a person has set apart.
    """
    held = np.zeros(len(left), np.bool_)
    whole = _components(count, left.astype(np.int64), right.astype(np.int64))
    odd = {int(whole[a]) for a, b in apart if whole[a] == whole[b]}
    if not odd:
        return whole, held
    groups = whole.copy()
    inside = np.isin(whole, np.array(sorted(odd)))
    groups[inside] = np.flatnonzero(inside)
    apart_of: dict[int, set[int]] = {}
    for a, b in apart:
        apart_of.setdefault(a, set()).add(b)
        apart_of.setdefault(b, set()).add(a)
    members = {int(i): {int(i)} for i in np.flatnonzero(inside)}
    own = {i: i for i in members}
    links = np.flatnonzero(inside[left])
    for link in links[np.lexsort((right[links], left[links], rank[links]))].tolist():
        a, b = own[int(left[link])], own[int(right[link])]
        if a == b:
            continue
        if any(not apart_of.get(i, set()).isdisjoint(members[b]) for i in members[a]):
            held[link] = True
            continue
        low, high = min(a, b), max(a, b)
        members[low] |= members.pop(high)
        for i in members[low]:
            own[i] = low
    for i, name in own.items():
        groups[i] = name
    return groups, held


def person_id(campus: str, patient_id: str) -> str:
    """Returns the id of the person that this record is the smallest of: a pseudonym."""
    name = f"{len(campus)}:{campus}{patient_id}"
    return "P" + hashlib.sha256(name.encode()).hexdigest()[:20]


@dataclasses.dataclass(frozen=True)
class Matched:
    """All records' persons at once, as `match` finds them.

    `person` is the number of each person's smallest record; `skipped` keys were too common.
    """

    features: Features
    person: np.ndarray
    pairs: Pairs
    skipped: int


def match(
    rules: MatchingRules,
    batch: pa.RecordBatch,
    linked: collections.abc.Collection[tuple] = (),
    apart: collections.abc.Collection[tuple] = (),
) -> Matched:
    """Returns the persons of a whole population.

    Args:
      batch: `INPUT_SCHEMA`.
      linked, apart: pairs of (campus, patient_id) that people decided.
    """
    features = features_of(rules, batch)
    common = common_keys(rules, features)
    features = without_common(features, common)
    left, right = candidates(features)
    pairs = judge(rules, features, left, right)
    number = number_of(features)
    pairs_apart = [_ordered(number[a], number[b]) for a, b in apart if a in number and b in number]
    decided = [_ordered(number[a], number[b]) for a, b in linked if a in number and b in number]
    keep = (pairs.outcome == Outcome.LINK) & ~_among(pairs, pairs_apart, len(features))
    lefts = np.array([a for a, _ in decided], np.int64)
    rights = np.array([b for _, b in decided], np.int64)
    person, _ = group(
        len(features),
        np.concatenate([lefts, pairs.left[keep]]),
        np.concatenate([rights, pairs.right[keep]]),
        np.concatenate([np.zeros(len(lefts)), 2 - pairs.score[keep]]),
        pairs_apart,
    )
    return Matched(features, person, pairs, len(common))


def number_of(features: Features) -> dict[tuple[str, str], int]:
    """Returns the number of each (campus, patient_id)."""
    keys = zip(features.campus.to_pylist(), features.patient_id.to_pylist(), strict=True)
    return {key: i for i, key in enumerate(keys)}


def _ordered(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def _among(pairs: Pairs, wanted: collections.abc.Collection[tuple[int, int]], count: int):
    codes = np.array([a * count + b for a, b in wanted], np.int64)
    return np.isin(pairs.left * count + pairs.right, codes)


# What a record becomes before it is compared.


def _folded(rules: MatchingRules, names: pa.Array) -> pa.Array:
    """Names without width, blanks, middle dots and case, and with one form of each variant."""
    texts = pc.utf8_normalize(pc.fill_null(names, ""), "NFKC")
    texts = pc.utf8_lower(pc.replace_substring_regex(texts, _NOISE, ""))
    encoded = texts.dictionary_encode()
    table = str.maketrans(rules.variants)
    folded = [text.translate(table) for text in encoded.dictionary.to_pylist()]
    return pa.array(folded, pa.utf8()).take(encoded.indices)


def _points(names: pa.Array, lost: tuple[str, ...]) -> np.ndarray:
    """uint32[n, width]: the first characters; lost ones are `LOST`."""
    encoded = names.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    folded_lost = {unicodedata.normalize("NFKC", character) for character in lost}
    width = min(max((len(text) for text in texts), default=0), _NAME_CHARACTERS)
    points = np.zeros((len(texts) + 1, max(width, 1)), np.uint32)
    for i, text in enumerate(texts):
        codes = np.frombuffer(text[:width].encode("utf-32-le", "replace"), np.uint32)
        points[i, : len(codes)] = codes
    for character in folded_lost:
        points[points == ord(character)] = LOST
    return points[encoded.indices.to_numpy(zero_copy_only=False)]


def _excluded(rules: MatchingRules, names: pa.Array, points: np.ndarray) -> np.ndarray:
    lists = rules.content.excluded
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(names, "")))
    found = np.zeros(len(names), np.int8)
    found[points[:, 0] == 0] = Excluded.NAMELESS
    for kind, patterns in (
        (Excluded.TEST, lists.test),
        (Excluded.UNIDENTIFIED, lists.unidentified),
        (Excluded.NEWBORN, lists.newborn),
    ):
        found[_matches(plain, patterns)] = kind
    return found


def _matches(texts: pa.Array, patterns: collections.abc.Iterable[str]) -> np.ndarray:
    """bool[n]: one of the patterns is found; Python's, as RE2 has no back-references."""
    compiled = [re.compile(pattern) for pattern in patterns]
    encoded = pc.fill_null(texts, "").dictionary_encode()
    found = [
        bool(text) and any(pattern.search(text) for pattern in compiled)
        for text in encoded.dictionary.to_pylist()
    ]
    return np.array(found, np.bool_)[encoded.indices.to_numpy(zero_copy_only=False)]


def _texts(characters: np.ndarray) -> pa.Array:
    """utf8[n] of fixed-width ASCII, empty where it is zeros."""
    there = characters[:, 0] != 0
    offsets = np.zeros(len(characters) + 1, np.int32)
    np.cumsum(there * characters.shape[1], out=offsets[1:])
    data = np.ascontiguousarray(characters[there])
    return pa.Array.from_buffers(
        pa.utf8(), len(characters), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _phones(phones: pa.Array) -> pa.Array:
    """Digits only, without the country's code; what has few digits stays and is a placeholder."""
    texts = pc.utf8_normalize(pc.fill_null(phones, ""), "NFKC")
    texts = pc.replace_substring_regex(texts, r"[^0-9]+", "")
    return pc.replace_substring_regex(texts, r"^(?:00)?86(1[0-9]{10})$", r"\1")


def _birth(rules: MatchingRules, dates: pa.Array) -> np.ndarray:
    days = pc.cast(dates, pa.int32())
    known = _true(days.is_valid())
    days = pc.fill_null(days, 0).to_numpy().astype(np.int64)
    known &= ~np.isin(days, np.array(sorted(rules.birth_days), np.int64))
    return np.where(known, days, _NO_DAY)


def _sex(codes: pa.Array) -> np.ndarray:
    return np.where(_true(pc.equal(codes, "1")), 1, np.where(_true(pc.equal(codes, "2")), 2, 0))


def _keys(excluded, points, birth, phone, id_no) -> np.ndarray:
    keys = np.zeros((len(birth), BLOCK_KEYS), np.uint64)
    surname = points[:, 0].astype(np.uint64)
    has_birth, has_phone = birth != _NO_DAY, phone != 0
    days = birth.astype(np.uint64)
    named = (surname != 0) & (surname != LOST)
    keys[:, 0] = np.where(id_no != 0, _mixed(_ID, id_no), 0)
    keys[:, 1] = np.where(has_birth & named, _mixed(_SURNAME_BIRTH, surname, days), 0)
    keys[:, 2] = np.where(has_phone & named, _mixed(_PHONE_SURNAME, phone, surname), 0)
    keys[:, 3] = np.where(has_phone & has_birth, _mixed(_PHONE_BIRTH, phone, days), 0)
    keys[:, 4] = np.where(has_phone, _mixed(_PHONE, phone), 0)
    keys[excluded != 0] = 0
    return keys


def _mixed(kind: int, *parts: np.ndarray) -> np.ndarray:
    """uint64[n] of several numbers; never 0."""
    mixed = np.full(len(parts[0]), kind, np.uint64)
    for part in parts:
        mixed = (mixed ^ part) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return np.maximum(mixed, np.uint64(1))


def _shared(f: Features, values: np.ndarray, names_max: int) -> np.ndarray:
    """bool[n]: the record's value stands with more than `names_max` different names."""
    rows = np.flatnonzero((values != 0) & (f.excluded == 0))
    order = rows[np.lexsort((f.name[rows], values[rows]))]
    value, name = values[order], f.name[order]
    starts = np.flatnonzero(np.diff(value, prepend=np.uint64(0)))
    first = np.ones(len(order), np.int64)
    first[1:] = (value[1:] != value[:-1]) | (name[1:] != name[:-1])
    names = np.add.reduceat(first, starts) if len(starts) else first
    return np.isin(values, value[starts[names > names_max]]) & (values != 0)


def _true(mask: pa.Array) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False).copy()


# The kernels.


@numba.njit(nogil=True, cache=True)
def _components(count, left, right):
    """Groups of connected records, each named by its smallest."""
    parent = np.arange(count)
    for i in range(len(left)):
        a, b = left[i], right[i]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for i in range(count):  # A parent is smaller than its child, so its own is final by now.
        parent[i] = parent[parent[i]]
    return parent


@numba.njit(nogil=True, cache=True)
def _likeness(names, left, right):
    """Of names: 1 equal, 0.9 but for lost characters, else 1 - edits / length, at most 0.8."""
    width = names.shape[1]
    out = np.zeros(len(left))
    before, now = np.zeros(width + 1, np.int64), np.zeros(width + 1, np.int64)
    for k in range(len(left)):
        a, b = names[left[k]], names[right[k]]
        m = n = 0
        while m < width and a[m] != 0:
            m += 1
        while n < width and b[n] != 0:
            n += 1
        if m == 0 or n == 0:
            continue
        if m == n:
            same = lost = 0
            for i in range(m):
                if a[i] == LOST or b[i] == LOST:
                    lost += 1
                elif a[i] == b[i]:
                    same += 1
            if same == m:
                out[k] = 1.0
                continue
            if same + lost == m and same > 0:
                out[k] = 0.9
                continue
        for j in range(n + 1):
            before[j] = j
        for i in range(1, m + 1):
            now[0] = i
            for j in range(1, n + 1):
                cost = 0 if a[i - 1] == b[j - 1] else 1
                now[j] = min(before[j] + 1, now[j - 1] + 1, before[j - 1] + cost)
            before, now = now, before
        out[k] = min(0.8, 1 - before[n] / max(m, n))
    return out
