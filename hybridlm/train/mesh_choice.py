"""The mesh of `sharding.auto`: chosen from the model, the batch, the devices and their memory, without compiling."""

import math
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybridlm.config import Config, Mesh, MoE
from hybridlm.config_check import ConfigError
from hybridlm.finetune.build import build_trained
from hybridlm.optim import make_optimizer
from hybridlm.sharding import RULES, count_slices, make_mesh
from hybridlm.train.capacity import memory_of
from hybridlm.train.step import init_state

STATE_SHARE = 0.25
"""Of a device's memory, for parameters and optimizer: as much again for their gradients, and half for activations."""


def run_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run on the devices of all processes. Raises ConfigError where its sizes do not fit them."""
    devices = jax.devices()
    memory = _agreed(memory_of(jax.local_devices()[0])) if config.sharding.auto else None
    return make_mesh(chosen_mesh(config, len(devices), count_slices(devices), memory), devices)


def _agreed(memory: int | None) -> int | None:
    """The least that a process has, so that all choose alike."""
    if jax.process_count() == 1:
        return memory
    told = multihost_utils.process_allgather(np.float64(np.inf if memory is None else memory))
    return int(np.min(told)) if np.isfinite(np.min(told)) else None


def chosen_mesh(config: Config, num_devices: int, num_slices: int, memory: int | None) -> Mesh:
    """`config.sharding.mesh`, its sizes of 1 and -1 replaced where `sharding.auto` says so (`tensor` by 1).

    `num_devices` of `num_slices` slices have `memory` bytes each (None: enough). Of the meshes by which the model, the
    batch and its sequences divide, this one has the largest `expert`, then the smallest `context`, then the smallest
    `fsdp` for which the state takes no more than `STATE_SHARE` of the memory, or else the largest; `data` is the rest.
    Raises ConfigError where there is none.
    """
    mesh = config.sharding.mesh
    if not config.sharding.auto:
        return mesh
    mesh = replace(mesh, slices=num_slices if mesh.slices == -1 else mesh.slices, tensor=max(1, mesh.tensor))
    per_slice, left_over = divmod(num_devices, mesh.slices * mesh.tensor)
    if left_over:
        return mesh  # which has a size that `mesh_shape` refuses
    possible = [found for found in _meshes(config, mesh, per_slice) if _divides(config, found)]
    if not possible:
        rows, model = config.train.batch_size // config.train.num_microbatches, config.model
        raise ConfigError(
            "sharding.auto",
            f": no mesh of {num_devices} devices, with the sizes that sharding.mesh sets, divides {rows} sequences per "
            f"microbatch, of {config.data.seq_len} tokens, a width of {model.width} and a vocabulary of "
            f"{model.vocab_size}; take a train.batch_size that is a multiple of "
            f"{config.train.num_microbatches * mesh.slices * per_slice}, or other sizes",
        )
    first = possible[0]
    alike = [found for found in possible if (found.expert, found.context) == (first.expert, first.context)]
    if memory is None or len(alike) == 1:
        return first
    most = STATE_SHARE * memory * first.tensor * first.expert * first.context
    state = state_bytes(config)
    return next((found for found in alike if state <= most * found.fsdp), alike[-1])


def _meshes(config: Config, mesh: Mesh, per_slice: int) -> Iterator[Mesh]:
    """Those with the sizes that `mesh` sets: by falling `expert`, then rising `context`, then rising `fsdp`.

    `per_slice` is the product of all sizes but `slices` and `tensor`.
    """
    num_experts = [block.ffn.num_experts for block in config.model.blocks() if isinstance(block.ffn, MoE)]
    for expert in reversed(divisors(math.gcd(per_slice, *(num_experts or [max(1, mesh.expert)])))):
        for context in divisors(per_slice // expert):
            for fsdp in divisors(left := per_slice // expert // context):
                found = {"data": left // fsdp, "fsdp": fsdp, "expert": expert, "context": context}
                if all(getattr(mesh, axis) in (-1, 1, size) for axis, size in found.items()):
                    yield replace(mesh, **found)


def _divides(config: Config, mesh: Mesh) -> bool:
    """Whether `mesh` cuts the batch, the time and the parameters evenly."""
    rows = config.train.batch_size // config.train.num_microbatches
    sizes = {"sequences": rows, "time": config.data.seq_len}
    sizes |= {"embed": config.model.width, "vocab": config.model.vocab_size}
    return all(size % math.prod(getattr(mesh, axis) for axis in RULES[name]) == 0 for name, size in sizes.items())


def state_bytes(config: Config) -> int:
    """Of the whole training state: parameters, optimizer, tables."""
    init, _ = build_trained(config)
    optimizer, _ = make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(
        lambda: init_state(init, optimizer, config.train.seed, config.optimizer.tables, config.finetune)
    )
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
