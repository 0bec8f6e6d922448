"""What is to be started, and where: read from a launcher's command line and checked before anything is started.

A directory `gs://BUCKET/...` is what Cloud Storage FUSE shows below /gcs/BUCKET: launchers mount the bucket there and
tell the run that path.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import jax

from hybridlm import config_io
from hybridlm.cli.words import Parser, split_fields
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.plan.topology import Topology, topology
from hybridlm.sharding import check_batch, mesh_text

MOUNTS = "/gcs"
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
LONGEST_NAME = 40
"""Kubernetes adds up to 23 characters to a JobSet's name, and a host name has at most 63."""
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class Run:
    """A training run of `config` on the devices of `topology`."""

    name: str
    config_name: str
    config: Config
    overrides: tuple[str, ...]
    directory: str
    """As the run's processes see it."""
    topology: Topology
    mesh: Mapping[str, int]
    buckets: tuple[str, ...]
    read_only: tuple[str, ...]
    """Those of `buckets` that nothing is written to."""

    @property
    def command(self) -> list[str]:
        fields = [f"--{assignment}" for assignment in self.overrides]
        return ["hybridlm", "train", self.config_name, "--out", self.directory, *fields]

    @property
    def shell_command(self) -> str:
        return shlex.join(self.command)


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """What every launcher of clusters takes."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.epilog = "Any field of the config can be set, as for `hybridlm train`: --train.steps=100."
    parser.add_argument("config", help="a recipe of `hybridlm list configs`, or a path that is there on every machine")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:4x4, two of them v5e:4x4*2, or h100:8*4")
    parser.add_argument("--name", help="of the job (default: from CONFIG)")
    parser.add_argument("--out", help="run directory: gs://BUCKET/DIR, or a path that all machines share")
    parser.add_argument("--checkpoint-bucket", metavar="BUCKET", help="short for --out=gs://BUCKET/runs/NAME")
    parser.add_argument("--data-bucket", metavar="BUCKET[/DIR]", help="mounted read-only, and data.path is DIR in it")
    parser.add_argument("--image", help="container image with hybridlm in it")
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help="after crashes (default: 10)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be run")
    return parser


def read_run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Run]:
    """The arguments and the run they describe. Raises ConfigError where that run could not start."""
    words, assignments = split_fields(argv)
    args = parser.parse_args(words)
    if args.restarts < 0:
        raise ConfigError("--restarts", f"={args.restarts}: must be at least 0")
    name = check_name(args.name or Path(args.config).stem.replace("_", "-"))
    if args.data_bucket is not None:
        assignments.append(f"data.path=gs://{args.data_bucket.removeprefix('gs://')}")
    if (args.out is None) == (args.checkpoint_bucket is None):
        raise ConfigError("--out", ": is where the run is kept; give either it or --checkpoint-bucket")
    out = args.out or f"gs://{args.checkpoint_bucket.removeprefix('gs://').rstrip('/')}/runs/{name}"
    mapped = [map_bucket(assignment) for assignment in assignments]
    directory, written = map_bucket(out)
    config = config_io.override(config_io.load_config(args.config), [text for text, _ in mapped])
    if args.data_bucket is not None and config.data.source == "python-stdlib":
        raise ConfigError(
            "--data-bucket", ": data.source=python-stdlib reads no files; add --data.source=text or jsonl"
        )
    where = topology(args.topology)
    mesh = check_mesh(config, where)
    read = tuple(dict.fromkeys(bucket for _, bucket in mapped if bucket and bucket != written))
    run = Run(
        name=name,
        config_name=args.config,
        config=config,
        overrides=tuple(text for text, _ in mapped),
        directory=directory,
        topology=where,
        mesh=mesh,
        buckets=((written,) if written else ()) + read,
        read_only=read,
    )
    return args, run


def map_bucket(text: str) -> tuple[str, str | None]:
    """`gs://B/x` as (`/gcs/B/x`, `B`), also as the value of an assignment; (text, None) where there is none."""
    head, marker, rest = text.partition("gs://")
    if not marker:
        return text, None
    bucket, _, path = rest.partition("/")
    if not BUCKET.fullmatch(bucket):
        raise ConfigError(text, f": {bucket!r} is no name of a bucket; write gs://BUCKET/DIR")
    return head + str(PurePosixPath(MOUNTS) / bucket / path), bucket


def check_name(name: str) -> str:
    if not DNS_LABEL.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"--name {name}",
            f": must be at most {LONGEST_NAME} lower-case letters, digits and hyphens, and begin with a letter",
        )
    return name


def check_mesh(config: Config, where: Topology) -> dict[str, int]:
    """Sizes of the mesh axes. Raises ConfigError where they do not fit the devices, or the batch not them."""
    mesh: Any = where.abstract_mesh(where.mesh_of(config))
    check_batch(config, mesh)
    return dict(mesh.shape)


def summary(run: Run, lines: Sequence[str]) -> str:
    """Comment lines for people, at the top of what a launcher prints."""
    devices = f"{run.topology.num_devices} devices, mesh {mesh_text(run.mesh)}"
    return "\n".join(
        f"# {line}"
        for line in (
            f"{run.name}: {run.config_name} on {run.topology.name}, {devices}",
            f"batch {run.config.train.batch_size} x {run.config.data.seq_len} tokens; kept in {run.directory}",
            *lines,
        )
    )


def exit_with(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a launcher on the command line. Wrong input is one line and exit code 2."""
    jax.config.update("jax_platforms", "cpu")  # checking takes no accelerator from the run
    try:
        code = main(sys.argv[1:])
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
