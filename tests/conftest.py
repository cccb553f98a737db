"""What every test may ask for, and which engines they may run on."""

import sys

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

pytest_plugins = ["tests.fixtures_postgres"]

# A failing example can be run again from what it prints, on any machine.
hypothesis.settings.register_profile("campus-sync", print_blob=True, deadline=None)
hypothesis.settings.load_profile("campus-sync")


def pytest_configure(config):
    set_hypothesis_home_dir(config.rootpath / ".pytest_cache" / "hypothesis")


@pytest.fixture(autouse=True)
def _pinned_engines(monkeypatch):
    """A test names its engine: BundleBasedDirectRunner for streams, FnApiRunner otherwise.

    `DirectRunner`, the default, looks for Prism first, which may be a download, and then runs
    on whatever it finds.
    """
    module = sys.modules.get("apache_beam.runners.direct.direct_runner")
    if module is not None:
        monkeypatch.setattr(module.SwitchingDirectRunner, "run_pipeline", _refuse)


def _refuse(*args, **kwargs):
    pytest.fail("name an engine: BundleBasedDirectRunner (TestStream) or FnApiRunner")
