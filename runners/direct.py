"""Runs pipelines in this process, for tests: the only engine here that plays a TestStream."""

import collections.abc

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

RUNNER = "BundleBasedDirectRunner"  # `DirectRunner` would go and fetch another engine first.


def run_directly(
    build: collections.abc.Callable[[beam.Pipeline], object],
    options: PipelineOptions | None = None,
) -> None:
    """Builds a pipeline and runs it to its end.

    For bounded inputs and TestStream: this engine refuses an unbounded source.

    Raises:
      Whatever a transform raises; the pipeline fails with it.
    """
    options = options or PipelineOptions([])
    options.view_as(StandardOptions).streaming = True
    with beam.Pipeline(RUNNER, options=options) as root:
        build(root)
