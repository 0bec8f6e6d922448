"""The one place where processes of a run find each other, before any device is touched.

A run has as many processes as whoever started it says:

- `launch/box.py`, or a person: `HYBRIDLM_COORDINATOR=host:port` (a free port on the machine of process 0),
  `HYBRIDLM_NUM_PROCESSES` and `HYBRIDLM_PROCESS_ID`, all three. With `JAX_LOCAL_DEVICE_IDS=0` a process uses that GPU
  alone;
- SLURM: `srun` of several tasks, one process per task and one GPU per process (`SLURM_*`);
- GKE: pods of a TPU slice (`TPU_WORKER_HOSTNAMES`), of several slices (`MEGASCALE_*`), both set by the platform;
- a Cloud TPU VM: the workers that its metadata server names.

Otherwise there is one process, and JAX's coordination service is not started at all.
"""

import atexit
import contextlib
import glob
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils

from hybridlm.config_check import ConfigError
from hybridlm.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_WRONG_INPUT

COORDINATOR = "HYBRIDLM_COORDINATOR"
NUM_PROCESSES = "HYBRIDLM_NUM_PROCESSES"
PROCESS_ID = "HYBRIDLM_PROCESS_ID"
VARIABLES = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)

LEAVE_SECONDS = 10.0
"""For which threads of a process that failed are waited for, such as a save that will not end."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True)
class Group:
    """How a process joins the others: arguments of `jax.distributed.initialize`, and what to call it in an error."""

    name: str
    arguments: Mapping[str, Any]
    start_seconds: int
    """For how long the processes may start after one another."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """What is done in here is done together with the other processes of this run, if there are any.

    One that fails leaves soon, with its own exit code. JAX would let it wait for the others, who wait for it; and alone
    it would wait for the threads of a save that was given up, which wait for one another for ten minutes.
    """
    initialize()
    try:
        yield
    except BaseException as error:
        code = {ConfigError: EXIT_WRONG_INPUT, KeyboardInterrupt: EXIT_INTERRUPTED}.get(type(error), EXIT_FAILED)
        together = jax.distributed.is_initialized()
        if together:
            # Registered last it runs first, after the error was told and before JAX's own farewell, but not before
            # all threads have ended.
            atexit.register(_leave, code)
        threading.Thread(target=_leave_soon, args=(code, together), daemon=True).start()
        raise


def _leave_soon(code: int, together: bool) -> None:
    while not together and threading.main_thread().is_alive():  # who calls this from Python goes on after the error
        time.sleep(0.5)
    time.sleep(LEAVE_SECONDS)
    _leave(code)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def initialize() -> None:
    """Join the other processes of this run, if there are any. Call it once, before anything asks for devices.

    Where the others do not come in time, the process ends with one line and exit code 1.

    Raises:
        ConfigError: the variables that describe the processes are incomplete or contradict each other.
        OSError: the coordinator's port is taken.
    """
    group = group_of(os.environ)
    if group is None:
        return
    # JAX's own timeout ends the process with a stack of C++; ours comes first.
    timer = threading.Timer(group.start_seconds, _give_up, (group,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **group.arguments,
            initialization_timeout=2 * group.start_seconds,
            # A lost process ends the others after this long; JAX's default is 100 s.
            heartbeat_timeout_seconds=40,
            # Between the first process that leaves and the last; checkpoints are waited for before that.
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{group.name}: the processes cannot be connected: {reason}") from None
    finally:
        timer.cancel()


def _give_up(group: Group) -> None:
    message = f"{group.name}: after {group.start_seconds} s not all are there; each must be started and reach the first"
    os.write(2, f"hybridlm: {message}\n".encode())
    # The main thread waits in C++ and hears no exception.
    os._exit(EXIT_FAILED)


def group_of(environment: Mapping[str, str]) -> Group | None:
    """What the environment says about the processes of this run; None for one process alone."""
    if any(name in environment for name in VARIABLES):
        return _described(environment)
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment:
        tasks, nodes = environment["SLURM_NTASKS"], environment["SLURM_STEP_NODELIST"]
        return Group(f"the {tasks} SLURM tasks on {nodes}", {"cluster_detection_method": "slurm"}, 300)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or "1")
    if "," in hosts or (hosts and slices > 1):
        return Group(f"the hosts {hosts} of {slices} TPU slice(s)", {"cluster_detection_method": "gketpu"}, 600)
    if not hosts and _has_tpu(environment):
        workers = _attribute("worker-network-endpoints")
        if "," in workers or "MEGASCALE_NUM_SLICES" in _attribute("tpu-env"):
            return Group(f"the TPU workers {workers}", {"cluster_detection_method": "gcetpu"}, 600)
    return None


def _described(environment: Mapping[str, str]) -> Group | None:
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise ConfigError(missing[0], f": is not set; several processes need {', '.join(VARIABLES)}")
    address = environment[COORDINATOR]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(COORDINATOR, f"={address}: must be host:port, such as 10.0.0.2:8476")
    count, index = (_number(environment, name) for name in (NUM_PROCESSES, PROCESS_ID))
    if not 0 <= index < count:
        raise ConfigError(PROCESS_ID, f"={index}: must be at least 0 and below {NUM_PROCESSES}={count}")
    if count == 1:
        return None
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    if host in ("127.0.0.1", "localhost"):
        # JAX listens on all interfaces otherwise, and asks nobody who they are.
        arguments["coordinator_bind_address"] = address
    return Group(f"{count} processes at {address}", arguments, 120)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigError(name, f"={text}: must be a whole number")
    return int(text)


def _has_tpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    # TPU_SKIP_MDS_QUERY is libtpu's own way to say that there is no metadata server to ask.
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms):
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _attribute(name: str) -> str:
    """What the metadata server of a Cloud TPU VM says; empty on other machines, which have no such attribute."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return ""


def is_first() -> bool:
    """Whether this is the process that writes files and talks to people."""
    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What the first process thinks: a decision that all must take alike."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(value))


def together(what: str) -> None:
    """Wait until all processes are here; `what` is the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
