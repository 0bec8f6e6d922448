"""The options of every command."""

import argparse
from pathlib import Path

from hybridlm.cli import distill, evaluate, finetune, interop, linearize, prepare, report, synthetic
from hybridlm.cli.words import Parser

LISTED = ("configs", "mixers", "ffns", "routers", "gates", "optimizers", "tasks")


def make_parser() -> argparse.ArgumentParser:
    """Of `hybridlm`. `command` is the name of the subcommand, `imports` the modules to import first."""
    parser = Parser(prog="hybridlm", description="Pretrain, fine-tune and evaluate hybrid language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=name)
        sub.add_argument(
            "--import",
            dest="imports",
            metavar="MODULE",
            action="append",
            default=[],
            help="a module with blocks of your own",
        )
        return sub

    sub = command("train", "train a config, or go on with the run in --out")
    sub.epilog = "Any field of the config can be set: --train.steps=100. `hybridlm show CONFIG` lists them."
    sub.add_argument("config", help="a recipe of `hybridlm list configs`, or a path to a .py or .json file")
    sub.add_argument("--out", type=Path, help="run directory (default: runs/NAME)")
    sub.add_argument("--fresh", action="store_true", help="refuse to resume a run that is there already")

    sub.add_argument(
        "--executable", type=Path, metavar="FILE", help="of `hybridlm plan --save`: run that step, compile none"
    )

    sub = command("plan", "compile a config's training step for devices that are not there, and say what it needs")
    sub.epilog = "Exit code 3: it does not fit. Any field of the config can be set, as for train."
    sub.add_argument("config", help="what `hybridlm train` takes")
    sub.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:8x8x16, 'v5e:16x16*4' (four slices), h200:8, cpu:4"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    sub.add_argument("--save", type=Path, metavar="FILE", help="write the executable there, for train --executable")
    sub.add_argument("--no-advice", action="store_true", help="do not look for what would make it fit")
    sub.add_argument("--search", action="store_true", help="rank meshes, remat policies and batches")
    sub.add_argument("--compiles", type=int, default=8, metavar="N", help="how many of these to compile (default: 8)")

    sub = command("supervise", "run a training command, and start it again after preemptions and crashes")
    sub.epilog = "Behind -- comes the command: hybridlm supervise --restarts 5 -- train griffin_tiny --out runs/a"
    sub.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="give up after so many in a row without a new checkpoint (default: 3)",
    )
    sub.add_argument("--pause", type=float, default=5.0, metavar="S", help="seconds before each (default: 5)")

    sub = command("eval", "a run on held-out text or other text, and on tasks")
    evaluate.add_arguments(sub)
    synthetic.add_arguments(sub)

    sub = command("experts", "which experts of a run's layers the tokens of held-out text go to")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--data", metavar="SPEC", help="as for eval (default: the run's held-out text)")
    sub.add_argument("--batches", type=int, metavar="N", help="so many, spread evenly over the text (default: all)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")

    sub = command("checkpoints", "the checkpoints of a run, and whether they are what was saved")
    sub.epilog = "Exit code 1: --verify found damage, each on a line of its own."
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--verify", action="store_true", help="read them: sizes, checksums, fingerprints, finite values")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the records there as well")

    sub = command("generate", "continue a prompt")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    sub.add_argument("--top-k", type=int, metavar="K")
    sub.add_argument("--top-p", type=float, metavar="P")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--resident-experts", type=int, metavar="N", help="of each layer on the device, the others in host memory"
    )
    sub.add_argument(
        "--usage",
        type=Path,
        metavar="FILE",
        help="of `hybridlm experts --json`, which says which are resident (default: found on held-out text)",
    )

    prepare.add_arguments(command("prepare", "a corpus to shards of tokens, to train on"))

    distill.add_arguments(command("distill", "train a config on the probabilities of a teacher"))
    linearize.add_arguments(command("linearize", "begin a run with linear recurrences in place of another's attention"))

    finetune.add_arguments(command("finetune", "go on from the parameters of a run, with other text or fewer of them"))

    interop.add_import_arguments(command("import", "begin a run with the weights of a published model"))
    interop.add_export_arguments(command("export", "write a run as a published model"))

    sub = command("upcycle", "begin a run of a mixture of experts with the parameters of a dense run")
    sub.add_argument("run", type=Path, help="directory of the dense run")
    sub.add_argument("config", help="of the new run: what `hybridlm train` takes")
    sub.add_argument("--out", type=Path, required=True, help="directory of the new run; train the same config there")
    sub.add_argument(
        "--mask-fraction", type=float, default=0.0, metavar="F", help="of each expert's weights, set to 0 at random"
    )

    sub = command("prune", "begin a run with those experts of another whose router vectors changed most")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--keep", type=int, required=True, metavar="N", help="experts of each layer")
    sub.add_argument("--out", type=Path, required=True, help="directory of the new run")
    sub.add_argument("--since", type=Path, metavar="RUN", help="of what it began with (default: its seed's parameters)")

    report.add_arguments(command("report", "what runs wrote down, as one HTML page that needs no network"))

    sub = command("show", "every field of a config, with its value")
    sub.add_argument("config")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("kernels", "which implementation each kernel operation takes, and why")
    sub.add_argument(
        "config", nargs="?", help="what `hybridlm train` takes (default: every operation, at common shapes)"
    )
    sub.add_argument(
        "--topology", metavar="NAME", help="as if on these devices: v5p, v5e:4x4, h200:8 (default: those here)"
    )

    sub = command("list", "what there is to choose from")
    sub.add_argument("what", nargs="?", default="configs", choices=LISTED)
    return parser
