"""Dataflow's dry run: the whole translation offline, and what it refuses."""

import json

import apache_beam as beam
import pytest
from apache_beam.coders import VarIntCoder
from apache_beam.io.unbounded_source import ReadFromUnboundedSource, UnboundedCountingSource
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec

from runners.dataflow import check_options, dry_run, find_secret
from runners.options import parse
from schemas.errors import ConfigError

GOOD = [
    "--project=hospital-sync",
    "--region=asia-east2",
    "--temp_location=gs://hospital-sync/tmp",
    "--sdk_container_image=registry.example/campus-sync:2.77.0-1",
    "--no_use_public_ips",
]


class CountFn(beam.DoFn):
    """Counts per key."""

    _COUNT = beam.DoFn.StateParam(ReadModifyWriteStateSpec("count", VarIntCoder()))

    def __init__(self, dsn: str = "host=10.0.0.1 passfile=/etc/campus-sync/pass"):
        self._dsn = dsn

    def process(self, element, count=_COUNT):
        count.write((count.read() or 0) + 1)
        yield element


def build(root: beam.Pipeline, fn: CountFn | None = None) -> None:
    (
        root
        | "Read" >> ReadFromUnboundedSource(UnboundedCountingSource(10))
        | "Key" >> beam.Map(lambda n: (str(n % 3), n)).with_output_types(tuple[str, int])
        | "Count" >> beam.ParDo(fn or CountFn()).with_output_types(tuple[str, int])
    )


def test_a_pipeline_is_translated_and_written(tmp_path):
    result = dry_run(build, parse(GOOD), tmp_path)
    proto = beam_runner_api_pb2.Pipeline.FromString(
        (tmp_path / "dataflow-pipeline.pb").read_bytes()
    )
    (environment,) = {t.environment_id for t in proto.components.transforms.values()} - {""}
    payload = beam_runner_api_pb2.DockerPayload.FromString(
        proto.components.environments[environment].payload
    )
    assert payload.container_image == "registry.example/campus-sync:2.77.0-1"
    assert result.nbytes == len(proto.SerializeToString())
    assert "dataflow-pipeline.pb" in str(result)


def test_the_job_is_written_or_the_report_says_that_it_is_not(tmp_path):
    """Both ends of the same promise: nothing is claimed that was not run."""
    result = dry_run(build, parse(GOOD), tmp_path)
    job = tmp_path / "dataflow-job.json"
    claimed = "the v1b3 job is complete" in result.checked
    assert claimed == job.exists() == (job in result.files)
    if claimed:
        content = json.loads(job.read_text())
        (pool,) = content["environment"]["workerPools"]
        assert content["type"] == "JOB_TYPE_STREAMING"
        assert "enable_streaming_engine" in content["environment"]["experiments"]
        assert pool["ipConfiguration"] == "WORKER_IP_PRIVATE"
        assert pool["sdkHarnessContainerImages"][0]["containerImage"].endswith(":2.77.0-1")
    else:
        assert any("v1b3 job: install" in text for text in result.not_checked)


def test_the_callers_options_stay_as_they_are(tmp_path):
    options = parse(GOOD)
    before = options.get_all_options()
    dry_run(build, options, tmp_path)
    assert options.get_all_options() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (GOOD[1:], "no project. Remedy: --project"),
        ([f for f in GOOD if "region" not in f], "no region"),
        ([f.replace("gs://", "/tmp/") for f in GOOD], "no bucket"),
        ([f.replace(":2.77.0-1", ":latest") for f in GOOD], "is not pinned"),
        ([f.replace(":2.77.0-1", "") for f in GOOD], "is not pinned"),
        (GOOD[:3] + GOOD[4:], "no worker image"),
        (GOOD[:4], "public addresses"),
        ([*GOOD, "--experiments=disable_runner_v2"], "turns off Runner v2"),
        ([*GOOD, "--save_main_session"], "main session"),
        ([*GOOD, "--job_name=Campus_Sync"], "job name `Campus_Sync`"),
    ],
)
def test_options_are_refused_with_the_flag_that_helps(flags, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        dry_run(build, parse(flags), tmp_path)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_problem_is_told_at_once():
    options = parse([])
    options.view_as(beam.options.pipeline_options.GoogleCloudOptions).job_name = "campus-sync"
    assert len(check_options(options)) >= 4


def test_an_image_by_digest_is_pinned(tmp_path):
    digest = "sha256:" + "0" * 64
    flags = [f.replace(":2.77.0-1", f"@{digest}") for f in GOOD]
    assert dry_run(build, parse(flags), tmp_path).files


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://sync:geheim@10.0.0.1/his", "host=10.0.0.1 password=geheim dbname=his"],
)
def test_a_pickled_password_is_found_and_not_repeated(dsn, tmp_path):
    with pytest.raises(ConfigError) as caught:
        dry_run(lambda root: build(root, CountFn(dsn)), parse(GOOD), tmp_path)
    assert "step Count" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_named_secret_is_found_however_deep(tmp_path):
    key = bytes(range(32))
    with pytest.raises(ConfigError, match="a secret's value"):
        dry_run(lambda root: build(root, CountFn(key.hex())), parse(GOOD), tmp_path, [key])
    assert dry_run(build, parse(GOOD), tmp_path, [key]).files


def test_what_looks_like_a_secret_and_is_none():
    for text in (
        b"postgresql://sync@10.0.0.1:5432/his?passfile=/etc/pass",
        b"host=a passfile=/etc/campus-sync/pass",
        b"file:dead-letter.key env:NAME",
    ):
        assert find_secret(text) == ""


def test_bounded_pipelines_and_flinks_own_steps_are_refused(tmp_path):
    from apache_beam.io.flink.flink_streaming_impulse_source import FlinkStreamingImpulseSource

    with pytest.raises(ConfigError, match="nothing is unbounded"):
        dry_run(lambda root: root | beam.Create([1]), parse(GOOD), tmp_path)
    with pytest.raises(ConfigError, match="runs on Flink only"):
        dry_run(
            lambda root: root | FlinkStreamingImpulseSource() | beam.Map(len), parse(GOOD), tmp_path
        )
