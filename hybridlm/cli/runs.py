"""Commands about runs: they begin one, go on with one, or read one."""

import argparse
import sys
from pathlib import Path

from hybridlm import config_io
from hybridlm.cli.words import check_file, check_json, write_json
from hybridlm.config_check import ConfigError


def train(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_config(args.config), overrides)
    directory = args.out or Path("runs") / Path(args.config).stem

    from hybridlm.distributed import joined

    with joined():
        from hybridlm.train.loop import train

        return train(config, directory, fresh=args.fresh, executable=args.executable)


def plan(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_config(args.config), overrides)
    check_json(args.json)
    check_file("--save", args.save)
    if args.compiles < 1:
        raise ConfigError("--compiles", f"={args.compiles}: must be at least 1")
    if args.search and args.save is not None:
        raise ConfigError("--save", ": saves one executable; give it with the flags that --search found")

    from hybridlm.plan.command import plan, plan_search

    name = Path(args.config).stem
    if args.search:
        code, report = plan_search(name, config, args.topology, compiles=args.compiles)
    else:
        code, report = plan(name, config, args.topology, advice=not args.no_advice, save=args.save)
    if args.json is not None:
        write_json(args.json, report)
    return code


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


def checkpoints(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm checkpoints` has no config to set fields of")
    check_json(args.json)

    from hybridlm.train.verify import as_table, checkpoints_of

    rows = checkpoints_of(args.run, verify=args.verify)
    print(as_table(rows))
    if args.json is not None:
        write_json(args.json, {"checkpoints": rows})
    return 1 if any(row["problems"] for row in rows) else 0


def generate(args: argparse.Namespace, overrides: list[str]) -> int:
    data = config_io.load_run_config(args.run).data
    if data.task is not None:
        raise ConfigError(str(args.run), f": continues no text, its data.source is {data.source}; use hybridlm eval")
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
