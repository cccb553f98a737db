"""What a dialect says, as the capture of its database would have it."""

import collections

from runners.embedded.dialect import RowChange
from schemas.batches import Op, RawChanges
from schemas.positions import SEQ_END, Position
from tests.raw_changes import COMMIT_US, raw_batch

_OPS = {"insert": Op.INSERT, "update": Op.UPDATE}


def text(value: object) -> str | None:
    """Returns a value as a database prints it."""
    if isinstance(value, bool):
        return "t" if value else "f"
    return None if value is None else str(value)


def raw_changes(
    schema: str, transactions: list[list[RowChange]], first_lsn: int, before: Position
) -> RawChanges:
    """Returns transactions as one stretch of a log; a key change is two rows at two places."""
    rows = collections.defaultdict(list)
    keys: dict[str, tuple[str, ...]] = {}
    lsn = first_lsn - 1
    for changes in transactions:
        lsn += 1
        seq = 0
        for change in changes:
            seq += 1
            name = f"{schema}.{change.table}"
            keys[name] = change.key
            place = {"_lsn": lsn, "_seq": seq}
            old, new = change.before, change.after
            moved = old and new and any(old[c] != new[c] for c in change.key)
            if new is None or moved:
                gone = {c: text(v) for c, v in old.items()}
                rows[name].append(gone | place | {"_op": Op.DELETE})
            if moved:
                seq += 1
                place = {"_lsn": lsn, "_seq": seq}
                place |= {f"_old.{c}": text(old[c]) for c in change.key}
            if new is not None:
                said = {c: text(v) for c, v in new.items()}
                rows[name].append(said | place | {"_op": _OPS[change.op]})
    columns = {name: [c for c in some[0] if c[0] != "_"] for name, some in rows.items()}
    tables = {name: raw_batch(columns[name], some, keys[name]) for name, some in rows.items()}
    count = sum(map(len, rows.values()))
    return RawChanges(before, Position(lsn, SEQ_END), count, COMMIT_US, tables)
