"""Start a run on GKE: a JobSet of one pod for each machine of one or several TPU slices.

    python launch/gke.py griffin_7b --topology v5p:4x4x4 --image REGION-docker.pkg.dev/PROJECT/REPO/hybridlm:TAG \\
        --checkpoint-bucket my-runs --data-bucket my-text/corpus --data.source=text --dry-run

Without --dry-run the manifest goes to `kubectl apply`, for the cluster that kubectl is set to.

What happens when a pod ends (JobSet 0.6 or newer):

- all with 0: the JobSet is complete;
- one with 75 (stopped on request, saved), or its machine is taken away (condition DisruptionTarget): `podFailurePolicy`
  fails the slice's Job with the reason PodFailurePolicy, and `failurePolicy.rules` restart all slices from the latest
  checkpoint, as often as it happens;
- one with anything else: `backoffLimit: 0` fails the Job with another reason, and all slices are restarted at most
  --restarts times (`maxRestarts`). Exit code 2, a wrong config, cannot be told apart here; the check that --dry-run
  makes too finds it before.
"""

import argparse
import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from hybridlm.config_check import ConfigError
from hybridlm.exit_codes import EXIT_STOPPED
from launch.run_spec import MOUNTS, Run, exit_with, make_parser, read_run, summary
from launch.tpu_slices import Slice, slice_of

CONTAINER = "train"


def main(argv: Sequence[str]) -> int:
    parser = make_parser("launch/gke.py", "Start a run on the TPU slices of a GKE cluster.")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="default", help="Kubernetes account that may use the buckets")
    parser.add_argument("--grace-seconds", type=int, default=300, help="for the last checkpoint (default: 300)")
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--spot", action="store_true", help="on spot machines")
    parser.add_argument("--cluster", default="CLUSTER", help="for the command of xpk that is printed")
    args, run = read_run(parser, argv)
    if args.image is None:
        raise ConfigError("--image", ": GKE runs containers; name one that has hybridlm and jax[tpu]")
    tpu = slice_of(run.topology)
    text = json.dumps(manifest(run, tpu, args), indent=2)
    if args.dry_run:
        machines = f"{run.topology.num_slices} x {tpu.hosts} pods with {tpu.chips_per_host} chips each"
        print(summary(run, [f"{machines}; JSON is YAML: kubectl apply -f - takes it as it is", "with xpk:"]))
        print("".join(f"#   {shlex.join(command)}\n" for command in xpk(run, tpu, args)), end="")
        print(text)
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


def manifest(run: Run, tpu: Slice, args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet, as JSON."""
    volumes = [
        {
            "name": f"bucket-{i}",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "readOnly": bucket in run.read_only,
                "volumeAttributes": {"bucketName": bucket, "mountOptions": "implicit-dirs,rename-dir-limit=200000"},
            },
        }
        for i, bucket in enumerate(run.buckets)
    ]
    container = {
        "name": CONTAINER,
        "image": args.image,
        "command": run.command,
        # MEGASCALE_* and TPU_WORKER_* are GKE's to set.
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8482}],
        "resources": {
            "requests": {"google.com/tpu": tpu.chips_per_host},
            "limits": {"google.com/tpu": tpu.chips_per_host},
        },
        "volumeMounts": [
            {"name": f"bucket-{i}", "mountPath": f"{MOUNTS}/{bucket}", "readOnly": bucket in run.read_only}
            for i, bucket in enumerate(run.buckets)
        ],
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.kind.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.shape,
    }
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": args.service_account,
        "terminationGracePeriodSeconds": args.grace_seconds,
        "nodeSelector": selector,
        "tolerations": [
            {"key": key, "operator": "Exists", "effect": "NoSchedule"}
            for key in ("google.com/tpu", *(["cloud.google.com/gke-spot"] if args.spot else []))
        ],
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "parallelism": tpu.hosts,
        "completions": tpu.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_STOPPED]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if volumes else {}}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": run.name,
            "namespace": args.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {},
            # One slice is one node pool, and no two Jobs share one.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.restarts,
                "rules": [
                    {
                        "name": "stoppedOrDisrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": run.topology.num_slices, "template": {"spec": job}}],
        },
    }


def xpk(run: Run, tpu: Slice, args: argparse.Namespace) -> list[list[str]]:
    """The same with xpk, whose restarts after exit code 75 count among --max-restarts."""
    storages = [
        [
            *["xpk", "storage", "attach", f"{run.name}-{i}", f"--cluster={args.cluster}", "--type=gcsfuse"],
            *[f"--bucket={bucket}", f"--mount-point={MOUNTS}/{bucket}", "--auto-mount=true", "--size=1"],
            f"--readonly={str(bucket in run.read_only).lower()}",
        ]
        for i, bucket in enumerate(run.buckets)
    ]
    workload = [
        *["xpk", "workload", "create", f"--cluster={args.cluster}", f"--workload={run.name}"],
        *[
            f"--tpu-type={tpu.accelerator_type}",
            f"--num-slices={run.topology.num_slices}",
            f"--docker-image={args.image}",
        ],
        *[f"--max-restarts={args.restarts}", f"--restart-on-exit-codes={EXIT_STOPPED}"],
        *[f"--termination-grace-period-seconds={args.grace_seconds}", f"--command={run.shell_command}"],
    ]
    return [*storages, workload]


if __name__ == "__main__":
    exit_with(main)
