"""A host that loses its power is missed within half a minute, by whoever waits for its answer."""

import os
import pathlib
import subprocess
import sys

import pytest

from transforms import postgresql_sessions

ROOT = pathlib.Path(__file__).parents[2]
# An ordinary user may have a network of his own, too.
UNSHARE = ["unshare", "--net"] + (
    [] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"]
)


@pytest.mark.parametrize("which", ["store", "source"])
def test_a_host_without_power_is_missed(tmp_path, which):
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-m", "tests.faults.power_cut", str(tmp_path), which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == f"the {which} was missed and came back\n", done.stderr[-3000:]


def test_what_a_connection_string_says_stands(database):
    said = f"{database}?keepalives_idle=77&connect_timeout=9"
    with postgresql_sessions.connect(said, application_name="x") as conn:
        known = conn.info.get_parameters()
        assert conn.autocommit
    assert known["keepalives_idle"] == "77"
    assert known["keepalives_count"] == "3"
    assert (known["connect_timeout"], known["application_name"]) == ("9", "x")
