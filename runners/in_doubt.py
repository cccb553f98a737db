"""The verb for sets that were written to several stores at once and are not finished."""

import argparse
import json

from rich.console import Console
from rich.table import Table

from pipelines.in_doubt import InDoubtLook, look, recover_all
from schemas.config import Config, load
from transforms.two_phase.decision_log import Logged
from transforms.two_phase.recover import Recovered


def in_doubt(options: argparse.Namespace) -> int:
    """Lists or recovers; never prints what a set holds. Exit 1 where something is left to do."""
    config = load(options.config)
    if options.action == "recover":
        return _recover(config, options)
    return _list(look(config), options)


def _list(found: InDoubtLook, options: argparse.Namespace) -> int:
    strange = [{"branch": name, "transaction": str(one)} for name, one in found.strange]
    if options.json:
        unfinished = [
            _plain(one) | {"prepared_at": [n for n, ids in found.prepared.items() if one.id in ids]}
            for one in found.unfinished
        ]
        plain = {"unfinished": unfinished, "not_in_the_log": strange, "down": found.down}
        print(json.dumps(plain, indent=2))
        return 1 if found.attention else 0
    console = Console(highlight=False, markup=False)
    if found.unfinished:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("transaction", "state", "age s", "branches", "reason"):
            table.add_column(name, overflow="fold")
        for one in found.unfinished:
            branches = ", ".join(f"{name} {state}" for name, state in sorted(one.branches.items()))
            table.add_row(str(one.id), one.state, f"{one.age_s:.0f}", branches, one.reason)
        console.print(table)
    for one in strange:
        console.print(f"{one['branch']}: {one['transaction']} is prepared and not in the log")
    for why in found.down.values():
        console.print(why)
    incomplete = sum("missing" in one.branches.values() for one in found.unfinished)
    console.print(f"{len(found.unfinished)} unfinished, {incomplete} incomplete at a branch")
    return 1 if found.attention else 0


def _recover(config: Config, options: argparse.Namespace) -> int:
    found = recover_all(config, options.presume_abort)
    plain = _done(found)
    if options.json:
        unfinished = [_plain(one) for one in found.unfinished]
        print(json.dumps(plain | {"unfinished": unfinished, "down": found.down}, indent=2))
    else:
        for name, items in plain.items():
            for item in items:
                print(f"{item['branch']}: {item['transaction']} {name.replace('_', ' ')}")
        for why in found.down.values():
            print(why)
        print("nothing is left in doubt" if found.clean else f"{len(found.unfinished)} unfinished")
        if found.held:
            print(
                "Held: the log has gone back (a restored backup, a failover), so it cannot tell. "
                "Look whether another store has the set; if none has, run this again with "
                "--presume-abort."
            )
    return 0 if found.clean else 1


def _done(found: Recovered) -> dict[str, list[dict[str, str]]]:
    return {
        name: [{"branch": branch, "transaction": str(one)} for branch, one in getattr(found, name)]
        for name in ("committed", "rolled_back", "completed", "left", "held")
    }


def _plain(one: Logged) -> dict[str, object]:
    return {
        "transaction": str(one.id),
        "state": str(one.state),
        "begun_at": one.begun_at.isoformat(),
        "age_s": round(one.age_s, 1),
        "late": one.late,
        "incomplete_at": sorted(n for n, state in one.branches.items() if state == "missing"),
        "branches": one.branches,
        "reason": one.reason,
    }
