"""`hybridlm eval`: its options, and where its numbers go."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm import config_io
from hybridlm.cli import synthetic
from hybridlm.cli.words import check_json, write_json
from hybridlm.config import Config, Data
from hybridlm.config_check import ConfigError

if TYPE_CHECKING:
    from hybridlm.evaluation.options import Options
    from hybridlm.evaluation.task import Task

ABOUT_TASKS = ("data", "windows", "stride", "domain_field", "by_file", "bootstrap", "seed", "limit", "read_twice")
ABOUT_TASKS += ("length", "depth", "samples", "ngram", "rare", "include")
"""Options that are fields of `hybridlm.evaluation.options.Options` too."""
AT_LEAST = {"bootstrap": 1, "seed": 0, "limit": 1, "samples": 1, "ngram": 2, "rare": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = "Numbers go to RUN/eval.jsonl as well. `hybridlm list tasks` lists the tasks."
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    add("--data", metavar="SPEC", help="all of python-stdlib, tfds:NAME, a text, .jsonl or .parquet file, or directory")
    add("--split", metavar="NAME", help="of a TFDS dataset: test, 'train[:10%%]'")
    add("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps datasets (default: its own)")
    add("--task", action="append", metavar="NAME", help="may be repeated; harness:NAME is one of lm-evaluation-harness")
    add("--task-file", action="append", type=Path, metavar="FILE", help="of each task that needs one, in their order")
    add("--context", type=int, metavar="N", help="window in tokens (default: data.seq_len)")
    add("--windows", metavar="MODE", help="packed (default), sliding, separate or carried")
    add("--stride", type=int, metavar="N", help="of sliding windows: so many tokens of each count")
    add("--domain-field", metavar="FIELD", help="of JSON lines: a line of the table for each of its values")
    add("--by-file", action="store_true", default=None, help="a line of the table for each file")
    add("--bootstrap", type=int, metavar="N", help="95 %% intervals from N draws of documents")
    add("--seed", type=int, metavar="N", help="of these draws, and of prompts (default: 0)")
    add("--limit", type=int, metavar="N", help="the first N questions")
    add("--read-twice", action="store_true", default=None, help="prompts that hold the context twice")
    add("--length", type=int, nargs="+", metavar="N", help="of prompts or texts in tokens, or of examples")
    add("--depth", type=float, nargs="+", metavar="F", help="of what is hidden, from 0 to 1")
    add("--samples", type=int, metavar="N", help="prompts of each length and depth (default: 8)")
    add("--ngram", type=int, metavar="N", help="tokens that make a recall (default: 2)")
    add("--rare", type=int, metavar="N", help="recall is of n-grams that the training text holds N times at most")
    add("--include", type=Path, metavar="DIR", help="tasks in YAML, instead of those that lm-evaluation-harness has")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")


def evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
    run_config = config_io.load_run_config(args.run)
    config = config_io.override(run_config, overrides)
    if config.data.task is not None and args.task is None:
        return synthetic.evaluate(args, config)
    synthetic.refuse(args)
    if args.context is not None:
        if args.context < 2:
            raise ConfigError("--context", f"={args.context}: must be at least 2")
        config = replace(config, data=replace(config.data, seq_len=args.context))
    check_json(args.json)
    given = {name: value for name in ABOUT_TASKS if (value := getattr(args, name)) is not None}
    check_numbers(given)
    with readable(args, config.data) as spec:
        if args.task is None and given.keys() <= {"data"} and args.task_file is None:
            report = plain(config, args, spec)
        else:
            if spec is not None:
                given["data"] = spec
            report = with_tasks(config, args, given, train_length=run_config.data.seq_len)
    if args.json is not None:
        write_json(args.json, report)
    return 0


@contextlib.contextmanager
def readable(args: argparse.Namespace, data: Data) -> Iterator[str | None]:
    """`--data`, or shards of it that are there meanwhile where only `hybridlm prepare` reads it."""
    spec: str | None = args.data
    is_tfds = spec is not None and spec.startswith("tfds:")
    for option, value in (("--split", args.split), ("--tfds-dir", args.tfds_dir)):
        if value is not None and not is_tfds:
            raise ConfigError(f"{option} {value}", ": is about --data tfds:NAME; leave it out")
    if spec is None or not (is_tfds or spec.endswith(".parquet")):
        yield spec
        return
    from hybridlm.data.prepare_sources import open_source
    from hybridlm.data.prepare_workers import prepare_here

    source = open_source(
        spec, text_key=data.text_key, tokenizer=data.tokenizer, split=args.split, tfds_directory=args.tfds_dir
    )
    with tempfile.TemporaryDirectory(prefix="hybridlm-") as directory:
        prepare_here(source, data.tokenizer, Path(directory))
        yield directory


def plain(config: Config, args: argparse.Namespace, spec: str | None) -> dict[str, Any]:
    """Packed windows of held-out text, and what gzip makes of it."""
    from hybridlm.evaluation.perplexity import evaluate_run

    report = evaluate_run(config, args.run, data_spec=spec)
    settings = {"windows": "packed", "context": config.data.seq_len}
    keep(args.run, {"task": "perplexity"} | data_of(args.data) | settings | report)
    return report


def with_tasks(config: Config, args: argparse.Namespace, given: dict[str, Any], *, train_length: int) -> dict[str, Any]:
    """Every task in its turn; the report of the only one where no --task names it, else `step` and `results`."""
    from hybridlm.evaluation import windows
    from hybridlm.evaluation.scoring import open_run
    from hybridlm.evaluation.tasks import task_named

    names = args.task or ["perplexity"]
    tasks = [task_named(name) for name in names]
    check_reads(names, tasks, given)
    runs = list(zip(names, tasks, options_of(names, tasks, given, args.task_file or []), strict=True))
    for _, _, options in runs:
        windows.check(options.windows, config.data.seq_len, options.stride)  # before a checkpoint is read
    results = []
    scorer = open_run(config, args.run, train_length)
    print(f"checkpoint       step {scorer.step}")
    for name, task, options in runs:
        data = data_of(None if options.data is None else args.data)
        settings = {"step": scorer.step, "task": name} | data | settings_of(options, task)
        print(f"task             {name}" + ("" if options.file is None else f" of {options.file}"))
        report = settings | task.run(scorer, options)
        for line in task.lines({key: value for key, value in report.items() if key not in settings}):
            print(line, flush=True)
        keep(args.run, report, task.charted)
        results.append(report)
    return results[0] if args.task is None else {"step": results[0]["step"], "results": results}


def check_numbers(given: dict[str, Any]) -> None:
    """Raise ConfigError where an option is out of its range."""
    from hybridlm.evaluation.windows import MODES

    for name, least in AT_LEAST.items():
        if given.get(name, least) < least:
            raise ConfigError(f"--{name}", f"={given[name]}: must be at least {least}")
    if (mode := given.get("windows")) is not None and mode not in MODES:
        raise ConfigError(f"--windows={mode}", f": must be one of {', '.join(MODES)}")
    for depth in given.get("depth", ()):
        if not 0 <= depth <= 1:
            raise ConfigError("--depth", f"={depth}: must be from 0, the beginning, to 1, the end")
    for length in given.get("length", ()):
        if length < 1:
            raise ConfigError("--length", f"={length}: must be at least 1")
    if "by_file" in given and "domain_field" in given:
        raise ConfigError("--by-file", ": or --domain-field, but not both")


def check_reads(names: list[str], tasks: "list[Task]", given: dict[str, Any]) -> None:
    """Raise ConfigError where none of the tasks heeds an option."""
    for name in given:
        if not any(name in task.reads for task in tasks):
            raise ConfigError(f"--{name.replace('_', '-')}", f": does nothing for {', '.join(names)}; leave it out")


def options_of(names: list[str], tasks: "list[Task]", given: dict[str, Any], files: list[Path]) -> "list[Options]":
    """Those of every task: the fields that it heeds, and its file. Raises ConfigError where files and tasks differ."""
    from hybridlm.evaluation.options import Options

    asking = [name for name, task in zip(names, tasks, strict=True) if task.needs_file]
    if len(asking) != len(files):
        if not asking:
            raise ConfigError(f"--task-file {files[0]}", f": {', '.join(names)} needs none; leave it out")
        raise ConfigError(
            f"--task {asking[min(len(files), len(asking) - 1)]}",
            f": {len(asking)} tasks need a --task-file and {len(files)} are given; give one for each, in their order",
        )
    for file in files:
        if not file.exists():
            raise ConfigError(f"--task-file {file}", ": is not there")
    left = iter(files)
    made = []
    for task in tasks:
        heeded: dict[str, Any] = {name: value for name, value in given.items() if name in task.reads}
        heeded = {name: tuple(value) if isinstance(value, list) else value for name, value in heeded.items()}
        made.append(Options(**heeded, file=next(left) if task.needs_file else None))
    return made


def settings_of(options: "Options", task: "Task") -> dict[str, Any]:
    """What the numbers depend on and the report does not say itself."""
    named = {"read_twice": options.read_twice, "limit": options.limit, "seed": options.seed}
    kept = {name: value for name, value in named.items() if name in task.reads and value}
    return kept if options.file is None else kept | {"file": str(options.file)}


def data_of(spec: str | None) -> dict[str, Any]:
    return {} if spec is None else {"data": spec}


def keep(run: Path, report: dict[str, Any], charted: Set[str] = frozenset()) -> None:
    """Add the numbers to the run's eval.jsonl, of tables those that are `charted`; a run that cannot be written to is
    only read."""
    from hybridlm.train.metrics import JsonLines

    flat = {name: value for name, value in report.items() if name in charted or not isinstance(value, list | dict)}
    try:
        JsonLines(run / "eval.jsonl").append(flat)
    except OSError as error:
        print(f"hybridlm: {error}; the numbers are not kept there", file=sys.stderr)
