"""The parts of a preparation over the workers of an Apache Beam runner.

Every worker must see the source and the output by the same path as this process: one machine, or a shared file system.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.config_check import ConfigError
from hybridlm.data.prepare import Job, Part, is_done, prepare_part


def run_on_beam(job: Job, parts: Mapping[int, Part], runner: str, options: Sequence[str]) -> None:
    """Make `parts` on the Beam runner of that name; `options` are Beam's own, as `KEY=VALUE`.

    Raises:
        ConfigError: Beam is not installed, or knows no such runner.
    """
    beam: Any = _import("apache_beam")
    pipeline_options: Any = _import("apache_beam.options.pipeline_options")
    try:
        pipeline = beam.Pipeline(
            runner=runner, options=pipeline_options.PipelineOptions([f"--{option}" for option in options])
        )
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError("--runner", f" {runner}: {str(error).splitlines()[0]}") from error
    # Reshuffle: without it a runner may keep all parts on the worker that was given their list.
    with pipeline:
        numbered = pipeline | beam.Create(list(parts.items())) | beam.Reshuffle()
        _ = numbered | beam.MapTuple(functools.partial(_make, job))
    if missing := [number for number in parts if not is_done(job.directory, number)]:
        raise ConfigError(
            "--runner",
            f" {runner}: {len(missing)} of {len(parts)} parts did not arrive in {job.directory}; the runner's "
            "workers must see it by the same path",
        )


def _make(job: Job, number: int, part: Part) -> int:
    prepare_part(job, number, part)
    return number


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError("--runner", ": needs Apache Beam; install it with pip install 'hybridlm[beam]'") from error
