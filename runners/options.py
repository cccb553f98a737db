"""The command's own options, the engine's tuning, and the refusal of flags nobody knows."""

import argparse
import collections.abc
import difflib
import pathlib

from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options import PipelineOptions

from schemas.errors import ConfigError


class SyncOptions(PipelineOptions):
    """Options of campus-sync itself, as a view of Beam's."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--work_dir", default=None, help="Logs and engine files.")
        parser.add_argument("--maven_repository", default=None, help="Mirror of Maven Central.")
        parser.add_argument("--flink_memory", default="1g", help="Heap of the Flink JVM (-Xmx).")
        parser.add_argument("--java", default=None, help="Java 17 program to run Flink with.")
        parser.add_argument(
            "--workers",
            choices=["process", "thread"],
            default="process",
            help="Python workers as processes of their own, or in the submitting process.",
        )
        parser.add_argument(
            "--read",
            choices=["pulse", "splittable"],
            default="pulse",
            help="How Flink paces unbounded reads: pulse keeps its memory bounded; splittable is"
            " Beam's own, with watermarks.",
        )
        parser.add_argument(
            "--restarts_max",
            type=int,
            default=5,
            help="Failures in a row, each within a minute of its start, before giving up.",
        )


class FlinkTuning(PipelineOptions):
    """Options of Beam's Java runner for Flink, which the Python SDK does not know.

    Declared here so that a typing slip is refused and `--name=value` works too. The defaults
    give low latency, and no checkpoints: the ledgers in the stores are the truth, a checkpoint
    would only put patients' data on a disk and wait for every read.
    """

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        for name, default, text in (
            ("checkpointing_interval", -1, "Milliseconds between checkpoints; -1: none."),
            ("max_bundle_time_mills", 20, "Longest wait for a bundle to fill, milliseconds."),
            ("max_bundle_size", 1, "Most elements in a bundle; an element is a batch of rows."),
            ("checkpoint_timeout_millis", None, "A checkpoint that takes longer is given up."),
            ("min_pause_between_checkpoints", None, "Milliseconds from one to the next."),
            ("number_of_execution_retries", 10, "Restarts by Flink itself, before ours."),
            ("execution_retry_delay", 500, "Milliseconds before each of those."),
            ("environment_expiration_millis", None, "Replace a worker after so long."),
            ("shutdown_sources_after_idle_ms", None, "End a job whose sources have ended."),
        ):
            parser.add_argument(f"--{name}", type=int, default=default, help=text)
        for name, text in (
            ("state_backend", "hashmap or rocksdb."),
            ("state_backend_storage_path", "Where checkpoints are kept."),
            ("savepoint_path", "Savepoint to start from."),
            ("flink_conf_dir", "Directory of flink-conf.yaml."),
            ("checkpointing_mode", "EXACTLY_ONCE or AT_LEAST_ONCE."),
        ):
            parser.add_argument(f"--{name}", default=None, help=text)
        for name, text in (
            ("externalized_checkpoints_enabled", "Keep checkpoints after the job."),
            ("unaligned_checkpoint_enabled", "Checkpoints overtake waiting elements."),
            ("object_reuse", "Pass elements between chained stages without copying."),
            ("faster_copy", "Copy elements only where they are shared."),
        ):
            parser.add_argument(f"--{name}", action="store_true", default=None, help=text)


class _Parser(pipeline_options._BeamArgumentParser):
    """Raises instead of printing usage and leaving."""

    def error(self, message: str):
        raise ConfigError(f"{message}. Remedy: see `campus-sync run --help`.")


def parse(flags: collections.abc.Sequence[str], **overrides: object) -> PipelineOptions:
    """Returns Beam's options of `flags`, our views among them; streaming, no main session.

    Every flag must be known to a view, else a slip would run with the default.

    Raises:
      ConfigError: a flag is unknown, lacks its value or has a wrong one; all at once.
    """
    flags = [str(flag) for flag in flags]
    _refuse_unknown(flags)
    if not any(
        flag.startswith(("--no_save_main_session", "--save_main_session")) for flag in flags
    ):
        flags.append("--no_save_main_session")
    if "--streaming" not in flags:
        flags.append("--streaming")
    if not any(flag.split("=")[0] == "--parallelism" for flag in flags):
        flags.append("--parallelism=1")  # A link is one stream: more tasks only cost memory.
    return PipelineOptions(flags, **overrides)


def one_worker(options: PipelineOptions) -> bool:
    """Whether one process serves every stage: what it holds, each of them can have."""
    tasks = options.view_as(pipeline_options.FlinkRunnerOptions).parallelism
    workers = options.view_as(pipeline_options.PortableOptions).sdk_worker_parallelism
    return tasks == 1 and workers == 1


def known_flags() -> tuple[str, ...]:
    """Returns every flag that some view of Beam's options declares, `--name` each."""
    return tuple(sorted(flag for flag in _parser()._option_string_actions if flag[:2] == "--"))


def _parser() -> _Parser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    for view in {str(view): view for view in PipelineOptions.__subclasses__()}.values():
        view._add_argparse_args(parser)
    return parser


def _refuse_unknown(flags: list[str]) -> None:
    parser = _parser()
    _, unknown = parser.parse_known_args(flags)
    if not unknown:
        return
    known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    lines = []
    for word in unknown:
        name, _, _ = word.partition("=")
        if not name.startswith("-"):
            lines.append(f"`{word}` belongs to no option. Remedy: remove it, or quote the value.")
            continue
        wanted = "--" + name.lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
        remedy = f"did you mean `{close[0]}`?" if close else "see `campus-sync run --help`."
        lines.append(f"unknown option `{name}`. Remedy: {remedy}")
    raise ConfigError("\n".join(lines))


def work_dir(options: PipelineOptions, default: pathlib.Path) -> pathlib.Path:
    """Returns the directory for logs and engine files, made if it is not there."""
    path = pathlib.Path(options.view_as(SyncOptions).work_dir or default).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path
