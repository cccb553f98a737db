"""What settles concurrent edits, as data: read, checked for gaps against the canonical tables."""

import collections
import collections.abc
import dataclasses
import enum
import functools
import hashlib
import pathlib
import typing

import pydantic

from schemas.emergency_rules import Number, Word, Words
from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.siblings import DELETED, ROW
from schemas.store_tables import STORE_TABLES
from schemas.tables import Kind, Table
from schemas.yaml_lines import LineOf, Problem, dotted, read_checked, suggest

DEFAULT_PATH = pathlib.Path(__file__).parent / "rules" / "conflicts.yaml"
ALL_TABLES: dict[str, Table] = {**TABLES, **STORE_TABLES}
# Whose rows any client of a consult store may change: the stores have triggers on them.
EDITED_AT_STORES = ("patient", "emr_document", "consultation", "treatment_plan")
ALL = "all"  # Stands for every column of a table that one policy covers.


class Rule(enum.StrEnum):
    """What decides between two concurrent edits, in this order (DOMAIN.md 4); else a person."""

    ARCHIVED = "archived"
    EMERGENCY = "emergency"
    ROLE = "role"
    TIME = "time"


ORDER = tuple(Rule)
By = tuple[Rule, ...]
Group = typing.Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z][a-z0-9_]{1,39}$")]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Said(_Strict):
    """A thing's name, as doctors read it."""

    en: Word
    zh: Word


class Marked(_Strict):
    """Rows in which `column` has one of `values`."""

    column: Word
    values: Words


class _Policy(_Strict):
    """One group of columns that is settled as a whole.

    Attributes:
      group: its name, unique in the table.
      columns: or `all`, where the table has no other group.
      said: what it is, in words.
      alarm: how loudly an open conflict is told.
      assignee: who is asked: a role, or an office.
    """

    group: Group
    columns: Words | typing.Literal["all"]
    said: Said
    alarm: typing.Literal["none", "notice", "alarm", "emergency"] = "notice"
    assignee: Word = "attending"


class _ByRules(_Policy):
    """`by`: which of the rules decide, in the order of `Rule`; after the last, a person."""

    by: By = ORDER

    @pydantic.field_validator("by")
    @classmethod
    def _is_in_order(cls, by: By) -> By:
        if list(by) != sorted(set(by), key=ORDER.index):
            order = ", ".join(ORDER)
            raise ValueError(f"the rules are not in their order | write them as in: {order}.")
        return by


class Never(_Policy):
    """Never settled by a rule. `lock`: none of the values is shown until a person decides."""

    kind: typing.Literal["never"]
    lock: bool = False


class Owner(_Policy):
    """The source's value stands; an edit at a store is kept beside it and told."""

    kind: typing.Literal["owner"]


class Immutable(_Policy):
    """The first value stands; another one is put in quarantine for a person."""

    kind: typing.Literal["immutable"]


class Newest(_ByRules):
    """One of the values is shown, by the rules; nobody is told of what the rules decide."""

    kind: typing.Literal["newest"]


class Branches(_ByRules):
    """Text that is never mixed: the rules say which branch is shown, all are kept and told.

    `archived`: such a branch is beaten by no other.
    """

    kind: typing.Literal["branches"]
    archived: Marked | None = None

    @pydantic.model_validator(mode="after")
    def _knows_what_is_archived(self) -> typing.Self:
        if self.archived is None and Rule.ARCHIVED in self.by:
            raise ValueError("nothing says what is archived | add `archived:` or leave it out.")
        return self


class Union(_Policy):
    """A list in one text column to which everybody adds; taking out needs a person.

    Attributes:
      separators: characters that part the elements, the first one where it is written.
      none: elements that say that there is nothing, and yield to any that says otherwise.
    """

    kind: typing.Literal["union"]
    separators: typing.Annotated[str, pydantic.StringConstraints(min_length=1)]
    none: tuple[Word, ...] = ()


class HoldBoth(_Policy):
    """Both are kept and laid before a person.

    `foremost`: such a one is what is seen meanwhile, as an order that somebody stopped.
    """

    kind: typing.Literal["hold_both"]
    foremost: Marked | None = None


class States(_Policy):
    """The states of a machine: what can still become the other one yields to it.

    `leads_to`: state to the states that may follow; an end has none.
    """

    kind: typing.Literal["states"]
    leads_to: typing.Annotated[dict[Word, tuple[Word, ...]], pydantic.Field(min_length=1)]

    @functools.cached_property
    def reached(self) -> dict[str, frozenset[str]]:
        """State to all that it can become, itself among them."""
        found: dict[str, frozenset[str]] = {}
        for state in self.leads_to:
            ahead, todo = {state}, [state]
            while todo:
                for following in self.leads_to.get(todo.pop(), ()):
                    if following not in ahead:
                        ahead.add(following)
                        todo.append(following)
            found[state] = frozenset(ahead)
        return found


Policy = typing.Annotated[
    Never | Owner | Immutable | Newest | Branches | Union | HoldBoth | States,
    pydantic.Field(discriminator="kind"),
]


class Deletes(_Policy):
    """The row itself: what holds where one deletes it and another, unaware, changes it.

    `rule`: `person`: it stays in sight until a person decides; `stays`: the deletion has lost;
    `goes`: the deletion has won.
    """

    group: typing.Literal["row"] = ROW
    columns: tuple[typing.Literal["deleted"]] = (DELETED,)
    said: Said = Said(en="whether the record is deleted", zh="记录是否删除")
    rule: typing.Literal["person", "stays", "goes"]


class TablePolicy(_Strict):
    """The policies of one table.

    `writers`: `stores` if any client of a consult store may edit it, else `source`.
    """

    said: Said
    writers: typing.Literal["stores", "source"]
    deletes: Deletes
    groups: typing.Annotated[tuple[Policy, ...], pydantic.Field(min_length=1)]

    @functools.cached_property
    def by_group(self) -> dict[str, Policy | Deletes]:
        """Group to its policy, `ROW` among them."""
        return {ROW: self.deletes, **{policy.group: policy for policy in self.groups}}

    @functools.cached_property
    def group_of(self) -> dict[str, str]:
        """Column to its group."""
        return {column: policy.group for policy in self.groups for column in policy.columns}


class Undecided(_Strict):
    """An emergency edit by one role against a routine edit by another: no rule, a person."""

    emergency: Word
    routine: Word


class _RulesFile(_Strict):
    version: typing.Literal[1]
    skew_bound_s: typing.Annotated[Number, pydantic.Field(gt=0, le=3600)]
    longest_outage_days: typing.Annotated[Number, pydantic.Field(gt=0)]
    roles: typing.Annotated[dict[Word, Said], pydantic.Field(min_length=1)]
    source_role: Word
    undecided: tuple[Undecided, ...]
    tables: dict[Word, TablePolicy]


@dataclasses.dataclass(frozen=True)
class ConflictRules:
    """The policies of a file.

    Attributes:
      skew_bound_us: nearer than this, two clocks do not say which edit was later.
      longest_outage_us: a tombstone's content is kept longer than this.
      roles: from the highest to the lowest, with their names.
      source_role: as whom the source speaks.
      undecided: (role of the emergency edit, role of the routine edit) that go to a person.
      tables: canonical table to its policies; `all` is written out.
      content: all of it as JSON, for `conflict_rules_of`.
      digest: SHA-256 of the content: stores that settle by different rules would not agree.
    """

    path: str
    skew_bound_us: int
    longest_outage_us: int
    roles: dict[str, Said]
    source_role: str
    undecided: frozenset[tuple[str, str]]
    tables: dict[str, TablePolicy]
    content: str
    digest: bytes

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Role to its rank, the highest greatest; who has no role known ranks 0."""
        return {role: len(self.roles) - i for i, role in enumerate(self.roles)}

    @property
    def edited_at_stores(self) -> list[str]:
        """The tables that several may write, by name."""
        return sorted(name for name, table in self.tables.items() if table.writers == "stores")


def load_conflict_rules(
    path: str | pathlib.Path = "default", tables: collections.abc.Mapping[str, Table] = ALL_TABLES
) -> ConflictRules:
    """Returns the policies of a file; `default` is the packaged one.

    Args:
      tables: all canonical tables: each column of each must have exactly one policy.

    Raises:
      ConfigError: no such file, or it has gaps or contradictions: all of them at once, each
        with its line, its place and the remedy.
    """
    path = DEFAULT_PATH if str(path) == "default" else pathlib.Path(path)

    def problems(content: _RulesFile, line_of: LineOf) -> collections.abc.Iterator[Problem]:
        for place, what, remedy in (*_role_findings(content), *_table_findings(content, tables)):
            yield Problem(line_of(place), dotted(place), what, remedy)

    return _rules(str(path), read_checked(path, _RulesFile, problems), tables)


@functools.lru_cache(maxsize=8)
def conflict_rules_of(content: str) -> ConflictRules:
    """Returns the policies that `ConflictRules.content` holds: a store keeps those it is open with.

    Raises:
      ConfigError: they are of another version of this software.
    """
    try:
        found = _RulesFile.model_validate_json(content)
    except pydantic.ValidationError:
        found = None
    if found is None or any(_table_findings(found, ALL_TABLES)):
        raise ConfigError(
            "a store's conflict rules are of another version. Remedy: start `run` of this version, "
            "which opens the stores with its own."
        )
    return _rules("", found, ALL_TABLES)


def _rules(
    path: str, content: _RulesFile, tables: collections.abc.Mapping[str, Table]
) -> ConflictRules:
    text = content.model_dump_json()
    return ConflictRules(
        path=path,
        skew_bound_us=round(content.skew_bound_s * 1_000_000),
        longest_outage_us=round(content.longest_outage_days * 86_400_000_000),
        roles=dict(content.roles),
        source_role=content.source_role,
        undecided=frozenset((pair.emergency, pair.routine) for pair in content.undecided),
        tables={name: _written_out(tables[name], t) for name, t in content.tables.items()},
        content=text,
        digest=hashlib.sha256(text.encode()).digest(),
    )


def _written_out(table: Table, policy: TablePolicy) -> TablePolicy:
    names = tuple(column.name for column in table.columns)
    groups = tuple(
        group.model_copy(update={"columns": names}) if group.columns == ALL else group
        for group in policy.groups
    )
    return policy.model_copy(update={"groups": groups})


_Findings = collections.abc.Iterator[tuple[tuple, str, str]]


def _role_findings(content: _RulesFile) -> _Findings:
    if content.source_role not in content.roles:
        yield ("source_role",), "is no role", suggest(content.source_role, content.roles)
    for i, pair in enumerate(content.undecided):
        for side in ("emergency", "routine"):
            role = getattr(pair, side)
            if role not in content.roles:
                yield ("undecided", i, side), f"`{role}` is no role", suggest(role, content.roles)


def _table_findings(content: _RulesFile, tables: collections.abc.Mapping[str, Table]) -> _Findings:
    for name in tables:
        if name not in content.tables:
            yield ("tables",), f"table {name} has no policy", f"add `{name}:` here."
    for name, policy in content.tables.items():
        place = ("tables", name)
        if name not in tables:
            yield place, f"there is no table `{name}`", suggest(name, tables)
            continue
        yield from _coverage_findings(tables[name], policy, place)
        edited = "stores" if name in EDITED_AT_STORES else "source"
        if policy.writers != edited and name in ALL_TABLES:
            what = f"{name} is {'' if edited == 'stores' else 'not '}edited at the stores"
            yield (*place, "writers"), what, f"write `writers: {edited}`."
        for i, group in enumerate(policy.groups):
            yield from _group_findings(tables[name], group, (*place, "groups", i))


def _coverage_findings(table: Table, policy: TablePolicy, place: tuple) -> _Findings:
    covered: dict[str, str] = {}
    for name, n in collections.Counter(group.group for group in policy.groups).items():
        if n > 1 or name == ROW:
            yield (*place, "groups"), f"group `{name}` is taken", "rename it."
    for i, group in enumerate(policy.groups):
        where = (*place, "groups", i, "columns")
        if group.columns == ALL:
            if len(policy.groups) > 1:
                yield where, "`all` stands beside other groups", "name the columns."
            return
        for column in group.columns:
            if column not in table.by_name:
                what = f"{table.name} has no column `{column}`"
                yield where, what, suggest(column, table.by_name)
            elif column in covered:
                what = f"`{column}` has a policy already, in `{covered[column]}`"
                yield where, what, "name it once."
            covered[column] = group.group
    for column in table.by_name:
        if column not in covered:
            yield (*place, "groups"), f"column `{column}` has no policy", "add it to a group."


def _group_findings(table: Table, group: Policy, place: tuple) -> _Findings:
    if isinstance(group, Union | States):
        kinds = [table.by_name[c].kind for c in group.columns if c in table.by_name]
        if len(group.columns) != 1 or kinds != [Kind.TEXT]:
            yield (*place, "columns"), f"`{group.kind}` is of one text column", "part the group."
    for name in ("archived", "foremost"):
        mark = getattr(group, name, None)
        if mark is not None and mark.column not in group.columns:
            what = f"`{mark.column}` is not a column of the group"
            yield (*place, name, "column"), what, suggest(mark.column, group.columns)
    if isinstance(group, States):
        for state, following in group.leads_to.items():
            for other in following:
                if other not in group.leads_to:
                    remedy = suggest(other, group.leads_to)
                    yield (*place, "leads_to", state), f"no state `{other}`", remedy
                elif other != state and state in group.reached[other]:
                    what = f"`{state}` and `{other}` lead to each other"
                    yield (*place, "leads_to", state), what, "take one way out."
