"""What is written to several stores all or none: sets of canonical rows, by words of people."""

from schemas.conflict_policy import EDITED_AT_STORES
from schemas.entities import TABLES

_JOINED = {"lab_report": ("lab_report", "lab_result")}  # A report and its items.
_MEMBERS = frozenset(name for names in _JOINED.values() for name in names)

# Word to tables. Rows that clients edit converge by their versions (ADR 0019), and are none.
SETS: dict[str, tuple[str, ...]] = _JOINED | {
    name: (name,) for name in TABLES if name not in _MEMBERS and name not in EDITED_AT_STORES
}


def fault_of(word: str) -> tuple[str, str] | None:
    """Returns what is wrong with a word and the remedy, None where it names a set."""
    if word in SETS:
        return None
    for name, tables in SETS.items():
        if word in tables:
            return f"`{word}` is a part of the set `{name}`", f"write `{name}`."
    if word in EDITED_AT_STORES:
        return (
            f"rows of {word} are edited at the stores and converge by their versions",
            "remove it: `conflict_rules` settle what is edited at two of them.",
        )
    return f"no set `{word}`", f"one of {', '.join(sorted(SETS))}."
