"""The verb for changes that were refused: list them, show their content, replay them."""

import argparse
import collections
import datetime
import json
import sys

from rich.console import Console
from rich.table import Table

from pipelines.replay import (
    STILL_OPEN,
    Became,
    Filed,
    Result,
    chosen,
    letters,
    open_letters,
    replay,
)
from schemas.batches import Op
from schemas.config import Config, load
from schemas.errors import ConfigError

_ID_DIGITS = 10
_ROWS_MAX = 200  # A terminal shows no more; `--json` has all.


def dead_letters(options: argparse.Namespace) -> int:
    """Lists, shows or replays dead letters.

    Exit 1 where a store cannot be reached, a letter is damaged or a replayed one stays open.
    """
    config = load(options.config)
    found, unreachable = letters(config)
    for what in unreachable:
        print(f"campus-sync: {what} cannot be reached", file=sys.stderr)
    if options.action == "list":
        _list([one for one in found if one.state == "open"], options)
        return 1 if unreachable else 0
    if options.action == "show":
        return _show(config, found, options)
    wanted = chosen(found, options.letter) if options.letter else None
    with Console(stderr=True).status("replaying"):
        results = list(replay(config, found, wanted))
    _print_results(results, options.json)
    return 1 if unreachable or any(result.became in STILL_OPEN for result in results) else 0


def _list(filed: list[Filed], options: argparse.Namespace) -> None:
    """Prints letters without their content, and how many there are by reason."""
    if options.letter:
        filed = chosen(filed, options.letter)
    counts = collections.Counter(one.letter.reason for one in filed)
    if options.json:
        plain = {"letters": [_plain(one) for one in filed], "reasons": dict(counts.most_common())}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    # Two lines a letter, so that a terminal of 80 columns holds it.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    pairs = (("id", "key"), ("link", "lane"), ("table", "column"), ("position", "op"))
    for pair in (*pairs, ("reason", "state"), ("committed", "UTC")):
        table.add_column("\n".join(pair), overflow="fold")
    for one in filed[:_ROWS_MAX]:
        plain = _plain(one)
        plain |= {name: plain[name][:_ID_DIGITS] for name in ("id", "key")}
        cells = [f"{plain[upper]}\n{plain[lower]}" for upper, lower in pairs]
        when = plain["committed"]
        table.add_row(*cells, f"{plain['reason']}\n{plain['state']}", f"{when[:10]}\n{when[11:19]}")
    console = Console()
    if filed:
        console.print(table)
    if len(filed) > _ROWS_MAX:
        console.print(f"and {len(filed) - _ROWS_MAX:,} more; --json has all")
    console.print(f"{len(filed):,} open dead letters")
    for reason, count in counts.most_common():
        console.print(f"{count:>8,}  {reason}")


def _plain(one: Filed) -> dict[str, str]:
    """A letter in words, without its content; times in UTC."""
    letter = one.letter
    try:
        op = Op(letter.op).name.lower()
    except ValueError:
        op = chr(letter.op)
    return {
        "id": letter.letter_id,
        "link": one.link,
        "lane": str(one.lane),
        "table": letter.src_table,
        "position": str(one.position),
        "op": op,
        "reason": letter.reason,
        "column": letter.column,
        "committed": _time(letter.commit_us),
        "key": letter.key_id,
        "state": one.state,
    }


def _time(us: int) -> str:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (epoch + datetime.timedelta(microseconds=us)).isoformat(timespec="microseconds")


def _show(config: Config, found: list[Filed], options: argparse.Namespace) -> int:
    """Prints what letters hold, to a person who asked for it by name and nobody else."""
    if not options.letter:
        raise ConfigError(
            "dead-letters show: names no letter. Remedy: give ids from `dead-letters list`."
        )
    if not options.json and not sys.stdout.isatty():
        raise ConfigError(
            "dead-letters show: prints a patient's data, and standard output is no terminal. "
            "Remedy: run it in a terminal, or ask for --json and guard what you make of it."
        )
    shown, damaged = [], 0
    for one, content in open_letters(config, chosen(found, options.letter)):
        if isinstance(content, Exception):
            damaged += 1
            print(f"campus-sync: {_damaged(one)}", file=sys.stderr)
            continue
        shown.append((one, content.row))
    if options.json:
        plain = [{**_plain(one), "row": row} for one, row in shown]
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        console = Console(markup=False, highlight=False)
        for one, row in shown:
            for name, value in (*_plain(one).items(), ("", "")):
                console.print(f"{name:12} {value}".rstrip())
            for name, value in row.items():
                console.print(f"    {name:24} {'∅' if value is None else value}")
            console.print()
    return 1 if damaged else 0


def _damaged(one: Filed) -> str:
    return (
        f"dead letter {one.letter.letter_id[:_ID_DIGITS]} of {one.link} is not as it was sealed "
        "and stays closed. Remedy: restore sync.dead_letter from a backup of the store, or make "
        "the source write the row again: a newer change settles the letter."
    )


def _print_results(results: list[Result], as_json: bool) -> None:
    """Prints what became of each letter that stays open, and how many did of each kind."""
    counts = collections.Counter(result.became for result in results)
    if as_json:
        plain = [
            {
                **_plain(result.filed),
                "became": str(result.became),
                "reason_now": result.reason,
                "column_now": result.column,
            }
            for result in results
        ]
        print(json.dumps({"letters": plain, "counts": counts}, indent=2, ensure_ascii=False))
    for result in results:
        if result.became is Became.DAMAGED:
            print(f"campus-sync: {_damaged(result.filed)}", file=sys.stderr)
    for remedy in dict.fromkeys(result.remedy for result in results if result.remedy):
        print(f"campus-sync: {remedy}", file=sys.stderr)
    if as_json:
        return
    console = Console(highlight=False)
    refused = collections.Counter(
        (result.filed.link, result.filed.letter.src_table, result.reason, result.column)
        for result in results
        if result.became is Became.REFUSED
    )
    if refused:
        table = Table("link", "table", "reason", "column", "letters", title="refused again")
        for place, count in refused.most_common():
            table.add_row(*place, f"{count:,}")
        console.print(table)
    console.print(f"{len(results):,} dead letters tried" if results else "no dead letter")
    for became in Became:
        if counts[became]:
            console.print(f"{counts[became]:>8,}  {became}")
