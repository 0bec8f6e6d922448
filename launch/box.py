"""Run a hybridlm command in several processes on this machine, on CPU devices or with one GPU each.

    python launch/box.py --processes 2 --devices-per-process 2 -- train griffin_tiny --out runs/box
    python launch/box.py --processes 8 --gpus --restarts 3 -- train griffin_1b --out runs/griffin_1b ...

Lines of output begin with the number of their process. Ctrl-C or SIGTERM stops the run after a step, saved; a second
one kills it. Exit codes: that of the first process that failed, 75 where all stopped on request. With --restarts N the
command is started again after exit code 75 and after crashes, up to N times in a row without a new checkpoint.
"""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridlm.cli.supervise import check_train_command
from hybridlm.cli.words import Parser, split_command
from hybridlm.config_check import ConfigError
from hybridlm.plan.topology import Topology
from hybridlm.supervisor import StopRequests, latest_checkpoint, run_again
from launch.processes import run_together
from launch.run_spec import check_mesh, exit_with


def main(argv: Sequence[str]) -> int:
    ours, words = split_command(argv)
    args = make_parser().parse_args(ours)
    for name in ("processes", "devices_per_process", "restarts"):
        if getattr(args, name) < (name != "restarts"):
            raise ConfigError(f"--{name.replace('_', '-')}", f"={getattr(args, name)}: is too small")
    directory = check_command(words, args)
    command = [sys.executable, "-m", "hybridlm.cli", *words]
    if args.dry_run:
        for index in range(args.processes):
            added = environment(index, "PORT", args)
            variables = " ".join(f"{name}={value}" for name, value in added.items())
            print(f"{variables} {shlex.join(['hybridlm', *words])}")
        return 0

    with StopRequests() as requests:

        def attempt() -> int:
            port = str(free_port())
            environments = [dict(os.environ) | environment(i, port, args) for i in range(args.processes)]
            return run_together(command, environments, requests)

        return run_again(attempt, lambda: latest_checkpoint(directory), requests, restarts=args.restarts)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="launch/box.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.epilog = "Behind -- comes a hybridlm command: -- train griffin_tiny --out runs/box"
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--devices-per-process", type=int, default=1, metavar="N", help="CPU devices (default: 1)")
    devices.add_argument("--gpus", action="store_true", help="one GPU for each process")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="after failures without progress")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be run")
    return parser


def check_command(words: Sequence[str], args: argparse.Namespace) -> Path:
    """The run directory of the command. Raises ConfigError where it could not run in these processes."""
    config, directory = check_train_command(words)
    check_mesh(config, Topology("cpu", (args.processes * (1 if args.gpus else args.devices_per_process),)))
    return directory


def environment(index: int, port: str, args: argparse.Namespace) -> dict[str, str]:
    """What a process is told beyond what this one has."""
    group = {
        "HYBRIDLM_COORDINATOR": f"127.0.0.1:{port}",
        "HYBRIDLM_NUM_PROCESSES": str(args.processes),
        "HYBRIDLM_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if args.gpus:
        return group | {"JAX_PLATFORMS": "cuda,cpu", "JAX_LOCAL_DEVICE_IDS": str(index)}
    return group | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices_per_process)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    exit_with(main)
