"""Preflight: what would go wrong with a configuration, each with the remedy, in seconds."""

import base64
import binascii
import collections
import collections.abc
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import time

import psycopg

from runners.preflight.exchange import check_exchange
from runners.preflight.findings import Finding, Findings, Severity
from runners.preflight.postgresql import Server, check_room, check_source
from runners.preflight.servers import connect
from runners.preflight.stores import check_store
from runners.preflight.two_phase import check_two_phase
from schemas.config import PRIMARY, Config, Link
from schemas.emergency_rules import load_rules
from schemas.errors import ConfigError
from schemas.mappings import CampusMapping, load_mapping

_KEY_BYTES = 32


def check(
    config: Config, wall_clock: collections.abc.Callable[[], float] = time.time
) -> list[Finding]:
    """Returns what would go wrong, errors first; an empty list means ready.

    Changes nothing. Sources and stores are asked in parallel, so it takes about three
    seconds at most, also where some of them are down.

    Args:
      config: from `schemas.config.load`.
      wall_clock: this host's, seconds since 1970.
    """
    files, mappings = check_files(config)
    links: dict[str, list[Link]] = collections.defaultdict(list)
    for link in config.links():
        links[link.source].append(link)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(links) + len(config.stores))) as pool:
        sources = {
            name: pool.submit(check_source, config, name, own, mappings.get(name), wall_clock)
            for name, own in links.items()
        }
        wanted = {link.store for link in config.links()} | {PRIMARY}
        stores = [
            pool.submit(check_store, name, store.dsn, wall_clock)
            for name, store in config.stores.items()
            if name in wanted
        ]
        begun = _begun(config)
        findings = list(files)
        servers: dict[str, list[tuple[str, Server]]] = collections.defaultdict(list)
        for name, task in sources.items():
            found, server = task.result()
            findings += found if name in begun else map(_forbidding, found)
            if server is not None:
                servers[server.system].append((name, server))
        for task in stores:
            findings += task.result()
    findings += check_room(servers)
    findings += itertools.chain(*check_two_phase(config))
    findings += check_exchange(config)
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _begun(config: Config) -> set[str]:
    """Returns campuses of which a link has delivered: a table that is held must not stop them."""
    found = set()
    for name, links in config.links_by_store().items():
        with (
            contextlib.suppress(psycopg.Error),
            connect(config.stores[name].dsn) as connection,
        ):
            rows = connection.execute(
                "SELECT link FROM sync.progress WHERE link = ANY (%s)", (links,)
            )
            found |= {link.partition(">")[0] for (link,) in rows}
    return found


def _forbidding(finding: Finding) -> Finding:
    """Makes an error of a held table: a link that begins would read it whole for nothing."""
    if finding.severity is not Severity.HELD:
        return finding
    return finding._replace(severity=Severity.ERROR)


def check_files(config: Config) -> tuple[Findings, dict[str, CampusMapping]]:
    """Checks what lies on this host: mappings, rules, key, password files."""
    found = Findings("files")
    mappings = {}
    for name, source in config.sources.items():
        try:
            mappings[name] = load_mapping(source.mapping)
        except ConfigError as error:
            found.error(str(error), f"correct {source.mapping}.")
    rules = config.emergency_rules
    try:
        load_rules(rules)
    except ConfigError as error:
        found.error(str(error), f"correct {rules}.")
    _check_key(config.dead_letter_key, found)
    for name, end in (*config.sources.items(), *config.stores.items()):
        if end.kind != "postgresql":
            continue
        parts = psycopg.conninfo.conninfo_to_dict(end.dsn)
        passfile = pathlib.Path(str(parts["passfile"])) if parts.get("passfile") else None
        if passfile is not None and not passfile.is_file():
            found.error(f"{name}: password file {passfile} is not there", f"create {passfile}.")
        elif passfile is not None and passfile.stat().st_mode & 0o077:
            found.error(
                f"{name}: libpq ignores password file {passfile}: others may read it",
                f"chmod 600 {passfile}",
            )
    return found, mappings


def _check_key(reference: str, found: Findings) -> None:
    kind, _, place = reference.partition(":")
    make = "openssl rand -base64 32"
    if kind == "env":
        text = os.environ.get(place)
        remedy = f'export {place}="$({make})", and keep a copy where only the team can read it.'
    else:
        path = pathlib.Path(place)
        try:
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            text = None
        remedy = f"{make} > {place} && chmod 600 {place}, and keep a copy in a safe place."
        if text is not None and path.stat().st_mode & 0o077:
            found.warning(f"others may read the dead letters' key {place}", f"chmod 600 {place}")
    try:
        whole = text is not None and (
            len(base64.b64decode(text.strip(), validate=True)) == _KEY_BYTES
        )
    except binascii.Error:
        whole = False
    if not whole:
        what = "is not 32 bytes in base64" if text else "is missing or cannot be read"
        found.error(f"the dead letters' key {reference} {what}", remedy)
