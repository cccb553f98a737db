"""The verb that reads rows of a source table again while changes flow."""

import argparse
import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines import reread as pipeline
from pipelines.differences import Ends
from schemas.clocks import monotonic_s, wall_clock_us
from schemas.config import Config, load
from schemas.errors import ConfigError
from schemas.reread import Phase, Span
from schemas.yaml_lines import suggest
from transforms.row_spans import SEPARATOR

_SETTLE_S = 30.0
_WORDS = {Phase.ROWS: "reading", Phase.GONE: "looking for deletions", Phase.DONE: "done"}


def reread(options: argparse.Namespace) -> int:
    """Reads a span again and delivers what stores have otherwise; exit 1 if rows were refused."""
    config = load(options.config)
    ends = Ends(config, _SETTLE_S, monotonic_s)
    task = _task(options, config, ends)
    began = monotonic_s()
    with _shown() as tell:
        work = pipeline.Reread(ends, task, tell, wall_clock_us, monotonic_s, time.sleep)
        made = work.run()
    seconds = monotonic_s() - began
    clean = not made.tally.refused and not made.tally.untold
    if options.json:
        print(json.dumps(_told(task, made, work.finds_deletions, seconds), ensure_ascii=False))
    else:
        _print(task, made, work.finds_deletions, seconds)
    return 0 if clean else 1


def _task(options: argparse.Namespace, config: Config, ends: Ends) -> pipeline.Task:
    campus = options.campus
    if campus not in ends.sources:
        raise ConfigError(f"no campus {campus}. Remedy: one of {', '.join(sorted(ends.sources))}.")
    if campus in ends.unseen:
        raise ConfigError(
            f"campus {campus} is read from a topic, and the database behind it is not named. "
            f"Remedy: name a PostgreSQL as `content` of sources.{campus}, or have its connector "
            "take an incremental snapshot of the table."
        )
    side, links = ends.sources[campus], ends.links(campus)
    if side.part(options.table) is None:
        known = [name for table in side.tables for name in side.feeding(table)]
        raise ConfigError(
            f"campus {campus} maps no source table {options.table}. "
            f"Remedy: {suggest(options.table, known)}"
        )
    known = [link.store for link in links]
    for name in options.store:
        if name not in known:
            raise ConfigError(f"{campus} has no link to store {name}. Remedy: {', '.join(known)}.")
    if bool(options.where_column) != bool(options.since):
        raise ConfigError("--where-column and --since belong together. Remedy: give both.")
    if options.rows_s is not None and options.rows_s < 0:
        raise ConfigError("--rows-s is a number of rows a second. Remedy: 0 for no limit.")
    limit = config.settings(links[0]).limits.snapshot_rows_s
    span = Span(
        options.table,
        _key(side.part(options.table).id, options.low),
        _key(side.part(options.table).id, options.high),
        options.where_column or "",
        _day(options.since),
    )
    rows_s = limit if options.rows_s is None else options.rows_s
    return pipeline.Task(campus, span, tuple(options.store or known), rows_s, options.anew)


def _key(columns: tuple[str, ...], text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    return tuple(text.split(SEPARATOR)) if len(columns) > 1 else (text,)


def _day(text: str | None) -> str:
    try:
        return "" if text is None else datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ConfigError(f"--since {text}: is no day. Remedy: write 2026-11-23.") from None


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[pipeline.Progress], None]]:
    """Shows on the terminal how far it is; rows, rows a second and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of about {task.total:,.0f}, {task.fields[rate]} rows/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task(_WORDS[Phase.ROWS], total=1, rate="-")
        began = monotonic_s()

        def tell(at: pipeline.Progress) -> None:
            tally, seconds = at.tally, max(monotonic_s() - began, 0.001)
            done = tally.ids if at.phase is Phase.GONE else tally.rows
            total = max(tally.rows if at.phase is Phase.GONE else at.expected, done, 1)
            rate = f"{(tally.rows - at.resumed + tally.ids) / seconds:,.0f}"
            shown.update(bar, description=_WORDS[at.phase], completed=done, total=total, rate=rate)

        yield tell


def _told(task: pipeline.Task, made: pipeline.Progress, deletions: bool, seconds: float) -> dict:
    return {
        "campus": task.campus,
        "table": task.span.table,
        "stores": list(task.stores),
        **made.tally.__dict__,
        "rows_before": made.resumed,
        "deletions_looked_for": deletions,
        "seconds": round(seconds, 3),
        "rows_s": round((made.tally.rows - made.resumed) / max(seconds, 0.001), 1),
    }


def _print(task: pipeline.Task, made: pipeline.Progress, deletions: bool, seconds: float) -> None:
    tally = made.tally
    before = f" ({made.resumed:,} of them before)" if made.resumed else ""
    print(f"{task.campus} {task.span.table}: {tally.rows:,} rows read{before} in {seconds:,.1f} s")
    print(
        f"  {tally.delivered:,} delivered again, {tally.superseded:,} overtaken by newer changes, "
        f"{tally.deleted:,} ended that the source no longer has"
    )
    if not deletions:
        print(
            f"  deletions were not looked for: what the source no longer has, has no "
            f"{task.span.column}. Remedy: --from and --to, or `campus-sync reconcile --repair`"
        )
    if tally.refused:
        print(
            f"  {tally.refused:,} rows were refused by mapping or store and left as they are. "
            "Remedy: `campus-sync dead-letters list` tells why; mend the mapping, and again"
        )
    if tally.untold:
        print(
            f"  {tally.untold:,} records of the stores have ids that are no key of the source, and "
            "were left as they are. Remedy: `campus-sync reconcile`"
        )
