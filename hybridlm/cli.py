"""The `hybridlm` command: one small function per subcommand. JAX is imported only when a command needs it.

Exit codes: 0 done; 2 the input is wrong (one line says how); 75 stopped on request after saving; 1 anything else.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hybridlm import config_io
from hybridlm.config import FFN, Mixer, Optimizer, Schedule
from hybridlm.config_check import ConfigError, suggestion

LISTED = ("configs", "mixers", "ffns", "routers", "gates", "optimizers")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"hybridlm: {error}", file=sys.stderr)
        code = 2
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
        code = 130
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Parse `argv` and run its subcommand. Raises ConfigError for wrong input."""
    words, assignments = split_fields(argv)
    args, unknown = make_parser().parse_known_args(words)
    if unknown:
        known = [word for word in vars(args) if word not in ("command", "imports")]
        close = suggestion(unknown[0], [f"--{name.replace('_', '-')}" for name in known])
        raise ConfigError(unknown[0], f": no such option{close}" if close else ": no such option; --help lists them")
    if args.imports:
        sys.path.insert(0, os.getcwd())  # which the installed command, unlike `python -m`, does not look into
    for module in args.imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--import {module}", f": {error}") from None
    return args.command(args, assignments)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hybridlm", description="Pretrain, fine-tune and evaluate hybrid language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        sub.add_argument(
            "--import",
            dest="imports",
            metavar="MODULE",
            action="append",
            default=[],
            help="a module with blocks of your own",
        )
        return sub

    sub = command("train", train, "train a config, or go on with the run in --out")
    sub.epilog = "Any field of the config can be set: --train.steps=100. `hybridlm show CONFIG` lists them."
    sub.add_argument("config", help="a recipe of `hybridlm list configs`, or a path to a .py or .json file")
    sub.add_argument("--out", type=Path, help="run directory (default: runs/NAME)")
    sub.add_argument("--fresh", action="store_true", help="refuse to resume a run that is there already")

    sub = command("eval", evaluate, "loss, perplexity and bits per byte of a run on held-out text")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--data", metavar="SPEC", help="python-stdlib, or a text or .jsonl file or directory: all of it")
    sub.add_argument("--context", type=int, metavar="N", help="window in tokens (default: data.seq_len)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")

    sub = command("experts", experts, "which experts of a run's layers the tokens of held-out text go to")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--data", metavar="SPEC", help="as for eval (default: the run's held-out text)")
    sub.add_argument("--batches", type=int, metavar="N", help="so many, spread evenly over the text (default: all)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")

    sub = command("generate", generate, "continue a prompt")
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

    sub = command("upcycle", upcycle, "begin a run of a mixture of experts with the parameters of a dense run")
    sub.add_argument("run", type=Path, help="directory of the dense run")
    sub.add_argument("config", help="of the new run: what `hybridlm train` takes")
    sub.add_argument("--out", type=Path, required=True, help="directory of the new run; train the same config there")
    sub.add_argument(
        "--mask-fraction", type=float, default=0.0, metavar="F", help="of each expert's weights, set to 0 at random"
    )

    sub = command("prune", prune, "begin a run with those experts of another whose router vectors changed most")
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--keep", type=int, required=True, metavar="N", help="experts of each layer")
    sub.add_argument("--out", type=Path, required=True, help="directory of the new run")
    sub.add_argument("--since", type=Path, metavar="RUN", help="of what it began with (default: its seed's parameters)")

    sub = command("show", show, "every field of a config, with its value")
    sub.add_argument("config")
    sub.add_argument("--json", action="store_true", help="as JSON")

    sub = command("kernels", kernels, "which implementation each kernel operation takes, and why")
    sub.add_argument(
        "config", nargs="?", help="what `hybridlm train` takes (default: every operation, at common shapes)"
    )
    sub.add_argument(
        "--topology", metavar="NAME", help="as if on these devices: v5p, v5e:4x4, h200:8 (default: those here)"
    )

    sub = command("list", list_names, "what there is to choose from")
    sub.add_argument("what", nargs="?", default="configs", choices=LISTED)
    return parser


class Parser(argparse.ArgumentParser):
    """Reports errors as one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        raise ConfigError(command or "COMMAND", f": {message}; `{self.prog} --help` says more")


def split_fields(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are not about fields of the config; and `--a.b=1` or `--a.b 1` as `a.b=1`."""
    others, assignments, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w[\w-]*\.", word):
            others.append(word)
            continue
        if "=" not in word:
            if not words or words[0].startswith("--"):
                raise ConfigError(word, ": needs a value, such as --train.steps=100")
            word = f"{word}={words.pop(0)}"
        assignments.append(word.removeprefix("--"))
    return others, assignments


def train(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_config(args.config), overrides)
    directory = args.out or Path("runs") / Path(args.config).stem

    from hybridlm.train.loop import train

    return train(config, directory, fresh=args.fresh)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_run_config(args.run), overrides)
    if args.context is not None:
        if args.context < 2:
            raise ConfigError("--context", f"={args.context}: must be at least 2")
        config = replace(config, data=replace(config.data, seq_len=args.context))
    check_json(args.json)

    from hybridlm.evaluation.perplexity import evaluate_run

    report = evaluate_run(config, args.run, data_spec=args.data)
    if args.json is not None:
        write_json(args.json, report)
    return 0


def experts(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_run_config(args.run), overrides)
    if args.batches is not None and args.batches < 1:
        raise ConfigError("--batches", f"={args.batches}: must be at least 1")
    check_json(args.json)

    from hybridlm.evaluation.experts import usage_of_run

    report = usage_of_run(config, args.run, data_spec=args.data, batches=args.batches)
    if args.json is not None:
        write_json(args.json, report)
    return 0


def generate(args: argparse.Namespace, overrides: list[str]) -> int:
    config_io.load_run_config(args.run)
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm generate` takes the run's own config; leave it out")
    if args.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens", f"={args.max_new_tokens}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ConfigError("--seed", f"={args.seed}: must be at least 0 and below {2**32}")
    if args.usage is not None and args.resident_experts is None:
        raise ConfigError(f"--usage {args.usage}", ": says which experts are resident; give --resident-experts as well")
    try:
        prompt = args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt", f": is not UTF-8 at character {error.start}; correct it") from None

    from hybridlm import load
    from hybridlm.data.tokenizers import StreamDecoder
    from hybridlm.generate import Sampling, generate

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    model, tokenizer, _ = load(args.run, resident_experts=args.resident_experts, usage=args.usage)
    decoder = StreamDecoder(tokenizer, context=tokenizer.encode(prompt).tolist())
    print(args.prompt, end="", flush=True)
    for token in generate(
        model, tokenizer, prompt, max_new_tokens=args.max_new_tokens, sampling=sampling, seed=args.seed
    ):
        print(decoder.push(token), end="", flush=True)
    print(decoder.finish())
    if (store := model.store) is not None:
        times, megabytes = store.num_fetched, store.bytes_fetched / 1e6
        print(f"experts fetched from host memory: {times:,} times, {megabytes:,.1f} MB", file=sys.stderr)
    return 0


def upcycle(args: argparse.Namespace, overrides: list[str]) -> int:
    config_io.load_run_config(args.run)
    config = config_io.override(config_io.load_config(args.config), overrides)

    from hybridlm.train.derived import upcycle_run

    upcycle_run(config, args.run, args.out, mask_fraction=args.mask_fraction)
    return 0


def prune(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_run_config(args.run), overrides)

    from hybridlm.train.derived import prune_run

    prune_run(config, args.run, args.out, keep=args.keep, since=args.since)
    return 0


def show(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_config(args.config), overrides)
    if args.json:
        print(json.dumps(config_io.to_dict(config), indent=2))
    else:
        for line in outline(config, ""):
            print(line)
    return 0


def outline(value: Any, path: str) -> Iterator[str]:
    """`path=value` of every field, and `path: Class` above the fields of what may be of several classes."""
    parts = config_io.children(value)
    if parts is None or parts == {}:
        yield f"{path}={config_io.as_text(value)}"
        return
    if isinstance(value, Mixer | FFN | Optimizer | Schedule):
        yield f"{path}: {type(value).__name__}"
    for name, part in parts.items():
        yield from outline(part, config_io.join(path, name))


def kernels(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.config is None and overrides:
        raise ConfigError(
            overrides[0], ": name the config whose fields are meant, as in `hybridlm kernels griffin_tiny`"
        )
    config = None if args.config is None else config_io.override(config_io.load_config(args.config), overrides)

    from hybridlm.plan.kernels import kernels_at, kernels_of
    from hybridlm.plan.topology import topology

    where = None if args.topology is None else topology(args.topology)
    rows = kernels_at(where) if config is None else kernels_of(config, where)
    width = max((12, *(len(row.choice.op) for row in rows)))
    for row in rows:
        print(f"{row.choice.op:{width}} {row.phase:7} {row.choice.impl:10}  {'; '.join(row.choice.reasons)}")
        print(f"{'':{width}} {' '.join(row.operands)}")
    if not rows:
        print("this model calls no kernel operation")
    return 0


def list_names(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm list` has no config to set fields of")
    if args.what == "configs":
        rows = [(name, summary) for name, summary, _ in config_io.list_recipes()]
    else:
        rows = [(cls.__name__, (cls.__doc__ or "").partition("\n")[0]) for cls in registered(args.what)]
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:{width}}  {summary}")
    return 0


def registered(what: str) -> list[type]:
    """The config classes that something is registered for."""
    from hybridlm.ffns import FFNS
    from hybridlm.ffns.moe.gates import GATES
    from hybridlm.ffns.moe.routers import ROUTERS
    from hybridlm.mixers import MIXERS
    from hybridlm.optim import OPTIMIZERS

    entries = {"mixers": MIXERS, "ffns": FFNS, "routers": ROUTERS, "gates": GATES}
    return list(OPTIMIZERS if what == "optimizers" else entries[what].entries)


def check_json(path: Path | None) -> None:
    """Raise ConfigError where no report can be written at `path`."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json {path}", f": no directory {path.parent}; make it first")
    if path is not None and path.is_dir():
        raise ConfigError(f"--json {path}", ": is a directory; name a file in it")


def write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}", f": cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
