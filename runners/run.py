"""The verbs that operate the sync job: run and check."""

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import typing

import apache_beam as beam
import psycopg

from pipelines import sync
from runners import options as beam_options
from runners.exchange import Exchange
from runners.log_findings import more_findings
from runners.metrics import Recorder
from runners.preflight import Finding, Severity
from runners.preflight import check as preflight
from runners.safe_log import safe_traceback
from runners.upkeep import Rules, Upkeep
from schemas.config import PRIMARY, Config, load
from schemas.errors import ConfigError
from transforms import postgresql_sessions
from transforms.deliver import store_schema

if typing.TYPE_CHECKING:
    from runners.flink import Event

_LAG_HOLD_S = 2.0


def run(options: argparse.Namespace) -> int:
    """Carries changes until stopped: preflight, then the engine, supervised."""
    config = load(options.config)
    flags = beam_options.parse(options.rest)
    rules = Rules.load(config)
    if not options.no_check and not options.dry_run and _print_findings(preflight(config), False):
        print("not started; --no-check starts all the same", file=sys.stderr)
        return 1
    work_dir = beam_options.work_dir(flags, options.config.absolute().parent / "job")
    one_worker = options.runner == "flink" and beam_options.one_worker(flags)
    build = functools.partial(build_sync, config, work_dir, one_worker)
    if options.runner == "dataflow":
        from runners.dataflow import dry_run

        if not options.dry_run:
            raise ConfigError("dataflow: only --dry-run is offered here. Remedy: see the README.")
        print(dry_run(build, flags, work_dir))
        return 0
    prepare_stores(config)
    threading.excepthook = lambda told: sys.stderr.write(safe_traceback(told.exc_value))
    from runners.flink import run_on_flink

    upkeep = Upkeep(config, rules, options.config)
    with Recorder(config) as recorder, upkeep, Exchange(config, rules.conflicts) as exchange:
        recorder.registry.register(exchange.collector)
        outcome = run_on_flink(build, flags, work_dir, report=print_event, wait_for_room=True)
    print(f"ended: {outcome}")
    return 0


def print_event(event: "Event") -> None:
    """Prints what the supervisor reports."""
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = f"{when} {event.kind} (start {event.attempt}) {event.detail}".rstrip()
    with contextlib.suppress(OSError):  # What is printed to a full disk must not end the run.
        print(text, flush=True)


def build_sync(
    config: Config, work_dir: pathlib.Path, one_worker: bool, root: beam.Pipeline
) -> None:
    """Wires the configured links into `root`; each call is a start of its own."""
    links = [config.settings(link, one_worker) for link in config.links()]
    # One worker's pulses make bundles for ever, so that what is held leaves with the next.
    hold_s = _LAG_HOLD_S if one_worker else 0.0
    sync.build(root, links, config.stores[PRIMARY].dsn, incarnation(work_dir), hold_s)


def incarnation(work_dir: pathlib.Path) -> str:
    """Returns a name for this start of the job that no other start has."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%fZ")
    return f"{socket.gethostname()}-{work_dir.name}-{os.getpid()}-{now}"


def prepare_stores(config: Config) -> None:
    """Creates or upgrades the consult schema; a store that cannot be had now is left for later.

    Each link's first delivery tries again.

    Raises:
      ConfigError: a store is of a newer version than this software.
    """
    for name, store in config.stores.items():
        try:
            with postgresql_sessions.connect(store.dsn) as connection:
                store_schema.ensure(connection)
        except psycopg.errors.LockNotAvailable:
            print(f"store {name} is in use by others: its upgrade waits", file=sys.stderr)
        except psycopg.OperationalError:
            print(f"store {name} cannot be reached: its links wait for it", file=sys.stderr)
        except ConfigError as error:
            raise ConfigError(f"store {name}: {error}") from None


def check(options: argparse.Namespace) -> int:
    """Prints what would go wrong; exit 1 if something would."""
    config = load(options.config)
    findings = [*preflight(config), *more_findings(config)]
    held = any(finding.severity == Severity.HELD for finding in findings)
    return 1 if _print_findings(findings, options.json) or held else 0


def _print_findings(findings: list[Finding], as_json: bool) -> bool:
    """Prints findings; returns whether one of them forbids a start."""
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2, ensure_ascii=False))
    for finding in findings:
        if not as_json:
            print(f"{finding.severity:7} {finding.place}: {finding.what}")
            print(f"        {finding.remedy}")
    return any(finding.severity == Severity.ERROR for finding in findings)
