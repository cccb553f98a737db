"""Dataflow, offline: translates the pipeline, checks the submission, writes the files."""

import base64
import binascii
import bz2
import collections.abc
import contextlib
import copy
import dataclasses
import importlib.util
import json
import pathlib
import re
import zlib

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.runners.pipeline_utils import validate_pipeline_graph
from apache_beam.transforms.environments import DockerEnvironment
from google.protobuf import json_format

from schemas.errors import ConfigError

PIPELINE_FILE = "dataflow-pipeline.pb"
JOB_FILE = "dataflow-job.json"
_LIBRARIES = ("google.auth", "google.cloud.dataflow", "google.cloud.storage")
_FNAPI_VERSION = "8"
_PROTO_BYTES_MAX = 10 << 20  # The service's limit for a job's description.
# A password in a connection string, URL or keyword form, and a private key.
_SECRET = re.compile(
    rb"(?:[a-z]+://[^\s:/@'\"]+:[^\s@'\"]+@)|(?:\b(?:password|passwd|sslpassword)\s*=\s*[^\s;,'\")]+)"
    rb"|(?:-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{40,}={0,2}")
_DEPTH_MAX = 6


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found good.

    Attributes:
      files: what was written; `transforms`, `nbytes`: of the translated pipeline.
      checked, not_checked: in words, for the operator.
    """

    files: tuple[pathlib.Path, ...]
    transforms: int
    nbytes: int
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"Dataflow dry run: {self.transforms} transforms, {self.nbytes} bytes"]
        lines += [f"  written      {path}" for path in self.files]
        lines += [f"  checked      {text}" for text in self.checked]
        lines += [f"  not checked  {text}" for text in self.not_checked]
        return "\n".join(lines)


def dry_run(
    build: collections.abc.Callable[[beam.Pipeline], object],
    options: PipelineOptions,
    work_dir: pathlib.Path,
    secrets: collections.abc.Iterable[bytes] = (),
) -> DryRun:
    """Translates a pipeline as the Dataflow runner would, without network or credentials.

    Writes the portable pipeline (`dataflow-pipeline.pb`) and, where Google's client library
    is installed, the job that would be submitted (`dataflow-job.json`, API v1b3).

    Args:
      build: wires the pipeline.
      options: from `options.parse`; not changed.
      work_dir: for the files.
      secrets: values that must not be in the pipeline, in any encoding we know of.

    Raises:
      ConfigError: an option is missing or wrong, a step cannot run there, or a secret was
        pickled; all that is wrong with the options, or then with the pipeline, with remedies.
    """
    options = _adjusted(options)
    if problems := check_options(options):
        raise ConfigError("\n".join(problems))
    pipeline = beam.Pipeline(runner=DataflowRunner(), options=options)
    build(pipeline)
    proto = _translate(pipeline, options)
    if problems := check_pipeline(proto, secrets):
        raise ConfigError("\n".join(problems))
    work_dir.mkdir(parents=True, exist_ok=True)
    pipeline_file = work_dir / PIPELINE_FILE
    content = proto.SerializeToString(deterministic=True)
    pipeline_file.write_bytes(content)
    files, checked = (
        [pipeline_file],
        [
            "project, region, bucket, streaming engine, worker image, main session",
            "every step has one pinned container; unbounded; keyed state has deterministic coders",
            "no password, private key or named secret in any pickled step",
        ],
    )
    not_checked = ["quota, network paths from the workers to the databases, and permissions"]
    if missing := _missing_libraries():
        not_checked.insert(
            0, f"the v1b3 job: install google-cloud-dataflow-client ({', '.join(missing)} missing)"
        )
    else:
        job_file = work_dir / JOB_FILE
        job_file.write_text(_job_json(options, proto), encoding="utf-8")
        files.append(job_file)
        checked.append("the v1b3 job is complete")
    transforms = sum(not t.subtransforms for t in proto.components.transforms.values())
    return DryRun(tuple(files), transforms, len(content), tuple(checked), tuple(not_checked))


def _adjusted(options: PipelineOptions) -> PipelineOptions:
    options = copy.deepcopy(options)
    options.view_as(StandardOptions).runner = "DataflowRunner"
    options.view_as(StandardOptions).streaming = True
    options.view_as(TestOptions).dry_run = True
    google = options.view_as(GoogleCloudOptions)
    google.job_name = google.job_name or "campus-sync"
    google.staging_location = google.staging_location or google.temp_location
    debug = options.view_as(DebugOptions)
    for experiment in ("use_runner_v2", "enable_streaming_engine", "enable_windmill_service"):
        debug.add_experiment(experiment)
    return options


def check_options(options: PipelineOptions) -> list[str]:
    """Returns what is wrong with the options of a submission, each line with its remedy."""
    google = options.view_as(GoogleCloudOptions)
    workers = options.view_as(WorkerOptions)
    setup = options.view_as(SetupOptions)
    debug = options.view_as(DebugOptions)
    problems = []

    def need(condition: object, what: str, remedy: str) -> None:
        if not condition:
            problems.append(f"dataflow: {what}. Remedy: {remedy}")

    need(google.project, "no project", "--project=PROJECT.")
    need(google.region, "no region", "--region=REGION, the one nearest to the databases.")
    bucket = google.temp_location or ""
    need(
        re.match(r"^gs://[a-z0-9][a-z0-9._-]+(/|$)", bucket),
        "no bucket for temporary files",
        "--temp_location=gs://BUCKET/PATH.",
    )
    need(
        re.match(r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", google.job_name),
        f"job name `{google.job_name}` is not one",
        "--job_name of small letters, digits and hyphens, e.g. campus-sync.",
    )
    image = workers.sdk_container_image or ""
    need(
        re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w][\w.-]*)$", image),
        f"worker image `{image}` is not pinned" if image else "no worker image",
        f"--sdk_container_image=IMAGE:TAG or IMAGE@sha256:DIGEST, built from Beam "
        f"{beam.__version__} with campus-sync installed.",
    )
    off = {"disable_runner_v2", "disable_portable_runner", "disable_streaming_engine"}
    need(
        not off & set(debug.experiments or ()),
        "an experiment turns off Runner v2 or the streaming engine",
        "remove it; Python streaming needs both.",
    )
    need(
        google.enable_streaming_engine is not False
        or debug.lookup_experiment("enable_streaming_engine"),
        "the streaming engine is off",
        "--enable_streaming_engine.",
    )
    need(
        not setup.save_main_session,
        "the main session would be pickled, secrets included",
        "--no_save_main_session.",
    )
    need(
        workers.use_public_ips is False,
        "workers would have public addresses",
        "--no_use_public_ips and --subnetwork=… with a route to the databases.",
    )
    return problems


def _translate(pipeline: beam.Pipeline, options: PipelineOptions) -> beam_runner_api_pb2.Pipeline:
    """As `DataflowRunner.run_pipeline` does up to the job, which needs Google's library."""
    runner = pipeline.runner
    pipeline.visit(runner.combinefn_visitor())
    pipeline.visit(runner.side_input_visitor(deterministic_key_coders=True))
    pipeline.replace_all(DataflowRunner._PTRANSFORM_OVERRIDES)
    runner._adjust_pipeline_for_dataflow_v2(pipeline)
    image = options.view_as(WorkerOptions).sdk_container_image or "unset:unset"
    environment = DockerEnvironment.from_container_image(image)
    options.view_as(PortableOptions).environment_type = "DOCKER"
    proto = pipeline.to_runner_api(default_environment=environment)
    validate_pipeline_graph(proto)
    return proto


def check_pipeline(
    proto: beam_runner_api_pb2.Pipeline, secrets: collections.abc.Iterable[bytes] = ()
) -> list[str]:
    """Returns what forbids to submit a translated pipeline, each line with its remedy."""
    problems = []
    components = proto.components
    for transform in components.transforms.values():
        environment = components.environments.get(transform.environment_id)
        if transform.environment_id and (
            environment is None or environment.urn != common_urns.environments.DOCKER.urn
        ):
            problems.append(
                f"dataflow: step {transform.unique_name} has no container. "
                "Remedy: leave --environment_type away."
            )
        if transform.spec.urn.startswith("flink:"):
            problems.append(
                f"dataflow: step {transform.unique_name} runs on Flink only. "
                "Remedy: build the pipeline with the portable read."
            )
        if found := find_secret(transform.spec.payload, secrets):
            problems.append(
                f"dataflow: step {transform.unique_name} holds {found}. Remedy: pass a reference "
                "(passfile, env:, file:) and resolve it in setup()."
            )
    unbounded = beam_runner_api_pb2.IsBounded.UNBOUNDED
    if not any(p.is_bounded == unbounded for p in components.pcollections.values()):
        problems.append("dataflow: nothing is unbounded. Remedy: use a batch engine.")
    if proto.ByteSize() > _PROTO_BYTES_MAX:
        problems.append(
            f"dataflow: the pipeline has {proto.ByteSize()} bytes, {_PROTO_BYTES_MAX} are "
            "allowed. Remedy: fewer links a job."
        )
    return problems


def find_secret(
    payload: bytes, secrets: collections.abc.Iterable[bytes] = (), depth: int = 0
) -> str:
    """Returns what kind of secret stands in a payload, or "".

    Looks into what Beam's pickler makes: base64 of bzip2 or zlib, one in the other.
    """
    for secret in secrets:
        if secret and any(form in payload for form in _forms(secret)):
            return "a secret's value"
    if _SECRET.search(payload):
        return "a password or private key"
    if depth < _DEPTH_MAX:
        for blob in _unpacked(payload):
            if found := find_secret(blob, secrets, depth + 1):
                return found
    return ""


def _forms(secret: bytes) -> tuple[bytes, ...]:
    forms = [secret, base64.b64encode(secret), secret.hex().encode()]
    with contextlib.suppress(binascii.Error):
        forms.append(base64.b64decode(secret, validate=True))
    return tuple(form for form in forms if len(form) >= 6)  # Shorter ones occur by chance.


def _unpacked(payload: bytes) -> collections.abc.Iterator[bytes]:
    for match in _BASE64.finditer(payload):
        text = match[0]
        try:
            packed = base64.b64decode(text[: len(text) // 4 * 4])
        except binascii.Error:
            continue
        for unpack, error in (
            (bz2.decompress, (OSError, ValueError)),
            (zlib.decompress, zlib.error),
        ):
            try:
                yield unpack(packed)
            except error:
                continue


def _missing_libraries() -> list[str]:
    missing = []
    for name in _LIBRARIES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            missing.append(name)
    return missing


def _job_json(options: PipelineOptions, proto: beam_runner_api_pb2.Pipeline) -> str:
    """Returns the v1b3 job as the service would get it, less what staging adds."""
    # Imported here: Google's library is needed for this only.
    from apache_beam.runners.dataflow.internal import apiclient

    options = copy.deepcopy(options)
    job = apiclient.Job(options, proto)
    staging = options.view_as(GoogleCloudOptions).staging_location
    job.proto.environment = apiclient.Environment(
        packages=[],
        options=options,
        environment_version=_FNAPI_VERSION,
        proto_pipeline_staged_url=f"{staging}/{PIPELINE_FILE}",
        proto_pipeline=proto,
    ).proto
    content = json.loads(json_format.MessageToJson(job.proto._pb))
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
