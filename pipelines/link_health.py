"""How one link does now, by what its source and its store say."""

from pipelines.sla_facts import SourceFacts, StoreFacts
from schemas.batches import Lane
from schemas.config import Config, Link, Retention
from schemas.positions import (
    NEW_LOG_REMEDY,
    Position,
    distance,
    generation_of,
    own_position,
)
from schemas.reports import SETS_APART, SETS_WAIT, Conservation, Health, Risk, State
from transforms.capture.retention import seconds_left

# Heartbeats move a link's watermark every second or so, whoever reads the log for it.
_FOLLOWS_MS = 15_000
# Source and store are not looked at in one moment: what was committed just now may be seen in
# the store alone.
_SEEN_BY_US = 10_000_000


def link_health(
    link: Link,
    source: SourceFacts | None,
    store: StoreFacts | None,
    config: Config,
    now_us: int,
    units_per_s: float | None = None,
) -> Health:
    """Returns how a link does.

    Args:
      source, store: None for one that could not be reached.
      units_per_s: at which the source's log grows, None if that is not known.
    """
    ledger = None
    if store is not None:
        own = (part for part in store.ledgers if part.link == link.name)
        ledger = next((part for part in own if part.lane is Lane.ROUTINE), None)
    slot = source.slots.get(link.slot) if source else None
    backlog = lag_ms = None
    if source is not None and ledger is not None:
        applied = Position(ledger.lsn, ledger.seq).acknowledgeable_lsn
        left = distance(applied, source.wal_lsn)
        backlog = (
            left // source.units_per_byte if source.units_per_byte else (0 if not left else None)
        )
    if ledger is not None and ledger.watermark_us:
        # The watermark of a source at rest stands still with its log: nothing is missing then.
        clock_us = source.clock_us if source else now_us
        lag_ms = 0 if backlog == 0 else max(0, clock_us - ledger.watermark_us) // 1000
    state, why = _judge(link, source, store, slot, ledger, lag_ms, config.objectives)
    if sets := _sets(link, store):
        state = State.BEHIND if state is State.UP else state
        why = f"{sets} ({why})" if why else sets
    left = _seconds_left(link, source, ledger, units_per_s or 0.0)
    return Health(
        link=link.name,
        state=state,
        why=why,
        backlog_bytes=backlog,
        retained_bytes=slot.retained_bytes if slot else None,
        watermark_lag_ms=lag_ms,
        slot=slot.wal_status if slot else "missing" if source else None,
        slot_active=slot.active if slot else None,
        seconds_left=left,
        log_risk=risk_of(left, config.retention),
    )


def _rewound(source: SourceFacts, ledger: Conservation | None) -> bool:
    """Whether the source's log does not hold what was applied of it: it is another one."""
    if ledger is None or source.clock_us - ledger.commit_us < _SEEN_BY_US:
        return False
    return ledger.lsn > source.wal_lsn


def _follows(source: SourceFacts, lag_ms: int | None) -> bool:
    """Whether it takes what another link of its source reads (ADR 0018): its own slot is idle."""
    read = any(slot.active for slot in source.slots.values())
    return read and lag_ms is not None and lag_ms < _FOLLOWS_MS


def _sets(link: Link, store: StoreFacts | None) -> str:
    """Says what keeps the link's sets from being written to all stores as one, or ""."""
    for one in () if store is None else store.incidents:
        if one.link == link.name and one.state == "open" and one.kind in (SETS_WAIT, SETS_APART):
            return one.detail
    return ""


def risk_of(seconds_left: float | None, limits: Retention) -> Risk:
    """Returns what a time left means by the configured thresholds."""
    if seconds_left is None or seconds_left > limits.warn_s:
        return Risk.NONE
    return Risk.WARNING if seconds_left > limits.critical_s else Risk.CRITICAL


def _seconds_left(
    link: Link, source: SourceFacts | None, ledger: Conservation | None, units_per_s: float
) -> float | None:
    if source is None or source.keeping is None or ledger is None:
        return None
    generation = generation_of(source.wal_lsn)
    applied = own_position(generation, Position(ledger.lsn, ledger.seq))
    applied_us = max(ledger.watermark_us, ledger.commit_us)
    kept = source.keeping.retention(link.slot, applied, applied_us, units_per_s)
    return None if kept is None else seconds_left(kept)


def _judge(link, source, store, slot, ledger, lag_ms, objectives) -> tuple[State, str]:
    if store is None:
        return State.DOWN, f"store {link.store} cannot be reached"
    if source is None:
        return State.DOWN, f"source {link.source} cannot be reached"
    if slot is None and ledger is None:
        return State.DOWN, "never started; `campus-sync run` begins with a snapshot"
    if _rewound(source, ledger):
        return State.DOWN, f"its log ends before what was applied of it. {NEW_LOG_REMEDY}"
    if slot is None or slot.wal_status == "lost":
        return State.GAP, "its log is lost; `campus-sync run` fills the gap by a snapshot"
    running = [part for part in store.snapshots if part.state == "running"]
    if any(part.link == link.name for part in running):
        return State.GAP, "a snapshot is being read"
    if not slot.active and not _follows(source, lag_ms):
        return State.DOWN, "nobody reads its slot; start `campus-sync run`"
    if ledger is None:
        return State.GAP, "nothing has been applied yet"
    if lag_ms is not None and lag_ms > objectives.routine_p99_s * 1000:
        return State.BEHIND, f"later than the objective of {objectives.routine_p99_s:g} s"
    if ledger.islands:
        return State.BEHIND, "a stretch is missing and being sent again"
    return State.UP, ""
