"""Many seeds of edits, cuts, crashes and wrong clocks: all stores agree and no edit is lost.

`CAMPUS_SYNC_SEEDS=10000 python -m pytest tests/simulation -q` runs as many seeds;
`CAMPUS_SYNC_FIRST_SEED` says where they begin.
"""

import collections
import os

import pytest

from schemas.conflict_policy import ORDER
from tests.simulation import history as h
from tests.simulation.mutants import MUTANTS, EagerDiscard
from tests.simulation.shrink import faults_in, report, shrunk
from tests.simulation.world import Merge, Plan, World

SEEDS = int(os.environ.get("CAMPUS_SYNC_SEEDS", "500"))
FIRST = int(os.environ.get("CAMPUS_SYNC_FIRST_SEED", "0"))
_PARTS = 10  # A failure stops its part only.
_MUTANT_SEEDS_MAX = 800


@pytest.mark.parametrize("part", range(_PARTS))
def test_stores_agree_and_nothing_is_lost(part):
    for seed in range(FIRST + part, FIRST + SEEDS, _PARTS):
        plan = Plan.of(seed)
        if faults_in(plan):
            pytest.fail(report(plan))


@pytest.mark.parametrize("stores", [3, 5])
def test_three_and_five_stores_agree_too(stores):
    for seed in range(FIRST, FIRST + max(20, SEEDS // 10)):
        plan = Plan.of(seed, stores)
        if faults_in(plan):
            pytest.fail(report(plan))


def test_the_seeds_meet_what_they_are_for():
    met = collections.Counter()

    class Counting(Merge):
        def show(self, record, table):
            shown = super().show(record, table)
            met.update(f"{conflict.group} by {conflict.rule}" for conflict in shown.conflicts)
            return shown

    for seed in range(200):
        for event in World(Plan.of(seed), Counting()).run().events:
            met[type(event).__name__] += 1
            if isinstance(event, h.Look):
                met["removal asked"] += any(seen.drops for seen in event.groups.values())
            elif isinstance(event, h.Edit):
                met["decision"] += event.decides
                met["form saved late"] += event.stale
                met["archived"] += event.archived
                met["deletion"] += event.wrote["row"] is True
                met["clock distrusted"] += bool(event.distrusted)
                met["second incarnation"] += not event.actor.endswith(".1")
    wanted = [kind.__name__ for kind in h.Event.__args__]
    wanted += ["removal asked", "decision", "form saved late", "archived", "deletion"]
    wanted += ["clock distrusted", "second incarnation", "status by states", "allergies by union"]
    wanted += [f"plan by {rule}" for rule in (*ORDER, "person")]
    wanted += [f"{group} by person" for group in ("row", "phone", "identity", "blood", "opinion")]
    assert not [what for what in wanted if not met[what]], dict(met)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_checker_finds_each_known_fault(mutant: type[Merge]):
    for seed in range(_MUTANT_SEEDS_MAX):
        if faults_in(Plan.of(seed), mutant()):
            return
    pytest.fail(f"{mutant.__name__} was not found in {_MUTANT_SEEDS_MAX} seeds")


def test_a_failure_is_told_by_its_seed_and_a_short_run():
    plan = next(p for p in map(Plan.of, range(300)) if faults_in(p, EagerDiscard()))
    text = report(plan, EagerDiscard())
    assert f"seed {plan.seed}," in text
    assert len(text.splitlines()) < 40
    again = report(plan, EagerDiscard())
    assert again == text


def test_the_same_plan_is_the_same_run():
    plan = Plan.of(7)
    assert World(plan).run().events == World(plan).run().events
    assert len(shrunk(plan, lambda fewer: len(fewer.steps) >= 3).steps) == 3
