"""The verbs that look back: report and compare."""

import argparse
import datetime
import pathlib

from rich.console import Console
from rich.table import Table

from pipelines.compare import compare as compare_contents
from pipelines.sla_report import Observer
from runners.report_html import page
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.reports import Comparison, Report, comparison_to_json, to_csv, to_json


def report(options: argparse.Namespace) -> int:
    """Writes the SLA report as a page, JSON and CSV; exit 1 if the data are not sound."""
    with Console(stderr=True).status("gathering"):
        made = make_report(load(options.config), compare=not options.no_compare)
    write_report(made, options.dir)
    if options.json:
        print(to_json(made))
    else:
        print_summary(made, Console())
        print(f"report: {options.dir / 'report.html'}")
    return 0 if made.sound else 1


def compare(options: argparse.Namespace) -> int:
    """Compares the contents of sources and stores; exit 1 if something differs."""
    with Console(stderr=True).status("comparing sources and stores row by row"):
        found = compare_contents(load(options.config), options.show_keys)
    if options.json:
        print(comparison_to_json(found))
    else:
        _print_comparison(found, Console())
    return 0 if found.equal else 1


def make_report(config: Config, compare: bool) -> Report:
    """Returns the report of now, with the contents compared if asked."""
    comparison = compare_contents(config) if compare else None
    with Observer(config) as observer:
        return observer.report(wall_clock_us(), comparison=comparison)


def write_report(made: Report, folder: pathlib.Path) -> None:
    """Writes report.html, report.json and one CSV a table into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(made, _local_zone()), encoding="utf-8")
    (folder / "report.json").write_text(to_json(made), encoding="utf-8")
    for name, text in to_csv(made).items():
        (folder / name).write_text(text, encoding="utf-8")


def summary(made: Report) -> dict:
    """Returns the verdict in a few values, for machines."""
    return {
        "sound": made.sound,
        "law_holds": made.law_holds,
        "complete": made.complete,
        "stores_equal": made.stores_equal,
        "objectives_met": made.objectives_met,
        "counts": made.total._asdict(),
        "lag_ms": {
            f"{part.link} {part.lane}": {"p50": part.p50_ms, "p99": part.p99_ms, "rows": part.rows}
            for part in made.lag
        },
    }


def print_summary(made: Report, console: Console) -> None:
    """Prints the verdict, the law and the lag of every link."""
    counts = made.total
    lag = Table("link", "lane", "rows", "p50 ms", "p99 ms", "max ms", title="commit to visible")
    for part in sorted(made.lag, key=lambda part: (part.lane, part.link)):
        numbers = (f"{value:,.0f}" for value in (part.p50_ms, part.p99_ms, part.max_ms))
        lag.add_row(part.link, str(part.lane), f"{part.rows:,}", *numbers)
    console.print(lag)
    console.print(
        f"captured {counts.captured:,} = delivered {counts.delivered:,}"
        f" + duplicates {counts.duplicates:,} + superseded {counts.superseded:,}"
        f" + held {counts.held:,} + dead letters {counts.dead:,}"
    )
    console.print(_verdict("the law of conservation holds", made.law_holds))
    console.print(_verdict("every manifest is complete", made.complete))
    if made.stores_equal is not None:
        console.print(_verdict("sources and stores are equal, row by row", made.stores_equal))
    console.print(_verdict("the objectives are met", made.objectives_met))


def _print_comparison(found: Comparison, console: Console) -> None:
    table = Table("link", "table", "source rows", "store rows", "equal")
    for match in found.tables:
        link = f"{match.campus}>{match.store}"
        rows = (f"{match.source_rows:,}", f"{match.store_rows:,}")
        table.add_row(link, match.table, *rows, "yes" if match.equal else "no")
    console.print(table)
    console.print(_verdict("sources and stores are equal, row by row", found.equal))


def _local_zone() -> datetime.tzinfo:
    return datetime.datetime.now().astimezone().tzinfo


def _verdict(text: str, holds: bool | None) -> str:
    if holds is None:
        return f"[yellow]?[/]    {text}: not to be told of logs with whole seconds"
    return f"[green]yes[/]  {text}" if holds else f"[red]no[/]   {text}"
