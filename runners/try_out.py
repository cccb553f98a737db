"""The verbs that try the system out: an embedded world and traffic for it."""

import argparse
import json

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from runners.embedded import world as embedded
from runners.embedded.traffic import Traffic
from schemas.config import load


def world(options: argparse.Namespace) -> int:
    """Starts, stops or shows the embedded campuses."""
    console = Console(stderr=True)
    if options.action == "up":
        with console.status("starting three campuses and the platform's store"):
            embedded.up(options.dir, campuses=options.campuses)
        console.print(f"up; configuration in {options.dir / 'campuses.yaml'}")
    elif options.action == "down":
        with console.status("stopping"):
            embedded.down(options.dir)
        console.print("down; the data stay in the directory")
    state = embedded.status(options.dir)
    if options.json:
        print(json.dumps(state, indent=2))
    elif options.action != "down":
        table = Table("server", "running", "port", "pid", "MB")
        for name, server in state.items():
            size = server["size_bytes"]
            table.add_row(
                name,
                "yes" if server["running"] else "no",
                str(server["port"] or ""),
                str(server["pid"] or ""),
                f"{size / 1e6:.0f}" if size is not None else "",
            )
        Console().print(table)
    return 0


def traffic(options: argparse.Namespace) -> int:
    """Writes traffic into the sources until the time is over."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("traffic"), BarColumn(), MofNCompleteColumn())
    with Traffic(load(options.config), options.seed) as source:
        if options.preload:
            with console.status(f"preloading {options.preload} patients"):
                source.preload(options.preload)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("rows", total=int(options.rate * options.seconds))
            done = source.run(
                options.rate,
                options.seconds,
                progress=lambda rows: progress.update(task, completed=rows),
            )
    print(f"{done.rows} row changes in {done.transactions} transactions")
    return 0
