"""The verbs for concurrent edits: list, show and resolve conflicts; print the policies."""

import argparse
import contextlib
import datetime
import json

import psycopg
from rich.console import Console
from rich.table import Table

from pipelines.conflicts import LaidOut, Noted, chosen, lay_out, noted, open_at, resolve
from runners.patients import may_reveal
from schemas.config import Config, load
from schemas.conflict_policy import ConflictRules, load_conflict_rules
from schemas.conflict_words import policy_words
from schemas.errors import ConfigError
from schemas.hlc import us_of
from schemas.siblings import Entry
from transforms.deliver import ledger

_ID_DIGITS = 10
_ROWS_MAX = 200  # A terminal shows no more; `--json` has all.
_STAFF = ("who", "role", "why")


def policies(options: argparse.Namespace) -> int:
    """Prints what settles concurrent edits, for doctors to read and sign.

    Those of the configuration; without one, the packaged ones.
    """
    named = load(options.config).conflict_rules if options.config is not None else "default"
    print(policy_words(load_conflict_rules(named), options.language), end="")
    return 0


def conflicts(options: argparse.Namespace) -> int:
    """Lists, shows or resolves conflicts of one store.

    Content is printed by `show --reveal` only. Exit 1 where the store cannot be used.
    """
    config = load(options.config)
    rules = load_conflict_rules(config.conflict_rules)
    with contextlib.closing(open_at(config, options.store)) as conn:
        try:
            found = noted(conn, options.all or options.action == "show")
            if options.action == "list":
                return _list(found, options)
            picked = chosen(found, options.conflict)
            if not picked:
                raise ConfigError(f"conflicts {options.action}: names no conflict.")
            if options.action == "show":
                return _show(config, conn, picked, rules, options)
            return _resolve(conn, picked, rules, options)
        except psycopg.Error as error:
            raise ledger.unavailable(f"store {options.store}", error) from None


def _list(found: list[Noted], options: argparse.Namespace) -> int:
    if options.conflict:
        found = chosen(found, options.conflict)
    if options.json:
        print(json.dumps({"conflicts": [_plain(one) for one in found]}, indent=2))
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    pairs = (("id", "state"), ("table", "group"), ("alarm", "asked"), ("rule", "versions"))
    for pair in (*pairs, ("since", "UTC")):
        table.add_column("\n".join(pair), overflow="fold")
    for one in found[:_ROWS_MAX]:
        plain = _plain(one) | {"id": one.conflict_id[:_ID_DIGITS]}
        since = plain["since"]
        table.add_row(
            *(f"{plain[a]}\n{plain[b]}" for a, b in pairs), f"{since[:10]}\n{since[11:19]}"
        )
    console = Console(highlight=False)
    if found:
        console.print(table)
    waiting = sum(one.state == "open" for one in found)
    console.print(f"{waiting:,} conflicts wait for a person")
    return 0


def _plain(one: Noted) -> dict[str, object]:
    """A conflict without content: a record's number may be a patient's, so it is not in."""
    return {
        "id": one.conflict_id,
        "table": one.key.table,
        "campus": one.key.campus,
        "group": one.group,
        "rule": one.rule,
        "alarm": one.alarm,
        "asked": one.assignee,
        "versions": one.versions,
        "state": one.state,
        "since": one.opened_at.astimezone(datetime.UTC).isoformat(),
    }


def _show(
    config: Config,
    conn: psycopg.Connection,
    picked: list[Noted],
    rules: ConflictRules,
    options: argparse.Namespace,
) -> int:
    if options.reveal:
        may_reveal(config, conn, options.json, "conflicts show --reveal")
    shown = [found for one in picked if (found := lay_out(conn, one, rules))]
    if options.json:
        plain = [_laid_out(one, options.reveal) for one in shown]
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        for one in shown:
            _print(one, options.reveal)
    return 0 if len(shown) == len(picked) else 1


def _laid_out(one: LaidOut, reveal: bool) -> dict[str, object]:
    return {
        **_plain(one.noted),
        "record": one.noted.key.record_id if reveal else None,
        "shown": one.shown,
        "seen_now": dict(one.values) if reveal else None,
        "versions": [_version(entry, reveal) for entry in one.versions],
        "history": [_version(entry, reveal) for entry in one.history],
        "asked_out": list(one.drops) if reveal else len(one.drops),
    }


def _version(entry: Entry, reveal: bool) -> dict[str, object]:
    stamp = entry.stamp
    plain = {
        "actor": entry.dot.actor,
        "count": entry.dot.counter,
        "author": stamp.editor,
        "role": stamp.role,
        "lane": str(stamp.lane),
        "time": _time(stamp.hlc),
        "decides": stamp.decides,
    }
    return plain | {"reason": stamp.reason, "values": dict(entry.values)} if reveal else plain


def _time(hlc: int) -> str:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (epoch + datetime.timedelta(microseconds=us_of(hlc))).isoformat(timespec="seconds")


def _print(one: LaidOut, reveal: bool) -> None:
    console = Console(markup=False, highlight=False)
    plain = _plain(one.noted)
    console.print(
        f"{plain['id']}  {plain['table']} of {plain['campus']}, {plain['group']}: "
        f"{plain['state']} by {plain['rule']}, {plain['asked']} is asked"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    facts = [_version(entry, reveal) for entry in one.versions]
    for i, _ in enumerate(facts, 1):
        table.add_column(f"{i}{' (seen now)' if i == one.shown else ''}", overflow="fold")
    for name in ("author", "role", "lane", "time", "actor", *(["reason"] if reveal else [])):
        table.add_row(name, *(str(fact[name]) for fact in facts))
    if reveal:
        for column in one.versions[0].values:
            values = [fact["values"].get(column) for fact in facts]
            table.add_row(column, *("∅" if value is None else str(value) for value in values))
    console.print(table)
    if one.drops and reveal:
        console.print(f"  somebody wants out: {', '.join(one.drops)}")
    console.print(f"  {len(one.history)} versions in all are kept")
    console.print()


def _resolve(
    conn: psycopg.Connection, picked: list[Noted], rules: ConflictRules, options: argparse.Namespace
) -> int:
    given = dict(word.partition("=")[::2] for word in options.set)
    if len(picked) != 1 or (options.choose is None) == (not given):
        raise ConfigError(
            "conflicts resolve: takes one conflict, and --choose N or --set COLUMN=VALUE. "
            "Remedy: `conflicts show ID --reveal` numbers the versions."
        )
    who = tuple((getattr(options, name) or "").strip() for name in _STAFF)
    if not all(who):
        raise ConfigError(
            "conflicts resolve: a decision is somebody's. Remedy: add --who STAFF --role ROLE "
            '--why "...".'
        )
    resolve(conn, picked[0], rules, who, options.choose, given)
    if options.json:
        print(json.dumps({"resolved": picked[0].conflict_id}))
    else:
        print(f"resolved: {picked[0].conflict_id}")
    return 0
