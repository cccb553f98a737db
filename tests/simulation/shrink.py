"""Make a failing run small: leave out steps for as long as it still fails."""

import collections.abc
import hashlib

from schemas.siblings import UNSEEN, record_to_json
from tests.simulation.checker import Fault, faults_of
from tests.simulation.history import transcript
from tests.simulation.world import Merge, Plan, World

_RUNS_MAX = 400


def faults_in(plan: Plan, merge: Merge | None = None) -> list[Fault]:
    """Returns what is wrong in a plan's run."""
    world = World(plan, merge).run()
    return faults_of(world.events) + _digest_faults(world)


def _digest_faults(world: World) -> list[Fault]:
    """Returns the records that two stores hold differently, to the letter, at the end."""
    faults = []
    for key in world.plan.keys:
        held = [store.records.get(key, UNSEEN) for store in world.stores.values()]
        digests = {hashlib.sha256(record_to_json(r).encode()).digest() for r in held}
        if len(digests) > 1:
            faults.append(Fault("other digest", len(world.events) - 1, key, key[1]))
    return faults


def shrunk(plan: Plan, fails: collections.abc.Callable[[Plan], bool]) -> Plan:
    """Returns a plan that still fails and of whose steps none, most times, can be left out."""
    size, runs = max(1, len(plan.steps) // 2), 0
    while size and runs < _RUNS_MAX:
        start = 0
        while start < len(plan.steps) and runs < _RUNS_MAX:
            fewer = plan.without(start, start + size)
            runs += 1
            if fails(fewer):
                plan = fewer
            else:
                start += size
        size //= 2
    return plan


def report(plan: Plan, merge: Merge | None = None) -> str:
    """Returns the seed of a failing plan, what is wrong, and the shortest run that shows it."""
    kinds = {fault.kind for fault in faults_in(plan, merge)}
    small = shrunk(
        plan, lambda p: not kinds.isdisjoint(fault.kind for fault in faults_in(p, merge))
    )
    world = World(small, merge).run()
    faults = faults_of(world.events) + _digest_faults(world)
    first = next(fault for fault in faults if fault.kind in kinds)
    return (
        f"seed {plan.seed}, {plan.stores} stores in a {plan.shape}: {first.kind}: {first.what}\n"
        f"{len(small.steps)} of {len(plan.steps)} steps suffice; the run until then:\n"
        f"{transcript(world.events[: first.event + 1], first.key)}"
    )
