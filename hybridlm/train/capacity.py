"""Whether a run's state fits into its devices, found out before anything is allocated."""

import math
import os
from typing import Any

import jax

from hybridlm.config_check import ConfigError
from hybridlm.train.step import TrainState
from hybridlm.train.tables import tables_of

GIB = 2**30


def check_fits(state: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError where the abstract `state`, laid out on `mesh`, is larger than what its devices have.

    Activations come on top, so that a state which passes may still be too large.
    """
    device = mesh.local_devices[0]  # another process's does not tell
    memory = memory_of(device)
    needed = bytes_per_device(state)
    if memory is None or needed <= memory:
        return
    tables = bytes_per_device((tables_of(state.params), state.table_states))
    largest = f", of which memories' tables and their optimizer have {tables / GIB:.2f}" if tables else ""
    remedy = "lower num_rows, take bfloat16 rows or RowAdagrad" if tables > needed / 2 else "make the model smaller"
    raise ConfigError(
        "model",
        f": parameters and optimizer state need {needed / GIB:.2f} GiB on each of {mesh.size} devices{largest}; "
        f"{device.device_kind} has {memory / GIB:.2f}; {remedy}, or spread them over more devices (sharding.mesh)",
    )


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays; one without a sharding lies whole on every device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def share_of_host(num_devices: int) -> int:
    """Bytes of this machine's memory for each of so many devices of its CPU."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_devices


def memory_of(device: Any) -> int | None:
    """Bytes that arrays on `device` may take; the devices of a CPU share its memory. None where it does not tell."""
    if device.platform == "cpu":
        return share_of_host(jax.local_device_count())
    return (device.memory_stats() or {}).get("bytes_limit")
