"""The built package: what a wheel holds, and that its generic names are nobody else's."""

import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = {"schemas", "transforms", "pipelines", "runners"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The project's wheel, built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "project"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", *ROOMS):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_a_wheel_holds_every_file_that_the_code_reads(wheel):
    held = set(wheel.namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= held, f"the wheel lacks {sorted(wanted - held)}"


def test_a_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == ROOMS


def test_no_other_distribution_has_our_names():
    owners = importlib.metadata.packages_distributions()
    for room in ROOMS:
        assert set(owners.get(room, [])) <= {"campus-sync"}, f"{room} is also shipped by another"
