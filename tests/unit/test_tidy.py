"""The source itself: rooms, sizes and habits that no reviewer should have to look for."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ["schemas", "transforms", "pipelines", "runners"]  # Each may import those before it.
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FUNCTION_LINES_MAX = 70
CLOCKS = "schemas/clocks.py"
# Rules must repeat when they are retried: clocks, chance and ids are given to them.
FORBIDDEN_CALLS = {
    "time.time",
    "time.time_ns",
    "time.monotonic",
    "uuid.uuid4",
    "datetime.now",
    "datetime.datetime.now",
    "hash",
}


def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module(path: pathlib.Path):
    tree = tree_of(path)
    place = path.relative_to(ROOT)
    room = place.parts[0]
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests"}
    assert not imports_of(tree) & above, f"{place} imports a room above it"
    assert ast.get_docstring(tree), f"{place} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{place}:{node.lineno} is {length} lines"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or cleans_up, f"{place}:{node.lineno} catches everything"
        if room in ROOMS[:3] and str(place) != CLOCKS and isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{place}:{node.lineno} calls {called}"


def test_rules_draw_no_lots():
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] != "runners" and str(path.relative_to(ROOT)) != CLOCKS:
            assert "random" not in imports_of(tree_of(path)), path


def test_nothing_names_a_registry_or_a_place_of_one_machine():
    banned = [
        "repo" + "1.maven",
        "repo.maven" + ".apache",
        "pypi" + ".org",
        "/wo" + "rk/",
        "/ro" + "ot/",
    ]
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".sql", ".lock", ".html", ".json", ""}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if not path.is_file() or path.suffix not in suffixes or inside[0].startswith(".venv"):
            continue
        if ".git" in inside or "__pycache__" in inside or any("cache" in part for part in inside):
            continue
        text = path.read_text(errors="ignore")
        for word in banned:
            assert word not in text, f"{path.relative_to(ROOT)} names {word}"


def test_python_is_the_one_supported():
    assert sys.version_info[:2] == (3, 11)


def test_what_starves_each_other_runs_in_one_process(request):
    """Another pytest than setup.py names lets pytest-xdist forget its groups without a word."""
    if not getattr(request.config.option, "loadgroup", False):
        return  # All tests are in this process.
    apart = [
        item.nodeid
        for item in request.session.items
        if item.get_closest_marker("xdist_group") and not item.nodeid.endswith("@flink")
    ]
    assert apart == []
