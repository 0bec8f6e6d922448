"""`hybridlm eval` of a run on a synthetic task: its options."""

import argparse

from hybridlm.cli.words import check_json, write_json
from hybridlm.config import Config
from hybridlm.config_check import ConfigError

READ = ("run", "length", "pairs", "json", "command", "imports", "behind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that only runs on a task have."""
    parser.add_argument("--pairs", type=int, nargs="+", metavar="N", help="of a run on mqar: numbers of its pairs")


def refuse(args: argparse.Namespace) -> None:
    """Raise ConfigError where a run on text was given options of tasks."""
    if args.pairs is not None:
        raise ConfigError("--pairs", ": is for runs on a task of `hybridlm list tasks`, and this one reads text")


def evaluate(args: argparse.Namespace, config: Config) -> int:
    """The command, for a run whose `data.task` is set."""
    for name, value in vars(args).items():
        if value is not None and name not in READ:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, f": is for runs on text, and this one has data.source={config.data.source}")
    lengths, pairs = tuple(args.length or ()), tuple(args.pairs or ())
    for option, numbers in (("--length", lengths), ("--pairs", pairs)):
        for number in numbers:
            if number < 1:
                raise ConfigError(option, f"={number}: must be at least 1")
    check_json(args.json)

    from hybridlm.evaluation.synthetic import evaluate_task

    report = evaluate_task(config, args.run, lengths=lengths, pairs=pairs)
    if args.json is not None:
        write_json(args.json, report)
    return 0
