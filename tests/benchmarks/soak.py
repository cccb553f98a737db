"""Run the whole job for minutes under traffic and tell whether memory and log stay flat.

    python -m tests.benchmarks.soak --minutes 20 [--rate 100] [--campuses unlike] [--json]

Prints resident memory by process each half minute, its slope over the second half, the log that
the sources keep for the slots, and at the end the law and the comparison of contents.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time

import numpy as np
import psycopg

from pipelines.sla_report import Observer
from pipelines.source_clocks import log_end
from runners import look
from runners.demo import Job, all_applied, all_read, wait
from runners.embedded import process_tree, world
from runners.embedded.traffic import Traffic
from schemas.config import Config, load

_SAMPLE_S = 30.0
_ROLES = (("runners.workers work", "worker"), ("runners.workers pool", "pool"), ("java", "JVM"))


def main(argv: list[str]) -> int:
    options = _options(argv)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)  # The servers run as another user when we are root.
        stack.callback(world.down, folder)
        world.up(folder, campuses=options.campuses)
        config = load(folder / "campuses.yaml")
        traffic = stack.enter_context(Traffic(config, options.seed))
        traffic.preload(300)
        job = Job(folder)
        stack.callback(job.stop)
        observer = stack.enter_context(Observer(config))
        wait(job, lambda: all_read(observer), 300, "the first snapshots")
        samples = _soak(job, traffic, config, options)
        ends = {name: log_end(source).lsn for name, source in config.sources.items()}
        wait(job, lambda: all_applied(observer, config, ends), 300, "the last changes")
        report = look.make_report(config, compare=True)
    slopes = _slopes(samples)
    summary = {
        "samples": samples,
        "mib_per_hour": slopes,
        "captured": report.total.captured,
        "law_holds": report.law_holds,
        "complete": report.complete,
        "stores_equal": report.stores_equal,
    }
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        print(f"captured {report.total.captured}; law {report.law_holds}, complete"
              f" {report.complete}, equal {report.stores_equal}")  # fmt: skip
        for role, slope in slopes.items():
            print(f"{role:>8}: {slope:+.1f} MiB an hour over the second half")
    return 0 if report.sound and report.stores_equal else 1


def _soak(job: Job, traffic: Traffic, config: Config, options) -> list[dict[str, float]]:
    seconds = options.minutes * 60
    writer = threading.Thread(target=traffic.run, args=[options.rate, seconds], daemon=True)
    writer.start()
    began = time.monotonic()
    samples = []
    while writer.is_alive():
        writer.join(_SAMPLE_S)
        sample = {"s": round(time.monotonic() - began), **_memory(job.pid), **_kept(config)}
        samples.append(sample)
        print("  ".join(f"{key} {value:.0f}" for key, value in sample.items()),
              file=sys.stderr, flush=True)  # fmt: skip
        if not job.alive:
            raise SystemExit(f"the job ended: see {job.log}")
    return samples


def _memory(pid: int) -> dict[str, float]:
    """Returns MiB resident by role, of the job and what it started."""
    found = {"job": _resident(pid)}
    waiting = [pid]
    while waiting:
        for child in process_tree.children_of(waiting.pop()):
            waiting.append(child.pid)
            with contextlib.suppress(OSError):
                command = pathlib.Path(f"/proc/{child.pid}/cmdline").read_bytes()
                words = command.replace(b"\0", b" ").decode()
                role = next((role for part, role in _ROLES if part in words), "rest")
                found[role] = found.get(role, 0.0) + _resident(child.pid)
    return found


def _resident(pid: int) -> float:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _kept(config: Config) -> dict[str, float]:
    """Returns MiB of log that the PostgreSQL sources keep for their slots."""
    kept = 0
    for source in config.sources.values():
        if source.kind == "postgresql":
            with psycopg.connect(source.dsn, autocommit=True) as connection:
                (most,) = connection.execute(
                    "SELECT coalesce(max(pg_current_wal_lsn() - restart_lsn), 0)::bigint"
                    " FROM pg_replication_slots"
                ).fetchone()
                kept += most
    return {"log": kept / 2**20}


def _slopes(samples: list[dict[str, float]]) -> dict[str, float]:
    """Returns MiB an hour by role, least squares over the second half."""
    half = samples[len(samples) // 2 :]
    at = np.array([sample["s"] for sample in half]) / 3600
    roles = sorted(set(half[0]) & {"job", "worker", "pool", "JVM"})
    return {
        role: float(np.polyfit(at, [sample.get(role, 0.0) for sample in half], 1)[0])
        for role in roles
    }


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=100, help="row changes a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--campuses", default="unlike", choices=("unlike", "postgresql"))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
