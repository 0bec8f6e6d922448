"""`hybridlm supervise`, and the training command behind it."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridlm import config_io
from hybridlm.cli.parser import make_parser
from hybridlm.cli.words import split_fields
from hybridlm.config import Config
from hybridlm.config_check import ConfigError


def supervise(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": belongs to the command behind --")
    for name in ("restarts", "pause"):
        if not getattr(args, name) >= 0:
            raise ConfigError(f"--{name}", f"={getattr(args, name)}: must be at least 0")
    _, directory = check_train_command(args.behind)

    from hybridlm.supervisor import supervise

    command = [sys.executable, "-m", "hybridlm.cli", *args.behind]
    return supervise(command, directory, restarts=args.restarts, pause_seconds=args.pause)


def check_train_command(words: Sequence[str]) -> tuple[Config, Path]:
    """The config and the run directory of a `train` command. Raises ConfigError where it is none, or a wrong one."""
    if not words:
        raise ConfigError("--", ": is missing, and the command behind it, as in -- train griffin_tiny --out runs/a")
    others, assignments = split_fields(words)
    args, unknown = make_parser().parse_known_args(others)
    if unknown:
        raise ConfigError(unknown[0], f": no such option of `hybridlm {words[0]}`")
    if args.command != "train":
        raise ConfigError(words[0], ": runs in one process and needs no launcher and no supervisor; only `train` does")
    import_modules(args.imports)
    config = config_io.override(config_io.load_config(args.config), assignments)
    return config, args.out or Path("runs") / Path(args.config).stem


def import_modules(names: Sequence[str]) -> None:
    """Modules with a user's own blocks."""
    if names:
        sys.path.insert(0, os.getcwd())  # which the installed command, unlike `python -m`, does not look into
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--import {name}", f": {error}") from None
