"""Join what two stores hold of one record: nothing that nobody has replaced is ever dropped."""

from schemas.siblings import Entries, Record
from schemas.versions import VersionVector, covers, includes, join


def join_records(one: Record, other: Record) -> Record:
    """Returns the record that has seen all that both have; `one` itself if that is `one`.

    Associative, commutative and idempotent, so stores agree in any order of arrival, whatever is
    repeated, and a record that comes back to where it was adds nothing (no echo). An entry goes
    only if the other side has seen it and holds it no longer: then a later edit replaced it.
    Where one side has seen all of the other it is the result, without looking at the entries:
    the same test in SQL (`schemas.versions.COVERS_SQL`) serves whole sets of rows.
    """
    if covers(one.seen, other.seen):
        return one
    if covers(other.seen, one.seen):
        return other
    groups = {**one.live, **other.live}
    live = {
        group: _join_entries(one.entries(group), one.seen, other.entries(group), other.seen)
        for group in groups
    }
    return Record(join(one.seen, other.seen), live)


def _join_entries(
    one: Entries, seen_by_one: VersionVector, other: Entries, seen_by_other: VersionVector
) -> Entries:
    kept = {dot: e for dot, e in one.items() if dot in other or not includes(seen_by_other, dot)}
    for dot, entry in other.items():
        if dot not in one and not includes(seen_by_one, dot):
            kept[dot] = entry
    return kept
