"""The campus-sync command: parses, calls one verb, and turns errors into words and exit codes."""

import argparse
import collections.abc
import importlib
import pathlib
import sys

from schemas.errors import CampusSyncError, ConfigError

OK, WRONG, USAGE = 0, 1, 2

Handler = collections.abc.Callable[[argparse.Namespace], int]


def _verb(module: str, function: str) -> Handler:
    """Returns a handler that imports its module only when its verb is called."""

    def call(options: argparse.Namespace) -> int:
        return getattr(importlib.import_module(module), function)(options)

    return call


def parser() -> argparse.ArgumentParser:
    """Returns the parser of every verb."""
    root = argparse.ArgumentParser(
        prog="campus-sync",
        description="Keeps a multi-campus hospital's records in step, and proves it.",
        epilog="Exit code: 0 done, 1 the data are not as they should be, 2 usage or configuration.",
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_try(verbs)
    _add_operate(verbs)
    _add_look(verbs)
    return root


def _add_try(verbs) -> None:
    demo = verbs.add_parser("demo", help="run the whole system on an embedded world")
    demo.add_argument("--seconds", type=int, default=30, help="of traffic (default 30)")
    demo.add_argument("--rate", type=int, default=200, help="row changes a second (default 200)")
    demo.add_argument("--seed", type=int, default=1)
    _add_campuses(demo)
    demo.add_argument("--report-dir", type=pathlib.Path, help="keep the report here")
    demo.add_argument("--dir", type=pathlib.Path, help="keep the world here")
    demo.add_argument("--json", action="store_true")
    demo.set_defaults(handler=_verb("runners.demo", "demo"))

    world = verbs.add_parser("world", help="start or stop the embedded campuses")
    world.add_argument("action", choices=["up", "down", "status"])
    world.add_argument("--dir", type=pathlib.Path, required=True)
    _add_campuses(world)
    world.add_argument("--json", action="store_true")
    world.set_defaults(handler=_verb("runners.try_out", "world"))

    traffic = verbs.add_parser("traffic", help="write seeded hospital traffic into the sources")
    _add_config(traffic)
    traffic.add_argument("--rate", type=int, default=200, help="row changes a second")
    traffic.add_argument("--seconds", type=float, default=60)
    traffic.add_argument("--seed", type=int, default=1)
    traffic.add_argument("--preload", type=int, default=0, help="patients to begin with")
    traffic.set_defaults(handler=_verb("runners.try_out", "traffic"))


def _add_operate(verbs) -> None:
    run = verbs.add_parser(
        "run", help="carry changes until stopped", epilog="Beam options may follow."
    )
    _add_config(run)
    run.add_argument("--runner", choices=["flink", "dataflow"], default="flink")
    run.add_argument("--no-check", action="store_true", help="start without preflight")
    run.add_argument("--dry-run", action="store_true", help="translate and check, do not start")
    run.set_defaults(handler=_verb("runners.run", "run"), beam=True)

    check = verbs.add_parser("check", help="preflight: what would go wrong, with the remedy")
    _add_config(check)
    check.add_argument("--json", action="store_true")
    check.set_defaults(handler=_verb("runners.run", "check"))

    letters = verbs.add_parser(
        "dead-letters",
        help="changes that were refused",
        description="`list` names open letters, never what they hold. `show` opens letters with "
        "the key and prints a PATIENT'S DATA. `replay` sends changes through mapping and store "
        "again, once their cause is mended; it may run beside the sync job and be repeated.",
    )
    letters.add_argument("action", choices=["list", "show", "replay"])
    letters.add_argument(
        "letter", nargs="*", help="ids or beginnings of ids; replay without any takes all open"
    )
    _add_config(letters)
    letters.add_argument("--json", action="store_true")
    letters.set_defaults(handler=_verb("runners.dead_letters", "dead_letters"), more="letter")

    codes = verbs.add_parser("codes", help="codes that the mappings' dictionaries lack")
    codes.add_argument("action", choices=["list"])
    _add_config(codes)
    codes.add_argument("--json", action="store_true")
    codes.set_defaults(handler=_verb("runners.codes", "codes"))

    _add_clinical(verbs)
    _add_in_doubt(verbs)

    _add_reread(verbs)


def _add_reread(verbs) -> None:
    reread = verbs.add_parser(
        "reread",
        help="read rows of a source table again, and deliver what stores have otherwise",
        description="Safe while changes flow: a newer change always wins. Killed, it goes on where "
        "it was when the same command is given again. What the source no longer has is ended in "
        "the stores, but not with --where-column: what is gone has no such column.",
    )
    reread.add_argument("campus", help="whose source")
    _add_config(reread)
    reread.add_argument("--table", required=True, metavar="SOURCE_TABLE", help="schema.table")
    reread.add_argument("--from", dest="low", metavar="KEY", help="first key, parts joined by |")
    reread.add_argument("--to", dest="high", metavar="KEY", help="last key, included")
    reread.add_argument("--where-column", metavar="C", help="only rows by this date column")
    reread.add_argument("--since", metavar="DAY", help="of this day or later, e.g. 2026-11-23")
    reread.add_argument("--store", action="append", default=[], help="to this store (default all)")
    reread.add_argument(
        "--rows-s", type=int, metavar="N", help="no faster (default limits.snapshot_rows_s)"
    )
    reread.add_argument("--anew", action="store_true", help="do not go on, begin anew")
    reread.add_argument("--json", action="store_true")
    reread.set_defaults(handler=_verb("runners.reread", "reread"))


def _add_in_doubt(verbs) -> None:
    doubt = verbs.add_parser(
        "in-doubt",
        help="sets written to several stores at once that are not finished",
        description="`list` names transactions and their branches, never what they hold. "
        "`recover` settles by the log's decisions what a crash left prepared, and gives a store "
        "that was down the sets that it has missed; it may run at any time and be repeated.",
    )
    doubt.add_argument("action", choices=["list", "recover"])
    _add_config(doubt)
    doubt.add_argument(
        "--presume-abort", action="store_true", help="recover: roll back what is held, too"
    )
    doubt.add_argument("--json", action="store_true")
    doubt.set_defaults(handler=_verb("runners.in_doubt", "in_doubt"))


def _add_clinical(verbs) -> None:
    quality = verbs.add_parser("quality", help="alarms of data quality, and the thirty rules")
    quality.add_argument("action", choices=["list", "rules", "check"])
    _add_config(quality)
    quality.add_argument("--rule", type=int, action="append", default=[], help="list only this")
    quality.add_argument("--json", action="store_true")
    quality.set_defaults(handler=_verb("runners.quality", "quality"))

    patients = verbs.add_parser("patients", help="one patient's records at all campuses")
    patients.add_argument("action", choices=["match", "review", "link", "unlink", "show"])
    patients.add_argument("what", nargs="*", help="a review's id, a person's, or CAMPUS/PATIENT")
    _add_config(patients)
    for option in ("--who", "--why"):
        patients.add_argument(option)
    for option in ("--reveal", "--json"):
        patients.add_argument(option, action="store_true")
    patients.set_defaults(handler=_verb("runners.patients", "patients"), more="what")

    _add_conflicts(verbs)


def _add_conflicts(verbs) -> None:
    conflicts = verbs.add_parser(
        "conflicts",
        help="edits that nobody who made them knew of each other",
        description="`list` names conflicts, never what they are about. `show --reveal` lays the "
        "versions side by side and prints a PATIENT'S DATA. `resolve` writes a person's decision, "
        "which every store accepts; what was not chosen stays readable.",
    )
    conflicts.add_argument("action", choices=["list", "show", "resolve"])
    conflicts.add_argument("conflict", nargs="*", help="ids or beginnings of ids")
    _add_config(conflicts)
    conflicts.add_argument("--store", default="primary", help="ask this one (default primary)")
    conflicts.add_argument("--choose", type=int, metavar="N", help="resolve: the version to take")
    conflicts.add_argument(
        "--set", action="append", default=[], metavar="COLUMN=VALUE", help="resolve: or this"
    )
    for option in ("--who", "--role", "--why"):
        conflicts.add_argument(option)
    for option in ("--all", "--reveal", "--json"):
        conflicts.add_argument(option, action="store_true")
    conflicts.set_defaults(handler=_verb("runners.conflicts", "conflicts"), more="conflict")

    policies = verbs.add_parser("policies", help="what settles concurrent edits, in words")
    policies.add_argument("--language", choices=["en", "zh"], default="en")
    policies.add_argument(
        "--config", type=pathlib.Path, help="print those that this campuses.yaml names"
    )
    policies.set_defaults(handler=_verb("runners.conflicts", "policies"))


def _add_look(verbs) -> None:
    for name, text in (
        ("status", "live state of every link"),
        ("report", "the SLA report"),
        ("compare", "compare sources and stores by content"),
    ):
        verb = verbs.add_parser(name, help=text)
        _add_config(verb)
        verb.add_argument("--json", action="store_true")
        module = "runners.status" if name == "status" else "runners.look"
        verb.set_defaults(handler=_verb(module, name))
        if name == "status":
            verb.add_argument("--once", action="store_true", help="print once instead of live")
        if name == "report":
            verb.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("report"))
            verb.add_argument("--no-compare", action="store_true", help="leave the contents out")
        if name == "compare":
            verb.add_argument("--show-keys", action="store_true", help="name record ids")
    _add_reconcile(verbs)


def _add_reconcile(verbs) -> None:
    reconcile = verbs.add_parser(
        "reconcile",
        help="find what sources and stores have unlike, mend it, sign a report",
        description="Safe while changes flow. Changes nothing without --repair; rows are then "
        "delivered again by the ordinary merge, so that a newer change always wins.",
        epilog="Beam options may follow.",
    )
    _add_config(reconcile)
    reconcile.add_argument("--campus", action="append", default=[], help="only this one's rows")
    reconcile.add_argument("--table", action="append", default=[], help="only this one")
    reconcile.add_argument("--since", metavar="DAY", help="only what a store has changed since")
    reconcile.add_argument("--whole", action="store_true", help="look at every row twice")
    reconcile.add_argument("--repair", action="store_true", help="mend what differs")
    reconcile.add_argument("--report", type=pathlib.Path, metavar="FILE", help="write it here")
    reconcile.add_argument("--runner", choices=["direct", "flink"], default="direct")
    reconcile.add_argument("--json", action="store_true")
    reconcile.set_defaults(handler=_verb("runners.reconcile", "reconcile"), beam=True)

    verify = verbs.add_parser("verify-report", help="whether a signed report is as it was signed")
    verify.add_argument("report", type=pathlib.Path, metavar="FILE")
    verify.add_argument("--config", type=pathlib.Path, help="campuses.yaml: is it our key?")
    verify.set_defaults(handler=_verb("runners.reconcile", "verify_report"))


def _add_campuses(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--campuses",
        choices=["unlike", "postgresql"],
        help="of a new world: a PostgreSQL, a GBK MariaDB and an Oracle's events (default), or "
        "three PostgreSQL",
    )


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--config", type=pathlib.Path, required=True, help="campuses.yaml")


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    more = getattr(options, "more", None)  # Where words after an option belong to.
    if more and not any(word.startswith("-") for word in rest):
        setattr(options, more, [*getattr(options, more), *rest])
        rest = []
    if rest and not getattr(options, "beam", False):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return options.handler(options)
    except ConfigError as error:
        print(f"campus-sync: {error}", file=sys.stderr)
        return USAGE
    except CampusSyncError as error:
        print(f"campus-sync: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
