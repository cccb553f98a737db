"""The reconciliation: digests of whole tables, then row by row where they differ, then mending.

A bounded Beam pipeline. What it finds is kept as files of one folder, each written once: a step
that an engine repeats does not count twice.
"""

import contextlib
import json
import os
import pathlib
import typing
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import psycopg
from apache_beam.pvalue import TaggedOutput

from pipelines.differences import UNREADABLE, Ends
from pipelines.mend import mend
from schemas.clocks import monotonic_s, wall_clock_us
from schemas.config import PRIMARY, Config
from schemas.errors import ConfigError, StoreUnavailable, reason
from schemas.reconciliation import (
    DIFFERING,
    EXCUSED,
    LinkResult,
    PairResult,
    Reconciliation,
    Suspects,
    Unit,
    joined,
)
from transforms.set_sums import BUCKETS, hash_id
from transforms.sign_report import ReportKey
from transforms.table_sums import FirstLook

SETTLE_S = 30.0
KEYS_MAX = 20  # Of a link and table, named in the report.
_CHANGED = 5000  # Rows of a day, looked at together.
_PAIRS = "pairs"
_UNREAD = -1  # Part of suspects of which nothing is known: an end did not answer.
_SINCE = """\
SELECT record_id FROM consult.{table} WHERE campus = %s
    AND committed_at >= to_timestamp(%s / 1e6) ORDER BY record_id"""


_Pair = TaggedOutput[typing.Literal["pairs"], PairResult]


class Task(typing.NamedTuple):
    """What a run is to do; `tables` and `campuses` empty for all.

    `whole`: the second pass looks at every row, whatever the sums of the first say.
    """

    campuses: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    since_us: int = 0
    repair: bool = False
    settle_s: float = SETTLE_S
    whole: bool = False


def units(config: Config, task: Task) -> list[Unit]:
    """Returns what there is to look at.

    Raises:
      ConfigError: a campus or a table is not there.
    """
    sources = Ends(config, 0, monotonic_s).sources
    for wanted, there, what in (
        (task.campuses, set(sources), "campus"),
        (task.tables, {table for side in sources.values() for table in side.tables}, "table"),
    ):
        for name in sorted(set(wanted) - there):
            known = ", ".join(sorted(there))
            raise ConfigError(f"no {what} {name}. Remedy: one of {known}.")
    return [
        Unit(campus, table, task.since_us)
        for campus, side in sources.items()
        if not task.campuses or campus in task.campuses
        for table in side.tables
        if not task.tables or table in task.tables
    ]


def build(root: beam.Pipeline, config: Config, task: Task, folder: pathlib.Path) -> None:
    """Wires a run whose results go into `folder`, which every worker can write to.

    Raises:
      ConfigError: as `units`.
    """
    looked = (
        root
        | "Units" >> beam.Create(units(config, task), reshuffle=False).with_output_types(Unit)
        | "SpreadUnits" >> beam.Reshuffle()
        | "LookOnce" >> beam.ParDo(_LookOnceFn(config, task)).with_outputs(_PAIRS, main="suspects")
    )
    results = (
        looked.suspects
        | "SpreadSuspects" >> beam.Reshuffle()
        | "LookAgain" >> beam.ParDo(_LookAgainFn(config, task)).with_output_types(LinkResult)
    )
    results | "KeepLinks" >> beam.ParDo(_KeepFn(folder))
    looked[_PAIRS] | "KeepPairs" >> beam.ParDo(_KeepFn(folder))


def gathered(folder: pathlib.Path, task: Task, began_us: int, ended_us: int) -> Reconciliation:
    """Returns what a finished run has left in its folder."""
    links, pairs = [], []
    for path in sorted(folder.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if path.name.startswith("pair"):
            pairs.append(PairResult(**kept))
        else:
            links.append(LinkResult(**kept))
    return Reconciliation(
        began_us,
        ended_us,
        task.since_us,
        task.repair,
        joined(links, KEYS_MAX),
        tuple(sorted(pairs)),
        task.whole,
    )


class _EndsFn(beam.DoFn):
    """Knows sources and stores; connections last as long as a question."""

    def __init__(self, config: Config, task: Task):
        self._config, self._task = config, task
        self._ends: Ends | None = None

    def setup(self):
        self._ends = Ends(self._config, self._task.settle_s, monotonic_s)


class _LookOnceFn(_EndsFn):
    """The first pass: yields suspects, at least one element for every link, and pairs."""

    def process(self, unit: Unit) -> Iterator[Suspects | _Pair]:
        if unit.since_us:
            yield from _changed(self._ends, unit)
            return
        first = self._ends.first_look(unit.campus, unit.table)
        for link in self._ends.links(unit.campus):
            if unit.campus not in self._ends.unseen:
                yield _suspects(first, link.store, self._task.whole)
        for pair in _pairs(self._ends, first):
            yield TaggedOutput(_PAIRS, pair)


class _LookAgainFn(_EndsFn):
    """The second pass, and the mending."""

    def process(self, suspects: Suspects) -> Iterator[LinkResult]:
        key = ReportKey(self._config.report_key)
        yield look_again(self._ends, suspects, self._task.repair, key)


class _KeepFn(beam.DoFn):
    """Writes each result to a file of its own; the first stays, since it tells what was mended."""

    def __init__(self, folder: pathlib.Path):
        self._folder = str(folder)

    def process(self, result):
        kind = "pair" if isinstance(result, PairResult) else "link"
        last = result.other if kind == "pair" else result.part
        place = (kind, result.campus, result.table, result.store, str(last))
        path = pathlib.Path(self._folder, " ".join(place) + ".json")
        draft = path.with_suffix(f".{os.getpid()}.draft")
        kept = {k: list(v) if k == "keys" else v for k, v in result._asdict().items()}
        draft.write_text(json.dumps(kept), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()


def look_again(ends: Ends, suspects: Suspects, repair: bool, key: ReportKey) -> LinkResult:
    """Judges a link's suspects row by row, and mends those that differ if asked to."""
    campus, table, store = suspects.campus, suspects.table, suspects.store
    link = next(one for one in ends.links(campus) if one.store == store)
    counts = dict.fromkeys((*DIFFERING, *EXCUSED), 0)
    keys: list[str] = []
    mended, why = 0, ""
    if suspects.part == _UNREAD:
        why = "unreachable"
    elif suspects.ids or suspects.by_buckets:
        try:
            excuses = ends.excuses(link, table)
            ids = None if suspects.by_buckets else list(suspects.ids)
            rows = max(suspects.source_rows, suspects.store_rows)
            buckets = np.array(suspects.buckets, np.int64)
            for found in ends.look_closer(link, table, ids, buckets, rows, excuses):
                for kind in counts:
                    counts[kind] += found.count(kind)
                named = found.keys(KEYS_MAX)
                keys += [
                    f"{kind}:{key.name_of(campus, table, one)}"
                    for kind in DIFFERING
                    for one in named.get(kind, ())
                ]
                if repair and not ends.behind(link.name):
                    done, why = mend(ends, link, table, found, excuses, wall_clock_us)
                    mended += done
        except (*UNREADABLE, StoreUnavailable) as error:
            why = reason(error)
    return LinkResult(
        campus,
        table,
        store,
        part=suspects.part,
        source_rows=suspects.source_rows,
        store_rows=suspects.store_rows,
        source_digest=suspects.source_digest,
        store_digest=suspects.store_digest,
        mended=mended,
        settled=not ends.behind(link.name),
        keys=keys[:KEYS_MAX],
        why=why,
        **counts,
    )


def _suspects(first: FirstLook, store: str, whole: bool) -> Suspects:
    """Of an end that could not be read: nothing, and no digests."""
    if first.source is None or store not in first.stores:
        return Suspects(first.campus, first.table, store, _UNREAD, [], False, [], 0, 0, "", "")
    theirs = first.stores[store]
    ids, buckets = (None, np.arange(BUCKETS)) if whole else first.suspects(store)
    return Suspects(
        campus=first.campus,
        table=first.table,
        store=store,
        part=0,
        ids=ids or [],
        by_buckets=ids is None,
        buckets=buckets.tolist(),
        source_rows=first.source.count,
        store_rows=theirs.live.count,
        source_digest=first.source.digest.hex(),
        store_digest=theirs.live.digest.hex(),
    )


def _pairs(ends: Ends, first: FirstLook) -> Iterator[PairResult]:
    names = sorted(first.stores, key=lambda name: (name != PRIMARY, name))
    for other in names[1:]:
        one, two = ends.same_aside(first, names[0], other)
        live = first.campus not in ends.unseen or not len(one.live.unequal(two.live))
        yield PairResult(
            first.campus,
            first.table,
            names[0],
            other,
            live_equal=live,
            edited_equal=not len(one.edited.unequal(two.edited)),
            tombstones_equal=not len(one.tombstones.unequal(two.tombstones)),
        )


def _changed(ends: Ends, unit: Unit) -> Iterator[Suspects]:
    """Yields, for every link, the rows that any store has changed since: each once."""
    links = ends.links(unit.campus)
    part, seen = 1, set()
    for link in links:  # So that every link is in the report.
        yield _some(unit, link.store, 0, [])
    query = _SINCE.format(table=unit.table)
    for link in links:
        try:
            with (
                ends.stores[link.store].connect() as conn,
                conn.transaction(),
                conn.cursor("changed") as cursor,
            ):
                cursor.execute(query, (unit.campus, unit.since_us))
                while rows := cursor.fetchmany(_CHANGED):
                    ids = [key for (key,) in rows if hash_id(key) not in seen]
                    seen |= {hash_id(key) for key in ids}
                    for each in links if ids else ():
                        yield _some(unit, each.store, part, ids)
                    part += 1
        except psycopg.Error:
            yield _some(unit, link.store, _UNREAD, [])


def _some(unit: Unit, store: str, part: int, ids: list[str]) -> Suspects:
    return Suspects(
        unit.campus, unit.table, store, part, ids, False, [], len(ids), len(ids), "", ""
    )
