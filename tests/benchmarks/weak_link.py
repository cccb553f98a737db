"""Measure emergencies whose store lies behind a slow line that routine rows keep full.

    python -m tests.benchmarks.weak_link [--seconds 120] [--routine 300] [--json]

The kernels of our machines have no netem, so a forwarder of our own is the line: each way 150 ms,
512 kbit/s for all connections together, and one piece in fifty 0.3 s late, as after a lost packet.
"""

import argparse
import contextlib
import json
import queue
import random
import socket
import statistics
import sys
import threading
import time

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.benchmarks.beside_native import ROWS, URGENT, Bench, CampusSync, start_anew
from tests.benchmarks.servers import running

_PIECE, _PIECES = 8192, 4  # What a router keeps of one connection: half a second's worth.
_LATE_S = 0.3
_ROUTINE_FIRST = 50_000_000
_GIVEN_UP_S = 120.0


class WeakLine:
    """Forwards to a port of this machine, slowly, from `port`; ends with the process."""

    def __init__(self, target: int, delay_s: float, bytes_s: float, late: float, seed: int):
        self._target, self._delay_s, self._bytes_s, self._late = target, delay_s, bytes_s, late
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._free_at = {True: 0.0, False: 0.0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for there, back, way in ((client, server, True), (server, client, False)):
                there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line: queue.Queue = queue.Queue(_PIECES)
                self._start(self._take, there, line, way)
                self._start(self._give, line, back)

    def _take(self, there: socket.socket, line: queue.Queue, way: bool) -> None:
        due = 0.0
        while True:
            try:
                piece = there.recv(_PIECE)
            except OSError:
                piece = b""
            with self._lock:
                begin = max(time.monotonic(), self._free_at[way])
                self._free_at[way] = begin + len(piece) / self._bytes_s
                late_s = _LATE_S if self._random.random() < self._late else 0.0
                due = max(due, self._free_at[way] + self._delay_s + late_s)
            line.put((due, piece))
            if not piece:
                return

    def _give(self, line: queue.Queue, back: socket.socket) -> None:
        while True:
            due, piece = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                if not piece:
                    back.shutdown(socket.SHUT_WR)
                    return
                back.sendall(piece)

    def _start(self, work, *arguments) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()


def _write_routine(dsn: str, rate: int, stop: threading.Event) -> None:
    due = time.monotonic()
    with psycopg.connect(dsn, autocommit=True) as writer:
        for row in range(_ROUTINE_FIRST, 2 * _ROUTINE_FIRST):
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            writer.execute(ROWS.format(low=row, high=row))
            due += 1 / rate


def _emergencies(bench: Bench, ours: CampusSync, seconds: float) -> list[float]:
    """Returns commit-to-seen lags in s, one emergency a second after the one before was seen."""
    lags, end = [], time.monotonic() + seconds
    with (
        psycopg.connect(bench.dsn, autocommit=True) as writer,
        psycopg.connect(ours.dsn, autocommit=True) as reader,
    ):
        while (began := time.monotonic()) < end:
            row = bench.take_ids(1)
            writer.execute(URGENT.format(low=row, high=row))
            while reader.execute(ours.seen_sql, [row]).fetchone() is None:
                if time.monotonic() > began + _GIVEN_UP_S:
                    raise SystemExit(f"an emergency was not seen within {_GIVEN_UP_S:.0f} s")
                time.sleep(0.01)
            lags.append(time.monotonic() - began)
            print(f"{lags[-1]:.1f} s", end=" ", file=sys.stderr, flush=True)
            time.sleep(1)
    return lags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--routine", type=int, default=300, help="rows a second; 160 fill the line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with running("source", "store") as (root, servers), contextlib.ExitStack() as stack:
        source, server = servers
        bench, store = Bench(source), server.create_database("consult")
        line = WeakLine(int(conninfo_to_dict(store)["port"]), 0.15, 64_000, 0.02, options.seed)
        far = make_conninfo(store, host="127.0.0.1", port=line.port)
        ours = CampusSync(bench.dsn, {"primary": far}, root / "job")
        stack.callback(ours.close)
        ours.dsn, ours.dsns = store, {"primary": store}  # Where we look, not by the line.
        start_anew(bench, ours)
        stop = threading.Event()
        writer = threading.Thread(target=_write_routine, args=(bench.dsn, options.routine, stop))
        writer.start()
        try:
            lags = _emergencies(bench, ours, options.seconds)
        finally:
            stop.set()
            writer.join()
        with psycopg.connect(store) as reader:
            query = "SELECT count(*) FROM consult.lab_result WHERE length(record_id) = 8"
            (arrived,) = reader.execute(query).fetchone()
    found = {
        "emergencies": len(lags),
        "p50_s": statistics.median(lags),
        "max_s": max(lags),
        "routine_rows_per_s": arrived / options.seconds,
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("\n" + "  ".join(f"{name} {value:,.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
