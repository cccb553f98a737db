"""How records of one patient are recognised at several campuses: weights and thresholds as data."""

import collections.abc
import dataclasses
import datetime
import hashlib
import pathlib
import re
import typing

import pydantic

from schemas.emergency_rules import Number, Word
from schemas.yaml_lines import LineOf, Problem, dotted, read_checked

DEFAULT_PATH = pathlib.Path(__file__).parent / "rules" / "empi.yaml"

# What two records are compared by, in the order of evidence.
FIELDS = ("id_no", "name", "birth_date", "phone", "sex", "address")

_Share = typing.Annotated[Number, pydantic.Field(ge=0, le=1)]
_Count = typing.Annotated[int, pydantic.Field(ge=1, le=1000)]
_Character = typing.Annotated[str, pydantic.StringConstraints(min_length=1, max_length=1)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Weights(_Strict):
    """What a field adds to the score where it agrees; together one."""

    id_no: _Share
    name: _Share
    birth_date: _Share
    phone: _Share
    sex: _Share
    address: _Share

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> typing.Self:
        if abs(sum(self.model_dump().values()) - 1) > 1e-9:
            raise ValueError("the weights do not add up to 1 | correct them.")
        return self


class Thresholds(_Strict):
    """`link`: of the score, by itself. `review`: of the share of what both records tell."""

    link: _Share
    review: _Share


class Automatic(_Strict):
    """What a link without a person needs besides its score; a valid, equal id_no always.

    `name_likeness`: of the names. Birth date and sex never contradict each other.
    """

    name_likeness: typing.Annotated[Number, pydantic.Field(ge=0.9, le=1)]


class Review(_Strict):
    """What a pair needs to be shown to a person: never a name alone.

    `agreeing`: how many of id_no, name, birth_date and phone agree. `evidence`: the weights of
    what both records tell, together.
    """

    agreeing: typing.Annotated[int, pydantic.Field(ge=2, le=4)]
    evidence: _Share


class Shared(_Strict):
    """A phone or an id_no with more names than this is a household's, or a clerk's habit."""

    phone_names: _Count
    id_names: _Count


class Excluded(_Strict):
    """Who is never matched (patterns of names), and what is no evidence."""

    newborn: tuple[Word, ...]
    unidentified: tuple[Word, ...]
    test: tuple[Word, ...]
    id_numbers: tuple[Word, ...]
    phones: tuple[Word, ...]
    birth_dates: tuple[Word, ...]


class _RulesFile(_Strict):
    version: typing.Literal[1]
    weights: Weights
    thresholds: Thresholds
    automatic: Automatic
    review: Review
    shared: Shared
    excluded: Excluded
    block_records: typing.Annotated[int, pydantic.Field(ge=2, le=10_000)]
    lost_characters: tuple[_Character, ...]
    variants: tuple[Word, ...]


@dataclasses.dataclass(frozen=True)
class MatchingRules:
    """The rules of a file.

    Attributes:
      content: as in the file. variants: character to the one that it is folded to.
      birth_days: birth dates that stand for none, in days since 1970-01-01.
      digest: SHA-256 of the content: by other rules everything is matched again.
    """

    path: str
    content: _RulesFile
    variants: dict[str, str]
    birth_days: frozenset[int]
    digest: bytes


def load_matching_rules(path: str | pathlib.Path = "default") -> MatchingRules:
    """Returns the rules of a file; `default` is the packaged one.

    Raises:
      ConfigError: no such file, or it has gaps or contradictions: all of them at once, each
        with its line, its place and the remedy.
    """
    path = DEFAULT_PATH if str(path) == "default" else pathlib.Path(path)
    content = read_checked(path, _RulesFile, _problems)
    variants = {other: group[0] for group in content.variants for other in group[1:]}
    epoch = datetime.date(1970, 1, 1)
    days = [(datetime.date.fromisoformat(t) - epoch).days for t in content.excluded.birth_dates]
    digest = hashlib.sha256(content.model_dump_json().encode()).digest()
    return MatchingRules(str(path), content, variants, frozenset(days), digest)


def _problems(content: _RulesFile, line_of: LineOf) -> collections.abc.Iterator[Problem]:
    def problem(place: tuple, what: str, remedy: str) -> Problem:
        return Problem(line_of(place), dotted(place), what, remedy)

    thresholds, weights = content.thresholds, content.weights
    if thresholds.review > thresholds.link:
        yield problem(("thresholds", "review"), "is above `link`", "a review begins below a link.")
    without_id = 1 - weights.id_no
    if thresholds.link <= without_id:
        yield problem(
            ("thresholds", "link"),
            f"is reached without an id_no, at {without_id:g}",
            "raise it: a link without an id_no is a person's decision.",
        )
    for kind in ("newborn", "unidentified", "test", "id_numbers", "phones"):
        for i, pattern in enumerate(getattr(content.excluded, kind)):
            try:
                re.compile(pattern)
            except re.error:
                place = ("excluded", kind, i)
                yield problem(place, "is no regular expression", "correct it.")
    for i, text in enumerate(content.excluded.birth_dates):
        try:
            datetime.date.fromisoformat(text)
        except ValueError:
            place = ("excluded", "birth_dates", i)
            yield problem(place, "is no date", "write it as 1900-01-01.")
    seen: dict[str, int] = {}
    for i, group in enumerate(content.variants):
        if len(group) < 2:
            yield problem(("variants", i), "has one character", "name what it is written for.")
        for character in group:
            if character in seen:
                yield problem(("variants", i), "holds a character of another group", "join them.")
            seen[character] = i
