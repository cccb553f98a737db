"""The verb for one patient's records at all campuses: match, review, link, unlink, show."""

import argparse
import dataclasses
import getpass
import json
import sys

import psycopg
from rich.console import Console
from rich.table import Table

from pipelines import empi
from runners.upkeep import rules_of
from schemas.clocks import wall_clock_us
from schemas.config import Config, load
from schemas.errors import ConfigError
from schemas.patient_matching import load_matching_rules
from transforms.seal_dead_letters import Sealer

_ID_DIGITS = 10
_ROWS_MAX = 200  # A terminal shows no more; `--json` has all.


def patients(options: argparse.Namespace) -> int:
    """Matches patients, lists pairs to decide, decides them, or shows a person.

    `options`: `action` (match, review, link, unlink or show), `what` (words), `who`, `why`,
    `reveal`, `config`, `json`. Names and numbers of patients are printed by `show --reveal` only.
    Exit 1 where a store cannot be reached.
    """
    config = load(options.config)
    if options.action == "match":
        return _match(config, options.json)
    with empi.primary(config) as conn:
        if options.action == "review":
            return _review(conn, options.json)
        if options.action == "show":
            return _show(config, conn, options)
        return _decide(config, conn, options)


def _match(config: Config, as_json: bool) -> int:
    with Console(stderr=True).status("matching patients"):
        found = empi.link_stores(config, load_matching_rules(rules_of(config.patient_matching)))
    if as_json:
        print(json.dumps([dataclasses.asdict(store) for store in found], indent=2))
    for store in found:
        if store.why:
            print(f"campus-sync: store {store.store}: {store.why}", file=sys.stderr)
        elif not as_json:
            done = store.linked
            print(
                f"{store.store}: {done.changed:,} patients changed, {done.links:,} links,"
                f" {done.unlinks:,} undone, {done.reviews:,} pairs to review"
            )
    return 1 if any(store.why for store in found) else 0


def _review(conn: psycopg.Connection, as_json: bool) -> int:
    """Prints the pairs that wait, by the review's id: whose they are is `show`'s to tell."""
    reviews = empi.open_reviews(conn)
    plain = [
        {
            "id": one.review_id if as_json else one.review_id[:_ID_DIGITS],
            "campuses": f"{one.pair[0]}, {one.pair[2]}",
            "score": round(one.score, 3),
            "why": one.why,
            "evidence": one.evidence,
            "noted_at": one.noted_at,
        }
        for one in reviews
    ]
    if as_json:
        print(json.dumps({"reviews": plain}, indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "campuses", "score", "why", "evidence"):
        table.add_column(name, overflow="fold")
    for row in plain[:_ROWS_MAX]:
        words = ", ".join(f"{field} {what}" for field, what in row["evidence"].items())
        table.add_row(row["id"], row["campuses"], f"{row['score']:.2f}", row["why"], words)
    if plain:
        console.print(table)
    console.print(f"{len(plain):,} pairs wait for a person")
    return 0


def _decide(config: Config, conn: psycopg.Connection, options: argparse.Namespace) -> int:
    kind, words = options.action, options.what
    if not options.why or not options.why.strip():
        raise ConfigError(f'patients {kind}: needs a reason. Remedy: add --why "...".')
    if kind == "unlink" and len(words) == 1 and "/" in words[0]:
        pairs = empi.pairs_with_person(conn, empi.record_of(words[0]))
        if not pairs:
            raise ConfigError("patients unlink: this record has a person of its own already.")
    else:
        pairs = [empi.chosen_pair(conn, words)]
    if any(pair[:2] == pair[2:] for pair in pairs):
        raise ConfigError(f"patients {kind}: a record is given twice.")
    who = options.who or getpass.getuser()
    missed = empi.decide(config, kind, pairs, who, options.why.strip(), wall_clock_us())
    for what in missed:
        print(f"campus-sync: {what}: it learns of this later", file=sys.stderr)
    found = empi.link_stores(config, load_matching_rules(rules_of(config.patient_matching)))
    moved = max((store.linked.moved for store in found if store.linked), default=0)
    if options.json:
        print(json.dumps({"decided": kind, "pairs": len(pairs), "moved": moved}))
    else:
        print(f"{kind}: {len(pairs)} pairs decided, {moved} records have another person now")
    return 1 if missed or any(store.why for store in found) else 0


def _show(config: Config, conn: psycopg.Connection, options: argparse.Namespace) -> int:
    if len(options.what) != 1:
        raise ConfigError("patients show: names no person. Remedy: give its id or CAMPUS/PATIENT.")
    if options.reveal:
        may_reveal(config, conn, options.json, "patients show --reveal")
    person = empi.person(conn, options.what[0])
    number = {(row[0], row[1]): i for i, row in enumerate(person.members, 1)}
    plain = {
        "person": person.person_id,
        "records": [
            {
                "record": i,
                "campus": campus,
                "since": since.isoformat(),
                "excluded": excluded,
                "rows": rows or {},
            }
            for i, (campus, _, since, excluded, rows) in enumerate(person.members, 1)
        ],
        "missing": person.missing,
        "reviews_open": person.reviews_open,
        "links": [
            {
                "records": [number.get((row[0], row[1])), number.get((row[2], row[3]))],
                "campuses": [row[0], row[2]],
                "since": row[4].isoformat(),
                "until": row[5].isoformat() if row[5] else None,
                "who": row[6],
                "why": row[7],
                "score": round(row[8], 3),
                "evidence": row[9],
            }
            for row in person.links
        ],
    }
    if options.reveal:
        names = ("campus", "patient_id", "name", "sex", "birth_date", "id_no", "phone")
        plain["identities"] = [
            {
                name: None if value is None else str(value)
                for name, value in zip(names, row, strict=True)
            }
            for row in empi.identities(conn, person.person_id)
        ]
    if options.json:
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print_person(plain)
    return 0


def may_reveal(config: Config, conn: psycopg.Connection, as_json: bool, verb: str) -> None:
    """Refuses who has not the key that opens what this store has sealed, as for dead letters."""
    if not as_json and not sys.stdout.isatty():
        raise ConfigError(
            f"{verb}: prints a patient's data, and standard output is no terminal. "
            "Remedy: run it in a terminal, or ask for --json and guard what you make of it."
        )
    key = Sealer(config.dead_letter_key).key_id
    known = empi.keys_in_use(conn)
    if known and key not in known:
        raise ConfigError(
            f"{verb}: dead_letter_key is key {key}, which sealed nothing here. "
            "Remedy: point dead_letter_key to the key that the sync job uses."
        )


def _print_person(plain: dict) -> None:
    console = Console(markup=False, highlight=False)
    console.print(f"person {plain['person']}")
    for record in plain["records"]:
        rows = ", ".join(f"{name} {count}" for name, count in sorted(record["rows"].items()))
        excluded = f" ({record['excluded']}, never matched)" if record["excluded"] else ""
        console.print(f"  {record['record']}  {record['campus']}{excluded}: {rows}")
    missing = plain["missing"]
    for name, text in (
        ("campuses_without_data", "no data from"),
        ("entities_lacking", "nowhere a row of"),
        ("campuses_late", "not up to date"),
    ):
        if missing[name]:
            console.print(f"  {text}: {', '.join(missing[name])}")
    console.print(f"  complete until {missing['complete_until'] or 'no time that is known'}")
    if plain["reviews_open"]:
        console.print(f"  {plain['reviews_open']} pairs wait for a person: `patients review`")
    for link in plain["links"]:
        ends = " and ".join(
            f"{number or 'another person'}, {campus}"
            for number, campus in zip(link["records"], link["campuses"], strict=True)
        )
        until = f" until {link['until'][:19]}" if link["until"] else ""
        console.print(
            f"  link of {ends}: since {link['since'][:19]}{until}, by {link['who']}: {link['why']}"
        )
    for identity in plain.get("identities", ()):
        console.print()
        for name, value in identity.items():
            console.print(f"    {name:12} {'∅' if value is None else value}")
