"""The verbs that reconcile sources and stores, and that check a reconciliation's signed report."""

import argparse
import contextlib
import datetime
import json
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines import reconcile as pipeline
from runners import options as beam_options
from runners.reconcile_jobs import REPORTS
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.errors import ConfigError
from schemas.reconciliation import DIFFERING, Reconciliation
from transforms.sign_report import ReportKey, fingerprint, verify

_POLL_S = 0.5


def reconcile(options: argparse.Namespace) -> int:
    """Finds what differs, mends it if asked to, and leaves a signed report; exit 1 if unsound."""
    config = load(options.config)
    if options.whole and options.since is not None:
        raise ConfigError("--whole is every row, --since a day's. Remedy: give one of them.")
    task = pipeline.Task(
        tuple(options.campus),
        tuple(options.table),
        _since_us(options.since),
        options.repair,
        whole=options.whole,
    )
    flags = beam_options.parse(options.rest)
    key = ReportKey(config.report_key)
    made_key = key.make()
    key.sign({})  # An unusable key shows before anything is done.
    with (
        tempfile.TemporaryDirectory(prefix="campus-sync-") as folder,
        _engine(options, flags) as run,
    ):
        made = run_task(config, task, pathlib.Path(folder), run)
    path = options.report or _report_path(options.config, made)
    signed = key.sign(made.to_dict())
    text = json.dumps(signed, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    with path.with_suffix(".txt").open("w", encoding="utf-8") as file:
        _print(made, Console(file=file, width=120), path, fingerprint(key.public))
    if options.json:
        print(text)
    else:
        _print(made, Console(), path, fingerprint(key.public))
        if made_key:
            Console(stderr=True).print(f"a new key signs reports: {config.report_key}; keep a copy")
    return 0 if made.sound else 1


def verify_report(options: argparse.Namespace) -> int:
    """Tells whether a report is as it was signed, and, with a configuration, by whose key."""
    try:
        signed = json.loads(options.report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{options.report}: is no report. Remedy: name its JSON file.") from None
    report, public = verify(signed)
    print(f"as it was signed by key {fingerprint(public)}; sound: {report.get('sound')}")
    if options.config is None:
        print("whose key that is, --config tells: its report_key is compared")
        return 0
    own = ReportKey(load(options.config).report_key).public == public
    print("that is this installation's key" if own else "that is NOT this installation's key")
    return 0 if own else 1


Run = Callable[[Callable[[beam.Pipeline], None]], None]


def run_task(config: Config, task: pipeline.Task, folder: pathlib.Path, run: Run) -> Reconciliation:
    """Runs a reconciliation whose workers can write to `folder`; shows how far it has come."""
    began_us = wall_clock_us()
    work = pipeline.units(config, task)
    expected = sum(link.source == unit.campus for link in config.links() for unit in work)
    with _progress(folder, expected):
        run(lambda root: pipeline.build(root, config, task, folder))
    return pipeline.gathered(folder, task, began_us, wall_clock_us())


def run_direct(build: Callable[[beam.Pipeline], None]) -> None:
    """Runs a bounded pipeline in this process."""
    flags = PipelineOptions(["--no_save_main_session"])
    with beam.Pipeline(runner="FnApiRunner", options=flags) as root:
        build(root)


@contextlib.contextmanager
def _engine(options: argparse.Namespace, flags: PipelineOptions) -> Iterator[Run]:
    if options.runner == "direct":
        yield run_direct
        return
    from runners.flink import run_on_flink

    work_dir = beam_options.work_dir(flags, options.config.absolute().parent / "reconcile-job")
    yield lambda build: run_on_flink(build, flags, work_dir)


@contextlib.contextmanager
def _progress(folder: pathlib.Path, expected: int) -> Iterator[None]:
    """Counts the tables of links that are done, by what has been kept of them."""
    columns = (TextColumn("reconciling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    ended = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task("", total=expected)

        def watch() -> None:
            while not ended.wait(_POLL_S):
                shown.update(bar, completed=len(list(folder.glob("link *.json"))))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _since_us(day: str | None) -> int:
    if day is None:
        return 0
    try:
        return int(datetime.datetime.fromisoformat(day).astimezone().timestamp() * 1_000_000)
    except ValueError:
        raise ConfigError(f"--since {day}: is no day. Remedy: write 2026-11-23.") from None


def _report_path(config: pathlib.Path, made: Reconciliation) -> pathlib.Path:
    when = datetime.datetime.fromtimestamp(made.began_us / 1e6, datetime.UTC)
    folder = config.absolute().parent / REPORTS
    return folder / f"{when:%Y%m%dT%H%M%S}Z.json"


def _print(made: Reconciliation, console: Console, path: pathlib.Path, key: str) -> None:
    table = Table(
        "link", "table", "rows", *DIFFERING, "aside", "mended", "", title="reconciliation"
    )
    for one in made.links:
        kinds = (f"{getattr(one, kind):,}" for kind in DIFFERING)
        aside = one.refused + one.held + one.edited + one.moving
        verdict = "sound" if one.sound else one.why or ("differs" if one.settled else "behind")
        table.add_row(
            f"{one.campus}>{one.store}",
            one.table,
            f"{one.source_rows:,}",
            *kinds,
            f"{aside:,}",
            f"{one.mended:,}",
            verdict,
        )
    console.print(table)
    for pair in made.pairs:
        if not pair.equal:
            place = f"{pair.store} and {pair.other}: {pair.table} of {pair.campus}"
            console.print(f"[red]unlike[/]  {place}, among edited records or deletions")
    unlike = sum(one.differing for one in made.links)
    mended = sum(one.mended for one in made.links)
    remedy = "; --repair mends them" if unlike and not made.repair else ""
    console.print(f"{unlike:,} rows differed, {mended:,} of them mended{remedy}")
    console.print(f"{'[green]sound[/]' if made.sound else '[red]not sound[/]'}  {path}, key {key}")
