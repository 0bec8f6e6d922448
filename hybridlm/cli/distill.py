"""`hybridlm distill`: its options, and what it does."""

import argparse
from dataclasses import replace
from pathlib import Path

from hybridlm import config_io
from hybridlm.config import Config, Distill
from hybridlm.config_check import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = (
        "How it learns is set by the fields of `distill`: --distill.loss=jsd --distill.on_policy=0.5. The same command "
        "goes on with the run in --out, with the teacher's checkpoint that it began with."
    )
    parser.add_argument("config", help="of the student: what `hybridlm train` takes")
    parser.add_argument("--teacher", metavar="RUN", help="run directory (default: the config's distill.teacher)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the student's run")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume a run that is there already")


def distill(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(with_teacher(config_io.load_config(args.config), args.teacher), overrides)

    from hybridlm.distributed import joined

    with joined():
        from hybridlm.train.loop import train

        return train(config, args.out, fresh=args.fresh)


def with_teacher(config: Config, run: str | None) -> Config:
    """`config` with the teacher at `run`, or its own. Raises ConfigError where there is none."""
    if run is None:
        if config.distill is None:
            raise ConfigError("--teacher", ": is required, as the config has no distill.teacher; give a run directory")
        return config
    if config.distill is None:
        return replace(config, distill=Distill(teacher=run))
    return replace(config, distill=replace(config.distill, teacher=run))
