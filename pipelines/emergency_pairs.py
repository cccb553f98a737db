"""Whether an emergency is in both of its stores, and since when it is not (ADR 0006)."""

from collections.abc import Sequence

from pipelines.sla_facts import StoreFacts
from schemas.batches import Lane
from schemas.config import PRIMARY, Config
from schemas.positions import START, Position
from schemas.reports import ONE_SIDED, Conservation, Incident, Pair


class PairWatch:
    """Decides when an emergency that only one of two stores has is an incident (ADR 0006).

    Not by the newest emergency, which is always young under load: by a position that the
    waiting store must reach within the objective of when the other one was seen there.
    """

    def __init__(self, pair_s: float):
        self._pair_us = round(pair_s * 1e6)
        self._wanted: dict[str, tuple[str, Position, int]] = {}

    def late(self, pair: Pair, now_us: int) -> bool:
        """Whether the pair has been one-sided for too long; to be asked again and again."""
        if pair.together:
            self._wanted.pop(pair.source, None)
            return False
        reached = pair.primary_reached if pair.waiting == pair.primary_link else pair.local_reached
        link, wanted, since_us = self._wanted.get(pair.source, ("", START, 0))
        if link != pair.waiting or (reached is not None and reached >= wanted):
            wanted, since_us = pair.newest, now_us
        self._wanted[pair.source] = (pair.waiting, wanted, since_us)
        return now_us - since_us > self._pair_us


def pairs_of(config: Config, stores: dict[str, StoreFacts], now_us: int) -> tuple[Pair, ...]:
    """Returns the pair of every source that has a local store and a primary link."""
    names = {link.name for link in config.links()}
    incidents = [part for part in incidents_of(stores) if part.kind == ONE_SIDED]
    pairs = []
    for source in config.sources:
        local_store = config.local_store(source)
        primary, local = f"{source}>{PRIMARY}", f"{source}>{local_store}"
        if {primary, local} <= names:
            own = [part for part in incidents if part.link in (primary, local)]
            ledgers = {primary: stores.get(PRIMARY), local: stores.get(local_store)}
            pairs.append(_pair(source, ledgers, own, config.objectives.pair_s, now_us))
    return tuple(pairs)


def _pair(
    source: str,
    stores: dict[str, StoreFacts | None],
    incidents: Sequence[Incident],
    pair_s: float,
    now_us: int,
) -> Pair:
    """Returns one pair; `stores` are what is known of its two links' stores, primary first."""
    reached: dict[str, Position | None] = {}
    newest: Conservation | None = None
    for link, facts in stores.items():
        own = [part for part in (facts.ledgers if facts else ()) if part.link == link]
        # The routine lane is complete: an emergency that it has passed has arrived too.
        reached[link] = max((_place(part) for part in own), default=None)
        for part in own:
            if part.lane is Lane.EMERGENCY and (newest is None or _place(part) > _place(newest)):
                newest = part
    waiting = ""
    if newest is not None:
        behind = [x for x, at in reached.items() if at is None or at < _place(newest)]
        waiting = behind[0] if behind else ""
    one_sided_s = max(0.0, (now_us - newest.updated_us) / 1e6) if waiting else 0.0
    lasted_s = [((p.closed_us or now_us) - p.opened_us) / 1e6 + pair_s for p in incidents]
    primary, local = reached
    return Pair(
        source=source,
        primary_link=primary,
        local_link=local,
        newest=None if newest is None else _place(newest),
        primary_reached=reached[primary],
        local_reached=reached[local],
        together=not waiting,
        waiting=waiting,
        one_sided_s=one_sided_s,
        longest_s=max([one_sided_s, *lasted_s]),
        incidents=len(incidents),
        open_incidents=sum(part.state == "open" for part in incidents),
    )


def _place(ledger: Conservation) -> Position:
    return Position(ledger.lsn, ledger.seq)


def incidents_of(stores: dict[str, StoreFacts]) -> tuple[Incident, ...]:
    found = {incident for facts in stores.values() for incident in facts.incidents}
    return tuple(sorted(found, key=lambda part: (part.opened_us, part.link, part.kind)))
