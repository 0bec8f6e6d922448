"""`hybridlm finetune`: its options."""

import argparse
from dataclasses import replace
from pathlib import Path

from hybridlm import config_io
from hybridlm.config import Config, Finetune, LoRA
from hybridlm.config_check import ConfigError

SHARED = ("data.", "sharding.", "train.batch_size", "train.num_microbatches")
"""Fields that a published model is imported with: its text, its mesh, and the batch that the mesh has to divide."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = "The same command goes on where it was stopped. Any field of the config can be set, as for train."
    parser.add_argument("config", nargs="?", help="what `hybridlm train` takes (default: the config of --init-from)")
    parser.add_argument(
        "--init-from",
        type=Path,
        required=True,
        metavar="RUN",
        help="whose parameters it begins with; a Hugging Face directory is imported to DIR.pretrained first",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the new run")
    add_adapter_arguments(parser)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """`--lora` and `--dora`."""
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, and nothing else")
    parser.add_argument("--dora", action="store_true", help="with --lora: train norms and directions apart")


def finetune(args: argparse.Namespace, overrides: list[str]) -> int:
    from hybridlm.distributed import joined

    with joined():
        from hybridlm.train.finetuned import finetune_run, is_published

        source = imported(args.init_from, args.out, overrides) if is_published(args.init_from) else args.init_from
        config = config_io.override(config_of(args, source), overrides)
        return finetune_run(config, source, args.out)


def imported(published: Path, out: Path, overrides: list[str]) -> Path:
    """A run of a published model, made beside `out` unless it is there from an earlier start; with `SHARED` fields."""
    from hybridlm.distributed import agreed
    from hybridlm.interop import import_run

    run = out.with_name(f"{out.name}.pretrained")
    if not agreed(run.exists()):
        import_run(published, run, [field for field in overrides if field.startswith(SHARED)])
    return run


def config_of(args: argparse.Namespace, source: Path) -> Config:
    """The named config, or that of the run `source`, with what `--lora` and `--dora` say."""
    if args.config is not None:
        return with_adapters(config_io.load_config(args.config), args)
    return with_adapters(replace(config_io.load_run_config(source), finetune=Finetune()), args)


def with_adapters(config: Config, args: argparse.Namespace) -> Config:
    """`config` with what `--lora` and `--dora` say."""
    if args.lora is None:
        if args.dora:
            raise ConfigError("--dora", ": is a kind of --lora; give that as well, as in --lora 8 --dora")
        return config
    try:
        lora = replace(config.finetune.lora or LoRA(), rank=args.lora, dora=args.dora)
    except ConfigError as error:
        raise ConfigError("--lora", error.message) from None
    return replace(config, finetune=replace(config.finetune, lora=lora))
