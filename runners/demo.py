"""The main job, start to report: campuses, traffic in both lanes, the pipeline, the proof."""

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psycopg
import pymysql
from rich.console import Console
from rich.live import Live

from pipelines.sla_report import Observer
from pipelines.source_clocks import log_end
from runners import look, processes
from runners.embedded import world
from runners.embedded.traffic import Traffic
from runners.status import render
from schemas.batches import Lane
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.errors import CampusSyncError

_PATIENTS = 300
_START_S = 180
_DRAIN_S = 180
_LOOK_S = 0.5


def demo(options: argparse.Namespace) -> int:
    """Runs everything; exit 0 only if the law holds and sources and stores are equal."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        folder = _folder(options.dir, stack)
        report_dir = options.report_dir or folder / "report"
        with console.status("starting three campuses and the platform's store"):
            stack.callback(world.down if options.dir else world.remove, folder)
            world.up(folder, campuses=options.campuses)
        config = load(folder / "campuses.yaml")
        traffic = stack.enter_context(Traffic(config, options.seed))
        with console.status(f"admitting {_PATIENTS} patients before the first sync"):
            traffic.preload(_PATIENTS)
        job = Job(folder)
        stack.callback(job.stop)
        observer = stack.enter_context(Observer(config))
        with console.status(f"starting the pipeline on Flink (log: {job.log})"):
            wait(job, lambda: all_read(observer), _START_S, "the first snapshots")
        _traffic(console, observer, traffic, config, options)
        with console.status("waiting until every link has applied all that was committed"):
            ends = {name: log_end(source).lsn for name, source in config.sources.items()}
            wait(job, lambda: all_applied(observer, config, ends), _DRAIN_S, "the last changes")
            time.sleep(2)  # The newest lag windows are written once a second.
        with console.status("comparing sources and stores row by row"):
            report = look.make_report(config, compare=True)
        look.write_report(report, report_dir)
    if options.json:
        print(json.dumps(look.summary(report), indent=2))
    else:
        look.print_summary(report, Console())
        Console().print(f"report: {report_dir / 'report.html'}")
    return 0 if report.sound and report.stores_equal else 1


class Job:
    """`campus-sync run` as a process of its own, as a hospital runs it."""

    def __init__(self, folder: pathlib.Path):
        self.log = folder / "job" / "run.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "runners.cli", "run", "--config"]
        self._process = processes.spawn([*command, str(folder / "campuses.yaml")], self.log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Asks it to end, and sees that it does."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        processes.stop(self._process)


def _folder(wanted: pathlib.Path | None, stack: contextlib.ExitStack) -> pathlib.Path:
    if wanted is not None:
        return wanted.absolute()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="campus-sync-demo-"))
    folder.chmod(0o755)  # The servers run as another user when we are root.
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def wait(job: Job, done, timeout_s: float, what: str) -> None:
    """Returns when `done()` is true.

    Raises:
      CampusSyncError: the job has ended, with the end of its log; or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if not job.alive:
            tail = job.log.read_text(errors="replace").splitlines()[-15:]
            raise CampusSyncError("the pipeline ended before its time:\n" + "\n".join(tail))
        if time.monotonic() > deadline:
            raise CampusSyncError(f"{what} did not arrive within {timeout_s:.0f} s; see {job.log}")
        time.sleep(_LOOK_S)


def _traffic(
    console: Console, observer: Observer, traffic: Traffic, config: Config, options
) -> None:
    """Writes traffic and shows the links meanwhile."""
    failed: list[BaseException] = []

    def write() -> None:
        try:
            traffic.run(options.rate, options.seconds)
            for source in config.sources:
                traffic.wrong(source)  # What must end as dead letters, and hold back nothing.
        except (psycopg.Error, pymysql.Error, CampusSyncError) as error:
            failed.append(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while writer.is_alive():
            live.update(render(observer.view(wall_clock_us())), refresh=True)
            writer.join(_LOOK_S)
    if failed:
        raise CampusSyncError(f"traffic could not be written: {type(failed[0]).__name__}")


def all_read(observer: Observer) -> bool:
    """Whether every link's snapshot is in its store."""
    report = observer.report(wall_clock_us())
    done = {snapshot.link for snapshot in report.snapshots if snapshot.finished_us}
    return done >= set(report.links)


def all_applied(observer: Observer, config: Config, ends: dict[str, int]) -> bool:
    ledgers = {link.health.link: link.ledgers for link in observer.view(wall_clock_us()).links}
    for link in config.links():
        ledger = ledgers.get(link.name, {}).get(Lane.ROUTINE)
        if ledger is None or ledger.lsn < ends[link.source] - 1:
            return False
    return True
