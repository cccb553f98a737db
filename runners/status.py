"""The live view of every link, for a terminal."""

import argparse
import collections
import json
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.sla_report import LinkView, Observer, View
from runners.words import (
    count,
    log_warnings,
    milliseconds,
    percent,
    reconciliation,
    size,
    span,
)
from schemas.batches import Lane
from schemas.clocks import wall_clock_us
from schemas.config import load
from schemas.reports import SCHEMA_DRIFT, LaneLag, Risk, Snapshot, State, as_plain

_EVERY_S = 1.0
_RULES = 3  # As many as a line holds.
_STYLES = {State.UP: "green", State.BEHIND: "yellow", State.GAP: "magenta", State.DOWN: "red"}


def status(options: argparse.Namespace) -> int:
    """Shows every link until stopped, or once; exit 1 if one is not up.

    `options` has `config`, `once` and `json`.
    """
    config = load(options.config)
    console = Console()
    with Observer(config) as observer:
        view = observer.view(wall_clock_us())
        if options.json:
            print(json.dumps(as_plain(view), ensure_ascii=False, indent=1))
        elif options.once or not console.is_terminal:
            console.print(render(view))
        else:
            _watch(observer, view, console)
    return 0 if all(link.health.state is State.UP for link in view.links) else 1


def _watch(observer: Observer, view: View, console: Console) -> None:
    with Live(render(view), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(_EVERY_S)
            before, view = view, observer.view(wall_clock_us())
            live.update(render(view, before), refresh=True)


def render(view: View, before: View | None = None) -> Group:
    """Returns one row a link, and what needs a person below.

    Args:
      before: an earlier view, from which rows a second are counted; without it they are
        those of the last minute's lag windows.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("link", no_wrap=True)
    table.add_column("state")
    for heading in (
        "emergency 急诊\np50",
        "\np99",
        "routine 平诊\np50",
        "\np99",
        "behind\nsource",
        "\nbacklog",
        "rows\n/s",
        "dead\nletters",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    earlier = {link.health.link: link for link in before.links} if before else {}
    for link in view.links:
        health = link.health
        lags = [cell for lane in Lane for cell in _lag_cells(link.lag.get(lane))]
        rate = rows_per_s(view, link, before, earlier.get(health.link))
        table.add_row(
            health.link,
            Text(health.state, _STYLES[health.state]),
            *lags,
            _or_dash(health.watermark_lag_ms, milliseconds),
            _or_dash(health.backlog_bytes, size),
            _or_dash(rate, count),
            Text(count(link.dead_letters), "red" if link.dead_letters else ""),
        )
    return Group(table, *_notes(view))


def rows_per_s(
    view: View, link: LinkView, before: View | None = None, earlier: LinkView | None = None
) -> float | None:
    """Returns rows delivered a second: between two views, else over the last minute."""
    if before is None or earlier is None or view.at_us <= before.at_us:
        return sum(lag.rows for lag in link.lag.values()) / 60 if link.lag else None
    now, then = (
        sum(ledger.counts.delivered for ledger in part.ledgers.values()) for part in (link, earlier)
    )
    return max(0, now - then) / ((view.at_us - before.at_us) / 1e6)


def _lag_cells(lag: LaneLag | None) -> tuple[str, str]:
    if lag is None or not lag.rows:
        return "–", "–"
    return milliseconds(lag.p50_ms), milliseconds(lag.p99_ms)


def _or_dash(value, words) -> str:
    return "–" if value is None else words(value)


def _notes(view: View):
    for end in view.unreachable:
        yield Text(f"{end} cannot be reached", "red")
    for link in view.links:
        if link.health.why and link.health.state is not State.DOWN:
            yield Text(f"{link.health.link}: {link.health.why}", _STYLES[link.health.state])
    for why in dict.fromkeys(
        link.health.why for link in view.links if link.health.state is State.DOWN
    ):
        links = [link.health.link for link in view.links if link.health.why == why]
        yield Text(f"{', '.join(links)}: {why}", "red")
    for link in view.links:
        if link.snapshot is not None:
            yield Text(f"{link.health.link}: {_reading(link.snapshot)}", "magenta")
    for one in view.incidents:
        held = "held, the others flow: " if one.kind == SCHEMA_DRIFT else ""
        yield Text(f"{one.link}: {held}{one.detail}", "red")
    for text, risk in log_warnings([link.health for link in view.links]):
        yield Text(text, "red" if risk is Risk.CRITICAL else "yellow")
    yield from _quality(view)
    for one in view.reconciliations:
        text, style = reconciliation(one, view.at_us)
        yield Text(text, style)
    for pair in view.pairs:
        if pair.waiting:
            yield Text(f"{pair.waiting} waits for emergencies that the other store has", "yellow")


def _reading(snapshot: Snapshot) -> str:
    """Says how far a source's history has been read, and how long the rest takes at that rate."""
    words = f"reads history, {count(snapshot.rows_read)} rows"
    if snapshot.rows_estimated is not None:
        share = min(1.0, snapshot.rows_read / max(1, snapshot.rows_estimated))
        words += f" of about {count(snapshot.rows_estimated)} ({percent(share)})"
    words += f", {count(snapshot.rows_per_s)} rows/s"
    if snapshot.seconds_left is not None:
        words += f", {span(snapshot.seconds_left)} left"
    return words + (f", gone on with {snapshot.resumes} times" if snapshot.resumes else "")


def _quality(view: View):
    """Counts what is open, campus by campus; what every store has is one alarm."""
    by_store = collections.Counter()
    for part in view.alarms:
        by_store[part.campus, part.rule, part.store] += part.open
    by_rule: dict[str, collections.Counter] = {}
    for (campus, rule, _), number in by_store.items():
        rules = by_rule.setdefault(campus, collections.Counter())
        rules[rule] = max(rules[rule], number)
    for campus, rules in sorted(by_rule.items()):
        if total := sum(rules.values()):
            most = ", ".join(f"rule {rule}: {count(n)}" for rule, n in rules.most_common(_RULES))
            yield Text(f"{campus}: {count(total)} quality alarms open ({most})", "yellow")
    reviews = max((part.reviews_open for part in view.tending), default=0)
    if reviews:
        yield Text(f"{count(reviews)} pairs of patient records wait for a person", "yellow")
