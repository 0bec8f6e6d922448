"""How a process learns that it has others, and what it says where they are not there."""

import subprocess
import sys
import time
from typing import Any

import pytest

from hybridlm import distributed
from hybridlm.config_check import ConfigError
from hybridlm.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, agreed, group_of

EXPLICIT = {COORDINATOR: "10.0.0.2:8476", NUM_PROCESSES: "4", PROCESS_ID: "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        EXPLICIT | {NUM_PROCESSES: "1", PROCESS_ID: "0"},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "8"},  # in the batch script, outside srun
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": ""},
    ],
)
def test_one_process_is_left_alone(environment: dict[str, str]) -> None:
    assert group_of(environment) is None


def test_variables_describe_a_group() -> None:
    group = group_of(EXPLICIT)
    assert group is not None
    assert group.arguments == {
        "coordinator_address": "10.0.0.2:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    alone = group_of(EXPLICIT | {COORDINATOR: "127.0.0.1:8476"})
    assert alone is not None
    assert alone.arguments["coordinator_bind_address"] == "127.0.0.1:8476"


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        (SLURM, "slurm"),
        ({"TPU_WORKER_HOSTNAMES": "h0,h1", "TPU_WORKER_ID": "1"}, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "h0", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
    ],
)
def test_clusters_are_left_to_jax(environment: dict[str, str], method: str) -> None:
    group = group_of(environment)
    assert group is not None
    assert group.arguments == {"cluster_detection_method": method}


@pytest.mark.parametrize(
    ("attributes", "method"),
    [
        ({"worker-network-endpoints": "a:b:10.0.0.1,c:d:10.0.0.2"}, "gcetpu"),
        ({"worker-network-endpoints": "a:b:10.0.0.1", "tpu-env": "MEGASCALE_NUM_SLICES: '2'"}, "gcetpu"),
        ({"worker-network-endpoints": "a:b:10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_a_tpu_vm_asks_its_metadata(
    attributes: dict[str, str], method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(distributed, "_attribute", lambda name: attributes.get(name, ""))
    group = group_of({})
    assert (None if group is None else group.arguments["cluster_detection_method"]) == method
    assert group_of({"JAX_PLATFORMS": "cpu"}) is None
    assert group_of({"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NUM_PROCESSES: ""}, "HYBRIDLM_NUM_PROCESSES: is not set"),
        ({COORDINATOR: "10.0.0.2"}, "HYBRIDLM_COORDINATOR=10.0.0.2: must be host:port"),
        ({COORDINATOR: "10.0.0.2:99999"}, "must be host:port"),
        ({NUM_PROCESSES: "four"}, "HYBRIDLM_NUM_PROCESSES=four: must be a whole number"),
        ({PROCESS_ID: "4"}, "HYBRIDLM_PROCESS_ID=4: must be at least 0 and below HYBRIDLM_NUM_PROCESSES=4"),
    ],
)
def test_contradictory_variables_are_one_clear_line(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        group_of(EXPLICIT | change)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


IMPATIENT = """
from dataclasses import replace
from hybridlm import cli, distributed
described = distributed.group_of
distributed.group_of = lambda environment: replace(described(environment), start_seconds=2)
cli.main(["train", "griffin_tiny", "--out", "never-made"])
"""


def test_a_coordinator_that_is_not_there_is_one_line(process_environment: dict[str, str], free_port: Any) -> None:
    address = f"127.0.0.1:{free_port()}"
    group = {COORDINATOR: address, NUM_PROCESSES: "2", PROCESS_ID: "1"}
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", IMPATIENT],
        env=process_environment | group,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    assert process.stderr == (
        f"hybridlm: 2 processes at {address}: after 2 s not all are there; each must be started and reach the first\n"
    )
    assert time.monotonic() - started < 60


UNENDING = """
import threading
import time
import jax
from hybridlm import distributed
distributed.initialize, distributed.LEAVE_SECONDS = (lambda: None), 0.5
jax.distributed.is_initialized = lambda: True
threading.Thread(target=time.sleep, args=(600,)).start()
with distributed.joined():
    raise OSError("the disk does not answer")
"""


def test_a_failed_process_leaves_the_others_also_where_a_thread_of_it_never_ends(
    process_environment: dict[str, str],
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", UNENDING], env=process_environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1
    assert process.stderr.endswith("OSError: the disk does not answer\n")


def test_one_process_agrees_with_itself() -> None:
    assert agreed(True) is True
    assert agreed(False) is False
