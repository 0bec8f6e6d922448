"""Matmul FLOPs of a model from its blocks' own counts, and the peak rate of a device."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.mixers import MIXERS
from hybridlm.model.lm import make_context

# bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. TPU v4 and v5p show a chip as one device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def forward_flops(model: config.Model, length: int) -> int:
    """Forward FLOPs per token at sequence length `length`, head included."""
    context = make_context(model, config.Kernels())
    total = 2 * model.width * model.vocab_size
    for block in model.blocks():
        total += MIXERS.module_of(block.mixer).flops(block.mixer, context, length)
        if block.ffn is not None:
            total += FFNS.module_of(block.ffn).flops(block.ffn, context)
    return total


def idle_parameters(model: config.Model) -> int:
    """Parameters that a token does not use: those of the experts that it does not go to, on average."""
    context = make_context(model, config.Kernels())
    total = 0
    for block in model.blocks():
        idle = None if block.ffn is None else getattr(FFNS.module_of(block.ffn), "idle_parameters", None)
        total += 0 if idle is None else idle(block.ffn, context)
    return total


def training_flops(model: config.Model, length: int) -> int:
    """Forward and backward FLOPs per token. What rematerialisation repeats is not counted, as is usual for MFU."""
    return 3 * forward_flops(model, length)


def peak_flops(device: Any) -> float:
    """Peak FLOP/s of one device: the data sheet's, or where it is not known, a measured float32 matmul's."""
    if known := PEAK_FLOPS.get(device.device_kind):
        return known
    return measured_flops(device)


@functools.cache
def measured_flops(device: Any) -> float:
    """FLOP/s of a 1024-cube float32 matmul, the best of a tenth of a second; all CPU devices of a process share its
    cores.
    """
    n = 1024
    with jax.default_device(device):
        x = jnp.ones((n, n), jnp.float32)
        matmul = jax.jit(jnp.dot)
        matmul(x, x).block_until_ready()
        seconds: list[float] = []
        while sum(seconds) < 0.1:
            start = time.perf_counter()
            matmul(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / (jax.local_device_count() if device.platform == "cpu" else 1)
