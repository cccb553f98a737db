"""Checks of how stores exchange clients' edits: policies without gaps, ways without ends."""

import collections

from runners.preflight.findings import Findings
from schemas.config import OFF, Config
from schemas.conflict_policy import load_conflict_rules
from schemas.errors import ConfigError


def check_exchange(config: Config) -> Findings:
    """Returns what keeps edits from reaching every store; asks no store."""
    found = Findings("exchange")
    try:
        rules = load_conflict_rules(config.conflict_rules)
    except ConfigError as error:
        found.error(str(error), f"correct {config.conflict_rules}.")
    else:
        days = rules.longest_outage_us / 86_400_000_000
        if config.forget_days is not None and config.forget_days < days:
            found.warning(
                f"forget_days is less than the longest outage of the conflict rules, {days:g}: "
                "deleted records are kept for that long",
                "raise forget_days, or lower longest_outage_days in the rules.",
            )
    if config.exchange == OFF or len(config.stores) < 2:
        return found
    asked_by = collections.defaultdict(set)
    for learner, asked in config.exchange_pairs():
        asked_by[asked].add(learner)
    for store in config.stores:
        reached = _reached(store, asked_by)
        missed = [name for name in config.stores if name not in reached]
        if missed:
            found.warning(
                f"edits at store {store} never come to {', '.join(missed)}",
                f"add a pair `{store}<>{missed[0]}`, or others that lead there, to `exchange`.",
            )
    return found


def _reached(store: str, asked_by: dict[str, set[str]]) -> set[str]:
    reached, todo = {store}, [store]
    while todo:
        new = asked_by[todo.pop()] - reached
        reached |= new
        todo += new
    return reached
