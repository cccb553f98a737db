"""The verb for data quality: judge the stores, list alarms, tell the rules."""

import argparse
import collections
import dataclasses
import json
import sys

from rich.console import Console
from rich.table import Table

from pipelines.quality import Alarm, StoreQuality, check_stores, gather_alarms
from runners.upkeep import rules_of
from schemas.config import load
from schemas.quality_rules import QualityRules, load_quality_rules
from schemas.reports import AlarmCount

_ROWS_MAX = 100  # Alarms that a terminal shows; `--json` has all.


def quality(options: argparse.Namespace) -> int:
    """Lists alarms, tells the rules, or judges every store now.

    `options`: `action` (list, rules or check), `rule` (numbers, for list), `config`, `json`.
    Exit 1 where a store cannot be reached.
    """
    config = load(options.config)
    rules = load_quality_rules(rules_of(config.quality_rules))
    if options.action == "rules":
        _print_rules(rules, options.json)
        return 0
    if options.action == "check":
        with Console(stderr=True).status("judging the stores"):
            found = check_stores(config, rules)
        _print_checked(found, options.json)
        return 1 if any(store.why for store in found) else 0
    limit = None if options.json else _ROWS_MAX
    alarms, counts, unreachable = gather_alarms(config, options.rule or None, limit)
    for what in unreachable:
        print(f"campus-sync: {what}", file=sys.stderr)
    _print_alarms(rules, alarms, counts, options)
    return 1 if unreachable else 0


def _print_alarms(
    rules: QualityRules, alarms: list[Alarm], counts: list[AlarmCount], options
) -> None:
    waiting = {rule.rule: rule.waits for rule in rules.rules if rule.waits}
    if options.json:
        plain = {
            "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
            "counts": [dataclasses.asdict(count) for count in counts],
            "not_evaluated": waiting,
        }
        print(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    # What every store has is one alarm: the stores' counts are told together.
    together: dict[tuple, list[AlarmCount]] = collections.defaultdict(list)
    for count in counts:
        if options.rule and count.rule not in options.rule:
            continue
        together[count.rule, count.campus, count.table, count.column, count.reason].append(count)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "campus", "table.column", "reason"):
        table.add_column(name, overflow="fold")
    for name in ("open", "ever"):
        table.add_column(name, justify="right")
    for (rule, campus, name, column, reason), parts in sorted(together.items()):
        numbers = (max(part.open for part in parts), max(part.ever for part in parts))
        table.add_row(str(rule), campus, f"{name}.{column}", reason, *(f"{n:,}" for n in numbers))
    if together:
        console.print(table)
    total = sum(max(part.open for part in parts) for parts in together.values())
    console.print(f"{total:,} open alarms")
    if options.rule:
        for alarm in alarms[:_ROWS_MAX]:
            console.print(
                f"{alarm.store}: {alarm.campus} {alarm.table} {alarm.record_id}"
                f" {alarm.column}: {alarm.reason}"
            )
    for rule, why in sorted(waiting.items()):
        console.print(f"rule {rule} is not evaluated, or not wholly: {why}", style="dim")


def _print_rules(rules: QualityRules, as_json: bool) -> None:
    if as_json:
        plain = [rule.model_dump(exclude_defaults=True) for rule in rules.rules]
        print(json.dumps({"rules": plain}, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, markup=False)
    for rule in rules.rules:
        console.print(f"{rule.rule:>2}  {rule.title} [{rule.source}]")
        for check in rule.checks:
            console.print(f"      {check.kind}: {check.reason}")
        if rule.waits:
            console.print(f"      waits: {rule.waits}")
    for campus, override in rules.overrides.items():
        changed = [*(f"{reason} off" for reason in override.off)]
        changed += [f"{check.reason} replaced" for check in override.checks]
        console.print(f"campus {campus}: {', '.join(changed) or 'as all'}")


def _print_checked(found: list[StoreQuality], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(store) for store in found], indent=2))
        return
    for store in found:
        if store.why:
            print(f"campus-sync: store {store.store}: {store.why}", file=sys.stderr)
        for part in store.checked:
            scope = "everything" if part.whole else "what changed"
            print(
                f"{store.store}: {part.campus}, {scope}: {part.patients:,} patients,"
                f" {part.found:,} alarms, {part.settled:,} settled"
            )
