"""YAML files whose every problem can be named with its file and line."""

import collections.abc
import dataclasses
import difflib
import pathlib
import re
import typing

import pydantic
import yaml

from schemas.errors import ConfigError

LineOf = collections.abc.Callable[[tuple], int]
Model = typing.TypeVar("Model", bound=pydantic.BaseModel)

# Only what cannot be a code: under YAML 1.1 the code `No` would become false, `010` eight and
# `2024-01-01` a date, under 1.2 `1E10` a number; a hospital's code tables are full of such codes.
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Safe, YAML 1.2 scalars; a key that stands twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, collections.abc.Hashable):
                raise yaml.MarkedYAMLError(None, None, "a key is a list", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"`{key}` stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong in a file: where (`line`, dotted `path`), what, and the remedy."""

    line: int
    path: str
    what: str
    remedy: str = ""


def load_yaml(path: str | pathlib.Path) -> tuple[object, LineOf]:
    """Returns the content of a YAML file and a function from a path in it to its line.

    `line_of(("sources", "main", "dsn"))` is the 1-based line of that key or list item, or of
    its nearest ancestor that exists; `line_of(())` is 1. Codes such as `No` and `010` stay text.

    Raises:
      ConfigError: no such file, not UTF-8, not YAML, or a key stands twice.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or 'cannot be read'}. "
            "Remedy: check the path and its permissions."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8. "
            f"Remedy: save the file as UTF-8, e.g. `iconv -f GB18030 -t UTF-8 {path}`."
        ) from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[tuple, int] = {}
            if node is not None:
                _note_lines(node, (), lines, ())
            data = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise problems_error(path, [_syntax_problem(error)]) from None

    def line_of(place: tuple) -> int:
        place = tuple(place)
        while place and place not in lines:
            place = place[:-1]
        return lines.get(place, 1)

    return data, line_of


def _note_lines(node: yaml.Node, place: tuple, lines: dict[tuple, int], above: tuple) -> None:
    if id(node) in above:
        raise yaml.MarkedYAMLError(None, None, "an alias holds itself", node.start_mark)
    above = (*above, id(node))
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = key.value
            if key.tag == "tag:yaml.org,2002:int":
                name = int(name.replace("_", ""))
            lines[(*place, name)] = key.start_mark.line + 1
            _note_lines(value, (*place, name), lines, above)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*place, i), lines, above)


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    what = ", ".join(part for part in parts if part) or "is not YAML"
    remedy = "correct the YAML here or just above: indentation, a colon, a quote, a tab."
    if what.endswith("stands twice"):
        remedy = "keep one of the two."
    elif what.endswith("holds itself"):
        remedy = "write the value out instead of the alias."
    return Problem(mark.line + 1 if mark else 1, "", what, remedy)


def problems_error(path: str | pathlib.Path, problems: list[Problem]) -> ConfigError:
    """Returns one error that lists every problem of a file, in the order of its lines."""
    lines = [f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for problem in sorted(problems):
        what = f"{problem.path}: {problem.what}" if problem.path else problem.what
        lines.append(f"  line {problem.line}: {what.rstrip('.')}.")
        if problem.remedy:
            lines.append(f"    Remedy: {problem.remedy}")
    return ConfigError("\n".join(lines))


def read_model(path: str | pathlib.Path, model: type[Model]) -> tuple[Model, LineOf]:
    """Returns a YAML file as `model` and its `line_of`.

    Raises:
      ConfigError: as `load_yaml`, or the content does not fit: all problems at once.
    """
    data, line_of = load_yaml(path)
    try:
        return model.model_validate({} if data is None else data), line_of
    except pydantic.ValidationError as error:
        raise problems_error(path, model_problems(error, model, line_of)) from None


def read_checked(
    path: str | pathlib.Path,
    model: type[Model],
    problems: collections.abc.Callable[[Model, LineOf], collections.abc.Iterable[Problem]],
) -> Model:
    """Returns a file as a model that `problems` finds nothing wrong with.

    Raises:
      ConfigError: as `read_model`, or what was found, all of it at once.
    """
    content, line_of = read_model(path, model)
    if found := list(problems(content, line_of)):
        raise problems_error(path, found)
    return content


def model_problems(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], line_of: LineOf
) -> list[Problem]:
    """Returns pydantic's findings as problems with lines; values are never quoted.

    A validator that raises `ValueError("what | remedy")` gives both parts.
    """
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        place = item["loc"]
        what, remedy = _explain(item, model)
        problems.append(Problem(line_of(place), dotted(place), what, remedy))
    return problems


def dotted(place: tuple) -> str:
    """Returns a path in a file as people write it: `sources.main.tables[2]`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _explain(item: dict, model: type[pydantic.BaseModel]) -> tuple[str, str]:
    kind, message = item["type"], item["msg"]
    if kind == "missing":
        return "is missing", f"add `{item['loc'][-1]}:`."
    if kind == "extra_forbidden":
        known = _fields_at(model, item["loc"][:-1])
        return "is not a setting here", suggest(str(item["loc"][-1]), known)
    if kind == "value_error":
        what, _, remedy = message.removeprefix("Value error, ").partition(" | ")
        return what, remedy
    return message[:1].lower() + message[1:], ""


def _fields_at(model: object, place: tuple) -> list[str]:
    """Returns the settings that a model knows at a place in the file."""
    for part in place:
        if isinstance(model, type) and issubclass(model, pydantic.BaseModel):
            by_name = {f.alias or name: f for name, f in model.model_fields.items()}
            if part not in by_name:
                return []
            model = by_name[part].annotation
        else:
            inner = [a for a in typing.get_args(model) if _holds_model(a)]
            model = inner[-1] if inner else None
    while model is not None and not isinstance(model, type):
        inner = [a for a in typing.get_args(model) if _holds_model(a)]
        model = inner[0] if inner else None
    if isinstance(model, type) and issubclass(model, pydantic.BaseModel):
        return [f.alias or name for name, f in model.model_fields.items()]
    return []


def _holds_model(kind: object) -> bool:
    if isinstance(kind, type) and not typing.get_args(kind):
        return issubclass(kind, pydantic.BaseModel)
    return any(_holds_model(inner) for inner in typing.get_args(kind))


def suggest(word: str, known: collections.abc.Iterable[str]) -> str:
    """Returns a remedy for an unknown word: what was likely meant, or all that is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"remove it; known here: {', '.join(known)}." if known else "remove it."
