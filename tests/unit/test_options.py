"""Flags: views, defaults, and the refusal of what nobody declared."""

import subprocess
import sys

import pytest
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    SetupOptions,
    StandardOptions,
)

from runners.options import FlinkTuning, SyncOptions, known_flags, parse
from schemas.errors import ConfigError


def test_defaults_are_those_for_low_latency():
    options = parse([])
    tuning = options.view_as(FlinkTuning)
    assert tuning.checkpointing_interval == -1
    assert tuning.max_bundle_time_mills == 20
    assert tuning.max_bundle_size == 1
    assert options.view_as(FlinkRunnerOptions).parallelism == 1
    assert options.view_as(StandardOptions).streaming is True
    assert options.view_as(SetupOptions).save_main_session is False
    assert options.view_as(SyncOptions).workers == "process"


@pytest.mark.parametrize("form", [["--max_bundle_size=7"], ["--max_bundle_size", "7"]])
def test_both_forms_of_a_flag_reach_the_engine(form):
    every = parse(form).get_all_options()
    assert every["max_bundle_size"] == 7


def test_what_the_user_says_wins():
    options = parse(["--parallelism", "3", "--flink_master", "host:8081", "--workers=thread"])
    assert options.view_as(FlinkRunnerOptions).parallelism == 3
    assert options.view_as(FlinkRunnerOptions).flink_master == "host:8081"
    assert options.view_as(SyncOptions).workers == "thread"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_bundel_size=3"], ["`--max_bundel_size`", "did you mean `--max_bundle_size`"]),
        (["--work-dir", "x"], ["`--work-dir`", "did you mean `--work_dir`", "`x` belongs to no"]),
        (["-parallelism=2"], ["did you mean `--parallelism`"]),
        (["--zzzzzz"], ["`--zzzzzz`", "--help"]),
        (["stray"], ["`stray` belongs to no option"]),
        (["--parallelism", "x"], ["--parallelism", "invalid int value"]),
        (["--checkpointing_interval"], ["--checkpointing_interval", "expected one argument"]),
        (["--workers=fork"], ["--workers", "invalid choice"]),
        (["--wrong_a", "--wrong_b"], ["`--wrong_a`", "`--wrong_b`"]),
    ],
)
def test_refusals(flags, said):
    with pytest.raises(ConfigError) as caught:
        parse(flags)
    for part in said:
        assert part in str(caught.value)


def test_no_flag_is_declared_twice():
    """argparse would refuse; this also finds a Beam that begins to know one of ours."""
    flags = known_flags()
    assert {"--work_dir", "--checkpointing_interval", "--flink_master"} <= set(flags)


def test_beam_does_not_open_the_terminal_to_its_log():
    """In a process of its own: pytest has handlers on the root logger."""
    code = (
        "import logging; from runners.options import parse; parse([]);"
        "logging.warning('flood'); logging.getLogger('apache_beam').warning('flood')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
