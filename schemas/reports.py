"""Reports: what was measured of every link, what it proves, and its JSON and CSV forms."""

import collections
import csv
import dataclasses
import datetime
import enum
import io
import json
import typing

from schemas.batches import Lane
from schemas.positions import Position
from schemas.receipts import Counts
from schemas.reconcile_schedule import Standing
from schemas.sketches import LagSketch
from schemas.tables import Kind

VERSION = 1
SNAPSHOT_WAITS = "snapshot_waits"  # Kind of incident: the source lets none begin yet.
LOG_REWOUND = "log_rewound"  # Kind of incident: the source's log ended before what was read of it.
SCHEMA_DRIFT = "schema_drift"  # Kind of incident: tables of the source are not as mapped.
ONE_SIDED = "emergency_one_sided"  # Kind of incident: one store has an emergency, one has not.
# Of sets that are to be written to several stores as one: they wait for a store that is down; the
# primary store is down and each store writes for itself; one was not, since a row is refused.
SETS_WAIT, SETS_APART, SET_DIVIDED = "sets_wait", "sets_apart", "set_divided"


# Why a change is refused before it is counted in a manifest; a store's reasons are other ones.
CAPTURE_REASONS = frozenset(
    {
        *(f"bad_{kind}" for kind in Kind),
        "invalid_text",
        "missing_column",
        "missing_key",
        "nul_byte",
        "oversized",
        "partial_row",
        "unknown_table",
    }
)


class State(enum.StrEnum):
    """How a link does, worst last."""

    UP = "up"
    BEHIND = "behind"  # It moves, later than its objective.
    GAP = "gap"  # Its log is lost or not there yet: a snapshot fills it.
    DOWN = "down"  # Nobody reads it, or an end cannot be reached.


class Risk(enum.StrEnum):
    """How near the log that a link needs is to being removed at its source."""

    NONE = "none"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclasses.dataclass(frozen=True)
class Health:
    """One link now.

    Attributes:
      why: one line for a person where `state` is not up.
      backlog_bytes: log of the source that this link has not applied, whatever it holds.
      retained_bytes: log that the source keeps for the link's slot.
      watermark_lag_ms: how far the store's picture is behind the source's clock.
      slot: PostgreSQL's `wal_status` of the slot, `missing`, or None if it is not known.
      seconds_left: until its source may remove log that it needs, if it stood still from now on;
        None where nothing removes it, or by size alone at a rate that is not known.
      log_risk: that time held against the configured thresholds.
    """

    link: str
    state: State
    why: str = ""
    backlog_bytes: int | None = None
    retained_bytes: int | None = None
    watermark_lag_ms: int | None = None
    slot: str | None = None
    slot_active: bool | None = None
    seconds_left: float | None = None
    log_risk: Risk = Risk.NONE


@dataclasses.dataclass(frozen=True)
class LaneLag:
    """Lag of one link and lane over the whole period: commit to visible, of delivered rows."""

    link: str
    lane: Lane
    rows: int
    late: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    mean_ms: float
    min_ms: float

    @classmethod
    def of(cls, link: str, lane: Lane, sketch: LagSketch, late: int) -> "LaneLag":
        quantiles = sketch.quantiles((0.5, 0.9, 0.99, 0.999))
        ends = (sketch.max_ms, sketch.mean_ms, sketch.min_ms)
        return cls(link, lane, sketch.count, late, *quantiles, *ends)


@dataclasses.dataclass(frozen=True)
class LagPoint:
    """Lag and throughput of one link and lane from `start_us` on, for `seconds`."""

    link: str
    lane: Lane
    start_us: int
    seconds: int
    rows: int
    late: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


@dataclasses.dataclass(frozen=True)
class BacklogPoint:
    """One sample of a link's backlog."""

    link: str
    at_us: int
    state: State
    backlog_bytes: int | None
    watermark_lag_ms: int | None


@dataclasses.dataclass(frozen=True)
class Conservation:
    """The ledger of one link and lane, and whether the law holds in it.

    Attributes:
      lane: None for the sum of both.
      lsn, seq: how far it has been applied. swept: rows removed after a snapshot.
      islands: stretches applied beyond a gap that is not filled yet.
    """

    link: str
    lane: Lane | None
    counts: Counts
    swept: int = 0
    lsn: int = 0
    seq: int = 0
    commit_us: int = 0
    watermark_us: int = 0
    updated_us: int = 0
    islands: int = 0

    @property
    def balanced(self) -> bool:
        return self.counts.balanced


class Fill(enum.StrEnum):
    """What a window of a manifest shows."""

    EQUAL = "equal"
    SHORT = "short"  # The store has applied fewer changes than the source committed.
    DIFFERENT = "different"  # As many, but not the same.


@dataclasses.dataclass(frozen=True)
class Completeness:
    """What a source committed to one table, held against what the store applied, all windows.

    Attributes:
      windows: how many; short, different: how many of them are not equal.
      source_changes, store_changes: over all windows.
      first_unequal_us: start of the earliest window that is not equal, or None.
    """

    link: str
    lane: Lane
    table: str
    windows: int
    short: int
    different: int
    source_changes: int
    store_changes: int
    first_unequal_us: int | None = None

    @property
    def fill(self) -> Fill:
        return Fill.SHORT if self.short else Fill.DIFFERENT if self.different else Fill.EQUAL


@dataclasses.dataclass(frozen=True)
class Gap:
    """One window of a manifest that is not equal."""

    link: str
    lane: Lane
    table: str
    start_us: int
    source_changes: int
    store_changes: int
    fill: Fill


@dataclasses.dataclass(frozen=True)
class Refused:
    """Dead letters of one link, source table, column and reason."""

    link: str
    src_table: str
    column: str
    reason: str
    open: int
    replayed: int


@dataclasses.dataclass(frozen=True)
class Hold:
    """Something that waits for a person."""

    link: str
    kind: str
    src_table: str
    state: str
    noted_us: int


@dataclasses.dataclass(frozen=True)
class Incident:
    """Something that a person should know of."""

    link: str
    kind: str
    detail: str
    state: str
    opened_us: int
    closed_us: int | None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A full read of a source, and why it was taken.

    Attributes:
      rows_read: so far, of about `rows_estimated`, None where nobody knows.
      rows_per_s: since it was begun or last gone on with. resumes: how often it was gone on with.
    """

    link: str
    state: str
    reason: str
    started_us: int
    finished_us: int | None
    rows_read: int = 0
    rows_estimated: int | None = None
    rows_per_s: float = 0.0
    resumes: int = 0

    @property
    def seconds_left(self) -> float | None:
        """Until all is read, at the rate so far; None: nobody knows."""
        if self.rows_estimated is None or not self.rows_per_s:
            return None
        return max(0, self.rows_estimated - self.rows_read) / self.rows_per_s


@dataclasses.dataclass(frozen=True)
class Pair:
    """How far emergencies of one source reached the primary and the source's own store.

    Attributes:
      newest: position of the newest emergency that one of them has, or None without any.
      primary_reached, local_reached: emergencies up to there are in the store; None: unknown.
      together: both have reached the newest emergency.
      waiting: the link that has not, or empty.
      one_sided_s: for how long at least, by the newest write of the other one.
      longest_s: the longest known in the period, by incidents.
      incidents: recorded so far; open_incidents: of them not closed.
    """

    source: str
    primary_link: str
    local_link: str
    newest: Position | None
    primary_reached: Position | None
    local_reached: Position | None
    together: bool
    waiting: str
    one_sided_s: float
    longest_s: float
    incidents: int
    open_incidents: int


@dataclasses.dataclass(frozen=True)
class AlarmCount:
    """How many alarms of one kind are open in a store, and how many there ever were, if asked."""

    store: str
    rule: int
    campus: str
    table: str
    column: str
    reason: str
    open: int
    ever: int | None = None


@dataclasses.dataclass(frozen=True)
class Tending:
    """What looks after one store while `run` runs.

    Attributes:
      judged_us, matched_us: of the last judgement by the rules of quality and of the last
        matching of patients, the oldest of its campuses; None: never.
      reviews_open: pairs of records that wait for a person.
    """

    store: str
    judged_us: int | None
    matched_us: int | None
    reviews_open: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One objective held against what was measured; `value` None: nothing to measure.

    Attributes:
      windows, windows_over: 10 s windows measured, and those over the limit by themselves.
      share_within: share of rows within the limit.
      blur: how much of `value` the log's clock may have added, in `unit`.
    """

    objective: str
    link: str
    lane: Lane | None
    limit: float
    value: float | None
    unit: str
    windows: int = 0
    windows_over: int = 0
    share_within: float | None = None
    blur: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where the log's clock is too coarse to tell."""
        if self.value is None or self.value <= self.limit:
            return True
        return False if self.value - self.blur > self.limit else None


@dataclasses.dataclass(frozen=True)
class TableMatch:
    """One campus's rows of one table in one store against the source, by content.

    Attributes:
      source_rows: harmonised rows of the source; store_rows: live rows of the store.
      missing, extra, different: rows that only the source has, only the store has, or that
        differ. Dead-lettered, held and moving rows are not among them.
      rotten: rows whose stored digest is not that of their content.
      refused: rows that differ because their change is a dead letter, or would be one.
      held: rows that differ because a truncate waits for a person.
      moving: rows that changed while they were compared.
      source_digest, store_digest: hexadecimal digests of the whole sets.
      keys: record ids by kind, at most a few, only where they were asked for.
    """

    store: str
    campus: str
    table: str
    source_rows: int
    store_rows: int
    missing: int = 0
    extra: int = 0
    different: int = 0
    rotten: int = 0
    refused: int = 0
    held: int = 0
    moving: int = 0
    source_digest: str = ""
    store_digest: str = ""
    keys: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not (self.missing or self.extra or self.different or self.rotten)


@dataclasses.dataclass(frozen=True)
class StoresMatch:
    """One campus's rows of one table in two stores.

    Attributes:
      rows, other_rows: live rows. live_equal: of the same content, refused rows aside.
      tombstones, other_tombstones: deletions since both stores have followed the log.
      tombstones_equal: of the same rows.
    """

    store: str
    other: str
    campus: str
    table: str
    rows: int
    other_rows: int
    live_equal: bool
    tombstones: int
    other_tombstones: int
    tombstones_equal: bool

    @property
    def equal(self) -> bool:
        return self.live_equal and self.tombstones_equal


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What reading every row of sources and stores showed.

    Attributes:
      unreachable: sources and stores that could not be read, with the reason.
      rows: read in all. seconds: it took.
    """

    tables: tuple[TableMatch, ...]
    stores: tuple[StoresMatch, ...]
    unreachable: tuple[str, ...]
    rows: int
    seconds: float

    @property
    def equal(self) -> bool:
        matches = (*self.tables, *self.stores)
        return not self.unreachable and bool(self.tables) and all(m.equal for m in matches)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the system can say about a period, and what it proves.

    Attributes:
      made_us: when. from_us, to_us: of the first and the last lag window, 0 if there is none.
      unreachable: ends that could not be asked: what they hold is not in here.
      gaps: windows that are not equal, earliest first; at most some for each link.
      comparison: None if contents were not compared.
    """

    made_us: int
    from_us: int
    to_us: int
    links: tuple[str, ...]
    health: tuple[Health, ...]
    lag: tuple[LaneLag, ...]
    points: tuple[LagPoint, ...]
    backlog: tuple[BacklogPoint, ...]
    conservation: tuple[Conservation, ...]
    completeness: tuple[Completeness, ...]
    gaps: tuple[Gap, ...]
    refused: tuple[Refused, ...]
    holds: tuple[Hold, ...]
    incidents: tuple[Incident, ...]
    snapshots: tuple[Snapshot, ...]
    pairs: tuple[Pair, ...]
    objectives: tuple[Measured, ...]
    unreachable: tuple[str, ...] = ()
    comparison: Comparison | None = None
    alarms: tuple[AlarmCount, ...] = ()
    tending: tuple[Tending, ...] = ()
    reconciliations: tuple[Standing, ...] = ()

    @property
    def total(self) -> Counts:
        """Changes of all links and lanes by outcome."""
        counts = Counts()
        for part in self.conservation:
            if part.lane is not None:
                counts = counts.plus(part.counts)
        return counts

    @property
    def law_holds(self) -> bool:
        """Whether every link has a ledger and every ledger balances."""
        known = {part.link for part in self.conservation}
        return known >= set(self.links) and all(part.balanced for part in self.conservation)

    @property
    def complete(self) -> bool:
        """Whether what the stores lack is sealed in dead letters, and no stretch is missing.

        A change that a store refused stays short in its manifest until its letter is replayed.
        """
        lacking = collections.Counter()
        for part in self.completeness:
            lacking[part.link] += part.source_changes - part.store_changes
        letters = collections.Counter()
        for refused in self.refused:
            if refused.reason not in CAPTURE_REASONS:
                letters[refused.link] += refused.open
        return (
            all(0 <= count <= letters[link] for link, count in lacking.items())
            and not any(part.different for part in self.completeness)
            and not any(part.islands for part in self.conservation)
        )

    @property
    def stores_equal(self) -> bool | None:
        """Whether contents are equal everywhere; None if they were not compared."""
        return None if self.comparison is None else self.comparison.equal

    @property
    def breaches(self) -> tuple[Measured, ...]:
        return tuple(measured for measured in self.objectives if measured.met is False)

    @property
    def blurred(self) -> tuple[Measured, ...]:
        """Objectives of which a log that tells commits in whole seconds leaves it open."""
        return tuple(measured for measured in self.objectives if measured.met is None)

    @property
    def objectives_met(self) -> bool | None:
        """Whether all are; None where none is seen to be broken and of some it cannot be told."""
        return False if self.breaches else None if self.blurred else True

    @property
    def sound(self) -> bool:
        """Whether the data are as they should be: what an exit code of 0 asserts.

        Lag is not part of it: late data are whole data.
        """
        return (
            not self.unreachable
            and self.law_holds
            and self.complete
            and self.stores_equal is not False
        )


def to_json(report: Report) -> str:
    """Returns the report as JSON: its fields, its verdict, no patient's data."""
    verdict = {
        "sound": report.sound,
        "law_holds": report.law_holds,
        "complete": report.complete,
        "stores_equal": report.stores_equal,
        "objectives_met": report.objectives_met,
    }
    data = {"version": VERSION, "verdict": verdict, "total": report.total._asdict()}
    return json.dumps(data | as_plain(report), ensure_ascii=False, indent=1)


def comparison_to_json(comparison: Comparison) -> str:
    """Returns a comparison as JSON."""
    data = {"version": VERSION, "equal": comparison.equal}
    return json.dumps(data | as_plain(comparison), ensure_ascii=False, indent=1)


def as_plain(value: typing.Any) -> typing.Any:
    """Returns dataclasses as dicts, with what their properties conclude, and tuples as lists."""
    if dataclasses.is_dataclass(value):
        plain = {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        for name in ("balanced", "equal", "fill", "met", "seconds_left"):
            if isinstance(getattr(type(value), name, None), property):
                plain[name] = as_plain(getattr(value, name))
        return plain
    if isinstance(value, Counts):
        return value._asdict()
    if isinstance(value, tuple | list):
        return [as_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: as_plain(part) for key, part in value.items()}
    return value


def to_csv(report: Report) -> dict[str, str]:
    """Returns a CSV file a section, by file name; times in ISO 8601, UTC."""
    sections = {
        "health": report.health,
        "lag": report.lag,
        "lag_windows": report.points,
        "backlog": report.backlog,
        "conservation": report.conservation,
        "completeness": report.completeness,
        "completeness_gaps": report.gaps,
        "dead_letters": report.refused,
        "holds": report.holds,
        "incidents": report.incidents,
        "snapshots": report.snapshots,
        "pairs": report.pairs,
        "objectives": report.objectives,
        "quality_alarms": report.alarms,
        "tending": report.tending,
        "reconciliations": report.reconciliations,
    }
    if report.comparison is not None:
        sections["compare_tables"] = report.comparison.tables
        sections["compare_stores"] = report.comparison.stores
    return {f"{name}.csv": _csv(rows) for name, rows in sections.items() if rows}


def _csv(rows: typing.Sequence[typing.Any]) -> str:
    flat = [_flat(as_plain(row)) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict) -> dict:
    """Lifts counts into the row and writes times as texts."""
    flat = {}
    for name, value in row.items():
        if name == "counts":
            flat |= value
        elif name == "keys":
            continue
        elif name.endswith("_us"):
            flat[name.removesuffix("_us")] = iso(value) if value else ""
        else:
            flat[name] = value
    return flat


def iso(us: int) -> str:
    """Returns µs since 1970 as ISO 8601 in UTC, to the millisecond."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    moment = epoch + datetime.timedelta(microseconds=us)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
