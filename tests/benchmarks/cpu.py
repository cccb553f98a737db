"""Tell which processes spend the machine's time: CPU seconds by role, read from /proc."""

import collections
import os
import pathlib

_TICK = os.sysconf("SC_CLK_TCK")
_ROLES = (
    ("walsender", "source: walsender"),
    ("logical replication apply", "store: native apply"),
    ("checkpointer", "other PostgreSQL"),
    ("writer", "other PostgreSQL"),
    (" consult ", "store: backends"),
    ("postgres:", "other PostgreSQL"),
    ("java", "JVM"),
    ("runners.workers", "worker"),
    ("apache_beam.runners.worker", "worker"),
)


def cpu_by_role() -> dict[str, float]:
    """Returns the CPU seconds (user and system) spent so far by living processes, by role."""
    spent: dict[str, float] = collections.defaultdict(float)
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It ended meanwhile.
        role = next((role for words, role in _ROLES if words in command), "the rest")
        spent[role] += (int(fields[11]) + int(fields[12])) / _TICK
    return spent


def spent_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns what each role spent between two readings, in seconds."""
    return {role: after[role] - before.get(role, 0.0) for role in sorted(after)}
