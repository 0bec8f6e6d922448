"""`hybridlm import` and `hybridlm export`: their options, and what they print."""

import argparse
import math
from pathlib import Path

from hybridlm.config_check import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hybridlm import`."""
    parser.epilog = (
        "Any field of the new run's config can be set, as for train: --data.source=text --data.path=corpus "
        "--sharding.mesh.fsdp=8. Then: hybridlm train RUN/config.json --out RUN"
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="directory with config.json and model.safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="directory of the new run")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hybridlm export`."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, metavar="HF_DIR", help="directory to write")
    parser.add_argument(
        "--architecture", metavar="NAME", help="such as LlamaForCausalLM (default: what it came from, or what fits)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the tensors (default: as imported where nothing was trained, else float32)"
    )
    parser.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="of a file of tensors at most (default: 5)"
    )


def import_run(args: argparse.Namespace, overrides: list[str]) -> int:
    from hybridlm.distributed import is_first, joined

    with joined():
        from hybridlm.interop.runs import import_run

        config = import_run(args.source, args.out, overrides)
        if is_first():
            print(f"{args.out}: {config.model.num_layers} layers of width {config.model.width}, from {args.source}")
    return 0


def export_run(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm export` takes the run's own config; leave it out")
    if not 0 < args.shard_size < math.inf:
        raise ConfigError("--shard-size", f"={args.shard_size}: must be above 0")

    from hybridlm.interop.runs import export_run

    shard_bytes = int(args.shard_size * 1e9)
    name = export_run(args.run, args.out, architecture=args.architecture, dtype=args.dtype, shard_bytes=shard_bytes)
    print(f"{args.out}: {name}, from {args.run}")
    return 0
