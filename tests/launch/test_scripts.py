"""The scripts of SLURM and of TPU VMs, run with stand-ins for the programs of those places."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MESH = ("griffin_1b", "--sharding.mesh.data=1", "--sharding.mesh.fsdp=-1", "--dry-run")
# Takes its exit codes from a list, one after another, and saves a checkpoint before those with a +.
ATTEMPT = """
n=$(cat {state}/attempts 2>/dev/null || echo 0)
echo $((n + 1)) > {state}/attempts
ended=({codes})
code=${{ended[$n]}}
case $code in +*) mkdir -p {out}/checkpoints/$((n + 1)); code=${{code#+}} ;; esac
exit $code
"""


def attempts(directory: Path, codes: str) -> str:
    return ATTEMPT.format(state=directory, out=directory / "run", codes=codes)


@pytest.mark.parametrize(
    ("codes", "state", "expected", "runs", "requeued"),
    [
        ("0", "RUNNING", 0, 1, False),
        ("+75", "RUNNING", 0, 1, True),
        ("+75", "COMPLETING", 75, 1, False),
        ("2", "RUNNING", 2, 1, False),
        ("1 +1 1 0", "RUNNING", 0, 4, False),
        ("+1 1 1", "RUNNING", 1, 3, False),
    ],
)
def test_a_slurm_job_starts_again(
    codes: str,
    state: str,
    expected: int,
    runs: int,
    requeued: bool,
    launch: Callable[..., Any],
    programs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = launch("slurm", *MESH, "--topology=h200:8*4", f"--out={tmp_path / 'run'}", "--restarts=1").out
    calls = programs(srun=attempts(tmp_path, codes), squeue=f"echo {state}", scontrol="exit 0", sleep="exit 0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert subprocess.run(["bash", "-c", script], timeout=60).returncode == expected
    called = calls.read_text()
    assert called.count("srun --kill-on-bad-exit=1 bash -c hybridlm train griffin_1b") == runs
    assert ("scontrol requeue 7" in called) == requeued


GCLOUD = """
case "$4" in
    create) echo ACTIVE > {state}/state ;;
    delete) rm {state}/state ;;
    describe) cat {state}/state ;;
    ssh) case "$*" in
        *"hybridlm train"*)
            if [ -e {state}/preempt ]; then rm {state}/preempt; echo SUSPENDED > {state}/state; exit 255; fi
            {attempt} ;;
        *checkpoints*) ls {state}/run/checkpoints 2>/dev/null | sort -n | tail -1 ;;
        esac ;;
esac
"""


def drive(launch: Callable[..., Any], programs: Callable[..., Path], directory: Path, codes: str) -> tuple[int, str]:
    """Exit code of the driver of a run of two slices, and its calls of gcloud."""
    script = launch(
        "tpu_vm",
        *MESH,
        "--topology=v5e:4x4*2",
        f"--out={directory / 'run'}",
        *("--zone=z", "--project=p", "--install=pip install hybridlm", "--restarts=1"),
    ).out
    gcloud = GCLOUD.format(state=directory, attempt=attempts(directory, codes))
    calls = programs(gcloud=gcloud, sleep="exit 0")
    code = subprocess.run(["bash", "-c", script], timeout=60).returncode
    return code, calls.read_text()


@pytest.mark.parametrize(
    ("codes", "expected", "runs"), [("0", 0, 1), ("+75 +75 0", 0, 3), ("2", 2, 1), ("1 1 1", 1, 2), ("+1 1 0", 0, 3)]
)
def test_a_run_on_tpu_vms_starts_again(
    codes: str,
    expected: int,
    runs: int,
    launch: Callable[..., Any],
    programs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    code, calls = drive(launch, programs, tmp_path, codes)
    assert code == expected
    assert calls.count("hybridlm train griffin_1b") == runs
    assert calls.count("queued-resources create griffin-1b --node-count=2 --node-prefix=griffin-1b") == 1
    assert "--node=all --worker=all" in calls


def test_preempted_slices_are_made_anew(
    launch: Callable[..., Any], programs: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "preempt").touch()
    code, calls = drive(launch, programs, tmp_path, "0")
    assert code == 0
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 1
