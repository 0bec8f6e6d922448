"""Start a run on a SLURM cluster with GPUs: one process for each.

    python launch/slurm.py griffin_1b --topology h200:8*4 --out /shared/runs/griffin_1b --partition gpu --dry-run

Without --dry-run the script goes to `sbatch`. The run directory, the data and the environment with hybridlm (or
--image, for clusters with Pyxis) must be on a file system that all nodes share; gs:// directories are expected below
/gcs, where the cluster's administrator mounts buckets.

What happens when the run ends:

- 0: done;
- 75, after the signal that SLURM sends --grace-seconds before the time limit: the job requeues itself and goes on from
  the checkpoint. A preempted job is requeued by SLURM (--requeue), a cancelled one stays cancelled;
- 2, a wrong config: the job fails;
- anything else: started again on the same nodes, up to --restarts times in a row without a new checkpoint.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Sequence

from hybridlm.config_check import ConfigError
from launch.run_spec import MOUNTS, Run, exit_with, make_parser, read_run, summary
from launch.shell import check_script, newest_checkpoint, restart_policy


def main(argv: Sequence[str]) -> int:
    parser = make_parser("launch/slurm.py", "Start a run on the GPUs of a SLURM cluster.")
    parser.add_argument("--time", default="24:00:00", help="limit of the job; it goes on in a new one (default: 24 h)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, metavar="N")
    parser.add_argument("--grace-seconds", type=int, default=300, help="for the last checkpoint (default: 300)")
    parser.add_argument("--logs", default="logs", metavar="DIR", help="made where it is missing (default: logs)")
    parser.add_argument("--setup", metavar="COMMAND", help="run by every task first: source ENV/bin/activate")
    args, run = read_run(parser, argv)
    if run.topology.chip.platform != "gpu":
        raise ConfigError("--topology", f"={run.topology.name}: names no GPUs; write h100:8 or h200:8*4")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", args.time):
        raise ConfigError("--time", f"={args.time}: SLURM reads hours:minutes:seconds or days-hours:minutes:seconds")
    if args.setup is not None:
        check_script(args.setup, "--setup")
    script = sbatch_script(run, args)
    check_script(script)
    if args.dry_run:
        print(script, end="")
        return 0
    return subprocess.run(["sbatch"], input=script, text=True).returncode


def sbatch_script(run: Run, args: argparse.Namespace) -> str:
    """What `sbatch` is given."""
    gpus = run.topology.num_devices // run.topology.num_slices
    options = {
        "job-name": run.name,
        "nodes": run.topology.num_slices,
        "ntasks-per-node": gpus,
        # Not --gpus-per-task, which would show every task one GPU: JAX picks a task's own out of the node's.
        "gpus-per-node": gpus,
        "cpus-per-task": args.cpus_per_gpu,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        # To the tasks, not to this script.
        "signal": f"TERM@{args.grace_seconds}",
        "output": f"{args.logs}/%x-%j.out",
        "open-mode": "append",
        "requeue": "",
    }
    given = {name: value for name, value in options.items() if value is not None}
    lines = [f"#SBATCH --{name}" + (f"={value}" if value != "" else "") for name, value in given.items()]
    task = run.shell_command if args.setup is None else f"{args.setup} && exec {run.shell_command}"
    mounts = sorted({*(f"{MOUNTS}/{bucket}" for bucket in run.buckets), *_shared(run)})
    container = [f"--container-image={args.image}", f"--container-mounts={','.join(mounts)}"] if args.image else []
    step = shlex.join(["srun", "--kill-on-bad-exit=1", *container, "bash", "-c", task])
    mounted = "".join(
        f"srun --ntasks-per-node=1 --ntasks=$SLURM_NNODES test -d {MOUNTS}/{bucket} || "
        f"{{ echo '{MOUNTS}/{bucket} is not mounted on every node' >&2; exit 1; }}\n"
        for bucket in run.buckets
    )
    return f"""\
#!/bin/bash
{chr(10).join(lines)}
{summary(run, [f"{run.topology.num_slices} nodes with {gpus} processes, one for each GPU"])}
set -u
export PYTHONUNBUFFERED=1 JAX_PLATFORMS=cuda,cpu
# Preemption signals this script too; it waits for the tasks to save.
trap : TERM
{mounted}{restart_policy(args.restarts)}newest() {{ {newest_checkpoint(run)}; }}
while true; do
    before=$(newest)
    {step}
    code=$?
    case $code in
        0) exit 0 ;;
        75)
            # Cancelled or preempted jobs are no longer running by now: SLURM decides about them.
            if [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
                exec scontrol requeue "$SLURM_JOB_ID"
            fi
            exit 75 ;;
        *) count_failure "$code" "$before" "$(newest)" ;;
    esac
    sleep 10
done
"""


def _shared(run: Run) -> list[str]:
    """Directories outside buckets that a container must see."""
    data = run.config.data
    paths = [run.directory, data.path, data.tokenizer, *(part.path for part in data.mixture)]
    return [path for path in paths if path is not None and path.startswith("/") and not path.startswith(f"{MOUNTS}/")]


if __name__ == "__main__":
    exit_with(main)
