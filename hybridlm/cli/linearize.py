"""`hybridlm linearize`: its options, and what it does."""

import argparse
from dataclasses import replace
from pathlib import Path

from hybridlm import config_io
from hybridlm.cli.finetune import add_adapter_arguments, with_adapters
from hybridlm.config import Finetune

MIXERS = ("gla", "simple_gla", "gated_deltanet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = (
        "The new run is about to take its first step: `hybridlm train DIR/config.json --out DIR` recovers what was "
        "lost. Any field of its config can be set, as for train."
    )
    parser.add_argument("run", type=Path, help="run directory, of a model with softmax attention")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the new run")
    parser.add_argument("--mixer", choices=MIXERS, default="gla", help="the recurrence (default: gla)")
    parser.add_argument(
        "--window",
        type=int,
        default=64,
        metavar="N",
        help="tokens that the local attention beside it sees (default: 64)",
    )
    parser.add_argument("--keep-every", type=int, metavar="K", help="leave every K-th of these attention layers alone")
    parser.add_argument("--distill", action="store_true", help="make RUN the teacher of the new run")
    add_adapter_arguments(parser)


def linearize(args: argparse.Namespace, overrides: list[str]) -> int:
    config = replace(config_io.load_run_config(args.run), finetune=Finetune())
    config = config_io.override(with_adapters(config, args), overrides)

    from hybridlm.train.derived import linearize_run

    options = {"recurrence": args.mixer, "window": args.window, "keep_every": args.keep_every}
    linearize_run(config, args.run, args.out, **options, teach=args.distill)
    return 0
