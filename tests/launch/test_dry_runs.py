"""What launchers would run, and what they refuse before anything is run."""

import json
import shlex
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

PLACE = ("--zone=us-west4-a", "--project=my-project")
TEXT = ("--data-bucket=text/c4", "--data.source=text")
CLUSTERS = {
    "gke": ("--topology=v5e:4x4*2", "--image=r/hybridlm:1", "--checkpoint-bucket=my-runs"),
    "tpu_vm": (
        "--topology=v5e:4x4*2",
        "--image=r/hybridlm:1",
        "--checkpoint-bucket=my-runs",
        "--zone=z",
        "--project=p",
    ),
    "slurm": ("--topology=h200:8*4", "--checkpoint-bucket=my-runs"),
}
SPREAD = ("griffin_1b", "--sharding.mesh.data=1", "--sharding.mesh.fsdp=-1", "--dry-run")


def job_set(printed: str) -> dict[str, Any]:
    """The manifest behind the comments."""
    return json.loads("\n".join(line for line in printed.splitlines() if not line.startswith("#")))


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_launcher_passes_the_config_on(name: str, launch: Callable[..., Any]) -> None:
    printed = launch(
        name, *SPREAD, *CLUSTERS[name], "--train.steps=77", "--data-bucket=text/c4", "--data.source=text"
    ).out
    command = "hybridlm train griffin_1b --out /gcs/my-runs/runs/griffin-1b"
    if name == "gke":
        container = job_set(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][
            0
        ]
        printed = shlex.join(container["command"])
    assert command in printed
    for field in ("--sharding.mesh.fsdp=-1", "--train.steps=77", "--data.source=text", "--data.path=/gcs/text/c4"):
        assert field in printed


def test_the_mesh_is_the_one_that_auto_chooses(launch: Callable[..., Any]) -> None:
    words = ("griffin_1b", "--sharding.mesh.fsdp=1", "--sharding.auto=true", "--train.batch-size=16", "--dry-run")
    printed = launch("gke", *words, *CLUSTERS["gke"]).out
    assert "griffin_1b on v5e:4x4*2, 32 devices, mesh slices 2, data 4, fsdp 2, context 2\n" in printed
    assert "--sharding.auto=true" in printed
    box = ("--processes=8", "--devices-per-process=2", "--dry-run", "--", "train", "griffin_tiny")
    assert launch("box", *box, "--sharding.auto=true").out
    assert "8 sequences per microbatch must divide" in launch("box", *box).refusal


@pytest.mark.parametrize("name", ["slurm", "tpu_vm"])
def test_scripts_are_shell(name: str, launch: Callable[..., Any]) -> None:
    script = launch(name, *SPREAD, *CLUSTERS[name]).out
    assert script.startswith("#!/bin/bash\n")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_job_set_has_a_pod_for_each_machine(launch: Callable[..., Any]) -> None:
    manifest = job_set(
        launch("gke", *SPREAD, *CLUSTERS["gke"], "--data-bucket=text", "--data.source=text", "--spot").out
    )
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "griffin-1b"
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = job_of(manifest)
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounts = {mount["mountPath"]: (mount["name"], mount["readOnly"]) for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["csi"]["volumeAttributes"]["bucketName"] for volume in pod["volumes"]}
    assert {path: (volumes[name], read_only) for path, (name, read_only) in mounts.items()} == {
        "/gcs/my-runs": ("my-runs", False),
        "/gcs/text": ("text", True),
    }
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_a_job_set_restarts_without_end_after_exit_code_75_alone(launch: Callable[..., Any]) -> None:
    manifest = job_set(launch("gke", *SPREAD, *CLUSTERS["gke"], "--restarts=3").out)
    spec, job = manifest["spec"], job_of(manifest)
    # Kubernetes takes a podFailurePolicy with this restartPolicy only.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    stopped, disrupted = job["podFailurePolicy"]["rules"]
    assert stopped == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]}}
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job["template"]["spec"]["containers"][0]["name"] == "train"
    assert job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] == 3
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize(
    ("topology", "pods", "chips", "accelerator_type"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v6e:4x4", 4, 4, "v6e-16"),
        ("v4:2x2x1", 1, 4, "v4-8"),
        ("v5p:4x4x4", 16, 4, "v5p-128"),
        ("tpu7x:4x4x8", 32, 4, "tpu7x-256"),
    ],
)
def test_slices_have_the_machines_that_google_gives_them(
    topology: str, pods: int, chips: int, accelerator_type: str, launch: Callable[..., Any]
) -> None:
    printed = launch("gke", *SPREAD, "--image=i", "--out=gs://my-runs/x", f"--topology={topology}").out
    job = job_of(job_set(printed))
    assert job["completions"] == pods
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert f"--tpu-type={accelerator_type} --num-slices=1" in printed
    assert "--restart-on-exit-codes=75" in printed


def test_a_slurm_job_has_a_task_for_each_gpu(launch: Callable[..., Any]) -> None:
    script = launch("slurm", *SPREAD, *CLUSTERS["slurm"], "--grace-seconds=120", "--partition=gpu", "--image=r#i").out
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"):
        assert option in options
    assert "--partition=gpu" in options
    assert not any(option.startswith("--account") for option in options)
    assert "--container-image=r#i --container-mounts=/gcs/my-runs" in script.replace("'", "")


@pytest.mark.parametrize(
    ("name", "words", "refusal"),
    [
        ("gke", ("griffin_1c", *CLUSTERS["gke"]), "griffin_1b"),
        ("gke", (*SPREAD, *CLUSTERS["gke"], "--train.stepz=1"), "train.stepz: no such field; did you mean steps?"),
        ("gke", (*SPREAD, *CLUSTERS["gke"], "--train.batch-size=7"), "train.batch_size=7: 7 sequences per microbatch"),
        ("gke", (*SPREAD, *CLUSTERS["gke"], "--sharding.mesh.tensor=3"), "sharding.mesh: "),
        ("gke", (*SPREAD, *CLUSTERS["gke"], "--name=Griffin_1"), "--name Griffin_1: must be at most 40 lower-case"),
        ("gke", ("griffin_tiny", *CLUSTERS["gke"], "--data-bucket=text"), "add --data.source=text or jsonl"),
        ("gke", (*SPREAD, *CLUSTERS["gke"], "--out=gs://B_/x"), "--out: is where the run is kept; give either"),
        ("gke", (*SPREAD, *CLUSTERS["gke"][1:2], "--out=gs://-/x", "--topology=v5e:4x4"), "no name of a bucket"),
        ("gke", (*SPREAD, *CLUSTERS["gke"][1:], "--topology=v5z:4x4"), "--topology=v5z"),
        ("gke", (*SPREAD, *CLUSTERS["gke"][1:], "--topology=h200:8"), "--topology=h200:8: is no TPU slice"),
        ("gke", (*SPREAD, *CLUSTERS["gke"][::2]), "--image: GKE runs containers"),
        ("tpu_vm", (*SPREAD, *CLUSTERS["tpu_vm"][1:], "--topology=tpu7x:2x2x1"), "use launch/gke.py"),
        ("tpu_vm", (*SPREAD, *CLUSTERS["tpu_vm"], "--install=pip"), "give either it or --image"),
        (
            "tpu_vm",
            (*SPREAD, CLUSTERS["tpu_vm"][0], *CLUSTERS["tpu_vm"][2:], "--install=a 'b"),
            "--install: bash cannot",
        ),
        ("slurm", (*SPREAD, *CLUSTERS["slurm"][1:], "--topology=v5e:4x4"), "names no GPUs; write h100:8 or h200:8*4"),
        ("slurm", (*SPREAD, *CLUSTERS["slurm"], "--time=soon"), "--time=soon: SLURM reads"),
        ("slurm", (*SPREAD, *CLUSTERS["slurm"], "--restarts=-1"), "--restarts=-1: must be at least 0"),
        ("slurm", (*SPREAD, *CLUSTERS["slurm"], "--partitionn=x"), "--partitionn=x"),
        ("box", ("--processes=2",), "--: is missing"),
        ("box", ("--processes=0", "--", "train", "griffin_tiny"), "--processes=0: is too small"),
        ("box", ("--processes=2", "--", "eval", "runs/x"), "eval: runs in one process and needs no launcher"),
        ("box", ("--processes=3", "--", "train", "griffin_tiny"), "8 sequences per microbatch must divide"),
        (
            "box",
            ("--processes=3", "--", "train", "griffin_tiny", "--sharding.auto=true"),
            "sharding.auto: no mesh of 3 devices",
        ),
        ("box", ("--processes=2", "--", "train", "griffin_tiny", "--outt=x"), "--outt=x: no such option"),
    ],
)
def test_wrong_input_is_one_clear_line(
    name: str, words: tuple[str, ...], refusal: str, launch: Callable[..., Any]
) -> None:
    said = launch(name, *words)
    assert refusal in said.refusal
    assert said.out == ""
