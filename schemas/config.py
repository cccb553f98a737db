"""campuses.yaml: the sources, the stores and the links between them, read and checked."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import typing
import urllib.parse

import psycopg
import pydantic
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from schemas.errors import ConfigError
from schemas.links import Limits as LinkLimits
from schemas.links import LinkSettings, SetSettings
from schemas.positions import GENERATION_MAX
from schemas.set_words import SETS, fault_of
from schemas.yaml_lines import LineOf, Problem, problems_error, read_model, suggest

PRIMARY = "primary"  # The platform's consult store.
OFF = "off"
_PACKAGE = pathlib.Path(__file__).parent
_IDENTIFIER_BYTES_MAX = 63  # PostgreSQL's, and so a slot name's.
_SECRETS = ("password", "sslpassword", "oauth_client_secret")
_FILES = ("passfile", "sslrootcert", "sslcert", "sslkey", "sslcrl")
_NOT_FILES = ("system", "~")  # `sslrootcert=system` names no file.

Name = typing.Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,23}$")]
Dsn = typing.Annotated[str, pydantic.AfterValidator(lambda text: _checked_dsn(text))]
KeyReference = typing.Annotated[str, pydantic.AfterValidator(lambda text: _checked_key(text))]
_Positive = typing.Annotated[float, pydantic.Field(gt=0)]
_MariaDbUrl = typing.Annotated[
    str, pydantic.AfterValidator(lambda text: _checked_url(text, "mariadb"))
]
# YAML reads `off` as false.
_OrOff = pydantic.BeforeValidator(lambda value: OFF if value is False else value)
# `default`, `off` or a file.
_Rules = typing.Annotated[str, _OrOff]
_TimeOfDay = typing.Annotated[str, pydantic.BeforeValidator(lambda value: _time_of_day(value))]
# `all`, `off`, or pairs: `a<>b`, or `a>b` for edits of a alone.
_Exchange = typing.Annotated[typing.Literal["all", "off"] | tuple[str, ...], _OrOff]
_PAIR = re.compile(r"^\s*([^<>\s]+)\s*(<?>)\s*([^<>\s]+)\s*$")


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """A campus's database that is read; its name is the campus.

    `mapping` names a packaged mapping or a file; `load` makes it an absolute path. `publication`
    is PostgreSQL's. `hints` (table to column to encoding), `kafka` (its client's options) and
    `content` are of a topic of Debezium events, `kafka://host:port/topic`: `content` is a
    PostgreSQL where the tables behind the topic can be read, for `compare` and nothing else.
    `generation` is raised by one when the source's log begins anew (ADR 0030).
    """

    kind: typing.Literal["postgresql", "mariadb", "debezium"]
    dsn: str
    mapping: str
    hints: dict[str, dict[str, str]] = {}
    kafka: dict[str, str] = {}
    content: Dsn | None = None
    commit_times: typing.Literal["exact", "seconds"] | None = None
    generation: typing.Annotated[int, pydantic.Field(ge=0, le=GENERATION_MAX)] = 0
    publication: typing.Annotated[
        str, pydantic.StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_$]{0,62}$")
    ] = "campus_sync"

    @pydantic.field_validator("dsn")
    @classmethod
    def _check_dsn(cls, text: str, info: pydantic.ValidationInfo) -> str:
        kind = info.data.get("kind", "postgresql")
        return _checked_dsn(text) if kind == "postgresql" else _checked_url(text, kind)

    @pydantic.field_validator("kafka")
    @classmethod
    def _check_kafka(cls, options: dict[str, str]) -> dict[str, str]:
        secret = next((key for key in options if re.search("password|secret|token", key)), None)
        if secret is not None:
            raise ValueError(
                f"holds a secret, `{secret}`, and this file is not secret | authenticate by a "
                "client certificate: `ssl.certificate.location`, `ssl.key.location`."
            )
        return options

    @pydantic.field_validator("content")
    @classmethod
    def _check_content(cls, dsn: str | None, info: pydantic.ValidationInfo) -> str | None:
        if dsn is not None and info.data.get("kind") != "debezium":
            raise ValueError("is only for `kind: debezium` | remove it: `dsn` is compared.")
        return dsn

    @property
    def blur_s(self) -> float:
        """How much earlier than it was its log may put a commit, in seconds: a MariaDB's by
        default a second."""
        told = self.commit_times or ("seconds" if self.kind == "mariadb" else "exact")
        return 1.0 if told == "seconds" else 0.0

    @property
    def options(self) -> str:
        """What only its kind has, as `LinkSettings.source_options`."""
        if self.kind != "debezium":
            return ""
        return json.dumps({"hints": self.hints, "kafka": self.kafka}, sort_keys=True)


class Store(_Model):
    """A consult store; one with a campus's name is that campus's local one."""

    kind: typing.ClassVar[str] = "postgresql"
    dsn: Dsn


class Objectives(_Model):
    """What the service promises; the report holds the measurements against it."""

    emergency_p99_ms: _Positive = 1000
    routine_p99_s: _Positive = 300
    pair_s: _Positive = 10


class Retention(_Model):
    """When to warn that a source may soon remove log that a link still needs, in time left."""

    warn_s: _Positive = 86_400
    critical_s: _Positive = 14_400


class TwoPhase(_Model):
    """How sets of rows are written to several stores, all or none (ADR 0022).

    `mode` says what a store that is down does to a set. `branches` are further databases with the
    canonical tables, `mariadb://`; their names are none of the stores'. `sets`, words of
    `schemas.set_words`, are what deliveries write that way (ADR 0026).
    """

    mode: typing.Annotated[typing.Literal["refuse", "degrade", "off"], _OrOff] = OFF
    deadline_s: _Positive = 10
    branches: dict[Name, _MariaDbUrl] = {}
    sets: tuple[str, ...] = ()


class Reconcile(_Model):
    """When `run` reconciles by itself, by its zone's clock (ADR 0021); `off` for never.

    `month_end` is on the first day of the next month. `mend`: deliver again what differs.
    """

    daily: _TimeOfDay = "02:30"
    month_end: _TimeOfDay = "03:30"
    zone: typing.Annotated[
        str, pydantic.StringConstraints(pattern=r"^[+-](0\d|1[0-4]):[0-5]\d$")
    ] = "+08:00"
    mend: bool = True

    def minutes(self, job: typing.Literal["daily", "month_end"]) -> int | None:
        """Returns when a job begins, minutes since midnight; None: it is off."""
        text = getattr(self, job)
        return None if text == OFF else _minutes(text)

    @property
    def zone_minutes(self) -> int:
        """How far the zone's clock is ahead of UTC."""
        return _minutes(self.zone[1:]) * (-1 if self.zone[0] == "-" else 1)


Limits = pydantic.create_model(
    "Limits",
    __base__=_Model,
    __doc__="`schemas.links.Limits` as the file gives it: above zero, or 0 where the default is.",
    **{
        field.name: (
            typing.Annotated[field.type, pydantic.Field(**{"gt" if field.default else "ge": 0})],
            field.default,
        )
        for field in dataclasses.fields(LinkLimits)
    },
)


@dataclasses.dataclass(frozen=True)
class Link:
    """One source feeding one consult store. `name` is `source>store`."""

    name: str
    source: str
    store: str

    @property
    def slot(self) -> str:
        """Name of its replication slot."""
        return "campus_sync_" + re.sub(r"[^a-z0-9_]", "_", f"{self.source}_{self.store}".lower())


class Config(_Model):
    """The content of campuses.yaml. From `load`, every reference in it is absolute.

    `conflict_rules` settle concurrent edits. `exchange` says which stores carry clients' edits to
    each other. `forget_days`: how long the content of a deleted record is kept, if longer than
    the rules' `longest_outage_days`.
    """

    version: typing.Literal[1]
    sources: dict[Name, Source] = pydantic.Field(min_length=1)
    stores: dict[Name, Store] = pydantic.Field(min_length=1)
    links_wanted: typing.Literal["all"] | tuple[str, ...] = pydantic.Field("all", alias="links")
    dead_letter_key: KeyReference
    report_key: KeyReference = "file:report.key"
    emergency_rules: str = "default"
    quality_rules: _Rules = "default"
    quality_every_s: _Positive = 5
    patient_matching: _Rules = "default"
    match_every_s: _Positive = 30
    objectives: Objectives = Objectives()
    retention: Retention = Retention()
    reconcile: typing.Annotated[
        Reconcile | None,
        pydantic.BeforeValidator(lambda value: None if value in (False, OFF) else value),
    ] = None
    two_phase: TwoPhase = TwoPhase()
    conflict_rules: str = "default"
    exchange: _Exchange = "all"
    forget_days: _Positive | None = None
    forget_every_s: _Positive = 3600
    limits: Limits = Limits()
    metrics_port: int = pydantic.Field(0, ge=0, le=65535)

    def links(self) -> tuple[Link, ...]:
        """Returns the links in the order of the file; `all` is every source to every store."""
        if self.links_wanted == "all":
            pairs = [(source, store) for source in self.sources for store in self.stores]
        else:
            pairs = [tuple(name.split(">")) for name in self.links_wanted]
        return tuple(Link(f"{source}>{store}", source, store) for source, store in pairs)

    def links_by_store(self) -> dict[str, list[str]]:
        """Returns the names of the links that feed each store; those that none feeds are not in."""
        links = self.links()
        found = {name: [link.name for link in links if link.store == name] for name in self.stores}
        return {name: feeding for name, feeding in found.items() if feeding}

    def exchange_pairs(self) -> tuple[tuple[str, str], ...]:
        """Returns who asks whom for edits: (the store that learns, the one that it asks)."""
        if self.exchange == "all":
            return tuple(itertools.permutations(self.stores, 2))
        found = []
        for pair in () if self.exchange == OFF else self.exchange:
            one, arrow, other = _PAIR.match(pair).groups()
            found += [(one, other), (other, one)] if arrow == "<>" else [(other, one)]
        return tuple(found)

    def local_store(self, source: str) -> str | None:
        """Returns the name of a campus's own consult store, or None if it has none."""
        return source if source in self.stores else None

    def settings(self, link: Link, one_worker: bool = False) -> LinkSettings:
        """Returns what a worker needs for one link: references to secrets, never secrets."""
        source = self.sources[link.source]
        return LinkSettings(
            name=link.name,
            source=link.source,
            store=link.store,
            source_dsn=source.dsn,
            store_dsn=self.stores[link.store].dsn,
            slot=link.slot,
            publication=source.publication,
            mapping=source.mapping,
            rules=self.emergency_rules,
            key_ref=self.dead_letter_key,
            limits=LinkLimits(**self.limits.model_dump()),
            one_worker=one_worker,
            source_kind=source.kind,
            source_options=source.options,
            generation=source.generation,
            sets=self._sets_of(link.source),
        )

    def _sets_of(self, source: str) -> SetSettings | None:
        """Returns what a source's links write together; None: nothing, or to one store alone."""
        settings = self.two_phase
        fed = {link.store for link in self.links() if link.source == source}
        if settings.mode == OFF or not settings.sets or len(fed) + len(settings.branches) < 2:
            return None
        return SetSettings(
            tables=tuple(SETS[word] for word in settings.sets),
            degrade=settings.mode == "degrade",
            deadline_s=settings.deadline_s,
            log_dsn=self.stores[PRIMARY].dsn,
            stores=tuple((name, self.stores[name].dsn) for name in self.stores if name in fed),
            branches=tuple(settings.branches.items()),
        )


def load(path: str | pathlib.Path) -> Config:
    """Returns the checked configuration of a campuses.yaml.

    Mapping, rules, key and passfile references become absolute, relative to the file.

    Raises:
      ConfigError: the file cannot be used; the text lists every problem with line and remedy.
    """
    path = pathlib.Path(path).absolute()
    config, line_of = read_model(path, Config)
    problems: list[Problem] = []
    note = functools.partial(_note, problems, line_of)
    _check_links(config, note)
    _check_sets(config, note)
    _check_exchange(config, note)
    _check_databases(config, note)
    _check_limits(config, note)
    config = _resolve(config, path.parent, note)
    if problems:
        raise problems_error(path, problems)
    return config


def redact(dsn: str) -> str:
    """Returns where a connection string leads, fit for a log: never a password in it."""
    if "://" in dsn and not dsn.startswith("postgres"):
        url = urllib.parse.urlsplit(dsn)
        return f"{url.netloc.rpartition('@')[2]}{url.path}"
    parts = _parse(dsn)
    if parts is None:
        return "(unreadable connection string)"
    if service := parts.get("service"):
        return f"service {service}"
    user = f"{parts['user']}@" if parts.get("user") else ""
    host = parts.get("host") or parts.get("hostaddr") or "local"
    host = host.rpartition("@")[2]  # Left of it stands the rest of an unquoted password.
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"{user}{host}{port}/{parts.get('dbname', '')}"


def _note(
    problems: list[Problem], line_of: LineOf, place: tuple, what: str, remedy: str = ""
) -> None:
    path = ".".join(str(part) for part in place)
    problems.append(Problem(line_of(place), path, what, remedy))


def _parse(dsn: str) -> dict[str, str] | None:
    try:
        return {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    except psycopg.Error:  # Its text may quote a part of a password.
        return None


def _checked_dsn(text: str) -> str:
    parts = _parse(text)
    if parts is None:
        raise ValueError(
            "is not a PostgreSQL connection string | "
            'write "postgresql://user@host:5432/database" or "host=… port=… dbname=…".'
        )
    if any(parts.get(secret) for secret in _SECRETS):
        raise ValueError(
            "holds a password, and this file and the pipeline are not secret | put "
            "`host:port:database:user:password` into a file of mode 0600 and add "
            "`?passfile=FILE` to the string, or use PGPASSFILE or a pg_service.conf service."
        )
    return text


_URLS = {
    "mariadb": (("mariadb", "mysql"), "mariadb://user@host:3306/database?password_file=FILE"),
    "debezium": (("kafka",), "kafka://host:9092/topic"),
}


_URL_FILES = ("password_file", "ssl_ca")


def _checked_url(text: str, kind: str) -> str:
    schemes, form = _URLS[kind]
    try:
        parts = urllib.parse.urlsplit(text)
        password = parts.password
    except ValueError:  # Its text may quote a part of a password.
        raise ValueError(f"cannot be read | write `{form}`.") from None
    if parts.scheme not in schemes or not parts.netloc or not parts.path.strip("/"):
        raise ValueError(f"is not the address of a {kind} source | write `{form}`.")
    if password:
        raise ValueError(
            "holds a password, and this file and the pipeline are not secret | put it alone into "
            f"a file of mode 0600: `{form}`."
        )
    return text


def _time_of_day(value: object) -> str:
    """Accepts what YAML makes of `12:30` without quotes, and of `off`."""
    if value is False or value == OFF:
        return OFF
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 24 * 60:
        return f"{value // 60:02}:{value % 60:02}"
    if isinstance(value, str) and re.match(r"^([01]\d|2[0-3]):[0-5]\d$", value):
        return value
    raise ValueError('is no time of day | write "HH:MM", e.g. "02:30", or `off`.')


def _minutes(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _checked_key(text: str) -> str:
    if not re.match(r"^(file:.+|env:[A-Za-z_][A-Za-z0-9_]*)$", text):
        raise ValueError(
            'is neither "file:PATH" nor "env:NAME" | refer to 32 random bytes in base64, made '
            "with `openssl rand -base64 32 > dead-letter.key; chmod 600 dead-letter.key`."
        )
    return text


def _check_links(config: Config, note) -> None:
    if PRIMARY not in config.stores:
        note(("stores",), f"`{PRIMARY}`, the platform's store, is missing", f"add `{PRIMARY}:`.")
    for name in config.two_phase.branches:
        if name in config.stores:
            note(("two_phase", "branches", name), "is a store's name", "give it another one.")
    if PRIMARY in config.sources:
        note(("sources", PRIMARY), "is the platform's store's name", "name the campus.")
    if config.links_wanted != "all":
        if not config.links_wanted:
            note(("links",), "names no link", "write `all`, or a list of `source>store`.")
        seen = set()
        for i, name in enumerate(config.links_wanted):
            source, arrow, store = name.partition(">")
            if not arrow:
                note(("links", i), f"`{name}` is no link", "write `source>store`.")
                continue
            if source not in config.sources:
                note(("links", i), f"no source `{source}`", suggest(source, config.sources))
            if store not in config.stores:
                note(("links", i), f"no store `{store}`", suggest(store, config.stores))
            if name in seen:
                note(("links", i), f"`{name}` stands twice", "remove one.")
            seen.add(name)
        if any(name.count(">") != 1 for name in config.links_wanted):
            return
    slots: dict[str, Link] = {}
    for link in config.links():
        other = slots.setdefault(link.slot, link)
        if other is not link and other.name != link.name:
            note(
                ("sources", link.source),
                f"links {other.name} and {link.name} would share the slot {link.slot}",
                "rename a source or a store: case, `-` and `_` do not tell slots apart.",
            )
        if len(link.slot) > _IDENTIFIER_BYTES_MAX:
            note(("sources", link.source), f"slot {link.slot} is too long", "shorten the names.")


def _check_sets(config: Config, note) -> None:
    words = config.two_phase.sets
    for i, word in enumerate(words):
        place = ("two_phase", "sets", i)
        if fault := fault_of(word):
            note(place, *fault)
        elif word in words[:i]:
            note(place, f"`{word}` stands twice", "remove one.")
    if words and config.two_phase.mode == OFF:
        note(("two_phase", "sets"), "needs a mode", "`mode: refuse`, or `mode: degrade`.")


def _check_exchange(config: Config, note) -> None:
    if config.exchange in ("all", OFF):
        return
    if not config.exchange:
        note(("exchange",), "names no pair", "write `all`, `off`, or a list of `store<>store`.")
    seen: set[tuple[str, str]] = set()
    for i, pair in enumerate(config.exchange):
        place = ("exchange", i)
        if not (parts := _PAIR.match(pair)):
            remedy = "write `store<>store`, or `store>store` where edits go that way alone."
            note(place, f"`{pair}` is no pair of stores", remedy)
            continue
        one, arrow, other = parts.groups()
        for name in (one, other):
            if name not in config.stores:
                note(place, f"no store `{name}`", suggest(name, config.stores))
        if one == other:
            note(place, f"`{one}` exchanges with itself", "name another store.")
        ways = {(one, other), (other, one)} if arrow == "<>" else {(one, other)}
        if ways & seen:
            note(place, f"`{pair}` stands twice", "remove one.")
        seen |= ways


def _check_databases(config: Config, note) -> None:
    seen: dict[tuple, str] = {}
    for kind in ("sources", "stores"):
        for name, end in getattr(config, kind).items():
            if content := getattr(end, "content", None):
                _check_database(seen, (kind, name, "content"), content, note)
            if end.kind != "postgresql":
                if other := seen.get(redact(end.dsn)):
                    note((kind, name, "dsn"), f"is what {other} reads too", "give each its own.")
                seen[redact(end.dsn)] = f"{kind}.{name}"
                continue
            _check_database(seen, (kind, name, "dsn"), end.dsn, note)


def _check_database(seen: dict[tuple, str], place: tuple, dsn: str, note) -> None:
    parts = _parse(dsn) or {}
    if parts.get("service"):
        return
    host = parts.get("hostaddr") or parts.get("host") or "local"
    host = "127.0.0.1" if host == "localhost" else host
    user = parts.get("user", "")
    database = (host, parts.get("port", "5432"), parts.get("dbname") or user)
    if other := seen.get(database):
        note(place, f"is the database of {other} too", "give each its own.")
    seen[database] = ".".join(place[:2])


def _check_limits(config: Config, note) -> None:
    limits = config.limits
    for larger, smaller in (
        ("in_flight_rows", "batch_rows"),
        ("spool_memory_bytes", "batch_bytes"),
        ("window_s", "early_s"),
    ):
        if getattr(limits, larger) < getattr(limits, smaller):
            note(
                ("limits", larger),
                f"is less than {smaller} ({getattr(limits, smaller)})",
                f"raise {larger} or lower {smaller}.",
            )
    if config.retention.warn_s < config.retention.critical_s:
        note(("retention", "warn_s"), "is less than critical_s", "warn before it is critical.")


def _resolve(config: Config, folder: pathlib.Path, note) -> Config:
    """Returns the config with its references made absolute and looked up."""

    def packaged(place: tuple, value: str, kind: str) -> str:
        known = {path.stem: path for path in (_PACKAGE / kind).glob("*.yaml")}
        if value in known:
            return str(known[value])
        path = folder / pathlib.Path(value).expanduser()
        if not path.is_file():
            note(place, f"`{value}` is neither packaged nor a file", suggest(value, known))
        return str(path)

    def rules(name: str, *words: str) -> str:
        value = getattr(config, name)
        return value if value in ("default", *words) else packaged((name,), value, "rules")

    def url(text: str) -> str:
        parts = urllib.parse.urlsplit(text)
        query = [
            (key, str(folder / pathlib.Path(value).expanduser()) if key in _URL_FILES else value)
            for key, value in urllib.parse.parse_qsl(parts.query)
        ]
        return parts._replace(query=urllib.parse.urlencode(query)).geturl()

    def dsn(text: str) -> str:
        parts = _parse(text) or {}
        files = {
            key: str(folder / pathlib.Path(parts[key]).expanduser())
            for key in _FILES
            if parts.get(key) and parts[key] not in _NOT_FILES
        }
        return make_conninfo(text, **files) if files else text

    sources = {
        name: source.model_copy(
            update={
                "mapping": packaged(("sources", name, "mapping"), source.mapping, "mappings"),
                "dsn": (dsn if source.kind == "postgresql" else url)(source.dsn),
                "content": source.content and dsn(source.content),
            }
        )
        for name, source in config.sources.items()
    }
    stores = {
        name: store.model_copy(update={"dsn": dsn(store.dsn)})
        for name, store in config.stores.items()
    }
    branches = {name: url(text) for name, text in config.two_phase.branches.items()}

    def key(reference: str) -> str:
        name = reference.removeprefix("file:")
        return (
            reference if name == reference else f"file:{folder / pathlib.Path(name).expanduser()}"
        )

    return config.model_copy(
        update={
            "sources": sources,
            "stores": stores,
            "two_phase": config.two_phase.model_copy(update={"branches": branches}),
            "dead_letter_key": key(config.dead_letter_key),
            "report_key": key(config.report_key),
            "emergency_rules": packaged(("emergency_rules",), config.emergency_rules, "rules"),
            "quality_rules": rules("quality_rules", OFF),
            "patient_matching": rules("patient_matching", OFF),
            "conflict_rules": rules("conflict_rules"),
        }
    )


__all__ = [
    "OFF",
    "PRIMARY",
    "Config",
    "ConfigError",
    "Link",
    "Objectives",
    "Retention",
    "Source",
    "Store",
    "load",
    "redact",
]
