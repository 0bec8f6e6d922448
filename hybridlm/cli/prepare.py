"""`hybridlm prepare`: its options, and what it prints."""

import argparse
import functools
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.config_check import ConfigError
from hybridlm.exit_codes import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from hybridlm.data.manifest import Manifest

# Of a config, whose fields the readers of corpora name in their errors.
OPTIONS = {
    "data.path": "SOURCE",
    "data.source": "SOURCE",
    "data.text_key": "--text-key",
    "data.tokenizer": "--tokenizer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = (
        "The same command goes on where it was stopped, and makes lost shards again. Train on it with "
        "--data.source=prepared --data.path=DIR."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="text, .jsonl(.gz) or .parquet file or directory, python-stdlib, or tfds:NAME[/CONFIG][:VERSION]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where shards and manifest go")
    parser.add_argument(
        "--tokenizer", default="byte", metavar="NAME", help="byte (default), a tokenizer.json or a .model file"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field that holds the text (default: text)")
    parser.add_argument("--split", metavar="NAME", help="of a TFDS dataset: train, 'test[:10%%]'")
    parser.add_argument("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps datasets (default: its own)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="of the documents, held out by name (default: 0.02)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU)")
    parser.add_argument(
        "--shard-size", type=float, default=64.0, metavar="MB", help="of the source in one shard, about (default: 64)"
    )
    parser.add_argument(
        "--record-tokens", type=int, default=4096, metavar="N", help="in one record of a shard (default: 4096)"
    )
    parser.add_argument("--verify", action="store_true", help="check contents of shards that are done, not only sizes")
    parser.add_argument("--runner", metavar="NAME", help="of Apache Beam: DirectRunner, DataflowRunner, FlinkRunner")
    parser.add_argument(
        "--runner-option", action="append", default=[], metavar="KEY=VALUE", help="of the runner's own; may be repeated"
    )


def prepare(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm prepare` has no config to set fields of")
    for option, value in (("--workers", args.workers), ("--record-tokens", args.record_tokens)):
        if value is not None and value < 1:
            raise ConfigError(option, f"={value}: must be at least 1")
    if not 0 < args.shard_size < math.inf:
        raise ConfigError("--shard-size", f"={args.shard_size}: must be above 0")
    if not 0 <= args.validation_fraction <= 0.5:
        raise ConfigError("--validation-fraction", f"={args.validation_fraction}: must be at least 0 and at most 0.5")
    if args.runner is None and args.runner_option:
        raise ConfigError("--runner-option", ": is about a --runner; name one")
    if args.runner is not None and args.workers is not None:
        raise ConfigError("--workers", ": of a --runner are the runner's own; leave it out")
    try:
        return _prepare(args)
    except ConfigError as error:
        path, message = error.path, error.message
        for field, option in OPTIONS.items():
            path, message = path.replace(field, option), message.replace(field, option)
        raise ConfigError(path, message) from error
    except KeyboardInterrupt:
        print("hybridlm: interrupted; the same command goes on with the parts that are not done", file=sys.stderr)
        return EXIT_INTERRUPTED


def _prepare(args: argparse.Namespace) -> int:
    from hybridlm.data.manifest import Manifest
    from hybridlm.data.prepare import Job, begin, decide_sides, finish, parts_of, plan_of
    from hybridlm.data.prepare_sources import open_source
    from hybridlm.data.prepare_workers import run_here, run_in_processes
    from hybridlm.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    source = open_source(
        args.source,
        text_key=args.text_key,
        tokenizer=args.tokenizer,
        split=args.split,
        tfds_directory=args.tfds_dir,
    )
    shard_bytes = max(int(args.shard_size * 1e6), 1)
    make_plan = functools.partial(
        plan_of,
        source,
        tokenizer,
        shard_bytes=shard_bytes,
        record_tokens=args.record_tokens,
        validation_fraction=args.validation_fraction,
    )
    plan = make_plan()
    parts = list(parts_of(source, shard_bytes))
    there = begin(args.out, plan, len(parts), verify=args.verify)
    if isinstance(there, Manifest):
        print(f"{args.out}: all of it is done already")
        _describe(there)
        return 0
    todo = {number: part for number, part in enumerate(parts) if number not in there}
    if there:
        print(f"{args.out}: {len(there)} of {len(parts)} parts are done already", file=sys.stderr)
    job = Job(
        source=source,
        tokenizer=args.tokenizer,
        directory=args.out,
        record_tokens=args.record_tokens,
        sides=decide_sides(source, parts, args.validation_fraction),
    )
    workers = min(args.workers or os.cpu_count() or 1, len(todo))
    if args.runner is not None:
        from hybridlm.data.beam import run_on_beam

        run_on_beam(job, todo, args.runner, args.runner_option)
    elif workers > 1:
        run_in_processes(job, todo, workers)
    else:
        run_here(job, todo)
    if make_plan() != plan:
        raise ConfigError(
            "SOURCE", f"={args.source!r}: has changed while it was prepared; prepare it again, in another directory"
        )
    _describe(finish(args.out, tokenizer, plan, len(parts), args.record_tokens))
    return 0


def _describe(manifest: "Manifest") -> None:
    for split, total in manifest.totals().items():
        print(
            f"{split}: {total['tokens']:,} tokens, {total['documents']:,} documents, "
            f"{total['text_bytes'] / 1e6:,.1f} MB of text, {total['shards']} shards, {total['num_bytes'] / 1e6:,.1f} MB"
        )
