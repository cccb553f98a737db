"""Measure urgent edits between a store here and one behind a slow line (`weak_link`), one by one.

python -m tests.benchmarks.weak_edits [--edits 10] [--json]
"""

import argparse
import json
import statistics
import time

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runners.exchange import Exchange
from tests.benchmarks.servers import running
from tests.benchmarks.weak_link import WeakLine
from tests.edited_stores import EditedStore, config_of


def _arrives(one: EditedStore, other: EditedStore, record_id: str) -> float:
    """Returns how long an urgent edit takes to the other store."""
    one.as_(lane="emergency")
    one.insert(record_id, patient_id="P1", title="t")
    began = time.monotonic()
    while other.row(record_id, "title") is None:
        time.sleep(0.01)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with running("near", "far") as (root, servers):
        dsns = [server.create_database("consult") for server in servers]
        near, far = (EditedStore(*named) for named in zip(("primary", "far"), dsns, strict=True))
        line = WeakLine(int(conninfo_to_dict(dsns[1])["port"]), 0.15, 64_000, 0.02, seed=1)
        by_line = make_conninfo(dsns[1], host="127.0.0.1", port=line.port)
        config = config_of(root, {"primary": dsns[0], "far": by_line})
        with Exchange(config):
            for begin, end in ((near, far), (far, near)):  # Until all is planned and prepared.
                _arrives(begin, end, f"first at {begin.name}")
            found = {
                f"{begin.name} to {end.name}": [
                    _arrives(begin, end, f"{begin.name} {i}") for i in range(options.edits)
                ]
                for begin, end in ((near, far), (far, near))
            }
        for store in (near, far):
            store.close()
    told = {way: {"p50_s": statistics.median(s), "max_s": max(s)} for way, s in found.items()}
    if options.json:
        print(json.dumps(told, indent=2))
        return
    for way, one in told.items():
        print(f"{way}: p50 {one['p50_s']:.1f} s, longest {one['max_s']:.1f} s")


if __name__ == "__main__":
    main()
