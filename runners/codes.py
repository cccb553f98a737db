"""The verb for codes that no dictionary knows: the queue of a person who completes mappings."""

import argparse
import json

from rich.console import Console
from rich.table import Table

from schemas.config import PRIMARY, load
from transforms import postgresql_sessions

_LIST = """\
SELECT campus, code_list, code, src_table, column_name, seen, last_at
FROM sync.unknown_code ORDER BY campus, code_list, seen DESC, code"""
_NAMES = ("campus", "code_list", "code", "table", "column", "seen", "last")


def codes(options: argparse.Namespace) -> int:
    """Prints the unknown codes of every campus; exit 1 if there are any."""
    config = load(options.config)
    with postgresql_sessions.connect(config.stores[PRIMARY].dsn) as connection:
        rows = connection.execute(_LIST).fetchall()
    if options.json:
        plain = [dict(zip(_NAMES, (*row[:-1], row[-1].isoformat()), strict=True)) for row in rows]
        print(json.dumps(plain, indent=2, ensure_ascii=False))
        return 1 if rows else 0
    if not rows:
        print("every code that came is in its dictionary")
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _NAMES[:-1]:
        table.add_column(name, justify="right" if name == "seen" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row[:-1]))
    Console().print(table)
    print("Add each to its code list in the campus's mapping, then start the sync job again.")
    return 1
