"""The `hybridlm` command: one small function per subcommand. JAX is imported only when a command needs it.

Exit codes: 0 done; 2 the input is wrong (one line says how); 3 a planned step does not fit; 75 stopped on request after
saving; 76 devices held different copies of an array; 1 anything else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hybridlm.cli import distill, evaluate, finetune, interop, linearize, listing, prepare, report, runs, supervise
from hybridlm.cli.parser import make_parser
from hybridlm.cli.words import split_command, split_fields
from hybridlm.config_check import ConfigError, suggestion
from hybridlm.exit_codes import EXIT_INTERRUPTED, EXIT_WRONG_INPUT

COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "train": runs.train,
    "supervise": supervise.supervise,
    "plan": runs.plan,
    "eval": evaluate.evaluate,
    "experts": runs.experts,
    "checkpoints": runs.checkpoints,
    "generate": runs.generate,
    "prepare": prepare.prepare,
    "distill": distill.distill,
    "linearize": linearize.linearize,
    "finetune": finetune.finetune,
    "import": interop.import_run,
    "export": interop.export_run,
    "upcycle": runs.upcycle,
    "prune": runs.prune,
    "report": report.report,
    "show": listing.show,
    "kernels": listing.kernels,
    "list": listing.list_names,
}
"""Each takes its arguments, and assignments to fields of a config; and returns an exit code."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"hybridlm: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except FloatingPointError as error:
        print(f"hybridlm: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:
        # The reader has gone, as in `| head`: nothing more can be written, not even by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        # Disk full, for one: what went wrong is in the message, not in our stack.
        print(f"hybridlm: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("hybridlm: interrupted, not saved", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Parse `argv` and run its subcommand. Raises ConfigError for wrong input."""
    ours, behind = split_command(argv)
    words, assignments = split_fields(ours)
    args, unknown = make_parser().parse_known_args(words)
    if unknown:
        known = [word for word in vars(args) if word not in ("command", "imports")]
        close = suggestion(unknown[0], [f"--{name.replace('_', '-')}" for name in known])
        raise ConfigError(unknown[0], f": no such option{close}" if close else ": no such option; --help lists them")
    supervise.import_modules(args.imports)
    args.behind = behind
    if behind and args.command != "supervise":
        raise ConfigError("--", ": only `hybridlm supervise` takes a command behind it")
    return COMMANDS[args.command](args, assignments)
