"""Start a run on Cloud TPU VMs: one slice or several, made as a queued resource, with no Kubernetes.

    python launch/tpu_vm.py griffin_1b --topology v5e:4x4 --zone us-west4-a --project my-project \\
        --checkpoint-bucket my-runs --data-bucket my-text/corpus --data.source=text --dry-run

Prints (--dry-run) or runs a bash script on this machine, which stays in charge: leave it in tmux. It makes the slices,
installs hybridlm on every worker (--install) and mounts the buckets, runs the command on all workers, and

- ends with 0 when they are done, with 2 when the config is wrong;
- starts again after exit code 75 and after crashes, up to --restarts times in a row without a new checkpoint, and
  first makes the slices anew where they were preempted;
- on Ctrl-C or SIGTERM tells all workers to save and stop, and ends with 75. The slices stay: the last line printed
  says how to delete them.
"""

import argparse
import shlex
import subprocess
from collections.abc import Sequence

from hybridlm.config_check import ConfigError
from launch.run_spec import MOUNTS, Run, exit_with, make_parser, read_run, summary
from launch.shell import check_script, newest_checkpoint, restart_policy
from launch.tpu_slices import Slice, slice_of

APT = "https://packages.cloud.google.com/apt"
INSTALL_GCSFUSE = (
    f"curl -fsSL {APT}/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && "
    f'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] {APT} gcsfuse-$(lsb_release -cs) main" | '
    "sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && "
    "sudo apt-get update -q && sudo apt-get install -qy gcsfuse"
)


def main(argv: Sequence[str]) -> int:
    parser = make_parser("launch/tpu_vm.py", "Start a run on Cloud TPU VMs.")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--install", metavar="COMMAND", help="run once on every worker, such as: pip install PACKAGE")
    parser.add_argument("--runtime-version", metavar="NAME", help="of the TPU VM (default: by --topology)")
    parser.add_argument("--spot", action="store_true", help="preemptible slices")
    args, run = read_run(parser, argv)
    tpu = slice_of(run.topology)
    if tpu.kind.gcloud_type is None:
        raise ConfigError("--topology", f"={run.topology.name}: these slices are had through GKE; use launch/gke.py")
    if (args.image is None) == (args.install is None):
        raise ConfigError("--install", ": how hybridlm[tpu] comes onto the workers; give either it or --image")
    if args.install is not None:
        check_script(args.install, "--install")
    script = driver_script(run, tpu, args)
    check_script(script)
    if args.dry_run:
        print(script, end="")
        return 0
    return subprocess.run(["bash", "-c", script]).returncode


def driver_script(run: Run, tpu: Slice, args: argparse.Namespace) -> str:
    """What runs on this machine."""
    where = [f"--zone={args.zone}", f"--project={args.project}"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = [f"--node-id={run.name}"]
    if run.topology.num_slices > 1:
        nodes = [f"--node-count={run.topology.num_slices}", f"--node-prefix={run.name}"]
    create = [
        *[*queued, "create", run.name, *nodes, f"--type={tpu.kind.gcloud_type}", f"--topology={tpu.shape}"],
        *[f"--runtime-version={args.runtime_version or tpu.kind.runtime}", *where, *(["--spot"] if args.spot else [])],
    ]
    describe = [*queued, "describe", run.name, *where, "--format=value(state.state)"]
    delete = [*queued, "delete", run.name, *where, "--force", "--quiet"]
    ssh = [*queued, "ssh", run.name, *where, "--node=all", "--worker=all", "--quiet"]
    first = [*queued, "ssh", run.name, *where, "--node=0", "--worker=0", "--quiet"]
    return f"""\
#!/bin/bash
{summary(run, [f"{run.topology.num_slices} slices of {tpu.hosts} workers with {tpu.chips_per_host} chips each"])}
set -u
ssh_all() {{ {shlex.join(ssh)} --command "$1"; }}
state() {{ {shlex.join(describe)} 2>/dev/null; }}
newest() {{ {shlex.join(first)} --command {shlex.quote(newest_checkpoint(run))} 2>/dev/null; }}
{restart_policy(args.restarts)}
ready() {{  # made, installed and mounted
    case "$(state)" in
        ACTIVE) ;;
        SUSPENDED | SUSPENDING | FAILED)
            {shlex.join(delete)} && {shlex.join(create)} || return 1 ;;
        "") {shlex.join(create)} || return 1 ;;
    esac
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in SUSPENDED | FAILED) return 1 ;; esac
        sleep 30
    done
    ssh_all {shlex.quote(prepare_worker(run, args))}
}}

stopping=0
code=75
trap 'echo the slices stay until: {shlex.join(delete)} >&2' EXIT
stop() {{
    stopping=1
    echo "telling all workers to save and stop" >&2
    ssh_all {shlex.quote(f"sudo kill -TERM $(cat /tmp/{run.name}.pid)")}
}}
trap stop INT TERM

while [ "$stopping" = 0 ]; do
    if ! ready; then
        count_failure 1 "" ""
        sleep 60
        continue
    fi
    before=$(newest)
    # In the background and in a session of its own: Ctrl-C reaches this script alone, which then asks the workers.
    setsid {shlex.join([*ssh, f"--command={worker_command(run, args)}"])} &
    wait $!
    code=$?
    # A signal ends the first wait; the second one is for the workers to save.
    if [ "$stopping" = 1 ]; then wait; code=75; break; fi
    if [ "$code" = 0 ]; then break; fi
    count_failure "$code" "$before" "$(newest)"
done
exit "$code"
"""


def prepare_worker(run: Run, args: argparse.Namespace) -> str:
    """Run on every worker before each start; what is done already is not done again."""
    steps = ["set -eu"]
    if run.buckets:
        steps.append(f"command -v gcsfuse >/dev/null || {{ {INSTALL_GCSFUSE}; }}")
    for bucket in run.buckets:
        path = f"{MOUNTS}/{bucket}"
        # All users may read and write, the container's root among them.
        options = "--implicit-dirs --rename-dir-limit=200000 -o allow_other" + " -o ro" * (bucket in run.read_only)
        steps.append(
            f"mountpoint -q {path} || {{ sudo mkdir -p {path} && "
            f"sudo gcsfuse {options} --uid=$(id -u) --gid=$(id -g) {bucket} {path}; }}"
        )
    if args.image is None:
        done = f"/tmp/{run.name}.installed"
        steps.append(f"[ -e {done} ] || {{ {args.install} && touch {done}; }}")
    else:
        steps.append(f"sudo docker pull --quiet {shlex.quote(args.image)}")
    return "\n".join(steps)


def worker_command(run: Run, args: argparse.Namespace) -> str:
    """The run on one worker. It waits for a process of the attempt before that still holds the TPU."""
    variables = ["JAX_PLATFORMS=tpu,cpu", "PYTHONUNBUFFERED=1"]
    if args.image is None:
        command = ["env", *variables, *run.command]
    else:
        volumes = [f"--volume={MOUNTS}/{bucket}:{MOUNTS}/{bucket}" for bucket in run.buckets]
        settings = [f"--env={variable}" for variable in variables]
        command = ["sudo", "docker", "run", "--rm", "--privileged", "--net=host", *settings, *volumes, args.image]
        command += run.command
    inner = f"echo $$ > /tmp/{run.name}.pid; exec {shlex.join(command)}"
    return shlex.join(["flock", "--wait", "300", f"/tmp/{run.name}.lock", "bash", "-lc", inner])


if __name__ == "__main__":
    exit_with(main)
